"""LangChain's `VLLM` class."""

import pytest
from langchain_community.llms import VLLM

from nanovllm import LLM, SamplingParams

PROMPTS = ["Once upon", "Twice", "Three times a"]


@pytest.fixture(scope="module")
def llm(model):
    options = {"max_model_len": 128, "max_num_seqs": 4}
    client = VLLM(model=model, max_new_tokens=12, temperature=0.0, trust_remote_code=False, vllm_kwargs=options)
    yield client
    client.client.shutdown()


@pytest.fixture(scope="module")
def expected(model):
    """The greedy texts of the engine itself."""
    with LLM(model, max_model_len=128, max_num_seqs=4) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    return [output.text for output in outputs]


def test_invoke_gives_the_engines_text(llm, expected):
    assert llm.invoke(PROMPTS[0]) == expected[0]


def test_batch_gives_the_texts_in_order(llm, expected):
    assert llm.batch(PROMPTS) == expected


def test_stream_gives_the_whole_text(llm, expected):
    assert "".join(llm.stream(PROMPTS[1])) == expected[1]


def test_stop_ends_a_text(llm, expected):
    stop = expected[0][3:5]
    assert llm.invoke(PROMPTS[0], stop=[stop]) == expected[0][: expected[0].index(stop)]


def test_parameters_of_a_call_reach_the_engine(llm, expected):
    result = llm.generate(PROMPTS, n=2, temperature=1.0, seed=7, logprobs=1)
    texts = [generations[0].text for generations in result.generations]
    assert texts == [g[0].text for g in llm.generate(PROMPTS, n=2, temperature=1.0, seed=7).generations]
    assert texts != expected
    assert llm.invoke(PROMPTS[0], max_tokens=3) == expected[0][:3]


def test_n_of_the_class_reaches_the_engine(model, monkeypatch):
    """LangChain shows the first sample only."""
    options = {"max_model_len": 128, "max_num_seqs": 4}
    client = VLLM(model=model, n=3, temperature=1.0, max_new_tokens=4, vllm_kwargs=options)
    generate, outputs = client.client.generate, []
    monkeypatch.setattr(client.client, "generate", lambda *args: outputs.extend(generate(*args)) or outputs)
    texts = client.batch(PROMPTS)
    assert [len(output.outputs) for output in outputs] == [3, 3, 3]
    assert texts == [output.outputs[0].text for output in outputs]
    client.client.shutdown()
