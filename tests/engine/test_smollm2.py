"""The default model: real text from real weights, token for token what transformers gives."""

import pytest

from nanovllm import LLM, SamplingParams
from tests.engine.reference import load_reference, reference_choices

pytestmark = pytest.mark.xdist_group("default model")

QUESTIONS = [
    "What is the capital of France?",
    "List three prime numbers.",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "Explain what a paged KV cache is.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet, and when was it first performed? Answer in one sentence.",
    "Give me a recipe for pancakes.",
]


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", dtype="float32", max_model_len=512, max_num_seqs=8) as llm:
        yield llm


def chat(llm, question):
    messages = [{"role": "user", "content": question}]
    return llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_default_model_knows_the_capital_of_france(llm):
    params = SamplingParams(temperature=0.0, max_tokens=24)
    assert "Paris" in llm.generate(chat(llm, QUESTIONS[0]), params, use_tqdm=False)[0].text


def test_greedy_tokens_equal_transformers(llm):
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    prompts = [llm.tokenizer.encode(chat(llm, question)) for question in QUESTIONS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    model = load_reference(llm.llm_engine.source.path)
    for prompt, out in zip(prompts, outputs, strict=True):
        assert len(out.token_ids) == 64
        assert out.token_ids == reference_choices(model, prompt, out.token_ids)
