"""The start workload: a new process, from its first import to its first token."""

import json
import statistics
import subprocess
import sys
from argparse import Namespace

from benchmarks.engines import nanovllm_options
from benchmarks.options import UsageError
from benchmarks.report import Row
from benchmarks.workloads import PROMPT_LEN
from nanovllm.checkpoints.model_source import open_model
from nanovllm.config import Config

PROGRAM = f"""
import time; start = time.perf_counter()
import json, sys; from nanovllm import LLM, SamplingParams
with LLM(**json.loads(sys.argv[1])) as llm:
    ready = time.perf_counter() - start
    llm.generate([[1] * {PROMPT_LEN}], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    print(json.dumps({{'ready_s': ready, 'value': time.perf_counter() - start}}))
"""


def check_start(args: Namespace) -> None:
    """Raise UsageError if the arguments would make the new process fail."""
    try:
        max_model_len = Config(**nanovllm_options(args)).max_model_len
        max_model_len = min(max_model_len, open_model(args.model, args.load_format or "auto").config.max_position)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if max_model_len <= PROMPT_LEN:
        raise UsageError(f"start has a request of {PROMPT_LEN + 1} tokens, but max_model_len is {max_model_len}")


def measure_start(args: Namespace) -> Row:
    """Return the row of the table: medians of `args.repeat` new processes."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(nanovllm_options(args))]
    runs = []
    for _ in range(args.repeat):
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit("the run of start failed")
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {"workload": "start", "engine": "nanovllm", "unit": "s to first token", **medians}
