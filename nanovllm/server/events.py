"""Events that the parsers make of a model's text: pieces of text, thinking and tool calls."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the response."""

    text: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """A piece of what the model thinks before its response."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins. `index` counts the calls of a sample from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON of a tool call's arguments. Together the pieces of a call are one JSON object."""

    index: int
    text: str


Event: TypeAlias = Text | Thinking | CallStart | CallArguments
