"""A Chrome trace of some decode steps: what the host and the GPU do, and when."""

import gzip
import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.engines import Nanovllm
from benchmarks.workloads import offline
from nanovllm.engine.step_stats import StepStats

TRACE_STEPS = 6
STEP_EVENT = "host: step"


def write_trace(engine: Nanovllm, args: Namespace) -> None:
    """Trace TRACE_STEPS steps of the offline workload, from the first one that only decodes.

    Raises:
        ValueError: it does not have so many.
        OSError: the file cannot be written.
    """
    llm = engine.llm
    (group,), _ = offline(args, engine.config.vocab_size, engine.max_model_len)
    engine.reset()
    params = engine.sampling_params(group)
    request_ids = [llm.add_request(*request) for request in zip(group.prompts, params, strict=True)]
    activities = [ProfilerActivity.CPU]
    if engine.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with engine.recorded_steps() as steps:
        while llm.has_unfinished() and not (steps and only_decodes(steps[-1])):
            llm.step()
        steps.clear()
        starts = []
        with profile(activities=activities) as profiler:
            for _ in range(TRACE_STEPS):
                with record_function(STEP_EVENT):
                    starts.append(time.perf_counter())
                    llm.step()
            if engine.on_gpu:
                torch.cuda.synchronize()
    if len(steps) < TRACE_STEPS or not all(map(only_decodes, steps)):
        raise ValueError(f"the offline workload has fewer than {TRACE_STEPS} decode steps; raise --output-len")
    for request_id in request_ids:
        llm.abort(request_id)
    while llm.has_unfinished():
        llm.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    add_phases(trace["traceEvents"], steps, starts)
    data = json.dumps(trace).encode()
    Path(args.trace).write_bytes(gzip.compress(data) if args.trace.endswith(".gz") else data)


def only_decodes(step: StepStats) -> bool:
    return step.batch is not None and not step.batch.prefill_rows


def add_phases(events: list[dict[str, Any]], steps: list[StepStats], starts: list[float]) -> None:
    """Add an event for each phase of each step, in the row of the trace that shows the steps.

    Args:
        events: the trace's, which have one STEP_EVENT of the host for each of `steps`. Their times are microseconds.
        starts: a time just after each STEP_EVENT started, in the seconds of the steps' clock.
    """
    markers = [event for event in events if event["name"] == STEP_EVENT and event.get("cat") == "user_annotation"]
    markers.sort(key=lambda event: event["ts"])
    # From the steps' clock to the trace's. The largest difference is that of the marker with the least delay.
    offset = max(marker["ts"] - 1e6 * start for marker, start in zip(markers, starts, strict=True))
    for step in steps:
        for phase in step.phases:
            times = {"ts": offset + 1e6 * phase.start, "dur": 1e6 * (phase.end - phase.start)}
            events.append({**markers[0], **times, "name": f"host: {phase.name}", "args": {}})
