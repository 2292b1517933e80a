"""Attention with one of Dao-AILab's FlashAttention packages, if a suitable one is installed.

FlashAttention-2 (Dao, 2023) has one function for decode rows and one for prefill rows. FlashAttention-3 (Shah et al.,
2024), for Hopper, has one function for both. Rows, not slots, index their block tables: `plan` gathers these, and
returns the functions' arguments for decode rows and for prefill rows as two dicts.

FlashAttention-3 multiplies the values after a row's end, in its last page, by zero. These must be finite. They are as
long as no model computes NaN, because the cache starts as zeros.
"""

import importlib
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.arithmetic import ceil_div
from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.triton_utils import sm_count

# Query rows (tokens x heads of a group) in a tile of FlashAttention-3, for head_dim above 64 and up to 64.
QUERY_TILE = 128
SMALL_HEAD_QUERY_TILE = 192
MAX_SPLITS = 32

logger = logging.getLogger(__name__)


class Package(NamedTuple):
    """A build of FlashAttention.

    Args:
        name: pip's name of the package.
        module: name of the Python module.
        version: 2 or 3.
        page: the block size must be a multiple of this.
        dtypes: supported dtypes of the cache.
        whole_tiles: whether the kernels only load pages in whole tiles of `page` tokens.
    """

    name: str
    module: str
    version: int
    page: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    whole_tiles: bool = False

    def incompatibility(
        self, capability: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
    ) -> str | None:
        """Return why the package does not fit such a cache and compute capability; None if it fits."""
        major, minor = capability
        if self.version == 3 and capability != (9, 0):
            return f"needs a card of compute capability 9.0, not {major}.{minor}"
        if capability < (8, 0):
            return f"needs a card of compute capability 8.0 or more, not {major}.{minor}"
        if dtype not in self.dtypes:
            return f"dtype={dtype} must be {' or '.join(str(known) for known in self.dtypes)}"
        if block_size % self.page:
            return f"block_size={block_size} must be a multiple of {self.page}"
        if head_dim > 256 or head_dim % 8:
            return f"head_dim={head_dim} must be a multiple of 8 of at most 256"
        # Tiles of other head sizes hold 144, 112 or 80 tokens.
        if self.whole_tiles and (64 < head_dim <= 96 or head_dim > 128):
            return f"head_dim={head_dim} must be at most 64, or from 97 to 128"
        return None


# In order of preference. fa3-fwd is built without the kernels for pages of any size, and without float16.
PACKAGES = (
    Package("flash-attn-3", "flash_attn_interface", 3),
    Package("fa3-fwd", "fa3_fwd_interface", 3, page=128, dtypes=(torch.bfloat16,), whole_tiles=True),
    Package("flash-attn", "flash_attn", 2, page=256),
)


