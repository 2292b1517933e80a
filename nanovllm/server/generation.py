"""Generates the next turn of a conversation: what chat completions, messages and responses share."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import Request

from nanovllm import CompletionOutput, SamplingParams
from nanovllm.checks import shown
from nanovllm.outputs import LogprobRows
from nanovllm.server.call_grammars import json_rule
from nanovllm.server.errors import ApiError, aborted
from nanovllm.server.events import CallEnd, Event
from nanovllm.server.parsers.output_parser import OutputParser
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import in_thread
from nanovllm.utils.shortest_first import ShortestFirst

# How many tokens at the end of the prompt the parser reads, because the template may open the model's thinking there. A
# message to be continued may have opened it long before.
_TAIL_TOKENS = 64
_CONTINUED_TAIL_TOKENS = 4096
_LONG_TEXT = 4096  # new characters of all samples together; more are parsed in a thread
# One thread for each kind of long work: more would keep the GIL from the event loop. Long responses have another one.
_parsing = ThreadPoolExecutor(1, "nanovllm-parsing")
_constraining = ShortestFirst(1, "nanovllm-constraining")
# Ends thinking that the template has opened, as templates without thinking do.
_NO_THINKING = "\n</think>\n\n"
# The engine's error about a grammar: the line that is wrong, the reason, and an excerpt of the grammar.
_GRAMMAR_ERROR = re.compile(
    r"structured_outputs cannot be compiled: (?:at (\d+)\(\d+\): )?(.*?)(?:\n +\d+ \| .*)?", re.DOTALL
)


@dataclass(frozen=True)
class Conversation:
    """A conversation whose next turn the model writes.

    Args:
        http: the client's request.
        messages: in the form that `AsyncLLM.chat_prompt` takes.
        params: how to sample. With FINAL_ONLY as `output_kind` there is one piece, at the end.
        tools: the functions that the model may call, in OpenAI's form.
        tool_choice: "none", "auto", "required", or the name of the function that the model must call.
        parallel_tool_calls: the model may call several functions at once.
        template: further arguments of `AsyncLLM.chat_prompt`, such as `chat_template_kwargs`.
        form_field: the request's field that has the form of the response, `params.structured_outputs`.
    """

    http: Request
    messages: Sequence[dict[str, Any]]
    params: SamplingParams
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    template: dict[str, Any] = field(default_factory=dict)
    form_field: str = "structured_outputs"


@dataclass(frozen=True, slots=True)
class SamplePiece:
    """The new part of one sample.

    Args:
        index: the sample's number among the request's samples, from 0.
        events: the parser's events of the new text.
        token_ids: the new tokens, including the one that ended the sample.
        logprobs: the requested log-probabilities of the new tokens.
        finish_reason: "stop", "length" or "tool_calls"; None while the sample goes on. It is "tool_calls" if the model
            has ended the sample itself, there is a call, and all calls are complete.
        stop_reason: the stop id or stop string that ended the sample, else None.
    """

    index: int
    events: list[Event]
    token_ids: list[int]
    logprobs: LogprobRows | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class Piece:
    """The new part of a response: `samples` has the samples with something new."""

    num_prompt_tokens: int
    num_cached_tokens: int
    samples: list[SamplePiece]


async def generate_turn(
    state: ServerState, conversation: Conversation, request_id: str | None = None
) -> AsyncGenerator[Piece, None]:
    """Yield the next turn of a conversation in pieces. Closing the generator ends the request.

    Raises:
        ApiError, TypeError, ValueError: the request cannot be served. Everything that is wrong with a request shows
            before the first piece, except a structured output that becomes too costly.
        RuntimeError: the engine is closed or has failed.
    """
    tools = _allowed_tools(conversation)
    if tools:
        _check_tools(state, conversation)
    with state.admission.enter(conversation.params.n):
        prompt_ids, prompt_text = await _prompt(state, conversation, tools)
        params = conversation.params
        if len(prompt_ids) <= state.llm.max_model_len:  # else the engine refuses the prompt
            params = await _constrained_params(state, conversation, tools, prompt_text)
        is_constrained = params.structured_outputs is not None
        samples = [_Sample(each) for each in state.format.parsers(prompt_text, tools, params.n, is_constrained)]
        prompt = {"prompt_token_ids": prompt_ids}
        outputs = state.generate(conversation.http, prompt, params, request_id)
        async with aclosing(outputs):
            with _naming_schemas(conversation, params):
                async for output in outputs:
                    is_long = sum(len(new.text) for new in output.outputs) > _LONG_TEXT
                    pieces = [await _piece(samples[new.index], new, is_long) for new in output.outputs]
                    yield Piece(len(prompt_ids), output.num_cached_tokens, pieces)


async def prompt_token_ids(state: ServerState, conversation: Conversation) -> list[int]:
    """Return the prompt of a conversation."""
    prompt_ids, _ = await _prompt(state, conversation, _allowed_tools(conversation))
    return prompt_ids


def _allowed_tools(conversation: Conversation) -> Sequence[dict[str, Any]]:
    """Return the tools that the model may call in this turn."""
    return () if conversation.tool_choice == "none" else conversation.tools


def _check_tools(state: ServerState, conversation: Conversation) -> None:
    names: set[str] = set()
    for tool in conversation.tools:
        name = tool["function"]["name"]
        if not name:
            raise ApiError(400, "tools has a function without a name", param="tools")
        if name in names:
            raise ApiError(400, f"tools must have different names, got two of the name {shown(name)}", param="tools")
        names.add(name)
    if conversation.tool_choice != "auto":
        return
    if state.format.tool_format == "none":
        message = "the server does not know how this model writes tool calls; its option --tool-parser can tell it"
        raise ApiError(400, message, param="tools")


async def _prompt(
    state: ServerState, conversation: Conversation, tools: Sequence[dict[str, Any]]
) -> tuple[list[int], str]:
    """Return the prompt's token ids, and the end of its text."""
    template = dict(conversation.template)
    if tools:
        template["tools"] = [_without_strict(tool) for tool in tools]
    prompt_ids = await state.llm.chat_prompt(conversation.messages, **template)
    variables: dict[str, Any] = template | (template.get("chat_template_kwargs") or {})
    num_tail = _CONTINUED_TAIL_TOKENS if variables.get("continue_final_message") else _TAIL_TOKENS
    text = await state.llm.decode(prompt_ids[-num_tail:])
    form = conversation.params.structured_outputs
    if form is not None and json_rule(form) is None and state.format.opens_thinking(text):
        # No thinking goes before a response in this form.
        prompt_ids = prompt_ids + await state.llm.encode(_NO_THINKING, add_special_tokens=False)
        text += _NO_THINKING
    return prompt_ids, text


