"""Chooses the parts of a GBNF grammar that can be one lexeme of llguidance's Lark; see `gbnf`."""

import math
from collections.abc import Collection, Mapping
from functools import reduce
from itertools import combinations_with_replacement
from operator import or_
from types import MappingProxyType
from typing import NamedTuple

from nanovllm.sandbox.gbnf_parser import (
    ALL,
    Characters,
    Choice,
    Part,
    Reference,
    Repeat,
    Sequence,
    Text,
    bits_of,
    parts_of,
    references,
)

# Bounds the pairs of lexemes that are compared, and how often. After that, each character is a lexeme.
_MAX_WORK = 300_000
_MAX_ROUNDS = 5
# A rule that is larger is not one lexeme.
_MAX_LEVELS = 50
_MAX_PARTS = 2000
_MAX_STATES = 300


class _Shape(NamedTuple):
    """The two sets of characters that decide whether a part of the grammar can be a lexeme.

    Args:
        first: the characters that it can start with.
        more: the characters that can go on after a whole match.
    """

    first: int
    more: int


def choose_lexemes(rules: Mapping[str, Part]) -> tuple[set[str], set[str]]:
    """Return the rules and the texts that are lexemes."""
    regular = _regular_rules(rules)
    if "root" in regular and _is_small(regular["root"]):
        return {"root"}, set()
    shapes = {name: shape for name, part in regular.items() if (shape := _shape_of(part)) is not None}
    lexemes = set(shapes)
    texts = {part.text for part in rules.values() for part in parts_of(part) if isinstance(part, Text)}
    texts = {text for text in texts if len(text) > 1}
    for _ in range(_MAX_ROUNDS):
        wrong = _find_conflicts(_Graph(Reference("root"), rules, lexemes, texts), shapes)
        if not wrong:
            return lexemes, texts
        lexemes -= {part.name for part in wrong if isinstance(part, Reference)}
        texts -= {part.text for part in wrong if isinstance(part, Text)}
    return set(), set()


def _regular_rules(rules: Mapping[str, Part]) -> dict[str, Part]:
    """Return the rules that refer to no rule that comes back to itself, with other rules' parts for their names.

    Rules of more than `_MAX_LEVELS` levels of references are left out.
    """
    users: dict[str, list[str]] = {name: [] for name in rules}
    num_missing = {}
    for name, part in rules.items():
        used = set(references(part))
        num_missing[name] = len(used)
        for reference in used:
            users[reference].append(name)
    regular: dict[str, Part] = {}
    ready = [name for name, count in num_missing.items() if count == 0]
    for _ in range(_MAX_LEVELS):
        regular |= {name: _without_references(rules[name], regular) for name in ready}
        waiting = [user for name in ready for user in users[name]]
        for user in waiting:
            num_missing[user] -= 1
        ready = [user for user in dict.fromkeys(waiting) if num_missing[user] == 0]
    return regular


def _without_references(part: Part, rules: Mapping[str, Part]) -> Part:
    """Return a part with the parts of rules in place of their names."""
    match part:
        case Reference(name):
            return rules[name]
        case Sequence(parts):
            return Sequence(tuple(_without_references(each, rules) for each in parts))
        case Choice(parts):
            return Choice(tuple(_without_references(each, rules) for each in parts))
        case Repeat(inner, low, high):
            return Repeat(_without_references(inner, rules), low, high)
    return part


def _is_small(part: Part) -> bool:
    """Return whether a part without references can be one lexeme of llguidance's lexer."""
    try:
        _Graph(part, max_parts=_MAX_PARTS)
    except (_TooLargeError, RecursionError):
        return False
    return True


def _shape_of(part: Part) -> _Shape | None:
    """Return the shape of a part without references. Return None if it is too large, or matches the empty text."""
    if isinstance(part, Choice) and all(isinstance(each, Text) for each in part.parts):
        return _shape_of_texts([each.text for each in part.parts if isinstance(each, Text)])
    try:
        graph = _Graph(part, max_parts=_MAX_PARTS)
    except (_TooLargeError, RecursionError):
        return None
    bits = {node: _first(each) for node, each in graph.lexemes.items()}
    kinds = [ALL]  # sets of characters that the part does not tell apart
    for mask in set(bits.values()):
        kinds = [kind for old in kinds for kind in (old & mask, old & ~mask) if kind]
    # A state is the set of the nodes that the next character may be.
    start = frozenset(graph.next(graph.start))
    if graph.end in start:
        return None
    more = 0
    states = {start}
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if graph.end in state:
            more |= reduce(or_, (bits[node] for node in state))
        for kind in kinds:
            following = frozenset().union(*(graph.next(node) for node in state if bits[node] & kind))
            if following not in states:
                states.add(following)
                waiting.append(following)
        if len(states) > _MAX_STATES:
            return None
    return _Shape(reduce(or_, (bits[node] for node in start), 0), more)


def _shape_of_texts(texts: list[str]) -> _Shape:
    """Return the shape of a choice of texts, of which there may be thousands."""
    first = more = 0
    starts: list[str] = []  # texts that the present one starts with
    for text in sorted(set(texts)):
        first |= bits_of(text[0])
        while starts and not text.startswith(starts[-1]):
            starts.pop()
        if starts:
            more |= bits_of(text[len(starts[-1])])
        starts.append(text)
    return _Shape(first, more)


