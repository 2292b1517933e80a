"""Events that the parsers make of a model's text: pieces of text, thinking and tool calls."""

from dataclasses import dataclass, replace
from itertools import groupby
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
    """A piece of the JSON of a tool call's arguments. Together the pieces of a complete call are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A tool call ends. Each `CallStart` has one.

    Args:
        is_complete: the arguments are a JSON object. Only such a call may be made.
        written: the call as the model wrote it, with its tags and the line breaks around it. Together with the texts
            before and after it this is the whole response.
    """

    index: int
    is_complete: bool
    written: str


Event: TypeAlias = Text | Thinking | CallStart | CallArguments | CallEnd


def joined(events: list[Event]) -> list[Event]:
    """Return the events, with successive pieces of one text joined."""
    if len(events) < 2:
        return events
    whole: list[Event] = []
    for _, group in groupby(events, lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if others and not isinstance(first, CallStart | CallEnd):
            first = replace(first, text=first.text + "".join(getattr(event, "text", "") for event in others))
        whole.append(first)
    return whole
