"""Grammars of required, named and strict tool calls, checked with llguidance itself."""

import json
import re
import time
from contextlib import suppress

import pytest

pytest.importorskip("llguidance")

from nanovllm import StructuredOutputsParams
from nanovllm.sandbox.grammars import compile_grammar, make_tokenizer, prepare
from nanovllm.server.events import CallArguments, CallStart
from nanovllm.server.text_format import TextFormat

SPECIAL = ["<|end|>", "[TOOL_CALLS]", "[ARGS]"]
# Tokens are bytes, special tokens and tags that are not special.
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
TOKENS = [bytes([i]).decode("latin-1") for i in range(256)] + SPECIAL + TAGS
VOCABULARY = {"tokens": TOKENS, "special_token_ids": [256, 257, 258], "eos_token_ids": [256]}
TEXT_TOKENS = {tag: TOKENS.index(tag) for tag in TAGS}

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
        "at": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}},
}


def tool(name, parameters=None, strict=False):
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TOOLS = [tool("weather", WEATHER), tool("now")]
FORMATS = {
    "hermes": TextFormat("hermes", "think"),
    "qwen3_coder": TextFormat("qwen3_coder", "think"),
    "llama3": TextFormat("llama3"),
    "mistral": TextFormat("mistral"),
    "mistral_tags": TextFormat("mistral", has_argument_tags=True),
    "none": TextFormat("none"),
}


@pytest.fixture(scope="module")
def accepts():
    """Return whether the outputs of a constraint can be a text. Special tokens are written as their names."""
    tokenizer, answer = make_tokenizer(**VOCABULARY), prepare(VOCABULARY, TEXT_TOKENS)
    matchers = {}

    def accepts(constraint, text):
        if constraint.grammar not in matchers:
            matchers[constraint.grammar] = compile_grammar(
                tokenizer, answer({"grammar": constraint.grammar})["grammar"]
            )
        matcher = matchers[constraint.grammar].deep_copy()
        names = "|".join(map(re.escape, SPECIAL + TAGS))
        for part in re.split(f"({names})", text):
            for token_id in [TOKENS.index(part)] if part in SPECIAL + TAGS else part.encode():
                if matcher.is_stopped() or not matcher.consume_token(token_id):
                    return False
        return matcher.is_stopped() or matcher.is_accepting()

    return accepts


def call(name, text_format, **arguments):
    """Return a call as a model of the format writes it."""
    text = json.dumps(arguments, ensure_ascii=False)
    if text_format in ("hermes", "none"):
        return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'
    if text_format == "llama3":
        return f'{{"name": "{name}", "parameters": {text}}}'
    if text_format == "mistral":
        return f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {text}}}]'
    if text_format == "mistral_tags":
        return f"[TOOL_CALLS]{name}[ARGS]{text}"
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def parsed_calls(text_format, text, tools=TOOLS, prompt=""):
    (parser,) = text_format.parsers(prompt, tools, is_constrained=True)
    events = parser.feed(text) + parser.finish()
    names = [event.name for event in events if isinstance(event, CallStart)]
    pieces = [
        "".join(e.text for e in events if isinstance(e, CallArguments) and e.index == i) for i in range(len(names))
    ]
    return [(name, json.loads(text)) for name, text in zip(names, pieces, strict=True)]


VALID = [
    ("weather", {"city": 'Köln 🙂 "a" <b> \\ \n\n'}),
    ("weather", {"city": ""}),
    ("weather", {"city": "x", "days": 3, "unit": "C", "at": {"x": 1.5}}),
    ("now", {}),
]
INVALID = [
    ("weather", {}),
    ("weather", {"city": "x", "days": 10}),
    ("weather", {"city": "x", "days": "3 "}),
    ("weather", {"city": "x", "unit": "K"}),
    ("weather", {"city": "x", "at": {"y": 1}}),
    ("weather", {"city": "x", "other": 1}),
    ("now", {"a": 1}),
    ("then", {}),
]


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_accepted_if_they_are_valid_and_parsed_as_they_were_meant(name, accepts):
    constraint = FORMATS[name].constraint(TOOLS, "required", parallel=False)
    for function, arguments in VALID:
        text = call(function, name, **arguments)
        assert accepts(constraint, text), text
        assert parsed_calls(FORMATS[name], text) == [(function, arguments)]
    for function, arguments in INVALID:
        assert not accepts(constraint, call(function, name, **arguments)), (function, arguments)
    for text in ("", "Hello", "Hello " + call("now", name), call("now", name) + " Hello", call("now", name)[:-1]):
        assert not accepts(constraint, text), text


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_the_only_one_that_can_be_called(name, accepts):
    constraint = FORMATS[name].constraint(TOOLS, "now", parallel=True)
    assert accepts(constraint, call("now", name))
    assert not accepts(constraint, call("weather", name, city="x"))
    with pytest.raises(ValueError, match="tool_choice must name one of the tools, got 'then'"):
        FORMATS[name].constraint(TOOLS, "then", parallel=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["string", "array", "foo", ["null", "string"], None])
