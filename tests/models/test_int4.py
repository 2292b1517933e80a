"""Weights of quantized GGUF files in 4 or 8 bits on a CPU."""

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.moe import Router
from nanovllm.ops.linear.reference import linear_torch
from nanovllm.ops.norm_rope import reference
from nanovllm.weights.formats import Plain, Table
from nanovllm.weights.int4_int8 import (
    Int4,
    Int8,
    Int8Table,
    is_supported,
    quantize_4_bits,
    quantize_8_bits,
    with_compression,
)
from tests.helpers import engine, greedy, prompts_of, tokens
from tests.models.test_gguf import write_gguf
from tests.models.tiny import separate_experts, tiny_model

needs_gemm = pytest.mark.skipif(not is_supported(), reason="needs AVX2 or AVX512")
ROWS, COLUMNS = 48, 96
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 144}
# The largest error of a GEMM, relative to its largest output. That of 4 bits has inputs, scales and output in bfloat16.
BOUNDS = {Int4: 0.02, Int8: 0.008}


def random_weight(rows=ROWS, columns=COLUMNS):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized(kind, rows=ROWS, columns=COLUMNS):
    """Return random weights of a GGUF type, dequantized by the gguf package."""
    kind = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quantize(random_weight(rows, columns).numpy(), kind)
    return torch.from_numpy(np.array(gguf.dequantize(blocks, kind)))


def q4_k(rows=16, columns=256):
    """Return weights of random blocks of the type Q4_K, which the gguf package cannot quantize."""
    kind = gguf.GGMLQuantizationType.Q4_K
    block = np.random.default_rng(0).integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    block[..., :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)
    return torch.from_numpy(np.array(gguf.dequantize(block.reshape(rows, -1), kind)))


def parameter(weight):
    return nn.Parameter(weight.clone(), requires_grad=False)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_weights_of_4_bit_types_are_recovered(kind):
    weight = quantized(kind)
    groups = quantize_4_bits(weight)
    assert groups is not None and groups.q.max() <= 15
    torch.testing.assert_close(groups.dequantized(), weight, rtol=0, atol=4e-7)


def test_weights_of_q4_k_are_recovered():
    weight = q4_k()
    groups = quantize_4_bits(weight)
    assert groups is not None
    torch.testing.assert_close(groups.dequantized(), weight, rtol=1e-6, atol=1e-6 * float(weight.abs().max()))


def test_groups_of_few_values_are_recovered():
    weight = torch.zeros(16, 64)
    weight[0] = 3.5
    weight[1, 7] = -2.0
    weight[2, ::3], weight[2, 1::3] = 0.25, 1.0
    groups = quantize_4_bits(weight)
    assert groups is not None and torch.equal(groups.dequantized(), weight)


@pytest.mark.parametrize("weight", [random_weight(), quantized("Q8_0")], ids=["random", "Q8_0"])
def test_other_weights_do_not_get_4_bits(weight):
    assert quantize_4_bits(weight) is None


def test_weights_of_q8_0_are_recovered():
    weight = quantized("Q8_0")
    torch.testing.assert_close(quantize_8_bits(weight).dequantized(), weight, rtol=0, atol=2e-6)


def test_other_weights_lose_at_most_half_a_step_of_8_bits():
    weight = random_weight()
    error = (quantize_8_bits(weight).dequantized() - weight).unflatten(1, (-1, 32)).abs().amax(2)
    assert (error <= weight.unflatten(1, (-1, 32)).abs().amax(2) * (1 / 254 + 1e-6)).all()


@needs_gemm
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 40])
def test_gemm_is_near_that_of_the_dequantized_weight(kind, is_head, num_tokens):
    weight, x = quantized(kind), torch.randn(num_tokens, COLUMNS, generator=torch.Generator().manual_seed(1))
    format = with_compression(Plain(parameter(weight)), is_head).finish_loading()
    assert type(format) is (Int8 if is_head and kind == "Q8_0" else Int4) and not format.weight.numel()
    bias, residual, expected = random_weight()[:, 0], torch.ones(num_tokens, ROWS), F.linear(x, weight)
    atol = BOUNDS[type(format)] * float(expected.abs().max()) if num_tokens else 0
    torch.testing.assert_close(format.linear(x), expected, atol=atol, rtol=0)
    torch.testing.assert_close(format.linear(x, bias), expected + bias, atol=atol, rtol=0)
    assert format.linear_add(x, bias, residual) is residual
    torch.testing.assert_close(residual, expected + bias + 1, atol=atol, rtol=0)


