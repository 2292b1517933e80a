"""Measures kernels over sizes and settings: `python -m nanovllm.kernels.tune --help`.

The defaults beside each kernel (`default_decode_config` and its like) are what this chose on an H100. On another chip:
run it, and change them.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial

import torch

from nanovllm.kernels._triton import triton
from nanovllm.kernels.decode_attention import DecodeConfig, decode_attention_triton, default_decode_config
from nanovllm.kernels.decode_attention import sm_count as count_sms
from nanovllm.kernels.gemv import GemvConfig, default_gemv_config, gemv_triton
from nanovllm.kernels.prefill_attention import PrefillConfig, default_prefill_config, prefill_attention_triton
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.rope_decode import default_rope_decode_config, rope_decode_triton
from nanovllm.kernels.rope_store import QKTransform
from nanovllm.kernels.silu_mul import silu_mul

COLD_BYTES = 256 << 20  # several times any L2 cache
BLOCK_SIZE = 64
HEAD_DIM = 128
KV_HEADS = 8


def seconds(calls: list[Callable[[], object]], repeat: int = 5) -> float:
    """Seconds of one of `calls` on the GPU: all of them in a graph, the median of several replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeat + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def make_cache(lens: list[int]) -> list[tuple[torch.Tensor, ...]]:
    """(k_cache, v_cache, block_tables) of rows of `lens` tokens, as many as L2 cannot hold, blocks shuffled."""
    needed = [-(-n // BLOCK_SIZE) for n in lens]
    num_bytes = 4 * sum(needed) * BLOCK_SIZE * KV_HEADS * HEAD_DIM
    caches = []
    for _ in range(max(1, -(-COLD_BYTES // num_bytes))):
        shape = (sum(needed), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        ids = torch.randperm(sum(needed), device="cuda", dtype=torch.int32).split(needed)
        caches.append((k, v, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)))
    return caches


def decode(full: bool) -> None:
    """Bandwidth of decode attention: bytes of K and V read once, over time."""
    print("decode attention: rows x tokens, group | tile warps stages splits | us, TB/s  (* default)")
    sizes = [(256, 500, 1500), (128, 500, 1500), (32, 2000, 2000), (8, 4000, 4000), (8, 600, 600)]
    for group, (rows, low, high) in itertools.product((2, 4), sizes):
        lens = torch.linspace(low, high, rows).int().tolist()
        caches, slots = make_cache(lens), torch.randperm(rows, device="cuda", dtype=torch.int32)
        context_lens = torch.tensor(lens, device="cuda", dtype=torch.int32)[slots.long()]
        q = torch.randn(rows, KV_HEADS * group, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        counters = torch.zeros(rows * KV_HEADS, device="cuda", dtype=torch.int32)
        configs = [default_decode_config(rows, KV_HEADS, HEAD_DIM, 2, count_sms(q.device))]
        if full:
            tiles = [(32, 2, 3), (32, 2, 4), (32, 2, 5), (64, 2, 3), (64, 4, 3), (64, 4, 4), (128, 4, 3)]
            splits = {8: (8, 16, 32), 32: (4, 8, 16), 128: (1, 2, 4, 8), 256: (1, 2, 4)}[rows]
            configs += [DecodeConfig(*tile, split) for tile in tiles for split in splits]
        results = []
        for config in configs:
            options = {"counters": counters, "config": config}
            calls = [partial(decode_attention_triton, q, *c, slots, context_lens, 0.1, **options) for c in caches]
            results.append((seconds(calls), tuple(config)))
        show(f"{rows} x {low}-{high}, {group}", results, 4 * sum(lens) * KV_HEADS * HEAD_DIM / 1e12, "TB/s")


def rope_decode(full: bool) -> None:
    """Time of decode attention with few rows, the projection before it included: the two overlap."""
    print("projection and attention: rows x tokens, group | tile warps stages splits | us, TB/s  (* default)")
    hidden = 1024
    for group, (rows, tokens) in itertools.product((2, 4), [(1, 128), (1, 600), (1, 4000), (4, 600)]):
        caches, slots = make_cache([tokens] * rows), torch.arange(rows, device="cuda", dtype=torch.int32)
        context_lens = torch.full((rows,), tokens, device="cuda", dtype=torch.int32)
        n = KV_HEADS * (group + 2) * HEAD_DIM
        x, *norms = torch.randn(3, rows, hidden, device="cuda", dtype=torch.bfloat16)
        weights = torch.randn(-(-COLD_BYTES // (2 * n * hidden)), n, hidden, device="cuda", dtype=torch.bfloat16)
        angles = torch.randn(tokens, HEAD_DIM, device="cuda")
        transform = QKTransform(KV_HEADS * group, angles, *(norm[0, :HEAD_DIM] for norm in norms), 1e-6)
        counters = torch.zeros(rows * KV_HEADS, device="cuda", dtype=torch.int32)

        def run(weight, cache, config, where=(slots, context_lens), x=x, transform=transform, counters=counters):
            rope_decode_triton(gemv_triton(x, weight), transform, *cache, *where, 0.1, counters=counters, config=config)

        default = default_rope_decode_config(rows, KV_HEADS, HEAD_DIM, 2, count_sms(x.device))
        configs = [default]
        if full:
            tiles = [(16, 1, 2), (32, 1, 2), (32, 2, 2), (64, 2, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 2)]
            configs += [DecodeConfig(*tile, splits) for tile in tiles for splits in (17, 33, 64)]
        results = []
        for config in configs:
            pairs = zip(itertools.cycle(weights), caches[:512], strict=False)
            results.append((seconds([partial(run, *pair, config) for pair in pairs]), tuple(config)))
        num_bytes = 2 * n * hidden + 4 * rows * tokens * KV_HEADS * HEAD_DIM
        show(f"{rows} x {tokens}, {group}", results, num_bytes / 1e12, "TB/s")


def prefill(full: bool) -> None:
    """Arithmetic rate of prefill attention, the masked half not counted."""
    print("prefill attention: rows x new tokens of context, group | m n warps stages registers TMA | us, TFLOP/s")
    for group, (rows, new, context) in itertools.product((2, 4), [(4, 4000, 4000), (256, 64, 2112), (1, 128, 128)]):
        caches, slots = make_cache([context] * rows), torch.arange(rows, device="cuda", dtype=torch.int32)
        cu_seqlens = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * new
        context_lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        q = torch.randn(rows * new, KV_HEADS * group, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        configs = [default_prefill_config(HEAD_DIM, 2, len(q) * KV_HEADS * group, count_sms(q.device))]
        if full:
            tiles = [(128, 64, 8, 2, 128), (128, 64, 8, 3), (128, 32, 8, 3, 128), (128, 64, 4, 2)]
            tiles += [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4)]
            configs += [PrefillConfig(*tile)._replace(tma=tma) for tile in tiles for tma in (False, True)]
        results = []
        for config in configs:
            calls = [
                partial(prefill_attention_triton, q, *c, slots, cu_seqlens, context_lens, 0.1, config=config)
                for c in caches
            ]
            results.append((seconds(calls), tuple(config)))
        seen = rows * new * (context - (new - 1) / 2)
        show(f"{rows} x {new} of {context}, {group}", results, 4 * seen * KV_HEADS * group * HEAD_DIM / 1e12, "TFLOP/s")


def gemv(full: bool) -> None:
    """Bandwidth of the products of a decode step with one row, beside cuBLAS's and what comes with it."""
    print("gemv: rows x k of the weight | rows of a program, warps | us, TB/s  (* default; cuBLAS with norm and SiLU)")
    shapes = {  # Qwen3-0.6B's and Qwen3-8B's
        "qkv": [(4096, 1024), (6144, 4096)],
        "o": [(1024, 2048), (4096, 4096)],
        "gate_up": [(6144, 1024), (24576, 4096)],
        "down": [(1024, 3072), (4096, 12288)],
        "head": [(151936, 1024), (151936, 4096)],
    }
    for name, sizes in shapes.items():
        for n, k in sizes:
            x, norm = torch.randn(2, 1, k, device="cuda", dtype=torch.bfloat16)
            weights = [
                torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(-(-COLD_BYTES // (2 * n * k)))
            ]
            gated, residual = name == "gate_up", torch.zeros(1, n, device="cuda", dtype=torch.bfloat16)
            options = {"residual": residual} if name in ("o", "down") else {"norm": (norm[0], 1e-6), "gated": gated}
            default, results = default_gemv_config(n // (2 if gated else 1), k, gated), []
            configs = [default]
            if full:
                configs += [GemvConfig(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (2, 4, 8)]
            for config in configs:
                if config.rows * triton.next_power_of_2(k) * (2 if gated else 1) > 256 * 32 * config.num_warps:
                    continue  # more than the registers hold
                calls = [partial(gemv_triton, x, w, config=config, **options) for w in weights]
                results.append((seconds(calls), tuple(config)))
            if name in ("o", "down"):
                calls = [partial(torch.addmm, residual, x, w.t(), out=residual) for w in weights]
            else:
                calls = [partial(_plain, x, w, norm[0], gated) for w in weights]
            show(f"{name} {n} x {k}", [(seconds(calls), ("cuBLAS",))], 2 * n * k / 1e12, "TB/s")
            show(f"{name} {n} x {k}", results, 2 * n * k / 1e12, "TB/s", most=4)


def _plain(x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, gated: bool) -> torch.Tensor:
    y = torch.nn.functional.linear(rms_norm(x, norm, 1e-6), weight)
    return silu_mul(y) if gated else y


def show(what: str, results: list[tuple[float, tuple]], work: float, unit: str, most: int = 6) -> None:
    default = results[0][1]
    best = sorted(set(results[1:] or results))[:most]
    for time, config in [results[0], *best] if results[0] not in best else best:
        mark = "*" if config == default else " "
        print(f"{what:24s}{mark} {' '.join(map(str, config)):14s} {time * 1e6:8.1f} us {work / time:8.2f} {unit}")


KERNELS = {"decode": decode, "rope_decode": rope_decode, "prefill": prefill, "gemv": gemv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"which of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--defaults", action="store_true", help="measure the default settings only")
    args = parser.parse_args()
    unknown = [name for name in args.kernels if name not in KERNELS]
    if unknown:
        parser.error(f"KERNEL must be one of {', '.join(KERNELS)}, got {unknown[0]!r}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here to measure")
    for name in args.kernels or KERNELS:
        KERNELS[name](not args.defaults)


if __name__ == "__main__":
    main()