def _first(part: Part | None) -> int:
    """Return the characters that a class or a text can start with; none for the end of the grammar."""
    match part:
        case Characters():
            return part.bits
        case Text(text):
            return bits_of(text[0])
    return 0


class _TooLargeError(Exception):
    """A graph would have too many parts."""


class _Graph:
    """The order in which lexemes may come, across all rules. A graph may have more paths than its grammar.

    A node is a lexeme that was read, or a place between lexemes. Where no more is said, a lexeme is a character.

    Args:
        part: where it starts.
        rules: the rules that the part refers to, directly or not.
        rule_lexemes, text_lexemes: rules and texts that are one lexeme.

    Attributes:
        start, end: the first and the last node. The last one is a lexeme too, which stands for the end.
        lexemes: the lexemes of the nodes that are one.
    """

    def __init__(
        self,
        part: Part,
        rules: Mapping[str, Part] = MappingProxyType({}),
        rule_lexemes: Collection[str] = (),
        text_lexemes: Collection[str] = (),
        max_parts: float = math.inf,
    ):
        self.rule_lexemes, self.text_lexemes, self.parts_left = rule_lexemes, text_lexemes, max_parts
        self.edges: list[list[int]] = []
        self.lexemes: dict[int, Part | None] = {}
        self._next: dict[int, set[int]] = {}
        self.starts = {name: self._add_node() for name in rules if name not in rule_lexemes}
        self.ends = {name: self._add_node() for name in self.starts}
        for name in self.starts:
            self._connect(self._add(rules[name], self.starts[name]), self.ends[name])
        self.start = self._add_node()
        self.end = self._add_lexeme(None, self._add(part, self.start))

    def _add_node(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def _add_lexeme(self, part: Part | None, start: int) -> int:
        node = self._add_node()
        self.lexemes[node] = part
        self._connect(start, node)
        return node

    def _connect(self, start: int, end: int) -> None:
        self.edges[start].append(end)

    def _add(self, part: Part, start: int) -> int:
        """Add a part after the node `start`. Return the node after it."""
        self.parts_left -= len(part.text) if isinstance(part, Text) else 1
        if self.parts_left < 0:
            raise _TooLargeError
        match part:
            case Sequence(parts):
                for each in parts:
                    start = self._add(each, start)
                return start
            case Text(text) if len(text) > 1 and text not in self.text_lexemes:
                for character in text:
                    start = self._add_lexeme(Text(character), start)
                return start
            case Choice(parts):
                end = self._add_node()
                for each in parts:
                    self._connect(self._add(each, start), end)
                return end
            case Repeat(inner, low, high):
                before, end = self._add_node(), self._add_node()
                self._connect(start, before)
                after = self._add(inner, before)
                self._connect(after, end)
                if high != 1:
                    self._connect(after, before)
                if low == 0:
                    self._connect(before, end)
                return end
            case Reference(name) if name not in self.rule_lexemes:
                end = self._add_node()
                self._connect(start, self.starts[name])
                self._connect(self.ends[name], end)
                return end
        return self._add_lexeme(part, start)

    def next(self, node: int) -> set[int]:
        """Return the nodes of the lexemes that may come after a node."""
        if node not in self._next:
            found = set()
            seen = {node}
            waiting = [node]
            while waiting:
                for following in self.edges[waiting.pop()]:
                    if following in self.lexemes:
                        found.add(following)
                    elif following not in seen:
                        seen.add(following)
                        waiting.append(following)
            self._next[node] = found
        return self._next[node]


def _find_conflicts(graph: _Graph, shapes: Mapping[str, _Shape]) -> set[Part]:
    """Return lexemes that might take a character that belongs to what follows, or to another lexeme.

    If too many lexemes may come at the same place, return all that may have more than one character.
    """

    def shape_of(part: Part | None) -> _Shape:
        return shapes[part.name] if isinstance(part, Reference) else _Shape(_first(part), 0)

    def may_be_long(part: Part | None) -> bool:
        return isinstance(part, Reference) or (isinstance(part, Text) and len(part.text) > 1)

    conflicts: set[Part] = set()
    first_place = frozenset(graph.next(graph.start))
    places = {first_place}  # sets of nodes that may come next
    waiting = [first_place]
    done: set[tuple[int, int]] = set()
    work = 0
    while waiting:
        place = waiting.pop()
        work += len(place) ** 2
        for a, b in combinations_with_replacement(sorted(place), 2):
            if work > _MAX_WORK:
                return {part for part in graph.lexemes.values() if part is not None and may_be_long(part)}
            first, second = graph.lexemes[a], graph.lexemes[b]
            shape = shape_of(first)
            if (a, b) in done or not shape.first & shape_of(second).first:
                continue  # the first character tells them apart
            done.add((a, b))
            if first != second:
                conflicts.update(part for part in (first, second) if part is not None and may_be_long(part))
            following = frozenset(graph.next(a) | graph.next(b))
            if first == second and first is not None and shape.more:
                followers = reduce(or_, (shape_of(graph.lexemes[node]).first for node in following), 0)
                if shape.more & followers:
                    conflicts.add(first)
            work += len(following)
            if following not in places:
                places.add(following)
                waiting.append(following)
    return conflicts
