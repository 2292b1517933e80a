"""Attention backends with one interface. `select_backend` chooses one."""

import logging

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.config import ATTENTION_BACKENDS
from nanovllm.ops.float8 import FP8
from nanovllm.ops.triton_utils import HAVE_TRITON

__all__ = ["AttentionBackend", "select_backend"]

MAX_HEAD_DIM = 256  # limit of the Triton and FlashAttention kernels

logger = logging.getLogger(__name__)


def select_backend(
    name: str,
    device: torch.device | str,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
) -> AttentionBackend:
    """Return the backend `name`. For "auto", return the fastest backend that is installed and fits, and log it.

    Args:
        name: one of ATTENTION_BACKENDS. Only "auto" chooses; a named backend is used, or the call raises.
        device, head_dim, block_size: options of the KV cache.
        dtype: the queries' dtype.
        kv_dtype: the KV cache's dtype; `dtype` if None.

    Raises:
        ValueError: the name is unknown, or the backend or the GPU does not support the device, head_dim, block_size or
            dtypes.
        ImportError: the backend's package is not installed, or cannot be imported.
    """
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend={name!r} must be one of {', '.join(map(repr, ATTENTION_BACKENDS))}")
    device = torch.device(device)
    if kv_dtype == FP8:
        _check_fp8(device)
        name = "triton" if name == "auto" else name
    if name == "auto":
        name = _automatic(device, head_dim, block_size, dtype)
        logger.info("attention backend: %s (%s, head size %d)", name, device.type, head_dim)
    if name == "torch":
        from nanovllm.attention.torch_backend import TorchBackend

        return TorchBackend()
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} must be at most {MAX_HEAD_DIM} for attention_backend={name!r}")
    if name == "triton":
        from nanovllm.attention.triton_backend import TritonBackend

        return TritonBackend(device)
    from nanovllm.attention.flash_attn_backend import flash_attn_backend

    return flash_attn_backend(device, head_dim, block_size, dtype)


def _check_fp8(device: torch.device) -> None:
    """Raise ValueError if a GPU cannot convert FP8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            "kv_cache_dtype='fp8' needs a GPU with FP8 (Ada, Hopper or newer, compute capability 8.9), got "
            f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}; use 'auto'"
        )


def _automatic(device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype) -> str:
    if device.type != "cuda" or head_dim > MAX_HEAD_DIM:
        return "torch"
    if HAVE_TRITON:
        return "triton"
    from nanovllm.attention.flash_attn_backend import choose_package

    try:
        choose_package(device, head_dim, block_size, dtype)
    except (ImportError, ValueError):
        return "torch"
    return "flash_attn"
