"""Embedding, norm, activation, RoPE with cache write, step inputs, copies of slots: kernels equal their references."""

import pytest
import torch

from nanovllm.layers.rotary_embedding import rope_table
from nanovllm.ops.attention.fp8_cache import dequantize_kv
from nanovllm.ops.attention.paged_cache import PagedKV
from nanovllm.ops.float8 import FP8
from nanovllm.ops.inputs.embedding import embedding_triton
from nanovllm.ops.inputs.reference import embedding_torch, step_inputs_torch
from nanovllm.ops.inputs.step_inputs import step_inputs_triton
from nanovllm.ops.inputs.step_rows import StepRows
from nanovllm.ops.linear.reference import sigmoid_mul_torch, silu_mul_torch
from nanovllm.ops.linear.sigmoid_mul import sigmoid_mul_triton
from nanovllm.ops.linear.silu_mul import silu_mul_triton
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.ops.norm_rope.reference import qk_norm_rope_store_torch, rms_norm_torch
from nanovllm.ops.norm_rope.rms_norm import rms_norm_triton
from nanovllm.ops.norm_rope.rope_store import qk_norm_rope_store_triton
from nanovllm.ops.sampling.state import HAS_PENALTIES, MAX_COUNT, SamplingState, default_params
from nanovllm.ops.state.copy_slots import copy_slots_triton
from nanovllm.ops.state.reference import copy_slots_torch
from tests.kernels.paged import FP8_DTYPES

DTYPES = [torch.float32, torch.bfloat16]
# The dtypes of the values, and of the weight of their norm.
NORM_DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def close(got, want):
    tolerance = 1e-5 if want.dtype == torch.float32 else 4e-2  # the interpreter truncates to bfloat16
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (7, 100), (0, 32)])
def test_embedding_equals_the_table(device, tokens, size, dtype):
    table = torch.randn(40, size, device=device).to(dtype)
    ids = torch.randint(40, (tokens,), device=device)
    for start, end in ((0, 40), (10, 25), (30, 40)):
        want = table[ids].masked_fill(((ids < start) | (ids >= end))[:, None], 0)
        for run in (embedding_triton, embedding_torch):
            got = run(ids, table[start:end].contiguous(), start)
            assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "norm_dtype"), NORM_DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (3, 576), (5, 1000), (2, 4096), (0, 64)])
def test_rms_norm_equals_the_reference(device, shape, dtype, norm_dtype):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    weight = torch.randn(shape[1], generator=generator, device=device).to(norm_dtype)
    copy = x.clone()
    close(rms_norm_triton(x, weight, 1e-6), rms_norm_torch(x, weight, 1e-6))
    assert torch.equal(x, copy)
    residual = torch.randn(shape, generator=generator, device=device).to(dtype)
    close(rms_norm_triton(x, weight, 1e-6, residual), rms_norm_torch(copy, weight, 1e-6, residual))
    close(x, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (3, 1536), (2, 6144), (4, 152)])
