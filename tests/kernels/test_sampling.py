"""Sampling: the Triton kernels equal the reference, and both follow the theory."""

import pytest
import torch

from nanovllm.ops.sampling import reference, sampling
from nanovllm.ops.sampling.logprobs import process_logits
from nanovllm.ops.sampling.reference import adjust_logits, advance_slots_torch, sample_torch
from nanovllm.ops.sampling.sampling import advance_slots_triton, sample_triton
from nanovllm.ops.sampling.state import (
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    PROCESSED_LOGPROBS,
    TILE,
    SamplingState,
    default_params,
)


def state_of(device, batch, stop_ids=(), vocab_size=1, **columns):
    """Make a state with one slot per sequence and a scratch slot; `columns` override the defaults."""
    table = default_params(batch + 1)
    for name, values in {"temperature": 1.0, **columns}.items():
        table[name][:batch] = values
    for i, ids in enumerate(stop_ids):
        table["stop_ids"][i, : len(ids)] = ids
    return SamplingState(table, vocab_size, device)


def sample_all(run, logits, state, context_lens=None):
    batch = len(logits)
    slots = torch.arange(batch, dtype=torch.int32, device=logits.device)
    if context_lens is None:
        context_lens = torch.full((batch,), 5, dtype=torch.int32, device=logits.device)
    return run(logits, slots, context_lens, state)


def set_tile(monkeypatch, tile):
    for module in (sampling, reference):
        monkeypatch.setattr(module, "TILE", tile)


@pytest.fixture(params=["torch", "triton"])
def run(request, device):
    if request.param == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is slow; there, the tests against the reference are enough")
    return sample_triton if request.param == "triton" else sample_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "tile"), [(11, TILE), (4099, TILE), (150, 64)])
def test_triton_equals_the_reference(device, vocab_size, tile, dtype, monkeypatch):
    set_tile(monkeypatch, tile)
    batch = 12
    logits = torch.randn((batch, vocab_size), generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    state = state_of(
        device,
        batch,
        temperature=[0, 1, 0.5, 2, 1, 1, 0.7, 1, 0, 1, 1, 1],
        top_k=[0, 0, 3, 0, 0, 7, 1, vocab_size + 9, 5, 0, 2, 0],
        top_p=[1, 1, 1, 0.5, 1, 0.9, 1, 0.01, 1, 1, 0.3, 1],
        min_p=[0, 0, 0, 0, 0.2, 0, 0, 0, 0, 1, 0, 0],
        seed=[2**62 + i for i in range(batch)],
        min_length=[0] * 10 + [9, 9],
        stop_ids=[[]] * 10 + [[0, 1, 2], list(range(8))],
    )
    got, want = sample_all(sample_triton, logits, state), sample_all(sample_torch, logits, state)
    assert got.dtype == torch.int64 and got.tolist() == want.tolist()


@pytest.mark.parametrize(("vocab_size", "tile"), [(40, TILE), (4099, TILE), (150, 64)])
def test_triton_equals_the_reference_with_bias_penalties_and_masks(device, vocab_size, tile, monkeypatch):
    set_tile(monkeypatch, tile)
    batch = 10
    generator = torch.Generator(device).manual_seed(3)
    logits = torch.randn((batch, vocab_size), generator=generator, device=device) * 3
    flags = [
        0,
        HAS_PENALTIES,
        HAS_MASK,
        HAS_BIAS,
        HAS_PENALTIES | HAS_MASK | HAS_BIAS,
        PROCESSED_LOGPROBS,
        0,
        HAS_PENALTIES,
        HAS_PENALTIES | HAS_MASK,
        HAS_BIAS,
    ]
    state = state_of(
        device,
        batch,
        vocab_size=vocab_size,
        temperature=[0, 0, 0, 0, 0, 1, 0.7, 1, 1, 1],
        top_k=[0] * 7 + [5, 0, 3],
        top_p=[1] * 8 + [0.7, 1],
        seed=range(batch),
        flags=flags,
        repetition=1.7,
        presence=0.5,
        frequency=[0.25 * i for i in range(batch)],
        num_bias=4,
        min_length=[0] * 6 + [9] * 4,
        stop_ids=[[1, 2]] * batch,
    )
    state.counts.copy_(torch.randint(0, 8, state.counts.shape, generator=generator, device=device))
    state.masks.copy_(torch.randint(-(2**31), 2**31, state.masks.shape, generator=generator, device=device))
    state.bias[:, :4, 0] = torch.tensor([0, 7, 31, 39], device=device)
    state.bias[:, :4, 1] = torch.tensor([4.0, -5.0, 6.0, 3.0], device=device).view(torch.int32)
    got, want = sample_all(sample_triton, logits, state), sample_all(sample_torch, logits, state)
    assert got.tolist() == want.tolist()
    plain = logits.argmax(1).tolist()
    assert got[0] == plain[0] and got[:5].tolist() != plain[:5]


def test_bias_penalties_and_masks_match_hand_computed_values(device, run):
    state = state_of(
        device, 1, vocab_size=6, temperature=0.0, flags=HAS_PENALTIES, repetition=2, presence=1, frequency=0.5
    )
    # In the prompt; nowhere; once in the output; in the prompt and three times in the output.
    state.counts[0] = torch.tensor([1, 0, 2, 7, 0, 0])
    logits = torch.tensor([[4.0, 1.0, 8.0, -1.0, 0.5, 2.5]], device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    assert adjust_logits(logits, slots, state).tolist() == [[2.0, 1.0, 2.5, -4.5, 0.5, 2.5]]
    assert sample_all(run, logits, state).tolist() == [2]
    state.flags[0] = HAS_MASK
    state.masks[0] = 0b010011
    assert sample_all(run, logits, state).tolist() == [0]
    state.flags[0], state.num_bias[0] = HAS_BIAS, 1
    state.bias[0, 0] = torch.tensor([4, int(torch.tensor(7.75).view(torch.int32))])
    assert sample_all(run, logits, state).tolist() == [4]


def test_samples_follow_the_softmax(device, run):
    """Chi-square of 4,000 samples at fixed seeds; the 99.9% bound for 7 degrees of freedom is 24.3."""
    batch = 4000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.1, -0.3, 1.5], device=device)
    state = state_of(device, batch, temperature=0.8, seed=range(batch))
    counts = sample_all(run, logits.expand(batch, -1).contiguous(), state).bincount(minlength=8).double()
    expected = (logits / 0.8).softmax(-1).double() * batch
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


