import logging
import sys
from types import ModuleType

import pytest
import torch

import nanovllm.attention as attention
from nanovllm.attention import select_backend, triton_backend
from nanovllm.attention.flash_attn_backend import FlashAttnBackend
from nanovllm.attention.torch_ref import TorchBackend
from nanovllm.kernels.decode_attention import decode_attention_torch
from nanovllm.kernels.prefill_attention import prefill_attention_torch
from nanovllm.kernels.rope_decode import rope_decode_torch
from nanovllm.kernels.rope_store import QKTransform
from nanovllm.layers.rotary_embedding import rope_table
from nanovllm.utils.context import Context
from tests.kernels.paged import assert_close, make_paged, plain_attention

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
SCALE = 0.1


def check_step(backend, decode, prefill, block_size=16, dtype=torch.float32, layers=2):
    """`backend` gives the formula's result for decode rows of given contexts and prefill rows of (queries, context)."""
    lens = [1] * len(decode) + [n for n, _ in prefill]
    contexts = [*decode, *(context for _, context in prefill)]
    generator = torch.Generator().manual_seed(2)
    paged = make_paged(contexts, KV_HEADS, HEAD_DIM, block_size, dtype, CPU)
    q = torch.randn(sum(lens), HEADS, HEAD_DIM, generator=generator).to(dtype)
    ctx = Context(
        backend=backend,
        num_decode=len(decode),
        slots=paged.slots,
        context_lens=paged.context_lens,
        block_tables=paged.block_tables,
    )
    if prefill:
        ctx.cu_seqlens_q = torch.tensor([len(decode), *(n for n, _ in prefill)]).cumsum(0).int()
        ctx.max_seqlen_q, ctx.max_context_len = (max(column) for column in zip(*prefill, strict=True))
    backend.prepare(ctx)
    parts = zip(q.split(lens), paged.keys, paged.values, strict=True)
    expected = torch.cat([plain_attention(queries, k, v, SCALE) for queries, k, v in parts])
    for _ in range(layers):
        assert_close(backend.attend(q, paged.k_cache, paged.v_cache, SCALE, ctx), expected)


STEPS = [([5, 40], []), ([7, 7], []), ([], [(20, 20), (3, 30)]), ([33, 1], [(18, 18), (1, 17)]), ([150], [(90, 200)])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend_attends_all_kinds_of_steps(dtype):
    backend = TorchBackend()  # one for all steps: its buffers grow, shrink in use, and are shared by layers
    for decode, prefill in STEPS:
        check_step(backend, decode, prefill, dtype=dtype)
    with torch.inference_mode():
        check_step(backend, [300] * 4, [(20, 20)], dtype=dtype)
    check_step(backend, [5], [(4, 4)], dtype=dtype)


def test_triton_backend_hands_each_kernel_its_rows(monkeypatch):
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)

    def into(twin):
        return lambda *args, out, counters=None, shared=None: out.copy_(twin(*args))

    monkeypatch.setattr(triton_backend, "decode_attention_triton", into(decode_attention_torch))
    monkeypatch.setattr(triton_backend, "prefill_attention_triton", into(prefill_attention_torch))
    backend = triton_backend.TritonBackend(torch.device("cuda"), 16)
    for decode, prefill in STEPS:
        check_step(backend, decode, prefill)


