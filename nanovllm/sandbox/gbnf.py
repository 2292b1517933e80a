"""Converts GBNF, the notation of llama.cpp's grammars, to Lark's notation as llguidance reads it.

llguidance splits a text into lexemes, as Lark does, and a lexeme takes as many characters as it can. GBNF has none:
each character is a step of its own. A lexeme for each character is right for all grammars, but where many tokens may
follow, as within a string, a mask then takes milliseconds. So a rule or a text is one lexeme where that changes
nothing: its first character tells it from what else may come, and each next character says whether it goes on.
"""

import json
from collections.abc import Mapping

from nanovllm.sandbox.gbnf_lexemes import choose_lexemes
from nanovllm.sandbox.gbnf_parser import Characters, Choice, Part, Reference, Repeat, Sequence, Text, parse, references

_MARKS = {(0, None): "*", (1, None): "+", (0, 1): "?"}


def convert(grammar: str) -> str:
    """Return a GBNF grammar in Lark's notation.

    Raises:
        ValueError: it is wrong; the message has the place.
    """
    try:
        rules = _with_more_rules(parse(grammar))
        return _write(rules, *choose_lexemes(rules))
    except RecursionError:
        raise ValueError("the grammar is nested too deeply") from None


def _with_more_rules(rules: Mapping[str, Part]) -> dict[str, Part]:
    """Return the same grammar with rules for choices of texts and repeated characters, so that they can be lexemes."""
    names: dict[Part, str] = {}

    def rule_of(part: Part) -> Part:
        return Reference(names.setdefault(part, f"part {len(names)}"))  # no name in a grammar has a space

    def rewrite(part: Part) -> Part:
        match part:
            case Choice(parts) if len(texts := [each for each in parts if isinstance(each, Text)]) > 1:
                others = [rewrite(each) for each in parts if not isinstance(each, Text)]
                choice = rule_of(Choice(tuple(texts)))
                return Choice((choice, *others)) if others else choice
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


def _write(rules: Mapping[str, Part], lexemes: set[str], texts: set[str]) -> str:
    """Return the rules in Lark's notation. Names of rules have small letters there, and those of terminals capitals."""
    names = {name: f"rule_{i}" for i, name in enumerate(rules)}

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

    lines = {"start": write(Reference("root"), within_lexeme=False)}
    waiting = [("root", "root" in lexemes)]
    while waiting:
        name, is_lexeme = waiting.pop()
        rule = names[name].upper() if is_lexeme else names[name]
        if rule not in lines:
            lines[rule] = write(rules[name], within_lexeme=is_lexeme)
            waiting += [(each, is_lexeme or each in lexemes) for each in references(rules[name])]
    return "".join(f"{rule}: {part}\n" for rule, part in lines.items())