def test_silu_mul_equals_the_reference(device, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    copy = x.clone()
    close(silu_mul_triton(x), silu_mul_torch(x))
    assert torch.equal(x, copy)


@pytest.mark.parametrize("shape", [(1, 96), (3, 1536), (2, 100), (0, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_mul_equals_the_reference(device, shape, dtype):
    tokens, size = shape
    x, wide = (torch.randn(tokens, n, device=device).to(dtype) for n in (size, size + 40))
    close(sigmoid_mul_triton(x, wide[:, 8 : 8 + size]), sigmoid_mul_torch(x, wide[:, 8 : 8 + size]))


@pytest.mark.parametrize(("dtype", "norm_dtype"), [*NORM_DTYPES, *((dtype, None) for dtype in DTYPES)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (5, 1, 96), (16, 8, 128), (3, 3, 24)])
def test_rope_store_equals_the_reference(device, heads, kv_heads, head_dim, dtype, norm_dtype):
    """Queries, keys and values are a part of wider rows."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, block_size, num_blocks = 7, 16, 4

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    qkv = randn(tokens, (1 + heads + 2 * kv_heads) * head_dim)[:, head_dim:]
    weights = [randn(head_dim).to(norm_dtype) if norm_dtype else None for _ in "qk"]
    table = rope_table(head_dim, 100, 10000.0).to(device)
    query_scale = None if norm_dtype else torch.linspace(1, 3, 100, device=device)
    positions = torch.tensor([0, 1, 99, 5, 6, 7, 40], device=device)
    slot_mapping = torch.tensor([63, 0, 17, 2, 31, 30, 16], device=device)
    copy = qkv.clone()
    transform = QKTransform(heads, table, *weights, 1e-6, query_scale)
    for fp8 in (False, True):
        results = []
        for run in (qk_norm_rope_store_triton, qk_norm_rope_store_torch):
            shape, scales = (num_blocks, block_size, kv_heads, head_dim), None
            caches = [torch.full(shape, 7.0, device=device).to(FP8 if fp8 else dtype) for _ in "kv"]
            if fp8:
                scales = torch.full((num_blocks, kv_heads, block_size, 2), 3.0, dtype=torch.float16, device=device)
            q = run(qkv, transform, positions, slot_mapping, PagedKV(*caches, 0, scales))
            results.append((q, *(caches if scales is None else (*(x.float() for x in caches), scales))))
        assert all(x.isfinite().all() for x in results[0])
        close(results[0][0], results[1][0])
        for got, want in zip(results[0][1:], results[1][1:], strict=True):
            if fp8:  # the next number, if the kernel's float32 differs a little, and that of a bfloat16 more
                torch.testing.assert_close(got, want, rtol=0.13, atol=2.0 if dtype == torch.bfloat16 else 2**-9)
            else:
                close(got, want)
    assert torch.equal(qkv, copy)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_rope_store_quantises_any_magnitude_like_the_reference(device, dtype):
    """Heads of zeros, of the smallest and of the largest numbers. RoPE at position 0 changes nothing."""
    heads, kv_heads, head_dim = 1, 2, 64
    factors = torch.tensor([0, 1e-30, 1e-6, 1e-3, 0.3, 300, 6e4], device=device)
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(len(factors), (heads + 2 * kv_heads) * head_dim, generator=generator, device=device)
    qkv = (qkv.clamp(-1, 1) * factors[:, None]).to(dtype)
    positions = torch.zeros(len(factors), dtype=torch.int64, device=device)
    slots = torch.arange(len(factors), device=device)
    stored = []
    for run in (qk_norm_rope_store_triton, qk_norm_rope_store_torch):
        k_cache, v_cache = (torch.zeros(1, 16, kv_heads, head_dim, device=device).to(FP8) for _ in "kv")
        scales = torch.zeros(1, kv_heads, 16, 2, dtype=torch.float16, device=device)
        transform = QKTransform(heads, rope_table(head_dim, 9, 1e4).to(device))
        run(qkv, transform, positions, slots, PagedKV(k_cache, v_cache, 0, scales))
        stored.append((k_cache.float(), v_cache.float(), scales))
    for got, want in zip(*stored, strict=True):
        assert torch.equal(got, want)
    scales = stored[0][2].transpose(1, 2)[0, : len(factors)].float()
    values = qkv.float().view(len(factors), -1, head_dim)[:, heads:].unflatten(1, (2, kv_heads))
    for index in range(2):
        error = dequantize_kv(stored[0][index][0, : len(factors)], scales[..., index]) - values[:, index]
        # Half a step of 3 bits, or of the smallest numbers.
        assert (error.abs() <= values[:, index].abs() / 16 + scales[..., index, None] * 2**-10).all()


@pytest.mark.parametrize(("batch", "lens"), [(1, None), (7, None), (130, None), (1, [1]), (7, [1, 7, 1, 130, 3, 0, 0])])
def test_step_inputs_equal_the_reference(device, batch, lens):
    """A pure decode step, or rows of `lens` tokens: the first continues its slot, the last ones are padding."""
    slots_count, block_size, width = 200, 16, 12
    generator = torch.Generator(device).manual_seed(0)

    def randint(high, *shape):
        return torch.randint(0, high, shape, generator=generator, device=device).int()

    slots = torch.randperm(slots_count - 1, generator=generator, device=device)[:batch].int()
    rows = StepRows(slots)
    if lens:
        starts = randint(50, batch)
        starts[:1] = -1
        cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
        token_rows = torch.arange(batch, device=device).repeat_interleave(torch.tensor(lens, device=device)).int()
        token_ids = randint(1000, len(token_rows))
        token_ids[:1] = -1
        if lens[-1] == 0:
            slots[-2:] = slots_count - 1
            token_rows = torch.cat([token_rows, torch.full_like(token_rows[:5], batch - 1)])
            token_ids = torch.cat([token_ids, token_ids[:5] * 0])
        rows = StepRows(slots, starts, cu_seqlens, token_rows, token_ids)
    last_token, length = randint(1000, slots_count).long(), randint(50, slots_count)
    arguments = (rows, last_token, length, randint(99, slots_count, width), block_size, slots_count - 1)
    states = [SamplingState(default_params(slots_count), 1000, device) for _ in range(2)]
    for state in states:
        state.flags[: slots_count // 2] = HAS_PENALTIES
        state.counts[:, :900] = 2 * MAX_COUNT
        state.counts[:, :500] = 5
    got = step_inputs_triton(*arguments, states[0])
    want = step_inputs_torch(*arguments, states[1])
    assert torch.equal(states[0].counts, states[1].counts)
    known = slots if lens is None else slots[rows.starts < 0]
    counted = [slot for slot in known.tolist() if slot < slots_count // 2 and last_token[slot] < 500]
    assert (states[0].counts == 7).sum() == len(counted)
    assert (got.last_indices is None) == (want.last_indices is None) == (lens is None)
    for a, b in zip(got, want, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
    assert got.context_lens[0] == length[slots[0]] + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 33), (2, 5000)])
def test_copying_slots_changes_only_the_targets_in_every_layer(device, shape, dtype):
    pool = torch.randn(3, 6, *shape, device=device).to(dtype)
    sources, targets = (torch.tensor(slots, device=device) for slots in ([4, 1, 4], [0, 5, 3]))
    want = pool.clone()
    want[:, [0, 5, 3]] = pool[:, [4, 1, 4]]
    for copy in (copy_slots_torch, copy_slots_triton):
        for kind in (torch.int32, torch.int64):
            copied = pool.clone()
            copy(copied, sources.to(kind), targets.to(kind))
            assert torch.equal(copied, want)
            copy(copied, sources[:0], targets[:0])
            assert torch.equal(copied, want)