@needs_gemm
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("gated", [False, True])
def test_gemm_with_norm_and_swiglu_is_near_the_reference(kind, gated):
    weight, scales = quantized(kind), torch.tensor([[1e-3], [1.0], [100.0]])
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)) * scales
    norm, before = (random_weight()[0] + 2, 1e-5), x.clone()
    format = with_compression(Plain(parameter(weight)), is_head=True).finish_loading()
    expected = linear_torch(x, weight, norm=norm, gated=gated)
    atol = 2 * BOUNDS[type(format)] * float(expected.abs().max())
    torch.testing.assert_close(format.linear(x, norm=norm, gated=gated), expected, atol=atol, rtol=0)
    assert torch.equal(x, before)


@needs_gemm
def test_8_bits_with_factors_keep_rows_and_columns_of_all_sizes_and_zeros():
    weight, x = random_weight() * 1.5 ** torch.arange(-24, 24)[:, None], torch.ones(3, COLUMNS)
    weight[:, 5] *= 30
    weight[3], weight[:, 7], x[1] = 0, 0, 0
    format = with_compression(Plain(parameter(weight)), is_head=True).finish_loading()
    assert isinstance(format, Int8)
    y, expected = format.linear(x), F.linear(x, weight)
    assert ((y - expected).abs() <= BOUNDS[Int8] * weight.abs().sum(1)).all() and not y[1].any() and not y[:, 3].any()


@needs_gemm
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_token_does_not_depend_on_the_others(kind):
    format = with_compression(Plain(parameter(quantized(kind))), is_head=True).finish_loading()
    x = random_weight(40)
    torch.testing.assert_close(format.linear(x)[7:8], format.linear(x[7:8]), atol=1e-5, rtol=2**-7)


@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (48, 80)])
def test_weight_that_the_gemm_cannot_read_is_kept_as_it_is(rows, columns):
    weight = random_weight(rows, columns)
    format = with_compression(Plain(parameter(weight))).finish_loading()
    assert not isinstance(format, Int4)
    torch.testing.assert_close(format.linear(random_weight(3, columns)), F.linear(random_weight(3, columns), weight))


@pytest.mark.parametrize("start", [0, 10])
def test_compressed_table_returns_the_rows_and_zeros_outside(start):
    weight, ids = quantized("Q8_0"), torch.tensor([10, 12, 47, 9, 57, 10])
    table = with_compression(Table(parameter(weight))).finish_loading()
    assert isinstance(table, Int8Table) and not table.weight.numel()
    inside = (ids >= start) & (ids < start + ROWS)
    expected = weight[torch.where(inside, ids - start, 0)] * inside[:, None]
    torch.testing.assert_close(table.rows(ids, start), expected, atol=2e-6, rtol=0)


def gguf_file(folder, name, seed=0):
    return write_gguf(folder / f"{name}-{seed}.gguf", tiny_model(name, seed, **SIZES), quantize=True)


def formats(llm):
    modules = llm.llm_engine.executor.runner.model.modules()
    return {type(module.format) for module in modules if hasattr(module, "format")}


def logprobs(entries):
    """Return the logprobs of the tokens of an output; the first token of a prompt has none."""
    return [token.logprob for entry in entries if entry for token in entry.values()]


@needs_gemm
@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_updated_weights_are_those_of_a_fresh_load(tmp_path, name):
    old, new = (gguf_file(tmp_path, name, seed) for seed in range(2))
    prompts = prompts_of([5, 20, 33])
    with engine(new) as llm:
        assert formats(llm) == {Int4, Int8, Int8Table}
        want = tokens(llm, prompts, greedy(12))
    with engine(old) as llm:
        before = tokens(llm, prompts, greedy(12))
        assert before != want
        llm.update_weights(new)
        assert tokens(llm, prompts, greedy(12)) == want
        llm.sleep(level=2)
        llm.wake_up()
        llm.update_weights(old)
        assert tokens(llm, prompts, greedy(12)) == before
        assert formats(llm) == {Int4, Int8, Int8Table}