def test_parameters_that_are_no_object_are_refused(name, kind):
    tools = [tool("now", {"type": kind})]
    with pytest.raises(ValueError, match="tool now must have the type 'object', got"):
        FORMATS[name].constraint(tools, "required", parallel=True)
    assert FORMATS[name].constraint([tool("now", {"type": ["object", "null"]})], "required", parallel=True)


TWO_CALLS = {
    "hermes": call("now", "hermes") + "\n" + call("weather", "hermes", city="x"),
    "qwen3_coder": call("now", "qwen3_coder") + "\n" + call("weather", "qwen3_coder", city="x"),
    "mistral": call("now", "mistral")[:-1]
    + ", "
    + call("weather", "mistral", city="x").partition("[{")[2].join(["{", ""]),
    "mistral_tags": call("now", "mistral_tags") + call("weather", "mistral_tags", city="x"),
}


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("tool_choice", ["required", "auto"])
def test_two_calls_are_accepted_if_calls_may_be_parallel(name, tool_choice, accepts):
    tools = [tool("weather", WEATHER, strict=True), tool("now")]
    text = TWO_CALLS[name]
    assert parsed_calls(FORMATS[name], text) == [("now", {}), ("weather", {"city": "x"})]
    assert accepts(FORMATS[name].constraint(tools, tool_choice, parallel=True), text)
    assert not accepts(FORMATS[name].constraint(tools, tool_choice, parallel=False), text)


@pytest.mark.parametrize("name", TWO_CALLS)
def test_a_named_function_is_called_once(name, accepts):
    text = TWO_CALLS[name].replace("weather", "now").replace('"city": "x"', "")
    text = text.replace("<parameter=city>\nx\n</parameter>\n", "")
    assert parsed_calls(FORMATS[name], text) == [("now", {})] * 2
    assert accepts(FORMATS[name].constraint(TOOLS, "required", parallel=True), text)
    assert not accepts(FORMATS[name].constraint(TOOLS, "now", parallel=True), text)


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_thinking_may_come_before_calls_where_the_prompt_lets_it(name, accepts):
    text_format, text = FORMATS[name], call("now", name)
    thought = "\nI must <tool_call> now.\n"
    optional = text_format.constraint(TOOLS, "required", parallel=True, prompt_text="<|im_start|>assistant\n")
    assert accepts(optional, text) and accepts(optional, f"<think>{thought}</think>\n\n{text}")
    assert not accepts(optional, f"{thought}</think>\n\n{text}")
    opened = text_format.constraint(TOOLS, "required", parallel=True, prompt_text="assistant\n<think>\n")
    assert accepts(opened, f"{thought}</think>\n\n{text}")
    assert not accepts(opened, text), "the call would belong to the thinking"
    closed = text_format.constraint(TOOLS, "required", parallel=True, prompt_text="assistant\n<think>\n\n</think>\n\n")
    assert accepts(closed, text) and not accepts(closed, f"<think>{thought}</think>\n\n{text}")


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "llama3", "mistral", "mistral_tags"])
def test_strict_tools_are_called_correctly_in_free_text_and_others_with_any_arguments(name, accepts):
    tools = [tool("weather", WEATHER, strict=True), tool("now")]
    text_format = FORMATS[name]
    constraint = text_format.constraint(tools, "auto", parallel=True)
    before = "" if name == "llama3" else "Let me see.\n\n"
    assert accepts(constraint, "") and accepts(constraint, "Hello <b> {") and accepts(constraint, "Hello\n")
    for function, arguments in [*VALID, ("now", {"any": "thing"})]:
        assert accepts(constraint, before + call(function, name, **arguments)), (function, arguments)
    for function, arguments in INVALID[:-2]:
        assert not accepts(constraint, before + call(function, name, **arguments)), (function, arguments)
    assert not accepts(constraint, before + call("then", name))


