import itertools

import numpy as np
import pytest
import torch

from nanovllm.ops.attention import shared_prefix
from nanovllm.ops.attention.decode_attention import decode_attention_triton
from nanovllm.ops.attention.decode_plan import SplitPolicy
from nanovllm.ops.attention.fp8_cache import quantize_kv
from nanovllm.ops.attention.paged_cache import PagedKV, PagedRows
from nanovllm.ops.attention.reference import decode_attention_torch, plan_decode_torch, shared_attention_torch
from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan, plan_shared_prefixes, shared_attention_triton
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import DEVICE, DTYPES, FP8_DTYPES, assert_close

NONE = 999


def tables_of(*sequences, width=12):
    tables = np.full((len(sequences), width), NONE, dtype=np.int32)
    for table, blocks in zip(tables, sequences, strict=True):
        table[: len(blocks)] = blocks
    return tables


def plan_of(tables, size=None, sms=132):
    packed = plan_shared_prefixes(tables, list(range(len(tables))), NONE, 64, 2, 2, sms, size or len(tables))
    return None if packed is None else SharedPrefixPlan.split(packed, size or len(tables))


def test_long_common_prefixes_are_counted_whole(monkeypatch):
    """Tables are compared in parts of 64, 128, ... blocks. Slots may be in any order."""
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 1000)
    lengths = (64, 130, 200, 200, 63)
    sequences = [list(range(max(lengths))) for _ in range(2 * len(lengths) + 1)]
    for i, length in enumerate(lengths):  # of the blocks that pairs share
        sequences[2 * i + 1] = [*range(length), *range(1000 * (i + 1), 1000 * (i + 1) + 200 - length)]
        sequences[2 * i] = sequences[2 * i][: length + i]
    tables = tables_of(*sequences, width=300)
    order = list(reversed(range(len(tables))))
    shared = shared_prefix._num_shared_blocks(tables, order, NONE)
    want = []
    for a, b in itertools.pairwise(order):
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(sequences[a], sequences[b], strict=False))
        want.append(len(list(pairs)))
    assert shared.tolist() == want
    assert {63, 64, 130, 200} <= set(want)


def test_neighbors_with_a_common_prefix_are_grouped(monkeypatch):
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 1000)
    first = [[1, 2, 3, 4, 5, 6, 7, 100 + i] for i in range(5)]
    second = [[1, 2, 20, 21, 22, 23, 24, 25, 110 + i] for i in range(40)]
    plan = plan_of(tables_of([50], *first, *second, [1, 60], [61]), size=64)
    groups = plan.groups[plan.groups[:, 1] > 0].tolist()
    # 7 shared blocks are 448 tokens, 384 of them in whole steps; a group holds at most 32 sequences of 2 heads.
    assert [group[:3] for group in groups] == [[1, 5, 384], [6, 32, 512], [38, 8, 512]]
    assert plan.sequences[0].tolist() == [0, 0] and not plan.sequences[46:].any()
    for first, count, tokens, splits in groups:
        assert (plan.sequences[first : first + count] == (tokens, splits)).all()
        assert 1 <= splits <= tokens // shared_prefix.STEP


def test_short_common_prefixes_are_not_planned():
    assert plan_of(tables_of([1, 2, 3], [1, 2, 3])) is None
    assert plan_of(tables_of(*[[1, 2, 3, 10 + i] for i in range(200)])) is None  # 128 tokens only
    assert plan_of(tables_of(*[[] for _ in range(200)])) is None  # empty entries are not shared
    assert plan_of(tables_of(*[[1, 2, 3, 4, 10 + i] for i in range(200)])) is not None


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("dtype", "fp8"), [*((x, False) for x in DTYPES), *((x, True) for x in FP8_DTYPES)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 128)])
@pytest.mark.parametrize(("sms", "num_splits"), [(1, 1), (132, 7)])
def test_prefix_and_own_attention_equal_the_references(
    monkeypatch, heads, kv_heads, head_dim, sms, num_splits, dtype, fp8
):
    """One batch has two groups, a sequence outside them, and padding. Splits are planned as if nothing were shared."""
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 1000)
    generator = torch.Generator().manual_seed(0)
    first = [[0, 1, 2, 3, 10 + i] for i in range(5)]
    second = [[4, 5, 6, 7, 8, 9, 20 + i, 30 + i] for i in range(4)]
    tables = tables_of([40, 41], *first, *second, [])
    slots = list(range(len(tables)))
    contexts = [100, 257, 258, 300, 319, 320, 385, 449, 500, 511, 1]
    packed = plan_shared_prefixes(tables, slots, NONE, 64, heads // kv_heads, kv_heads, sms, len(tables))
    plan = SharedPrefixPlan.split(torch.from_numpy(packed).to(DEVICE), len(tables))
    assert (plan.groups[:, 1] > 0).sum() == 2
    caches = torch.randn(2, 50, 64, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    kv = PagedKV(*caches)
    if fp8:
        quantized, scales = quantize_kv(caches)
        kv = PagedKV(*quantized, 0, scales.permute(1, 3, 2, 0).contiguous())
    q = torch.randn(len(tables), heads, head_dim, generator=generator).to(DEVICE, dtype)
    slots = torch.randperm(len(tables), generator=generator).int().to(DEVICE)
    block_tables = torch.empty(tables.shape, dtype=torch.int32, device=DEVICE)
    block_tables[slots.long()] = torch.from_numpy(np.where(tables == NONE, 49, tables)).int().to(DEVICE)
    context_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    inputs = (q, kv, PagedRows(block_tables, slots, context_lens))
    own = plan_decode_torch(context_lens, kv_heads, SplitPolicy(200, 0, num_splits, min_tokens=16))
    assert own.items[:, 2].max() == num_splits
    prefix = shared_attention_triton(*inputs, 0.1, plan, num_splits)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    close = {"atol": tolerance, "rtol": tolerance}
    want, want_lse = shared_attention_torch(*inputs, plan.sequences[:, 0], 0.1)
    for i, (tokens, count) in enumerate(plan.sequences.tolist()):
        if tokens:  # the partial results, merged, are the attention over the prefix
            lse = prefix.lse[i, :, :count]
            weights = (lse - lse.max(1, keepdim=True).values).exp2()
            merged = (prefix.partial[i, :, :count] * weights[:, :, None]).sum(1) / weights.sum(1)[:, None]
            torch.testing.assert_close(merged, want[i], **close)
            torch.testing.assert_close(lse.max(1).values + weights.sum(1).log2(), want_lse[i], **close)
    got = decode_attention_triton(*inputs, 0.1, plan=own, prefix=prefix)
    assert_close(got, decode_attention_torch(*inputs, 0.1))
