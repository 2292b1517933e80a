import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import nanovllm.attention as attention
from nanovllm.attention import select_backend, triton_backend
from nanovllm.attention.flash_attn_backend import (
    PACKAGES,
    FlashAttn2Backend,
    FlashAttn3Backend,
    choose_package,
    num_splits,
)
from nanovllm.attention.torch_backend import TorchBackend
from nanovllm.layers.rotary_embedding import rope_table
from nanovllm.ops.attention.paged_cache import KVKind, PagedKV, PagedRows
from nanovllm.ops.attention.reference import (
    decode_attention_torch,
    find_run,
    group_by_length,
    plan_decode_torch,
    prefill_attention_torch,
    rope_decode_torch,
    slot_mapping,
)
from nanovllm.ops.norm_rope.qk_transform import QKTransform
from nanovllm.utils.context import Context
from tests.kernels.paged import assert_close, make_paged, plain_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLASH2, FLASH3, FLASH3_BY_TILE = "flash_attn", "flash_attn_interface", "fa3_fwd_interface"
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
SCALE = 0.1
COUNTERS = torch.zeros(64, dtype=torch.int32)


def check_step(backend, decode, prefill, block_size=16, dtype=torch.float32, windows=(0, 0)):
    """Compare `backend` with the formula.

    Args:
        decode: context lengths of the decode rows.
        prefill: pairs (number of queries, context length) of the prefill rows.
        windows: the window of each layer.
    """
    lens = [1] * len(decode) + [n for n, _ in prefill]
    contexts = [*decode, *(context for _, context in prefill)]
    generator = torch.Generator().manual_seed(2)
    paged = make_paged(contexts, KV_HEADS, HEAD_DIM, block_size, dtype, CPU)
    q = torch.randn(sum(lens), HEADS, HEAD_DIM, generator=generator).to(dtype)
    ctx = Context(
        backend=backend,
        kv_kinds=tuple({KVKind(KV_HEADS, window) for window in windows}),
        num_decode=len(decode),
        rows=paged.rows,
        slot_mapping=torch.arange(sum(lens)),
        counters=COUNTERS,
    )
    if prefill:
        ctx.cu_seqlens_q = torch.tensor([len(decode), *(n for n, _ in prefill)]).cumsum(0).int()
        ctx.max_seqlen_q, ctx.max_context_len = (max(column) for column in zip(*prefill, strict=True))
    backend.prepare(ctx)
    for window in windows:
        rows = zip(q.split(lens), paged.keys, paged.values, strict=True)
        expected = torch.cat([plain_attention(queries, k, v, SCALE, window) for queries, k, v in rows])
        kv = PagedKV(paged.kv.k_cache, paged.kv.v_cache, window)
        assert_close(backend.attend(q, kv, SCALE, ctx), expected)


