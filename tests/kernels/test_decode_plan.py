from itertools import pairwise

import pytest
import torch

from nanovllm.ops.attention.decode_plan import (
    MAX_SPLITS,
    SplitPolicy,
    default_split_policy,
    plan_decode_torch,
    plan_decode_triton,
)
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import DEVICE

PLANS = [
    ([700] * 3, 2, SplitPolicy(4, 3, 8, 16)),
    ([5], 1, SplitPolicy(7, 3, 4, 16)),
    ([1, 8000, 500, 500, 8000] + [300] * 300, 8, default_split_policy(305, 8, 132)),
    ([90, 1, 1, 1, 2500, 2501], 3, SplitPolicy(10, 3, 128, 16)),
    ([1500] * 8, 4, default_split_policy(8, 4, 132)),
    ([1_000_000] * 600, 4, default_split_policy(600, 4, 132)),  # more tokens and heads than 32 bits count
    ([100_000] + [16] * 20, 8, default_split_policy(21, 8, 132)),
]


@pytest.mark.parametrize(("contexts", "kv_heads", "shares"), PLANS)
def test_a_plan_has_every_part_once_the_longest_first(contexts, kv_heads, shares):
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    plan, num_splits = plan_decode_torch(lens, kv_heads, shares)
    assert num_splits == shares.num_splits
    count = len([row for row, *_ in plan.tolist() if row >= 0])
    items = plan[:count].tolist()
    assert all(row >= 0 for row, *_ in items)  # what is left comes last
    parts = {row: of for row, _, of in items}
    assert sorted(items) == [[row, part, parts[row]] for row in range(len(contexts)) for part in range(parts[row])]
    sizes = [contexts[row] / of for row, _, of in items]
    assert all(after <= before + 1 for before, after in pairwise(sizes))
    share = max(shares.min_part, -(-sum(contexts) * kv_heads // shares.programs))
    whole = shares.whole / 2 * sum(contexts) * kv_heads / shares.programs
    for row, n in enumerate(contexts):
        assert abs(parts[row] - (1 if n <= whole else min(max(n / share, 1), num_splits))) <= 0.5
    if HAVE_TRITON:
        got, _ = plan_decode_triton(lens, kv_heads, shares)
        assert got.dtype == plan.dtype and torch.equal(got[:count], plan[:count]) and torch.equal(got[:, 0], plan[:, 0])


def test_work_is_shared_by_as_many_programs_as_run_at_once():
    """Rows of one length: as many parts as multiprocessors, or whole rows; and a long row among short ones."""

    def parts(contexts, kv_heads):
        lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
        return (
            plan_decode_torch(lens, kv_heads, default_split_policy(len(contexts), kv_heads, 132))
            .items[:, 2]
            .max()
            .item()
        )

    assert [parts([4000] * batch, 8) for batch in (1, 2, 4, 8, 16, 17, 512)] == [16, 8, 4, 2, 1, 1, 1]
    assert parts([300] * 8, 8) == 1
    assert [parts([8000] + [500] * batch, 8) for batch in (15, 30, 300)] == [8, 8, 2]


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("num_splits", [0, 129])
def test_a_number_of_parts_out_of_range_is_named(num_splits):
    lens = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=f"num_splits={num_splits} must be between 1 and 128"):
        plan_decode_triton(lens, 1, SplitPolicy(7, 3, num_splits))


def test_many_rows_are_split_into_few_parts():
    splits = [default_split_policy(batch, 8, 132).num_splits for batch in (1, 16, 17, 132, 512)]
    assert splits == [17, 8, 8, 4, 4]
    assert default_split_policy(1, 1, 132).num_splits == MAX_SPLITS and default_split_policy(4, 8, 1).num_splits == 1
