"""Gated DeltaNet: the references equal transformers, and each Triton kernel equals its reference."""

from itertools import pairwise

import pytest
import torch

from nanovllm.ops.gdn import decode
from nanovllm.ops.gdn.decode import GdnDecodeConfig, default_decode_config, gdn_decode_triton
from nanovllm.ops.gdn.gated_delta_net import gated_delta_net, gated_delta_net_triton
from nanovllm.ops.gdn.gated_norm import gated_rms_norm_triton
from nanovllm.ops.gdn.inputs import CHUNK, CONV_WIDTH, GdnInputs, GdnState, GdnWeights
from nanovllm.ops.gdn.plan import prompt_plan_triton
from nanovllm.ops.gdn.prompt import gdn_prompt_triton
from nanovllm.ops.gdn.prompt_tiles import GdnPromptConfig
from nanovllm.ops.gdn.reference import (
    chunk_delta_rule_torch,
    gated_delta_net_torch,
    gated_rms_norm_torch,
    recurrent_delta_rule_torch,
)
from nanovllm.ops.state.copy_slots import copy_slots
from nanovllm.ops.state.rows import StateRows
from tests.kernels.paged import DEVICE, DTYPES

# (HK, HV, DK, DV)
SHAPES = [(2, 2, 16, 32), (1, 2, 32, 16), (1, 3, 16, 16)]
LENGTHS = [1, 3, 4, 63, 64, 65, 130]


def close(got, want, dtype=torch.float32):
    """Compare values in float32; in bfloat16 compare their root mean square error with their root mean square."""
    got, want = got.float(), want.float()
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    elif want.numel():
        assert (got - want).square().mean().sqrt() <= 2e-2 * want.square().mean().sqrt()


def make_weights(shape, dtype=torch.float32):
    k_heads, heads, k_dim, v_dim = shape
    channels = 2 * k_heads * k_dim + heads * v_dim
    # Decays from strong to nearly none.
    a_log, dt_bias = torch.linspace(-6, 2, heads, device=DEVICE), torch.randn(heads, device=DEVICE)
    conv = torch.randn(channels, CONV_WIDTH, device=DEVICE).to(dtype)
    return GdnWeights(conv, a_log, dt_bias, torch.randn(v_dim, device=DEVICE).to(dtype), 1e-6)


def make_inputs(num_tokens, shape, dtype=torch.float32):
    """Return views of one tensor, as one GEMM gives them."""
    k_heads, heads, k_dim, v_dim = shape
    sizes = [2 * k_heads * k_dim + heads * v_dim, heads * v_dim, heads, heads]
    return GdnInputs(*torch.randn(num_tokens, sum(sizes), device=DEVICE).to(dtype).split(sizes, 1))


def make_state(slots, shape, dtype=torch.float32, state_dtype=torch.float32):
    k_heads, heads, k_dim, v_dim = shape
    recurrent = torch.randn(slots, heads, k_dim, v_dim, device=DEVICE).to(state_dtype)
    conv = torch.randn(slots, CONV_WIDTH, 2 * k_heads * k_dim + heads * v_dim, device=DEVICE).to(dtype)
    return GdnState(recurrent, conv)


def clone(state):
    return GdnState(*(pool.clone() for pool in state))


def make_rows(lengths, starts, num_tokens=None, max_prompts=None, slots=None):
    lengths = torch.tensor(lengths)
    cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).int().to(DEVICE)
    slots = torch.arange(len(lengths)).flip(0) if slots is None else torch.tensor(slots)
    num_prompts = int((lengths > 1).sum()) if max_prompts is None else max_prompts
    plan = prompt_plan_triton(cu_seqlens, num_tokens or int(lengths.sum()), num_prompts)
    return StateRows(slots.int().to(DEVICE), torch.tensor(starts).int().to(DEVICE), cu_seqlens, plan)


def run_split(run, inputs, weights, state, ends):
    """Compute one sequence in slot 1 in several steps; return its outputs."""
    outputs = []
    for start, end in pairwise([0, *ends]):
        rows = make_rows([end - start], [start], slots=[1], max_prompts=1)
        outputs.append(run(GdnInputs(*(x[start:end] for x in inputs)), weights, state, rows))
    return torch.cat(outputs)


