import pytest
import torch

from nanovllm.ops.attention import prefill_attention as prefill_attention_module
from nanovllm.ops.attention import reference
from nanovllm.ops.attention.paged_cache import PagedKV, PagedRows
from nanovllm.ops.attention.prefill_attention import (
    PrefillConfig,
    default_prefill_config,
    prefill_attention_triton,
    supports_tma,
)
from nanovllm.ops.attention.reference import prefill_attention_torch
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import DEVICE, DTYPES, FP8_DTYPES, assert_close, assert_same, make_paged, plain_attention

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")


def check(
    attend, sequences, heads, kv_heads, head_dim, block_size, dtype=torch.float32, window=0, fp8=False, **options
):
    """Assert that `attend` equals the formula for `sequences` of (queries, context) and changes no input."""
    lens, contexts = (list(column) for column in zip(*sequences, strict=True))
    paged = make_paged(contexts, kv_heads, head_dim, block_size, dtype, window=window, queries=lens, fp8=fp8)
    q = torch.randn(sum(lens), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).to(DEVICE, torch.int32)
    inputs = [q, cu_seqlens, *paged.tensors]
    before = [x.clone() for x in inputs]
    scale = head_dim**-0.5
    out = attend(q, paged.kv, paged.rows, cu_seqlens, scale, **options)
    assert_same(inputs, before)
    assert out.shape == q.shape and out.dtype == dtype
    parts = zip(q.split(lens), paged.keys, paged.values, strict=True)
    assert_close(out, torch.cat([plain_attention(queries, k, v, scale, window) for queries, k, v in parts]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (10, 2), (8, 1)])
@pytest.mark.parametrize("sequences", [[(1, 1)], [(40, 40)], [(3, 3), (1, 20), (17, 50), (0, 7)]])
@pytest.mark.parametrize("fp8", [False, True])
def test_reference_equals_the_formula(sequences, heads, kv_heads, fp8):
    check(prefill_attention_torch, sequences, heads, kv_heads, 64, 16, fp8=fp8)


WINDOWS = [1, 15, 16, 17, 64, 100, 129, 500]
WINDOWED = [(40, 40), (70, 70), (3, 200), (33, 270), (0, 7), (1, 130)]


@pytest.mark.parametrize("window", WINDOWS)
def test_reference_reads_only_what_the_window_shows(window):
    check(prefill_attention_torch, WINDOWED, 4, 2, 64, 16, window=window)


@pytest.mark.parametrize("window", [0, 1, 7, 40, 500])
def test_reference_attends_a_few_queries_at_a_time_where_it_needs_a_mask(window, monkeypatch):
    monkeypatch.setattr(reference, "_MASKED_QUERIES", 16)
    check(prefill_attention_torch, WINDOWED, 4, 2, 64, 16, window=window)
    paged = make_paged([200, 270], 2, 64, 16, torch.float32, window=window, queries=[90, 200])
    plans = reference.plan_prefill_gather(paged.rows, torch.tensor([0, 90, 290]), paged.kv, torch.float32)
    assert [plan.mask.shape[0] for plan in plans] == [16] * 5 + [10] + [16] * 12 + [8]
    if DEVICE.type == "cpu":  # plans with as many queries share a mask
        assert len({plan.mask.untyped_storage().data_ptr() for plan in plans}) == 3


@needs_triton
@pytest.mark.parametrize("window", [1, 16, 17, 129, 500])
@pytest.mark.parametrize(("block_m", "block_n", "tma"), [(64, 16, False), (64, 64, True)])
def test_triton_reads_only_what_the_window_shows(window, block_m, block_n, tma):
    config = PrefillConfig(block_m, block_n, 4, 2, tma=tma)
    check(prefill_attention_triton, WINDOWED, 4, 2, 64, 64 if tma else 16, window=window, config=config)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(2, 2, 64, 16), (9, 3, 64, 64), (5, 1, 96, 16), (14, 2, 64, 16), (8, 1, 128, 64), (4, 2, 256, 16)],
)
def test_triton_equals_the_formula(heads, kv_heads, head_dim, block_size, dtype):
    # Without a cached prefix, the shortest, with a cached prefix, like decode.
    sequences = [(75, 75), (1, 1), (30, 101), (1, 64)]
    check(prefill_attention_triton, sequences, heads, kv_heads, head_dim, block_size, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "window", "config"),
    [
        (9, 3, 64, 64, 0, PrefillConfig(64, 32, 4, 2, tma=True)),
        (4, 2, 64, 64, 17, PrefillConfig(64, 64, 4, 2, tma=True)),
        (5, 1, 96, 16, 0, PrefillConfig(64, 16, 4, 2)),
        (4, 1, 128, 16, 17, PrefillConfig(32, 32, 4, 2)),
        (4, 2, 256, 64, 0, None),
    ],
)
def test_triton_dequantizes_keys_and_values_in_fp8(heads, kv_heads, head_dim, block_size, window, config, dtype):
    sequences = [(75, 75), (1, 1), (30, 101), (0, 7), (1, 64)]
    options = {"window": window, "config": config, "fp8": True}
    check(prefill_attention_triton, sequences, heads, kv_heads, head_dim, block_size, dtype, **options)


