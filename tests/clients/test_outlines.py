"""Outlines' `VLLMOffline` class."""

import json
import re
from typing import Literal

import outlines
import pydantic
import pytest
from outlines.inputs import Chat
from vllm import LLM, SamplingParams


class Person(pydantic.BaseModel, extra="forbid"):
    """A schema whose texts are short, so that a random model finishes them."""

    name: Literal["Ada", "Grace"]
    age: int = pydantic.Field(ge=0, le=99)
    tall: bool


@pytest.fixture(scope="module", params=["model", "chat_model"])
def generate(request):
    """An Outlines model, whose prompts become text, or chats where the model has a chat template."""
    with LLM(request.getfixturevalue(request.param), max_model_len=256, max_num_seqs=8) as llm:
        yield outlines.from_vllm_offline(llm)


def params(**options):
    return SamplingParams(**{"max_tokens": 100, "temperature": 1.0, "seed": 3, **options})


def test_text_is_the_engines(generate):
    greedy = params(temperature=0, max_tokens=9)
    text = generate("Hello", sampling_params=greedy)
    if generate.tokenizer.chat_template:
        chat = [{"role": "user", "content": "Hello"}]
        assert text == generate.model.chat(chat, greedy, use_tqdm=False)[0].text
        assert text == generate(Chat(chat), sampling_params=greedy)
    else:
        assert text == generate.model.generate("Hello", greedy, use_tqdm=False)[0].text
    assert len(text) > 0


def test_text_without_parameters_is_text(generate):
    assert isinstance(generate("Hello"), str)


def test_literal_is_one_of_its_values(generate):
    values = Literal["yes", "no", "maybe"]
    texts = {generate("Well?", values, sampling_params=params(seed=seed, temperature=9)) for seed in range(6)}
    assert texts <= {"yes", "no", "maybe"} and len(texts) > 1


def test_regex_matches(generate):
    pattern = r"[0-9]{3}-[a-c]{2,4}"
    text = generate("Code:", outlines.regex(pattern), sampling_params=params())
    assert re.fullmatch(pattern, text)


def test_pydantic_model_validates(generate):
    text = generate("Who?", Person, sampling_params=params())
    assert Person.model_validate_json(text).tall in (True, False)
    assert json.loads(text).keys() == {"name", "age", "tall"}


def test_n_gives_as_many_samples(generate):
    texts = generate("Well?", Literal["yes", "no"], sampling_params=params(n=4))
    assert len(texts) == 4 and set(texts) <= {"yes", "no"}


def test_batch_gives_the_samples_of_each_prompt(generate):
    rows = generate.batch(["a", "b", "c"], Literal["yes", "no"], sampling_params=params(n=2))
    assert [len(row) for row in rows] == [2, 2, 2]
    assert {text for row in rows for text in row} <= {"yes", "no"}
