"""FP8 weights in whole models on a GPU: near the dequantized weights, updated, quantized while loading."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.ops.float8 import FP8
from nanovllm.weights.fp8 import Fp8, Fp8Experts
from tests.helpers import greedy, prompts_of, tokens
from tests.models.fp8 import blocks, compressed, quantized, write_scheme
from tests.models.tiny import save_tiny, separate_experts

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU from Ada on"
)

OPTIONS = {
    "device": "cuda",
    "dtype": "bfloat16",
    "kvcache_block_size": 16,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "num_kvcache_blocks": 256,
}
# Sizes that are no multiples of 128, and the bound: the mean difference of log-probabilities of tokens by their
# standard deviation. References of the kernels on a CPU have about half of it. Tiny random models amplify errors,
# routers and recurrent layers most of all.
MODELS = {
    "llama-bias": ({"hidden_size": 272, "head_dim": 64, "intermediate_size": 384}, 0.12),
    "qwen3-moe": ({"hidden_size": 256, "head_dim": 32, "moe_intermediate_size": 144}, 0.25),
    "qwen3.5-moe": (
        {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 96},
        0.5,
    ),
}
FORMATS = {"blocks": blocks(), "rows": compressed()}


def save_models(folder, name, options, seed=0):
    """Save a model in FP8, dequantized, and as it was. Its weights are small, so that errors do not grow much."""
    paths = [save_tiny(folder / f"{kind}-{seed}", name, seed, **MODELS[name][0]) for kind in ("fp8", "plain", "bf16")]
    weights = load_file(paths[0] / "model.safetensors")
    small = {key: (tensor * 0.3 if tensor.ndim == 2 else tensor).bfloat16() for key, tensor in weights.items()}
    checkpoint, plain = quantized(separate_experts(small), options)
    for path, tensors in zip(paths, (checkpoint, plain, small), strict=True):
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    write_scheme(paths[0], options)
    return paths


def logprobs(llm, prompts):
    """Return the log-probabilities of the prompts' tokens."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return torch.tensor(
        [out.prompt_logprobs[i][token].logprob for out in outputs for i, token in enumerate(out.prompt_token_ids) if i]
    )


def relative_difference(got, want):
    return ((got - want).abs().mean() / want.std()).item()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_fp8_weights_give_log_probabilities_near_those_of_dequantized_weights(tmp_path, name, kind):
    path, plain_path, _ = save_models(tmp_path, name, FORMATS[kind])
    bound, prompts = MODELS[name][1], prompts_of([200, 130, 3])
    # Steps of up to 4, 64 and more tokens have kernels of their own; those of more quantize activations.
    for max_num_batched_tokens, max_num_seqs in ((4, 2), (64, 8), (256, 8)):
        options = OPTIONS | {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
        with LLM(plain_path, **options) as llm:
            want = logprobs(llm, prompts)
        with LLM(path, **options) as llm:
            modules = llm.llm_engine.executor.runner.model.modules()
            formats = {type(getattr(module, "format", None)) for module in modules}
            assert Fp8 in formats and (Fp8Experts in formats) == ("moe" in name)
            difference = relative_difference(logprobs(llm, prompts), want)
        print(f"{name} {kind}, steps of {max_num_batched_tokens} tokens: {difference:.4f} (bound {bound})")
        assert difference < bound, max_num_batched_tokens


@pytest.mark.parametrize("name", MODELS)
def test_updated_quantized_and_woken_weights_are_those_of_a_fresh_load(tmp_path, name):
    old, new = (save_models(tmp_path, name, blocks(), seed) for seed in range(2))
    options, prompts = OPTIONS | {"max_num_batched_tokens": 256}, prompts_of([5, 80])
    with LLM(new[0], **options) as llm:
        want = tokens(llm, prompts, greedy(10))
    with LLM(old[0], **options) as llm:
        assert tokens(llm, prompts, greedy(10)) != want
        llm.sleep(1)
        llm.wake_up()
        llm.update_weights(new[0])
        assert tokens(llm, prompts, greedy(10)) == want
    with LLM(old[2], quantization="fp8", **options) as llm:
        params = llm.llm_engine.executor.runner.model.parameters()
        assert sum(param.dtype == FP8 for param in params) >= 2 * len(MODELS)
        llm.update_weights(new[2])
        assert tokens(llm, prompts, greedy(10)) == want
    with LLM(old[0], **options, load_format="dummy") as llm:
        assert len(tokens(llm, prompts, greedy(10))[0]) == 10
