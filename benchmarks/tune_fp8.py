"""Measure the kernels for FP8 weights against bf16: `python -m benchmarks.tune_fp8 --help`.

A line that starts with "*" compares the ways to compute a layer; the others show the fastest settings of a kernel.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.tune import WEIGHTS, random, seconds
from nanovllm.ops.fp8.experts import expert_pairs_fp8, experts_fp8
from nanovllm.ops.fp8.quantize import LazySwiglu, QuantizedRows, quantize_triton
from nanovllm.ops.fp8.reference import BLOCK, quantize_weight
from nanovllm.ops.fp8.scaled_gemm import ScaledGemmConfig, default_scaled_gemm_config, scaled_gemm_triton
from nanovllm.ops.linear.gemm import MAX_TILES, gemm_triton
from nanovllm.ops.linear.gemv import GemvConfig, default_gemv_config, gemv_triton
from nanovllm.ops.linear.silu_mul import silu_mul
from nanovllm.ops.linear.swiglu import is_swiglu, swiglu_triton
from nanovllm.ops.moe.combine import combine_triton
from nanovllm.ops.moe.dispatch import GroupedGemmConfig, Tiling
from nanovllm.ops.moe.expert_gemv import ExpertGemvConfig, down_gemv_triton, gate_up_gemv_triton
from nanovllm.ops.moe.experts import experts
from nanovllm.ops.moe.router import route
from nanovllm.ops.norm_rope.rms_norm import rms_norm
from nanovllm.ops.triton_utils import compile_in_parallel, compile_without_launch, triton

COLD_BYTES = 256 << 20  # several times any L2 cache
LAYERS = WEIGHTS[4:]  # of Qwen3-8B

# For a result that is [T, N], and with SwiGLU.
MANY_TOKEN_CONFIGS = [
    ScaledGemmConfig(block_m, block_n, num_warps, num_stages, programs, num_splits)
    for block_m, block_n, num_warps, num_stages, programs in (
        (64, 64, 4, 6, 2),
        (64, 64, 4, 4, 3),
        (64, 64, 4, 3, 4),
        (64, 128, 4, 4, 2),
        (128, 128, 4, 3, 2),
    )
    for num_splits in (1, 2, 4)
]
GATED_CONFIGS = [
    ScaledGemmConfig(64, 64, 4, 4, 2),
    ScaledGemmConfig(64, 64, 4, 3, 3),
    ScaledGemmConfig(64, 32, 4, 6, 3),
    ScaledGemmConfig(64, 128, 8, 5, 1),
]


class Layer:
    """A linear layer of Qwen3-8B, in bf16 and FP8, with more copies than fit in the L2 cache."""

    def __init__(self, name: str, n: int, k: int, tokens: int):
        self.name, self.n, self.k, self.tokens = name, n, k, tokens
        self.gated, self.adds = name == "gate_up", name in ("o", "down")
        self.x = random(tokens, k)
        self.residual = random(tokens, n) if self.adds else None
        copies = 1 if tokens >= 2048 else triton.cdiv(COLD_BYTES, n * k)
        self.weights = [(torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(triton.cdiv(copies, 2))]
        quantized = [quantize_weight(weight, (BLOCK, BLOCK)) for weight in self.weights]
        self.fp8 = (quantized + [(weight.clone(), scale) for weight, scale in quantized])[:copies]
        self.row_scale, self.token_scale = torch.ones(n, 1, device="cuda"), torch.ones(tokens, 1, device="cuda")
        self.counters = torch.zeros(MAX_TILES, device="cuda", dtype=torch.int32)
        self.num_outputs = n // (2 if self.gated else 1)
        self.fused: dict[str, Any] = {"residual": self.residual} if self.adds else {"norm": (random(k), 1e-6)}
        self.fused["gated"] = self.gated
        self.repeat = max(1, int(2e12 / (2 * tokens * n * k))) if tokens >= 2048 else 1

    def bf16(self, weight: torch.Tensor) -> torch.Tensor:
        """Compute the layer as the engine does in bf16."""
        if self.residual is not None:
            return torch.addmm(self.residual, self.x, weight.t(), out=self.residual)
        if self.gated and is_swiglu(self.x, weight):
            return swiglu_triton(self.x, weight)
        y = torch.nn.functional.linear(self.x, weight)
        return silu_mul(y) if self.gated else y

    def bf16_gemm(self, weight: torch.Tensor) -> torch.Tensor:
        """Compute the layer with the norm and the GEMM for small batches."""
        x = rms_norm(self.x, *self.fused["norm"]) if "norm" in self.fused else self.x
        return gemm_triton(x, weight, gated=self.gated, residual=self.residual, counters=self.counters)

    def scaled_mm(self, x: QuantizedRows, scales: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor):
        """Compute the layer with torch's GEMM, and what must follow it."""
        if scales is None:
            scales = self.token_scale
            scale = self.row_scale
        fast = scales is self.token_scale
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
        y = torch.ops.aten._scaled_mm(x.values, weight.t(), scales, scale.t(), **options)
        if self.gated:  # the kernel that quantizes computes SwiGLU
            return quantize_triton(LazySwiglu(y)).values
        return y if self.residual is None else self.residual.add_(y)

    def report(self, times: str, time: float, config: Any) -> None:
        """Print a line that compares ways to compute the layer."""
        settings = " ".join(str(int(value)) for value in config)
        rate = self.n * self.k / time / 1e6
        print(f"* {self.name:8s}{self.tokens:5d} {times} {rate:5.2f} TB/s {settings}", flush=True)


