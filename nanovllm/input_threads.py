"""Threads that prepare the requests of `AsyncLLM`: they tokenize prompts, render chat templates and compile grammars.

Meanwhile the steps of the engine go on. Each kind of work has its own threads: a template or a grammar of a client may
take seconds, and requests without one do not wait for it.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from nanovllm.checks import is_list, length
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.request import Request
from nanovllm.inputs import Prompt, split_prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.sandbox.pool import TooCostly
from nanovllm.utils.shortest_first import ShortestFirst

_PROMPTS = "prompts"
_TEMPLATES = "templates"
_GIVEN_TEMPLATES = "given-templates"
_GRAMMARS = "grammars"
_COSTLY_GRAMMARS = "costly-grammars"
# Threads for each kind: bounds how many requests are prepared at once, so that they leave time to the engine's thread.
_NUM_THREADS = {_PROMPTS: 4, _TEMPLATES: 4, _GIVEN_TEMPLATES: 2, _GRAMMARS: 2, _COSTLY_GRAMMARS: 2}
# Work is estimated as a number of characters to read. These turn other things into characters.
_IDS_PER_CHAR = 16
_CHARS_PER_BAD_WORD = 128
_CHARS_PER_MESSAGE = 128
# A grammar that is longer, or takes more CPU time, goes to threads for costly ones, so that no other waits for it. A
# usual schema takes 0.01 s. The next grammar waits until a new process can compile, 0.2 to 1 s.
_COSTLY_CHARS = 8192
_COSTLY_S = 0.25


class InputThreads:
    """Lets threads run an input processor.

    Args:
        processor: its methods are safe in any thread.
        check_usable: raises RuntimeError once the engine is closed or has failed.
    """

    def __init__(self, processor: InputProcessor, check_usable: Callable[[], None]):
        self._processor = processor
        self._check_usable = check_usable
        self._threads = {kind: ShortestFirst(count, f"nanovllm-{kind}") for kind, count in _NUM_THREADS.items()}

    def load_grammars(self) -> None:
        """Load what compiles grammars, which holds the GIL for a while. If it fails, each request reports why."""
        self._threads[_GRAMMARS].submit(0, lambda: self._processor.grammars)

    async def process(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None) -> Request:
        """Check a request and prepare everything it needs; see `InputProcessor.process`."""
        amount = _request_chars(prompt, params)
        work = partial(self._processor.process, prompt, params, request_id, stream=True)
        form = params.structured_outputs if params is not None else None
        if form is None:
            return await self._run(_PROMPTS, amount, work)
        if form.num_chars <= _COSTLY_CHARS:
            with suppress(TooCostly):
                return await self._run(_GRAMMARS, amount, partial(work, max_grammar_seconds=_COSTLY_S))
        return await self._run(_COSTLY_GRAMMARS, amount, work)

    async def chat_prompt(self, messages: Sequence[dict], **template: Any) -> tuple[str, list[int]]:
        """Return the text and the token ids of one conversation; see `LLM.chat_prompts`."""
        kind = _TEMPLATES if template.get("chat_template") is None else _GIVEN_TEMPLATES
        work = partial(self._processor.chats.texts_and_ids, messages, **template)
        prompts = await self._run(kind, _conversation_chars(messages), work)
        return prompts[0]

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        work = partial(self._processor.codec.encode_bounded, text, add_special_tokens)
        return await self._run(_PROMPTS, _size(text), work)

    async def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return await self._run(_PROMPTS, _size(token_ids), partial(self._processor.codec.decode, token_ids))

    def close(self) -> None:
        """Close the input processor and end the threads. Calls that wait raise RuntimeError. May be called again."""
        self._processor.close()  # wakes threads that wait for a template or a grammar
        for threads in self._threads.values():
            threads.shutdown()

    async def _run(self, kind: str, amount: int, work: Callable[[], Any]) -> Any:
        """Let a thread for this kind of work run `work`.

        Args:
            amount: an estimate of the work, about the number of characters to read.
        """

        def run() -> Any:
            self._check_usable()  # the engine may have been closed while this waited
            try:
                return work()
            finally:
                self._check_usable()  # closing may be the reason why the work failed

        self._check_usable()
        return await future_of(lambda: self._threads[kind].submit(amount, run))


def future_of(submit: Callable[[], Any]) -> asyncio.Future:
    """Return a future of the running loop for a call that `submit` gives to another thread.

    Raises:
        RuntimeError: the threads are shut down, or none can be started.
    """
    try:
        return asyncio.wrap_future(submit())
    except RuntimeError as error:
        raise RuntimeError(f"the engine is closed or cannot start a thread: {error}") from error


def _request_chars(prompt: Any, params: SamplingParams | None) -> int:
    """Return an estimate of the characters to read for a request that was checked."""
    text, token_ids, _ = split_prompt(prompt)
    num_chars = len(text) if text is not None else _size(token_ids) // _IDS_PER_CHAR
    if params is not None:
        num_chars += len(params.bad_words) * _CHARS_PER_BAD_WORD
        if params.structured_outputs is not None:
            num_chars += params.structured_outputs.num_chars
    return num_chars


def _conversation_chars(messages: Any) -> int:
    """Return an estimate of the characters of a conversation, which has not been checked."""
    if not is_list(messages):
        return 0
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return sum(len(content) if isinstance(content, str) else _CHARS_PER_MESSAGE for content in contents)


def _size(value: Any) -> int:
    """Return the length of a value, 0 if it has none."""
    try:
        return length(value)
    except TypeError:
        return 0
