"""Benchmarks: `python bench.py --help`.

The workloads are that of nano-vLLM's bench (offline) and what else users of an engine notice (latency, prefill,
prefix, start). Prompts are random token ids, so any model will do, even random weights of a real shape:

    python bench.py --model qwen3-0.6b --load-format dummy                       # offline, at nano-vLLM's parameters
    python bench.py --workload all --model qwen3-8b --load-format dummy --plot limits.svg
    python bench.py --engine vllm nanovllm --model qwen3-8b --load-format dummy  # the same token ids, side by side
    python bench.py --num-seqs 16 --input-len 16 256 --output-len 16 128 --compare transformers    # on a CPU

Each figure has its limit next to it: what memory bandwidth and arithmetic allow for the very steps of that run.
"""

import argparse
import os
import sys

# Before torch is imported: waiting threads sleep, so that other programs can use the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.engines import ENGINES, PEERS
from benchmarks.options import UsageError, above_0, at_least_1, check_options
from benchmarks.report import NOTHING_TO_PLOT, table, write_json, write_plot
from benchmarks.run import run_engines
from benchmarks.trace import TRACE_STEPS
from benchmarks.workloads import WORKLOAD_NAMES


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--workload", default="offline", choices=[*WORKLOAD_NAMES, "all"])
    add("--engine", nargs="+", default=["nanovllm"], choices=ENGINES, help="several run one after the other")
    add("--model", help="path, .gguf file, hub id, or a shape, such as qwen3-0.6b or qwen3.5-9b")
    add("--load-format", choices=["auto", "dummy"])
    add("--device", choices=["auto", "cpu", "cuda"])
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    add("--quantization", choices=["fp8"], help="quantize the weights while they load")
    add("--kv-cache-dtype", choices=["auto", "fp8"])
    add("--attention-backend", choices=["auto", "torch", "triton", "flash_attn"])
    add("--tensor-parallel-size", type=at_least_1)
    add("--replicas", type=at_least_1, help="engines in Ray actors; one alone is measured as well")
    add("--max-model-len", type=at_least_1)
    add("--max-num-seqs", type=at_least_1)
    add("--overlap", type=int, choices=[0, 1])
    add("--enforce-eager", action="store_true", default=None)
    add("--num-seqs", type=at_least_1, default=256, help="offline: requests")
    add("--input-len", type=at_least_1, nargs=2, metavar=("LOW", "HIGH"), default=[100, 1024])
    add("--output-len", type=at_least_1, nargs=2, metavar=("LOW", "HIGH"), default=[100, 1024])
    add("--latency-tokens", type=at_least_1, default=512, help="latency: output tokens")
    add("--prefill-seqs", type=at_least_1, default=32, help="prefill: prompts")
    add("--prefix-seqs", type=at_least_1, default=512, help="prefix: requests")
    add("--prefix-len", type=at_least_1, default=2048, help="prefix: tokens that all prompts share")
    add("--repeat", type=at_least_1, default=1, help="runs of each workload; medians are shown")
    add(
        "--compare",
        choices=PEERS,
        help="offline: run the requests through a library as well, in this process, interleaved with nanovllm",
    )
    add("--hbm-tb-s", type=above_0, help="memory bandwidth of a device, for the limits (H100, H200: known)")
    add("--tflops", type=above_0, help="bf16 TFLOP/s of a device, for the limits (H100, H200: known); doubled for FP8")
    add("--json", metavar="FILE", help="write the figures")
    add("--plot", metavar="FILE.svg", help="draw the figures as percent of their limits")
    add("--trace", metavar="FILE.json[.gz]", help=f"write a Chrome trace of {TRACE_STEPS} decode steps of offline")
    return parser


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Run what the flags ask for, and show and write the figures."""
    check_options(args)
    rows = run_engines(args, [sys.executable, __file__, *argv])
    print(table(rows))
    try:
        if args.json:
            write_json(args.json, rows, args, argv)
        if args.plot:
            if not any("percent" in row for row in rows):
                raise UsageError(NOTHING_TO_PLOT)
            write_plot(args.plot, rows, args)
    except OSError as error:
        raise UsageError(f"the figures cannot be written: {error}") from None


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
