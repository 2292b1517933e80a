"""Structured outputs of clients are served or refused. A bad one costs no other request."""

import json
import random
import re
import threading
import time

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nanovllm import SamplingParams, StructuredOutputsParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import TokenBytes
from nanovllm.engine.grammars import Grammars
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.messages import StepOutput
from tests.helpers import engine, greedy, tokens
from tests.models.tiny import save_tiny

VOCAB = 416  # more than the tokenizer has


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with a few merges, one special token and two added tokens that are text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>", "<|im|>"]
    )
    backend.train_from_iterator(['{"name": "value", "integer": 12}\n think about it'] * 3, trainer)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def made(tokenizer, vocab_size=VOCAB):
    token_bytes = TokenBytes(tokenizer.backend_tokenizer, False)
    return Grammars(tokenizer, token_bytes, vocab_size, (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    grammars = made(tokenizer)
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def hurried(tokenizer):
    """Refuses what takes more than a second."""
    grammars = made(tokenizer)
    grammars._pool.cpu_seconds = 1
    yield grammars
    grammars.close()


def allowed(token_filter):
    return np.flatnonzero(np.unpackbits(token_filter.compute_mask().view(np.uint8), bitorder="little"))


def walk(token_filter, tokenizer, seed, most=200, preferred=('"', "}", "]", '":', ".")):
    """The text of random allowed tokens, half of them `preferred` ones, and whether it is complete."""
    rng, token_ids = random.Random(seed), []
    while not token_filter.is_complete and len(token_ids) < most:
        choices = [int(i) for i in allowed(token_filter)]
        frequent = [i for i in choices if i in tokenizer.convert_tokens_to_ids(list(preferred))]
        token_ids.append(rng.choice(frequent if frequent and rng.random() < 0.5 else choices))
        token_filter.accept(token_ids[-1])
        assert token_filter.error is None, (tokenizer.decode(token_ids), token_filter.error)
    return tokenizer.decode(token_ids), token_filter.is_complete


def follows(token_filter, tokenizer, text):
    """Whether the filter lets all of `text` follow, by the longest allowed tokens."""
    own = token_filter.copy()
    left = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    while left:
        names = tokenizer.convert_ids_to_tokens([int(i) for i in allowed(own) if i < len(tokenizer)])
        name = max((name for name in names if left.startswith(name)), key=len, default=None)
        if name is None:
            return False
        own.accept(tokenizer.convert_tokens_to_ids(name))
        left = left[len(name) :]
    return own.error is None and (own.is_complete or tokenizer.eos_token_id in allowed(own))


def rule_chain(length):
    rules = [f'r{i}: "a" r{i + 1}' for i in range(length)]
    return "\n".join(["start: r0", *rules, f'r{length}: "b"', ""])


def ref_chain(length, wrap):
    defs = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return json.dumps({"$defs": {**defs, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"})


WRAPS = {
    "ref": lambda ref: ref,
    "items": lambda ref: {"type": "array", "items": ref},
    "anyOf": lambda ref: {"anyOf": [ref, {"type": "null"}]},
    "allOf": lambda ref: {"allOf": [ref, {"type": "integer"}]},
    "properties": lambda ref: {"type": "object", "properties": {"a": ref}, "required": ["a"]},
}


@pytest.mark.parametrize("name", WRAPS)
def test_a_chain_of_1000_references_is_served_or_refused(grammars, name):
    try:
        grammars.compile(json=ref_chain(1000, WRAPS[name]))
    except ValueError as error:
        assert name == "anyOf" and "structured_outputs" in str(error)


def test_a_chain_of_5000_rules_is_served_and_one_of_60000_is_refused(grammars, hurried, tokenizer):
    assert follows(grammars.compile(grammar=rule_chain(50)), tokenizer, "a" * 50 + "b")
    served = grammars.compile(grammar=rule_chain(5000))
    with pytest.raises(ValueError, match="structured_outputs cannot be compiled: it took "):
        hurried.compile(grammar=rule_chain(60_000))
    assert len(allowed(served)) and follows(hurried.compile(regex="ok"), tokenizer, "ok")


def test_a_deep_grammar_can_be_followed_on_a_small_stack(grammars):
    deep = [grammars.compile(grammar=rule_chain(5000)), grammars.compile(json=ref_chain(1000, WRAPS["properties"]))]

    def use():
        while deep:
            mine = deep.pop().copy()
            for _ in range(5):
                mine.accept(int(allowed(mine)[-1]))
            assert mine.error is None

    before = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=use)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert not deep


def test_a_schema_that_would_compile_for_minutes_is_refused(hurried, tokenizer):
    patterns = [{"pattern": f"^(.*a.{{{i}}})*$"} for i in range(1, 30)]
    with pytest.raises(ValueError, match="structured_outputs cannot be compiled: it took "):
        hurried.compile(json=json.dumps({"type": "string", "allOf": patterns}))
    assert follows(hurried.compile(regex="ok"), tokenizer, "ok")


LONG = "hello world " * 8000


@pytest.mark.parametrize(
    "what",
    [
        dict(regex="(a|b)x{1000000}"),
        dict(regex="((((a{100}){100}){100}){100})"),
        dict(choice=["a" + LONG, "b" + LONG]),
        dict(json=json.dumps({"type": "object", "properties": {"x": {"const": LONG}}, "required": ["x"]})),
        dict(grammar=f'%llguidance {{"no_forcing": false}}\nstart: ("a" | "b") "{LONG}"'),
    ],
    ids=["repeat", "nested", "choice", "json", "grammar"],
)
def test_a_long_forced_text_costs_a_step_little(grammars, what):
    token_filter, rng = grammars.compile(**what), random.Random(0)
    begin = time.thread_time()
    for _ in range(50):
        token_filter.accept(int(rng.choice(allowed(token_filter))))
    assert time.thread_time() - begin < 0.25  # 0.01 s, but a second or more where the text is tokenized
    assert token_filter.error is None and not token_filter.is_complete


@pytest.mark.parametrize("rule", ["s s | x", "s s | x | s s s"])
def test_an_ambiguous_grammar_ends_before_it_costs_a_step_much(grammars, rule):
    seq = Sequence([1], SamplingParams(max_tokens=100))
    seq.token_filter = grammars.compile(grammar=f"start: s\ns: {rule}\nx: /[a-z ]/\n")
    scheduler, times = Scheduler(1, 16, BlockManager(32, 16)), []
    scheduler.add(seq)
    while not seq.finish_reason:
        begin = time.thread_time()
        step = scheduler.schedule()
        ((_, mask),) = step.batch.masks
        token_id = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[-1]
        scheduler.update(step, StepOutput([(int(token_id),)]))
        times.append(time.thread_time() - begin)
    assert max(times) < 0.3 and seq.finish_reason == "abort"
    assert "took over 20 ms" in seq.stop_reason or "Too many items" in seq.stop_reason


def test_errors_are_short(grammars):
    for what in (
        dict(regex="(" * 500_000),
        dict(grammar="start: " + "x" * 500_000),
        dict(json='{"enum": ' + "[" * 900),
    ):
        with pytest.raises(ValueError, match="structured_outputs") as caught:
            grammars.compile(**what)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("text", ["<think>ab</think>", "x<think>", "<|im|>", "a<|im|>b"])
def test_texts_with_names_of_added_tokens_can_be_written(grammars, tokenizer, text):
    for what in (dict(choice=[text]), dict(json=json.dumps({"const": text})), dict(grammar=f'start: "{text}"')):
        for seed in range(3):
            written, is_complete = walk(grammars.compile(**what), tokenizer, seed)
            assert is_complete and written == (json.dumps(text) if "json" in what else text)


def test_added_tokens_are_sampled_where_their_text_may_follow_and_special_ones_are_not(grammars, tokenizer):
    think, im = tokenizer.convert_tokens_to_ids(["<think>", "<|im|>"])
    either = allowed(grammars.compile(regex=r"<think>a|<\|im\|>b|c"))
    assert think in either and im not in either


def test_temperature_of_a_lark_rule_is_refused(grammars):
    with pytest.raises(ValueError, match=r"a rule cannot have a temperature, got 'x\[temperature='"):
        grammars.compile(grammar='start: x\nx[temperature=5]: "a"\n')


def test_tokens_are_named_in_lark_grammars(grammars, tokenizer):
    think, im = tokenizer.convert_tokens_to_ids(["<think>", "<|im|>"])
    token_filter = grammars.compile(grammar='start: <think> "<think>" <|im|> /[\\/<]think>/ // <think>\n')
    for token_id, others in ((think, []), (think, ["<"]), (im, [])):
        assert {token_id, *tokenizer.convert_tokens_to_ids(others)} == set(allowed(token_filter))
        token_filter.accept(token_id)
    assert follows(token_filter, tokenizer, "/think>")
    assert follows(grammars.compile(grammar='start: "a" # no <think>, and no %json {x}\n'), tokenizer, "a")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": False},
        {"type": "string", "format": "password", "maxLength": 5},
        {"type": "string", "format": "int64", "maxLength": 5},
        {"type": "object", "properties": {"uniqueItems": {"const": False}}, "additionalProperties": False},
        {"type": "object", "properties": {"ab": {"type": "integer"}}, "patternProperties": {"^a": {"type": "integer"}}},
        {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "patternProperties": {"^S_": {"type": "string"}, "^I_": {"type": "integer"}},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"n": {"type": "integer", "multipleOf": 5}, "ok": {"type": "boolean"}},
            "patternProperties": {"^n$": {"maximum": 20}},
            "required": ["n"],
            "additionalProperties": False,
        },
    ],
)
def test_what_is_accepted_is_followed(grammars, tokenizer, schema):
    token_filter, complete = grammars.compile(json=json.dumps(schema)), 0
    for seed in range(12):
        text, is_complete = walk(token_filter.copy(), tokenizer, seed)
        if is_complete:
            jsonschema.validate(json.loads(text), schema)
        complete += is_complete
    assert complete > 2


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "integer", "maximum": 2**63 - 1}, 2**63 - 1, 2**63),
        ({"type": "integer", "minimum": -(2**62)}, -(2**62), -(2**62) - 1),
        ({"type": "integer", "minimum": 2.5, "maximum": 7}, 3, 2),
        ({"type": "integer", "maximum": 2**64}, 2**62, 2**64 + 1),
        ({"type": "integer", "minimum": -(2**63)}, -(2**63) + 1024, -(2**63) - 1),
        ({"enum": [2**63 - 1, -5]}, 2**63 - 1, 2**63),
    ],
)
def test_bounds_of_integers_are_obeyed(grammars, tokenizer, schema, inside, outside):
    token_filter = grammars.compile(json=json.dumps(schema))
    assert follows(token_filter, tokenizer, str(inside)) and not follows(token_filter, tokenizer, str(outside))


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"exclusiveMinimum": 0}, ["0.1", "1"], ["0", "0.0", "-1"]),
        ({"exclusiveMinimum": 0, "maximum": 1}, ["0.1", "1"], ["0", "0.0", "1.1"]),
        ({"exclusiveMinimum": 0.5, "exclusiveMaximum": 0.6}, ["0.55"], ["0.5", "0.50", "0.6"]),
        ({"minimum": -1, "exclusiveMaximum": 0}, ["-1", "-0.5"], ["0", "-0", "-0.0"]),
        ({"minimum": 0, "exclusiveMaximum": 0.3}, ["0", "0.2"], ["0.3", "0.30"]),
        ({"minimum": 1.5, "exclusiveMaximum": 3}, ["1.5", "2.9"], ["3", "3.0", "1.4"]),
    ],
)
def test_exclusive_bounds_of_numbers_are_obeyed(grammars, tokenizer, schema, inside, outside):
    token_filter = grammars.compile(json=json.dumps({"type": "number"} | schema))
    assert all(follows(token_filter, tokenizer, text) for text in inside)
    assert not any(follows(token_filter, tokenizer, text) for text in outside)


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"type": "integer", "minimum": 2**63}, "minimum"),
        ({"type": "integer", "minimum": 2**63, "maximum": 2**63 + 10}, "minimum"),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum"),
        ({"type": "integer", "exclusiveMaximum": -(2**70)}, "exclusiveMaximum"),
        ({"type": "array", "items": {"const": 10**30}}, "const"),
        ({"enum": [{"a": [2**63]}]}, "enum"),
        ({"const": -(2**63)}, "const"),
        ({"const": 1e20, "type": "integer"}, "const"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.3}, "exclusiveMinimum"),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, "exclusiveMinimum"),
        ({"minimum": -0.9, "exclusiveMaximum": 0}, "exclusiveMaximum"),
        ({"type": "number", "exclusiveMinimum": 0.0, "allOf": [{"maximum": 0.5}]}, "exclusiveMinimum"),
        ({"allOf": [{"exclusiveMaximum": -1}, {"minimum": -1.5}]}, "exclusiveMaximum"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "patternProperties": {"^a": {}}, "required": ["a"], "minProperties": 3}, "minProperties"),
        ({"type": "object", "patternProperties": {'^[^"]$': {}}}, "patternProperties"),
        ({"type": "string", "pattern": "^[]a]$"}, "pattern"),
        ({"type": "string", "pattern": "(?x)a # ["}, "pattern"),
        ({"type": "string", "format": "nonsense"}, "nonsense"),
    ],
)
def test_what_would_not_be_obeyed_is_refused(grammars, schema, names):
    with pytest.raises(ValueError, match=f"structured_outputs.*{names}"):
        grammars.compile(json=json.dumps(schema))


