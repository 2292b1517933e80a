"""The class users import."""

import time
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as SequenceType
from functools import partial
from typing import Any

from nanovllm.checks import is_list, shown
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.outputs import RequestOutput
from nanovllm.progress import ProgressBar
from nanovllm.sampling_params import SamplingParams


class LLM(LLMEngine):
    """A model that generates: `LLM(path).generate(prompts, SamplingParams(...))`. See `LLMEngine` for its arguments."""

    def generate(
        self,
        prompts: str | SequenceType[str] | SequenceType[int] | SequenceType[SequenceType[int]],
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all `prompts`, in their order.

        Args:
            prompts: texts, lists of token ids, or a single one of either.
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show a progress bar with tokens/s.

        Raises:
            TypeError, ValueError: a prompt or its parameters are wrong; nothing was queued.
            RuntimeError: the engine is closed, asleep, in use by another thread, or has failed.
        """
        if not isinstance(use_tqdm, bool):
            raise TypeError(f"use_tqdm must be a bool, got {shown(use_tqdm)}")
        if isinstance(prompts, str) or (is_list(prompts) and prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not is_list(prompts):
            raise TypeError(f"prompts must be a list of texts or of token id lists, got {type(prompts).__name__}")
        if isinstance(sampling_params, SamplingParams | None):
            sampling_params = [sampling_params] * len(prompts)
        if not is_list(sampling_params):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {shown(sampling_params)}")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
        with self._owned():
            requests = [self._make_request(*pair) for pair in zip(prompts, sampling_params, strict=True)]
            return self._answer(requests, use_tqdm)

    def _answer(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[int | str, RequestOutput] = {}
        tokens, begin = 0, time.perf_counter()
        try:
            for request in requests:
                self._queue(request)
            mine = set(requests)
            with ProgressBar(total=len(requests), desc="Generating", enabled=use_tqdm, dynamic_ncols=True) as bar:
                while len(outputs) < len(requests):
                    for output in self._step_for(mine):
                        outputs[output.request_id] = output
                        tokens += sum(len(sample.token_ids) for sample in output.outputs)
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):.0f} tok/s", refresh=False)
                        bar.update()
        finally:
            if len(outputs) < len(requests):  # an error or an interrupt
                self._abandon(requests)
        return [outputs[request.id] for request in requests]

    def chat(
        self,
        messages: SequenceType[dict] | SequenceType[SequenceType[dict]],
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` with prompts made by the model's chat template.

        Args:
            messages: one conversation, as dicts with "role" and "content", or a list of them.
            template: options of `chat_prompts`.
        """
        return self.generate(self.chat_prompts(messages, **template), sampling_params, use_tqdm)

    def chat_prompts(
        self,
        messages: SequenceType[dict] | SequenceType[SequenceType[dict]],
        **template: Any,
    ) -> list[list[int]]:
        """Return the token ids of conversations.

        Args:
            messages: one conversation, as dicts with "role" and "content", or a list of them. A content is text or a
                list of parts `{"type": "text", "text": ...}`. Arguments of tool calls are JSON text or dicts.
            tools: functions the model may call, as JSON schemas.
            chat_template: Jinja text to use instead of the model's own.
            add_generation_prompt: end with the tokens that start an answer; True unless `continue_final_message` is.
            continue_final_message: the answer continues the last message instead of starting a new one.
            chat_template_kwargs: a dict of any of the other arguments but `chat_template`, and of variables of the
                template, such as `enable_thinking` of Qwen3's. It comes before arguments of the same name.
            template: variables of the template may also be given as arguments.

        Raises:
            TypeError: the messages are malformed, or the template does not read a variable.
            ValueError: the messages are far too long for `max_model_len`, the model has no chat template, or the
                template does not fit the messages or the tools, or it took too much time or memory.
        """
        return self.input_processor.chat_prompts(messages, **template)

    def stream(
        self, prompt: str | SequenceType[int], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one prompt as it comes: each output has what is new since the one before.

        Other requests go on meanwhile. Leaving the iterator ends the request.

        Raises:
            TypeError, ValueError: at once, if the request cannot be served.
        """
        request = self._make_request(prompt, sampling_params, stream=True)
        increments = self._increments(request)
        # A second way to notice that the iterator is gone, for an interrupt in the code at its end. No interrupt can
        # hit this callback: it runs no Python code.
        request.consumer = weakref.ref(increments, partial(self.abandoned.setdefault, request))
        try:
            next(increments)
            return increments
        except BaseException:
            increments.close()
            raise

    def _increments(self, request: Request) -> Iterator[RequestOutput]:
        def is_there() -> bool:  # `abort`, or another's `step`, may have ended it, and its id may be another's by now
            return self.requests.get(request.id) is request or any(owner is request for owner, _ in self.outputs)

        try:
            self._queue(request)
            yield  # to `stream`: only an iterator that has started can be abandoned
            while is_there():
                for output in self._step_for((request,)):
                    yield output
                    if output.finished:
                        return
            self._check_usable(awake=False)
        finally:
            self._abandon([request])
