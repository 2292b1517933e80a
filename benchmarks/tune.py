"""Measures kernels over sizes and settings: `python -m benchmarks.tune --help`.

The defaults beside each kernel (`default_decode_config` and its like) are what this chose on an H100. On another chip:
run it, and change them.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch

from nanovllm.ops.attention.decode_attention import DecodeConfig, decode_attention_triton, default_decode_config
from nanovllm.ops.attention.decode_plan import default_split_policy, plan_decode_triton
from nanovllm.ops.attention.prefill_attention import PrefillConfig, default_prefill_config, prefill_attention_triton
from nanovllm.ops.attention.rope_decode import RopeDecodeConfig, default_rope_decode_config, rope_decode_triton
from nanovllm.ops.linear.gemm import MAX_TILES, default_gemm_config, gemm_triton
from nanovllm.ops.linear.gemv import GemvConfig, default_gemv_config, gemv_triton
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.linear.swiglu import DEFAULT_CONFIG, SwigluConfig, swiglu_triton
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.norm_rope.rope_store import QKTransform
from nanovllm.ops.triton_utils import sm_count, triton

COLD_BYTES = 256 << 20  # several times any L2 cache
BLOCK_SIZE = 64
HEAD_DIM = 128
KV_HEADS = 8
# [n, k] of a layer's weights in Qwen3-0.6B and in Qwen3-8B.
PRODUCTS = [("qkv", 4096, 1024), ("o", 1024, 2048), ("gate_up", 6144, 1024), ("down", 1024, 3072)]
PRODUCTS += [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 24576, 4096), ("down", 4096, 12288)]


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


def sweep(what: str, calls: list[Callable], configs: list[tuple], work: float, unit: str) -> None:
    """Print the rates at which `calls` do their `work` with the default config, the first one, and with the fastest."""
    results = [(seconds([partial(call, config=config) for call in calls]), tuple(config)) for config in configs]
    best = sorted(set(results[1:]))[:6]
    for time, config in best if results[0] in best else [results[0], *best]:
        mark = "*" if config == configs[0] else " "
        print(
            f"{what:24s}{mark} {' '.join(map(str, config)):20s} {time * 1e6:8.1f} us {work / time / 1e12:8.2f} {unit}"
        )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def make_weights(n: int, k: int) -> torch.Tensor:
    """Weights [n, k], as many as L2 cannot hold."""
    return random(-(-COLD_BYTES // (2 * n * k)), n, k)


def make_rows(lens: list[int]) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_tables) of rows of `lens` tokens, as many as L2 cannot hold; slots; context_lens."""
    needed = [-(-n // BLOCK_SIZE) for n in lens]
    shape = (sum(needed), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    caches = []
    for _ in range(max(1, -(-COLD_BYTES // (4 * math.prod(shape))))):
        ids = torch.randperm(sum(needed), device="cuda", dtype=torch.int32).split(needed)
        caches.append((random(*shape), random(*shape), torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)))
    slots = torch.randperm(len(lens), device="cuda", dtype=torch.int32)
    return caches, slots, torch.tensor(lens, device="cuda", dtype=torch.int32)[slots.long()]


def decode(full: bool) -> None:
    """Bandwidth of decode attention: bytes of K and V read once, over time."""
    print("decode attention: rows x tokens, group | tile warps stages | us, TB/s  (* default)")
    sizes = [(256, 500, 1500), (128, 500, 1500), (32, 2000, 2000), (8, 4000, 4000), (8, 600, 600)]
    for group, (rows, low, high) in itertools.product((2, 4), sizes):
        lens = torch.linspace(low, high, rows).int().tolist()
        caches, *where = make_rows(lens)
        q = random(rows, KV_HEADS * group, HEAD_DIM)
        counters = torch.zeros(rows * KV_HEADS, device="cuda", dtype=torch.int32)
        sms = sm_count(q.device)
        plan = plan_decode_triton(where[1], KV_HEADS, default_split_policy(rows, KV_HEADS, sms))
        calls = [partial(decode_attention_triton, q, *c, *where, 0.1, counters=counters, plan=plan) for c in caches]
        configs = [default_decode_config(rows, KV_HEADS, HEAD_DIM, 2, sms)]
        if full:
            tiles = [(32, 2, 3), (32, 2, 4), (64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 2), (128, 4, 3), (128, 8, 3)]
            configs += [DecodeConfig(*tile) for tile in tiles]
        sweep(f"{rows} x {low}-{high}, {group}", calls, configs, 4 * sum(lens) * KV_HEADS * HEAD_DIM, "TB/s")


def rope_decode(full: bool) -> None:
    """Time of decode attention with few rows, the projection before it included: the two overlap."""
    print("projection and attention: rows x tokens, group | tile warps stages splits | us, TB/s  (* default)")
    hidden = 1024
    for group, (rows, tokens) in itertools.product((2, 4), [(1, 128), (1, 600), (1, 4000), (4, 600)]):
        caches, *where = make_rows([tokens] * rows)
        n = KV_HEADS * (group + 2) * HEAD_DIM
        x, weights, norms = random(rows, hidden), make_weights(n, hidden), random(2, HEAD_DIM)
        transform = QKTransform(KV_HEADS * group, torch.randn(tokens, HEAD_DIM, device="cuda"), *norms, 1e-6)
        counters = torch.zeros(rows * KV_HEADS, device="cuda", dtype=torch.int32)

        def run(weight, cache, config, where=where, x=x, transform=transform, counters=counters):
            rope_decode_triton(gemv_triton(x, weight), transform, *cache, *where, 0.1, counters=counters, config=config)

        calls = [partial(run, *pair) for pair in zip(itertools.cycle(weights), caches[:512], strict=False)]
        configs = [default_rope_decode_config(rows, KV_HEADS, HEAD_DIM, 2, sm_count(x.device))]
        if full:
            tiles = [(16, 1, 2), (32, 1, 2), (32, 2, 2), (64, 2, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 2)]
            configs += [RopeDecodeConfig(*tile, splits) for tile in tiles for splits in (17, 33, 64)]
        num_bytes = 2 * n * hidden + 4 * rows * tokens * KV_HEADS * HEAD_DIM
        sweep(f"{rows} x {tokens}, {group}", calls, configs, num_bytes, "TB/s")


def prefill(full: bool) -> None:
    """Arithmetic rate of prefill attention, the masked half not counted."""
    print("prefill attention: rows x new tokens of context, group | m n warps stages registers TMA | us, TFLOP/s")
    for group, (rows, new, context) in itertools.product((2, 4), [(4, 4000, 4000), (256, 64, 2112), (1, 128, 128)]):
        caches, slots, context_lens = make_rows([context] * rows)
        where = slots, torch.arange(rows + 1, device="cuda", dtype=torch.int32) * new, context_lens
        q = random(rows * new, KV_HEADS * group, HEAD_DIM)
        calls = [partial(prefill_attention_triton, q, *c, *where, 0.1) for c in caches]
        configs = [default_prefill_config(HEAD_DIM, 2, len(q) * KV_HEADS * group, sm_count(q.device))]
        if full:
            tiles = [(128, 64, 8, 2, 128), (128, 64, 8, 3), (128, 32, 8, 3, 128), (128, 64, 4, 2)]
            tiles += [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4)]
            configs += [PrefillConfig(*tile)._replace(tma=tma) for tile in tiles for tma in (False, True)]
        seen = rows * new * (context - (new - 1) / 2)
        sweep(
            f"{rows} x {new} of {context}, {group}", calls, configs, 4 * seen * KV_HEADS * group * HEAD_DIM, "TFLOP/s"
        )


def swiglu(full: bool) -> None:
    """Arithmetic rate of the gated unit with many rows, beside cuBLAS and a kernel after it, while power is short."""
    print("swiglu: rows x k -> n | m n k warps stages programs | us, TFLOP/s  (* default; cuBLAS, SiLU after it)")
    for k, n, rows in ((k, n, rows) for k, n in [(4096, 12288), (1024, 3072)] for rows in (2048, 16384)):
        x, weight, work = random(rows, k), random(2 * n, k) * k**-0.5, 4 * rows * n * k
        configs = [DEFAULT_CONFIG]
        if full:
            tiles = [(128, 128, 64, 8, 4), (128, 64, 64, 8, 3, 2), (128, 64, 64, 4, 3, 2), (64, 128, 64, 4, 4)]
            configs += [SwigluConfig(*tile) for tile in tiles]
        for product, settings in (partial(_plain, gated=True), [("cuBLAS",)]), (swiglu_triton, configs):
            calls = [partial(product, x, weight)] * max(1, 10**13 // work)
            sweep(f"{rows} x {k} -> {n}", calls, settings, work, "TFLOP/s")


def gemv(full: bool) -> None:
    """Bandwidth of the products of a decode step with one row, beside cuBLAS's and what comes with it."""
    print("gemv: rows x k of the weight | rows of a program, warps | us, TB/s  (* default; cuBLAS with norm and SiLU)")
    for name, n, k in [*PRODUCTS, ("head", 151936, 1024), ("head", 151936, 4096)]:
        x, weights, gated = random(1, k), make_weights(n, k), name == "gate_up"
        options = {"residual": random(1, n)} if name in ("o", "down") else {"norm": (random(k), 1e-6), "gated": gated}
        configs = [default_gemv_config(n // (2 if gated else 1), k, gated)]
        if full:
            configs += [GemvConfig(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (2, 4, 8)]
        width = triton.next_power_of_2(k) * (2 if gated else 1)
        fitting = [c for c in configs if c.rows * width <= 256 * 32 * c.num_warps]  # in the registers
        for product, settings in (_plain, [("cuBLAS",)]), (gemv_triton, fitting):
            calls = [partial(product, x, weight, **options) for weight in weights]
            sweep(f"{name} {n} x {k}", calls, settings, 2 * n * k, "TB/s")


def gemm(full: bool) -> None:
    """Bandwidth of the products of a decode step with some rows, beside cuBLAS's and what comes with it."""
    print("gemm: rows x k of the weight, rows | tile warps stages splits prefetch | us, TB/s  (* default; cuBLAS)")
    counters = torch.zeros(MAX_TILES, device="cuda", dtype=torch.int32)
    for (name, n, k), rows in itertools.product(PRODUCTS, (8, 32, 64)):
        x, weights, gated = random(rows, k), make_weights(n, k), name == "gate_up"
        options = {"residual": random(rows, n)} if name in ("o", "down") else {"gated": gated}
        configs = [default_gemm_config(rows, n // (2 if gated else 1), k, gated)]
        if full:
            stages, splits = ((3, 4), (1,)) if gated else ((4, 6), (1, 2, 4, 8))
            for stage, split, columns in itertools.product(stages, splits, (0, 128, 512, 1024)):
                configs.append(configs[0]._replace(num_stages=stage, num_splits=split, prefetch=columns))
        for product, settings in (_plain, [("cuBLAS",)]), (partial(gemm_triton, counters=counters), configs):
            calls = [partial(product, x, weight, **options) for weight in weights]
            sweep(f"{name} {n} x {k}, {rows}", calls, settings, 2 * n * k, "TB/s")


def _plain(x: torch.Tensor, weight: torch.Tensor, norm=None, gated=False, residual=None, config=None) -> torch.Tensor:
    """What `gemv_triton` and `gemm_triton` do, by cuBLAS."""
    if residual is not None:
        return torch.addmm(residual, x, weight.t(), out=residual)
    y = torch.nn.functional.linear(x if norm is None else rms_norm(x, *norm), weight)
    return silu_mul(y) if gated else y


KERNELS = {kernel.__name__: kernel for kernel in (decode, rope_decode, prefill, swiglu, gemv, gemm)}


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
