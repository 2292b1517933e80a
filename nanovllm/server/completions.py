"""POST /v1/completions: continue prompts."""

import codecs
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from nanovllm import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.checks import shown
from nanovllm.outputs import LogprobRows
from nanovllm.server.errors import ApiError, aborted
from nanovllm.server.models import check_model
from nanovllm.server.sampling import NEUTRAL, SamplingFields
from nanovllm.server.state import ServerState
from nanovllm.server.streaming import (
    LONG_LOGPROBS,
    LongEvent,
    check_num_logprobs,
    in_thread,
    json_logprob,
    long_response,
    merge_streams,
    sse,
)

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields):
    """The body of a request.

    Args:
        prompt: text, token ids, or a list of one of these.
        echo: the text starts with the prompt.
        logprobs: how many of the most likely tokens to return log-probabilities of.
        best_of: the same as n.
    """

    NEUTRAL: ClassVar[dict[str, Any]] = {**NEUTRAL, "suffix": ("",), "add_special_tokens": (True,)}

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = None


class _Writer:
    """Makes the choices of a response from the engine's outputs.

    Args:
        echoes: for each prompt, the text that its choices start with; "" without `echo`.
        token_bytes: the bytes of each token, special ones included.
        text_bytes: the bytes that each token adds to the text of an output.

    Attributes:
        logprobs_per_token: how many log-probabilities a token has: its own and the most likely ones.
        is_prompt_only: `max_tokens` is 0, so the sampled token is left out. The engine always samples one.
        num_generated, num_prompt, num_cached: numbers of tokens so far; cached are those that the prefix cache had.
        num_logprobs: how many log-probabilities the response has so far; in a stream, those of the last choice.
    """

    def __init__(
        self,
        request: CompletionRequest,
        n: int,
        echoes: Sequence[str],
        token_bytes: Mapping[int, bytes],
        text_bytes: Mapping[int, bytes],
    ):
        self.request = request
        self.n = n
        self.echoes = echoes
        self.token_bytes = token_bytes
        self.text_bytes = text_bytes
        self.logprobs_per_token = 0 if request.logprobs is None else request.logprobs + 1
        self.is_prompt_only = request.max_tokens == 0
        self.num_generated = self.num_prompt = self.num_cached = 0
        self.num_logprobs = 0
        self._counted_prompts: set[int] = set()  # indices
        # For each sample that had an output. They stay 0 without logprobs.
        self._ends: dict[int, _TextEnd] = {}

    def check_prompts(self, prompts: Sequence[str | list[int]]) -> None:
        """Refuse prompts of token ids that have too many log-probabilities, before they are computed."""
        sizes = [len(prompt) for prompt in prompts if self.request.echo and isinstance(prompt, list)]
        num_tokens = max(sizes, default=0) if self.request.stream else sum(sizes) * self.n
        check_num_logprobs(num_tokens * self.logprobs_per_token)

    async def choices(self, prompt_index: int, output: RequestOutput) -> list[dict]:
        """Return what an output has, or what is new in it, as choices."""
        if prompt_index not in self._counted_prompts:
            self._counted_prompts.add(prompt_index)
            self.num_prompt += len(output.prompt_token_ids)
            self.num_cached += output.num_cached_tokens
        make_choice = partial(self._choice, prompt_index, output)
        if not self._takes_long(output):
            return [make_choice(sample) for sample in output.outputs]
        return [await in_thread(make_choice, sample) for sample in output.outputs]

    def _takes_long(self, output: RequestOutput) -> bool:
        """Return whether the choices of an output take milliseconds, because of their log-probabilities."""
        num_tokens = sum(len(sample.token_ids) for sample in output.outputs)
        if self.request.echo:  # the prompt's, in the first output of each sample
            num_tokens += len(output.prompt_token_ids)
        return num_tokens * self.logprobs_per_token > LONG_LOGPROBS

    def _choice(self, prompt_index: int, output: RequestOutput, sample: CompletionOutput) -> dict:
        if sample.finish_reason == "abort":
            raise aborted(sample.stop_reason)
        index = prompt_index * self.n + sample.index
        text = sample.text
        finish_reason = sample.finish_reason
        stop_reason = sample.stop_reason
        token_ids = sample.token_ids
        rows = sample.logprobs
        if self.is_prompt_only:
            text = ""
            finish_reason = "length" if finish_reason else None
            stop_reason = None
            token_ids = []
            rows = rows and rows[:0]
        self.num_generated += len(token_ids)
        # The bytes that each token adds to the text.
        added = [] if rows is None else [self.text_bytes[token_id] for token_id in token_ids]
        is_first_output = index not in self._ends
        if self.request.echo and is_first_output:
            echo = self.echoes[prompt_index]
            prompt_ids = output.prompt_token_ids
            text = echo + text
            if rows is not None and output.prompt_logprobs is not None:
                token_ids = prompt_ids + token_ids
                rows = output.prompt_logprobs + rows
                added = self._added_by_prompt(prompt_ids, echo) + added
        end = self._ends.setdefault(index, _TextEnd())
        logprobs = None
        if rows is not None:
            self._count_logprobs(len(token_ids))
            offsets = [end.add(spelling) for spelling in added]
            logprobs = _logprobs(token_ids, rows, self.token_bytes) | {"text_offset": offsets}
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def event_type(self, choice: dict) -> type[dict]:
        """Return the type of a choice's event."""
        num_tokens = len(choice["logprobs"]["tokens"]) if choice["logprobs"] else 0
        return LongEvent if num_tokens * self.logprobs_per_token > LONG_LOGPROBS else dict

    def _added_by_prompt(self, prompt_ids: list[int], echo: str) -> list[bytes]:
        """Return the bytes that each token of a prompt adds to its text.

        The tokenizer may have put a special token and a space before the text, which add none.
        """
        spellings = [self.token_bytes[token_id] for token_id in prompt_ids]
        text = echo.encode(errors="replace")
        whole = b"".join(spellings)
        if whole.endswith(text):
            return _without_first(spellings, len(whole) - len(text))
        # The tokenizer has changed the text, or the text ends with a part of a character.
        added = spellings
        if not self.text_bytes[prompt_ids[0]] and not text.startswith(added[0].removeprefix(b" ")):
            added = _without_first(added, len(added[0]))
        starts_with_space = b"".join(added).startswith(b" ")
        return _without_first(added, 1) if starts_with_space and not echo.startswith(" ") else added

    def _count_logprobs(self, num_tokens: int) -> None:
        """Refuse a response, or an event of a stream, that would take too much memory. `echo` repeats the prompt's."""
        before = 0 if self.request.stream else self.num_logprobs
        self.num_logprobs = before + num_tokens * self.logprobs_per_token
        check_num_logprobs(self.num_logprobs)

    def usage(self) -> dict:
        """Return the numbers of tokens so far."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


def _without_first(spellings: list[bytes], num_bytes: int) -> list[bytes]:
    """Return spellings of tokens without the first bytes of all of them together."""
    result = []
    for spelling in spellings:
        result.append(spelling[num_bytes:])
        num_bytes = max(0, num_bytes - len(spelling))
    return result


class _TextEnd:
    """Counts the characters of a text, token by token. Tokens that are parts of one character start where it does."""

    def __init__(self):
        self.offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, spelling: bytes) -> int:
        """Move the end past one more token, which adds these bytes. Return where the token starts."""
        if not 0x80 <= next(iter(spelling), 0) < 0xC0:  # it does not continue a character
            self.offset += len(self._decoder.decode(b"", final=True))
        start = self.offset
        self.offset += len(self._decoder.decode(spelling))
        return start


def _logprobs(token_ids: list[int], rows: LogprobRows, token_bytes: Mapping[int, bytes]) -> dict:
    """Return log-probabilities in OpenAI's form for completions, without their `text_offset`."""

    def name(token_id: int) -> str:
        return _token_name(token_id, rows.text(token_id), token_bytes)

    token_logprobs = []
    top_logprobs = []
    for token_id, row in zip(token_ids, rows, strict=True):
        token_logprobs.append(None if row is None else json_logprob(row[token_id].logprob))
        top_logprobs.append(None if row is None else _by_name(row, name))
    return {
        "tokens": [name(token_id) for token_id in token_ids],
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
    }