@pytest.mark.parametrize("top_k", [0, 30])
def test_samples_of_many_tiles_follow_the_softmax(device, run, top_k, monkeypatch):
    """Chi-square of tokens, and of tiles; 99.9% bounds for 49 and 6 degrees of freedom, or fewer."""
    set_tile(monkeypatch, 8)
    batch, order = 8000, torch.randperm(50, generator=torch.Generator().manual_seed(4))
    logits = torch.linspace(-2, 2, 50)[order].to(device)
    state = state_of(device, batch, temperature=1.5, seed=range(batch), top_k=top_k)
    counts = sample_all(run, logits.expand(batch, -1).contiguous(), state).bincount(minlength=50).double()
    x = logits if not top_k else logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    expected = (x / 1.5).softmax(-1).double() * batch
    for width, bound in ((1, 85.4), (8, 22.5)):
        pairs = torch.nn.functional.pad(torch.stack((counts, expected)), (0, -50 % width))
        got, want = pairs.unflatten(1, (-1, width)).sum(-1)
        assert not got[want == 0].any()
        assert ((got - want) ** 2 / want)[want > 0].sum() < bound


def test_the_only_possible_token_is_sampled(device, monkeypatch):
    set_tile(monkeypatch, 16)
    only = [0, 15, 16, 47, 48, 49]
    logits = torch.full((len(only), 50), float("-inf"), device=device)
    logits[range(len(only)), only] = -3.0
    state = state_of(device, len(only), temperature=[1, 0, 0.5, 1, 0, 2], top_p=[1, 1, 0.5, 1, 1, 1], seed=range(6))
    for sampler in (sample_triton, sample_torch):
        assert sample_all(sampler, logits, state).tolist() == only


def test_nan_and_infinite_logits_give_a_valid_token(device, monkeypatch):
    set_tile(monkeypatch, 16)
    logits = torch.full((3, 50), float("nan"), device=device)
    logits[2] = float("-inf")
    tokens = sample_all(sample_triton, logits, state_of(device, 3, temperature=[0, 1, 1]))
    assert ((tokens >= 0) & (tokens < 50)).all()


def test_positions_are_sampled_independently(device):
    batch = 4000
    logits = torch.zeros((batch, 8), device=device)
    state = state_of(device, batch, seed=7)
    tokens = sample_all(sample_torch, logits, state, torch.arange(batch, dtype=torch.int32, device=device))
    counts = tokens.bincount(minlength=8).double()
    assert ((counts - batch / 8) ** 2 / (batch / 8)).sum() < 24.3
    pairs = (tokens[:-1] * 8 + tokens[1:]).bincount(minlength=64).double()  # 63 degrees of freedom: 103.4
    assert ((pairs - batch / 64) ** 2 / (batch / 64)).sum() < 103.4


def kept(run, probs, device, **filters):
    """Return the set of tokens among many samples."""
    batch = 200
    logits = torch.tensor(probs, device=device).log().expand(batch, -1).contiguous()
    return set(sample_all(run, logits, state_of(device, batch, seed=range(batch), **filters)).tolist())