def measure(calls: Sequence[Callable[[], object]]) -> float:
    """Return the microseconds of one of `calls`, or infinity if it fails."""
    try:
        return seconds(list(calls), repeat=3) * 1e6
    except Exception as error:
        print("  failed:", str(error).splitlines()[0][:150])
        torch.cuda.synchronize()
        return float("inf")


def fastest(name: str, calls_of: Callable[[Any], list[Callable]], configs: Sequence[Any]) -> tuple[float, Any]:
    """Print the fastest settings of a kernel, and return the time and the settings of the fastest."""
    times = sorted(
        ((measure(calls_of(config)), tuple(config)) for config in dict.fromkeys(configs)), key=lambda x: x[0]
    )
    for time, config in times[:4]:
        print(f"  {name} {time:8.1f} us  {' '.join(map(str, config))}")
    return times[0]


def precompile(calls: Sequence[Callable[[], object]]) -> None:
    """Compile the kernels that `calls` launch in parallel."""
    try:
        with compile_in_parallel(), compile_without_launch():
            for call in calls:
                call()
    except Exception as error:  # the settings that failed fail again when they are measured
        print("  failed:", str(error).splitlines()[0][:150])


def many(tokens_list: Sequence[int]) -> None:
    """Compare the GEMMs for many tokens: bf16, torch._scaled_mm, and our kernel."""
    print("many tokens: layer, tokens | us: bf16, quantize, scaled_mm by block, by row, own; TFLOP/s of own")
    calls = []
    for name, n, k in LAYERS[:3]:
        layer = Layer(name, n, k, 64)
        x = quantize_triton(layer.x)
        calls += [_many_calls(c, layer, x)[0] for c in (GATED_CONFIGS if layer.gated else MANY_TOKEN_CONFIGS)]
    precompile(calls)
    for tokens, (name, n, k) in itertools.product(tokens_list, LAYERS):
        layer = Layer(name, n, k, tokens)
        x = quantize_triton(layer.x)
        configs = [default_scaled_gemm_config(tokens, layer.num_outputs, k, layer.gated)]
        configs += GATED_CONFIGS if layer.gated else MANY_TOKEN_CONFIGS
        if tokens > 128:
            configs = configs[:1]
        bf16 = measure([partial(layer.bf16, weight) for weight in layer.weights * layer.repeat])
        quantize = measure([partial(quantize_triton, layer.x)] * 8)
        by_block, by_row = (
            measure([partial(layer.scaled_mm, x, scales, *weight) for weight in layer.fp8 * layer.repeat])
            for scales in (x.scales, None)
        )
        time, config = fastest(f"{name} {tokens}", partial(_many_calls, layer=layer, x=x), configs)
        rate = 2 * tokens * n * k / time / 1e6
        times = f"{bf16:7.1f} {quantize:5.1f} {by_block:7.1f} {by_row:7.1f} {time:7.1f} {rate:5.0f}"
        layer.report(times, time, config)


