"""Converts GBNF, the notation of llama.cpp's grammars, to Lark's notation as llguidance reads it.

llguidance splits a text into lexemes, as Lark does, and a lexeme takes as many characters as it can. GBNF has none:
each character is a step of its own. A lexeme for each character is right for all grammars, but where many tokens may
follow, as within a string, a mask then takes milliseconds. So a rule or a text is one lexeme where that changes
nothing: its first character tells it from what else may come, and each next character says whether it goes on.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import NamedTuple, NoReturn

# Sets of characters are bits: one for each ASCII character, and one for all others.
_OTHERS = 1 << 128
_ALL = (_OTHERS << 1) - 1
_MAX_CODE = 0x10FFFF
# More pairs of lexemes that may come at the same place are not looked at: each character is a lexeme then.
_MAX_PAIRS = 50_000
# A rule that is larger is not one lexeme.
_MAX_LEVELS = 50
_MAX_NODES = 2000
_MAX_STATES = 300

_CHARACTER = r"(?:\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.|[^\\])"
_TOKEN = re.compile(
    r'[ \t\r\n]+|#[^\r\n]*|(?P<text>"(?:\\.|[^"\\])*")|(?P<set>\[(?:\\.|[^\]\\])*\])'
    r"|(?P<repeat>[*+?]|\{\s*\d{1,9}\s*(?:,\s*(?:\d{1,9})?\s*)?\})|(?P<name>[\w-]+)(?P<rule>\s*::=)?|(?P<mark>[|().])",
    re.DOTALL,
)
_RANGE = re.compile(rf"({_CHARACTER})(?:-({_CHARACTER}))?", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


# -- the parts of a rule ----------------------------------------------------------------------------------------------
# Not tuples: a text is not equal to a reference of the same letters.


@dataclass(frozen=True, slots=True)
class Characters:
    """One character of a class, with its regular expression."""

    regex: str
    bits: int


@dataclass(frozen=True, slots=True)
class Text:
    """A text in quotation marks, of at least one character."""

    text: str


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of a rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts one after another."""

    parts: tuple["Part", ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several parts."""

    parts: tuple["Part", ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part at least `low` times, and at most `high` times unless that is None."""

    part: "Part"
    low: int
    high: int | None


Part = Characters | Text | Reference | Sequence | Choice | Repeat


def convert(grammar: str) -> str:
    """Return a GBNF grammar in Lark's notation.

    Raises:
        ValueError: it is wrong; the message has the place.
    """
    try:
        return _convert(_Parser(grammar).rules())
    except RecursionError:
        raise ValueError("the grammar is nested too deeply") from None


def _convert(rules: Mapping[str, Part]) -> str:
    for name, part in rules.items():
        for reference in _references(part):
            if reference not in rules:
                raise ValueError(f"the rule {name} refers to {reference!r:.100}, which is not defined")
    if "root" not in rules:
        raise ValueError("the grammar has no rule root")
    rules = _with_more_rules(rules)
    return _write(rules, *_choose_lexemes(rules))


class _Parser:
    """Reads a grammar. A newline is a space: a rule ends where the next one starts."""

    def __init__(self, grammar: str):
        self.grammar = grammar
        self.tokens = self._split()
        self.next = 0

    def _split(self) -> list[re.Match]:
        tokens = []
        at = 0
        while at < len(self.grammar):
            match = _TOKEN.match(self.grammar, at)
            if match is None:
                self._fail(at, "cannot be read")
            at = match.end()
            if match.lastgroup is not None:
                tokens.append(match)
        return tokens

    def _fail(self, at: int, message: str) -> NoReturn:
        line = self.grammar.count("\n", 0, at) + 1
        raise ValueError(f"line {line} of the grammar: {self.grammar[at : at + 30]!r} {message}")

    def _peek(self, group: str) -> str | None:
        """Return the next token if it is of this kind."""
        return self.tokens[self.next][group] if self.next < len(self.tokens) else None

    def rules(self) -> dict[str, Part]:
        rules: dict[str, Part] = {}
        while self.next < len(self.tokens):
            token = self.tokens[self.next]
            if token["rule"] is None:
                self._fail(token.start(), "does not belong to a rule")
            if token["name"] in rules:
                self._fail(token.start(), "is defined before")
            self.next += 1
            rules[token["name"]] = self._choice()
        return rules

    def _choice(self) -> Part:
        parts = [self._sequence()]
        while self._peek("mark") == "|":
            self.next += 1
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self.next < len(self.tokens):
            token = self.tokens[self.next]
            if token["rule"] is not None or token["mark"] in ("|", ")"):
                break
            self.next += 1
            if token["repeat"] is None:
                parts.append(self._part(token))
            elif parts:
                parts[-1] = self._repeat(token, parts[-1])
            else:
                self._fail(token.start(), "has nothing to repeat")
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _part(self, token: re.Match) -> Part:
        if token["name"] is not None:
            return Reference(token["name"])
        if token["text"] is not None:
            codes = [
                self._code(character, token) for character in re.findall(_CHARACTER, token["text"][1:-1], re.DOTALL)
            ]
            return Text("".join(map(chr, codes))) if codes else Sequence(())
        if token["set"] is not None:
            return self._set(token)
        if token["mark"] == ".":
            return Characters(f"[\\x00-{chr(_MAX_CODE)}]", _ALL)
        part = self._choice()
        if self._peek("mark") != ")":
            self._fail(token.start(), "is not closed")
        self.next += 1
        return part

    def _repeat(self, token: re.Match, part: Part) -> Part:
        if (mark := token["repeat"]) in "*+?":
            return Repeat(part, int(mark == "+"), 1 if mark == "?" else None)
        low, comma, high = mark[1:-1].partition(",")
        bound = int(high) if high.strip() else None if comma else int(low)
        if bound is not None and bound < int(low):
            self._fail(token.start(), "has bounds in the wrong order")
        return Repeat(part, int(low), bound) if bound != 0 else Sequence(())

    def _set(self, token: re.Match) -> Part:
        inside = token["set"][1:-1]
        is_negated = inside.startswith("^")
        bits = 0
        regex = ""
        for first, last in _RANGE.findall(inside, int(is_negated)):
            low = self._code(first, token)
            high = self._code(last, token) if last else low
            if high < low:
                self._fail(token.start(), "has a range in the wrong order")
            bits |= ((1 << min(high + 1, 128)) - 1) & ~((1 << min(low, 128)) - 1) | (_OTHERS if high > 127 else 0)
            regex += _spelled(low) + (f"-{_spelled(high)}" if last else "")
        if not regex:
            self._fail(token.start(), "has no character")
        if is_negated:
            return Characters(f"[^{regex}]", (_ALL & ~bits) | _OTHERS)
        return Characters(f"[{regex}]", bits)

    def _code(self, character: str, token: re.Match) -> int:
        """Return the code of a character as the grammar spells it."""
        if not character.startswith("\\"):
            return ord(character)
        kind, digits = character[1], character[2:]
        if digits:
            code = int(digits, 16)
            if code <= _MAX_CODE and not 0xD800 <= code < 0xE000:
                return code
        elif kind in _ESCAPES or not kind.isalnum():  # llama.cpp knows \" \\ \[ \], and xgrammar \- too
            return ord(_ESCAPES.get(kind, kind))
        return self._fail(token.start(), f"has the unknown escape {character}")


def _spelled(code: int) -> str:
    """Return a character for a class: as itself if it is a letter, a digit or not ASCII, else as `\\x2d`."""
    character = chr(code)
    return character if character.isalnum() or code > 127 else f"\\x{code:02x}"


def _parts(part: Part) -> Iterator[Part]:
    """Yield a part and all parts in it."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, Sequence | Choice):
            waiting += part.parts
        elif isinstance(part, Repeat):
            waiting.append(part.part)


def _references(part: Part) -> Iterator[str]:
    """Yield the names of the rules that a part refers to."""
    return (each.name for each in _parts(part) if isinstance(each, Reference))


def _with_more_rules(rules: Mapping[str, Part]) -> dict[str, Part]:
    """Return the same grammar with rules for choices of texts and repeated characters, so that they can be lexemes."""
    names: dict[Part, str] = {}

    def rule_of(part: Part) -> Part:
        return Reference(names.setdefault(part, f"part {len(names)}"))  # no name in a grammar has a space

    def rewrite(part: Part) -> Part:
        match part:
            case Choice(parts) if all(isinstance(each, Text) for each in parts):
                return rule_of(part)
            case Repeat(Characters() as inner, low, None):
                repeated = rule_of(Repeat(inner, max(low, 1), None))
                return repeated if low else Repeat(repeated, 0, 1)
            case Choice(parts):
                return Choice(tuple(map(rewrite, parts)))
            case Sequence(parts):
                return Sequence(tuple(map(rewrite, parts)))
            case Repeat(inner, low, high):
                return Repeat(rewrite(inner), low, high)
        return part

    rewritten = {name: rewrite(part) for name, part in rules.items()}
    return rewritten | {name: part for part, name in names.items()}


# -- lexemes ----------------------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """What decides whether a part of the grammar can be a lexeme.

    Args:
        first: the characters that it can start with.
        more: the characters that can go on after a whole match.
    """

    first: int
    more: int


def _choose_lexemes(rules: Mapping[str, Part]) -> tuple[set[str], set[str]]:
    """Return the rules and the texts that are lexemes."""
    shapes = {name: shape for name, part in _regular_rules(rules).items() if (shape := _shape_of(part)) is not None}
    lexemes = shapes.keys() - {"root"}
    texts = {part.text for part in rules.values() for part in _parts(part) if isinstance(part, Text)}
    texts = {text for text in texts if len(text) > 1}
    while wrong := _find_conflicts(_Graph(Reference("root"), rules, lexemes, texts), shapes):
        lexemes -= {part.name for part in wrong if isinstance(part, Reference)}
        texts -= {part.text for part in wrong if isinstance(part, Text)}
    return lexemes, texts


def _regular_rules(rules: Mapping[str, Part]) -> dict[str, Part]:
    """Return the rules that refer to no rule that comes back to itself, with other rules' parts for their names.

    Rules of more than `_MAX_LEVELS` levels of references are left out.
    """
    users: dict[str, list[str]] = {name: [] for name in rules}
    num_missing = {}
    for name, part in rules.items():
        references = set(_references(part))
        num_missing[name] = len(references)
        for reference in references:
            users[reference].append(name)
    regular: dict[str, Part] = {}
    ready = [name for name, count in num_missing.items() if count == 0]
    for _ in range(_MAX_LEVELS):
        regular |= {name: _without_references(rules[name], regular) for name in ready}
        used = [user for name in ready for user in users[name]]
        for user in used:
            num_missing[user] -= 1
        ready = [user for user in dict.fromkeys(used) if num_missing[user] == 0]
    return regular


def _without_references(part: Part, rules: Mapping[str, Part]) -> Part:
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


def _shape_of(part: Part) -> _Shape | None:
    """Return the shape of a part without references. Return None if it is too large, or matches the empty text."""
    if isinstance(part, Choice) and all(isinstance(each, Text) for each in part.parts):
        return _shape_of_texts([each.text for each in part.parts if isinstance(each, Text)])
    try:
        graph = _Graph(part, max_nodes=_MAX_NODES)
    except _TooLargeError:
        return None
    bits = {node: _first(each) for node, each in graph.lexemes.items()}
    kinds = [_ALL]  # sets of characters that the part does not tell apart
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
        first |= _bits(text[0])
        while starts and not text.startswith(starts[-1]):
            starts.pop()
        if starts:
            more |= _bits(text[len(starts[-1])])
        starts.append(text)
    return _Shape(first, more)


def _bits(character: str) -> int:
    return 1 << min(ord(character), 128)


def _first(part: Part | None) -> int:
    """Return the characters that a class or a text can start with; none for the end of the grammar."""
    return part.bits if isinstance(part, Characters) else _bits(part.text[0]) if isinstance(part, Text) else 0


class _TooLargeError(Exception):
    """A graph would have too many nodes."""


class _Graph:
    """Which lexemes may follow which, whatever rules they are in. It may have more paths than the grammar.

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
        max_nodes: float = math.inf,
    ):
        self.rule_lexemes, self.text_lexemes, self.max_nodes = rule_lexemes, text_lexemes, max_nodes
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
        if len(self.edges) >= self.max_nodes:
            raise _TooLargeError
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
    pairs: set[tuple[int, int]] = set()  # of nodes that may come at the same place
    waiting: list[tuple[int, int]] = []
    following = graph.next(graph.start)
    while True:
        if len(following) ** 2 <= _MAX_PAIRS:
            new = {(a, b) for a in following for b in following if a <= b} - pairs
            pairs |= new
            waiting += new
        if len(following) ** 2 > _MAX_PAIRS or len(pairs) > _MAX_PAIRS:
            return {part for part in graph.lexemes.values() if part is not None and may_be_long(part)}
        if not waiting:
            return conflicts
        a, b = waiting.pop()
        following = set()
        first, second = graph.lexemes[a], graph.lexemes[b]
        shape = shape_of(first)
        if not shape.first & shape_of(second).first:
            continue  # the first character tells them apart
        if first != second:
            conflicts.update(part for part in (first, second) if part is not None and may_be_long(part))
        following = graph.next(a) | graph.next(b)
        may_go_on = any(shape.more & shape_of(graph.lexemes[node]).first for node in following)
        if first == second and first is not None and may_go_on:
            conflicts.add(first)


