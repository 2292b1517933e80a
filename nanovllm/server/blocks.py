"""Groups the events of a response into blocks, which messages and responses have in place of one long text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from uuid import uuid4

from nanovllm.server.events import CallEnd, CallStart, Event, Text, Thinking


@dataclass(slots=True)
class Block:
    """Successive events of one kind.

    Args:
        kind: Thinking, Text, or CallStart for a tool call.
        index: the block's number in the response, from 0.
        name: the function that a tool call calls.
        pieces: the text so far; for a tool call, the JSON of its arguments.
        is_complete: for a tool call, whether its arguments are a JSON object.
        id: random hexadecimal digits.
    """

    kind: type[Thinking] | type[Text] | type[CallStart]
    index: int
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    is_complete: bool = False
    id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Started:
    """A block starts, without text yet."""

    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """`text` is added to a block."""

    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A block is complete. The next one starts after it."""

    block: Block


Change: TypeAlias = Started | Grown | Finished


class Blocks:
    """The blocks of one response, in their order. `all` may be read at any time."""

    def __init__(self):
        self.all: list[Block] = []
        self._is_open = False

    def feed(self, events: Iterable[Event]) -> Iterator[Change]:
        """Yield what these events change."""
        for event in events:
            if isinstance(event, CallStart):
                yield from self._start(CallStart, event.name)
            elif isinstance(event, CallEnd):
                self.all[-1].is_complete = event.is_complete
            elif event.text:
                if isinstance(event, Text | Thinking) and not self._is_open_block_of(type(event)):
                    yield from self._start(type(event))
                self.all[-1].pieces.append(event.text)
                yield Grown(self.all[-1], event.text)

    def finish(self) -> Iterator[Finished]:
        """Yield the end of the last block, if there is one."""
        if self._is_open:
            self._is_open = False
            yield Finished(self.all[-1])

    def _is_open_block_of(self, kind: type) -> bool:
        return self._is_open and self.all[-1].kind is kind

    def _start(self, kind: type[Thinking] | type[Text] | type[CallStart], name: str = "") -> Iterator[Change]:
        yield from self.finish()
        self.all.append(Block(kind, len(self.all), name))
        self._is_open = True
        # A copy, because the block may have grown before the change is read.
        yield Started(replace(self.all[-1], pieces=[]))
