"""Checks what callers send and turns it into requests: prompts become token ids, constraints become token filters.

Nothing here reads or changes the engine's state, so several threads may use it at the same time as the engine's thread.
No torch here.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceType
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

from nanovllm.checkpoints.hub import ModelSource
from nanovllm.checks import in_vocabulary, is_list, length, shown
from nanovllm.config import Config
from nanovllm.engine.chat_template import ChatTemplate, resolve_chat_template
from nanovllm.engine.detokenizer import TokenBytes
from nanovllm.engine.grammars import GrammarFilter, Grammars
from nanovllm.engine.request import Request, check_request_id
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.token_filter import TokenFilter, make_filter
from nanovllm.inputs import PromptParts, TokensPrompt, is_array, split_prompt
from nanovllm.library_errors import refusing
from nanovllm.sampling_params import MAX_STOP_IDS, SamplingParams
from nanovllm.sandbox.pool import Pool
from nanovllm.vllm_options import NEUTRAL_CHAT, drop_neutral

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Bounds the time to parse a caller's chat template. Real templates have some thousands of characters.
_MAX_TEMPLATE_CHARS = 1 << 20
# Bounds the characters of a token: no vocabulary has a longer one. A text with more characters than this for each token
# of max_model_len is refused before it is tokenized.
_MAX_TOKEN_CHARS = 1024
# Few texts have more characters a token. Those that do are tokenized in pieces first, to refuse them early if they are
# too long.
_USUAL_TOKEN_CHARS = 8
_PIECE_CHARS = 1 << 16
# Bounds the memory of logprobs=-1: entries in the results of a request (8 bytes each), and in a step (12 bytes each, on
# the device).
_MAX_LOGPROB_ENTRIES = 1 << 26
_MAX_STEP_LOGPROB_ENTRIES = 1 << 27
# Bounds the values and keys in messages and tools for each token of max_model_len. Templates make at least a token of
# each value, so a conversation that fits has far fewer.
_MAX_TOKEN_VALUES = 16


class loaded_once(cached_property):
    """A cached property that one thread loads while others wait for it; cached_property has no lock since Python 3.12.

    Once it is loaded, reading it takes no lock: Python finds the value in the instance's `__dict__` first, and does not
    call `__get__`.
    """

    def __init__(self, load: Callable[[Any], Any]):
        super().__init__(load)
        self.loading = threading.RLock()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        with self.loading:
            return super().__get__(instance, owner)


class InputProcessor:
    """Makes requests for one engine.

    Args:
        config: the engine's Config.
        source: the model, which has the tokenizer and the vocabulary size.
        max_model_len: longest prompt plus output, in tokens.
    """

    def __init__(self, config: Config, source: ModelSource, max_model_len: int):
        self.config = config
        self.source = source
        self.max_model_len = max_model_len
        self.vocab_size = source.config.vocab_size
        self.has_tokenizer = source.has_tokenizer and not config.skip_tokenizer_init
        self.templates = Pool("templates", {}, "messages do not fit the model's chat template")
        self._closed = False
        self._token_bytes: dict[bool, TokenBytes] = {}
        self._chat_template = lru_cache(maxsize=8)(self._make_chat_template)

    def close(self) -> None:
        """End the processes that render templates and compile grammars. May be called again."""
        self._closed = True
        self.templates.close()
        if grammars := self.__dict__.get("grammars"):
            grammars.close()

    @loaded_once
    def tokenizer(self):
        """The model's transformers tokenizer, loaded when it is first used."""
        if self.config.skip_tokenizer_init:
            raise ValueError("skip_tokenizer_init is set, so there is no tokenizer: give prompts as token ids")
        return self.source.tokenizer()

    @loaded_once
    def backend(self) -> "Tokenizer":
        """The engine's copy of the tokenizer's backend.

        `tokenizer` belongs to the caller, who may use it while the engine encodes: each call with truncation or padding
        sets them in its backend.
        """
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend

    @loaded_once
    def end_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text: those that the model's configs name, and the tokenizer's, as in vLLM.

        The configs of a model that was tuned to chat may still name the end token of its base model.
        """
        ids = self.source.config.eos_token_ids
        tokenizer_id: Any = None
        if self.has_tokenizer:
            tokenizer_id = self.tokenizer.eos_token_id
        elif self.source.has_tokenizer and not ids:  # even with `skip_tokenizer_init`, a text must end
            tokenizer_id = self.source.tokenizer().eos_token_id
        if tokenizer_id is None or tokenizer_id in ids or tokenizer_id >= self.vocab_size:
            return ids
        return (*ids, tokenizer_id)

    @loaded_once
    def grammars(self) -> Grammars:
        """Compiles structured outputs. Made when it is first used, which takes 0.2 s, most of it with the GIL."""
        return Grammars(
            self.tokenizer,
            self.token_bytes(skip_special_tokens=False),
            vocab_size=self.vocab_size,
            eos_token_ids=self.end_ids,
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
            max_grammar_seconds: see `Grammars.filter`.

        Raises:
            TypeError, ValueError: the request cannot be served; the message names the argument.
            TooCostly: compiling its grammar takes more than `max_grammar_seconds`.
        """
        parts, params = self._resolve(prompt, params)
        if self.has_tokenizer:
            _ = self.backend  # a broken one refuses requests here; in a step it would lose all of them
        token_ids = self._prompt_ids(parts)
        stop_ids, max_output_len = self._limits(len(token_ids), params)
        token_filter = self._make_filter(params, stop_ids, max_grammar_seconds)
        # The first mask is computed here, and not in a step.
        mask = token_filter.compute_mask() if token_filter and token_filter.depends_on_output else None
        if isinstance(token_filter, GrammarFilter) and token_filter.is_blocked:
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
        has_text = self.has_tokenizer and params.detokenize
        has_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
        return Request(
            chosen_id=None if request_id is None else check_request_id(request_id),
            prompt=parts.text,
            params=params,
            samples=samples,
            stream=stream,
            token_bytes=self.token_bytes(params.skip_special_tokens) if has_text else None,
            all_token_bytes=self.token_bytes(skip_special_tokens=False) if has_text and has_logprobs else None,
        )

    def check(self, prompt: Any, params: Any) -> None:
        """Check a request as far as no text must be tokenized and no token mask made. Raise as `process` does."""
        parts, params = self._resolve(prompt, params)
        if parts.token_ids is not None:
            self._limits(len(self._prompt_ids(parts)), params)

    def _resolve(self, prompt: Any, params: Any) -> tuple[PromptParts, SamplingParams]:
        """Check a request as far as its length does not matter. Return its prompt's parts and its whole parameters."""
        if not isinstance(params, SamplingParams | None):
            raise TypeError(f"sampling_params must be SamplingParams, got {shown(params)}")
        params = self._resolve_logprobs(self.default_params if params is None else params)
        parts = split_prompt(prompt)
        if parts.cache_salt is not None:
            params = _with_salt(params, parts.cache_salt)
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            in_vocabulary(name, getattr(params, name) or (), self.vocab_size)
        if params.stop and not self.has_tokenizer:
            raise ValueError("stop strings need a tokenizer, and there is none")
        return parts, params

    def _limits(self, num_prompt: int, params: SamplingParams) -> tuple[frozenset[int], int]:
        """Return what ends the request: its stop ids, and how many tokens fit after the prompt.

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

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, by default without the special tokens that start or end a prompt."""
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Return the token ids of each text; see `encode`."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                at = error.start
                message = f"the text has half a character, {text[at]!r} at {at}, which no tokenizer can read"
                raise ValueError(message) from None
        with _refusing_panics("the text cannot be tokenized"):
            # A batch, because only that releases the GIL.
            found = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]

    def encode_bounded(self, text: str, add_special_tokens: bool) -> list[int]:
        """Do the same as `encode`, but refuse a text of far too many tokens for `max_model_len`."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {shown(text)}")
        self._check_text("text", text)
        return self.encode(text, add_special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        if not is_list(token_ids):
            raise TypeError(f"tokens must be a list of token ids, got {shown(token_ids)}")
        if (num_tokens := length(token_ids)) > self.max_model_len:
            raise self._too_long(f"tokens are {num_tokens} ids")
        token_ids = self._checked_ids("tokens", list(token_ids))
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_bytes(self, skip_special_tokens: bool) -> TokenBytes:
        """Return the bytes of each token, which make the text of outputs."""
        if skip_special_tokens not in self._token_bytes:
            self._token_bytes[skip_special_tokens] = TokenBytes(self.backend, skip_special_tokens)
        return self._token_bytes[skip_special_tokens]

    # -- parts of process --------------------------------------------------------------------------------------------

    def _prompt_ids(self, parts: PromptParts) -> list[int]:
        prompt: Any = parts.token_ids
        if prompt is None and parts.text is not None:
            self._check_text("prompt", parts.text)
            token_ids = self.encode(parts.text, add_special_tokens=True)
        elif prompt is not None and (is_list(prompt) or (is_array(prompt) and prompt.ndim == 1)):
            if (num_tokens := length(prompt)) >= self.max_model_len:  # before a list of that length is made
                raise self._too_long(f"prompt has {num_tokens} tokens")
            token_ids = prompt.tolist() if is_array(prompt) else list(prompt)
        else:
            raise TypeError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
        if not token_ids:
            raise ValueError("prompt is empty; it must have at least one token")
        return self._checked_ids("prompt", token_ids)

    def _checked_ids(self, name: str, token_ids: list) -> list[int]:
        """Return token ids as Python's integers. Raise if one is no integer, or not in the vocabulary."""
        # Prompts are long, so a right one is not checked by a loop in Python.
        if set(map(type, token_ids)) != {int}:
            for token_id in token_ids:
                if isinstance(token_id, bool) or not isinstance(token_id, Integral):
                    raise TypeError(f"{name} must be text or a list of int token ids, got an id {shown(token_id)}")
            token_ids = list(map(int, token_ids))
        in_vocabulary(name, token_ids, self.vocab_size)
        return token_ids

    def _check_text(self, name: str, text: str) -> None:
        """Refuse a text of far too many tokens before all of it is tokenized, which would take long."""
        self._check_chars(name, len(text))
        if len(text) <= _USUAL_TOKEN_CHARS * self.max_model_len:
            return
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            num_tokens += len(self.encode(text[start : start + _PIECE_CHARS]))
            # The pieces may have a few more tokens than the whole, so this is not exact.
            if num_tokens > 2 * self.max_model_len:
                at_least = num_tokens // 2  # this part of the text has more tokens, however it is split
                raise self._too_long(f"{name}: {len(text)} characters are more than {at_least} tokens")

    def _too_long(self, subject: str) -> ValueError:
        """Return the error of an input that is too long. Clients of OpenAI's API look for its last words."""
        limit = self.max_model_len
        reason = f"this model's maximum context length is {limit} tokens, including the output"
        return ValueError(f"{subject}, too many for max_model_len={limit}: {reason}")

    def _check_chars(self, name: str, num_chars: int) -> None:
        if num_chars > _MAX_TOKEN_CHARS * self.max_model_len:
            raise self._too_long(f"{name}: {num_chars} characters")

    def _max_output_len(self, num_prompt: int, params: SamplingParams) -> int:
        """Return how many tokens fit after the prompt."""
        prompt = f"prompt has {num_prompt} tokens"
        if num_prompt >= self.max_model_len:
            raise self._too_long(prompt)
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
            stop_ids |= frozenset(self.end_ids)
        if params.min_tokens and len(stop_ids) > MAX_STOP_IDS:
            message = f"stop_token_ids and the model's end-of-sequence ids are {len(stop_ids)} together"
            raise ValueError(f"{message}; with min_tokens they must be at most {MAX_STOP_IDS}")
        return stop_ids

    def _make_filter(
        self, params: SamplingParams, stop_ids: frozenset[int], max_grammar_seconds: float | None
    ) -> TokenFilter | GrammarFilter | None:
        if params.structured_outputs is None:
            return make_filter(params, self.vocab_size, encode_all=self.encode_all, stop_ids=stop_ids)
        with _refusing_panics("structured_outputs cannot be compiled"):
            grammars = self.grammars
            if self._closed:  # `close` may not have seen them
                grammars.close()
            return grammars.filter(
                never_ids=self.end_ids if params.ignore_eos else (),
                stop_ids=stop_ids,
                min_tokens=params.min_tokens,
                max_seconds=max_grammar_seconds,
                **asdict(params.structured_outputs),
            )

    # -- chat --------------------------------------------------------------------------------------------------------

    def chat_prompts(self, messages: Any, **options: Any) -> list[TokensPrompt]:
        """Return conversations as prompts of text and token ids; see `LLM.chat_prompts`."""
        pairs = self._chat_texts_and_ids(messages, **options)
        return [TokensPrompt(prompt=text, prompt_token_ids=token_ids) for text, token_ids in pairs]

    def chat_prompt_ids(self, messages: Any, **options: Any) -> list[list[int]]:
        """Return the token ids of conversations; see `LLM.chat_prompts`."""
        return [token_ids for _, token_ids in self._chat_texts_and_ids(messages, **options)]

    def _chat_texts_and_ids(
        self, messages: Any, *, chat_template_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> list[tuple[str, list[int]]]:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if chat_template_kwargs is not None:
            if not isinstance(chat_template_kwargs, Mapping):
                raise TypeError(f"chat_template_kwargs must be a dict, got {shown(chat_template_kwargs)}")
            for name in chat_template_kwargs:
                if name == "chat_template" or not isinstance(name, str):
                    raise TypeError(f"chat_template_kwargs has {shown(name)}, which is no variable of a template")
            options |= chat_template_kwargs
        return self._render_chats(messages, **drop_neutral(options, NEUTRAL_CHAT))

    def _render_chats(
        self,
        messages: SequenceType[dict] | SequenceType[SequenceType[dict]],
        /,  # `variables` may have any names
        *,
        tools: SequenceType[dict | Callable] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        **variables: Any,
    ) -> list[tuple[str, list[int]]]:
        chats = _list_chats(messages)
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        for name, flag in flags.items():
            if not isinstance(flag, bool | None):
                raise TypeError(f"{name} must be a bool or None, got {shown(flag)}")
        if not isinstance(chat_template, str | None):
            raise TypeError(f"chat_template must be text, got {shown(chat_template)}")
        if chat_template is not None and len(chat_template) > _MAX_TEMPLATE_CHARS:
            message = f"chat_template must have at most {_MAX_TEMPLATE_CHARS} characters"
            raise ValueError(f"{message}, got {len(chat_template)}")
        if chat_template == "":
            raise ValueError("chat_template must not be empty; leave it out for the model's own")
        schemas = _tool_schemas(tools)
        text = resolve_chat_template(self.tokenizer, chat_template, schemas)
        if text is None:
            raise ValueError("the model has no chat template; give chat_template, or prompts to generate()")
        for chat in chats:
            self._check_chat([chat, schemas, variables])
        template = self._chat_template(text)
        template.check_variables(variables)
        if schemas and "tools" not in template.variables:
            raise ValueError("tools are given, but the model's chat template does not read them")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        variables |= {
            "tools": schemas,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message or False,
        }
        texts = [template.render(template.adapt(chat), **variables) for chat in chats]
        for text in texts:
            self._check_text("messages", text)
        return [(text, self.encode(text)) for text in texts]

    def _make_chat_template(self, text: str) -> ChatTemplate:
        max_chars = _MAX_TOKEN_CHARS * self.max_model_len
        return ChatTemplate(text, self.templates, special_tokens=self.tokenizer.special_tokens_map, max_chars=max_chars)

    def _check_chat(self, data: Any) -> None:
        """Refuse a conversation of far too many values or tokens before it is rendered."""
        texts = []
        todo = [data]
        num_values = 0
        num_chars = 0
        while todo:
            value = todo.pop()
            num_values += 1
            if isinstance(value, str):
                texts.append(value)
                num_chars += len(value)
            elif isinstance(value, list | tuple):
                todo += value
            elif isinstance(value, dict):
                todo += value.keys()
                todo += value.values()
            if num_values > _MAX_TOKEN_VALUES * self.max_model_len:  # or the data contains itself
                raise self._too_long(f"messages and tools have more than {num_values - 1} values")
        self._check_chars("messages", num_chars)
        self._check_text("messages", "".join(texts))


def _with_salt(params: SamplingParams, cache_salt: Any) -> SamplingParams:
    if params.cache_salt not in (None, cache_salt):
        raise ValueError("cache_salt of the prompt and of sampling_params differ; give one")
    return params.clone(cache_salt=cache_salt)


def _tool_schemas(tools: Any) -> list[dict] | None:
    """Return the JSON schemas of tools, which are given as such or as functions."""
    if tools is None:
        return None
    if not is_list(tools) or not all(isinstance(tool, dict) or callable(tool) for tool in tools):
        raise TypeError(f"tools must be a list of JSON schemas, as dicts, or of functions, got {shown(tools)}")
    return [tool if isinstance(tool, dict) else _function_schema(tool) for tool in tools]


def _function_schema(tool: Callable) -> dict:
    from transformers.utils.chat_template_utils import get_json_schema

    with refusing("tools has a function that no JSON schema can be made of", Exception):
        return get_json_schema(tool)


def _list_chats(messages: Any) -> list[Any]:
    """Return the conversations in `messages`, which is one of them or a list of them."""
    is_single = is_list(messages) and isinstance(next(iter(messages), None), dict)
    chats = [messages] if is_single else messages
    if not is_list(chats) or not chats or not all(map(_is_chat, chats)):
        raise TypeError(f"messages must be a list of dicts with role and content, got {shown(messages)}")
    return chats


def _is_chat(messages: Any) -> bool:
    return is_list(messages) and length(messages) > 0 and all(map(_is_message, messages))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


@contextmanager
def _refusing_panics(message: str) -> Iterator[None]:
    """Raise ValueError for what libraries in Rust raise: a bare Exception, or a panic, which is a BaseException."""
    try:
        yield
    except BaseException as error:
        # Each library has a PanicException of its own, which none exports. Everything else may be an interrupt.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{message}: {error!s:.200}") from error