# -- Lark's notation --------------------------------------------------------------------------------------------------


_MARKS = {(0, None): "*", (1, None): "+", (0, 1): "?"}


def _write(rules: Mapping[str, Part], lexemes: set[str], texts: set[str]) -> str:
    """Return the rules in Lark's notation. Names of rules have small letters there, and those of terminals capitals."""
    names = {name: "start" if name == "root" else f"rule_{i}" for i, name in enumerate(rules)}

    def write(part: Part, within_lexeme: bool) -> str:
        match part:
            case Characters(regex):
                return f"/{regex}/"
            case Text(text):
                is_whole = within_lexeme or len(text) == 1 or text in texts
                return " ".join(json.dumps(piece) for piece in ([text] if is_whole else text))
            case Reference(name):
                return names[name].upper() if within_lexeme or name in lexemes else names[name]
            case Sequence(parts):
                return " ".join(write(each, within_lexeme) for each in parts) or '""'
            case Choice(parts):
                return f"({' | '.join(write(each, within_lexeme) for each in parts)})"
            case Repeat(inner, low, high):
                most = "" if high is None else high
                bounds = _MARKS.get((low, high)) or (f"{{{low}}}" if low == high else f"{{{low},{most}}}")
                return f"({write(inner, within_lexeme)}){bounds}"

    terminals: set[str] = set()
    waiting = list(lexemes)
    while waiting:
        name = waiting.pop()
        if name not in terminals:
            terminals.add(name)
            waiting += _references(rules[name])
    lines = [f"{names[name]}: {write(part, False)}" for name, part in rules.items() if name not in lexemes]
    lines += [f"{names[name].upper()}: {write(rules[name], True)}" for name in rules if name in terminals]
    return "\n".join(lines) + "\n"
