"""The sampler: Triton = torch, and both = what sampling theory says."""

import pytest
import torch

from nanovllm.ops.sampling import sampling
from nanovllm.ops.sampling.logprobs import process_logits
from nanovllm.ops.sampling.sampling import (
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    PROCESSED_LOGPROBS,
    SamplingState,
    adjust_logits,
    default_params,
    sample_torch,
    sample_triton,
)


def state_of(device, rows, stop_ids=(), vocab_size=1, **columns):
    """A state with one slot per row (and a scratch one); `columns` override the defaults."""
    table = default_params(rows + 1)
    for name, values in {"temperature": 1.0, **columns}.items():
        table[name][:rows] = values
    for row, ids in enumerate(stop_ids):
        table["stop_ids"][row, : len(ids)] = ids
    return SamplingState(table, vocab_size, device)


def draw(run, logits, state, context_lens=None):
    rows = len(logits)
    slots = torch.arange(rows, dtype=torch.int32, device=logits.device)
    if context_lens is None:
        context_lens = torch.full((rows,), 5, dtype=torch.int32, device=logits.device)
    return run(logits, slots, context_lens, state)


@pytest.fixture(params=["torch", "triton"])
def run(request, device):
    if request.param == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is slow: there, Triton = torch is enough")
    return sample_triton if request.param == "triton" else sample_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "tile"), [(11, sampling.TILE), (4099, sampling.TILE), (150, 64)])
def test_triton_equals_torch(device, vocab_size, tile, dtype, monkeypatch):
    monkeypatch.setattr(sampling, "TILE", tile)
    rows = 12
    logits = torch.randn((rows, vocab_size), generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    state = state_of(
        device,
        rows,
        temperature=[0, 1, 0.5, 2, 1, 1, 0.7, 1, 0, 1, 1, 1],
        top_k=[0, 0, 3, 0, 0, 7, 1, vocab_size + 9, 5, 0, 2, 0],
        top_p=[1, 1, 1, 0.5, 1, 0.9, 1, 0.01, 1, 1, 0.3, 1],
        min_p=[0, 0, 0, 0, 0.2, 0, 0, 0, 0, 1, 0, 0],
        seed=[2**62 + i for i in range(rows)],
        min_length=[0] * 10 + [9, 9],
        stop_ids=[[]] * 10 + [[0, 1, 2], list(range(8))],
    )
    got, want = draw(sample_triton, logits, state), draw(sample_torch, logits, state)
    assert got.dtype == torch.int64 and got.tolist() == want.tolist()


@pytest.mark.parametrize(("vocab_size", "tile"), [(40, sampling.TILE), (4099, sampling.TILE), (150, 64)])
def test_triton_equals_torch_with_bias_penalties_and_masks(device, vocab_size, tile, monkeypatch):
    monkeypatch.setattr(sampling, "TILE", tile)
    rows = 10
    generator = torch.Generator(device).manual_seed(3)
    logits = torch.randn((rows, vocab_size), generator=generator, device=device) * 3
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
        rows,
        vocab_size=vocab_size,
        temperature=[0, 0, 0, 0, 0, 1, 0.7, 1, 1, 1],
        top_k=[0] * 7 + [5, 0, 3],
        top_p=[1] * 8 + [0.7, 1],
        seed=range(rows),
        flags=flags,
        repetition=1.7,
        presence=0.5,
        frequency=[0.25 * i for i in range(rows)],
        num_bias=4,
        min_length=[0] * 6 + [9] * 4,
        stop_ids=[[1, 2]] * rows,
    )
    state.counts.copy_(torch.randint(0, 8, state.counts.shape, generator=generator, device=device))
    state.masks.copy_(torch.randint(-(2**31), 2**31, state.masks.shape, generator=generator, device=device))
    state.bias[:, :4, 0] = torch.tensor([0, 7, 31, 39], device=device)
    state.bias[:, :4, 1] = torch.tensor([4.0, -5.0, 6.0, 3.0], device=device).view(torch.int32)
    got, want = draw(sample_triton, logits, state), draw(sample_torch, logits, state)
    assert got.tolist() == want.tolist()
    plain = logits.argmax(1).tolist()
    assert got[0] == plain[0] and got[:5].tolist() != plain[:5]


