"""Renders chat templates. A child process runs this, so nothing of nanovllm, and no torch, is imported here."""

from collections.abc import Callable
from typing import Any


def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that answers requests.

    `{"template": text}` asks for the `variables` that a template reads. `{"arguments": ..., "max_chars": ...}` asks for
    the `text` of a conversation: the arguments are those of transformers' `apply_chat_template`, and a text of more
    characters is refused.
    """
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    tokenizer = PreTrainedTokenizerBase()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "template" in request:
            return {"variables": list(find_variables(request["template"]))}
        text = tokenizer.apply_chat_template(**request["arguments"], tokenize=False)
        if len(text) > (max_chars := request["max_chars"]):
            raise ValueError(f"it made {len(text)} characters, and at most {max_chars} can fit max_model_len")
        return {"text": text}

    return answer


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
