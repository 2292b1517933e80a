"""A model's chat template: what it reads, and messages in the form that it prints. No torch here."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceType
from typing import Any

from nanovllm.checks import is_list, shown
from nanovllm.sandbox.pool import Pool
from nanovllm.sandbox.templates import OTHER_ROLE


class ChatTemplate:
    """One chat template of a model.

    Templates differ in the form they expect of a message's content (text or parts), of a tool call's arguments (an
    object or JSON text) and of its id (Mistral's: nine letters and digits). Most wrong forms give no error: they are
    printed in Python's notation, or quoted twice. So small conversations are rendered first to find out which forms are
    right, all in one request to the pool.

    Args:
        text: the template, in Jinja.
        pool: renders it.
        special_tokens: the tokenizer's special tokens, which are variables of each template.
        max_chars: longer texts are refused.

    Attributes:
        variables: names that the template reads.

    Raises:
        ValueError: the template is not Jinja, or takes too much time or memory.
    """

    def __init__(self, text: str, pool: Pool, special_tokens: dict[str, str], max_chars: int):
        self.text = text
        self.pool = pool
        self.special_tokens = special_tokens
        self.max_chars = max_chars
        found = pool.ask({"inspected": {"chat_template": text, **special_tokens}})
        # `inspect` in sandbox/templates.py says what these dicts have.
        self.variables = frozenset(found["variables"])
        self._contents: dict[str, dict[str, bool]] = found["contents"]
        self._calls: dict[str, bool] = found["calls"]

    def check_variables(self, variables: Iterable[str]) -> None:
        """Raise TypeError for a variable that the template does not read, which would have no effect."""
        from transformers import PreTrainedTokenizerBase

        # transformers' function uses its arguments itself; only `documents` reaches the template.
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
        adapted = dict(message)
        role = message["role"]
        calls = message.get("tool_calls") if role == "assistant" else None
        if calls is not None and not (is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
            raise TypeError(f"{name}['tool_calls'] must be a list of dicts, got {shown(calls)}")
        if calls:
            adapted["tool_calls"] = [
                self._adapt_call(call, f"{name}['tool_calls'][{i}]") for i, call in enumerate(calls)
            ]
        else:
            # Clients send null or an empty list. Templates, however, ask whether the message has the key.
            adapted.pop("tool_calls", None)
        if self._calls["short_ids"] and isinstance(call_id := message.get("tool_call_id"), str):
            adapted["tool_call_id"] = _short_id(call_id)
        content = message.get("content")
        if content is None and calls:
            content = ""
        adapted["content"] = self._adapt_content(role, content, f"{name}['content']")
        return adapted

    def _adapt_content(self, role: str, content: Any, name: str) -> str | list[Any]:
        printed = self._contents.get(role, self._contents[OTHER_ROLE])
        if is_list(content):
            texts = [_text_of(part, f"{name}[{i}]") for i, part in enumerate(content)]
            if printed["parts"]:
                return list(content)
            content = "\n".join(texts)
        if isinstance(content, str):
            needs_part = printed["first_part"] and not printed["text"]
            return [{"type": "text", "text": content}] if needs_part else content
        expected = "text or a list of text parts, or None next to an assistant's tool_calls"
        raise TypeError(f"{name} must be {expected}; got {type(content).__name__}")

    def _adapt_call(self, call: Mapping, name: str) -> dict:
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise TypeError(f"{name}['function'] must be a dict, got {type(function).__name__}")
        arguments = function.get("arguments")
        if arguments is None or (isinstance(arguments, str) and not arguments):
            arguments = {}  # clients write both for a call without arguments
        if isinstance(arguments, str) and not self._calls["text"]:
            arguments = _parse_arguments(arguments)
        elif isinstance(arguments, Mapping) and self._calls["text"] and not self._calls["object"]:
            arguments = json.dumps(arguments, ensure_ascii=False)
        adapted = {**function, "arguments": arguments}
        if "function" in call:
            adapted = {**call, "function": adapted}
        if self._calls["short_ids"] and isinstance(call_id := adapted.get("id"), str):
            adapted["id"] = _short_id(call_id)
        return adapted


def resolve_chat_template(
    tokenizer: Any, chat_template: str | None = None, tools: list[dict] | None = None
) -> str | None:
    """Return the text of the template that `LLM.chat` renders, or None without one.

    Args:
        tokenizer: the model's transformers tokenizer, which has its templates.
        chat_template: Jinja text, or the name of one of the tokenizer's templates, to use instead of its own.
        tools: the tools of the conversation, for which a tokenizer may have another template.
    """
    if chat_template is None and not tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template(chat_template, tools)


def _text_of(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise ValueError(f"{name} must be of type 'text', the only one that is supported; got {shown(kind)}")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{name}['text'] must be text, got {type(part.get('text')).__name__}")
    return part["text"]


def _short_id(call_id: str) -> str:
    """Return an id of nine letters and digits, the same for a call and for its result."""
    is_short = len(call_id) == 9 and call_id.isascii() and call_id.isalnum()
    return call_id if is_short else hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _parse_arguments(text: str) -> dict:
    """Return a call's arguments as an object.

    If they are not a JSON object, return their text under a key, so that the model sees its mistake: the key that
    Anthropic's documentation gives for this.
    """
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"INVALID_JSON": text}
