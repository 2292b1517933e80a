"""Reads GBNF, the notation of llama.cpp's grammars."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from nanovllm.sandbox.schemas import spelled

# Sets of characters are bits: one for each ASCII character, and one for all others.
_OTHERS = 1 << 128
ALL = (_OTHERS << 1) - 1
_MAX_CODE = 0x10FFFF

_CHARACTER = r"(?:\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.|[^\\])"
_TOKEN = re.compile(
    r'[ \t\r\n]+|#[^\r\n]*|(?P<text>"(?:\\.|[^"\\])*")|(?P<set>\[(?:\\.|[^\]\\])*\])'
    r"|(?P<repeat>[*+?]|\{\s*\d{1,9}\s*(?:,\s*(?:\d{1,9})?\s*)?\})|(?P<name>[\w-]+)(?P<rule>\s*::=)?|(?P<mark>[|().])",
    re.DOTALL,
)
_RANGE = re.compile(rf"({_CHARACTER})(?:-({_CHARACTER}))?", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


# The parts of a rule. They are not tuples: a text must not equal a reference with the same letters.


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


def parts_of(part: Part) -> Iterator[Part]:
    """Yield a part and all parts in it."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, Sequence | Choice):
            waiting += part.parts
        elif isinstance(part, Repeat):
            waiting.append(part.part)


def references(part: Part) -> Iterator[str]:
    """Yield the names of the rules that a part refers to."""
    return (each.name for each in parts_of(part) if isinstance(each, Reference))


def bits_of(character: str) -> int:
    """Return a set of one character."""
    return 1 << min(ord(character), 128)


def _bits_of_range(low: int, high: int) -> int:
    """Return the set of the characters with the codes from `low` to `high`."""
    ascii_bits = (1 << min(high + 1, 128)) - (1 << min(low, 128))
    return ascii_bits | _OTHERS if high > 127 else ascii_bits


def parse(grammar: str) -> dict[str, Part]:
    """Return the rules of a grammar by their names.

    Raises:
        ValueError: it is wrong; the message has the place.
    """
    rules = _Parser(grammar).rules()
    for name, part in rules.items():
        for reference in references(part):
            if reference not in rules:
                raise ValueError(f"the rule {name} refers to {reference!r:.100}, which is not defined")
    if "root" not in rules:
        raise ValueError("the grammar has no rule root")
    if endless := rules.keys() - _ending_rules(rules):
        raise ValueError(f"the rule {min(endless)} never ends, because it always refers to itself")
    return rules


def _ending_rules(rules: dict[str, Part]) -> set[str]:
    """Return the rules that some text matches."""
    ending: set[str] = set()

    def can_end(part: Part) -> bool:
        match part:
            case Reference(name):
                return name in ending
            case Sequence(parts):
                return all(map(can_end, parts))
            case Choice(parts):
                return any(map(can_end, parts))
            case Repeat(inner, low):
                return low == 0 or can_end(inner)
        return True

    # Rules usually refer to later ones, or to earlier ones, so that few rounds are needed.
    num_before = -1
    while len(ending) > num_before:
        num_before = len(ending)
        for name in (*reversed(rules), *rules):
            if name not in ending and can_end(rules[name]):
                ending.add(name)
    return ending


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
            return Characters(f"[\\x00-{chr(_MAX_CODE)}]", ALL)
        part = self._choice()
        if self._peek("mark") != ")":
            self._fail(token.start(), "is not closed")
        self.next += 1
        return part

    def _repeat(self, token: re.Match, part: Part) -> Part:
        if (mark := token["repeat"]) in "*+?":
            return Repeat(part, int(mark == "+"), 1 if mark == "?" else None)
        first, comma, last = mark[1:-1].partition(",")
        low = high = int(first)
        if comma:
            high = int(last) if last.strip() else None
        if high is not None and high < low:
            self._fail(token.start(), "has bounds in the wrong order")
        return Sequence(()) if high == 0 else Repeat(part, low, high)

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
            bits |= _bits_of_range(low, high)
            regex += spelled(chr(low))
            if last:
                regex += f"-{spelled(chr(high))}"
        if not regex:
            self._fail(token.start(), "has no character")
        if is_negated:
            return Characters(f"[^{regex}]", (ALL & ~bits) | _OTHERS)
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
