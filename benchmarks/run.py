"""Runs workloads on engines."""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from functools import partial
from random import Random

import torch

from benchmarks.engines import ENGINES, PEERS, Engine, Nanovllm, ReplicatedNanovllm, timed
from benchmarks.options import UsageError
from benchmarks.report import NOTHING_TO_PLOT, Row, progress
from benchmarks.start import check_start, measure_start
from benchmarks.trace import write_trace
from benchmarks.workloads import WORKLOAD_NAMES, WORKLOADS, Figure, Group, chosen_workloads, random_prompts


def run_engine(args: Namespace) -> list[Row]:
    """Run the workloads on one engine in this process; return the rows of the table."""
    rows = []
    names = chosen_workloads(args)
    if "offline" in names and not torch.cuda.is_available() and args.num_seqs * args.output_len[1] > 1 << 15:
        small = "--num-seqs 16 --input-len 16 256 --output-len 16 128 --max-num-seqs 16"
        print(f"offline has a GPU's sizes, and takes long on a CPU. For this one: {small}", file=sys.stderr)
    if "start" in names:  # before this process takes the GPU's memory
        names.remove("start")
        check_start(args)
        rows += progress([measure_start(args)])
    if not names:
        return rows
    # Also one replica, so that the table shows what more of them gain.
    makers = [partial(ReplicatedNanovllm, num_replicas=number) for number in sorted({1, args.replicas or 1})]
    for make in makers if args.replicas else [ENGINES[args.engine[0]]]:
        try:
            engine = make(args)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        try:
            rows += measure_workloads(engine, names, args)
            if args.trace and isinstance(engine, Nanovllm):
                try:
                    write_trace(engine, args)
                except (OSError, ValueError) as error:  # the figures are still shown
                    print(f"bench.py: the trace cannot be written: {error}", file=sys.stderr)
        finally:
            engine.close()
    return sorted(rows, key=lambda row: WORKLOAD_NAMES.index(row["workload"]))


def run_engines(args: Namespace, command: list[str]) -> list[Row]:
    """Run one engine in this process, or several in one process each: none would leave the GPU's memory to the next.

    Args:
        command: the command that was given. Options that are appended to it replace its own.
    """
    if len(args.engine) == 1:
        return run_engine(args)
    rows = []
    for name in args.engine:
        trace = args.trace if args.trace and name == "nanovllm" else ""
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            options = ["--engine", name, "--json", file.name, "--plot", "", "--trace", trace]
            if subprocess.run([*command, *options], stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"the run of {name} failed")
            rows += json.load(file)["rows"]
    return sorted(rows, key=lambda row: WORKLOAD_NAMES.index(row["workload"]))


def measure_workloads(engine: Engine, names: list[str], args: Namespace) -> list[Row]:
    """Check the requests, warm up and run all workloads, or the comparison instead."""
    if args.plot and engine.peaks is None:
        raise UsageError(NOTHING_TO_PLOT)
    check_lengths(engine, [*names, "offline"] if args.trace else names, args)
    half = engine.max_model_len // 2
    prompts = random_prompts(Random(4), 4, min(64, half), min(64, half), engine.config.vocab_size)
    engine.generate(Group(prompts, [min(8, half)] * 4))
    if args.compare and isinstance(engine, Nanovllm):
        return progress(compare(engine, args))
    rows = []
    for name in names:
        rows += progress(run_workload(engine, name, args))
    return rows


def check_lengths(engine: Engine, names: list[str], args: Namespace) -> None:
    """Raise UsageError if a request would not fit the model."""
    for name in names:
        groups, _ = WORKLOADS[name](args, engine.config.vocab_size, engine.max_model_len)
        longest = max(len(ids) + n for group in groups for ids, n in zip(group.prompts, group.lens, strict=True))
        if longest > engine.max_model_len:
            raise UsageError(f"{name} has a request of {longest} tokens, but max_model_len is {engine.max_model_len}")


def run_workload(engine: Engine, name: str, args: Namespace) -> list[Row]:
    """Return a row for each figure of a workload. Its seconds are medians of `args.repeat` runs with no prefix cached.

    One more run has the engine's instruments.
    """
    groups, figures = WORKLOADS[name](args, engine.config.vocab_size, engine.max_model_len)
    runs = []
    for _ in range(args.repeat):
        engine.reset()
        runs.append([timed(engine.generate, group) for group in groups])
    # Recording the steps costs time, so it has a run of its own.
    engine.reset()
    measured = columns([engine.instrument(group) for group in groups])
    measured["seconds"] = [statistics.median(run[i] for run in runs) for i in range(len(groups))]
    row = {
        "workload": name,
        "engine": engine.name,
        "input_tokens": sum(len(prompt) for group in groups for prompt in group.prompts),
        "output_tokens": sum(sum(group.lens) for group in groups),
    }
    if engine.on_gpu:
        # This is the first GPU's memory, whoever holds it. Allocators keep what they took, so it is the peak.
        free, total = torch.cuda.mem_get_info()
        row["gpu_gib"] = (total - free) / 2**30
    return [row | figure_row(figure, measured) for figure in figures]


def columns(groups: list[dict[str, float]]) -> dict[str, list[float]]:
    """Turn the measurements of each group into a list for each measurement."""
    return {key: [group[key] for group in groups] for key in groups[0]}


def figure_row(figure: Figure, measured: dict[str, list[float]]) -> Row:
    """Return a figure with its limit and the rates that were reached, as far as they were measured.

    Args:
        measured: a list of one value for each group; the keys are "seconds" and those of `Engine.instrument`.
    """
    totals = {key: figure.total(values) for key, values in measured.items()}
    row = {"unit": figure.unit, "value": figure.value(measured["seconds"]), **totals}
    if "limit" in totals:
        row["limit"] = figure.value(measured["limit"])
        row["percent"] = 100 * totals["limit"] / totals["seconds"]
    if "steps" in totals:
        row["tb_s"] = totals["bytes"] / totals["seconds"] / 1e12
        row["tflop_s"] = totals["flops"] / totals["seconds"] / 1e12
        for key in ("host", "gpu"):
            if key in totals:
                row[f"{key}_ms"] = totals[key] / totals["steps"] * 1e3
    return row


def compare(engine: Nanovllm, args: Namespace) -> list[Row]:
    """Run the peer's workloads on both engines, alternating; return a row for each figure and engine."""
    make, names = PEERS[args.compare]
    check_lengths(engine, names, args)
    try:
        peer = make(engine)
    except ValueError as error:
        raise UsageError(str(error)) from error
    rows = []
    for name in names:
        groups, figures = WORKLOADS[name](args, engine.config.vocab_size, engine.max_model_len)
        peer.generate(replace(groups[0], lens=[2] * len(groups[0].lens)))
        seconds = {engine.name: [], peer.name: []}
        for _ in range(args.repeat):
            seconds[peer.name].append([timed(peer.generate, group) for group in groups])
            engine.reset()
            seconds[engine.name].append([timed(engine.generate, group) for group in groups])
        medians = {key: [statistics.median(run) for run in zip(*runs, strict=True)] for key, runs in seconds.items()}
        row = {"workload": name, "output_tokens": sum(sum(group.lens) for group in groups)}
        for figure in figures:
            rows += [row | {"engine": key} | figure_row(figure, {"seconds": times}) for key, times in medians.items()]
            ratio = figure.total(medians[peer.name]) / figure.total(medians[engine.name])
            print(f"{name}, {figure.unit}: nanovllm is {ratio:.2f} times {peer.name}", file=sys.stderr)
    peer.close()
    return rows