def _token_name(token_id: int, text: str | None, token_bytes: Mapping[int, bytes]) -> str:
    """Return a token's text, or its bytes if it is a part of a character, or its id if it has no text.

    The notation of bytes is OpenAI's, that of ids is vLLM's.
    """
    if not text:
        return f"token_id:{token_id}"
    if "\ufffd" not in text:
        return text
    spelling = token_bytes[token_id]
    try:
        return spelling.decode()
    except UnicodeDecodeError:  # a part of a character
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def _by_name(row: dict[int, Logprob], name: Callable[[int], str]) -> dict[str, float]:
    """Return log-probabilities by the names of tokens. If tokens have the same name, the largest counts."""
    result: dict[str, float] = {}
    for token_id, entry in row.items():
        key = name(token_id)
        result[key] = max(json_logprob(entry.logprob), result.get(key, -math.inf))
    return result


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Return the prompts of a request. The engine checks the token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        # A prompt may have a million token ids: one pass.
        kinds = set(map(type, prompt))
        if kinds <= {str, list}:
            return prompt
        if kinds.isdisjoint({str, list}):
            return [prompt]
    message = f"prompt must be a text, a list of token ids, or a list of one of these, got {shown(prompt)}"
    raise ApiError(400, message, param="prompt")


def _params(state: ServerState, request: CompletionRequest) -> SamplingParams:
    """Return the sampling parameters of a request."""
    if request.best_of not in (None, request.n or 1):
        message = f"best_of must be equal to n={request.n or 1} or absent, got {request.best_of}"
        raise ApiError(400, message, param="best_of")
    max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and request.echo:
        max_tokens = 1
    return request.to_params(
        state,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        # Log-probabilities of many tokens at once would take long.
        output_kind=RequestOutputKind.FINAL_ONLY if request.logprobs is None and not request.stream else None,
    )


