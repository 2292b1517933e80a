"""Benchmarks: `python bench.py --help`.

The workloads are those of nano-vLLM's bench (offline) and what an engine's users feel besides (latency, prefill,
prefix, start). Prompts are random token ids, so any model will do, also random weights of a real shape:

    python bench.py --model qwen3-0.6b --load-format dummy                       # offline, at nano-vLLM's parameters
    python bench.py --workload all --model qwen3-8b --load-format dummy
    python bench.py --num-seqs 16 --input-len 16 256 --output-len 16 128 --compare transformers    # on a CPU
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from random import Random

from nanovllm import LLM, SamplingParams


def random_prompts(rng: Random, count: int, low: int, high: int, vocab_size: int) -> list[list[int]]:
    """`count` prompts of low to high random ids; ids stay below 10,000 as in nano-vLLM's bench, which any model has."""
    return [[rng.randint(0, min(10_000, vocab_size - 1)) for _ in range(rng.randint(low, high))] for _ in range(count)]


def timed(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    """Seconds to answer all prompts."""
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)


def offline_requests(args, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = Random(0)
    prompts = random_prompts(rng, args.num_seqs, *args.input_len, vocab_size)
    lens = [rng.randint(*args.output_len) for _ in range(args.num_seqs)]
    return prompts, [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lens]


def offline(llm: LLM, args) -> dict:
    """Requests of mixed lengths, all given at once: output tokens/s."""
    prompts, params = offline_requests(args, llm.source.config.vocab_size)
    seconds = timed(llm, prompts, params)
    tokens = sum(p.max_tokens for p in params)
    return {
        "input_tokens": sum(map(len, prompts)),
        "output_tokens": tokens,
        "seconds": seconds,
        "tok/s": tokens / seconds,
    }


def latency(llm: LLM, args) -> dict:
    """One request of 128 ids: time to the first token, and per token over 512 more."""
    rng = Random(1)
    ttft, tpot = [], []
    for _ in range(3):
        prompts = random_prompts(rng, 2, 128, 128, llm.source.config.vocab_size)
        first = timed(llm, prompts[:1], [greedy(1)])
        whole = timed(llm, prompts[1:], [greedy(1 + args.latency_tokens)])
        ttft.append(first * 1e3)
        tpot.append((whole - first) / args.latency_tokens * 1e3)
    return {"TTFT ms": statistics.median(ttft), "TPOT ms": statistics.median(tpot)}


def prefill(llm: LLM, args) -> dict:
    """Long prompts, one new token each: input tokens/s."""
    length = min(4000, llm.max_model_len - 1)
    prompts = random_prompts(Random(2), args.prefill_seqs, length, length, llm.source.config.vocab_size)
    seconds = timed(llm, prompts, [greedy(1)] * len(prompts))
    return {"input_tokens": length * len(prompts), "seconds": seconds, "tok/s": length * len(prompts) / seconds}


def prefix(llm: LLM, args) -> dict:
    """Requests that share 2048 ids, have 64 of their own, and ask for 64 tokens: requests/s."""
    rng, vocab_size = Random(3), llm.source.config.vocab_size
    shared = random_prompts(rng, 1, args.prefix_len, args.prefix_len, vocab_size)[0]
    prompts = [shared + own for own in random_prompts(rng, args.prefix_seqs, 64, 64, vocab_size)]
    seconds = timed(llm, prompts, [greedy(64)] * len(prompts))
    return {"requests": len(prompts), "seconds": seconds, "req/s": len(prompts) / seconds}


def start(_: None, args) -> dict:
    """A new process, from its first import to its first token."""
    code = (
        "import time; begin = time.perf_counter()\n"
        "import json, sys; from nanovllm import LLM, SamplingParams\n"
        "with LLM(**json.loads(sys.argv[1])) as llm:\n"
        "    ready = time.perf_counter() - begin\n"
        "    llm.generate([[1] * 128], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)\n"
        "    print(json.dumps({'ready s': ready, 'first token s': time.perf_counter() - begin}))"
    )
    command = [sys.executable, "-c", code, json.dumps(engine_arguments(args))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


WORKLOADS = {"offline": offline, "latency": latency, "prefill": prefill, "prefix": prefix, "start": start}


def compare_transformers(llm: LLM, args) -> dict:
    """The offline requests through transformers' own batched, left-padded `generate`, same weights and dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    prompts, params = offline_requests(args, llm.source.config.vocab_size)
    path = llm.source.path
    where = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    weight = next(llm.executor.runner.model.parameters())
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=weight.dtype).to(weight.device).eval()
    longest, steps = max(map(len, prompts)), max(p.max_tokens for p in params)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=weight.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=weight.device)
    sampling = dict(do_sample=True, temperature=0.6, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)

    def run(num_tokens: int) -> float:
        begin = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, **sampling)
        return time.perf_counter() - begin

    run(2)
    tokens = sum(p.max_tokens for p in params)  # what was asked for: the padding of the shorter rows is waste
    ours, theirs = [], []
    for _ in range(args.repeat):
        theirs.append(run(steps))
        llm.scheduler.block_manager.reset_prefix_cache()
        ours.append(offline(llm, args)["seconds"])
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    return {"nanovllm tok/s": tokens / ours, "transformers tok/s": tokens / theirs, "ratio": theirs / ours}


def engine_arguments(args) -> dict:
    names = ("model", "load_format", "max_model_len", "max_num_seqs", "tensor_parallel_size", "enforce_eager", "device")
    names += ("dtype", "attention_backend", "overlap")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def show(name: str, figures: dict) -> None:
    values = (
        f"{key} {value:,.2f}" if isinstance(value, float) else f"{key} {value:,}" for key, value in figures.items()
    )
    print(f"{name:14s}" + " | ".join(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="offline", choices=[*WORKLOADS, "all"])
    parser.add_argument("--model", help="path, .gguf file, hub id, or a shape: qwen3-0.6b, qwen3-4b, qwen3-8b")
    parser.add_argument("--load-format", choices=["auto", "dummy"])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--attention-backend", choices=["auto", "torch", "triton", "flash_attn"])
    parser.add_argument("--tensor-parallel-size", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--overlap", type=int, choices=[0, 1])
    parser.add_argument("--enforce-eager", action="store_true", default=None)
    parser.add_argument("--num-seqs", type=int, default=256, help="offline: requests")
    parser.add_argument("--input-len", type=int, nargs=2, default=[100, 1024], metavar=("LOW", "HIGH"))
    parser.add_argument("--output-len", type=int, nargs=2, default=[100, 1024], metavar=("LOW", "HIGH"))
    parser.add_argument("--latency-tokens", type=int, default=512)
    parser.add_argument("--prefill-seqs", type=int, default=32)
    parser.add_argument("--prefix-seqs", type=int, default=512)
    parser.add_argument("--prefix-len", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each workload; medians are shown")
    parser.add_argument("--compare", choices=["transformers"], help="run the offline requests through a peer as well")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args()

    names = list(WORKLOADS) if args.workload == "all" else [args.workload]
    figures = {}
    if "start" in names:  # before this process takes the GPU's memory
        names.remove("start")
        figures["start"] = start(None, args)
        show("start", figures["start"])
    if names or args.compare:
        with LLM(**engine_arguments(args)) as llm:
            warm_up = random_prompts(Random(4), 4, 64, 64, llm.source.config.vocab_size)
            llm.generate(warm_up, greedy(8), use_tqdm=False)
            if args.compare:
                figures["compare"] = compare_transformers(llm, args)
                show("compare", figures["compare"])
                names = []
            for name in names:
                runs = []
                for _ in range(args.repeat):
                    llm.scheduler.block_manager.reset_prefix_cache()  # every run starts cold
                    runs.append(WORKLOADS[name](llm, args))
                figures[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                show(name, figures[name])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
