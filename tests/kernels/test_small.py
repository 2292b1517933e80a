"""Norms, activation, rotary embedding with the cache write, and decode inputs: each Triton kernel = its twin."""

import pytest
import torch

from nanovllm.kernels import decode_inputs, rms_norm, rope_store, silu_mul
from nanovllm.layers.rotary_embedding import rope_table

DTYPES = [torch.float32, torch.bfloat16]


def close(got, want):
    tolerance = 1e-5 if want.dtype == torch.float32 else 4e-2  # the interpreter truncates to bfloat16
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (3, 576), (5, 1000), (2, 4096), (0, 64)])
def test_rms_norm(device, shape, dtype):
    generator = torch.Generator(device).manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=generator, device=device).to(dtype)
    copies = x.clone(), residual.clone()
    close(rms_norm.rms_norm_triton(x, weight, 1e-6), rms_norm.rms_norm_torch(x, weight, 1e-6))
    got = rms_norm.add_rms_norm_triton(x, residual, weight, 1e-6)
    want = rms_norm.add_rms_norm_torch(x, residual, weight, 1e-6)
    close(got[0], want[0])
    close(got[1], want[1])
    assert torch.equal(x, copies[0]) and torch.equal(residual, copies[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (3, 1536), (2, 6144), (4, 152)])
def test_silu_mul(device, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    copy = x.clone()
    close(silu_mul.silu_mul_triton(x), silu_mul.silu_mul_torch(x))
    assert torch.equal(x, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (5, 1, 96), (16, 8, 128), (3, 3, 24)])
def test_rope_store(device, heads, kv_heads, head_dim, norm, dtype):
    generator = torch.Generator(device).manual_seed(0)
    tokens, block_size, num_blocks = 7, 16, 4

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim)
    weights = (randn(head_dim), randn(head_dim)) if norm else (None, None)
    table = rope_table(head_dim, 100, 10000.0).to(device)
    positions = torch.tensor([0, 1, 99, 5, 6, 7, 40], device=device)
    places = torch.tensor([63, 0, 17, 2, 31, 30, 16], device=device)
    copy = qkv.clone()
    results = []
    for run in (rope_store.qk_norm_rope_store_triton, rope_store.qk_norm_rope_store_torch):
        caches = [
            torch.full((num_blocks, block_size, kv_heads, head_dim), 7.0, dtype=dtype, device=device) for _ in "kv"
        ]
        results.append((run(qkv, *weights, 1e-6, table, positions, places, *caches, heads), *caches))
    for got, want in zip(*results, strict=True):
        close(got, want)
    assert torch.equal(qkv, copy)


@pytest.mark.parametrize("batch", [1, 5, 130])
def test_decode_inputs(device, batch):
    slots_count, block_size, width = 200, 16, 6
    generator = torch.Generator(device).manual_seed(0)
    slots = torch.randperm(slots_count, generator=generator, device=device)[:batch].int()
    last_token = torch.randint(0, 1000, (slots_count,), generator=generator, device=device)
    length = torch.randint(0, block_size * width, (slots_count,), generator=generator, device=device).int()
    tables = torch.randint(0, 99, (slots_count, width), generator=generator, device=device).int()
    arguments = (slots, last_token, length, tables, block_size)
    got, want = decode_inputs.decode_inputs_triton(*arguments), decode_inputs.decode_inputs_torch(*arguments)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