def _many_calls(config: ScaledGemmConfig, layer: Layer, x: QuantizedRows) -> list[Callable]:
    options = {"gated": layer.gated, "residual": layer.residual, "counters": layer.counters, "config": config}
    return [partial(scaled_gemm_triton, x, *weight, **options) for weight in layer.fp8 * layer.repeat]


def gemv(tokens_list: Sequence[int]) -> None:
    """Compare the GEMV for few tokens with FP8 and bf16 weights, and with the bf16 GEMM."""
    print("few tokens: layer, tokens | us: GEMV in bf16, FP8 by block, by row; norm and GEMM in bf16; TB/s of FP8")
    layers = [Layer(*layer, tokens) for tokens, layer in itertools.product(tokens_list, LAYERS)]
    precompile(
        [calls[0] for layer in layers for config in _gemv_configs(layer) for calls in _gemv_calls(layer, config)]
    )
    for layer in layers:
        bf16 = measure([partial(gemv_triton, layer.x, weight, **layer.fused) for weight in layer.weights])
        name = f"{layer.name} {layer.tokens}"
        time, config = fastest(name, lambda config, layer=layer: _gemv_calls(layer, config)[0], _gemv_configs(layer))
        row_time, gemm_time = (measure(calls) for calls in _gemv_calls(layer, GemvConfig(*config))[1:])
        layer.report(f"{bf16:7.1f} {time:7.1f} {row_time:7.1f} {gemm_time:7.1f}", time, config)


def _gemv_configs(layer: Layer) -> list[GemvConfig]:
    configs = [default_gemv_config(layer.num_outputs, layer.k, layer.gated, 1)]
    if layer.tokens == 1:
        width = triton.next_power_of_2(layer.k) * (2 if layer.gated else 1)
        shapes = itertools.product((2, 4, 8, 16), (4, 8))
        configs += [GemvConfig(*shape) for shape in shapes if shape[0] * width <= 512 * 32 * shape[1]]  # registers
    return configs


def _gemv_calls(layer: Layer, config: GemvConfig) -> list[list[Callable]]:
    """Return calls of the GEMV with scales by block and by row, and of rms_norm and the bf16 GEMM."""
    options = layer.fused | {"config": config}
    return [
        [partial(gemv_triton, layer.x, weight, scale=scale, **options) for weight, scale in layer.fp8],
        [partial(gemv_triton, layer.x, weight, scale=layer.row_scale, **options) for weight, _ in layer.fp8],
        [partial(layer.bf16_gemm, weight) for weight in layer.weights],
    ]


