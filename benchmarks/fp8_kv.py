"""Run an engine on a CPU with keys and values in FP8, to measure what that costs in quality.

The engine itself refuses `kv_cache_dtype="fp8"` there, because it would be slow. The attention backend for CPUs is the
reference of the GPU's kernels: it quantises and dequantises exactly as they do.
"""

import torch

from nanovllm import LLM
from nanovllm.executor.local import LocalExecutor
from nanovllm.ops.attention.fp8_cache import FP8
from nanovllm.runner.state_pool import StatePool


def use_fp8_kv(llm: LLM) -> None:
    """Replace the KV cache of an engine on a CPU, of one rank and without any request, by one in FP8."""
    executor = llm.llm_engine.executor
    if llm.config.device_type != "cpu" or not isinstance(executor, LocalExecutor):
        raise ValueError("use_fp8_kv needs an engine of one rank on a CPU; on a GPU use LLM(kv_cache_dtype='fp8')")
    runner = executor.runner
    runner.pool.free()
    runner.pool = StatePool(runner.model, runner.block_size, torch.device("cpu"), FP8)
    with torch.inference_mode():
        runner._allocate(runner.sizes)
    llm.reset_prefix_cache()