def test_filters_keep_the_expected_tokens(device, run):
    probs = [0.1, 0.2, 0.3, 0.4]
    assert kept(run, probs, device, top_p=0.6) == {2, 3}
    assert kept(run, probs, device, top_p=0.05) == {3}
    assert kept(run, probs, device, top_k=3) == {1, 2, 3}
    assert kept(run, probs, device, min_p=0.6) == {2, 3}
    assert kept(run, probs, device, top_k=2, top_p=0.5) == {3}  # 0.4 is 57% of the two
    assert kept(run, probs, device) == {0, 1, 2, 3}


def test_greedy_is_argmax_and_ties_go_to_the_first(device, run):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, -2.0, -3.0]], device=device)
    assert sample_all(run, logits, state_of(device, 2, temperature=0.0)).tolist() == [1, 0]


def test_ties_between_tiles_go_to_the_first(device, monkeypatch):
    set_tile(monkeypatch, 16)
    logits = torch.zeros((1, 50), device=device)
    logits[0, [20, 23, 40]] = 3.0
    for sampler in (sample_triton, sample_torch):
        assert sample_all(sampler, logits, state_of(device, 1, temperature=0.0)).tolist() == [20]


def test_stop_ids_are_banned_until_min_length(device, run):
    logits = torch.tensor([[5.0, 4.0, 3.0]] * 2, device=device)
    state = state_of(device, 2, temperature=0.0, min_length=6, stop_ids=[[0], [0]])
    context_lens = torch.tensor([5, 6], dtype=torch.int32, device=device)
    assert sample_all(run, logits, state, context_lens).tolist() == [1, 0]


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(device, run):
    generator = torch.Generator(device).manual_seed(2)
    logits, others = (torch.randn((n, 300), generator=generator, device=device) for n in (1, 4))
    state = state_of(device, 5, seed=[1, 2, 99, 3, 4])
    alone = run(
        logits,
        torch.tensor([2], dtype=torch.int32, device=device),
        torch.tensor([8], dtype=torch.int32, device=device),
        state,
    )
    logits = torch.cat([others, logits])
    slots = torch.tensor([0, 1, 3, 4, 2], dtype=torch.int32, device=device)
    among = run(logits, slots, torch.tensor([3, 1, 4, 1, 8], dtype=torch.int32, device=device), state)
    assert alone[0] == among[-1]


def test_inputs_are_unchanged(device, run):
    logits = torch.randn((3, 50), device=device)
    copy = logits.clone()
    sample_all(run, logits, state_of(device, 3, top_k=5, min_length=9, stop_ids=[[1], [2], [3]]))
    assert torch.equal(logits, copy)


def test_advance_slots_skips_the_scratch_slot(device):
    for run in (advance_slots_triton, advance_slots_torch):
        last_token = torch.zeros(5, dtype=torch.int64, device=device)
        length = torch.zeros(5, dtype=torch.int32, device=device)
        slots = torch.tensor([3, 4, 0, 4], dtype=torch.int32, device=device)
        run(torch.tensor([7, 8, 9, 8], device=device), slots, slots + 10, last_token, length, 4)
        assert last_token.tolist() == [9, 0, 0, 7, 0] and length.tolist() == [10, 0, 0, 13, 0]


def test_sample_stores_its_tokens_in_the_slots(device):
    logits = torch.randn((5, 4099), generator=torch.Generator(device).manual_seed(2), device=device)
    state = state_of(device, 9, vocab_size=4099, temperature=[0, 1, 0, 1, 1, 0, 0, 0, 0], seed=range(9))
    slots = torch.tensor([7, 9, 1, 9, 4], dtype=torch.int32, device=device)
    lens = torch.tensor([50, 51, 52, 53, 54], dtype=torch.int32, device=device)
    plain = sample_torch(logits, slots, lens, state)
    for sampler in (sample_triton, sample_torch):
        last_token = torch.full((10,), -7, dtype=torch.int64, device=device)
        length = last_token.int()
        tokens = sampler(logits, slots, lens, state, (last_token, length, 9))
        assert tokens.tolist() == plain.tolist()
        expected = {7: (plain[0], 50), 1: (plain[2], 52), 4: (plain[4], 54)}
        for slot in range(10):
            assert (last_token[slot], length[slot]) == expected.get(slot, (-7, -7))


def test_processed_logits_are_rounded_as_in_the_sampler(device):
    """7.5098381 and the float before it become equal when multiplied by 1 / 0.7, but not when divided by 0.7."""
    logits = torch.tensor([7.509838104248047], device=device).repeat(50, 2)
    logits[:, 1] = logits[:, 0].nextafter(torch.zeros(50, device=device))
    state = state_of(device, 50, temperature=0.7, top_k=1, seed=range(50), flags=PROCESSED_LOGPROBS, vocab_size=2)
    lens = torch.full((50,), 5, dtype=torch.int32, device=device)
    tokens = sample_all(sample_torch, logits, state, lens)
    assert 0 < tokens.sum() < 50
    assert process_logits(logits, torch.arange(50, device=device), lens, state).isfinite().all()