@needs_gemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defaults_of_the_caller_do_not_change_the_tokens(tmp_path, dtype):
    path, prompts = gguf_file(tmp_path, "llama"), prompts_of([5, 20, 33])
    with engine(path) as llm:
        want = tokens(llm, prompts, greedy(12))
    reference._scalar.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with engine(path) as llm:
            assert tokens(llm, prompts, greedy(12)) == want
            torch.set_default_device("meta")
            llm.update_weights(path)
            assert tokens(llm, prompts, greedy(12)) == want
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@needs_gemm
def test_a_mixture_of_experts_keeps_its_experts_and_routers_and_compresses_the_rest(tmp_path):
    runs = []
    # 15 experts and the shared one's gate are 16 rows of a router, which torch's GEMM could read.
    model = tiny_model("qwen2-moe", **SIZES, moe_intermediate_size=32, num_experts=15)
    path = write_gguf(tmp_path / "moe.gguf", model, quantize=True)
    for dtype in ("auto", "float32"):
        with engine(path, dtype=dtype) as llm:
            runs.append(
                logprobs(
                    llm.generate(prompts_of([30]), greedy(1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs
                )
            )
            assert (Int4 in formats(llm)) == (dtype == "auto")
            routers = [m for m in llm.llm_engine.executor.runner.model.modules() if isinstance(m, Router)]
            assert routers and not any(isinstance(router.format, Int4) for router in routers)
    assert runs[0] == pytest.approx(runs[1], abs=0.1)


@needs_gemm
def test_trained_weights_update_a_compressed_model(tmp_path):
    model = tiny_model("llama", 1, **SIZES)
    with engine(gguf_file(tmp_path, "llama", 1)) as llm:
        want = tokens(llm, prompts_of([5, 20]), greedy(12))
    with engine(gguf_file(tmp_path, "llama", 0)) as llm:
        llm.update_weights((name, tensor.bfloat16()) for name, tensor in separate_experts(model.state_dict()).items())
        assert formats(llm) == {Int4, Int8, Int8Table}
        assert len(tokens(llm, prompts_of([5, 20]), greedy(12))[0]) == len(want[0])


@needs_gemm
def test_prompts_and_decoded_tokens_in_one_step_give_the_same_logprobs(tmp_path):
    prompts = prompts_of([5, 70, 33, 9])
    with engine(gguf_file(tmp_path, "llama"), max_num_batched_tokens=32, max_num_seqs=3) as llm:
        mixed = llm.generate(prompts, greedy(10, logprobs=0), use_tqdm=False)
    with engine(gguf_file(tmp_path, "llama"), enable_prefix_caching=False) as llm:
        alone = [llm.generate([prompt], greedy(10, logprobs=0), use_tqdm=False)[0] for prompt in prompts]
    for a, b in zip(mixed, alone, strict=True):
        assert a.token_ids == b.token_ids
        assert logprobs(a.logprobs) == pytest.approx(logprobs(b.logprobs), abs=0.05)


@needs_gemm
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}])
def test_a_given_dtype_dequantizes_the_weights(tmp_path, options):
    with engine(gguf_file(tmp_path, "llama"), **options) as llm:
        assert not formats(llm) & {Int4, Int8, Int8Table}


@needs_gemm
def test_logprobs_are_near_those_of_the_dequantized_model(tmp_path):
    path, prompts = gguf_file(tmp_path, "qwen2-tied"), prompts_of([40, 60])
    runs = []
    for dtype in ("auto", "float32"):
        with engine(path, dtype=dtype) as llm:
            outputs = llm.generate(prompts, greedy(1, prompt_logprobs=0), use_tqdm=False)
        runs.append([logprob for out in outputs for logprob in logprobs(out.prompt_logprobs)])
    assert runs[0] == pytest.approx(runs[1], abs=0.1) and runs[0] != runs[1]


@needs_gemm
def test_two_ranks_give_the_tokens_of_one(tmp_path):
    path, prompts = gguf_file(tmp_path, "qwen2-tied"), prompts_of([5, 20])
    with engine(path) as llm:
        want = tokens(llm, prompts, greedy(6))
    with engine(path, tensor_parallel_size=2) as llm:
        assert tokens(llm, prompts, greedy(6)) == want