def test_no_constraint_is_made_where_every_output_is_right():
    for name, text_format in FORMATS.items():
        assert text_format.constraint(TOOLS, "auto", parallel=True) is None, name
        assert text_format.constraint(TOOLS, "none", parallel=False) is None
        assert text_format.constraint([], "auto", parallel=False) is None


@pytest.mark.parametrize("name", FORMATS)
def test_schemas_of_tools_may_have_what_schemas_of_structured_outputs_may(name, accepts):
    properties = {"a": {"type": "array", "items": {"type": "integer", "format": "int64"}, "uniqueItems": False}}
    tools = [tool("f", {"properties": properties, "title": "é", "required": ["a"]})]
    constraint = FORMATS[name].constraint(tools, "required", parallel=False)
    assert accepts(constraint, call("f", name, a=[1, 1]))
    assert not accepts(constraint, call("f", name, a=["1"]))


def test_text_values_of_tags_follow_lengths_and_patterns(accepts):
    schema = {"type": "object", "required": ["a"]}
    cases = [
        ({"minLength": 2, "maxLength": 3}, ["ab", "abc", "a\n"], ["a", "abcd"]),
        ({"pattern": "^a/[0-9]+$"}, ["a/1", "a/22"], ["a/", "xa/1", "a/1x"]),
        ({"pattern": "b"}, ["abc", "b", "a\nb"], ["ac", ""]),
        ({"enum": ["on", 'o"f\nf']}, ["on", 'o"f\nf'], ["off", ""]),
        ({"const": "é"}, ["é"], ["e"]),
    ]
    for words, valid, invalid in cases:
        tools = [tool("f", {**schema, "properties": {"a": {"type": "string", **words}}})]
        constraint = FORMATS["qwen3_coder"].constraint(tools, "required", parallel=False)
        for value in valid:
            assert accepts(constraint, call("f", "qwen3_coder", a=value)), (words, value)
        for value in invalid:
            assert not accepts(constraint, call("f", "qwen3_coder", a=value)), (words, value)


def parameters(*required, **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def pet(kind, **properties):
    return parameters("kind", kind={"const": kind, "type": "string"}, **properties)


WORD, FEW = {"type": "string", "enum": ["aa", "b"]}, {"type": "integer", "minimum": 5}
# Schemas of a value, and texts of it that follow the schema or do not. `w` is WORD.
VALUES = [
    ({"anyOf": [WORD, {"type": "null"}]}, ["aa", "null"], ["zz", "aab"]),
    ({"type": ["string", "null"], "enum": ["a", None, 3]}, ["a", "null"], ["b", "3"]),
    ({"allOf": [{"$ref": "#/$defs/w"}], "default": "b"}, ["aa"], ["zz"]),
    ({"$ref": "#/$defs/long", "maxLength": 3}, ["abc"], ["ab", "abcd"]),
    ({"anyOf": [WORD, FEW]}, ["aa", "5", "55"], ["4", "c", "aa5"]),
    ({"anyOf": [{"type": "string"}, FEW]}, ["x4", "5", "55", "a\n4", ""], ["4", " 4", "-7"]),
    ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}, {"type": "null"}]}, ["ab", "123", "null"],
     ["abc", "1.55", '"ab"', "nulls"]),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": FEW}]}, ["x", "[5, 6]", "a[4]"], ["[4]", "[a"]),
    ({"oneOf": [{"const": "x", "title": "X"}, {"const": "y"}]}, ["x", "y"], ["z"]),
    ({"oneOf": [pet("cat", lives=FEW), pet("dog", name=WORD)]},
     ['{"kind": "cat", "lives": 9}', '{"kind": "dog", "name": "aa"}'],
     ['{"kind": "cat", "name": "aa"}', '{"kind": "cow"}']),
    ({"type": "array", "items": {"$ref": "#/$defs/w"}}, ['["b"]'], ['["c"]', "b"]),
    ({"type": "array", "items": {"$ref": "#/properties/few"}}, ["[5]"], ["[4]"]),
    ({"type": "array", "items": {"$ref": "#/properties/list/items/0"}}, ["[7]"], ["[8]"]),
    ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, ["null", '{"a": null}', '{"a": {"a": null}}'], ['{"a": 1}', "{}"]),
    ({"type": "string", "format": "date"}, ["2024-02-29", "2023-12-31"], ["today", "2023-02-29", "2023-11-31"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-29T10:00:00Z"], ["2024-02-29", "2024-02-29T24:00:00Z"]),
    ({"type": "string", "format": "uuid"}, ["0123abcd-0123-0123-0123-0123456789ab"], ["0123"]),
    ({"type": "string", "pattern": r"^\d{2}$"}, ["12"], ["٣٤", "1a"]),
    ({"type": "string", "pattern": r"^[^\d\W]/\w$"}, ["a/1"], ["1/a", "é/a", "a/é"]),
    ({"enum": ["", "</parameter>", 'ü"🙂', 1, None]}, ["", "</parameter>", 'ü"🙂', "1", "null"], ["x", "true"]),
    (True, ["x", "1", "{"], []),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), VALUES, ids=lambda value: str(value)[:60])
