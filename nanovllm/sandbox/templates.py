"""Renders chat templates. A child process runs this, so nothing of nanovllm, and no torch, is imported here."""

import json
from collections.abc import Callable
from typing import Any

# Other roles are the caller's words. A template is asked about all of them as one, so that the work has a bound.
OTHER_ROLE = "other"
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model", OTHER_ROLE)
# texts that are looked for in renderings
_PROBE = "Xprobe"
_SECOND_PROBE = "Xsecond"
_USER = {"role": "user", "content": "x"}
# Mistral's templates refuse ids without nine characters
_SHORT_ID = "call00000"
_LONG_ID = "call_0123456789abcdef"


def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that answers requests.

    `{"inspected": arguments}` asks what a template reads and prints; see `inspect`.
    `{"arguments": ..., "max_chars": ...}` asks for the `text` of a conversation; a text of more characters is refused.
    The arguments are those of transformers' `apply_chat_template`.
    """
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    tokenizer = PreTrainedTokenizerBase()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "inspected" in request:
            return inspect(tokenizer, request["inspected"])
        text = tokenizer.apply_chat_template(**request["arguments"], tokenize=False)
        if len(text) > (max_chars := request["max_chars"]):
            raise ValueError(f"it made {len(text)} characters, and at most {max_chars} can fit max_model_len")
        return {"text": text}

    return answer


def inspect(tokenizer: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what a template reads and prints, as plain data.

    Args:
        arguments: the template as `chat_template`, and values of some variables.

    Returns:
        `variables`: names of the variables that it reads.
        `contents`: for each usual role, and OTHER_ROLE for all others, whether it prints a content that is "text", all
            "parts" of a list, and at least its "first_part".
        `calls`: whether it prints arguments of a tool call that are "text", as JSON, and those in an "object", and
            whether it needs "short_ids".
    """

    def render(messages: list[dict[str, Any]]) -> str:
        """Return a conversation's text; "" if the template refuses it."""
        try:
            return tokenizer.apply_chat_template(conversation=messages, **arguments, tokenize=False)
        except MemoryError:
            raise
        except Exception:  # templates raise what they like
            return ""

    def printed_probes(role: str, content: Any) -> list[str]:
        """Return the probes in `content` that the template prints as they are, in a message of this role."""
        message = {"role": role, "content": content}
        orders = {"user": [message], "system": [message, _USER], "developer": [message, _USER]}
        text = render(orders.get(role, [_USER, message]))
        return [] if _is_quoted(text) else [probe for probe in (_PROBE, _SECOND_PROBE) if probe in text]

    def printed_forms(role: str) -> dict[str, bool]:
        parts = [{"type": "text", "text": probe} for probe in (_PROBE, _SECOND_PROBE)]
        in_text = printed_probes(role, _PROBE)
        in_parts = printed_probes(role, parts)
        return {"text": _PROBE in in_text, "parts": len(in_parts) == len(parts), "first_part": _PROBE in in_parts}

    def render_call(call_arguments: Any, call_id: str = _SHORT_ID) -> str:
        function = {"name": "f", "arguments": call_arguments}
        call = {"id": call_id, "type": "function", "function": function}
        return render([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])

    def takes_long_ids() -> bool:
        return bool(render_call(arguments_text, _LONG_ID) or render_call(arguments_object, _LONG_ID))

    arguments_object = {"argument": _PROBE}
    arguments_text = json.dumps(arguments_object)
    variables = find_variables(arguments["chat_template"])
    contents = {role: printed_forms(role) for role in _ROLES}
    with_object = render_call(arguments_object)
    with_text = render_call(arguments_text)
    calls = {
        # JSON has the probe in double quotes, and Python's notation in single ones.
        "text": arguments_text in with_text,
        "object": _PROBE in with_object and f"'{_PROBE}'" not in with_object,
        "short_ids": bool(with_text or with_object) and not takes_long_ids(),
    }
    return {"variables": list(variables), "contents": contents, "calls": calls}


def _is_quoted(text: str) -> bool:
    """Return whether a rendering has the probe in the notation of Python or JSON, instead of the content itself."""
    return f"'{_PROBE}'" in text or f'"{_PROBE}"' in text


def find_variables(template: str) -> set[str]:
    """Return the names of the variables that a template reads. This evaluates the template's constants."""
    from jinja2 import meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """Parses `{% generation %}`, by which templates mark answers for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[GenerationTag, loopcontrols])
    return meta.find_undeclared_variables(environment.parse(template))