@needs_triton
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_tiles_may_have_any_shape(block_m, block_n, block_size):
    sequences = [(16, 16), (33, 97), (5, 70)]
    check(prefill_attention_triton, sequences, 6, 2, 64, block_size, config=PrefillConfig(block_m, block_n, 4, 2))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (128, 16)])
@pytest.mark.parametrize("block_size", [64, 32, 128])
def test_tma_tiles_do_not_read_past_the_context(block_m, block_n, block_size, dtype):
    """The last tile of a sequence is moved back, into the tile before it or to before its block."""
    sequences = [(70, 70), (1, 1), (0, 7), (33, 65), (64, 128), (5, 131)]
    config = PrefillConfig(block_m, block_n, 4, 2, tma=True)
    check(prefill_attention_triton, sequences, 6, 2, 64, block_size, dtype, config=config)


def test_default_tiles_are_large_for_many_queries():
    small, large = (default_prefill_config(128, 2, n * 16, sm_count=132) for n in (2048, 16384))
    assert (small.block_m, small.tma, large.block_m, large.tma) == (64, False, 128, True)
    assert not default_prefill_config(128, 4, 1 << 20).tma and not default_prefill_config(64, 2, 1 << 20).tma


@needs_triton
def test_tma_needs_whole_tiles_and_aligned_caches():
    def supported(block_size, head_dim, block_n):
        return supports_tma(PagedKV(*torch.empty(2, 2, block_size, 1, head_dim)), block_n)

    assert supported(64, 128, 64) and supported(64, 128, 16) and supported(256, 64, 128)
    assert not supported(16, 128, 64) and not supported(64, 96, 64)
    aligned, unaligned = torch.empty(2, 64, 1, 64), torch.empty(2 * 64 * 64 + 1)[1:].view(2, 64, 1, 64)
    for caches in ((aligned, unaligned), (unaligned, aligned)):  # TMA needs 16 bytes
        assert not supports_tma(PagedKV(*caches), 64)


@needs_triton
@pytest.mark.parametrize(("block_size", "block_m"), [(64, 128), (32, 64)])
def test_tiles_are_small_without_tma(block_size, block_m, monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: chosen.append(options)

    chosen = []
    monkeypatch.setattr(prefill_attention_module, "_prefill_kernel", Kernel())
    q, cache = torch.zeros(99, 8, 128, dtype=torch.bfloat16), torch.zeros(4, block_size, 2, 128, dtype=torch.bfloat16)
    one, ends = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    rows = PagedRows(torch.zeros(1, 4, dtype=torch.int32), one, one)
    prefill_attention_triton(q, PagedKV(cache, cache), rows, ends, 0.1)
    (options,) = chosen
    assert (options["BLOCK_M"], options["TMA"]) == (block_m, block_m == 128)
    assert (options["maxnreg"] is None) == (block_m == 64)


@needs_triton
def test_many_short_and_empty_sequences():
    sequences = [(n % 4, 2 + n) for n in range(23)]  # every fourth has no queries, as in a captured grid
    check(prefill_attention_triton, sequences, 4, 2, 64, 16, config=PrefillConfig(16, 16, 4, 2))


@needs_triton
@pytest.mark.parametrize("limit", [1, 5])
def test_more_tiles_than_a_grid_has_in_one_dimension(limit, monkeypatch):
    monkeypatch.setattr(prefill_attention_module, "_MAX_GRID", limit)
    sequences = [(75, 75), (1, 1), (30, 101), (0, 7)]
    check(prefill_attention_triton, sequences, 4, 2, 64, 16, config=PrefillConfig(16, 16, 4, 2))


@needs_triton
def test_slices_of_a_mixed_step_are_accepted():
    """Prefill after decode in one batch: metadata and queries start at any offset, and queries are strided."""
    paged = make_paged([9, 40, 25], 2, 64, 16)
    q = torch.randn(31, 4, 2, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)[1:, :, 1]
    cu_seqlens = torch.tensor([0, 20, 30], dtype=torch.int32, device=DEVICE)
    args = (paged.kv, paged.rows[1:], cu_seqlens, 0.1)
    assert_close(prefill_attention_triton(q, *args), prefill_attention_torch(q.contiguous(), *args))


@needs_triton
@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((96, 64), "block_m=96 must be a power of two of at least 20"),
        ((16, 64), "block_m=16 must be a power of two of at least 20"),
        ((64, 8), "block_n=8 must be a power of two of at least 16"),
    ],
)
def test_bad_tiles_are_refused_by_name(tile, message):
    paged = make_paged([5], 1, 64, 16)
    q = torch.zeros(5, 20, 64, device=DEVICE)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        prefill_attention_triton(q, paged.kv, paged.rows, cu_seqlens, 1.0, config=PrefillConfig(*tile, 4, 2))


def test_reference_accepts_no_tokens_and_refuses_bad_heads():
    paged = make_paged([5], 2, 64, 16)
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    args = (paged.kv, paged.rows, cu_seqlens, 1.0)
    assert prefill_attention_torch(torch.empty(0, 4, 64, device=DEVICE), *args).shape == (0, 4, 64)
    with pytest.raises(ValueError, match="KV heads must divide"):
        prefill_attention_torch(torch.empty(0, 3, 64, device=DEVICE), *args)
