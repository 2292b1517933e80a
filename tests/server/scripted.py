"""A stand-in for `AsyncLLM` that writes given texts, so that tests of the server need no model that can write."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from nanovllm import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams


class ScriptedLLM:
    """Answers each request with `texts`, one for each sample. Its tokens are characters.

    Args:
        texts: the samples' texts.
        piece_size: how many characters of each sample a step adds.
        prompt: the text of each rendered prompt.
        finish_reason, stop_reason: how each sample ends.

    Attributes:
        template: the arguments of the last `chat_prompt`.
        params: the parameters of the last request.
        prompt_ids: its prompt.
        num_running: how many requests are being answered.
    """

    max_model_len = 1 << 20
    tokenizer = SimpleNamespace(chat_template=None)

    def __init__(
        self,
        *texts: str,
        piece_size: int = 1,
        prompt: str = "<assistant>",
        finish_reason: str = "stop",
        stop_reason: str | None = None,
    ):
        self.texts = texts
        self.piece_size = piece_size
        self.prompt = prompt
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.template: dict[str, Any] = {}
        self.messages: Sequence[dict] = []
        self.params = SamplingParams()
        self.prompt_ids: list[int] = []
        self.num_running = 0

    async def chat_prompt(self, messages: Sequence[dict], **template: Any) -> list[int]:
        self.messages, self.template = messages, template
        return await self.encode(self.prompt)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    async def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def check_health(self) -> None:
        """Be well."""

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams()

    async def generate(
        self, prompt: dict, params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        assert params.n == len(self.texts)
        self.params, self.prompt_ids = params, prompt["prompt_token_ids"]
        self.num_running += 1
        try:
            is_whole = params.output_kind is RequestOutputKind.FINAL_ONLY
            size = max(map(len, self.texts)) if is_whole else self.piece_size
            for start in range(0, max(map(len, self.texts)), size):
                samples = [self._sample(i, text, start, size) for i, text in enumerate(self.texts) if start < len(text)]
                finished = start + size >= max(map(len, self.texts))
                yield RequestOutput(request_id or "0", None, self.prompt_ids, samples, finished)
        finally:
            self.num_running -= 1

    def _sample(self, index: int, text: str, start: int, size: int) -> CompletionOutput:
        new = text[start : start + size]
        sample = CompletionOutput(index, new, [ord(character) for character in new], None)
        if start + size < len(text):
            return sample
        return replace(sample, finish_reason=self.finish_reason, stop_reason=self.stop_reason)
