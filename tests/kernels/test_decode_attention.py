import pytest
import torch

from nanovllm.ops.attention.decode_attention import decode_attention_triton
from nanovllm.ops.attention.decode_plan import MAX_SPLITS, DecodeConfig, SplitPolicy, default_decode_config
from nanovllm.ops.attention.paged_cache import PagedKV
from nanovllm.ops.attention.reference import decode_attention_torch, plan_decode_torch
from nanovllm.ops.float8 import FP8
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import (
    DEVICE,
    DTYPES,
    FP8_DTYPES,
    assert_close,
    assert_same,
    make_paged,
    plain_attention,
)

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")


def check(
    attend,
    contexts,
    heads,
    kv_heads,
    head_dim,
    block_size,
    dtype=torch.float32,
    num_padding=0,
    window=0,
    fp8=False,
    **options,
):
    """Assert that `attend` equals the formula and changes no input."""
    layout = {"num_padding": num_padding, "window": window, "fp8": fp8}
    paged = make_paged(contexts, kv_heads, head_dim, block_size, dtype, **layout)
    q = torch.randn(len(contexts), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    inputs = [q, *paged.tensors]
    before = [x.clone() for x in inputs]
    scale = head_dim**-0.5
    out = attend(q, paged.kv, paged.rows, scale, **options)
    assert_same(inputs, before)
    assert out.shape == q.shape and out.dtype == dtype and out.isfinite().all()
    sequences = zip(q, paged.keys, paged.values, strict=True)
    expected = torch.cat([plain_attention(query[None], k, v, scale, window) for query, k, v in sequences])
    real = len(contexts) - num_padding
    assert_close(out[:real], expected[:real])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (10, 2), (8, 1)])
@pytest.mark.parametrize("contexts", [[1], [33, 33], [1, 16, 17, 130]])
@pytest.mark.parametrize("fp8", [False, True])
def test_reference_equals_the_formula(contexts, heads, kv_heads, fp8):
    check(decode_attention_torch, contexts, heads, kv_heads, 64, 16, fp8=fp8)


WINDOWS = [1, 15, 16, 17, 40, 64, 129, 131, 500]


@pytest.mark.parametrize("window", WINDOWS)
def test_reference_reads_only_what_the_window_shows(window):
    check(decode_attention_torch, [1, 16, 17, 130, 400], 4, 2, 64, 16, window=window)


@needs_triton
@pytest.mark.parametrize("window", [1, 16, 17, 129, 500])
@pytest.mark.parametrize(("tile", "num_splits"), [(16, 8), (64, 1)])
def test_triton_reads_only_what_the_window_shows(window, tile, num_splits):
    contexts = [1, 17, 130, 270]
    plan = split([min(context, window) for context in contexts], 2, num_splits, programs=500, tile=tile)
    check(decode_attention_triton, contexts, 4, 2, 64, 16, window=window, plan=plan)


def test_reference_accepts_padding_and_an_empty_batch():
    check(decode_attention_torch, [50, 1, 1], 4, 2, 64, 16, num_padding=2)
    paged = make_paged([3], 1, 64, 16)
    empty = torch.empty(0, 2, 64, device=DEVICE)
    assert decode_attention_torch(empty, paged.kv, paged.rows[:0], 1.0).shape == (0, 2, 64)


def split(contexts, kv_heads, num_splits, programs=64, tile=None):
    """Return a plan with splits of few tokens, and of a given tile."""
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    plan = plan_decode_torch(lens, kv_heads, SplitPolicy(programs, 0, num_splits, min_tokens=16))
    return plan._replace(config=DecodeConfig(tile, 4, 3) if tile else None)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "tile"),
    [
        (2, 2, 64, 16, 16),  # a block is a tile
        (9, 3, 64, 16, 32),  # a tile is two blocks
        (6, 2, 96, 64, 32),  # two tiles in a block, padded head
        (5, 1, 128, 64, 64),
        (16, 2, 128, 16, 64),
        (4, 2, 256, 64, 32),
        (20, 1, 64, 64, 16),  # more query heads than the smallest tile
    ],
)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_triton_equals_the_formula(heads, kv_heads, head_dim, block_size, tile, num_splits, dtype):
    contexts = [1, 47, 130]
    plan = split(contexts, kv_heads, num_splits, tile=tile)
    assert plan.items[:, 2].max() == num_splits
    check(decode_attention_triton, contexts, heads, kv_heads, head_dim, block_size, dtype, plan=plan)


@needs_triton
@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "tile", "window"),
    [(9, 3, 64, 16, 32, 0), (6, 2, 96, 64, 32, 40), (8, 1, 128, 64, 64, 0), (4, 2, 256, 16, 16, 17)],
)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_triton_dequantizes_keys_and_values_in_fp8(
    heads, kv_heads, head_dim, block_size, tile, window, num_splits, dtype
):
    contexts = [1, 47, 130]
    plan = split([min(context, window or context) for context in contexts], kv_heads, num_splits, tile=tile)
    options = {"window": window, "plan": plan, "fp8": True}
    check(decode_attention_triton, contexts, heads, kv_heads, head_dim, block_size, dtype, **options)