def test_bias_penalties_and_masks_by_hand(device, run):
    state = state_of(
        device, 1, vocab_size=6, temperature=0.0, flags=HAS_PENALTIES, repetition=2, presence=1, frequency=0.5
    )
    state.counts[0] = torch.tensor(
        [1, 0, 2, 7, 0, 0]
    )  # in the prompt; not at all; once in the output; in both, 3 times
    logits = torch.tensor([[4.0, 1.0, 8.0, -1.0, 0.5, 2.5]], device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    assert adjust_logits(logits, slots, state).tolist() == [[2.0, 1.0, 2.5, -4.5, 0.5, 2.5]]
    assert draw(run, logits, state).tolist() == [2]
    state.flags[0] = HAS_MASK
    state.masks[0] = 0b010011
    assert draw(run, logits, state).tolist() == [0]
    state.flags[0], state.num_bias[0] = HAS_BIAS, 1
    state.bias[0, 0] = torch.tensor([4, int(torch.tensor(7.75).view(torch.int32))])
    assert draw(run, logits, state).tolist() == [4]


def test_draws_follow_the_softmax(device, run):
    """Chi-square of 4,000 draws at fixed seeds; the 99.9% bound for 7 degrees of freedom is 24.3."""
    rows = 4000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.1, -0.3, 1.5], device=device)
    state = state_of(device, rows, temperature=0.8, seed=range(rows))
    counts = draw(run, logits.expand(rows, -1).contiguous(), state).bincount(minlength=8).double()
    expected = (logits / 0.8).softmax(-1).double() * rows
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


@pytest.mark.parametrize("top_k", [0, 30])
def test_draws_of_many_tiles_follow_the_softmax(device, run, top_k, monkeypatch):
    """Chi-square of tokens, and of tiles; 99.9% bounds for 49 and 6 degrees of freedom, or fewer."""
    monkeypatch.setattr(sampling, "TILE", 8)
    rows, order = 8000, torch.randperm(50, generator=torch.Generator().manual_seed(4))
    logits = torch.linspace(-2, 2, 50)[order].to(device)
    state = state_of(device, rows, temperature=1.5, seed=range(rows), top_k=top_k)
    counts = draw(run, logits.expand(rows, -1).contiguous(), state).bincount(minlength=50).double()
    x = logits if not top_k else logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    expected = (x / 1.5).softmax(-1).double() * rows
    for width, bound in ((1, 85.4), (8, 22.5)):
        pairs = torch.nn.functional.pad(torch.stack((counts, expected)), (0, -50 % width))
        got, want = pairs.unflatten(1, (-1, width)).sum(-1)
        assert not got[want == 0].any()
        assert ((got - want) ** 2 / want)[want > 0].sum() < bound


def test_the_only_token_is_drawn(device, monkeypatch):
    monkeypatch.setattr(sampling, "TILE", 16)
    only = [0, 15, 16, 47, 48, 49]
    logits = torch.full((len(only), 50), float("-inf"), device=device)
    logits[range(len(only)), only] = -3.0
    state = state_of(device, len(only), temperature=[1, 0, 0.5, 1, 0, 2], top_p=[1, 1, 0.5, 1, 1, 1], seed=range(6))
    for sampler in (sample_triton, sample_torch):
        assert draw(sampler, logits, state).tolist() == only


def test_what_is_no_number_gives_a_token(device, monkeypatch):
    monkeypatch.setattr(sampling, "TILE", 16)
    logits = torch.full((3, 50), float("nan"), device=device)
    logits[2] = float("-inf")
    tokens = draw(sample_triton, logits, state_of(device, 3, temperature=[0, 1, 1]))
    assert ((tokens >= 0) & (tokens < 50)).all()


def test_positions_draw_independently(device):
    rows = 4000
    logits = torch.zeros((rows, 8), device=device)
    state = state_of(device, rows, seed=7)
    tokens = draw(sample_torch, logits, state, torch.arange(rows, dtype=torch.int32, device=device))
    counts = tokens.bincount(minlength=8).double()
    assert ((counts - rows / 8) ** 2 / (rows / 8)).sum() < 24.3
    pairs = (tokens[:-1] * 8 + tokens[1:]).bincount(minlength=64).double()  # 63 degrees of freedom: 103.4
    assert ((pairs - rows / 64) ** 2 / (rows / 64)).sum() < 103.4


