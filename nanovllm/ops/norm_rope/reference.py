"""RMSNorm and rotary embedding in plain torch: the references of the kernels in this folder, and what a CPU runs."""

import functools

import torch

from nanovllm.ops.attention.fp8_cache import quantize_kv
from nanovllm.ops.attention.paged_cache import PagedKV
from nanovllm.ops.norm_rope.qk_transform import QKTransform


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `rms_norm`; the norm is over the last dimension."""
    if residual is not None:
        x.add_(residual)
    if x.dtype == weight.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def rms_factor(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) of tokens x [T, N] float32 on a CPU: [T, 1].

    For one token, this takes half the time of `mean`.
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.addcmul(_scalar(eps), norm, norm, value=1 / x.shape[1]).rsqrt_()


@functools.cache
def _scalar(value: float) -> torch.Tensor:
    """Return a tensor of one float32 on the CPU. To make one takes longer than to add it."""
    return torch.tensor([value], dtype=torch.float32, device="cpu")


def store(kv: PagedKV, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write keys and values [T, K, Dh] to the caches at `slot_mapping` [T]; quantize them if the caches are in FP8."""
    for index, (cache, x) in enumerate(((kv.k_cache, k), (kv.v_cache, v))):
        if kv.scales is not None:
            x, scales = quantize_kv(x)
            kv.scales[slot_mapping // kv.block_size, :, slot_mapping % kv.block_size, index] = scales
            # torch copies bytes to given indices, but not FP8.
            x = x.view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache.view(-1, kv.kv_heads, kv.head_dim).index_copy_(0, slot_mapping, x)


def qk_norm_rope_store_torch(
    qkv: torch.Tensor,
    transform: QKTransform,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv: PagedKV,
) -> torch.Tensor:
    """Compute `qk_norm_rope_store`."""
    kv_heads = kv.kv_heads
    head_dim = kv.head_dim
    q, k, v = qkv.view(len(qkv), -1, head_dim).split([transform.num_heads, kv_heads, kv_heads], dim=1)
    if transform.q_weight is not None and transform.k_weight is not None:
        q = rms_norm_torch(q, transform.q_weight, transform.eps)
        k = rms_norm_torch(k, transform.k_weight, transform.eps)
    cos, sin = transform.cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    store(kv, rotate(k), v, slot_mapping)
    q = rotate(q)
    if transform.query_scale is None:
        return q
    return q * transform.query_scale[positions].to(q.dtype)[:, None, None]
