"""Measure kernels over sizes and settings: `python -m benchmarks.tune --help`.

The default settings in each kernel's file (`default_decode_config` and others) are what this chose on an H100. On
another GPU, run it and change them.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nanovllm.ops.attention.decode_attention import decode_attention_triton
from nanovllm.ops.attention.decode_plan import (
    DecodeConfig,
    default_decode_config,
    default_split_policy,
    plan_decode_triton,
)
from nanovllm.ops.attention.fp8_cache import quantize_kv
from nanovllm.ops.attention.paged_cache import PagedKV, PagedRows
from nanovllm.ops.attention.prefill_attention import PrefillConfig, default_prefill_config, prefill_attention_triton
from nanovllm.ops.attention.rope_decode import RopeDecodeConfig, default_rope_decode_config, rope_decode_triton
from nanovllm.ops.linear.gemm import MAX_TILES, default_gemm_config, gemm_triton
from nanovllm.ops.linear.gemv import GemvConfig, default_gemv_config, gemv_triton
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.linear.swiglu import DEFAULT_CONFIG, SwigluConfig, swiglu_triton
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import sm_count, triton

COLD_BYTES = 256 << 20  # several times any L2 cache
BLOCK_SIZE = 64
HEAD_DIM = 128
KV_HEADS = 8
# [n, k] of a layer's weights in Qwen3-0.6B and in Qwen3-8B.
WEIGHTS = [("qkv", 4096, 1024), ("o", 1024, 2048), ("gate_up", 6144, 1024), ("down", 1024, 3072)]
WEIGHTS += [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 24576, 4096), ("down", 4096, 12288)]


def seconds(calls: list[Callable[[], object]], repeat: int = 5) -> float:
    """Return the GPU seconds of one of `calls`: the median of several replays of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeat + 1):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def sweep(name: str, calls: Sequence[Callable], configs: Sequence[tuple], work: float, unit: str) -> None:
    """Print the rates of `calls`, each doing `work`, with the default config (the first) and the fastest ones."""
    results = [(seconds([partial(call, config=config) for call in calls]), tuple(config)) for config in configs]
    best = sorted(set(results[1:]))[:6]
    for time, config in best if results[0] in best else [results[0], *best]:
        mark = "*" if config == configs[0] else " "
        print(
            f"{name:24s}{mark} {' '.join(map(str, config)):20s} {time * 1e6:8.1f} us {work / time / 1e12:8.2f} {unit}"
        )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def make_weights(n: int, k: int) -> torch.Tensor:
    """Return weights [count, n, k], more than fit in the L2 cache."""
    return random(triton.cdiv(COLD_BYTES, 2 * n * k), n, k)


