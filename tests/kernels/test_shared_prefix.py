import numpy as np
import pytest
import torch

from nanovllm.ops.attention import shared_prefix
from nanovllm.ops.attention.decode_attention import decode_attention_torch, decode_attention_triton
from nanovllm.ops.attention.decode_plan import SplitPolicy, plan_decode_torch
from nanovllm.ops.attention.shared_prefix import SharedPrefixPlan, plan_shared_prefixes, shared_attention_triton
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import DEVICE, DTYPES, assert_close

NONE = 999


def tables_of(*rows, width=12):
    tables = np.full((len(rows), width), NONE, dtype=np.int32)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row)] = row
    return tables


def plan_of(tables, size=None, sms=132):
    packed = plan_shared_prefixes(tables, NONE, 64, 2, 2, sms, size or len(tables))
    return None if packed is None else SharedPrefixPlan.split(packed, size or len(tables))


def test_neighbours_with_a_common_beginning_are_grouped(monkeypatch):
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 1000)
    first = [[1, 2, 3, 4, 5, 6, 7, 100 + i] for i in range(5)]
    second = [[1, 2, 20, 21, 22, 23, 24, 25, 110 + i] for i in range(40)]
    plan = plan_of(tables_of([50], *first, *second, [1, 60], [61]), size=64)
    groups = plan.groups[plan.groups[:, 1] > 0].tolist()
    # 7 shared blocks are 448 tokens, of which 384 are whole steps; a group holds at most 32 rows of 2 heads
    assert [group[:3] for group in groups] == [[1, 5, 384], [6, 32, 512], [38, 8, 512]]
    assert plan.rows[0].tolist() == [0, 0] and not plan.rows[46:].any()
    for row, rows, tokens, parts in groups:
        assert (plan.rows[row : row + rows] == (tokens, parts)).all()
        assert 1 <= parts <= tokens // shared_prefix.STEP


def test_little_in_common_is_not_worth_it():
    assert plan_of(tables_of([1, 2, 3], [1, 2, 3])) is None
    assert plan_of(tables_of(*[[1, 2, 3, 10 + i] for i in range(200)])) is None  # 128 tokens only
    assert plan_of(tables_of(*[[] for _ in range(200)])) is None  # what is not owned is not shared
    assert plan_of(tables_of(*[[1, 2, 3, 4, 10 + i] for i in range(200)])) is not None


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 128)])
@pytest.mark.parametrize(("sms", "num_own"), [(1, 1), (132, 7)])
def test_shared_and_own_parts_are_the_whole(monkeypatch, heads, kv_heads, head_dim, sms, num_own, dtype):
    """Two groups and rows of their own, in one batch with a padding row; parts are planned as if none were shared."""
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", 1000)
    generator = torch.Generator().manual_seed(0)
    rows = (
        [[40, 41]] + [[0, 1, 2, 3, 10 + i] for i in range(5)] + [[4, 5, 6, 7, 8, 9, 20 + i, 30 + i] for i in range(4)]
    )
    tables = tables_of(*rows, [])
    contexts = [100, 257, 258, 300, 319, 320, 385, 449, 500, 511, 1]
    packed = plan_shared_prefixes(tables, NONE, 64, heads // kv_heads, kv_heads, sms, len(tables))
    plan = SharedPrefixPlan.split(torch.from_numpy(packed).to(DEVICE), len(tables))
    assert (plan.groups[:, 1] > 0).sum() == 2
    cache = torch.randn(2, 50, 64, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    q = torch.randn(len(tables), heads, head_dim, generator=generator).to(DEVICE, dtype)
    slots = torch.randperm(len(tables), generator=generator).int().to(DEVICE)
    block_tables = torch.empty(tables.shape, dtype=torch.int32, device=DEVICE)
    block_tables[slots.long()] = torch.from_numpy(np.where(tables == NONE, 49, tables)).int().to(DEVICE)
    context_lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    where = (q, *cache, block_tables, slots)
    own = plan_decode_torch(context_lens, kv_heads, SplitPolicy(200, 0, num_own, min_part=16))
    assert own.items[:, 2].max() == num_own
    parts = shared_attention_triton(*where, 0.1, plan, num_own)
    got = decode_attention_triton(*where, context_lens, 0.1, plan=own, shared=parts)
    assert_close(got, decode_attention_torch(*where, context_lens, 0.1))
