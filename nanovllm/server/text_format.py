"""How a model writes its thinking and its tool calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex

from nanovllm import StructuredOutputsParams
from nanovllm.checks import shown
from nanovllm.server.call_grammars import (
    CallGrammar,
    Llama3Grammar,
    MistralGrammar,
    MistralTagGrammar,
    after_thinking,
    json_rule,
)
from nanovllm.server.parsers.json_calls import HermesParser, Llama3Parser, MistralParser
from nanovllm.server.parsers.output_parser import OutputParser
from nanovllm.server.parsers.qwen3_coder import Qwen3CoderParser
from nanovllm.server.parsers.thinking import ThinkingParser
from nanovllm.server.schemas import ToolSchemas
from nanovllm.server.tag_grammar import Qwen3CoderGrammar

PARSERS: dict[str, type[OutputParser]] = {
    "none": OutputParser,
    "hermes": HermesParser,
    "qwen3_coder": Qwen3CoderParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
}
GRAMMARS: dict[str, type[CallGrammar]] = {
    "none": CallGrammar,
    "hermes": CallGrammar,
    "llama3": Llama3Grammar,
    "mistral": MistralGrammar,
    "mistral_tags": MistralTagGrammar,
    "qwen3_coder": Qwen3CoderGrammar,
}

# The text that closes a thinking tag: its end tag, or a marker of the next turn.
_CLOSES_THINKING = regex.compile(r"</think>|<\||<｜|</s>|\[/INST\]|<end_of_turn>")


@dataclass(frozen=True)
class TextFormat:
    """How a model writes its thinking and its tool calls. The server chooses it once, when it starts.

    Args:
        tool_format: "none", "hermes", "qwen3_coder", "llama3" or "mistral".
        reasoning_format: "none" or "think".
        has_argument_tags: Mistral's calls are `[TOOL_CALLS]name[ARGS]{...}`, not `[TOOL_CALLS] [{...}]`.
    """

    tool_format: str = "none"
    reasoning_format: str = "none"
    has_argument_tags: bool = False

    @classmethod
    def detect(
        cls, chat_template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto"
    ) -> "TextFormat":
        """Find the formats that are "auto" in the text of the model's chat template."""
        template = chat_template or ""
        if tool_parser == "auto":
            tool_parser = _tool_format(template)
        elif tool_parser not in PARSERS:
            raise ValueError(f"tool_parser must be auto or one of {', '.join(PARSERS)}, got {shown(tool_parser)}")
        if reasoning_parser == "auto":
            reasoning_parser = "think" if "</think>" in template or "<think>" in template else "none"
        elif reasoning_parser not in ("none", "think"):
            raise ValueError(f"reasoning_parser must be auto, none or think, got {shown(reasoning_parser)}")
        return cls(tool_parser, reasoning_parser, has_argument_tags="[ARGS]" in template)

    @property
    def shows_special_tokens(self) -> bool:
        """Whether tool calls are marked by special tokens, so the sampling needs `skip_special_tokens=False`."""
        return self.tool_format != "none"

    def opens_thinking(self, prompt_text: str) -> bool:
        """Whether a prompt, or its end, leaves a thinking tag open."""
        return self.reasoning_format == "think" and _opens_thinking(prompt_text)

    def parsers(
        self, prompt_text: str, tools: Sequence[dict], num_samples: int = 1, is_constrained: bool = False
    ) -> list[OutputParser]:
        """Return a parser for each sample of a request.

        Args:
            prompt_text: the rendered prompt, or its end, which may open a thinking tag.
            tools: the functions that can be called, as in OpenAI's API.
            is_constrained: the output follows a grammar of `constraint`.
        """
        # A model of an unknown format writes Hermes' format where a grammar makes it.
        name = "hermes" if is_constrained and self.tool_format == "none" else self.tool_format
        parser = PARSERS[name] if tools else OutputParser
        schemas = ToolSchemas(_schemas(tools))
        if self.reasoning_format == "none":
            return [parser(schemas) for _ in range(num_samples)]
        is_open = _opens_thinking(prompt_text)
        return [ThinkingParser(parser, schemas, is_open) for _ in range(num_samples)]

    def constraint(
        self,
        tools: Sequence[dict],
        tool_choice: str,
        parallel: bool,
        prompt_text: str = "",
        response: StructuredOutputsParams | None = None,
    ) -> StructuredOutputsParams | None:
        """Return the constraint that the output must follow, or None if it may be any text.

        If tools need one, it is a grammar of outputs whose calls are all valid.

        Args:
            tools: the functions that can be called, as in OpenAI's API.
            tool_choice: "none", "auto", "required", or the name of the function that must be called.
            parallel: whether there may be several calls, if no function is named.
            prompt_text: as in `parsers`. An output that starts inside a thinking tag ends it before the calls.
            response: the form of a response without calls, after the model's thinking. Thinking goes only before JSON:
                with other forms, the prompt must not open it.

        Raises:
            ValueError: no function has the name `tool_choice`, the format cannot write a tool's name or schema, or the
                model may either call tools or respond in a form that is not JSON.
        """
        response_rule = None if response is None else json_rule(response)
        if not tools or tool_choice == "none":
            thinking = self._thinking(prompt_text)
            if response_rule is None or thinking == "none":
                return response
            return StructuredOutputsParams(grammar=after_thinking(response_rule, thinking))
        if not self.needs_grammar(tools, tool_choice, parallel, response):
            return None
        schemas = _schemas(tools)
        is_required = tool_choice != "auto"
        if not is_required:
            if response is not None and response_rule is None:
                raise ValueError("tools that may be called allow responses in the form of JSON, but in no other form")
            strict = {tool["function"]["name"] for tool in tools if tool["function"].get("strict")}
            schemas = {name: schema if name in strict else {"type": "object"} for name, schema in schemas.items()}
        elif tool_choice != "required":
            if tool_choice not in schemas:
                raise ValueError(f"tool_choice must name one of the tools, got {shown(tool_choice)}")
            # A named function is called once.
            schemas = {tool_choice: schemas[tool_choice]}
            parallel = False
        has_tags = self.tool_format == "mistral" and self.has_argument_tags
        grammar = GRAMMARS["mistral_tags" if has_tags else self.tool_format](schemas, parallel)
        thinking = self._thinking(prompt_text)
        text = grammar.text(is_required, thinking, response=None if is_required else response_rule)
        return StructuredOutputsParams(grammar=text)

    def needs_grammar(
        self, tools: Sequence[dict], tool_choice: str, parallel: bool, response: StructuredOutputsParams | None
    ) -> bool:
        """Return whether `constraint` makes a grammar of the tools' schemas, which may take long."""
        if not tools or tool_choice == "none":
            return False
        if tool_choice != "auto" or response is not None:
            return True
        is_strict = any(tool["function"].get("strict") for tool in tools)
        return self.tool_format != "none" and (is_strict or not parallel)

    def _thinking(self, prompt_text: str) -> str:
        """Return "open", "optional" or "none", the argument `thinking` of `CallGrammar.text`."""
        if self.reasoning_format == "none" or prompt_text.rstrip("\n").endswith("</think>"):
            return "none"
        return "open" if _opens_thinking(prompt_text) else "optional"


def _schemas(tools: Sequence[dict]) -> dict[str, Any]:
    """Return the schemas of the parameters of functions, by name."""
    functions = [tool["function"] for tool in tools]
    empty = {"type": "object", "properties": {}}
    return {function["name"]: function.get("parameters") or empty for function in functions}


def _opens_thinking(prompt_text: str) -> bool:
    start = prompt_text.rfind("<think>")
    return start >= 0 and not _CLOSES_THINKING.search(prompt_text, start)


def _tool_format(template: str) -> str:
    """Return the format of the calls that a chat template prints, or "none" if it is not known."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template and "<arg_key>" not in template:
        return "qwen3_coder" if "<function=" in template else "hermes"
    # Llama's template asks the model for {"name": ..., "parameters": ...}. Its quotation marks may be escaped.
    if '"parameters": dictionary of argument name' in template.replace("\\", ""):
        return "llama3"
    return "none"
