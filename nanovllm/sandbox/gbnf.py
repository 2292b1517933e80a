"""Converts GBNF, the notation of llama.cpp's grammars, to Lark's notation as llguidance reads it.

llguidance splits a text into lexemes, as Lark does, and a lexeme takes as many characters as it can. GBNF has none:
each character is a step of its own. A lexeme for each character is right for all grammars, but where many tokens may
follow, as within a string, a mask then takes milliseconds. So a rule or a text is one lexeme where that changes
nothing: its first character tells it from what else may come, and each next character says whether it goes on.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

# Sets of characters are bits: one for each ASCII character, and one for all others.
_OTHERS = 1 << 128
_ALL = (_OTHERS << 1) - 1
_MAX_CODE = 0x10FFFF
# More pairs of lexemes that may come at the same place are not looked at: each character is a lexeme then.
_MAX_PAIRS = 50_000

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


def _references(part: Part) -> Iterator[str]:
    """Yield the names of the rules that a part refers to."""
    waiting = [part]
    while waiting:
        match waiting.pop():
            case Reference(name):
                yield name
            case Sequence(parts) | Choice(parts):
                waiting += parts
            case Repeat(inner):
                waiting.append(inner)


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
    """What decides whether a regular part can be a lexeme.

    Args:
        is_empty: whether it matches the empty text.
        first: the characters that it can start with.
        more: the characters that can go on after a whole match.
        is_exact: whether each character has one meaning: it never both ends a part and goes on with it.
    """

    is_empty: bool
    first: int
    more: int
    is_exact: bool


def _shape(part: Part, shapes: Mapping[str, _Shape]) -> _Shape | None:
    """Return the shape of a part, or None if it refers to a rule that has none."""
    match part:
        case Characters(_, bits):
            return _Shape(False, bits, 0, True)
        case Text(text):
            return _Shape(False, _bits(text[0]), 0, True)
        case Reference(name):
            return shapes.get(name)
        case Repeat(inner, low, high):
            if (shape := _shape(inner, shapes)) is None:
                return None
            may_go_on = high != low or shape.is_empty
            is_exact = shape.is_exact and (high == 1 or not shape.more & shape.first)
            more = shape.more | (shape.first if may_go_on and high != 1 else 0)
            return _Shape(low == 0 or shape.is_empty, shape.first, more, is_exact)
        case Choice(parts) if all(isinstance(each, Text) for each in parts):
            return _shape_of_texts([each.text for each in parts if isinstance(each, Text)])
        case Choice(parts):
            whole = _Shape(False, 0, 0, True)
            for each in parts:
                if (shape := _shape(each, shapes)) is None:
                    return None
                is_exact = whole.is_exact and shape.is_exact and not whole.first & shape.first
                first, more = whole.first | shape.first, whole.more | shape.more
                whole = _Shape(whole.is_empty or shape.is_empty, first, more, is_exact)
            return whole
        case Sequence(parts):
            whole = _Shape(True, 0, 0, True)
            for each in parts:
                if (shape := _shape(each, shapes)) is None:
                    return None
                going_on = whole.more | (whole.first if whole.is_empty else 0)
                is_exact = whole.is_exact and shape.is_exact and not going_on & shape.first
                first = whole.first | (shape.first if whole.is_empty else 0)
                more = shape.more | ((whole.more | shape.first) if shape.is_empty else 0)
                whole = _Shape(whole.is_empty and shape.is_empty, first, more, is_exact)
            return whole


def _shape_of_texts(texts: list[str]) -> _Shape:
    """Return the shape of a choice of texts, which is exact even where texts start alike: all of them are known."""
    first = more = 0
    starts: list[str] = []  # texts that the present one starts with
    for text in sorted(set(texts)):
        first |= _bits(text[0])
        while starts and not text.startswith(starts[-1]):
            starts.pop()
        if starts:
            more |= _bits(text[len(starts[-1])])
        starts.append(text)
    return _Shape(False, first, more, True)


def _bits(character: str) -> int:
    return 1 << min(ord(character), 128)


def _regular_rules(rules: Mapping[str, Part]) -> dict[str, _Shape]:
    """Return the shapes of the rules that refer to no rule that comes back to itself."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    num_missing = {}
    for name, part in rules.items():
        references = set(_references(part))
        num_missing[name] = len(references)
        for reference in references:
            users[reference].append(name)
    shapes: dict[str, _Shape] = {}
    ready = [name for name, count in num_missing.items() if count == 0]
    while ready:
        name = ready.pop()
        shape = _shape(rules[name], shapes)
        assert shape is not None  # all rules that it refers to have one
        shapes[name] = shape
        for user in users[name]:
            num_missing[user] -= 1
            if num_missing[user] == 0:
                ready.append(user)
    return shapes