def kept(run, probs, device, **filters):
    """The tokens that are drawn at all in many draws."""
    rows = 200
    logits = torch.tensor(probs, device=device).log().expand(rows, -1).contiguous()
    return set(draw(run, logits, state_of(device, rows, seed=range(rows), **filters)).tolist())


def test_filters_keep_what_they_say(device, run):
    probs = [0.1, 0.2, 0.3, 0.4]
    assert kept(run, probs, device, top_p=0.6) == {2, 3}
    assert kept(run, probs, device, top_p=0.05) == {3}
    assert kept(run, probs, device, top_k=3) == {1, 2, 3}
    assert kept(run, probs, device, min_p=0.6) == {2, 3}
    assert kept(run, probs, device, top_k=2, top_p=0.5) == {3}  # 0.4 is 57% of the two
    assert kept(run, probs, device) == {0, 1, 2, 3}


def test_greedy_is_argmax_and_ties_go_to_the_first(device, run):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, -2.0, -3.0]], device=device)
    assert draw(run, logits, state_of(device, 2, temperature=0.0)).tolist() == [1, 0]


def test_ties_of_tiles_go_to_the_first(device, monkeypatch):
    monkeypatch.setattr(sampling, "TILE", 16)
    logits = torch.zeros((1, 50), device=device)
    logits[0, [20, 23, 40]] = 3.0
    for sampler in (sample_triton, sample_torch):
        assert draw(sampler, logits, state_of(device, 1, temperature=0.0)).tolist() == [20]


def test_stop_ids_are_banned_until_min_length(device, run):
    logits = torch.tensor([[5.0, 4.0, 3.0]] * 2, device=device)
    state = state_of(device, 2, temperature=0.0, min_length=6, stop_ids=[[0], [0]])
    context_lens = torch.tensor([5, 6], dtype=torch.int32, device=device)
    assert draw(run, logits, state, context_lens).tolist() == [1, 0]


def test_a_row_s_place_and_neighbours_do_not_matter(device, run):
    generator = torch.Generator(device).manual_seed(2)
    row, others = (torch.randn((n, 300), generator=generator, device=device) for n in (1, 4))
    state = state_of(device, 5, seed=[1, 2, 99, 3, 4])
    alone = run(
        row,
        torch.tensor([2], dtype=torch.int32, device=device),
        torch.tensor([8], dtype=torch.int32, device=device),
        state,
    )
    logits = torch.cat([others, row])
    slots = torch.tensor([0, 1, 3, 4, 2], dtype=torch.int32, device=device)
    among = run(logits, slots, torch.tensor([3, 1, 4, 1, 8], dtype=torch.int32, device=device), state)
    assert alone[0] == among[-1]


def test_inputs_are_unchanged(device, run):
    logits = torch.randn((3, 50), device=device)
    copy = logits.clone()
    draw(run, logits, state_of(device, 3, top_k=5, min_length=9, stop_ids=[[1], [2], [3]]))
    assert torch.equal(logits, copy)


def test_advance(device):
    for run in (sampling.advance_slots_triton, sampling.advance_slots_torch):
        last_token = torch.zeros(5, dtype=torch.int64, device=device)
        length = torch.zeros(5, dtype=torch.int32, device=device)
        slots = torch.tensor([3, 4, 0, 4], dtype=torch.int32, device=device)
        run(torch.tensor([7, 8, 9, 8], device=device), slots, slots + 10, last_token, length, 4)
        assert last_token.tolist() == [9, 0, 0, 7, 0] and length.tolist() == [10, 0, 0, 13, 0]


def test_sample_takes_its_tokens_into_the_slots(device):
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


def test_processed_logits_round_as_the_sampler_s(device):
    """7.5098381 and the float before it are one number once multiplied by 1 / 0.7, but not if they are divided."""
    logits = torch.tensor([7.509838104248047], device=device).repeat(50, 2)
    logits[:, 1] = logits[:, 0].nextafter(torch.zeros(50, device=device))
    state = state_of(device, 50, temperature=0.7, top_k=1, seed=range(50), flags=PROCESSED_LOGPROBS, vocab_size=2)
    lens = torch.full((50,), 5, dtype=torch.int32, device=device)
    drawn = draw(sample_torch, logits, state, lens)
    assert 0 < drawn.sum() < 50
    assert process_logits(logits, torch.arange(50, device=device), lens, state).isfinite().all()