def choose_package(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[Package, ModuleType]:
    """Return the first of PACKAGES that can be imported and fits such a cache on `device`, and its module.

    Raises:
        ImportError: no package can be imported.
        ValueError: `device` is not a CUDA device, or no package that can be imported fits.
    """
    if device.type != "cuda":
        raise ValueError(f"attention_backend='flash_attn' needs a CUDA device, not device={str(device)!r}; use 'torch'")
    missing = []
    reasons = []
    for package in PACKAGES:
        try:
            module = importlib.import_module(package.module)
            module.flash_attn_with_kvcache  # noqa: B018  (the package `flash_attn` of flash-attn-4 lacks it)
        except (ImportError, OSError, AttributeError) as error:
            missing.append(f"{package.name} ({error})")
            continue
        reason = package.incompatibility(torch.cuda.get_device_capability(device), head_dim, block_size, dtype)
        if reason is None:
            return package, module
        reasons.append(f"{package.name}: {reason}")
    if reasons:
        raise ValueError(f"attention_backend='flash_attn' cannot be used: {'; '.join(reasons)}")
    raise ImportError(f"attention_backend='flash_attn' needs one of the packages {', '.join(missing)}")


def flash_attn_backend(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype
) -> "FlashAttn2Backend | FlashAttn3Backend":
    """Return the backend for the chosen package, and log the package. Raise as `choose_package` does."""
    package, module = choose_package(device, head_dim, block_size, dtype)
    logger.info("attention_backend='flash_attn' is the package %s", package.name)
    if package.version == 2:
        return FlashAttn2Backend(module)
    return FlashAttn3Backend(module, package.whole_tiles)


def num_splits(num_rows: int, num_tokens: int, heads: int, kv_heads: int, num_sms: int) -> int:
    """Return the maximum number of splits of a row's context in FlashAttention-3, which uses fewer for short rows.

    It depends on shapes only, so a captured step stays correct at any lengths. FlashAttention-3's default ignores the
    number of rows. That can take gigabytes, because each split stores partial results of all tokens.
    """
    tiles = kv_heads * max(num_rows, ceil_div(num_tokens * heads, kv_heads * QUERY_TILE))
    return max(1, min(MAX_SPLITS, 4 * num_sms // tiles))


def window_size(kv: PagedKV) -> tuple[int, int]:
    """Return FlashAttention's window: the tokens that a query sees before and after itself; -1 for all."""
    return (kv.window - 1, 0) if kv.window else (-1, -1)


class FlashAttn3Backend(AttentionBackend):
    """FlashAttention-3: `flash_attn_with_kvcache` for rows of both kinds.

    In every call, a kernel of the package reads lengths and schedules tiles. The rest depends on shapes and on the
    longest possible row only. So graphs can capture steps of both kinds.

    Args:
        module: the module that has the function.
        whole_tiles: as in `Package`.
    """

    name = "flash_attn"
    capturable = capturable_prefill = True

    def __init__(self, module: ModuleType, whole_tiles: bool):
        self._with_kvcache = module.flash_attn_with_kvcache
        self._whole_tiles = whole_tiles

    def plan(self, ctx: Context) -> tuple[dict, dict | None]:
        num_decode = ctx.num_decode
        rows = ctx.rows
        tables = rows.block_tables.index_select(0, rows.slots)  # on the device, so that a graph replays it
        decode = {
            "page_table": tables[:num_decode],
            "cache_seqlens": ctx.decode_rows.context_lens,
            "cu_seqlens_q": torch.arange(num_decode + 1, dtype=torch.int32, device=tables.device),
            "max_seqlen_q": 1,
        }
        prefill = None
        if ctx.cu_seqlens_q is not None:
            prefill = {
                "page_table": tables[num_decode:],
                "cache_seqlens": ctx.prefill_rows.context_lens,
                "cu_seqlens_q": ctx.cu_seqlens_q - num_decode,
                "max_seqlen_q": ctx.max_seqlen_q,
            }
        return decode, prefill

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        self._attend_rows(q, kv, scale, out, **ctx.plan[0])

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        self._attend_rows(q, kv, scale, out, **ctx.plan[1])

    def _attend_rows(
        self, q: Tensor, kv: PagedKV, scale: float, out: Tensor, max_seqlen_q: int, **rows: Tensor
    ) -> None:
        num_tokens, heads, head_dim = q.shape
        kv_heads = kv.kv_heads
        if self._whole_tiles:  # the package loads whole tiles only if a row may have more queries than a tile
            tile = QUERY_TILE if head_dim > 64 else SMALL_HEAD_QUERY_TILE
            max_seqlen_q = max(max_seqlen_q, tile * kv_heads // heads + 1)
        splits = num_splits(
            num_rows=len(rows["cache_seqlens"]),
            num_tokens=num_tokens,
            heads=heads,
            kv_heads=kv_heads,
            num_sms=sm_count(q.device),
        )
        attended = self._with_kvcache(
            q,
            kv.k_cache,
            kv.v_cache,
            max_seqlen_q=max_seqlen_q,
            softmax_scale=scale,
            causal=True,
            window_size=window_size(kv),
            num_splits=splits,
            **rows,
        )
        out.copy_(attended)


class FlashAttn2Backend(AttentionBackend):
    """FlashAttention-2: `flash_attn_with_kvcache` for decode rows, `flash_attn_varlen_func` for prefill rows.

    The width of the block tables, not the lengths, determines the splits of decode rows, so graphs can capture them. A
    graph with prefill rows would launch programs for the longest possible row in place of each row.

    Args:
        module: the module that has the functions.
    """

    name = "flash_attn"
    capturable = True

    def __init__(self, module: ModuleType):
        self._with_kvcache = module.flash_attn_with_kvcache
        self._varlen = module.flash_attn_varlen_func

    def plan(self, ctx: Context) -> tuple[dict, dict | None]:
        num_decode = ctx.num_decode
        rows = ctx.rows
        tables = rows.block_tables.index_select(0, rows.slots)  # on the device, so that a graph replays it
        decode = {"block_table": tables[:num_decode], "cache_seqlens": ctx.decode_rows.context_lens}
        prefill = None
        if ctx.cu_seqlens_q is not None:
            prefill = {
                "block_table": tables[num_decode:],
                "cu_seqlens_q": ctx.cu_seqlens_q - num_decode,
                "cu_seqlens_k": torch.nn.functional.pad(ctx.prefill_rows.context_lens.cumsum(0), (1, 0)).int(),
                "max_seqlen_q": ctx.max_seqlen_q,
                "max_seqlen_k": ctx.max_context_len,
            }
        return decode, prefill

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        options = {"softmax_scale": scale, "causal": True, "window_size": window_size(kv)}
        out.copy_(self._with_kvcache(q[:, None], kv.k_cache, kv.v_cache, **options, **ctx.plan[0])[:, 0])

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        options = {"softmax_scale": scale, "causal": True, "window_size": window_size(kv)}
        out.copy_(self._varlen(q, kv.k_cache, kv.v_cache, **options, **ctx.plan[1]))
