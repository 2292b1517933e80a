"""GBNF grammars match what they match in llama.cpp."""

import itertools
import random
import re

import pytest

from nanovllm.sandbox.gbnf import convert
from nanovllm.sandbox.gbnf_parser import Characters, Choice, Reference, Repeat, Sequence, Text, parse
from nanovllm.sandbox.grammars import compile_grammar, make_tokenizer

LETTERS = "abcé"
TOKENS = [*map(chr, range(32, 127)), *"\t\né😀è\ue9a0", "ab", "bc", "abc", '":', "<end>"]
END = len(TOKENS) - 1


@pytest.fixture(scope="module")
def matcher():
    """Return a function that compiles a GBNF grammar."""
    tokenizer = make_tokenizer([token.encode().decode("latin-1") for token in TOKENS], [END], [END])
    return lambda grammar: compile_grammar(tokenizer, convert(grammar) + '\n%llguidance {"no_forcing": true}\n')


def matches(matcher, text):
    """Return whether the whole text matches. It is split into the longest tokens that are allowed."""
    own = matcher.deep_copy()
    while True:
        allowed = own.compute_bitmask()
        is_allowed = [bool(allowed[i // 8] >> i % 8 & 1) for i in range(len(TOKENS))]
        assert not own.is_error(), own.get_error()
        if not text:
            return is_allowed[END] or own.is_stopped()
        starts = [i for i in range(END) if is_allowed[i] and text.startswith(TOKENS[i])]
        if own.is_stopped() or not starts:
            return False
        token_id = max(starts, key=lambda i: len(TOKENS[i]))
        own.consume_token(token_id)
        text = text.removeprefix(TOKENS[token_id])


GRAMMARS = {
    # White space may be the newline that ends an equation.
    r"""
root ::= (expr "=" ws term "\n")+
expr ::= term ([-+*/] term)*
term ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num ::= [0-9]+ ws
ws ::= [ \t\n]*
""": (["1+2=3\n", "(a +b_1)*3 = c\nx=1\n", "1=1\n\n\n"], ["1+2=3", "1+=2\n", "A=1\n"]),
    r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
    string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws # a text
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
""": (
        ['{"a": [1, 2.5e+3, "b\\u00e9\\n"]}', "{}", '{"é": null}\n  ', '{"a":{"b":[true,false]}}'],
        ["[1]", '{"a":01}', '{"a"}'],
    ),
    r"""
root ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move ::= (pawn | nonpawn | castle) [+#]?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
""": (["1. e4 e5\n2. Nf3 Nc6\n", "1. exd5+ O-O-O\n2. e8=Q# Rae1\n"], ["1. e4 e5\n", "1. e9 e5\n2. a1 a1\n"]),
    'root ::= word "a"\nword ::= [a-z]+': (["aa", "bca", "aaaa"], ["a", "ab"]),
    'root ::= ("ab" | "abc") ("c" | "d")': (["abc", "abd", "abcc", "abcd"], ["ab", "abcb"]),
    'root ::= "/*" ([^*] | "*" [^/])* "*/"': (["/**/", "/* a * b */", "/***a*/"], ["/*/", "/**/*/"]),
    'root ::= name "=" (name | quoted)\nname ::= [a-c]+\nquoted ::= "ab!" [^!]* "!"': (
        ["a=ab", "c=ab!x!"],
        ["a=ab!", "a="],
    ),
    'root ::= a |\n  b\n  | "c" # end\na ::= "x"\nb ::= "" "z"': (["x", "z", "c"], ["", "xz"]),
    'root ::= "a"{2} "b"{1,} [x-z]{2,3} ("d" | "ee"){0,1} "c"*': (
        ["aabxy", "aabbxyzeecc"],
        ["aabx", "abxy", "aabxyzz"],
    ),
    'root ::= ab "x" | "ab" "c" "y"\nab ::= [a-c]+': (["abx", "abcy", "abcx"], ["aby", "acy"]),
    'root ::= "(" root ")" | "[" root? "]" | "x"': (["(([x]))", "[[]]"], ["()", "(]"]),
}


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_grammars_match_their_texts_and_no_others(matcher, grammar):
    inside, outside = GRAMMARS[grammar]
    compiled = matcher(grammar)
    assert [text for text in (*inside, *outside) if matches(compiled, text)] == inside


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (r'"\u00e9a\U0001F600\x41"', ["éa😀A"], ["\ue9a0"]),
        (r"[\u0041-\u0043]", ["A", "C"], ["D", "u"]),
        (r"[^\u00e9\n]", ["a", "è"], ["é", "\n"]),
        (".", ["\n", "a", "😀"], ["ab"]),
        ("[a&&b]", ["a", "&", "b"], ["c"]),
        ("[a~~b]", ["a", "~"], ["c"]),
        ("[+--]", ["+", ",", "-"], [".", "a"]),
        ("[--9]", ["-", "5"], [":"]),
        ("[a-]", ["a", "-"], ["b"]),
        (r"[a\-c]", ["a", "-", "c"], ["b", "\\"]),
        (r'"\"\\" [/"\]\[^]', ['"\\/', '"\\"', '"\\]', '"\\[', '"\\^'], ['"\\a']),
        ('"#." # "a" [', ["#."], ["#a"]),
        ('("a"+)? "b"', ["b", "ab", "aab"], ["a"]),
        ("([0-9]+){2}", ["12", "123"], ["1"]),
        ('(("-"? ) # one\n)* ")?"', [")?", "-)?", "--)?"], ["-"]),
    ],
)
def test_characters_and_groups_are_those_of_llama_cpp(matcher, rule, inside, outside):
    compiled = matcher(f"root ::= {rule}")
    assert [text for text in (*inside, *outside) if matches(compiled, text)] == inside


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "the grammar has no rule root"),
        ('start ::= "a"', "the grammar has no rule root"),
        ("root ::= word", "the rule root refers to 'word', which is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2 of the grammar: 'root ::= \"b\"' is defined before"),
        ('root ::= "a"\n\n  & "b"', "line 3 of the grammar: '& \"b\"' cannot be read"),
        ('root ::= "a" again | "b"\nagain ::= ("c" | root) again', "the rule again never ends"),
        ('root ::= "a', "cannot be read"),
        ('"a"', "does not belong to a rule"),
        ('root ::= "a" )', "does not belong to a rule"),
        ('root ::= ("a"', "is not closed"),
        ('root ::= * "a"', "has nothing to repeat"),
        ('root ::= "a"{3,2}', "has bounds in the wrong order"),
        ("root ::= [z-a]", "has a range in the wrong order"),
        ("root ::= []", "has no character"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "the grammar is nested too deeply"),
        (r"root ::= [\d]", r"has the unknown escape \d"),
        (r'root ::= "\u12"', r"has the unknown escape \u"),
        (r'root ::= "\U00110000"', r"has the unknown escape \U00110000"),
        (r'root ::= "\ud800"', r"has the unknown escape \ud800"),
    ],
)
def test_wrong_grammar_is_refused_with_its_place(grammar, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        convert(grammar)
    assert len(str(caught.value)) < 300


def test_lexemes_are_as_long_as_they_can_be():
    """A step's mask is cheap within a lexeme. Names of lexemes have capitals."""
    assert convert('root ::= word* "a"\nword ::= [a-z]+').startswith("start: RULE")  # no rule comes back to itself
    nested = 'root ::= string ":" string | "[" root "]"\n'
    assert "RULE" in convert(nested + r'string ::= "\"" ([^"\\] | "\\" ["\\nrt])* "\""')
    twice = r'string ::= "\"" ([^"\\] | "\\" ["\\nrt] | "\\" "u" [0-9a-f]{4})* "\""'  # two parts start alike
    assert "RULE" in convert(nested.replace("string", r'"\"key\":" string', 1) + twice)
    assert "RULE" in convert('root ::= "(" root ")" | [^()\\n]+')
    assert "RULE" in convert('root ::= "(" root ")" | ' + " | ".join(f'"word{i}"' for i in range(1000)))
    assert "RULE" not in convert('root ::= "(" root ")" | word "a"\nword ::= [a-z]+')


LARGE = {
    "chain": "\n".join(["root ::= r0", *(f'r{i} ::= "a" r{i + 1}' for i in range(3000)), 'r3000 ::= "b"']),
    "choices": "root ::= " + " | ".join(f'"w{i} x"' for i in range(10_000)),
    "overlaps": "root ::= (" + " | ".join(f"[a-z{i}]+ [a-y]*" for i in range(300)) + ")*",
    "doubled": "\n".join(["root ::= d0", *(f"d{i} ::= d{i + 1} d{i + 1}" for i in range(40)), "d40 ::= [a-z]"]),
    "doubled nothing": "\n".join(["root ::= d0", *(f"d{i} ::= d{i + 1} d{i + 1}" for i in range(40)), 'd40 ::= ""']),
    "loop": "root ::= (" + " | ".join(f"[a-z{chr(256 + i)}] root?" for i in range(300)) + ")*",
    "bottom up": "\n".join(['r0 ::= "b"', *(f'r{i} ::= "a" r{i - 1}' for i in range(1, 3000)), "root ::= r2999"]),
    "deep": "\n".join(["root ::= d0", *(f"d{i} ::= {'(' * 12}d{i + 1}{')?' * 12}" for i in range(45)), 'd45 ::= "a"']),
    "text": 'root ::= "' + "a" * 1_000_000 + '"',
}


@pytest.mark.parametrize("name", LARGE)
def test_large_grammars_are_converted_in_proportion_to_their_size(name):
    assert len(convert(LARGE[name])) < 4 * len(LARGE[name]) + 1000


def random_part(rng, depth, names):
    """Return a random part of a rule over a, b and c."""
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        texts = [f'"{"".join(rng.choices("abc", k=rng.randrange(1, 4)))}"' for _ in range(3)]
        sets = ["[ab]", "[^a]", "[a-c]"]
        return rng.choice([*texts, *sets, '""', f"({' | '.join(texts)})", f"{rng.choice(sets)}{rng.choice('*+')}"])
    if kind < 0.5:
        return rng.choice(names)
    first, second = (random_part(rng, depth - 1, names) for _ in range(2))
    if kind < 0.7:
        return f"({first} | {second})"
    return f"{first} {second}" if kind < 0.85 else f"({first}){rng.choice(['*', '+', '?', '{2}', '{1,2}'])}"


class Recognizer:
    """Says which texts match, by sets of the places where each rule may end. It has no lexemes."""

    def __init__(self, grammar):
        self.rules = parse(grammar)

    def matches(self, text):
        self.text = text
        self.found = {(name, start): set() for name in self.rules for start in range(len(text) + 1)}
        has_grown = True
        while has_grown:
            has_grown = False
            for (name, start), ends in self.found.items():
                has_grown |= bool(new := self.ends(self.rules[name], start) - ends)
                ends |= new
        return len(text) in self.found["root", 0]

    def ends(self, part, start):
        match part:
            case Characters(regex):
                return {start + 1} if re.match(regex, self.text[start:], re.DOTALL) else set()
            case Text(text):
                return {start + len(text)} if self.text.startswith(text, start) else set()
            case Reference(name):
                return self.found[name, start]
            case Choice(parts):
                return set().union(*(self.ends(each, start) for each in parts))
            case Sequence(parts):
                ends = {start}
                for each in parts:
                    ends = set().union(*(self.ends(each, end) for end in ends))
                return ends
            case Repeat(inner, low, high):
                ends, all_ends = {start}, set()
                for count in range(len(self.text) + low + 1 if high is None else high + 1):
                    all_ends |= ends if count >= low else set()
                    ends = set().union(*(self.ends(inner, end) for end in ends))
                return all_ends


@pytest.mark.parametrize("seed", range(60))
def test_random_grammars_match_the_texts_that_they_match_without_lexemes(matcher, seed):
    rng = random.Random(seed)
    names = ["root", "one", "two", "three"][: rng.randrange(2, 5)]
    # Each rule ends if it takes its last alternative.
    grammar = "\n".join(f'{name} ::= {random_part(rng, 3, names)} | "{rng.choice("ab")}"' for name in names)
    texts = ["".join(text) for size in range(4) for text in itertools.product("abc", repeat=size)]
    texts += ["".join(rng.choices(LETTERS, k=rng.randrange(3, 8))) for _ in range(30)]
    compiled, recognizer = matcher(grammar), Recognizer(grammar)
    assert [text for text in texts if matches(compiled, text)] == [text for text in texts if recognizer.matches(text)]
