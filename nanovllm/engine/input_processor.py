"""Checks what callers send and turns it into requests: prompts become token ids, constraints become token filters.

Nothing here reads or changes the engine's state, so several threads may use it at the same time as the engine's thread.
"""

from dataclasses import asdict
from typing import Any

from nanovllm.checkpoints.model_source import ModelSource
from nanovllm.checks import check_in_vocabulary, is_list, length, shown
from nanovllm.config import Config
from nanovllm.engine.chat_renderer import ChatRenderer
from nanovllm.engine.grammars import Grammars
from nanovllm.engine.request import Request, check_request_id
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text_codec import TextCodec
from nanovllm.engine.token_filter import TokenFilter, make_filter
from nanovllm.inputs import PromptParts, is_array, split_prompt
from nanovllm.library_errors import refusing_panics
from nanovllm.sampling_params import MAX_STOP_IDS, SamplingParams
from nanovllm.utils.loaded_once import loaded_once

# Bounds the memory of logprobs=-1: entries in the results of a request (8 bytes each), and in a step (12 bytes each, on
# the device).
_MAX_LOGPROB_ENTRIES = 1 << 26
_MAX_STEP_LOGPROB_ENTRIES = 1 << 27


class InputProcessor:
    """Makes requests for one engine.

    Args:
        config: the engine's Config.
        source: the model, which has the tokenizer and the vocabulary size.
        max_model_len: longest prompt plus output, in tokens.

    Attributes:
        codec: encodes and decodes texts.
        chats: makes prompts of conversations.
    """

    def __init__(self, config: Config, source: ModelSource, max_model_len: int):
        self.config = config
        self.source = source
        self.max_model_len = max_model_len
        self.vocab_size = source.config.vocab_size
        self.codec = TextCodec(source, max_model_len, config.skip_tokenizer_init)
        self.chats = ChatRenderer(self.codec)
        self._closed = False

    def close(self) -> None:
        """End the processes that render templates and compile grammars. May be called again."""
        self._closed = True
        self.chats.close()
        if grammars := self.__dict__.get("grammars"):
            grammars.close()

    @loaded_once
    def grammars(self) -> Grammars:
        """Compiles structured outputs. Made when it is first used, which takes 0.2 s, most of it with the GIL."""
        return Grammars(
            self.codec.tokenizer,
            self.codec.token_bytes(skip_special_tokens=False),
            vocab_size=self.vocab_size,
            eos_token_ids=self.codec.end_ids,
        )

    @loaded_once
    def default_params(self):
        """The parameters of requests without any: what the model's files say."""
        if self.config.generation_config != "auto":
            return SamplingParams()
        try:
            return SamplingParams(**self.source.sampling_defaults)
        except (TypeError, ValueError) as error:
            advice = "give SamplingParams or correct the file"
            raise ValueError(f"the model's generation_config.json is wrong ({advice}): {error}") from None

    def process(
        self,
        prompt: Any,
        params: SamplingParams | None,
        request_id: Any = None,
        stream: bool = False,
        max_grammar_seconds: float | None = None,
    ) -> Request:
        """Check a request and prepare everything it needs on the host.

        Args:
            max_grammar_seconds: see `Grammars.compile`.

        Raises:
            TypeError, ValueError: the request cannot be served; the message names the argument.
            TooCostly: compiling its grammar takes more than `max_grammar_seconds`.
        """
        parts, params = self._resolve(prompt, params)
        if self.codec.has_tokenizer:
            _ = self.codec.backend  # a broken one refuses requests here; in a step it would lose all of them
        token_ids = self._prompt_ids(parts)
        stop_ids, max_output_len = self._end_conditions(len(token_ids), params)
        token_filter = self._make_filter(params, stop_ids, max_grammar_seconds)
        # The first mask is computed here, and not in a step.
        mask = token_filter.compute_mask() if token_filter and token_filter.depends_on_output else None
        if token_filter and token_filter.is_blocked:
            raise ValueError("min_tokens and structured_outputs leave no token that could be sampled first")
        samples = []
        for index in range(params.n):
            sample = Sequence(
                token_ids,
                params,
                stop_ids,
                index=index,
                max_output_len=max_output_len,
                vocab_size=self.vocab_size,
                token_filter=token_filter.copy() if token_filter else None,
                mask=mask,
            )
            samples.append(sample)
        has_text = self.codec.has_tokenizer and params.detokenize
        has_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
        return Request(
            chosen_id=None if request_id is None else check_request_id(request_id),
            prompt=parts.text,
            params=params,
            samples=samples,
            stream=stream,
            token_bytes=self.codec.token_bytes(params.skip_special_tokens) if has_text else None,
            all_token_bytes=self.codec.token_bytes(skip_special_tokens=False) if has_text and has_logprobs else None,
        )

    def check(self, prompt: Any, params: Any) -> None:
        """Check a request as far as no text must be tokenized and no token mask made. Raise as `process` does."""
        parts, params = self._resolve(prompt, params)
        if parts.token_ids is not None:
            self._end_conditions(len(self._prompt_ids(parts)), params)

    def _resolve(self, prompt: Any, params: Any) -> tuple[PromptParts, SamplingParams]:
        """Check a request as far as its length does not matter. Return its prompt's parts and its whole parameters."""
        if not isinstance(params, SamplingParams | None):
            raise TypeError(f"sampling_params must be SamplingParams, got {shown(params)}")
        params = self._resolve_logprobs(self.default_params if params is None else params)
        parts = split_prompt(prompt)
        if parts.cache_salt is not None:
            params = _with_salt(params, parts.cache_salt)
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            check_in_vocabulary(name, getattr(params, name) or (), self.vocab_size)
        if params.stop and not self.codec.has_tokenizer:
            raise ValueError("stop strings need a tokenizer, and there is none")
        return parts, params

    def _end_conditions(self, num_prompt: int, params: SamplingParams) -> tuple[frozenset[int], int]:
        """Return the request's stop ids, and how many tokens fit after the prompt.

        Raises:
            ValueError: the request does not fit.
        """
        max_output_len = self._max_output_len(num_prompt, params)
        self._check_logprobs(num_prompt, max_output_len, params)
        return self._stop_ids(params), max_output_len

    def _resolve_logprobs(self, params: SamplingParams) -> SamplingParams:
        """Check the numbers of log-probabilities, and set their mode if the request has none."""
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and 0 <= self.config.max_logprobs < self._num_logprobs(count):
                raise ValueError(f"{name} must be at most max_logprobs={self.config.max_logprobs}, got {count}")
        if params.logprobs_mode is not None or self.config.logprobs_mode == "raw_logprobs":
            return params
        return params.clone(logprobs_mode=self.config.logprobs_mode)

    # -- parts of process --------------------------------------------------------------------------------------------

    def _prompt_ids(self, parts: PromptParts) -> list[int]:
        prompt: Any = parts.token_ids
        if prompt is None and parts.text is not None:
            self.codec.check_text("prompt", parts.text)
            token_ids = self.codec.encode(parts.text, add_special_tokens=True)
        elif prompt is not None and (is_list(prompt) or (is_array(prompt) and prompt.ndim == 1)):
            if (num_tokens := length(prompt)) >= self.max_model_len:  # before a list of that length is made
                raise self.codec.too_long(f"prompt has {num_tokens} tokens")
            token_ids = prompt.tolist() if is_array(prompt) else list(prompt)
        else:
            raise TypeError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
        if not token_ids:
            raise ValueError("prompt is empty; it must have at least one token")
        return self.codec.checked_ids("prompt", token_ids)

    def _max_output_len(self, num_prompt: int, params: SamplingParams) -> int:
        """Return how many tokens fit after the prompt."""
        prompt = f"prompt has {num_prompt} tokens"
        if num_prompt >= self.max_model_len:
            raise self.codec.too_long(prompt)
        max_output_len = self.max_model_len - num_prompt
        if params.min_tokens > max_output_len:
            raise ValueError(f"{prompt}; min_tokens must be at most {max_output_len} after it, got {params.min_tokens}")
        return max_output_len

    def _num_logprobs(self, count: int) -> int:
        return self.vocab_size if count == -1 else count

    def _check_logprobs(self, num_prompt: int, max_output_len: int, params: SamplingParams) -> None:
        """Refuse log-probabilities of the whole vocabulary that need too much memory, in a step or altogether."""
        num_output = min(max_output_len, params.max_tokens or max_output_len) * params.n
        for name, num_tokens, option in (
            ("logprobs", num_output, "max_num_seqs"),
            ("prompt_logprobs", num_prompt, "max_num_batched_tokens"),
        ):
            if getattr(params, name) != -1:
                continue
            message = f"{name}=-1 has {self.vocab_size} entries a token"
            request_limit = _MAX_LOGPROB_ENTRIES // self.vocab_size
            if num_tokens > request_limit:
                limits = f"at most {request_limit} such tokens, got {num_tokens}"
                raise ValueError(f"{message}, so the request must have {limits}")
            step_limit = _MAX_STEP_LOGPROB_ENTRIES // self.vocab_size
            if getattr(self.config, option) > step_limit:
                raise ValueError(f"{message}, so the engine needs {option}={step_limit} or less")

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.codec.end_ids)
        if params.min_tokens and len(stop_ids) > MAX_STOP_IDS:
            message = f"stop_token_ids and the model's end-of-sequence ids are {len(stop_ids)} together"
            raise ValueError(f"{message}; with min_tokens they must be at most {MAX_STOP_IDS}")
        return stop_ids

    def _make_filter(
        self, params: SamplingParams, stop_ids: frozenset[int], max_grammar_seconds: float | None
    ) -> TokenFilter | None:
        if params.structured_outputs is None:
            return make_filter(params, self.vocab_size, encode_all=self.codec.encode_all, stop_ids=stop_ids)
        with refusing_panics("structured_outputs cannot be compiled"):
            grammars = self.grammars
            if self._closed:  # `close` may not have seen them
                grammars.close()
            return grammars.compile(
                last_resort_ids=self.codec.end_ids if params.ignore_eos else (),
                stop_ids=stop_ids,
                min_tokens=params.min_tokens,
                max_seconds=max_grammar_seconds,
                **asdict(params.structured_outputs),
            )


def _with_salt(params: SamplingParams, cache_salt: Any) -> SamplingParams:
    if params.cache_salt not in (None, cache_salt):
        raise ValueError("cache_salt of the prompt and of sampling_params differ; give one")
    return params.clone(cache_salt=cache_salt)
