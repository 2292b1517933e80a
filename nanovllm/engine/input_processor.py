"""Checks what callers send and turns it into requests: prompts become token ids, constraints become token filters.

Nothing here reads or changes the engine's state, so it may run on another thread than the engine's. No torch here.
"""

from collections.abc import Sequence as SequenceType
from functools import cached_property, partial
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.token_filter import GrammarFilter, TokenFilter, compile_grammar, grammar_tokenizer, make_filter
from nanovllm.sampling_params import MAX_STOP_IDS, SamplingParams
from nanovllm.utils.checks import in_vocabulary, is_list
from nanovllm.utils.hub import ModelSource

_MAX_TOKEN_CHARS = 1024  # no vocabulary has a longer token, so a longer prompt is refused before it is tokenised

# Arguments of transformers' apply_chat_template that choose its return type. The prompt's token ids are returned here.
_NOT_OF_TEMPLATES = {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
_NOT_OF_TEMPLATES |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "conversation"}


class InputProcessor:
    """Makes requests for one engine.

    Args:
        config: the engine's.
        source: the model, which brings the tokenizer and the vocabulary size.
        max_model_len: longest prompt plus output, in tokens.
        num_kv_tokens: tokens that the whole KV cache holds.
    """

    def __init__(self, config: Config, source: ModelSource, max_model_len: int, num_kv_tokens: int):
        self.config = config
        self.source = source
        self.max_model_len = max_model_len
        self.num_kv_tokens = num_kv_tokens
        self.vocab_size = source.config.vocab_size
        self.has_tokenizer = source.has_tokenizer and not config.skip_tokenizer_init

    @cached_property
    def tokenizer(self):
        """The model's transformers tokenizer, loaded when it is first used."""
        if self.config.skip_tokenizer_init:
            raise ValueError("skip_tokenizer_init is set, so there is no tokenizer: give prompts as token ids")
        return self.source.tokenizer()

    @cached_property
    def _grammar_tokenizer(self):
        return grammar_tokenizer(self.tokenizer, self.vocab_size, self.source.config.eos_token_ids)

    def process(
        self, prompt, params: SamplingParams | None, request_id: int | str | None = None, stream: bool = False
    ) -> Request:
        """Check a request and prepare everything it needs on the host.

        Raises:
            TypeError, ValueError: the request cannot be served; the message names the argument.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
        if self.has_tokenizer:
            _ = self.tokenizer  # a broken one refuses requests here; in a step it would lose all of them
        token_ids = self._prompt_ids(prompt)
        end_ids = self._end_ids(params)
        self._check_lengths(len(token_ids), params)
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            in_vocabulary(name, getattr(params, name) or (), self.vocab_size)
        if params.stop and not self.has_tokenizer:
            raise ValueError("stop strings need a tokenizer, and there is none")
        token_filter = self._token_filter(params, end_ids)
        samples = []
        for index in range(params.n):
            own_filter = token_filter.copy() if token_filter else None
            samples.append(Sequence(token_ids, params, end_ids, index=index, token_filter=own_filter))
        text = prompt if isinstance(prompt, str) else None
        decode = partial(self.decode, params.skip_special_tokens) if self.has_tokenizer else None
        return Request(request_id, text, params, samples, stream, decode)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, by default without the special tokens that start or end a prompt."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"the text has half a character, {text[error.start]!r} at {error.start}, which no tokenizer can read"
            raise ValueError(what) from None
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, skip_special_tokens: bool, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        if self.tokenizer.is_fast:  # calling the backend directly skips transformers' layer, which costs more
            return self.tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(token_ids, **options)

    # -- parts of process --------------------------------------------------------------------------------------------

    def _prompt_ids(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            if len(prompt) > _MAX_TOKEN_CHARS * self.max_model_len:
                what = f"prompt has {len(prompt)} characters"
                raise ValueError(f"{what}, too many for max_model_len={self.max_model_len}")
            token_ids = self.encode(prompt, add_special_tokens=True)
        elif is_list(prompt):
            token_ids = list(prompt)
        else:
            raise TypeError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
        if not token_ids:
            raise ValueError("prompt is empty; it must have at least one token")
        # One pass for both checks, because prompts are long.
        wrong = [i for i in token_ids if type(i) is not int or not 0 <= i < self.vocab_size]
        if wrong and type(wrong[0]) is not int:
            raise TypeError(f"prompt must be text or a list of int token ids, got an id {wrong[0]!r}")
        in_vocabulary("prompt", wrong[:1], self.vocab_size)
        return token_ids

    def _check_lengths(self, num_prompt: int, params: SamplingParams) -> None:
        total = num_prompt + params.max_tokens
        what = f"prompt has {num_prompt} tokens and max_tokens is {params.max_tokens}"
        if total > self.max_model_len:
            raise ValueError(f"{what}; together they must be at most max_model_len={self.max_model_len}")
        if total > self.num_kv_tokens:
            raise ValueError(f"{what}; the whole KV cache holds {self.num_kv_tokens} tokens: raise num_kvcache_blocks")

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= frozenset(self.source.config.eos_token_ids)
        if params.min_tokens and len(end_ids) > MAX_STOP_IDS:
            what = f"stop_token_ids and the model's end-of-sequence ids are {len(end_ids)} together"
            raise ValueError(f"{what}; with min_tokens they must be at most {MAX_STOP_IDS}")
        return end_ids

    def _token_filter(self, params: SamplingParams, end_ids: frozenset[int]) -> TokenFilter | GrammarFilter | None:
        if params.structured_outputs is None:
            return make_filter(params, self.vocab_size, self.encode, end_ids)
        return GrammarFilter(self._grammar_tokenizer, compile_grammar(params.structured_outputs), self.vocab_size)

    # -- chat --------------------------------------------------------------------------------------------------------

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
        """Return the token ids of conversations; see `LLM.chat_prompts`."""
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
        return [self.encode(text) for text in texts]


def _is_chat(messages: Any) -> bool:
    return is_list(messages) and all(isinstance(m, dict) and "role" in m for m in messages)