WINDOWS = (0, 17, 0, 5, 17)  # layers of several kinds in one model
STEPS = [
    ([5, 40, 1, 2, 3], []),
    ([7] * 5, []),
    ([], [(20, 20), (3, 30)]),
    ([33, 1], [(18, 18), (1, 17)]),
    ([150], [(90, 200)]),
    ([3, 700, 5, 690, 1, 700], [(3, 9)]),  # decode rows of very different lengths
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend_attends_all_kinds_of_steps(dtype):
    backend = TorchBackend()  # one backend for all steps and layers, which reuse its buffers at different sizes
    for decode, prefill in STEPS:
        check_step(backend, decode, prefill, dtype=dtype, windows=WINDOWS)
    with torch.inference_mode():
        check_step(backend, [300] * 4, [(20, 20)], dtype=dtype)
    check_step(backend, [5], [(4, 4)], dtype=dtype)
    check_step(backend, [150], [], block_size=256, dtype=dtype, windows=WINDOWS)  # not gathered


@pytest.mark.parametrize(
    ("lens", "window", "groups"),
    [
        ([7], 0, [[0]]),
        ([5, 9, 7], 0, [[1, 2, 0]]),  # so few tokens that one group is faster
        ([20, 6000, 20, 10], 0, [[1], [0, 2, 3]]),
        ([20, 6000, 20, 10], 30, [[1, 0, 2, 3]]),  # the window hides most of the long one
        ([900, 500, 1000, 490], 0, [[2, 0], [1, 3]]),
        ([3000] * 5, 0, [[0, 1], [2, 3], [4]]),  # 4 MiB hold 8192 tokens
    ],
)
def test_decode_rows_are_gathered_in_groups_of_similar_lengths(lens, window, groups):
    rows = PagedRows(torch.zeros(9, 1, dtype=torch.int32), torch.arange(len(lens)).int(), torch.tensor(lens).int())
    kv = PagedKV(torch.zeros(2, 16, 2, 64), torch.zeros(2, 16, 2, 64), window)
    assert [sorted(group.tolist()) for group in group_by_length(rows, kv)] == [sorted(group) for group in groups]


def test_one_long_sequence_takes_no_memory_for_others():
    backend = TorchBackend()
    check_step(backend, [2000, *[20] * 50], [])
    longest = 2000 * KV_HEADS * HEAD_DIM
    assert backend._buffers[0].numel() <= 1.25 * longest
    backend.free_buffers()
    assert backend._buffers is None
    check_step(backend, [20], [(4, 4)])


@pytest.mark.parametrize(
    ("blocks", "context", "window", "run"),
    [
        ([3], 4, 0, (12, 4)),
        ([3, 4, 5, 9], 10, 0, (12, 10)),  # the context ends before block 9
        ([3, 4, 5, 9], 13, 0, None),
        ([9, 4, 5], 11, 0, None),
        ([9, 4, 5], 11, 7, (16, 7)),  # the window starts after block 9
        ([9, 4, 5], 11, 6, (17, 6)),
        ([5, 4], 8, 0, None),
        ([3, 4], 6, 100, (12, 6)),
    ],
)
def test_tokens_of_one_sequence_are_a_run_if_the_blocks_it_sees_are_side_by_side(blocks, context, window, run):
    tables = torch.zeros(3, 4, dtype=torch.int32)
    tables[1, : len(blocks)] = torch.tensor(blocks)
    kv = PagedKV(torch.zeros(10, 4, 2, 8), torch.zeros(10, 4, 2, 8), window)
    one, two = (
        PagedRows(tables, torch.tensor([1] * n, dtype=torch.int32), torch.tensor([context] * n, dtype=torch.int32))
        for n in (1, 2)
    )
    assert find_run(one, kv) == run and find_run(two, kv) is None


def test_triton_backend_gives_each_kernel_its_rows(monkeypatch):
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    monkeypatch.setattr(triton_backend, "plan_decode_triton", plan_decode_torch)

    def fake_kernel(reference):
        return lambda *inputs, out, counters=None, plan=None, prefix=None: out.copy_(reference(*inputs))

    monkeypatch.setattr(triton_backend, "decode_attention_triton", fake_kernel(decode_attention_torch))
    monkeypatch.setattr(triton_backend, "prefill_attention_triton", fake_kernel(prefill_attention_torch))
    backend = triton_backend.TritonBackend(torch.device("cuda"))
    for decode, prefill in STEPS:
        check_step(backend, decode, prefill, windows=WINDOWS)


@pytest.mark.parametrize("lens", [(1, 1, 3, 3), (1, 1, 1, 1)])
def test_triton_backend_plans_all_layers_before_the_forward(monkeypatch, lens):
    """A kernel may read its plan before the previous kernel has finished, also in the last layer.

    Rows of one token each are not enough for the kernel without a plan, if attention treats some as prompts.
    """
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    planned, plans, decoded = [], [], []

    def plan_decode(lens, kv_heads, policy):
        planned.append(len(lens))
        return plan_decode_torch(lens, kv_heads, policy)

    monkeypatch.setattr(triton_backend, "plan_decode_triton", plan_decode)

    def decode_attention(q, kv, rows, scale, *, plan, **options):
        plans.append(plan)
        decoded.append(rows)

    monkeypatch.setattr(triton_backend, "decode_attention_triton", decode_attention)
    monkeypatch.setattr(triton_backend, "prefill_attention_triton", lambda *inputs, **options: None)
    backend = triton_backend.TritonBackend(torch.device("cuda"))
    contexts = torch.tensor([9, 5, 7, 3], dtype=torch.int32)  # two decode rows, two prompts
    cu_seqlens, num_tokens = torch.tensor([0, *lens]).cumsum(0), sum(lens)
    last_indices = cu_seqlens[1:] - 1
    ctx = Context(
        backend=backend,
        kv_kinds=(KVKind(KV_HEADS),),
        num_decode=2,
        rows=PagedRows(torch.zeros(10, 1, dtype=torch.int32), contexts, contexts),
        slot_mapping=torch.arange(num_tokens),
        counters=COUNTERS,
        cu_seqlens_q=cu_seqlens[2:].int(),
        last_indices=last_indices,
    )
    backend.prepare(ctx)
    assert sorted(planned) == [2, 4]
    qkv, cache = torch.zeros(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.zeros(1, 16, KV_HEADS, HEAD_DIM)
    transform, kv = QKTransform(HEADS, rope_table(HEAD_DIM, 64, 1e4), None, None, 1e-6), PagedKV(cache, cache)
    for indices in (None, None, last_indices):
        backend.store_and_attend(qkv, transform, torch.arange(num_tokens), kv, SCALE, ctx, indices)
    assert len(planned) == 2
    assert [plan.items[plan.items[:, 0] >= 0, 0].tolist() for plan in plans] == [[0, 1], [0, 1], [0, 2, 1, 3]]
    assert decoded[0] is decoded[1]  # slicing takes the host time: once a step, not in each layer
    assert [rows.context_lens.tolist() for rows in decoded[1:]] == [[9, 5], [9, 5, 7, 3]]


@pytest.mark.parametrize(
    ("decode", "prefill", "shared", "fused"),
    [
        ([5, 40, 16, 1], [], False, True),
        ([5, 40, 16, 1, 2], [], False, False),  # too many rows
        ([5], [(3, 30)], False, False),
        ([], [(1, 9)], False, False),
        ([5, 40], [], True, False),
    ],
)
@pytest.mark.parametrize("window", [0, 7])
def test_triton_backend_uses_one_kernel_for_a_few_decode_rows(monkeypatch, decode, prefill, shared, fused, window):
    """Output and cache equal those of the reference with one kernel and with several."""
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    calls = []

    def fake_kernel(reference, name):
        def run(*inputs, out=None, counters=None, plan=None, prefix=None):
            calls.append(name)
            attended = reference(*inputs)
            return attended if out is None else out.copy_(attended)

        return run

    for name, reference in (
        ("rope_decode_triton", rope_decode_torch),
        ("decode_attention_triton", decode_attention_torch),
        ("prefill_attention_triton", prefill_attention_torch),
    ):
        monkeypatch.setattr(triton_backend, name, fake_kernel(reference, name))
    shared_plan = SimpleNamespace() if shared else None
    monkeypatch.setattr(triton_backend, "shared_attention_triton", lambda *inputs: calls.append("shared"))
    monkeypatch.setattr(triton_backend, "plan_decode_triton", plan_decode_torch)
    lens = [1] * len(decode) + [n for n, _ in prefill]
    contexts = [*decode, *(context for _, context in prefill)]
    paged = make_paged(contexts, KV_HEADS, HEAD_DIM, 16, torch.float32, CPU, window=window, queries=lens)
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(sum(lens), (HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=generator)
    q_weight, k_weight = torch.randn(2, HEAD_DIM, generator=generator)
    transform = QKTransform(HEADS, rope_table(HEAD_DIM, 64, 1e4), q_weight, k_weight, 1e-6)
    positions = torch.cat([torch.arange(end - n, end) for n, end in zip(lens, contexts, strict=True)])
    rows = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    mapping = slot_mapping(paged.kv, paged.rows.block_tables, paged.rows.slots[rows].long(), positions)
    results = []
    for backend in (TorchBackend(), triton_backend.TritonBackend(torch.device("cuda"))):
        ctx = Context(
            backend=backend,
            kv_kinds=(KVKind(KV_HEADS, window),),
            num_decode=len(decode),
            rows=paged.rows,
            slot_mapping=mapping,
            counters=COUNTERS,
            cu_seqlens_q=torch.tensor([0, *lens]).cumsum(0).int()[len(decode) :] if prefill else None,
            shared=shared_plan,
        )
        kv = paged.copy_kv()
        backend.prepare(ctx)
        out = backend.store_and_attend(qkv, transform, positions, kv, SCALE, ctx)
        results.append((out, kv.k_cache, kv.v_cache))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert ("rope_decode_triton" in calls) == fused
    assert ("shared" in calls) == (shared and not window)  # the window hides the prefix
    assert len(calls) == bool(decode) + bool(prefill) + ("shared" in calls)


def check_int32(rows, *tensors, width=None):
    for x in tensors:
        assert x.dtype == torch.int32 and x.is_contiguous() and len(x) == rows
        assert x.ndim == (1 if width is None else 2)


def windowed(k_cache, v_cache, window_size):
    """Return caches with FlashAttention's window: the numbers of tokens before and after a query, -1 for all."""
    before, after = window_size
    assert (before, after) == (-1, -1) or (before >= 0 and after == 0)
    return PagedKV(k_cache, v_cache, before + 1)


def fake_flash_attn_2():
    """Return a module with FlashAttention-2's two paged functions, which call the torch references."""

    def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal, window_size):
        assert causal and q.shape[1] == 1 and q.ndim == 4
        check_int32(len(q), cache_seqlens)
        check_int32(len(q), block_table, width=block_table.shape[1])
        rows = PagedRows(block_table, torch.arange(len(q)), cache_seqlens)
        out = decode_attention_torch(q[:, 0], windowed(k_cache, v_cache, window_size), rows, softmax_scale)
        return out[:, None]

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, **options):
        assert options.pop("causal") and q.ndim == 3 and cu_seqlens_q[0] == cu_seqlens_k[0] == 0
        check_int32(len(block_table) + 1, cu_seqlens_q, cu_seqlens_k)
        check_int32(len(block_table), block_table, width=block_table.shape[1])
        context_lens = cu_seqlens_k.diff()
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(context_lens.max()))
        rows = PagedRows(block_table, torch.arange(len(context_lens)), context_lens)
        kv = windowed(k, v, options.pop("window_size"))
        return prefill_attention_torch(q, kv, rows, cu_seqlens_q, options.pop("softmax_scale"))

    module = ModuleType(FLASH2)
    module.flash_attn_with_kvcache, module.flash_attn_varlen_func = with_kvcache, varlen
    return module


