"""The fused kernel of norm, RoPE, cache write and decode attention equals the separate references."""

import pytest
import torch

from nanovllm.layers.rotary_embedding import rope_table
from nanovllm.ops.attention.fp8_cache import dequantize_kv
from nanovllm.ops.attention.reference import rope_decode_torch
from nanovllm.ops.attention.rope_decode import RopeDecodeConfig, default_rope_decode_config, rope_decode_triton
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import DEVICE, DTYPES, FP8_DTYPES, assert_same, make_paged

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")

# A tile is one block, two blocks, or half a block. Before the new token there are no tiles, whole tiles, or others.
CONFIGS = [
    (16, RopeDecodeConfig(16, 4, 2, 1)),
    (16, RopeDecodeConfig(32, 4, 2, 3)),
    (64, RopeDecodeConfig(32, 4, 2, 8)),
]
CONTEXTS = [1, 33, 34, 130]


def make_inputs(contexts, heads, kv_heads, head_dim, block_size, norm, dtype, norm_dtype=None, **layout):
    """Queries, keys and values are a part of wider rows."""
    paged = make_paged(contexts, kv_heads, head_dim, block_size, dtype, **layout)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    qkv = randn(len(contexts), (1 + heads + 2 * kv_heads) * head_dim)[:, head_dim:]
    table = rope_table(head_dim, 400, 10000.0).to(DEVICE)
    weights = [randn(head_dim).to(norm_dtype or dtype) if norm else None for _ in "qk"]
    query_scale = None if norm else torch.linspace(1, 3, 400).to(DEVICE)
    transform = QKTransform(heads, table, *weights, 1e-6, query_scale)
    return qkv, transform, paged


def run(attend, qkv, transform, paged, **options):
    """Return the result of `attend` and the caches as it leaves them."""
    kv = paged.copy_kv()
    out = attend(qkv, transform, kv, paged.rows, qkv.shape[1] ** -0.25, **options)
    return out, *kv_tensors(kv)


def kv_tensors(kv):
    """Return what a cache holds: keys and values, dequantized if they are in FP8."""
    if kv.scales is None:
        return kv.k_cache, kv.v_cache
    scales = kv.scales.transpose(1, 2)
    return dequantize_kv(kv.k_cache, scales[..., 0]), dequantize_kv(kv.v_cache, scales[..., 1])


def check(*sizes, config, num_padding=0, window=0, norm_dtype=None, fp8=False, **options):
    layout = {"num_padding": num_padding, "window": window, "fp8": fp8}
    qkv, transform, paged = make_inputs(*sizes, norm_dtype=norm_dtype, **layout)
    copy, batch = qkv.clone(), len(qkv) - num_padding
    got = run(rope_decode_triton, qkv, transform, paged, config=config, **options)
    want = run(rope_decode_torch, qkv, transform, paged)
    assert torch.equal(qkv, copy)
    assert got[0].shape == want[0].shape and got[0].dtype == qkv.dtype
    tolerance = 2e-5 if qkv.dtype == torch.float32 else 2e-2
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(got[0][:batch], want[0][:batch], **close)
    assert got[0].isfinite().all()
    scratch = paged.rows.block_tables[paged.rows.slots[batch:], 0].long()  # any padding sequence may write last
    for cache, expected, before in zip(got[1:], want[1:], kv_tensors(paged.kv), strict=True):
        cache[scratch] = expected[scratch] = before[scratch] = 0
        stored = {"atol": 1e-4, "rtol": 0.13} if fp8 else close  # the kernel's float32 may round to the next number
        torch.testing.assert_close(cache, expected, equal_nan=True, **stored)
        written = (expected != before) & ~(expected.isnan() & before.isnan())
        assert_same([cache.masked_fill(written, 0)], [before.masked_fill(written, 0)])  # nothing else changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 96), (8, 1, 128), (3, 3, 24)])
@pytest.mark.parametrize(("block_size", "config"), CONFIGS)
def test_triton_equals_the_reference(heads, kv_heads, head_dim, block_size, config, norm, dtype):
    check(CONTEXTS, heads, kv_heads, head_dim, block_size, norm, dtype, config=config)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "config", "window"),
    [
        (6, 2, 96, 16, RopeDecodeConfig(32, 4, 2, 3), 0),
        (8, 1, 128, 64, RopeDecodeConfig(32, 4, 2, 8), 40),
        (2, 1, 256, 16, RopeDecodeConfig(16, 4, 2, 1), 1),
    ],
)
def test_new_keys_and_values_are_quantized_before_they_are_attended(
    heads, kv_heads, head_dim, block_size, config, window, norm, dtype
):
    options = {"config": config, "window": window, "fp8": True}
    check(CONTEXTS, heads, kv_heads, head_dim, block_size, norm, dtype, **options)


def test_weights_of_norms_may_be_float32():
    check(CONTEXTS, 6, 2, 96, 16, True, torch.float16, config=CONFIGS[1][1], norm_dtype=torch.float32)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 129, 500])
@pytest.mark.parametrize(("tile", "num_splits"), [(16, 8), (64, 1)])
def test_triton_reads_only_what_the_window_shows(window, tile, num_splits):
    config = RopeDecodeConfig(tile, 4, 2, num_splits)
    check([1, 17, 33, 130, 270], 4, 2, 64, 16, True, torch.float32, window=window, config=config)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(20, 1, 64), (2, 1, 256)])
def test_wide_heads_and_large_groups_are_accepted(heads, kv_heads, head_dim):
    check([80, 3], heads, kv_heads, head_dim, 64, True, torch.float32, config=None)


@pytest.mark.parametrize("num_splits", [2, 40])
def test_many_splits_are_merged(num_splits):
    config = RopeDecodeConfig(16, 4, 2, num_splits)
    check([200, 1, 17, 177], 4, 2, 64, 16, True, torch.float32, config=config)


def test_padding_does_not_change_other_sequences():
    check([40, 90, 1, 1], 4, 2, 64, 16, True, torch.float32, num_padding=2, config=RopeDecodeConfig(16, 4, 2, 4))


def test_counters_are_zero_after_each_launch():
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    check(CONTEXTS, 4, 2, 64, 16, True, torch.float32, counters=counters, config=RopeDecodeConfig(16, 4, 2, 8))
    assert not counters.any()


def test_an_empty_batch_is_accepted_and_bad_heads_are_refused():
    qkv, transform, paged = make_inputs([5], 2, 2, 64, 16, True, torch.float32)
    assert rope_decode_torch(qkv, transform, paged.kv, paged.rows, 1.0).shape == (1, 2, 64)
    assert rope_decode_triton(qkv[:0], transform, paged.kv, paged.rows[:0], 1.0).shape == (0, 2, 64)
    with pytest.raises(ValueError, match="KV heads must divide"):
        rope_decode_triton(qkv, transform._replace(num_heads=3), paged.kv, paged.rows, 1.0)


def test_default_config_fills_the_device_and_fits_registers():
    splits = {batch: default_rope_decode_config(batch, 8, 128, 2, 132).num_splits for batch in (1, 2, 4)}
    assert splits == {1: 64, 2: 32, 4: 16}
    assert default_rope_decode_config(4, 8, 128, 2, 1).num_splits == 1
    for head_dim in (64, 96, 128, 256):
        for itemsize in (2, 4):
            config = default_rope_decode_config(1, 8, head_dim, itemsize, 132)
            assert config.tile >= 16 and 2 * config.tile * head_dim * itemsize <= 32 << 10
