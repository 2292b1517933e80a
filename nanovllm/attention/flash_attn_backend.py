"""Attention by a FlashAttention package (Dao-AILab's), where one is installed that fits.

FlashAttention-2 (Dao, 2023) has a function for decode rows and another for prefill rows; FlashAttention-3 (Shah et al.,
2024), for Hopper, has one for both. Their block tables are indexed by row, not by slot: `prepare` gathers them, and
keeps what the functions are told of decode rows and of prefill rows as two dicts of arguments.

FlashAttention-3 multiplies what lies behind the end of a row in its last page by zero. That must be finite, which it is
as long as no model computes NaN: the cache begins as zeros.
"""

import importlib
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, Context, PagedKV
from nanovllm.ops.triton_utils import sm_count

QUERY_TILE = 128  # query rows (tokens x heads of a group) of a tile of FlashAttention-3; 192 if heads are small
MAX_SPLITS = 32

logger = logging.getLogger(__name__)


class Package(NamedTuple):
    """A build of FlashAttention.

    Args:
        name: what pip calls it.
        module: what Python calls it.
        version: 2 or 3.
        page: block sizes must be a multiple of it.
        dtypes: of the cache.
        by_tile: pages are loaded by whole tiles only, of as many tokens as `page`.
    """

    name: str
    module: str
    version: int
    page: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    by_tile: bool = False

    def misfit(self, capability: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype) -> str:
        """Why this cannot serve such a cache on a card of such compute capability; "" if it can."""
        if self.version == 3 and capability != (9, 0):
            return "needs a card of compute capability 9.0, not {}.{}".format(*capability)
        if capability < (8, 0):
            return "needs a card of compute capability 8.0 or more, not {}.{}".format(*capability)
        if dtype not in self.dtypes:
            return f"dtype={dtype} must be {' or '.join(str(known) for known in self.dtypes)}"
        if block_size % self.page:
            return f"block_size={block_size} must be a multiple of {self.page}"
        if head_dim > 256 or head_dim % 8:
            return f"head_dim={head_dim} must be a multiple of 8 of at most 256"
        if self.by_tile and (64 < head_dim <= 96 or head_dim > 128):  # whose tiles hold 144, 112 or 80 tokens
            return f"head_dim={head_dim} must be at most 64, or from 97 to 128"
        return ""


# The first that is installed and fits is used. fa3-fwd is built without the kernels for pages of any size and float16.
PACKAGES = (
    Package("flash-attn-3", "flash_attn_interface", 3),
    Package("fa3-fwd", "fa3_fwd_interface", 3, page=128, dtypes=(torch.bfloat16,), by_tile=True),
    Package("flash-attn", "flash_attn", 2, page=256),
)


