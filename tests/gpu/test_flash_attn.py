"""Compare FlashAttention's real packages with the torch references and other backends, if one fits."""

import pytest
import torch

from nanovllm import LLM
from nanovllm.attention.flash_attn_backend import choose_package, flash_attn_backend
from nanovllm.ops.attention.paged_cache import PagedKV
from nanovllm.ops.attention.reference import decode_attention_torch, prefill_attention_torch
from nanovllm.utils.context import Context
from tests.engine.reference import load_reference
from tests.gpu.test_gpu import assert_likeliest, greedy, prompts_of, tokens
from tests.kernels.paged import assert_close, make_paged
from tests.models.tiny import save_tiny

BLOCK_SIZE = 256  # the smallest size that all packages support
DTYPE = torch.bfloat16


def skip_reason() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        choose_package(torch.device("cuda"), 64, BLOCK_SIZE, DTYPE)
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())


def check_attention(backend, q, paged, lens, num_decode, scale):
    """Compare `backend` with the torch references on rows of `lens` tokens."""
    lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    cu_seqlens = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    ctx = Context(
        backend=backend,
        kv_kinds=(paged.kv.kind,),
        num_decode=num_decode,
        rows=paged.rows,
        slot_mapping=torch.empty(0, dtype=torch.int64),
        counters=torch.zeros(1, dtype=torch.int32),
    )
    if num_decode < len(lens):
        ctx.cu_seqlens_q = cu_seqlens[num_decode:]
        ctx.max_seqlen_q = int(lens[num_decode:].max())
        ctx.max_context_len = int(paged.rows.context_lens[num_decode:].max())
    backend.prepare(ctx)
    expected = torch.empty_like(q)
    if num_decode:
        expected[:num_decode] = decode_attention_torch(q[:num_decode], paged.kv, paged.rows[:num_decode], scale)
    if num_decode < len(lens):
        expected[num_decode:] = prefill_attention_torch(
            q[num_decode:], paged.kv, paged.rows[num_decode:], cu_seqlens[num_decode:] - num_decode, scale
        )
    assert_close(backend.attend(q, paged.kv, scale, ctx), expected)


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("window", [0, 1, 100])
def test_kernels_equal_the_references(head_dim, group, window):
    try:
        backend = flash_attn_backend(torch.device("cuda"), head_dim, BLOCK_SIZE, DTYPE)
    except ValueError as error:
        pytest.skip(str(error))
    kv_heads, generator = 2, torch.Generator("cuda").manual_seed(0)
    steps = [
        ([1, 5, 256, 257, 1000], []),
        ([700] * 40, []),
        ([], [(1, 1), (130, 130), (3, 1500), (700, 900)]),
        ([300, 2], [(64, 2000), (1, 257), (17, 17)]),
    ]
    for decode, prefill in steps:
        lens = [1] * len(decode) + [n for n, _ in prefill]
        paged = make_paged(decode + [n for _, n in prefill], kv_heads, head_dim, BLOCK_SIZE, DTYPE)
        paged.kv = PagedKV(paged.kv.k_cache, paged.kv.v_cache, window)
        for cache in (paged.kv.k_cache, paged.kv.v_cache):
            cache.nan_to_num_(0.0)  # as in an engine, where values after a row's end are finite
        q = torch.randn(sum(lens), kv_heads * group, head_dim, device="cuda", generator=generator).to(DTYPE)
        check_attention(backend, q, paged, lens, len(decode), head_dim**-0.5)


def test_tokens_are_the_likeliest_with_every_schedule(tmp_path):
    """Run with and without graphs, chunked prefill and prefix caching, and compare with Triton's kernels."""
    path = save_tiny(tmp_path, "qwen3-yarn", head_dim=64, max_position_embeddings=2048)
    model = load_reference(path)
    common = prompts_of([600])[0]
    prompts = prompts_of([1, 20, 257, 300], seed=1)
    prompts += [common + suffix for suffix in prompts_of([5, 40, 130], seed=2)]
    options = dict(dtype="bfloat16", device="cuda", kvcache_block_size=BLOCK_SIZE, max_model_len=1024, max_num_seqs=8)
    options |= dict(num_kvcache_blocks=64, attention_backend="flash_attn", max_num_batched_tokens=4096)
    changes = [
        {},
        dict(enforce_eager=True),
        dict(max_num_batched_tokens=100),
        dict(enable_prefix_caching=False),
        dict(attention_backend="triton"),
    ]
    first_tokens = []
    for change in changes:
        with LLM(path, **options | change) as llm:
            runner = llm.llm_engine.executor.runner
            assert bool(runner.graphs) == ("enforce_eager" not in change)
            if runner.graphs:
                assert bool(runner.graphs.mixed) == runner.backend.capturable_prefill
            assert_likeliest(model, llm.generate(prompts, greedy(40), use_tqdm=False))
            outputs = llm.generate(prompts, greedy(40), use_tqdm=False)
            assert_likeliest(model, outputs)
            assert change.get("enable_prefix_caching", True) == (outputs[-1].num_cached_tokens >= 512)
            first_tokens.append([output.token_ids[0] for output in outputs])
    # Only first tokens are compared, because later ones depend on them. One of them may be a near tie.
    for tokens_of_change in first_tokens[1:]:
        equal = [a == b for a, b in zip(first_tokens[0], tokens_of_change, strict=True)]
        assert sum(equal) >= len(prompts) - 1


def test_captured_step_is_correct_for_contexts_of_all_lengths(tmp_path):
    """The same graphs serve contexts from the first token to `max_model_len`, and any number of rows."""
    path = save_tiny(tmp_path, "llama", head_dim=64, max_position_embeddings=4096)
    model = load_reference(path)
    options = dict(dtype="bfloat16", device="cuda", kvcache_block_size=BLOCK_SIZE, max_model_len=4096, max_num_seqs=16)
    with LLM(path, num_kvcache_blocks=80, attention_backend="flash_attn", **options) as llm:
        for lengths in ([1], [4000], [3, 4050, 700], range(1, 900, 60)):
            prompts = prompts_of(lengths, seed=3)
            assert_likeliest(model, llm.generate(prompts, greedy(30), use_tqdm=False))
            assert tokens(llm, prompts[:1], greedy(1))
