"""The class users import."""

import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceType
from typing import Any

from tqdm import tqdm

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checks import is_list

# Arguments of transformers' apply_chat_template that say what comes of it.
_NOT_OF_TEMPLATES = {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
_NOT_OF_TEMPLATES |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "conversation"}


def _is_chat(messages: Any) -> bool:
    return is_list(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


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
        if isinstance(prompts, str) or (is_list(prompts) and prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not is_list(prompts):
            raise TypeError(f"prompts must be a list of texts or of token id lists, got {type(prompts).__name__}")
        if isinstance(sampling_params, SamplingParams | None):
            sampling_params = [sampling_params] * len(prompts)
        if not is_list(sampling_params):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
        with self._alone():
            requests = [self._make_request(*pair) for pair in zip(prompts, sampling_params, strict=True)]
            return self._answer(requests, use_tqdm)

    def _answer(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        ids: list[int | str] = []
        outputs: dict[int | str, RequestOutput] = {}
        tokens, begin = 0, time.perf_counter()
        try:
            ids += map(self._queue, requests)
            mine = set(ids)
            with tqdm(total=len(ids), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while len(outputs) < len(ids):
                    for output in self._step_for(mine):
                        outputs[output.request_id] = output
                        tokens += sum(len(sample.token_ids) for sample in output.outputs)
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):.0f} tok/s", refresh=False)
                        bar.update()
        finally:
            self._leave(request_id for request_id in ids if request_id not in outputs)  # interrupted
        return [outputs[request_id] for request_id in ids]

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
        *,
        tools: list[dict] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[list[int]]:
        """The token ids of conversations.

        Args:
            messages: one conversation, as dicts with "role" and "content", or a list of them.
            tools: functions the model may call, as JSON schemas.
            chat_template: Jinja text to use instead of the model's own.
            add_generation_prompt: end with what begins an answer; True unless `continue_final_message` is.
            continue_final_message: the answer goes on from the last message instead of beginning a new one.
            template_kwargs: what else the template knows, such as `enable_thinking` of Qwen3's.

        Raises:
            TypeError, ValueError: the messages are not such, or the model has no chat template.
        """
        for name in _NOT_OF_TEMPLATES & template_kwargs.keys():
            raise TypeError(f"{name} is no variable of a template; what is made here are the whole prompt's token ids")
        chats = [messages] if is_list(messages) and isinstance(next(iter(messages), None), dict) else messages
        if not is_list(chats) or not chats or not all(map(_is_chat, chats)):
            raise TypeError(f"messages must be a list of dicts with role and content, got {messages!r}")
        if not (chat_template or self.tokenizer.chat_template):
            raise ValueError("the model has no chat template; give chat_template, or prompts to generate()")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        try:
            texts = self.tokenizer.apply_chat_template(
                list(map(list, chats)),
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **template_kwargs,
            )
        except Exception as error:  # templates are programs of the model's
            raise ValueError(f"messages do not fit the model's chat template: {error}") from error
        return list(map(self._encode, texts))

    def stream(
        self, prompt: str | SequenceType[int], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one prompt as it comes: each output has what is new since the one before.

        Other requests go on meanwhile. Leaving the iterator ends the request.

        Raises:
            TypeError, ValueError: at once, if the request cannot be served.
        """
        request = self._make_request(prompt, sampling_params, stream=True)
        self._queue(request)
        increments = self._increments(request)
        next(increments)
        return increments

    def _increments(self, request: Request) -> Iterator[RequestOutput]:
        def is_there() -> bool:  # `abort`, or another's `step`, may have ended it, and its id may be another's by now
            return self.requests.get(request.id, request) is request and self._is_taken(request.id)

        try:
            yield  # to `stream`: only an iterator that has begun can be left
            while is_there():
                for output in self._step_for((request.id,)):
                    yield output
                    if output.finished:
                        return
            self._check_usable(awake=False)
        finally:
            if is_there():
                self._leave([request.id])