def _without_strict(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool without `strict`, which is for the server and not for the model."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}


async def _constrained_params(
    state: ServerState, conversation: Conversation, tools: Sequence[dict[str, Any]], prompt_text: str
) -> SamplingParams:
    """Return `_constrained`, from a thread if it has to make a grammar."""
    constrain = partial(_constrained, state, conversation, tools, prompt_text)
    form = conversation.params.structured_outputs
    if state.format.needs_grammar(tools, conversation.tool_choice, conversation.parallel_tool_calls, form):
        return await asyncio.wrap_future(_constraining.submit(state.body_bytes(conversation.http), constrain))
    return constrain()


def _constrained(
    state: ServerState, conversation: Conversation, tools: Sequence[dict[str, Any]], prompt_text: str
) -> SamplingParams:
    """Return the conversation's parameters with the constraint that its tools and the form of its response need."""
    params = conversation.params
    constraint = state.format.constraint(
        tools, conversation.tool_choice, conversation.parallel_tool_calls, prompt_text, params.structured_outputs
    )
    params = replace(params, structured_outputs=constraint)
    if tools and state.format.shows_special_tokens:
        params = replace(params, skip_special_tokens=False)
    return params


@contextmanager
def _naming_schemas(conversation: Conversation, params: SamplingParams) -> Iterator[None]:
    """Let errors about a grammar that the server has made name the client's field in place of the grammar."""
    try:
        yield
    except ValueError as error:
        if params == conversation.params and conversation.form_field == "structured_outputs":
            raise  # the grammar is the client's
        match = _GRAMMAR_ERROR.fullmatch(str(error))
        if match is None:
            raise
        name = "tools"
        if conversation.params.structured_outputs is not None:
            # The rule `start` has the form of the response, other rules have the schemas of tools.
            is_start = match[1] is not None and _grammar_line(params, int(match[1])).startswith("start:")
            if is_start or not _allowed_tools(conversation):
                name = conversation.form_field
        raise ApiError(400, f"{name} has a schema that cannot be followed: {match[2]}", param=name) from None


def _grammar_line(params: SamplingParams, number: int) -> str:
    """Return a line of the grammar that constrains the output, by its number from 1; "" if there is no such line."""
    grammar = params.structured_outputs and params.structured_outputs.grammar
    lines = (grammar or "").split("\n")
    return lines[number - 1] if number <= len(lines) else ""


async def _piece(sample: "_Sample", new: CompletionOutput, is_long: bool) -> SamplePiece:
    """Return the next piece of a sample. Long texts are parsed in a thread, because they may have many calls."""
    if not is_long:
        return sample.piece(new)
    return await in_thread(sample.piece, new, thread=_parsing)


class _Sample:
    """Parses the text of one sample."""

    def __init__(self, parser: OutputParser):
        self.parser = parser
        self.calls: list[CallEnd] = []

    def piece(self, new: CompletionOutput) -> SamplePiece:
        events = self.parser.feed(new.text)
        finish_reason = new.finish_reason
        if finish_reason is not None:
            events = events + self.parser.finish()
        self.calls += [event for event in events if isinstance(event, CallEnd)]
        if finish_reason == "abort":
            raise aborted(new.stop_reason)
        is_ended_by_model = finish_reason == "stop" and not isinstance(new.stop_reason, str)
        if is_ended_by_model and self.calls and all(call.is_complete for call in self.calls):
            finish_reason = "tool_calls"
        return SamplePiece(new.index, events, new.token_ids, new.logprobs, finish_reason, new.stop_reason)