@pytest.mark.parametrize(("k_heads", "heads"), [(2, 2), (2, 4), (1, 3)])
def test_reference_equals_the_layer_of_transformers_over_a_chunk_a_decoded_token_and_a_chunk(k_heads, heads):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        hidden_size=24,
        linear_num_key_heads=k_heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    layer = Qwen3_5GatedDeltaNet(config, 0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    hidden = torch.randn(140, 24)
    projections = (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a)
    with torch.no_grad():
        want = layer(hidden[None])[0]
        inputs = GdnInputs(*(projection(hidden).to(DEVICE) for projection in projections))
        weights = (layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias, layer.norm.weight)
        weights = GdnWeights(*(weight.to(DEVICE) for weight in weights), layer.layer_norm_epsilon)
        state = make_state(2, (k_heads, heads, 16, 32))
        gated = run_split(gated_delta_net_torch, inputs, weights, state, [70, 71, 72, 74, 140])
        close(layer.out_proj(gated.cpu()), want)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_and_recurrent_rules_equal_transformers(length):
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    torch.manual_seed(length)
    q, k = (torch.randn(length, 3, 16) for _ in range(2))
    v, g, beta = torch.randn(length, 3, 32), -torch.rand(length, 3) * 3, torch.rand(length, 3)
    state = torch.randn(3, 16, 32)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    options = dict(initial_state=state[None], output_final_state=True)
    for ours, name in ((chunk_delta_rule_torch, "chunk"), (recurrent_delta_rule_torch, "recurrent")):
        run = getattr(theirs, f"torch_{name}_gated_delta_rule")
        want, after = run(q[None], k[None], v[None], g[None], beta[None], **options)
        got, state_after = ours(q * 16**-0.5, k, v, g, beta, state)
        close(got, want[0])
        close(state_after, after[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference_on_a_mixed_step(shape, dtype):
    """The step has decode rows, prompts, an empty row and padding. Slots hold NaN where a row starts at 0."""
    torch.manual_seed(0)
    lengths, starts = [1, 1, 1, 3, 65, 0, 2, 1], [0, 2, 100, 1, 64, 0, 0, 3]
    num_tokens = sum(lengths) + 70
    inputs, weights = make_inputs(num_tokens, shape, dtype), make_weights(shape, dtype)
    rows = make_rows(lengths, starts, num_tokens, max_prompts=4)
    state = make_state(9, shape, dtype)
    new_slots = rows.slots[rows.starts == 0].long()
    state.recurrent[new_slots], state.conv[new_slots] = float("nan"), float("nan")
    want_state, untouched = clone(state), 8
    want = gated_delta_net_torch(inputs, weights, want_state, rows, recurrent_delta_rule_torch)
    for config in [GdnPromptConfig(slices=slices) for slices in (1, 2) if shape[3] // slices >= 16]:
        got_state, got = clone(state), torch.full_like(want, float("nan"))
        gdn_prompt_triton(inputs, weights, got_state, rows, got, config)
        gdn_decode_triton(inputs, weights, got_state, rows, got, GdnDecodeConfig(config.slices), norm=False)
        gated_rms_norm_triton(got, inputs.z, weights.norm, weights.eps, out=got)
        close(got, want, dtype)
        assert not got[sum(lengths) :].any()
        used = rows.slots[rows.cu_seqlens.diff() > 0].long()
        close(got_state.recurrent[used], want_state.recurrent[used], dtype)
        for slot in range(len(state.conv)):
            assert torch.equal(got_state.conv[slot].nan_to_num(), want_state.conv[slot].nan_to_num())
        assert torch.equal(got_state.recurrent[untouched], state.recurrent[untouched])


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_kernels_equal_the_reference_at_chunk_borders(length):
    shape = (1, 2, 16, 16)
    torch.manual_seed(length)
    inputs, weights, state = make_inputs(length, shape), make_weights(shape), make_state(2, shape)
    rows, want_state = make_rows([length], [5], max_prompts=1), clone(state)
    close(
        gated_delta_net_triton(inputs, weights, state, rows), gated_delta_net_torch(inputs, weights, want_state, rows)
    )
    close(state.recurrent, want_state.recurrent)
    assert torch.equal(state.conv, want_state.conv)


@pytest.mark.parametrize("run", [gated_delta_net_torch, gated_delta_net_triton])
def test_a_prompt_split_anywhere_equals_the_whole(run):
    shape = (1, 2, 16, 16)
    torch.manual_seed(0)
    inputs, weights, state = make_inputs(135, shape), make_weights(shape), make_state(2, shape)
    whole = clone(state)
    want = run_split(run, inputs, weights, whole, [135])
    for ends in ([1, 2, 4, 135], [63, 64, 135], [65, 130, 131, 135], [3, 67, 133, 135]):
        split = clone(state)
        close(run_split(run, inputs, weights, split, ends), want)
        close(split.recurrent, whole.recurrent)
        assert torch.equal(split.conv[1], whole.conv[1])


def test_equal_keys_with_strong_writes_stay_accurate():
    """Such keys make the chunk's linear system as far from the identity as it gets."""
    shape = (1, 1, 16, 16)
    torch.manual_seed(0)
    inputs, state = make_inputs(CHUNK, shape), make_state(1, shape)
    inputs.qkv[:, :32] = inputs.qkv[:1, :32]
    inputs.b[:] = 8
    weights = make_weights(shape)._replace(a_log=torch.full((1,), -9.0, device=DEVICE))
    rows, want_state = make_rows([CHUNK], [0]), clone(state)
    want = gated_delta_net_torch(inputs, weights, want_state, rows, recurrent_delta_rule_torch)
    close(gated_delta_net_triton(inputs, weights, state, rows), want)
    close(state.recurrent, want_state.recurrent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 5])
def test_decode_kernel_equals_the_reference_and_padding_rows_touch_the_scratch_slot_only(batch, shape, dtype):
    torch.manual_seed(0)
    scratch = 6
    inputs, weights, state = (
        make_inputs(batch + 2, shape, dtype),
        make_weights(shape, dtype),
        make_state(7, shape, dtype),
    )
    slots = torch.tensor([*range(batch), scratch, scratch], device=DEVICE).int()
    starts = torch.tensor([*range(batch), 0, 0], device=DEVICE)
    rows, want_state = StateRows(slots, starts), clone(state)
    want = gated_delta_net_torch(inputs, weights, want_state, rows)
    close(gated_delta_net_triton(inputs, weights, state, rows), want, dtype)
    close(state.recurrent[:scratch], want_state.recurrent[:scratch], dtype)
    assert torch.equal(state.conv[:scratch], want_state.conv[:scratch])


@pytest.mark.parametrize(("state_dtype", "want"), [(torch.float32, (2, 2)), (torch.bfloat16, (4, 1))])
def test_many_rows_are_decoded_in_slices_that_suit_the_state(state_dtype, want, monkeypatch):
    assert default_decode_config(64, 2, 128, state_dtype).slices == 1
    assert default_decode_config(65, 2, 128, state_dtype) == want
    shape, batch = (1, 2, 16, 128), 3
    monkeypatch.setattr(decode, "MAX_WHOLE_HEADS", 5)
    assert default_decode_config(batch, 2, 128, state_dtype) == want
    torch.manual_seed(0)
    inputs, weights = make_inputs(batch, shape), make_weights(shape)
    state = make_state(batch, shape, state_dtype=state_dtype)
    rows = StateRows(torch.arange(batch, device=DEVICE).int(), torch.arange(batch, device=DEVICE))
    want_state = clone(state)
    want_out = gated_delta_net_torch(inputs, weights, want_state, rows)
    close(gated_delta_net_triton(inputs, weights, state, rows), want_out)
    close(state.recurrent, want_state.recurrent, state_dtype)


def test_bfloat16_state_equals_the_reference():
    shape = (1, 2, 16, 16)
    torch.manual_seed(0)
    inputs, weights = make_inputs(68, shape), make_weights(shape)
    state = make_state(3, shape, state_dtype=torch.bfloat16)
    rows, want_state = make_rows([1, 2, 65], [9, 0, 64]), clone(state)
    close(
        gated_delta_net_triton(inputs, weights, state, rows), gated_delta_net_torch(inputs, weights, want_state, rows)
    )
    assert state.recurrent.dtype == torch.bfloat16
    close(state.recurrent, want_state.recurrent, torch.bfloat16)


def test_plan_lists_prompts_and_their_chunks_then_padding():
    lengths = [1, 130, 0, 1, 64, 2, *[1] * 70, 65]
    num_tokens = sum(lengths) + 100
    rows = make_rows(lengths, [0] * len(lengths), num_tokens, max_prompts=6)
    prompts = [row for row, length in enumerate(lengths) if length > 1]
    chunks = [(row, token) for row in prompts for token in range(0, lengths[row], CHUNK)]
    first = rows.cu_seqlens.tolist()
    plan = rows.plan
    assert plan.rows.tolist() == [*prompts, -1, -1]
    assert plan.first_chunks.tolist()[: len(prompts)] == [[c[0] for c in chunks].index(row) for row in prompts]
    num_unused = len(plan.chunk_rows) - len(chunks)
    assert plan.chunk_rows.tolist() == [row for row, _ in chunks] + [-1] * num_unused
    padding = [sum(lengths) + CHUNK * index for index in range(num_unused)]
    assert plan.chunk_tokens.tolist() == [first[row] + token for row, token in chunks] + padding
    assert padding[-1] >= num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 16), (7, 3, 32), (3, 2, 128), (0, 2, 16)])