def test_values_of_tags_follow_their_schema(schema, valid, invalid, accepts):
    whole = parameters("a", a=schema, few=FEW, list={"items": [{"const": 7}]})
    whole["$defs"] = {"w": WORD, "long": {"type": "string", "minLength": 3}}
    constraint = FORMATS["qwen3_coder"].constraint([tool("f", whole)], "required", parallel=False)
    for value in valid:
        assert accepts(constraint, call("f", "qwen3_coder", a=value)), value
    for value in invalid:
        assert not accepts(constraint, call("f", "qwen3_coder", a=value)), value


# Schemas of all parameters, and parameters that follow the schema or do not.
ALL_PARAMETERS = [
    ({"$ref": "#/$defs/r", "$defs": {"r": parameters("s", s=FEW)}}, [{"s": 5}], [{}, {"s": 4}, {"s": "x"}]),
    ({"type": "object", "allOf": [parameters("a", a=FEW)]}, [{"a": 5}], [{}, {"zz": "1"}]),
    (parameters("c", c={"type": "array", "items": {"$ref": "#"}}), [{"c": []}, {"c": [{"c": []}]}], [{"c": [[]]}]),
    (
        {"properties": {"a": {"type": "string"}, "b": FEW}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": "x"}, {"b": 5}, {"a": "x", "b": 5}],
        [{}, {"b": 4}],
    ),
    ({"anyOf": [parameters("a", a=FEW), parameters("b", b=WORD)]}, [{"a": 5}, {"b": "b"}], [{"a": 5, "b": "b"}, {}]),
    (
        {"properties": {"a": WORD}, "additionalProperties": FEW},
        [{"a": "b"}, {"z": 5}, {"a": "b", "z": 5, "ab": 6}],
        [{"z": 4}, {"z": "x"}, {"z": 5, "a": "b"}],
    ),
    ({"properties": {"a": WORD}, "additionalProperties": True}, [{"a": "b", "z": "x"}], [{"a": "c"}]),
    ({"properties": {"a": WORD}, "required": ["a"], "minProperties": 1, "maxProperties": 1}, [{"a": "b"}], [{}]),
    (parameters(a=False, b=WORD), [{}, {"b": "b"}], [{"a": "x"}]),
    ({"required": ["a"]}, [{"a": "x"}, {"a": "x", "b": "y"}], [{}, {"b": "x"}]),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), ALL_PARAMETERS, ids=lambda value: str(value)[:60])
