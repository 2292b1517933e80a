"""Benchmarks: `python bench.py --help`.

The workloads are those of nano-vLLM's bench (offline) and what an engine's users feel besides (latency, prefill,
prefix, start). Prompts are random token ids, so any model will do, also random weights of a real shape:

    python bench.py --model qwen3-0.6b --load-format dummy                       # offline, at nano-vLLM's parameters
    python bench.py --workload all --model qwen3-8b --load-format dummy --plot limits.svg
    python bench.py --engine vllm nanovllm --model qwen3-8b --load-format dummy  # the same token ids, side by side
    python bench.py --num-seqs 16 --input-len 16 256 --output-len 16 128 --compare transformers    # on a CPU

Each figure stands beside its limit: what memory bandwidth and arithmetic allow for the very steps that the run took.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from random import Random
from unittest.mock import patch

# Before torch is imported: its threads sleep while they wait, so that other programs may use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.models.registry import PRESETS, ModelConfig
from nanovllm.utils.hub import ModelSource, open_model

# Of one GPU, by a part of its name: HBM TB/s as measured by a plain read, and dense bf16 TFLOP/s of large products.
PEAKS = {"H100 80GB": (3.0, 790.0), "H200": (4.3, 790.0)}
TRACE_STEPS = 6
START_LEN = 128  # prompt of the start workload, which asks for one token

# -- workloads -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Requests that are given at once and timed together: prompts of ids, and how many tokens each asks for."""

    prompts: list[list[int]]
    lens: list[int]
    temperature: float = 0.0
    options: dict = field(default_factory=dict)  # of SamplingParams, besides


@dataclass(frozen=True)
class Figure:
    """What a workload's users look at: `amount` of something per second, or milliseconds for each of them.

    Args:
        total: of a value for each group (seconds, or bytes, or steps), the part that the figure is about.
    """

    unit: str
    amount: float
    total: Callable[[list[float]], float] = sum

    def value(self, seconds: list[float]) -> float:
        total = self.total(seconds)
        return total / self.amount * 1e3 if self.unit.startswith("ms") else self.amount / total