async def _outputs(
    state: ServerState, http: Request, prompts: Sequence[str | list[int]], params: SamplingParams
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Yield the outputs of all prompts as they come, each with its prompt's index."""
    with state.admission.enter(params.n * len(prompts)):
        streams = [state.generate(http, prompt, params) for prompt in prompts]
        async with aclosing(merge_streams(streams)) as outputs:
            async for index, output in outputs:
                yield index, output


async def _events(
    writer: _Writer, outputs: AsyncGenerator[tuple[int, RequestOutput], None], header: dict
) -> AsyncGenerator[list[dict], None]:
    """Yield the events of a streamed response."""
    request = writer.request
    usage = {}
    async with aclosing(outputs):
        async for index, output in outputs:
            choices = await writer.choices(index, output)
            # Leave out choices with nothing new: a token that is a part of a character has no text yet.
            events = [choice for choice in choices if choice["text"] or choice["logprobs"] or choice["finish_reason"]]
            if request.include_usage:
                usage = {"usage": writer.usage() if request.continuous_usage else None}
            if events:
                yield [writer.event_type(choice)({**header, "choices": [choice], **usage}) for choice in events]
    if request.include_usage:
        yield [{**header, "choices": [], "usage": writer.usage()}]


def _add(choices: dict[int, dict], new: dict) -> None:
    """Add what is new in a choice to the choices so far, by index."""
    choice = choices.setdefault(new["index"], new)
    if choice is new:
        return
    choice["text"] += new["text"]
    choice["finish_reason"] = new["finish_reason"]
    choice["stop_reason"] = new["stop_reason"]
    if new["logprobs"] is not None:
        for name, values in new["logprobs"].items():
            choice["logprobs"][name] += values


def routes(state: ServerState) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def complete(request: CompletionRequest, http: Request) -> Response:
        check_model(state, request.model)
        prompts = _prompts(request.prompt)
        params = _params(state, request)
        state.admission.check(params.n * len(prompts))
        echoes = ["" for _ in prompts]
        if request.echo:
            echoes = [each if isinstance(each, str) else await state.llm.decode(each) for each in prompts]
        text_bytes = state.text_bytes if params.skip_special_tokens else state.token_bytes
        writer = _Writer(request, params.n, echoes, state.token_bytes, text_bytes)
        writer.check_prompts(prompts)
        outputs = _outputs(state, http, prompts, params)
        header = {
            "id": f"cmpl-{http.state.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_names[0],
        }
        if request.stream:
            if len(prompts) > 1:
                # A wrong prompt must show before the first event, which fixes the response's status.
                for prompt in prompts:
                    await state.llm.check_request(prompt, params)
            return await sse(_events(writer, outputs, header))
        choices: dict[int, dict] = {}
        async with aclosing(outputs):
            async for index, output in outputs:
                for choice in await writer.choices(index, output):
                    _add(choices, choice)
        body = {**header, "choices": [choices[index] for index in sorted(choices)], "usage": writer.usage()}
        return await long_response(lambda: body, writer.num_logprobs)

    return router
