"""The checks of the flags of bench.py, each alone and all together."""

import argparse
import importlib.util
from pathlib import Path

from benchmarks.engines import OWN_OPTIONS, PEERS
from benchmarks.report import PLOT_MARK
from nanovllm.models.presets import PRESETS


class UsageError(Exception):
    """The flags ask for something that cannot be run."""


def at_least_1(text: str) -> int:
    if not text.isdecimal() or len(text) > 7 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 9999999, got {text[:40]!r}")
    return int(text)


def above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_options(args: argparse.Namespace) -> None:
    """Raise UsageError if the flags do not fit each other, before anything takes time."""
    for name in ("input_len", "output_len"):
        low, high = getattr(args, name)
        if low > high:
            raise UsageError(f"{flag(name)}: LOW must be at most HIGH, got {low} {high}")
    check_files(args)
    check_engines(args)
    if args.replicas:
        check_replicas(args)
    if args.compare:
        check_comparison(args)
    if args.workload == "start" and (args.plot or args.trace):
        raise UsageError("--plot and --trace need a workload other than start")


def check_files(args: argparse.Namespace) -> None:
    endings = ((args.json, ("",)), (args.plot, (".svg",)), (args.trace, (".json", ".json.gz")))
    for path, suffixes in endings:
        if path and not path.endswith(suffixes):
            raise UsageError(f"{path!r} must end in {' or '.join(suffixes)}")
        if path and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"there is no folder for {path!r}")
        if path and Path(path).is_dir():
            raise UsageError(f"{path!r} is a folder")
    if args.plot and Path(args.plot).exists() and PLOT_MARK not in Path(args.plot).read_text(errors="replace"):
        raise UsageError(f"--plot would overwrite {args.plot!r}, which bench.py did not draw")
    files = [Path(path).resolve() for path, _ in endings if path]
    if len(files) > len(set(files)):
        raise UsageError("--json, --plot and --trace must be different files")


def check_engines(args: argparse.Namespace) -> None:
    """Check that all engines exist, and can do and show what is asked for."""
    if len(set(args.engine)) < len(args.engine):
        raise UsageError("--engine names an engine twice")
    peers = [name for name in args.engine if name != "nanovllm"]
    if not peers:
        return
    names = " ".join(peers)
    missing = [name for name in peers if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--engine {' '.join(missing)}: it is not installed here")
    if args.compare:
        raise UsageError(f"--compare {args.compare} cannot be combined with another --engine")
    if args.workload in ("start", "features"):
        raise UsageError(f"--workload {args.workload} measures nanovllm only")
    own = [flag(name) for name in OWN_OPTIONS if getattr(args, name) is not None]
    if own:
        raise UsageError(f"{' '.join(own)}: nanovllm's own, cannot be given with --engine {names}")
    if args.engine == peers and (args.plot or args.trace):
        raise UsageError("--plot and --trace need --engine nanovllm: other engines do not report their steps")


def check_replicas(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--replicas needs Ray, which the extra 'ray' brings")
    if args.engine != ["nanovllm"] or args.compare or args.workload in ("all", "start"):
        raise UsageError("--replicas measures nanovllm only, and one workload other than start")
    if args.plot or args.trace:
        raise UsageError("--plot and --trace cannot be combined with --replicas, whose steps are in other processes")


def check_comparison(args: argparse.Namespace) -> None:
    if args.workload != "offline":
        raise UsageError(f"--compare {args.compare} runs the {' and '.join(PEERS[args.compare][1])} workload only")
    if args.model in PRESETS or args.load_format == "dummy":
        raise UsageError(f"--compare {args.compare} needs a model with weights, not a shape or --load-format dummy")
    module, package = {
        "transformers": ("accelerate", "accelerate, which the extra 'test' brings"),
        "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    }[args.compare]
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"--compare {args.compare} needs the package {package}")
    if args.plot:
        raise UsageError("--plot draws limits, which --compare does not count")