@pytest.mark.parametrize(
    ("expression", "inside", "outside"),
    [
        (r"\d", "7", "٣"),
        (r"\w", "a", "é"),
        (r"[\s]", " ", "\u00a0"),
        (r"\D", "٣", "7"),
        (r"[^\w]", "é", "a"),
        (r"\\d", r"\d", "7"),
        (r"\p{L}/", "é/", "7/"),
    ],
)
def test_classes_of_a_regular_expression_are_ascii(grammars, tokenizer, expression, inside, outside):
    token_filter = grammars.compile(regex=expression)
    assert follows(token_filter, tokenizer, inside) and not follows(token_filter, tokenizer, outside)


@pytest.mark.parametrize("mark", ["", "?", "!"])
def test_notation_of_a_grammar_is_recognised_by_its_rules(grammars, tokenizer, mark):
    found = grammars.compile(grammar=f'\n{mark}start : sum\n?sum: NUMBER | sum "+" NUMBER\n%import common.NUMBER\n')
    assert follows(found, tokenizer, "1+2") and not follows(found, tokenizer, "1-")
    found = grammars.compile(grammar='root ::= begin "b"\nbegin ::= "start: a" # start: c')
    assert follows(found, tokenizer, "start: ab")
    found = grammars.compile(grammar='root ::= a |\n  start ":" a\nstart ::= "s"\na ::= "x"')
    assert follows(found, tokenizer, "s:x")
    found = grammars.compile(grammar='// root ::= "b"\nstart: "a ::= " /c/')
    assert follows(found, tokenizer, "a ::= c")