def fake_flash_attn_3(calls):
    """Return a module with FlashAttention-3's paged function, which calls the torch reference.

    Args:
        calls: the function appends its max_seqlen_q.
    """

    def with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, num_splits, **options
    ):
        num_rows = len(page_table)
        assert options.pop("causal") and q.ndim == 3 and cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q)
        check_int32(num_rows, cache_seqlens)
        check_int32(num_rows + 1, cu_seqlens_q)
        check_int32(num_rows, page_table, width=page_table.shape[1])
        assert type(max_seqlen_q) is int and max_seqlen_q >= cu_seqlens_q.diff().max()
        assert type(num_splits) is int and num_splits >= 1
        calls.append(max_seqlen_q)
        rows = PagedRows(page_table, torch.arange(num_rows), cache_seqlens)
        kv = windowed(k_cache, v_cache, options.pop("window_size"))
        return prefill_attention_torch(q, kv, rows, cu_seqlens_q, options.pop("softmax_scale"))

    module = ModuleType(FLASH3)
    module.flash_attn_with_kvcache = with_kvcache
    return module


@pytest.fixture
def install(monkeypatch):
    """Return a function that installs fakes of the named FlashAttention modules only, on a card of `capability`."""

    def install(*names, capability=(9, 0)):
        for package in PACKAGES:
            fake = fake_flash_attn_2() if package.version == 2 else fake_flash_attn_3([])
            monkeypatch.setitem(sys.modules, package.module, fake if package.module in names else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return install


def test_flash_attn_2_receives_its_arguments():
    backend = FlashAttn2Backend(fake_flash_attn_2())
    assert backend.capturable and not backend.capturable_prefill
    for decode, prefill in STEPS:
        check_step(backend, decode, prefill, block_size=256, windows=WINDOWS)


@pytest.mark.parametrize(("whole_tiles", "block_size"), [(False, 16), (True, 128)])
def test_flash_attn_3_receives_its_arguments(whole_tiles, block_size):
    for decode, prefill in STEPS:
        calls = []
        backend = FlashAttn3Backend(fake_flash_attn_3(calls), whole_tiles)
        assert backend.capturable and backend.capturable_prefill
        check_step(backend, decode, prefill, block_size=block_size, windows=WINDOWS)
        longest = [1] * bool(decode) + [max((n for n, _ in prefill), default=0)] * bool(prefill)
        if whole_tiles:  # more queries than fit in a tile of 192
            longest = [max(n, 192 // (HEADS // KV_HEADS) + 1) for n in longest]
        assert calls == len(WINDOWS) * longest


def test_memory_of_flash_attn_3_splits_is_bounded():
    def splits_on_h100(num_rows, num_tokens, heads, kv_heads):
        return num_splits(num_rows, num_tokens, heads, kv_heads, num_sms=132)

    assert splits_on_h100(1, 1, 32, 8) == 32  # so that one row fills the card
    assert splits_on_h100(256, 256, 32, 8) == 1  # many rows fill the card without splits
    assert splits_on_h100(4, 16384, 32, 8) == 1
    for kv_heads in (1, 2, 8):
        for group in (1, 4, 8):
            heads = group * kv_heads
            for num_tokens in (1, 7, 64, 500, 2000, 16384):
                splits = splits_on_h100(1, num_tokens, heads, kv_heads)
                num_bytes = splits * num_tokens * heads * 128 * 4
                assert splits == 1 or num_bytes <= 40 << 20


@pytest.mark.parametrize(
    ("installed", "capability", "head_dim", "block_size", "dtype", "expected"),
    [
        ((FLASH2, FLASH3, FLASH3_BY_TILE), (9, 0), 128, 64, torch.bfloat16, "flash-attn-3"),
        ((FLASH2, FLASH3_BY_TILE), (9, 0), 128, 256, torch.bfloat16, "fa3-fwd"),
        ((FLASH3_BY_TILE,), (9, 0), 40, 128, torch.bfloat16, "fa3-fwd"),
        ((FLASH2, FLASH3_BY_TILE), (9, 0), 128, 256, torch.float16, "flash-attn"),
        ((FLASH2, FLASH3_BY_TILE), (9, 0), 256, 256, torch.bfloat16, "flash-attn"),
        ((FLASH2, FLASH3, FLASH3_BY_TILE), (8, 0), 128, 256, torch.bfloat16, "flash-attn"),
        ((FLASH2, FLASH3, FLASH3_BY_TILE), (10, 0), 128, 256, torch.bfloat16, "flash-attn"),
        ((FLASH3,), (10, 0), 128, 256, torch.bfloat16, "flash-attn-3: needs a card of compute capability 9.0, not 10"),
        ((FLASH2,), (7, 5), 128, 256, torch.float16, "flash-attn: needs a card of compute capability 8.0 or more"),
        ((FLASH3_BY_TILE,), (9, 0), 128, 64, torch.bfloat16, "fa3-fwd: block_size=64 must be a multiple of 128"),
        ((FLASH3_BY_TILE,), (9, 0), 128, 128, torch.float16, "fa3-fwd: dtype=torch.float16 must be torch.bfloat16"),
        ((FLASH3_BY_TILE,), (9, 0), 256, 128, torch.bfloat16, "fa3-fwd: head_dim=256 must be at most 64, or from 97"),
        ((FLASH3,), (9, 0), 20, 16, torch.bfloat16, "flash-attn-3: head_dim=20 must be a multiple of 8"),
        ((FLASH2,), (9, 0), 128, 64, torch.bfloat16, "flash-attn: block_size=64 must be a multiple of 256"),
    ],
)
def test_first_flash_attn_package_that_fits_is_used(
    monkeypatch, install, installed, capability, head_dim, block_size, dtype, expected
):
    install(*installed, capability=capability)
    if ":" in expected:
        with pytest.raises(ValueError, match=expected):
            choose_package(CUDA, head_dim, block_size, dtype)
        monkeypatch.setattr(attention, "HAVE_TRITON", False)
        assert select_backend("auto", "cuda", head_dim, block_size, dtype).name == "torch"
    else:
        package, module = choose_package(CUDA, head_dim, block_size, dtype)
        assert package.name == expected and module is sys.modules[package.module]


def test_flash_attn_4_is_not_mistaken_for_flash_attn_2(install, monkeypatch):
    install()
    monkeypatch.setitem(sys.modules, FLASH2, ModuleType(FLASH2))
    with pytest.raises(ImportError, match=r"flash-attn-3 .*, fa3-fwd .*, flash-attn .*flash_attn_with_kvcache"):
        select_backend("flash_attn", "cuda", 128, 256, torch.bfloat16)


def test_auto_on_a_cpu_chooses_torch_and_logs_it(caplog):
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
def test_auto_on_a_gpu_chooses_an_installed_backend_that_fits(
    monkeypatch, install, have_triton, have_flash, head_dim, block_size, expected
):
    monkeypatch.setattr(attention, "HAVE_TRITON", have_triton)
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", have_triton)
    if have_flash:
        install(FLASH2)
    else:
        install()
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
        ("flash_attn", "cpu", 256, torch.bfloat16, ValueError, "needs a CUDA device"),
        ("flash_attn", "cuda", 256, torch.bfloat16, ImportError, "needs one of the packages flash-attn-3 .*, fa3-fwd"),
    ],
)
def test_unsupported_named_backend_raises(monkeypatch, install, name, device, block_size, dtype, error, message):
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    install()
    with pytest.raises(error, match=message):
        select_backend(name, device, 64, block_size, dtype)


@pytest.mark.parametrize(("capability", "allowed"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_caches_need_a_gpu_with_fp8(monkeypatch, capability, allowed):
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", True)
    monkeypatch.setattr(attention, "HAVE_TRITON", False)  # no other backend is chosen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    arguments = "auto", "cuda", 128, 64, torch.bfloat16, torch.float8_e4m3fn
    if allowed:
        assert select_backend(*arguments).name == "triton"
    else:
        with pytest.raises(
            ValueError, match=r"kv_cache_dtype='fp8' needs a GPU with FP8 .*, got a GPU with 8\.\d; use"
        ):
            select_backend(*arguments)


def test_large_head_dim_or_missing_triton_is_named(monkeypatch):
    with pytest.raises(ValueError, match="head_dim=512 must be at most 256"):
        select_backend("triton", "cuda", 512, 16, torch.bfloat16)
    monkeypatch.setattr(triton_backend, "HAVE_TRITON", False)
    with pytest.raises(ImportError, match="needs the triton package"):
        select_backend("triton", "cuda", 64, 16, torch.bfloat16)
