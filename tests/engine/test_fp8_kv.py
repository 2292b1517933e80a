"""Keys and values in FP8, with the reference backend on a CPU: schedules change nothing, and logits stay close."""

import pytest
import torch

from benchmarks.fp8_kv import use_fp8_kv
from nanovllm import LLM
from nanovllm.config import Config
from tests.helpers import assert_nothing_held, engine, greedy, prompts_of, sampled, tokens
from tests.models.tiny import save_tiny


@pytest.fixture(scope="module", params=["qwen3", "qwen3.5", "mistral-window"])
def model(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), request.param)


def test_chunks_prefixes_and_preemption_do_not_change_the_tokens(model):
    prompts = prompts_of([3, 40, 20, 70, 33])
    params = [sampled(20, seed=i) for i in range(len(prompts))]
    with engine(model) as llm:
        use_fp8_kv(llm)
        want = tokens(llm, prompts, params)
        assert tokens(llm, prompts, params) == want  # cached
        assert_nothing_held(llm)
    for change in (dict(max_num_batched_tokens=16), dict(num_kvcache_blocks=12)):
        with engine(model, **change) as llm:
            use_fp8_kv(llm)
            assert tokens(llm, prompts, params) == want


def test_logprobs_stay_close_to_those_of_float32(model):
    prompts = prompts_of([50, 64])
    logprobs = []
    for quantize in (False, True):
        with engine(model) as llm:
            if quantize:
                use_fp8_kv(llm)
            outputs = llm.generate(prompts, greedy(1, prompt_logprobs=0), use_tqdm=False)
            rows = [row for output in outputs for row in output.prompt_logprobs if row is not None]
            logprobs.append(torch.tensor([entry.logprob for row in rows for entry in row.values()]))
    difference = (logprobs[0] - logprobs[1]).abs() / logprobs[0].std()
    assert 1e-3 < difference.mean() < 0.1, difference


def test_fp8_halves_the_bytes_of_a_block(model):
    with engine(model) as llm:
        pool = llm.llm_engine.executor.runner.pool
        specs = [spec for _, spec in pool.paged]
        wide = pool.block_bytes
        use_fp8_kv(llm)
        pool = llm.llm_engine.executor.runner.pool
        numbers = sum(2 * 16 * spec.num_kv_heads * spec.head_dim for spec in specs)
        scales = sum(2 * 16 * spec.num_kv_heads for spec in specs)
        assert wide == 4 * numbers and pool.block_bytes == numbers + 2 * scales
        kvs = [layer.kv for layer, _ in pool.paged]
        allocated = sum(kv.k_cache.nbytes + kv.v_cache.nbytes + kv.scales.nbytes for kv in kvs)
        assert allocated == pool.block_bytes * (llm.llm_engine.executor.runner.sizes.num_blocks + 1)


@pytest.mark.parametrize("spelling", ["fp8", "fp8_e4m3"])
def test_engines_on_a_cpu_refuse_fp8(tmp_path, spelling):
    with pytest.raises(ValueError, match=r"kv_cache_dtype='fp8' needs a GPU with FP8 .*; on a CPU use 'auto'"):
        LLM(tmp_path, device="cpu", kv_cache_dtype=spelling)


@pytest.mark.parametrize("value", [None, "auto"])
def test_the_default_is_the_dtype_of_activations(value):
    config = Config(device="cpu", kv_cache_dtype=value)
    assert config.kv_cache_dtype == "auto" and config.torch_kv_dtype(torch.bfloat16) == torch.bfloat16


def test_flash_attn_and_unknown_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Config(kv_cache_dtype="fp8_e4m3").torch_kv_dtype(torch.float16) == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="needs attention_backend='triton' or 'auto', got 'flash_attn'"):
        Config(kv_cache_dtype="fp8", attention_backend="flash_attn")
    for value in ("fp8_e5m2", "int8"):
        with pytest.raises(ValueError, match=f"kv_cache_dtype must be one of the strings auto, fp8, got '{value}'"):
            Config(kv_cache_dtype=value)
