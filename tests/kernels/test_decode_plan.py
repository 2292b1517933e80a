import math
from itertools import pairwise

import pytest
import torch

from nanovllm.ops.attention.decode_plan import MAX_SPLITS, SplitPolicy, default_split_policy, plan_decode_triton
from nanovllm.ops.attention.reference import plan_decode_torch
from nanovllm.ops.triton_utils import HAVE_TRITON
from tests.kernels.paged import DEVICE

PLANS = [
    ([700] * 3, 2, SplitPolicy(4, 3, 8, 16)),
    ([5], 1, SplitPolicy(7, 3, 4, 16)),
    ([1, 8000, 500, 500, 8000] + [300] * 300, 8, default_split_policy(305, 8, 132)),
    ([90, 1, 1, 1, 2500, 2501], 3, SplitPolicy(10, 3, 128, 16)),
    ([1500] * 8, 4, default_split_policy(8, 4, 132)),
    ([1_000_000] * 600, 4, default_split_policy(600, 4, 132)),  # tokens times heads exceed 32 bits
    ([100_000] + [16] * 20, 8, default_split_policy(21, 8, 132)),
]


@pytest.mark.parametrize(("contexts", "kv_heads", "policy"), PLANS)
def test_a_plan_has_every_split_once_and_the_longest_first(contexts, kv_heads, policy):
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    plan, num_splits, _ = plan_decode_torch(lens, kv_heads, policy)
    assert num_splits == policy.num_splits
    count = len([sequence for sequence, *_ in plan.tolist() if sequence >= 0])
    items = plan[:count].tolist()
    assert all(sequence >= 0 for sequence, *_ in items)  # unused items come last
    splits = {sequence: count for sequence, _, count in items}
    assert sorted(items) == [[i, split, splits[i]] for i in range(len(contexts)) for split in range(splits[i])]
    sizes = [contexts[sequence] / count for sequence, _, count in items]
    assert all(after <= before + 1 for before, after in pairwise(sizes))
    total = sum(contexts) * kv_heads
    share = max(policy.min_tokens, math.ceil(total / policy.programs))
    whole = policy.whole / 2 * total / policy.programs
    for i, n in enumerate(contexts):
        assert abs(splits[i] - (1 if n <= whole else min(max(n / share, 1), num_splits))) <= 0.5
    if HAVE_TRITON:
        got = plan_decode_triton(lens, kv_heads, policy).items
        assert got.dtype == plan.dtype and torch.equal(got[:count], plan[:count]) and torch.equal(got[:, 0], plan[:, 0])


def test_work_is_split_over_as_many_programs_as_run_at_once():
    """Equal lengths get as many splits as there are SMs, or none; a long sequence among short ones is split."""

    def most_splits(contexts, kv_heads):
        lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
        policy = default_split_policy(len(contexts), kv_heads, 132)
        return plan_decode_torch(lens, kv_heads, policy).items[:, 2].max().item()

    assert [most_splits([4000] * batch, 8) for batch in (1, 2, 4, 8, 16, 17, 512)] == [16, 8, 4, 2, 1, 1, 1]
    assert most_splits([300] * 8, 8) == 1
    assert [most_splits([8000] + [500] * batch, 8) for batch in (15, 30, 300)] == [8, 8, 2]


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("num_splits", [0, 129])
def test_num_splits_out_of_range_is_refused_by_name(num_splits):
    lens = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=f"num_splits={num_splits} must be between 1 and 128"):
        plan_decode_triton(lens, 1, SplitPolicy(7, 3, num_splits))


def test_large_batches_get_few_splits():
    splits = [default_split_policy(batch, 8, 132).num_splits for batch in (1, 16, 17, 132, 512)]
    assert splits == [17, 8, 8, 4, 4]
    assert default_split_policy(1, 1, 132).num_splits == MAX_SPLITS and default_split_policy(4, 8, 1).num_splits == 1