def _choose_lexemes(rules: Mapping[str, Part]) -> tuple[set[str], set[str]]:
    """Return the rules and the texts that are lexemes."""
    shapes = _regular_rules(rules)
    lexemes = {name for name, shape in shapes.items() if shape.is_exact and not shape.is_empty and name != "root"}
    texts = {part.text for rule in rules.values() for part in _texts(rule) if len(part.text) > 1}
    while wrong := _Graph(rules, shapes, lexemes, texts).find_conflicts():
        lexemes -= {part.name for part in wrong if isinstance(part, Reference)}
        texts -= {part.text for part in wrong if isinstance(part, Text)}
    return lexemes, texts


def _texts(part: Part) -> Iterator[Text]:
    waiting = [part]
    while waiting:
        match waiting.pop():
            case Text() as text:
                yield text
            case Sequence(parts) | Choice(parts):
                waiting += parts
            case Repeat(inner):
                waiting.append(inner)


class _Graph:
    """Which lexemes may follow which, whatever rules they are in. It may have more paths than the grammar.

    A node is a lexeme that was read, or a place between lexemes.
    """

    def __init__(self, rules: Mapping[str, Part], shapes: Mapping[str, _Shape], lexemes: set[str], texts: set[str]):
        self.shapes, self.lexemes, self.texts = shapes, lexemes, texts
        self.edges: list[list[int]] = []
        self.parts: dict[int, Part] = {}  # of the nodes that are lexemes
        self._next_lexemes: dict[int, set[int]] = {}
        self.starts = {name: self._node() for name in rules if name not in lexemes}
        self.ends = {name: self._node() for name in self.starts}
        for name in self.starts:
            self._connect(self._add(rules[name], self.starts[name]), self.ends[name])

    def _node(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def _connect(self, start: int, end: int) -> None:
        self.edges[start].append(end)

    def _add(self, part: Part, start: int) -> int:
        """Add a part after the node `start`. Return the node after it."""
        match part:
            case Sequence(parts):
                for each in parts:
                    start = self._add(each, start)
                return start
            case Text(text) if len(text) > 1 and text not in self.texts:
                for character in text:
                    start = self._add(Text(character), start)
                return start
        end = self._node()
        match part:
            case Choice(parts):
                for each in parts:
                    self._connect(self._add(each, start), end)
            case Repeat(inner, low, high):
                before = self._node()
                self._connect(start, before)
                after = self._add(inner, before)
                self._connect(after, end)
                if high != 1:
                    self._connect(after, before)
                if low == 0:
                    self._connect(before, end)
            case Reference(name) if name not in self.lexemes:
                self._connect(start, self.starts[name])
                self._connect(self.ends[name], end)
            case _:
                self.parts[end] = part
                self._connect(start, end)
        return end

    def _next(self, node: int) -> set[int]:
        """Return the lexemes that may come after a node."""
        if node not in self._next_lexemes:
            found = set()
            seen = {node}
            waiting = [node]
            while waiting:
                for following in self.edges[waiting.pop()]:
                    if following in self.parts:
                        found.add(following)
                    elif following not in seen:
                        seen.add(following)
                        waiting.append(following)
            self._next_lexemes[node] = found
        return self._next_lexemes[node]

    def find_conflicts(self) -> set[Part]:
        """Return lexemes of several characters that might take one that belongs to what follows, or to another lexeme.

        If too many lexemes may come at the same place, return all of them.
        """
        conflicts: set[Part] = set()
        pairs: set[tuple[int, int]] = set()
        waiting: list[tuple[int, int]] = []
        following = self._next(self.starts["root"])
        while True:
            if len(following) ** 2 <= _MAX_PAIRS:
                new = {(a, b) for a in following for b in following if a <= b} - pairs
                pairs |= new
                waiting += new
            if len(following) ** 2 > _MAX_PAIRS or len(pairs) > _MAX_PAIRS:
                return {*map(Reference, self.lexemes), *map(Text, self.texts)}
            if not waiting:
                return conflicts
            a, b = waiting.pop()
            following = set()
            first, second = self.parts[a], self.parts[b]
            shape, other = self._shape(first), self._shape(second)
            if not shape.first & other.first:
                continue  # the first character tells them apart
            if first != second:
                conflicts.update(part for part in (first, second) if self._is_long(part))
            following = self._next(a) | self._next(b)
            if first == second and any(shape.more & self._shape(self.parts[node]).first for node in following):
                conflicts.add(first)

    def _shape(self, part: Part) -> _Shape:
        shape = _shape(part, self.shapes)
        assert shape is not None  # a lexeme is regular
        return shape

    def _is_long(self, part: Part) -> bool:
        """Return whether a lexeme may have more than one character."""
        return isinstance(part, Reference) or (isinstance(part, Text) and len(part.text) > 1)


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