def test_parameters_of_tags_follow_their_schema(schema, valid, invalid, accepts):
    tools = [tool("f", schema)]
    constraint = FORMATS["qwen3_coder"].constraint(tools, "required", parallel=False)
    for arguments in valid:
        text = call("f", "qwen3_coder", **arguments)
        assert accepts(constraint, text), arguments
        assert parsed_calls(FORMATS["qwen3_coder"], text, tools) == [("f", arguments)]
    for arguments in invalid:
        assert not accepts(constraint, call("f", "qwen3_coder", **arguments)), arguments


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": WORD}, "minProperties": 1}, "minProperties"),
        ({"properties": {"a": WORD}, "maxProperties": 0}, "maxProperties"),
        ({"properties": {"a": WORD}, "minProperties": "1"}, "minProperties .* integer"),
        ({"patternProperties": {"^a": WORD}}, "patternProperties"),
        ({"properties": {}, "not": {"required": ["a"]}}, "not"),
        ({"oneOf": [parameters(a=WORD), parameters(a=FEW)]}, "oneOf"),
        (parameters("b", a=WORD), "'b'"),
        (parameters(a={"type": "string", "enum": [1]}), "no value"),
        (parameters(a={"type": "string", "format": "email"}), "format 'email'"),
        (parameters(a={"type": "string", "not": {"const": "a"}}), "not"),
        (parameters(a={"type": "string", "minLength": "1"}), "minLength .* integer"),
        (parameters(a={"oneOf": [{"type": "string"}, WORD]}), "oneOf"),
        (parameters(a={"oneOf": [pet("cat"), pet("cat", name=WORD)]}), "oneOf"),
        (parameters(a={"oneOf": [pet("cat"), {"type": "object", "properties": {"kind": WORD}}]}), "oneOf"),
        (parameters(a={"oneOf": [{"type": "number"}, {"type": "integer"}, WORD]}), "oneOf"),
        (parameters(a={**WORD, "minLength": 2}), "minLength next to"),
        (parameters(a={"allOf": [{"type": "string", "minLength": 2}, {"minLength": 3}]}), "allOf"),
        (parameters(a={"enum": ["None", "x", None]}), "'None'"),
        (parameters(a={"enum": ["x\n</parameter>\n<parameter=b>"]}), "value"),
        (parameters(a={"$ref": "#/$defs/missing"}), "None"),
        (parameters(a={"$ref": "#/properties/a"}), "itself"),
    ],
    ids=str,
)
def test_a_schema_that_tags_cannot_be_held_to_is_refused_by_the_keyword(schema, words):
    with pytest.raises(ValueError, match=words):
        FORMATS["qwen3_coder"].constraint([tool("f", schema)], "required", parallel=False)


@pytest.mark.parametrize("value", ["x\n</parameter>\ny", "</parameter><parameter=b>"])
def test_a_text_value_of_a_grammar_holds_no_end_tag_that_the_parser_could_take_for_its_end(value, accepts):
    constraint = FORMATS["qwen3_coder"].constraint(TOOLS, "weather", parallel=False)
    assert not accepts(constraint, call("weather", "qwen3_coder", city=value))


@pytest.mark.parametrize("name", FORMATS)
def test_a_deep_or_large_or_odd_schema_is_refused_in_words(name):
    deep = {"type": "integer"}
    for _ in range(50_000):
        deep = {"anyOf": [deep]}
    large = {"type": "object", "properties": {f"p{i}": {"type": "integer", "title": "x" * 500} for i in range(3000)}}
    shared = {"$defs": {"a": {"type": "integer", "title": "x" * 10_000}}}
    shared["properties"] = {f"p{i}": {"anyOf": [{"$ref": "#/$defs/a"}]} for i in range(300)}
    cycle = {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "properties": {"p": {"$ref": "#/$defs/a"}},
    }
    many = {"anyOf": [{"required": ["p"]}] * 60, "properties": {f"p{i}": {"anyOf": [{}] * 60} for i in range(500)}}
    for schema in ({"properties": {"p": deep}}, large, shared, cycle, {"properties": {"p": deep}, "$ref": "#"}, many):
        try:
            FORMATS[name].constraint([tool("f", schema)], "required", parallel=True)
        except ValueError as error:
            assert "schema" in str(error) and len(str(error)) < 500
    with pytest.raises(TypeError, match="parameters of the tool f must be a JSON schema, got 'text'"):
        FORMATS[name].constraint([tool("f", "text")], "required", parallel=True)
    with pytest.raises(ValueError, match="a tool's name must have"):
        FORMATS[name].constraint([tool("f\n")], "required", parallel=True)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {"$ref": "#/$defs/a"} for i in range(4000)}, "$defs": {"a": {"type": "integer"}}},
        {"properties": {}, "additionalProperties": {"anyOf": [{}] * 64}, "required": [f"p{i}" for i in range(60_000)]},
        {"properties": {f"p{i}": {} for i in range(15_000)}, "required": [f"p{i}" for i in range(15_000)][::-1]},
        {"properties": {f"p{i}": False for i in range(30_000)}, "required": [f"q{i}" for i in range(30_000)]},
        {"properties": {"p": {"allOf": [{"type": [f"{i}{j}" for j in range(20_000)]} for i in "ab"]}}},
        {
            "properties": {
                "p": {"allOf": [{"type": ["null"] * 30_000}, {"anyOf": [{"anyOf": [{"type": ["null"]}] * 60}] * 60}]}
            }
        },
        {"properties": {"p": {"type": "string", "pattern": "[" * 100_000}}},
        {"properties": {"p": {"type": "string", "pattern": r"\p{" * 100_000}}},
    ],
    ids=["references", "required", "properties", "forbidden", "types", "alternatives", "classes", "categories"],
)
def test_a_rule_is_made_in_time_that_grows_with_the_length_of_the_schema(schema):
    schema = json.loads(json.dumps(schema))
    start = time.process_time()
    with suppress(ValueError):
        FORMATS["qwen3_coder"].constraint([tool("f", schema)], "required", parallel=True)
    assert time.process_time() - start < 3, "this takes 0.2 s"