def random_prompts(rng: Random, count: int, low: int, high: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of low to high random ids; ids stay below 10,000 as in nano-vLLM's bench, which any model has."""
    return [[rng.randint(0, min(10_000, vocab_size - 1)) for _ in range(rng.randint(low, high))] for _ in range(count)]


def offline(args, vocab_size: int, _: int) -> tuple[list[Group], list[Figure]]:
    """Requests of mixed lengths, all given at once: output tokens/s."""
    rng = Random(0)
    prompts = random_prompts(rng, args.num_seqs, *args.input_len, vocab_size)
    lens = [rng.randint(*args.output_len) for _ in range(args.num_seqs)]
    return [Group(prompts, lens, 0.6)], [Figure("tok/s", sum(lens))]


def latency(args, vocab_size: int, _: int) -> tuple[list[Group], list[Figure]]:
    """One request of 128 ids, three times: time to the first token, and per token over `latency_tokens` more."""
    rng, groups = Random(1), []
    for _ in range(3):
        first, whole = random_prompts(rng, 2, 128, 128, vocab_size)
        groups += [Group([first], [1]), Group([whole], [1 + args.latency_tokens])]

    def decoding(values: list[float]) -> float:
        return statistics.median(whole - first for first, whole in zip(values[::2], values[1::2], strict=True))

    first = Figure("ms to first token", 1, lambda values: statistics.median(values[::2]))
    return groups, [first, Figure("ms/token", args.latency_tokens, decoding)]


def prefill(args, vocab_size: int, max_model_len: int) -> tuple[list[Group], list[Figure]]:
    """Long prompts, one new token each: input tokens/s."""
    length = min(4000, max_model_len - 1)
    prompts = random_prompts(Random(2), args.prefill_seqs, length, length, vocab_size)
    return [Group(prompts, [1] * len(prompts))], [Figure("tok/s in", length * len(prompts))]


def prefix(args, vocab_size: int, _: int) -> tuple[list[Group], list[Figure]]:
    """Requests that share `prefix_len` ids, have 64 of their own, and ask for 64 tokens: requests/s."""
    rng = Random(3)
    shared = random_prompts(rng, 1, args.prefix_len, args.prefix_len, vocab_size)[0]
    prompts = [shared + own for own in random_prompts(rng, args.prefix_seqs, 64, 64, vocab_size)]
    return [Group(prompts, [64] * len(prompts))], [Figure("req/s", len(prompts))]


# What a request may ask for besides. Nothing of it ends a request before its length; all but the first need counting,
# masking or more than a token from each step.
FEATURES = {
    "plain": {},
    "top-k and top-p": {"top_k": 50, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "100 biases": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "allowed ids": {"allowed_token_ids": range(1000)},
    "1 logprob": {"logprobs": 1},
    "20 logprobs": {"logprobs": 20},
    "prompt logprobs": {"prompt_logprobs": 1},
    "stop strings": {"stop": ["\x00never\x00"]},
    "a grammar": {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{20000}"), "ignore_eos": False},
}


def features(args, vocab_size: int, _: int) -> tuple[list[Group], list[Figure]]:
    """The offline workload once for each of FEATURES that the model allows: output tokens/s."""
    rng, groups, figures = Random(5), [], []
    (group,), (figure,) = offline(args, vocab_size, _)
    has_text = args.model not in PRESETS and args.load_format != "dummy" and importlib.util.find_spec("llguidance")
    for name, options in FEATURES.items():
        ids = options.get("allowed_token_ids") or options.get("logit_bias") or [0]
        if max(ids) < vocab_size and (has_text or not {"stop", "structured_outputs"} & set(options)):
            prompts = [random_prompts(rng, 1, len(p), len(p), vocab_size)[0] for p in group.prompts]  # none is cached
            place = len(groups)
            groups.append(Group(prompts, group.lens, group.temperature, options))
            figures.append(Figure(f"tok/s, {name}", figure.amount, lambda values, i=place: values[i]))
    return groups, figures


STANDARD = {"offline": offline, "latency": latency, "prefill": prefill, "prefix": prefix}
WORKLOADS = STANDARD | {"features": features}


def start(args) -> dict:
    """A new process, from its first import to its first token."""
    code = (
        "import time; begin = time.perf_counter()\n"
        "import json, sys; from nanovllm import LLM, SamplingParams\n"
        "with LLM(**json.loads(sys.argv[1])) as llm:\n"
        "    ready = time.perf_counter() - begin\n"
        f"    llm.generate([[1] * {START_LEN}], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)\n"
        "    print(json.dumps({'ready_s': ready, 'value': time.perf_counter() - begin}))"
    )
    command = [sys.executable, "-c", code, json.dumps(engine_arguments(args))]
    runs = []
    for _ in range(args.repeat):
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit("the run of start failed")
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {"workload": "start", "engine": "nanovllm", "unit": "s to first token", **medians}


# -- what a run costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Bytes moved and operations done by each step of a run, [steps]: the least that its batches need."""

    bytes: np.ndarray
    flops: np.ndarray

    def limit(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds if every step keeps either the memory or the arithmetic fully busy."""
        return float(np.maximum(self.bytes / bytes_per_s, self.flops / flops_per_s).sum())


def body_parameters(config: ModelConfig) -> int:
    """Of the layers and the last norm: what every token passes through."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = hidden * (2 * queries + 2 * keys + 3 * inner + 2) + config.qk_norm * 2 * config.head_dim
    layer += config.qkv_bias * (queries + 2 * keys) + config.o_bias * hidden + config.mlp_bias * (2 * inner + hidden)
    return config.num_layers * layer + hidden


class BlockTables:
    """The slots' block tables as the batches say them, to count what rows share only once."""

    def __init__(self, batches: list[Batch], block_size: int):
        news = np.array([new for batch in batches for new in batch.new_blocks]).reshape(-1, 3)
        num_slots, width, num_blocks = news.max(axis=0, initial=-1) + 1
        self.table = np.zeros((num_slots, width), dtype=np.int64)
        self.filled = np.zeros(num_blocks, dtype=np.int64)
        self.block_size = block_size

    def apply(self, batch: Batch) -> None:
        if batch.new_blocks:
            slots, places, blocks = np.array(batch.new_blocks).T
            self.table[slots, places] = blocks

    def distinct_tokens(self, slots: np.ndarray, contexts: np.ndarray) -> int:
        """Tokens in the blocks of rows with these contexts, each block once. Shared blocks are full ones."""
        firsts = np.arange(-(-contexts.max() // self.block_size)) * self.block_size  # of each place, [places]
        used = firsts < contexts[:, None]  # [rows, places]
        blocks = self.table[slots, : len(firsts)][used]
        self.filled[blocks] = np.minimum(contexts[:, None] - firsts, self.block_size)[used]
        total = int(self.filled.sum())
        self.filled[blocks] = 0
        return total


def count_costs(batches: list[Batch], config: ModelConfig, itemsize: int, block_size: int) -> Costs:
    """What the steps of a run, which began with no sequence running, move and compute at least.

    A step reads the body's weights once, the LM head if any row samples, an embedding for each token, and the keys and
    values of its rows' contexts, those of shared blocks once; it writes those of its tokens. Of the last layer, tokens
    that are not a row's last need keys and values only.
    """
    body, head = body_parameters(config), config.vocab_size * config.hidden_size
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * config.num_layers * itemsize  # of a token
    queries = config.num_heads * config.head_dim
    rest = config.hidden_size * (2 * queries + 3 * config.intermediate_size)  # of the last layer
    tables, lengths, costs = BlockTables(batches, block_size), {}, []
    for batch in batches:
        tables.apply(batch)
        rows = [(slot, lengths[slot], 1) for slot in batch.decode_slots]
        rows += [(chunk.slot, chunk.start, len(chunk.token_ids)) for chunk in batch.chunks]
        lengths.update((slot, before + new) for slot, before, new in rows)
        slots, before, new = np.array(rows).T
        num_tokens = int(new.sum())
        num_sampled = len(batch.decode_slots) + sum(chunk.samples for chunk in batch.chunks)
        attended = int((new * before + new * (new + 1) // 2).sum()) * (config.num_layers - 1)
        attended += int((before + new).sum())
        weights = body + (head if num_sampled else 0) + num_tokens * config.hidden_size
        moved = weights * itemsize + kv_bytes * (tables.distinct_tokens(slots, before + new) + num_tokens)
        used = body * num_tokens - rest * (num_tokens - len(new)) + head * num_sampled
        costs.append((moved, 2 * used + 4 * queries * attended))
    return Costs(*np.array(costs, dtype=float).reshape(-1, 2).T)


def find_peaks(args, engine: "Nanovllm") -> tuple[float, float] | None:
    """Bytes/s and operations/s of the devices together; None if unknown. One given alone is the only limit."""
    known = (None, None)
    if engine.on_gpu and engine.itemsize == 2:
        name = torch.cuda.get_device_name()
        known = next((peaks for part, peaks in PEAKS.items() if part in name), known)
    given = [args.hbm_tb_s or known[0], args.tflops or known[1]]
    if given == [None, None]:
        return None
    ranks = args.tensor_parallel_size or 1
    bandwidth, rate = (ranks * 1e12 * peak if peak else float("inf") for peak in given)
    return bandwidth, rate


# -- engines -------------------------------------------------------------------------------------------------------


def engine_arguments(args) -> dict:
    names = ("model", "load_format", "max_model_len", "max_num_seqs", "tensor_parallel_size", "enforce_eager", "dtype")
    names += OWN_OPTIONS
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


OWN_OPTIONS = ("device", "attention_backend", "overlap")  # a peer has no such thing, or names it otherwise


class Nanovllm:
    """This engine, and what a peer does not tell: what its steps cost, and who waits for whom."""

    name = "nanovllm"

    def __init__(self, args):
        self.llm = LLM(**engine_arguments(args))
        self.config, self.max_model_len = self.llm.source.config, self.llm.max_model_len
        self.itemsize = self.llm.executor.runner.dtype.itemsize
        self.on_gpu = self.llm.executor.runner.device.type == "cuda"
        self.peaks = find_peaks(args, self)

    def reset(self) -> None:
        self.llm.scheduler.block_manager.reset_prefix_cache()

    def generate(self, group: Group) -> None:
        self.llm.generate(group.prompts, self.params(group), use_tqdm=False)

    @staticmethod
    def params(group: Group) -> list[SamplingParams]:
        options = {"temperature": group.temperature, "ignore_eos": True, **group.options}
        return [SamplingParams(max_tokens=n, **options) for n in group.lens]

    def measure(self, group: Group) -> dict:
        """Seconds of `group`, and what its steps cost, counted when the time is taken."""
        batches, launch = [], self.llm.executor.launch

        def record(batch: Batch) -> None:
            batches.append(batch)
            launch(batch)

        with patch.object(self.llm.executor, "launch", record):
            measured = {"seconds": timed(self.generate, group)}
        block_size = self.llm.scheduler.block_manager.block_size
        costs = count_costs(batches, self.config, self.itemsize, block_size)
        measured |= {"steps": len(batches), "bytes": float(costs.bytes.sum()), "flops": float(costs.flops.sum())}
        if self.peaks:
            measured["limit"] = costs.limit(*self.peaks)
        return measured

    def instrument(self, group: Group) -> dict:
        """Seconds of host and GPU in a run of its own, because the instruments cost time."""
        waited, events = 0.0, []
        launch, collect = self.llm.executor.launch, self.llm.executor.collect

        def launch_between_events(batch: Batch) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            launch(batch)
            pair[1].record()
            events.append(pair)

        def timed_collect() -> list[int]:
            nonlocal waited
            begin = time.perf_counter()
            tokens = collect()
            waited += time.perf_counter() - begin
            return tokens

        with ExitStack() as stack:
            stack.enter_context(patch.object(self.llm.executor, "collect", timed_collect))
            if self.on_gpu:
                stack.enter_context(patch.object(self.llm.executor, "launch", launch_between_events))
            seconds = timed(self.generate, group)
        measured = {"host": seconds - waited}
        if self.on_gpu:
            torch.cuda.synchronize()
            measured["gpu"] = sum(begin.elapsed_time(end) for begin, end in events) / 1e3
        return measured

    def close(self) -> None:
        self.llm.close()


class Vllm:
    """vLLM, with the same token ids, lengths and sampling."""

    name = "vllm"

    def __init__(self, args):
        import vllm

        source = open_model(args.model, args.load_format or "auto")
        self.config = source.config
        self.max_model_len = min(args.max_model_len or 4096, self.config.max_position)
        self.folder = tempfile.TemporaryDirectory()
        self.sampling_params = vllm.SamplingParams
        names = ("load_format", "max_num_seqs", "tensor_parallel_size", "enforce_eager", "dtype")
        self.llm = vllm.LLM(
            model=str(source.path or write_config(source, self.folder.name)),
            skip_tokenizer_init=True,
            max_model_len=self.max_model_len,
            gpu_memory_utilization=0.9,
            **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
        )
        self.on_gpu = torch.cuda.is_available()

    def reset(self) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, group: Group) -> None:
        options = {"temperature": group.temperature, "ignore_eos": True, "detokenize": False}
        params = [self.sampling_params(max_tokens=n, **options) for n in group.lens]
        self.llm.generate([{"prompt_token_ids": ids} for ids in group.prompts], params, use_tqdm=False)

    def measure(self, group: Group) -> dict:
        return {"seconds": timed(self.generate, group)}

    def close(self) -> None:
        self.folder.cleanup()


ENGINES = {engine.name: engine for engine in (Nanovllm, Vllm)}


def write_config(source: ModelSource, folder: str) -> str:
    """A folder with the config.json of a shape without weights, for engines that know no such shapes."""
    from transformers import AutoConfig

    options = asdict(source.config) | {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}  # all are Qwen3's
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": options.pop("rope_theta")}
    longer = {"layers": "hidden_layers", "heads": "attention_heads", "kv_heads": "key_value_heads"}
    options |= {f"num_{theirs}": options.pop(f"num_{ours}") for ours, theirs in longer.items()}
    options["max_position_embeddings"] = options.pop("max_position")
    AutoConfig.for_model(**options).save_pretrained(folder)
    return folder


def timed(call: Callable, *arguments, **options) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call(*arguments, **options)
    return time.perf_counter() - begin


# -- running -------------------------------------------------------------------------------------------------------


def run_workload(engine, name: str, args) -> list[dict]:
    """A row of the table for each figure of a workload; seconds are medians of `args.repeat` cold runs."""
    groups, figures = WORKLOADS[name](args, engine.config.vocab_size, engine.max_model_len)
    runs = []
    for _ in range(args.repeat):
        engine.reset()
        runs.append([engine.measure(group) for group in groups])
    measured = {key: [run[key] for run in runs[0]] for key in runs[0][0]}
    measured["seconds"] = [statistics.median(run[i]["seconds"] for run in runs) for i in range(len(groups))]
    if isinstance(engine, Nanovllm):
        engine.reset()
        instrumented = [engine.instrument(group) for group in groups]
        measured |= {key: [group[key] for group in instrumented] for key in instrumented[0]}
    row = {
        "workload": name,
        "engine": engine.name,
        "input_tokens": sum(len(prompt) for group in groups for prompt in group.prompts),
        "output_tokens": sum(sum(group.lens) for group in groups),
    }
    if engine.on_gpu:  # of the first GPU, whoever holds it; allocators keep what they took, so this is the peak
        free, total = torch.cuda.mem_get_info()
        row["gpu_gib"] = (total - free) / 2**30
    return [row | figure_row(figure, measured) for figure in figures]


def figure_row(figure: Figure, measured: dict[str, list[float]]) -> dict:
    """A figure with its limit, and the rates it was reached at; what was not measured is left out."""
    totals = {key: figure.total(values) for key, values in measured.items()}
    row = {"unit": figure.unit, "value": figure.value(measured["seconds"]), **totals}
    if "limit" in totals:
        row |= {"limit": figure.value(measured["limit"]), "percent": 100 * totals["limit"] / totals["seconds"]}
    if "steps" in totals:
        row["tb_s"] = totals["bytes"] / totals["seconds"] / 1e12
        row["tflop_s"] = totals["flops"] / totals["seconds"] / 1e12
        row |= {f"{key}_ms": totals[key] / totals["steps"] * 1e3 for key in ("host", "gpu") if key in totals}
    return row


def compare_transformers(engine: Nanovllm, args) -> list[dict]:
    """The offline requests through transformers' own batched, left-padded `generate`, same weights and dtype."""
    from transformers import AutoModelForCausalLM

    (group,), (figure,) = offline(args, engine.config.vocab_size, engine.max_model_len)
    runner, path = engine.llm.executor.runner, engine.llm.source.path
    where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = AutoModelForCausalLM.from_pretrained(where, **options, dtype=runner.dtype).to(runner.device).eval()
    longest = max(map(len, group.prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in group.prompts], device=runner.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group.prompts], device=runner.device)
    sampling = dict(do_sample=True, temperature=0.6, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)

    def run(num_tokens: int) -> float:
        return timed(model.generate, ids, attention_mask=mask, max_new_tokens=num_tokens, **sampling)

    run(2)
    ours, theirs = [], []
    for _ in range(args.repeat):
        theirs.append(run(max(group.lens)))  # counts as what was asked for: the padding of the shorter rows is waste
        engine.reset()
        ours.append(timed(engine.generate, group))
    seconds = {"nanovllm": statistics.median(ours), "transformers": statistics.median(theirs)}
    print(f"nanovllm is {seconds['transformers'] / seconds['nanovllm']:.2f} times transformers", file=sys.stderr)
    row = {"workload": "offline", "output_tokens": sum(group.lens)}
    return [row | {"engine": name} | figure_row(figure, {"seconds": [value]}) for name, value in seconds.items()]


def write_trace(engine: Nanovllm, args) -> None:
    """Chrome trace of some steps of the offline workload, from the first one that only decodes."""
    from torch.profiler import ProfilerActivity, profile, record_function

    llm, batches = engine.llm, []
    (group,), _ = offline(args, engine.config.vocab_size, engine.max_model_len)
    engine.reset()
    ids = [llm.add_request(*request) for request in zip(group.prompts, engine.params(group), strict=True)]

    def labelled(name: str, function: Callable) -> Callable:
        def call(*arguments):
            if name == "launch":
                batches.append(arguments[0])
            with record_function(f"host: {name}"):
                return function(*arguments)

        return call

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * engine.on_gpu
    phases = ((llm.scheduler, ("schedule", "update")), (llm.executor, ("launch", "collect")))
    with ExitStack() as stack:
        for owner, names in phases:
            for name in names:
                stack.enter_context(patch.object(owner, name, labelled(name, getattr(owner, name))))
        while llm.has_unfinished() and not (batches and not batches[-1].chunks):
            llm.step()
        with profile(activities=activities) as profiler:
            for _ in range(TRACE_STEPS):
                llm.step()
            if engine.on_gpu:
                torch.cuda.synchronize()
    for request_id in ids:
        llm.abort(request_id)
    while llm.has_unfinished():
        llm.step()
    profiler.export_chrome_trace(args.trace)


def run_engine(args, parser: argparse.ArgumentParser) -> list[dict]:
    """The rows of one engine, in this process."""
    rows, names = [], workload_names(args)
    if "offline" in names and not torch.cuda.is_available() and args.num_seqs * args.output_len[1] > 1 << 15:
        small = "--num-seqs 16 --input-len 16 256 --output-len 16 128 --max-num-seqs 16"
        print(f"offline has a GPU's sizes, and takes long on a CPU. For this one: {small}", file=sys.stderr)
    if "start" in names:  # before this process takes the GPU's memory
        names.remove("start")
        check_start(args, parser)
        rows += progress([start(args)])
    if not names:
        return rows
    try:
        engine = ENGINES[args.engine[0]](args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        if args.plot and engine.peaks is None:
            parser.error(NOTHING_TO_PLOT)
        check_lengths(engine, names + ["offline"] * bool(args.trace), args, parser)
        half = engine.max_model_len // 2
        warm_up = random_prompts(Random(4), 4, min(64, half), min(64, half), engine.config.vocab_size)
        engine.generate(Group(warm_up, [min(8, half)] * 4))
        for name in [] if args.compare else names:
            rows += progress(run_workload(engine, name, args))
        if args.compare:
            rows += progress(compare_transformers(engine, args))
        if args.trace:
            write_trace(engine, args)
    finally:
        engine.close()
    return rows


def run_engines(args, argv: list[str]) -> list[dict]:
    """The rows of several engines, each in a process of its own: none would leave the GPU's memory to the next."""
    results = []
    for name in args.engine:
        trace = args.trace if args.trace and name == "nanovllm" else ""
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            own = ["--engine", name, "--json", file.name, "--plot", "", "--trace", trace]
            command = [sys.executable, __file__, *argv, *own]  # of an option given twice the last counts
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"the run of {name} failed")
            results.append(json.load(file))
    rows = [row for result in results for row in result["rows"]]
    return sorted(rows, key=lambda row: [*WORKLOADS, "start"].index(row["workload"]))


# -- showing -------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """With thousands marked, and three digits at least where there is a fraction."""
    if value is None:
        return "-"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 4
    return f"{value:,.{digits}f}"


def progress(rows: list[dict]) -> list[dict]:
    """The rows, after a line of them on stderr."""
    figures = []
    for row in rows:
        counted = f" ({row['output_tokens']:,} in {number(row['seconds'])} s)" if row["unit"] == "tok/s" else ""
        figures.append(f"{row['engine']} {number(row['value'])} {row['unit']}{counted}")
    print(f"{rows[0]['workload']}: {', '.join(figures)}", file=sys.stderr, flush=True)
    return rows


COLUMNS = {
    "limit": "limit",
    "%": "percent",
    "TB/s": "tb_s",
    "TFLOP/s": "tflop_s",
    "host ms/step": "host_ms",
    "GPU ms/step": "gpu_ms",
    "GPU GiB": "gpu_gib",
}


def table(rows: list[dict]) -> str:
    """Aligned text; numbers to the right."""
    lines = [["workload", "engine", "figure", *COLUMNS]]
    for row in rows:
        values = [number(row.get(key)) for key in COLUMNS.values()]
        lines.append([row["workload"], row["engine"], f"{number(row['value'])} {row['unit']}", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<"] * 3 + [">"] * len(COLUMNS)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*line) for line in lines)


NOTHING_TO_PLOT = "--plot has no limits to draw: give --hbm-tb-s or --tflops for this device"
PLOT_MARK = "<!-- nanovllm bench.py -->"
PLOT_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 }
.note { fill: #59636e }
.track { fill: #8c959f; opacity: 0.25 }
.bar { fill: #2f81f7 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .note { fill: #9198a1 } }
</style>"""


def plot(rows: list[dict], title: str) -> str:
    """SVG of how near each figure comes to its limit; it has no background, so that it suits light and dark pages."""
    left, full, step = 190, 300, 30
    height = 56 + step * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}" role="img">',
        PLOT_MARK,
        PLOT_STYLE,
        f'<text x="0" y="16" class="title">{escape(title)}</text>',
        '<text x="0" y="34" class="note">percent of what memory bandwidth and arithmetic allow</text>',
    ]
    for i, row in enumerate(rows):
        y, share = 48 + step * i, row["percent"] / 100
        name = escape(f"{row['workload']}, {row['unit']}")
        value = f"{share:.0%}: {number(row['value'])} of {number(row['limit'])}"
        lines += [
            f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{name}</text>',
            f'<rect class="track" x="{left}" y="{y}" width="{full}" height="20" rx="3"/>',
            f'<rect class="bar" x="{left}" y="{y}" width="{full * min(share, 1):.1f}" height="20" rx="3"/>',
            f'<text x="{left + full + 10}" y="{y + 15}">{value}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


# -- command line --------------------------------------------------------------------------------------------------


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, pair = parser.add_argument, {"type": at_least_1, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--workload", default="offline", choices=[*WORKLOADS, "start", "all"])
    add("--engine", nargs="+", default=["nanovllm"], choices=ENGINES, help="several run one after the other")
    add("--model", help="path, .gguf file, hub id, or a shape: qwen3-0.6b, qwen3-4b, qwen3-8b")
    add("--load-format", choices=["auto", "dummy"])
    add("--device", choices=["auto", "cpu", "cuda"])
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    add("--attention-backend", choices=["auto", "torch", "triton", "flash_attn"])
    add("--tensor-parallel-size", type=at_least_1)
    add("--max-model-len", type=at_least_1)
    add("--max-num-seqs", type=at_least_1)
    add("--overlap", type=int, choices=[0, 1])
    add("--enforce-eager", action="store_true", default=None)
    add("--num-seqs", type=at_least_1, default=256, help="offline: requests")
    add("--input-len", default=[100, 1024], **pair)
    add("--output-len", default=[100, 1024], **pair)
    add("--latency-tokens", type=at_least_1, default=512)
    add("--prefill-seqs", type=at_least_1, default=32)
    add("--prefix-seqs", type=at_least_1, default=512)
    add("--prefix-len", type=at_least_1, default=2048)
    add("--repeat", type=at_least_1, default=1, help="runs of each workload; medians are shown")
    add("--compare", choices=["transformers"], help="run the offline requests through a peer in this process as well")
    add("--hbm-tb-s", type=above_0, help="memory bandwidth of a device, for the limits (H100, H200: known)")
    add("--tflops", type=above_0, help="arithmetic of a device in TFLOP/s, for the limits (H100, H200: known for bf16)")
    add("--json", metavar="FILE", help="write the figures")
    add("--plot", metavar="FILE.svg", help="draw the figures as percent of their limits")
    add("--trace", metavar="FILE.json[.gz]", help=f"write a Chrome trace of {TRACE_STEPS} decode steps of offline")
    return parser


def workload_names(args) -> list[str]:
    """The workloads asked for; only nanovllm's start is measured."""
    if args.workload != "all":
        return [args.workload]
    return [*STANDARD, "start"] if "nanovllm" in args.engine else list(STANDARD)


def check(args, parser: argparse.ArgumentParser) -> None:
    """End with a message if the flags do not fit each other, before anything takes time."""
    for name in ("input_len", "output_len"):
        low, high = getattr(args, name)
        if low > high:
            parser.error(f"--{name.replace('_', '-')}: LOW must be at most HIGH, got {low} {high}")
    for suffixes, path in ((("",), args.json), ((".svg",), args.plot), ((".json", ".json.gz"), args.trace)):
        if path and not path.endswith(suffixes):
            parser.error(f"{path!r} must end in {' or '.join(suffixes)}")
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"there is no folder for {path!r}")
    if args.plot and Path(args.plot).exists() and PLOT_MARK not in Path(args.plot).read_text(errors="replace"):
        parser.error(f"--plot would overwrite {args.plot!r}, which bench.py did not draw")
    peers = [name for name in args.engine if name != "nanovllm"]
    own = [f"--{name.replace('_', '-')}" for name in OWN_OPTIONS if getattr(args, name) is not None]
    missing = [name for name in peers if importlib.util.find_spec(name) is None]
    shows, starts = args.plot or args.trace, args.workload == "start"
    files = [Path(path).resolve() for path in (args.json, args.plot, args.trace) if path]
    for wrong, message in (
        (len(set(args.engine)) < len(args.engine), "--engine names an engine twice"),
        (missing, f"--engine {' '.join(missing)}: it is not installed here"),
        (args.compare and peers, f"--compare {args.compare} goes with no other --engine"),
        (args.compare and args.workload != "offline", f"--compare {args.compare} runs the offline workload only"),
        (
            args.compare and (args.model in PRESETS or args.load_format == "dummy"),
            f"--compare {args.compare} needs a model with weights, not a shape or --load-format dummy",
        ),
        (
            args.compare and importlib.util.find_spec("accelerate") is None,
            f"--compare {args.compare} needs the package accelerate, which the extra 'test' brings",
        ),
        (args.compare and args.plot, "--plot draws limits, which --compare does not count"),
        (peers and args.workload in ("start", "features"), f"--workload {args.workload} measures nanovllm only"),
        (peers and own, f"{' '.join(own)}: nanovllm's own, cannot be given with --engine {' '.join(peers)}"),
        (args.engine == peers and shows, "--plot and --trace show what only nanovllm's runs tell"),
        (starts and shows, "--plot and --trace need a workload other than start"),
        (len(files) > len(set(files)), "--json, --plot and --trace must be different files"),
    ):
        if wrong:
            parser.error(message)


def check_start(args, parser: argparse.ArgumentParser) -> None:
    """End with a message if the new process would fail by its arguments."""
    try:
        max_model_len = Config(**engine_arguments(args)).max_model_len
        max_model_len = min(max_model_len, open_model(args.model, args.load_format or "auto").config.max_position)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if max_model_len <= START_LEN:
        parser.error(f"start has a request of {START_LEN + 1} tokens, but max_model_len is {max_model_len}")


def check_lengths(engine, names: list[str], args, parser: argparse.ArgumentParser) -> None:
    """End with a message if a request would not fit the model."""
    for name in names:
        groups, _ = WORKLOADS[name](args, engine.config.vocab_size, engine.max_model_len)
        most = max(len(ids) + n for group in groups for ids, n in zip(group.prompts, group.lens, strict=True))
        if most > engine.max_model_len:
            parser.error(f"{name} has a request of {most} tokens, but max_model_len is {engine.max_model_len}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    check(args, parser)
    rows = run_engines(args, argv) if len(args.engine) > 1 else run_engine(args, parser)
    print(table(rows))
    model = args.model or "SmolLM2-135M-Instruct"
    device = torch.cuda.get_device_name() if any("gpu_gib" in row for row in rows) else "CPU"
    if args.json:
        result = {"command": shlex.join(["bench.py", *argv]), "model": model, "device": device}
        result |= {"torch": torch.__version__, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        limited = [row for row in rows if "percent" in row]
        if not limited:
            parser.error(NOTHING_TO_PLOT)
        Path(args.plot).write_text(plot(limited, f"{Path(model).name} on {device}"))


if __name__ == "__main__":
    main()