def test_classes_of_a_pattern_are_those_of_javascript(grammars, tokenizer):
    token_filter = grammars.compile(json=json.dumps({"type": "string", "pattern": r"^\d\w\s$"}))
    assert follows(token_filter, tokenizer, '"7a\u00a0"')
    assert not follows(token_filter, tokenizer, '"٣a "') and not follows(token_filter, tokenizer, '"7é "')


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ('^[^"]*$', ["", "a\n\x01", "\\/"], ['"', 'a"']),
        (r"^[^/\\]+$", ['"', "\t"], ["\\", "/"]),
        (r"^[^\x22\u005c]{2}$", ["ab", "\x1f\x01"], ['a"', "\\b"]),
        (r'^(?:[^\s"]|\s)$', [" ", "\\", "a"], ['"']),
        (r"^(?:[\x00-\x0f]|[^\x00-\x0f\\])$", ["\x01", '"'], ["\\"]),
        (r"^(?:\x00|[\u0001-\u001f])$", ["\x01", "\n"], ['"', "\\"]),
        (r"^[^\p{L}\"]$", ["1", "\\"], ['"', "a"]),
        (r"^[\x00-\x7f]$", ['"', "\\", "\x00"], ["é"]),
        (r"^\W.\S$", ['"\\"', "\x00\x00\x00"], ["a\n "]),
        (r"^[[a&&b~~\]]+$", ["[a&b~]"], ["c"]),
        (r"^\s\S[^\s]$", ["\ufeff\x85\x85"], ["\x85aa", "a\ufeffa", "  a", "aa\ufeff"]),
    ],
)
def test_characters_that_a_pattern_excludes_are_not_written(grammars, tokenizer, pattern, inside, outside):
    found = grammars.compile(json=json.dumps({"type": "string", "pattern": pattern}))
    texts = [json.dumps(text, ensure_ascii=False) for text in (*inside, *outside)]
    assert [follows(found, tokenizer, text) for text in texts] == [True] * len(inside) + [False] * len(outside)
    if "\0" not in "".join(inside):
        schema = {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
        found = grammars.compile(json=json.dumps(schema))
        assert [text for text in texts if follows(found, tokenizer, f"{{{text}: 1}}")] == texts[: len(inside)]


def random_pattern(rng, depth=3):
    """A pattern that means the same in JavaScript and, with ASCII classes, in Python."""
    kind = rng.randrange(4 if depth else 2)
    if kind == 0:
        return rng.choice(["a", '"', r"\\", ".", r"\W", r"\D", r"\w", r"\n", r"\x01", "é"])
    if kind == 1:
        parts = ["a", '"', r"\\", "/", r"\n", r"\x22", r"\u005c", "é", "b-d", "!-~", r"\W", r"\x00-\x1f", r"\x01"]
        return f"[{rng.choice(['', '^'])}{''.join(rng.choices(parts, k=rng.randint(1, 4)))}]"
    first, second = random_pattern(rng, depth - 1), random_pattern(rng, depth - 1)
    if kind == 2:
        return f"({first}|{second})" if rng.random() < 0.5 else first + second
    return f"(?:{first}){rng.choice(['*', '+', '?', '{2}', '{1,3}'])}"


def test_random_patterns_are_followed(grammars, tokenizer):
    rng, complete, marks = random.Random(5), 0, 0
    for _ in range(60):
        pattern = rng.choice(["^", "^", ""]) + random_pattern(rng) + rng.choice(["$", "$", ""])
        try:
            found = grammars.compile(json=json.dumps({"type": "string", "pattern": pattern}))
        except ValueError as error:
            assert "Regex is empty" in str(error)
            continue
        for seed in range(4):
            text, is_complete = walk(found.copy(), tokenizer, seed, 30, ('"', "\\"))
            if is_complete and "�" not in text:  # which is part of a character
                value = json.loads(text)
                assert re.search(re.sub(r"\$$", r"\\Z", pattern), value, re.ASCII), (pattern, value)
                complete, marks = complete + 1, marks + ('"' in value or "\\" in value)
    assert complete > 100 and marks > 10


@pytest.mark.parametrize("format", ["date", "date-time"])
def test_only_days_that_exist_are_written(grammars, tokenizer, format):
    found = grammars.compile(json=json.dumps({"type": ["string", "null"], "format": format}))
    days = ["2024-02-29", "2000-02-29", "2023-02-28", "2023-12-31", "2023-02-29", "1900-02-29", "2023-04-31"]
    end = "" if format == "date" else "T23:59:60Z"
    assert [day for day in days if follows(found, tokenizer, f'"{day}{end}"')] == days[:4]


def test_properties_are_counted_where_no_name_can_be_repeated(grammars, tokenizer):
    found = grammars.compile(json=json.dumps({"type": "object", "required": ["a"], "minProperties": 2}))
    texts = ['{"a": 1, "b": 2}', '{"a": 1, "b": 2, "b": 3}', '{"a": 1}', '{"a": 1, "a": 2}']
    assert [text for text in texts if follows(found, tokenizer, text)] == texts[:2]


def test_an_engine_gives_back_its_child_processes(tokenizer, tmp_path):
    path = save_tiny(tmp_path, "qwen3", vocab_size=VOCAB, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    with engine(path) as llm:
        params = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(choice=["<think>ok</think>"]))
        assert llm.generate(["Hi"], params, use_tqdm=False)[0].text == "<think>ok</think>"
        (child,) = llm.llm_engine.input_processor.grammars._pool._idle
        child.process.kill()  # as the kernel may, short of memory
        assert llm.generate(["Hi"], params, use_tqdm=False)[0].text == "<think>ok</think>"
        (child,) = llm.llm_engine.input_processor.grammars._pool._idle
        assert child.process.poll() is None
        with pytest.raises(ValueError, match=r"prompt has 1000000000000 tokens"):
            llm.add_request(range(10**12))
        assert len(tokens(llm, ["Hi"], greedy(3))[0]) == 3
    assert child.process.poll() is not None