def choose_package(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[Package, ModuleType]:
    """The first of PACKAGES that can be imported and serves such a cache on `device`.

    Raises:
        ImportError: none can be imported.
        ValueError: no CUDA device, or none of those that can be imported fits.
    """
    if device.type != "cuda":
        raise ValueError(f"attention_backend='flash_attn' needs a CUDA device, not device={str(device)!r}; use 'torch'")
    missing, misfits = [], []
    for package in PACKAGES:
        try:
            module = importlib.import_module(package.module)
            module.flash_attn_with_kvcache  # noqa: B018  flash-attn-4 has a package `flash_attn` too, without it
        except (ImportError, OSError, AttributeError) as error:
            missing.append(f"{package.name} ({error})")
            continue
        misfit = package.misfit(torch.cuda.get_device_capability(device), head_dim, block_size, dtype)
        if not misfit:
            return package, module
        misfits.append(f"{package.name}: {misfit}")
    if misfits:
        raise ValueError(f"attention_backend='flash_attn' cannot be used: {'; '.join(misfits)}")
    raise ImportError(f"attention_backend='flash_attn' needs one of the packages {', '.join(missing)}")


def flash_attn_backend(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype
) -> "FlashAttn2Backend | FlashAttn3Backend":
    """The backend for the package that is chosen, which is logged; raises as `choose_package` does."""
    package, module = choose_package(device, head_dim, block_size, dtype)
    logger.info("attention_backend='flash_attn' is the package %s", package.name)
    if package.version == 2:
        return FlashAttn2Backend(module)
    return FlashAttn3Backend(module, package.by_tile)


def num_splits(num_rows: int, num_tokens: int, heads: int, kv_heads: int, num_sms: int) -> int:
    """Most parts in which FlashAttention-3 attends a row's context: how many they are is found out on the device.

    Follows from shapes alone, so a captured step stays right at any lengths. It would choose by itself, but without
    regard to the number of rows, and keeps partial results of all tokens for each part, which can take gigabytes.
    """
    tiles = kv_heads * max(num_rows, -(-num_tokens * heads // (kv_heads * QUERY_TILE)))
    return max(1, min(MAX_SPLITS, 4 * num_sms // tiles))


class FlashAttn3Backend(AttentionBackend):
    """FlashAttention-3: `flash_attn_with_kvcache` for rows of both kinds.

    A kernel of the package reads lengths and schedules tiles in every call; all else follows from shapes and from the
    longest row that is possible. So graphs may hold steps of both kinds.

    Args:
        module: where the function is.
        by_tile: as in `Package`.
    """

    name = "flash_attn"
    capturable = capturable_prefill = True

    def __init__(self, module: ModuleType, by_tile: bool):
        self._with_kvcache, self._by_tile = module.flash_attn_with_kvcache, by_tile

    def prepare(self, ctx: Context) -> None:
        tables, d = ctx.block_tables.index_select(0, ctx.slots), ctx.num_decode  # on the device: a graph replays it
        each = torch.arange(d + 1, dtype=torch.int32, device=tables.device)
        lens, prefill = ctx.context_lens, None
        decode = {"page_table": tables[:d], "cache_seqlens": lens[:d], "cu_seqlens_q": each, "max_seqlen_q": 1}
        if ctx.cu_seqlens_q is not None:
            prefill = {"page_table": tables[d:], "cache_seqlens": lens[d:]}
            prefill |= {"cu_seqlens_q": ctx.cu_seqlens_q - d, "max_seqlen_q": ctx.max_seqlen_q}
        ctx.meta = decode, prefill

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        self._attend_rows(q, kv, scale, out, **ctx.meta[0])

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        self._attend_rows(q, kv, scale, out, **ctx.meta[1])

    def _attend_rows(
        self, q: Tensor, kv: PagedKV, scale: float, out: Tensor, max_seqlen_q: int, **rows: Tensor
    ) -> None:
        (num_tokens, heads, head_dim), kv_heads = q.shape, kv.k_cache.shape[2]
        if self._by_tile:  # which it does only if the longest row may have more queries than a tile
            tile = QUERY_TILE if head_dim > 64 else 192
            max_seqlen_q = max(max_seqlen_q, tile * kv_heads // heads + 1)
        splits = num_splits(len(rows["cache_seqlens"]), num_tokens, heads, kv_heads, sm_count(q.device))
        options = {"softmax_scale": scale, "causal": True, "num_splits": splits}
        out.copy_(self._with_kvcache(q, kv.k_cache, kv.v_cache, max_seqlen_q=max_seqlen_q, **rows, **options))


class FlashAttn2Backend(AttentionBackend):
    """FlashAttention-2: `flash_attn_with_kvcache` for decode rows, `flash_attn_varlen_func` for prefill rows.

    Decode rows are split by the width of the block tables, not by their lengths, so graphs may hold them. A graph with
    prefill rows would launch programs for the longest possible row in place of each.

    Args:
        module: where the functions are.
    """

    name = "flash_attn"
    capturable = True

    def __init__(self, module: ModuleType):
        self._with_kvcache, self._varlen = module.flash_attn_with_kvcache, module.flash_attn_varlen_func

    def prepare(self, ctx: Context) -> None:
        tables, d = ctx.block_tables.index_select(0, ctx.slots), ctx.num_decode  # on the device: a graph replays it
        decode, prefill = {"block_table": tables[:d], "cache_seqlens": ctx.context_lens[:d]}, None
        if ctx.cu_seqlens_q is not None:
            prefill = {
                "block_table": tables[d:],
                "cu_seqlens_q": ctx.cu_seqlens_q - d,
                "cu_seqlens_k": torch.nn.functional.pad(ctx.context_lens[d:].cumsum(0), (1, 0)).int(),
                "max_seqlen_q": ctx.max_seqlen_q,
                "max_seqlen_k": ctx.max_context_len,
            }
        ctx.meta = decode, prefill

    def decode(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        options = {"softmax_scale": scale, "causal": True, **ctx.meta[0]}
        out.copy_(self._with_kvcache(q[:, None], kv.k_cache, kv.v_cache, **options)[:, 0])

    def prefill(self, q: Tensor, kv: PagedKV, scale: float, ctx: Context, out: Tensor) -> None:
        out.copy_(self._varlen(q, kv.k_cache, kv.v_cache, softmax_scale=scale, causal=True, **ctx.meta[1]))