def make_sequences(lens: list[int], fp8: bool = False) -> list[tuple[PagedKV, PagedRows]]:
    """Make sequences of `lens` tokens, each time in other memory, until they exceed the L2 cache."""
    needed = [triton.cdiv(n, BLOCK_SIZE) for n in lens]
    slots = torch.randperm(len(lens), device="cuda", dtype=torch.int32)
    context_lens = torch.tensor(lens, device="cuda", dtype=torch.int32)[slots.long()]
    shape = (sum(needed), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    sequences = []
    for _ in range(max(1, triton.cdiv(COLD_BYTES, 4 * math.prod(shape)))):
        ids = torch.randperm(sum(needed), device="cuda", dtype=torch.int32).split(needed)
        tables = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        sequences.append((make_cache(shape, fp8), PagedRows(tables, slots, context_lens)))
    return sequences


def make_cache(shape: tuple[int, ...], fp8: bool) -> PagedKV:
    if not fp8:
        return PagedKV(random(*shape), random(*shape))
    (k, k_scales), (v, v_scales) = (quantize_kv(random(*shape)) for _ in "kv")
    return PagedKV(k, v, scales=torch.stack([k_scales, v_scales], -1).transpose(1, 2).contiguous())


def cache_name(fp8: bool) -> str:
    return "fp8" if fp8 else "bf16"


def decode(full: bool) -> None:
    """Measure the bandwidth of decode attention: the bytes of K and V, over time."""
    print("decode attention: sequences x tokens, group, cache | tile warps stages | us, TB/s  (* default)")
    sizes = [(256, 500, 1500), (128, 500, 1500), (32, 2000, 2000), (8, 4000, 4000), (8, 600, 600)]
    for group, (batch, low, high), fp8 in itertools.product((2, 4), sizes, (False, True)):
        lens = torch.linspace(low, high, batch).int().tolist()
        sequences = make_sequences(lens, fp8)
        q = random(batch, KV_HEADS * group, HEAD_DIM)
        counters = torch.zeros(batch * KV_HEADS, device="cuda", dtype=torch.int32)
        sms = sm_count(q.device)
        lens_on_device = sequences[0][1].context_lens
        plan = plan_decode_triton(lens_on_device, KV_HEADS, default_split_policy(batch, KV_HEADS, sms))

        def attend(kv, rows, config, q=q, counters=counters, plan=plan):
            plan = plan._replace(config=config)
            decode_attention_triton(q, kv, rows, 0.1, plan=plan, counters=counters)

        calls = [partial(attend, *pair) for pair in sequences]
        configs = [default_decode_config(batch, KV_HEADS, HEAD_DIM, 1 if fp8 else 2, sms)]
        if full:
            tiles = [(32, 2, 3), (32, 2, 4), (64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 2), (128, 4, 3), (128, 8, 3)]
            configs += [DecodeConfig(*tile) for tile in tiles]
        name = f"{batch} x {low}-{high}, {group}, {cache_name(fp8)}"
        head_bytes = HEAD_DIM + 2 if fp8 else 2 * HEAD_DIM
        sweep(name, calls, configs, 2 * sum(lens) * KV_HEADS * head_bytes, "TB/s")


def rope_decode(full: bool) -> None:
    """Measure QKV projection and fused RoPE and decode attention together, because the two overlap."""
    print("projection and attention: sequences x tokens, group | tile warps stages splits | us, TB/s  (* default)")
    hidden = 1024
    for group, (batch, tokens) in itertools.product((2, 4), [(1, 128), (1, 600), (1, 4000), (4, 600)]):
        sequences = make_sequences([tokens] * batch)
        n = KV_HEADS * (group + 2) * HEAD_DIM
        x = random(batch, hidden)
        weights = make_weights(n, hidden)
        q_weight, k_weight = random(2, HEAD_DIM)
        cos_sin = torch.randn(tokens, HEAD_DIM, device="cuda")
        transform = QKTransform(KV_HEADS * group, cos_sin, q_weight, k_weight, 1e-6)
        counters = torch.zeros(batch * KV_HEADS, device="cuda", dtype=torch.int32)

        def run(weight, caches, config, x=x, transform=transform, counters=counters):
            kv, rows = caches
            rope_decode_triton(gemv_triton(x, weight), transform, kv, rows, 0.1, counters=counters, config=config)

        calls = [partial(run, *pair) for pair in zip(itertools.cycle(weights), sequences[:512], strict=False)]
        configs = [default_rope_decode_config(batch, KV_HEADS, HEAD_DIM, 2, sm_count(x.device))]
        if full:
            tiles = [(16, 1, 2), (32, 1, 2), (32, 2, 2), (64, 2, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 2)]
            configs += [RopeDecodeConfig(*tile, splits) for tile in tiles for splits in (17, 33, 64)]
        num_bytes = 2 * n * hidden + 4 * batch * tokens * KV_HEADS * HEAD_DIM
        sweep(f"{batch} x {tokens}, {group}", calls, configs, num_bytes, "TB/s")


def prefill(full: bool) -> None:
    """Measure the arithmetic rate of prefill attention without the masked half."""
    print("prefill attention: sequences x new of context, group, cache | m n warps stages registers TMA | us, TFLOP/s")
    sizes = [(4, 4000, 4000), (256, 64, 2112), (1, 128, 128)]
    for group, (batch, new, context), fp8 in itertools.product((2, 4), sizes, (False, True)):
        sequences = make_sequences([context] * batch, fp8)
        cu_seqlens = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * new
        q = random(batch * new, KV_HEADS * group, HEAD_DIM)
        calls = [partial(prefill_attention_triton, q, *pair, cu_seqlens, 0.1) for pair in sequences]
        configs = [default_prefill_config(HEAD_DIM, 2, len(q) * KV_HEADS * group, sm_count(q.device))]
        if full:
            tiles = [(128, 64, 8, 2, 128), (128, 64, 8, 3), (128, 32, 8, 3, 128), (128, 64, 4, 2)]
            tiles += [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4)]
            configs += [PrefillConfig(*tile)._replace(tma=tma) for tile in tiles for tma in (False, True)]
        work = 4 * batch * new * (context - (new - 1) / 2) * KV_HEADS * group * HEAD_DIM
        sweep(f"{batch} x {new} of {context}, {group}, {cache_name(fp8)}", calls, configs, work, "TFLOP/s")