class ExpertLayer:
    """A layer of experts of Qwen3-30B-A3B in bf16 and FP8. Its weights are larger than the L2 cache."""

    def __init__(self, tokens: int, num_experts: int = 128, h: int = 2048, i: int = 768, top_k: int = 8):
        self.tokens, self.x, self.norm = tokens, random(tokens, h), (random(h), 1e-6)
        self.weights = random(num_experts, 2 * i, h) * h**-0.5, random(num_experts, h, i) * i**-0.5
        self.fp8 = [quantize_weight(weight, (BLOCK, BLOCK)) for weight in self.weights]
        self.ids, self.routing = route(random(tokens, num_experts), top_k, True, torch.bfloat16)
        # Steps of few tokens choose other experts each time.
        self.choices = [route(random(tokens, num_experts), top_k, True, torch.bfloat16)[0] for _ in range(8)]

    def bf16(self, ids: torch.Tensor) -> torch.Tensor:
        return experts(self.x, *self.weights, ids, self.routing, self.norm, self.x)

    def by_default(self, ids: torch.Tensor) -> torch.Tensor:
        return experts_fp8(self.x, *self.fp8[0], *self.fp8[1], ids, self.routing, self.norm, self.x)

    def grouped(self, tiling: Tiling, ids: torch.Tensor) -> torch.Tensor:
        pairs = expert_pairs_fp8(self.x, self.fp8[0], self.fp8[1], ids, self.routing, norm=self.norm, tiling=tiling)
        return combine_triton(pairs, self.x)

    def gemvs(self, rows: int, warps: tuple[int, int], ids: torch.Tensor) -> torch.Tensor:
        (gate_up, gate_up_scale), (down, down_scale) = self.fp8
        gate_up_config, down_config = (ExpertGemvConfig(rows, num_warps) for num_warps in warps)
        hidden = gate_up_gemv_triton(self.x, gate_up, ids, self.norm, gate_up_config, gate_up_scale)
        return down_gemv_triton(hidden, down, ids, self.routing, self.x, config=down_config, scale=down_scale)


GATE_UPS = {block: [GroupedGemmConfig(128, 128, warps, 3, 64) for warps in (4, 8)] for block in (16, 32, 64)}
DOWNS = [GroupedGemmConfig(block_n, 128, 4, 4, 64) for block_n in (64, 128)]


def moe(tokens_list: Sequence[int]) -> None:
    """Compare experts with FP8 and bf16 weights."""
    print("experts: tokens | us: bf16, FP8 by default, FP8 with the fastest settings")
    layers = [ExpertLayer(tokens) for tokens in tokens_list]
    precompile([call for layer in layers for config in _moe_configs(layer) for call in _moe_calls(config, layer)[:1]])
    for layer in layers:
        times = [measure([partial(run, ids) for ids in layer.choices]) for run in (layer.bf16, layer.by_default)]
        name = f"experts {layer.tokens}"
        best, config = fastest(name, partial(_moe_calls, layer=layer), _moe_configs(layer))
        print(f"* {name} {times[0]:8.1f} {times[1]:8.1f} {best:8.1f} {config}", flush=True)


def _moe_configs(layer: ExpertLayer) -> list[Any]:
    if layer.tokens <= 4:
        return [(rows, (a, b)) for rows in (1, 2) for a, b in ((1, 2), (2, 4), (4, 8))]
    pairs = layer.tokens * 8 / 128
    blocks = [block for block in (16, 32, 64) if pairs / 4 <= block <= 8 * pairs or block == 64 < pairs]
    return [
        Tiling(0, block, gate_up, down)
        for block in blocks
        for gate_up, down in itertools.product(GATE_UPS[block], DOWNS)
    ]


def _moe_calls(config: Any, layer: ExpertLayer) -> list[Callable]:
    run = layer.grouped if isinstance(config, Tiling) else layer.gemvs
    options = (config,) if isinstance(config, Tiling) else config
    return [partial(run, *options, ids) for ids in layer.choices]


KERNELS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "many": (many, (2, 16, 64, 128, 256, 2048, 8192)),
    "gemv": (gemv, (1, 2, 4)),
    "experts": (moe, (1, 4, 16, 64, 256, 2048, 8192)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"some of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--tokens", type=int, nargs="*", help="numbers of tokens")
    args = parser.parse_args()
    unknown = [name for name in args.kernels if name not in KERNELS]
    if unknown:
        parser.error(f"KERNEL must be one of {', '.join(KERNELS)}, got {unknown[0]!r}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here to measure")
    for name in args.kernels or KERNELS:
        function, tokens = KERNELS[name]
        function(args.tokens or tokens)


if __name__ == "__main__":
    main()