JSON_ANSWER = StructuredOutputsParams(
    json={
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
)
ANSWER = '{"ok": true}'


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"none", "llama3"}))
def test_an_answer_in_json_may_be_chosen_instead_of_calls(name, accepts):
    constraint = FORMATS[name].constraint(TOOLS, "auto", parallel=True, response=JSON_ANSWER)
    a_call = call("now", name)
    assert accepts(constraint, ANSWER)
    assert accepts(constraint, a_call)
    for text in ('{"ok": 1}', "text", f"{ANSWER}{ANSWER}", f"{ANSWER}{a_call}", "{}", ""):
        assert not accepts(constraint, text), text


def test_an_answer_in_json_has_no_effect_where_a_call_is_required(accepts):
    constraint = FORMATS["hermes"].constraint(TOOLS, "required", parallel=True, response=JSON_ANSWER)
    assert accepts(constraint, call("now", "hermes"))
    assert not accepts(constraint, ANSWER)


@pytest.mark.parametrize("answer", [JSON_ANSWER, StructuredOutputsParams(json_object=True)], ids=["schema", "object"])
def test_an_answer_in_json_follows_thinking_if_the_model_thinks(answer, accepts):
    def constraint(prompt, name="hermes"):
        return FORMATS[name].constraint((), "auto", parallel=True, prompt_text=prompt, response=answer)

    thought = 'Is {"a" ok?\n</think>\n\n'
    for prompt, texts, wrong in (
        ("<think>\n", [thought + ANSWER], [ANSWER, thought, f"{thought}text"]),
        ("<assistant>", [ANSWER, f"<think>\n{thought}{ANSWER}"], [thought + ANSWER, "text", f"<think>{ANSWER}"]),
    ):
        assert all(accepts(constraint(prompt), text) for text in texts)
        assert not any(accepts(constraint(prompt), text) for text in wrong)
    # If the model does not think, the grammar stays.
    assert constraint("<think>\n\n</think>\n\n") is answer
    assert constraint("<think>\n", "mistral") is answer


def test_answers_in_json_are_refused_next_to_calls_that_are_json():
    with pytest.raises(ValueError, match="calls are JSON"):
        FORMATS["llama3"].constraint(TOOLS, "auto", parallel=True, response=JSON_ANSWER)


def test_an_answer_in_another_form_than_json_is_refused_next_to_tools_and_else_kept():
    for answer in (
        StructuredOutputsParams(regex="a+"),
        StructuredOutputsParams(json_object=True, disable_any_whitespace=True),
        StructuredOutputsParams(json="{"),
    ):
        with pytest.raises(ValueError, match="JSON"):
            FORMATS["hermes"].constraint(TOOLS, "auto", parallel=True, response=answer)
        assert FORMATS["hermes"].constraint((), "auto", parallel=True, response=answer) is answer


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_thinking_before_free_text_is_free_where_tools_are_strict(name, accepts):
    tools = [tool("weather", WEATHER, strict=True)]
    text = "\nI must write <tool_call> and <function=x> now.\n</think>\n\nWell.\n" + call("weather", name, city="x")
    for prompt, start in (("<think>\n", ""), ("", "<think>")):
        constraint = FORMATS[name].constraint(tools, "auto", parallel=True, prompt_text=prompt)
        assert accepts(constraint, start + text)
        assert not accepts(constraint, start + text.replace("city", "town"))
    assert accepts(constraint, "Hello") and accepts(constraint, "<b>")