@needs_triton
@pytest.mark.parametrize("dtype", FP8_DTYPES[1:])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "tile", "window"),
    [
        (8, 2, 128, 64, None, 0),  # two tiles in a block, two warps
        (2, 2, 128, 16, 64, 0),  # a tile is four blocks, four warps
        (12, 1, 128, 16, 32, 40),  # more heads than the smallest operand has; the window hides whole warps
        (4, 2, 256, 64, None, 0),
        (4, 1, 256, 16, 16, 17),  # one warp
    ],
)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_triton_attends_to_words_of_fp8(heads, kv_heads, head_dim, block_size, tile, window, num_splits, dtype):
    contexts = [1, 17, 47, 130]
    plan = split([min(context, window or context) for context in contexts], kv_heads, num_splits, tile=tile)
    options = {"window": window, "plan": plan, "fp8": True}
    check(decode_attention_triton, contexts, heads, kv_heads, head_dim, block_size, dtype, **options)


@needs_triton
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("num_splits", [2, 8, 32, MAX_SPLITS])
def test_sequences_use_only_as_many_splits_as_they_fill(num_splits, tile):
    contexts = [1, 16, 17, 100, 257]  # one split to more than one merge iteration holds; less than a tile
    plan = split(contexts, 1, num_splits, programs=500, tile=tile)
    check(decode_attention_triton, contexts, 2, 1, 64, 16, plan=plan)


@needs_triton
def test_counters_are_zero_after_each_launch():
    counters, contexts = torch.zeros(64, dtype=torch.int32, device=DEVICE), [1, 17, 100]
    plan = split(contexts, 2, 8, tile=16)
    for _ in range(2):
        check(decode_attention_triton, contexts, 4, 2, 64, 16, counters=counters, plan=plan)
        assert not counters.any()


@needs_triton
def test_padding_does_not_change_other_sequences():
    contexts = [40, 90, 1, 1, 1]
    check(decode_attention_triton, contexts, 4, 2, 64, 16, num_padding=3, plan=split(contexts, 2, 4, tile=64))


@needs_triton
def test_strided_queries_are_accepted():
    paged = make_paged([20, 30], 2, 64, 16)
    fused = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    q = fused[:, :, 1]
    args = (paged.kv, paged.rows, 0.1)
    got = decode_attention_triton(q, *args, plan=split([20, 30], 2, 1))
    assert_close(got, decode_attention_torch(q.contiguous(), *args))


@needs_triton
@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (24, "tile=24 must be a power of two of at least 16"),
        (8, "tile=8 must be a power of two of at least 16"),
    ],
)
def test_bad_tiles_are_refused_by_name(tile, message):
    paged = make_paged([5], 1, 64, 16)
    q = torch.zeros(1, 1, 64, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        decode_attention_triton(q, paged.kv, paged.rows, 1.0, plan=split([5], 1, 1, tile=tile))


def test_heads_that_kv_heads_do_not_divide_are_refused():
    paged = make_paged([5], 2, 64, 16)
    q = torch.zeros(1, 3, 64, device=DEVICE)
    with pytest.raises(ValueError, match="KV heads must divide"):
        decode_attention_torch(q, paged.kv, paged.rows, 1.0)


@pytest.mark.parametrize(
    ("k_cache", "v_cache", "message"),
    [
        (torch.zeros(2, 16, 1, 64), torch.zeros(3, 16, 1, 64), "must be contiguous and of one shape"),
        (torch.zeros(2, 16, 1, 64), torch.zeros(2, 16, 64, 2)[..., :1].mT, "must be contiguous and of one shape"),
        (torch.zeros(2, 48, 1, 64), torch.zeros(2, 48, 1, 64), "block_size=48 must be a power of two"),
        (torch.zeros(2, 16, 1, 64).to(FP8), torch.zeros(2, 16, 1, 64).to(FP8), "caches in FP8 need scales"),
    ],
)
def test_caches_that_kernels_cannot_read_are_refused(k_cache, v_cache, message):
    with pytest.raises(ValueError, match=message):
        PagedKV(k_cache, v_cache)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (FP8, torch.zeros(2, 1, 16, 2)),
        (FP8, torch.zeros(2, 16, 1, 2).half()),
        (torch.float32, torch.zeros(2, 1, 16, 2).half()),
    ],
)
def test_scales_that_do_not_fit_the_caches_are_refused(dtype, scales):
    cache = torch.zeros(2, 16, 1, 64).to(dtype)
    with pytest.raises(ValueError, match=r"scales \(2, .*, 2\) of .* do not fit .* of shape \(2, 1, 16, 2\)"):
        PagedKV(cache, cache, 0, scales)


@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])  # RTX 4090, A100, H100
@pytest.mark.parametrize(
    ("head_dim", "itemsize"), [(64, 2), (96, 2), (128, 2), (256, 2), (64, 4), (128, 4), (256, 4), (128, 1), (256, 1)]
)
def test_default_tile_fits_shared_memory(head_dim, itemsize, shared_memory):
    for batch in (1, 60, 512):
        for prefix in (False, True):
            config = default_decode_config(batch, 8, head_dim, itemsize, 132, prefix, shared_memory)
            tile_bytes = 2 * config.tile * 2 ** (head_dim - 1).bit_length() * itemsize
            num_buffers = config.num_stages - (itemsize > 1)
            assert config.tile >= 16 and tile_bytes * num_buffers <= shared_memory - (16 << 10)
            assert tile_bytes * config.num_stages <= 200 << 10
