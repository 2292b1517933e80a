"""Conversations become prompts: checks, the chat template, and token ids."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceType
from functools import lru_cache
from typing import Any

from nanovllm.checks import is_list, length, shown
from nanovllm.engine.chat_template import ChatTemplate, resolve_chat_template
from nanovllm.engine.text_codec import TextCodec
from nanovllm.inputs import TokensPrompt
from nanovllm.library_errors import refusing
from nanovllm.sandbox.pool import Pool
from nanovllm.vllm_options import NEUTRAL_CHAT, drop_neutral

# Bounds the time to parse a caller's chat template. Real templates have some thousands of characters.
_MAX_TEMPLATE_CHARS = 1 << 20
# Bounds the values and keys in messages and tools for each token of max_model_len. Templates make at least a token of
# each value, so a conversation that fits has far fewer.
_MAX_VALUES_PER_TOKEN = 16


class ChatRenderer:
    """Makes prompts of conversations. Several threads may use it at the same time.

    Args:
        codec: tokenizes the texts, and has the tokenizer whose chat template is the default.
    """

    def __init__(self, codec: TextCodec):
        self.codec = codec
        self.templates = Pool("templates", {}, "messages do not fit the model's chat template")
        self._closed = False
        self._chat_template = lru_cache(maxsize=8)(self._make_chat_template)

    def close(self) -> None:
        """End the processes that render templates. May be called again."""
        self._closed = True
        self.templates.close()

    def prompts(self, messages: Any, **options: Any) -> list[TokensPrompt]:
        """Return conversations as prompts of text and token ids; see `LLM.chat_prompts`."""
        pairs = self.texts_and_ids(messages, **options)
        return [TokensPrompt(prompt=text, prompt_token_ids=token_ids) for text, token_ids in pairs]

    def prompt_ids(self, messages: Any, **options: Any) -> list[list[int]]:
        """Return the token ids of conversations; see `LLM.chat_prompts`."""
        return [token_ids for _, token_ids in self.texts_and_ids(messages, **options)]

    def texts_and_ids(
        self, messages: Any, *, chat_template_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> list[tuple[str, list[int]]]:
        """Return the texts and the token ids of conversations; see `LLM.chat_prompts`."""
        if self._closed:
            raise RuntimeError("the engine is closed")
        if chat_template_kwargs is not None:
            if not isinstance(chat_template_kwargs, Mapping):
                raise TypeError(f"chat_template_kwargs must be a dict, got {shown(chat_template_kwargs)}")
            for name in chat_template_kwargs:
                if name == "chat_template" or not isinstance(name, str):
                    raise TypeError(f"chat_template_kwargs has {shown(name)}, which is no variable of a template")
            options |= chat_template_kwargs
        return self._render(messages, **drop_neutral(options, NEUTRAL_CHAT))

    def _render(
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
        text = resolve_chat_template(self.codec.tokenizer, chat_template, schemas)
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
            self.codec.check_text("messages", text)
        return [(text, self.codec.encode(text)) for text in texts]

    def _make_chat_template(self, text: str) -> ChatTemplate:
        special_tokens = self.codec.tokenizer.special_tokens_map
        return ChatTemplate(text, self.templates, special_tokens, max_chars=self.codec.max_chars)

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
            if num_values > _MAX_VALUES_PER_TOKEN * self.codec.max_model_len:  # or the data contains itself
                raise self.codec.too_long(f"messages and tools have more than {num_values - 1} values")
        self.codec.check_chars("messages", num_chars)
        self.codec.check_text("messages", "".join(texts))


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