def swiglu(full: bool) -> None:
    """Measure the arithmetic rate of SwiGLU for many tokens, and of cuBLAS with SiLU after it, at the power limit."""
    print("swiglu: tokens x k -> n | m n k warps stages programs | us, TFLOP/s  (* default; cuBLAS, SiLU after it)")
    for (k, n), tokens in itertools.product([(4096, 12288), (1024, 3072)], (2048, 16384)):
        x = random(tokens, k)
        weight = random(2 * n, k) * k**-0.5
        work = 4 * tokens * n * k
        configs = [DEFAULT_CONFIG]
        if full:
            tiles = [(128, 128, 64, 8, 4), (128, 64, 64, 8, 3, 2), (128, 64, 64, 4, 3, 2), (64, 128, 64, 4, 4)]
            configs += [SwigluConfig(*tile) for tile in tiles]
        repeat = max(1, 10**13 // work)
        name = f"{tokens} x {k} -> {n}"
        sweep(name, [partial(_cublas, x, weight, gated=True)] * repeat, [("cuBLAS",)], work, "TFLOP/s")
        sweep(name, [partial(swiglu_triton, x, weight)] * repeat, configs, work, "TFLOP/s")


def gemv(full: bool) -> None:
    """Measure the bandwidth of the linear layers of a decode step with one token, and of cuBLAS."""
    print("gemv: rows x k of the weight | rows per program, warps | us, TB/s  (* default; cuBLAS with norm and SiLU)")
    for name, n, k in [*WEIGHTS, ("head", 151936, 1024), ("head", 151936, 4096)]:
        x = random(1, k)
        weights = make_weights(n, k)
        gated = name == "gate_up"
        options: dict[str, Any] = {"norm": (random(k), 1e-6), "gated": gated}
        if name in ("o", "down"):
            options = {"residual": random(1, n)}
        configs = [default_gemv_config(n // (2 if gated else 1), k, gated)]
        if full:
            configs += [GemvConfig(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (2, 4, 8)]
        width = triton.next_power_of_2(k) * (2 if gated else 1)
        fitting = [c for c in configs if c.rows * width <= 256 * 32 * c.num_warps]  # in registers
        label = f"{name} {n} x {k}"
        sweep(label, [partial(_cublas, x, weight, **options) for weight in weights], [("cuBLAS",)], 2 * n * k, "TB/s")
        sweep(label, [partial(gemv_triton, x, weight, **options) for weight in weights], fitting, 2 * n * k, "TB/s")


def gemm(full: bool) -> None:
    """Measure the bandwidth of the linear layers of a decode step with 8 to 64 tokens, and of cuBLAS."""
    print("gemm: rows x k of the weight, tokens | tile warps stages splits prefetch | us, TB/s  (* default; cuBLAS)")
    counters = torch.zeros(MAX_TILES, device="cuda", dtype=torch.int32)
    for (name, n, k), tokens in itertools.product(WEIGHTS, (8, 32, 64)):
        x = random(tokens, k)
        weights = make_weights(n, k)
        gated = name == "gate_up"
        options: dict[str, Any] = {"residual": random(tokens, n)} if name in ("o", "down") else {"gated": gated}
        configs = [default_gemm_config(tokens, n // (2 if gated else 1), k, gated)]
        if full:
            stages, splits = ((3, 4), (1,)) if gated else ((4, 6), (1, 2, 4, 8))
            for stage, split, columns in itertools.product(stages, splits, (0, 128, 512, 1024)):
                configs.append(configs[0]._replace(num_stages=stage, num_splits=split, prefetch=columns))
        label = f"{name} {n} x {k}, {tokens}"
        sweep(label, [partial(_cublas, x, weight, **options) for weight in weights], [("cuBLAS",)], 2 * n * k, "TB/s")
        calls = [partial(gemm_triton, x, weight, counters=counters, **options) for weight in weights]
        sweep(label, calls, configs, 2 * n * k, "TB/s")


def _cublas(x: torch.Tensor, weight: torch.Tensor, norm=None, gated=False, residual=None, config=None) -> torch.Tensor:
    """Compute what `gemv_triton` and `gemm_triton` compute with cuBLAS and separate kernels; ignore `config`."""
    if residual is not None:
        return torch.addmm(residual, x, weight.t(), out=residual)
    y = torch.nn.functional.linear(x if norm is None else rms_norm(x, *norm), weight)
    return silu_mul(y) if gated else y


KERNELS = {kernel.__name__: kernel for kernel in (decode, rope_decode, prefill, swiglu, gemv, gemm)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"some of {', '.join(KERNELS)} (default: all)")
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
