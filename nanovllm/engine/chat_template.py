"""A model's chat template: what it reads, and messages in the form that it prints. No torch here."""

import inspect
import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceType
from functools import cached_property, lru_cache
from typing import Any

from nanovllm.checks import is_list, shown
from nanovllm.sandbox.pool import LimitError, Pool

_PROBE = "Xprobe"  # text that is looked for in renderings
_ARGUMENTS = {"argument": _PROBE}
_USER = {"role": "user", "content": "x"}


class ChatTemplate:
    """One chat template of a model.

    Templates differ in the form they expect of a message's content (text or parts) and of a tool call's arguments (an
    object or JSON text). A wrong form gives no error: it is printed in Python's notation, or quoted twice. So small
    conversations are rendered to find out which forms are right.

    Args:
        text: the template, in Jinja.
        pool: renders it.
        special_tokens: the tokenizer's, which are variables of each template.
        max_chars: longer texts are refused.

    Attributes:
        variables: names that the template reads.

    Raises:
        ValueError: the template is not Jinja.
    """

    def __init__(self, text: str, pool: Pool, special_tokens: dict[str, str], max_chars: int):
        self.text = text
        self.pool = pool
        self.special_tokens = special_tokens
        self.max_chars = max_chars
        self.variables = frozenset(pool.ask({"template": text})["variables"])
        self._prints = lru_cache(maxsize=32)(self._find_prints)  # bounded, because roles are the caller's words

    def check_variables(self, variables: Iterable[str]) -> None:
        """Raise TypeError for a variable that the template does not read, which would have no effect."""
        from transformers import PreTrainedTokenizerBase

        # Arguments of transformers' function do not reach the template, but for documents.
        parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents"}
        settable = self.variables - parameters - {"messages"}
        for name in variables:
            if name not in settable:
                names = ", ".join(sorted(settable)) or "none"
                raise TypeError(f"{shown(name)} is no variable of the chat template; its variables are: {names:.500}")

    def render(self, messages: list[dict], **variables: Any) -> str:
        """Return the text of one conversation."""
        arguments = {"conversation": messages, "chat_template": self.text, **self.special_tokens, **variables}
        return self.pool.ask({"arguments": arguments, "max_chars": self.max_chars})["text"]

    def adapt(self, messages: SequenceType[Mapping]) -> list[dict]:
        """Return the messages with contents and tool calls in the form that the template prints.

        Raises:
            TypeError, ValueError: a content or a tool call is not one that a text model can be given.
        """
        return [self._adapt(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _adapt(self, message: Mapping, name: str) -> dict:
        adapted, role = dict(message), message["role"]
        calls = message.get("tool_calls") if role == "assistant" else None
        if calls:
            if not is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
                raise TypeError(f"{name}['tool_calls'] must be a list of dicts")
            names = (f"{name}['tool_calls'][{i}]" for i in range(len(calls)))
            adapted["tool_calls"] = list(map(self._adapt_call, calls, names))
        content = message.get("content")
        if content is None and calls:
            content = ""
        if isinstance(content, str):
            needs_parts = not self._prints(role, as_parts=False) and self._prints(role, as_parts=True)
            adapted["content"] = [{"type": "text", "text": content}] if needs_parts else content
        elif is_list(content):
            texts = [_text_of(part, f"{name}['content'][{i}]") for i, part in enumerate(content)]
            adapted["content"] = list(content) if self._prints(role, as_parts=True) else "\n".join(texts)
        else:
            what = "text or a list of text parts, or None beside an assistant's tool_calls"
            raise TypeError(f"{name}['content'] must be {what}; got {type(content).__name__}")
        return adapted

    def _adapt_call(self, call: Mapping, name: str) -> dict:
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise TypeError(f"{name}['function'] must be a dict, got {type(function).__name__}")
        arguments = function.get("arguments")
        takes_text, takes_objects = self._argument_forms
        if isinstance(arguments, str) and not takes_text:
            arguments = _parse_arguments(arguments, name)
        elif isinstance(arguments, Mapping) and takes_text and not takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        adapted = function | {"arguments": arguments} if "arguments" in function else function
        return call | {"function": adapted} if "function" in call else adapted

    # -- what the template prints ------------------------------------------------------------------------------------

    def _find_prints(self, role: str, as_parts: bool) -> bool:
        """Return whether the template prints a content of this role that is text, or that is text parts."""
        message = {"role": role, "content": [{"type": "text", "text": _PROBE}] if as_parts else _PROBE}
        orders = {"user": [message], "system": [message, _USER], "developer": [message, _USER]}
        text = self._try(orders.get(role, [_USER, message]))
        return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text

    @cached_property
    def _argument_forms(self) -> tuple[bool, bool]:
        """Return whether the template prints arguments of a tool call that are JSON text, and those in a dict."""

        def rendered(arguments: Any) -> str:
            call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
            return self._try([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])

        text, as_object = json.dumps(_ARGUMENTS), rendered(_ARGUMENTS)
        return text in rendered(text), _PROBE in as_object and f"'{_PROBE}'" not in as_object

    def _try(self, messages: list[dict]) -> str:
        try:
            return self.render(messages)
        except LimitError:  # so would another conversation, after as long
            raise
        except ValueError:  # the template refuses this form, or such a conversation
            return ""


def _text_of(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise ValueError(f"{name} must be of type 'text', the only one that is supported; got {shown(kind)}")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{name}['text'] must be text, got {type(part.get('text')).__name__}")
    return part["text"]


def _parse_arguments(text: str, name: str) -> dict:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"{name} must have arguments that are a JSON object, got {shown(text)}")
    return arguments
