"""Run an engine on a CPU with keys and values in FP8, to measure what that costs in quality.

The engine itself refuses `kv_cache_dtype="fp8"` there, because it would be slow. The attention backend for CPUs is the
reference of the GPU's kernels: it quantizes and dequantizes exactly as they do.
"""

import torch

from nanovllm import LLM
from nanovllm.ops.float8 import FP8
from nanovllm.runner.state_pool import StatePool


def use_fp8_kv(llm: LLM) -> None:
    """Replace the KV cache of an engine of one rank on a CPU, without any request, by one in FP8."""
    if llm.config.device_type != "cpu" or llm.config.tensor_parallel_size > 1:
        raise ValueError("use_fp8_kv needs an engine of one rank on a CPU; on a GPU use LLM(kv_cache_dtype='fp8')")
    llm.sleep(level=1)
    runner = llm.llm_engine.executor.runner
    runner.pool = StatePool(runner.model, runner.block_size, torch.device("cpu"), FP8)
    llm.wake_up()