@pytest.mark.parametrize(
    ("decode", "prefill", "shared", "fused"),
    [
        ([5, 40, 16, 1], [], None, True),
        ([5, 40, 16, 1, 2], [], None, False),  # many rows
        ([5], [(3, 30)], None, False),
        ([], [(1, 9)], None, False),
        ([5, 40], [], object(), False),
    ],
)
def test_triton_backend_has_one_kernel_for_few_decode_rows(monkeypatch, decode, prefill, shared, fused):
    """What it gives and leaves in the cache is what the reference does, whichever way it goes."""
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    calls = []

    def into(twin, name):
        def run(*args, out=None, counters=None, shared=None):
            calls.append(name)
            return twin(*args) if out is None else out.copy_(twin(*args))

        return run

    for name, twin in (
        ("rope_decode_triton", rope_decode_torch),
        ("decode_attention_triton", decode_attention_torch),
        ("prefill_attention_triton", prefill_attention_torch),
    ):
        monkeypatch.setattr(triton_backend, name, into(twin, name))
    monkeypatch.setattr(triton_backend, "attend_shared_triton", lambda *args: None)
    lens = [1] * len(decode) + [n for n, _ in prefill]
    contexts = [*decode, *(context for _, context in prefill)]
    paged = make_paged(contexts, KV_HEADS, HEAD_DIM, 16, torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lens), (HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=generator)
    transform = QKTransform(HEADS, rope_table(HEAD_DIM, 64, 1e4), *torch.randn(2, HEAD_DIM, generator=generator), 1e-6)
    positions = torch.cat([torch.arange(c - n, c) for n, c in zip(lens, contexts, strict=True)])
    rows = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    blocks = paged.block_tables[paged.slots[rows].long(), positions // 16].long()
    results = []
    for backend in (TorchBackend(), triton_backend.TritonBackend(torch.device("cuda"), 16)):
        ctx = Context(
            num_decode=len(decode),
            slots=paged.slots,
            context_lens=paged.context_lens,
            block_tables=paged.block_tables,
            slot_mapping=blocks * 16 + positions % 16,
            cu_seqlens_q=torch.tensor([0, *lens]).cumsum(0).int()[len(decode) :] if prefill else None,
            shared=shared,
        )
        caches = paged.k_cache.clone(), paged.v_cache.clone()
        results.append((backend.store_and_attend(qkv, transform, positions, *caches, SCALE, ctx), *caches))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert ("rope_decode_triton" in calls) == fused and len(calls) == bool(decode) + bool(prefill)


def fake_flash_attn():
    """A module with flash-attn's two paged functions, computed by the torch twins."""

    def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal):
        assert causal and q.shape[1] == 1
        rows = torch.arange(len(q))
        args = (q[:, 0], k_cache, v_cache, block_table, rows, cache_seqlens, softmax_scale)
        return decode_attention_torch(*args)[:, None]

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, block_table):
        assert causal and cu_seqlens_k.dtype == torch.int32
        context_lens = cu_seqlens_k.diff()
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(context_lens.max()))
        rows = torch.arange(len(context_lens))
        return prefill_attention_torch(q, k, v, block_table, rows, cu_seqlens_q, context_lens, softmax_scale)

    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache, module.flash_attn_varlen_func = with_kvcache, varlen
    return module


def test_flash_attn_backend_speaks_its_packages_language(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    backend = FlashAttnBackend(torch.device("cuda"), 256, torch.bfloat16)
    for decode, prefill in STEPS:
        check_step(backend, decode, prefill, block_size=256)


def test_auto_on_a_cpu_is_torch_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        assert select_backend("auto", "cpu", 64, 16, torch.float32).name == "torch"
    assert "attention backend: torch" in caplog.text


@pytest.mark.parametrize(
    ("have_triton", "have_flash", "head_dim", "block_size", "expected"),
    [
        (True, True, 128, 256, "triton"),
        (False, True, 128, 256, "flash_attn"),
        (False, True, 128, 64, "torch"),
        (False, False, 128, 256, "torch"),
        (True, True, 512, 256, "torch"),
    ],
)
def test_auto_on_a_gpu_takes_what_is_there_and_fits(
    monkeypatch, have_triton, have_flash, head_dim, block_size, expected
):
    monkeypatch.setattr(attention, "HAVE_TRITON", have_triton)
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", have_triton)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if have_flash else None)
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    backend = select_backend("auto", "cuda", head_dim, block_size, torch.bfloat16)
    assert backend.name == expected
    assert backend.capturable == (expected != "torch")


@pytest.mark.parametrize(
    ("name", "device", "block_size", "dtype", "error", "message"),
    [
        (
            "xformers",
            "cpu",
            16,
            torch.float32,
            ValueError,
            "attention_backend='xformers' must be one of 'auto', 'torch'",
        ),
        ("triton", "cpu", 16, torch.float32, ValueError, "needs a CUDA device"),
        ("triton", "cuda", 48, torch.bfloat16, ValueError, "block_size=48 must be a power of two"),
        ("flash_attn", "cpu", 256, torch.bfloat16, ValueError, "needs a CUDA device"),
        ("flash_attn", "cuda", 64, torch.bfloat16, ValueError, "block_size=64 must be a multiple of 256"),
        ("flash_attn", "cuda", 256, torch.float32, ValueError, "dtype=torch.float32 must be float16 or bfloat16"),
        ("flash_attn", "cuda", 256, torch.bfloat16, ImportError, "needs the flash-attn package"),
    ],
)
def test_a_named_backend_is_used_or_raises(monkeypatch, name, device, block_size, dtype, error, message):
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an import of it fails
    with pytest.raises(error, match=message):
        select_backend(name, device, 64, block_size, dtype)


def test_what_is_missing_or_too_wide_is_named(monkeypatch):
    with pytest.raises(ValueError, match="head_dim=512 must be at most 256"):
        select_backend("triton", "cuda", 512, 16, torch.bfloat16)
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", False)
    with pytest.raises(ImportError, match="needs the triton package"):
        select_backend("triton", "cuda", 64, 16, torch.bfloat16)
