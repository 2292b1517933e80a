"""LangChain's ChatOpenAI and the server."""

from typing import Literal

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from nanovllm import SamplingParams
from tests.clients.serving import SECONDS

QUESTION = "Zürich 🙂?"


class Trip(BaseModel):
    """Book a trip."""

    city: Literal["Paris", "Rome"]
    is_booked: bool


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(request, server):
    """A model that uses chat completions or responses."""
    options = {"temperature": 0, "max_tokens": 200, "max_retries": 0, "timeout": SECONDS, "stream_usage": True}
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="-", model=server.model, use_responses_api=request.param, **options
    )


def test_answers_equal_the_offline_ones(chat, offline):
    want = [
        offline.chat([{"role": "user", "content": text}], SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
        for text in (QUESTION, "Hello")
    ]
    answers = chat.batch([QUESTION, "Hello"])
    assert [answer.text for answer in answers] == [output.outputs[0].text for (output,) in want]
    assert answers[0].usage_metadata["output_tokens"] == len(want[0][0].outputs[0].token_ids)


def test_a_joined_stream_equals_the_whole_answer(chat):
    whole = AIMessageChunk("")
    for chunk in chat.stream(QUESTION):
        whole += chunk
    assert whole.text == chat.invoke(QUESTION).text
    assert whole.usage_metadata["output_tokens"] > 0


def test_a_bound_tool_is_called_and_its_result_can_be_sent(chat):
    bound = chat.bind_tools([Trip], tool_choice="required", parallel_tool_calls=False)
    message = bound.invoke(QUESTION)
    (call,) = message.tool_calls
    assert call["name"] == "Trip"
    Trip.model_validate(call["args"])
    chat.invoke([HumanMessage(QUESTION), message, ToolMessage("done", tool_call_id=call["id"])])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_its_class(chat, method):
    assert isinstance(chat.with_structured_output(Trip, method=method).invoke(QUESTION), Trip)