def test_gated_rms_norm_equals_the_reference(tokens, heads, size, dtype):
    torch.manual_seed(0)
    x, wide = (
        torch.randn(tokens, heads * size).to(DEVICE, dtype),
        torch.randn(tokens, heads * size + 8).to(DEVICE, dtype),
    )
    weight, z = torch.randn(size).to(DEVICE, dtype), wide[:, 8:]
    want = gated_rms_norm_torch(x.unflatten(1, (heads, size)), z.unflatten(1, (heads, size)), weight, 1e-6).flatten(1)
    close(gated_rms_norm_triton(x, z, weight, 1e-6), want, dtype)


def test_gated_delta_net_runs_what_the_device_needs():
    shape = (1, 2, 16, 16)
    torch.manual_seed(0)
    inputs, weights, state = make_inputs(5, shape), make_weights(shape), make_state(3, shape)
    rows, want_state = make_rows([1, 4], [3, 0]), clone(state)
    close(gated_delta_net(inputs, weights, state, rows), gated_delta_net_torch(inputs, weights, want_state, rows))
    close(state.recurrent, want_state.recurrent)


def test_a_copied_slot_continues_like_its_source():
    shape = (1, 2, 16, 16)
    torch.manual_seed(0)
    inputs, weights, state = make_inputs(9, shape), make_weights(shape), make_state(4, shape)
    first, rest = (GdnInputs(*(x[part] for x in inputs)) for part in (slice(6), slice(6, None)))
    gated_delta_net(first, weights, state, make_rows([6], [0], slots=[3]))
    for pool in state:
        copy_slots(pool[None], torch.tensor([3], device=DEVICE).int(), torch.tensor([0], device=DEVICE).int())
    source, copy = (gated_delta_net(rest, weights, state, make_rows([3], [6], slots=[slot])) for slot in (3, 0))
    assert torch.equal(source, copy) and torch.equal(state.recurrent[0], state.recurrent[3])


def test_shapes_that_disagree_and_a_missing_plan_raise():
    shape = (1, 2, 16, 16)
    inputs, weights, state = make_inputs(2, shape), make_weights(shape), make_state(1, shape)
    rows = make_rows([2], [0])
    out = torch.empty_like(inputs.z)
    with pytest.raises(ValueError, match=r"b must have shape \(2, 2\), got \(2, 1\)"):
        gated_delta_net(inputs._replace(b=inputs.b[:, :1]), weights, state, rows)
    with pytest.raises(ValueError, match="qkv must have 2 value heads of 16 and key heads of 16, got 40"):
        gated_delta_net(inputs._replace(qkv=inputs.qkv[:, :40]), weights, state, rows)
    with pytest.raises(ValueError, match="plan must be a PromptPlan"):
        gdn_prompt_triton(inputs, weights, state, rows._replace(plan=None), out)
