"""Conversations become prompts: what templates read, and the forms of contents and tool calls that they print."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nanovllm import SamplingParams, StructuredOutputsParams
from nanovllm.checkpoints.model_source import open_model
from nanovllm.config import Config
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.sandbox.pool import Pool
from tests.helpers import engine, greedy
from tests.models.tiny import save_tiny

USER = {"role": "user", "content": "Hello"}


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


POOL = Pool("templates", {}, "messages do not fit the model's chat template")  # starting its process takes a second


def processor(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    config = SimpleNamespace(vocab_size=len(tokenizer), eos_token_ids=(2,))
    source = SimpleNamespace(config=config, has_tokenizer=True, tokenizer=lambda: tokenizer)
    inputs = InputProcessor(Config(), source, max_model_len=1000)
    inputs.chats.templates = POOL
    return inputs


def prompt(template, messages, **options):
    """Return the text of one conversation's prompt."""
    inputs = processor(template)
    (token_ids,) = inputs.chats.prompt_ids(messages, **options)
    return inputs.codec.tokenizer.decode(token_ids)


# -- variables --------------------------------------------------------------------------------------------------------

THINKING = "{{ messages[0]['content'] }}{% if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}"


def test_chat_template_kwargs_reach_the_template(tmp_path):
    path = save_tiny(tmp_path, "llama", vocab_size=len(byte_tokenizer()), eos_token_id=2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(path)
    with engine(path) as llm:
        for options in ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}):
            out = llm.chat([USER], greedy(2), use_tqdm=False, **options)[0]
            assert llm.tokenizer.decode(out.prompt_token_ids) == out.prompt == "Hello<no>"
        for options in ({}, {"chat_template_kwargs": None}, {"chat_template_kwargs": {}}):
            assert llm.tokenizer.decode(llm.chat_prompts([USER], **options)[0]) == "Hello"
        with pytest.raises(TypeError, match="add_generation_promt"):
            llm.chat([USER], add_generation_promt=False)
        assert not llm.has_unfinished()


def test_chat_template_kwargs_come_before_arguments():
    template = "{{ a }}{{ b }}{% if add_generation_prompt %}<go>{% endif %}"
    assert prompt(template, [USER], a=1, b=2, chat_template_kwargs={"b": 3}) == "13<go>"
    assert prompt(template, [USER], chat_template_kwargs={"add_generation_prompt": False}) == ""


@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_promt": True},
        {"chat_template_kwargs": {"add_generation_promt": True}},
        {"documents": [{"text": "x"}]},
        {"truncation": True},
        {"messages_": []},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": [("enable_thinking", False)]},
        {"chat_template_kwargs": {5: 6}},
        {"chat_template_kwargs": {"messages": [USER]}},
        {"chat_template_kwargs": {"self": 1}},
        {"chat_template": 5},
        {"add_generation_prompt": "no"},
        {"add_generation_prompt": 0},
        {"continue_final_message": "no"},
        {"chat_template_kwargs": {"continue_final_message": 1}},
        {"tools": 5},
        {"tools": "search"},
        {"tools": {"name": "search"}},
        {"tools": ["search"]},
    ],
)
def test_options_that_a_template_does_not_read_are_refused(options):
    names = [str(name) for name in options.get("chat_template_kwargs", options)]
    with pytest.raises(TypeError, match="|".join(["chat_template_kwargs", *names])):
        processor(THINKING).chats.prompts([USER], **options)


def test_an_empty_template_is_refused():
    with pytest.raises(ValueError, match="chat_template must not be empty"):
        processor(THINKING).chats.prompts([USER], chat_template="")


def test_a_template_longer_than_any_real_one_is_refused():
    with pytest.raises(ValueError, match="chat_template must have at most 1048576 characters, got 2000000"):
        processor(THINKING).chats.prompts([USER], chat_template="x" * 2_000_000)


def test_a_closed_processor_starts_no_process():
    inputs = InputProcessor(Config(), processor(THINKING).source, max_model_len=1000)
    inputs.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        inputs.chats.prompts(5)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(RuntimeError, match="the engine is closed"):
        inputs.process("a", params)
    assert not inputs.chats.templates._children and not inputs.grammars._pool._children


def test_the_error_names_the_variable_and_those_there_are():
    with pytest.raises(TypeError, match=r"'enable_thinkin' is no variable .* are: enable_thinking$"):
        processor(THINKING).chats.prompts([USER], enable_thinkin=False)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro show(m) %}{{ m.content }}{{ wish }}{% endmacro %}{{ show(messages[0]) }}",
        "{% set wish = wish if wish is defined else 1 %}{{ messages[0].content }}{{ wish }}",
        "{% if wish is not defined %}{% set wish = 1 %}{% endif %}{{ messages[0].content }}{{ wish }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{{ wish }}{% endgeneration %}{% break %}{% endfor %}",
        "{% set s = namespace(w=wish) %}{{ strftime_now('') }}{{ messages[0].content }}{{ s.w }}",
    ],
)
def test_variables_are_found_wherever_a_template_reads_them(template):
    assert prompt(template, [USER], wish=7) == "Hello7"


def test_documents_and_special_tokens_are_variables_where_they_are_read():
    template = "{{ bos_token }}{% for d in documents %}{{ d.text }}{% endfor %}"
    assert prompt(template, [USER], documents=[{"text": "x"}], bos_token="[B]") == "[B]x"


def test_the_start_token_of_a_template_is_not_followed_by_the_tokenizers(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    path = save_tiny(tmp_path, "llama", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    with engine(path) as llm:
        outputs = llm.generate("Hello", greedy(1), use_tqdm=False) + llm.chat([USER], greedy(1), use_tqdm=False)
        for output in outputs:
            assert output.prompt_token_ids == [1, *llm.tokenizer.encode("Hello", add_special_tokens=False)]


def test_tools_that_a_template_does_not_read_are_refused():
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    with pytest.raises(ValueError, match="does not read them"):
        processor(THINKING).chats.prompts([USER], tools=tools)
    assert prompt(THINKING, [USER], tools=[]) == "Hello"
    named = {"default": THINKING, "tool_use": "{{ tools[0].function.name }}"}
    assert prompt(named, [USER], tools=tools) == "search"
    assert prompt(named, [USER], enable_thinking=False) == "Hello<no>"


def test_a_template_that_cannot_be_read_is_a_value_error():
    for template in ("{% if %}", {"a": "x", "b": "y"}):
        with pytest.raises(ValueError, match="template"):
            processor(template).chats.prompts([USER])


# -- contents ---------------------------------------------------------------------------------------------------------

TEXT_ONLY = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TRIMMED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim }}{% endfor %}"
EITHER = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ part.text }}|{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}|{% endfor %}{% endfor %}"
)
FIRST_PART = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0]['text'] }}{% endif %}{% endfor %}"
)
FIRST_PART_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}{% endfor %}"
BY_ROLE = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% if m.role == 'user' %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}{% else %}{{ '<' ~ m.content ~ '>' }}{% endif %}"
    "{% endfor %}"
)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "content", "want"),
    [
        (TEXT_ONLY, parts("a", "b"), "<user>a\nb"),
        (TEXT_ONLY, parts("a"), "<user>a"),
        (TEXT_ONLY, [], "<user>"),
        (TRIMMED, parts("a", "b"), "<user>a\nb"),
        (EITHER, parts("a", "b"), "<user>a|b|"),
        (EITHER, "a", "<user>a"),
        (PARTS_ONLY, parts("a", "b"), "<user>a|b|"),
        (PARTS_ONLY, "a", "<user>a|"),
        (FIRST_PART, parts("a", "b"), "<user>a\nb"),
        (FIRST_PART_ONLY, parts("a", "b"), "<user>a\nb"),
        (FIRST_PART_ONLY, "a", "<user>a"),
        (BY_ROLE, parts("a", "b"), "a|b|"),
    ],
)
def test_text_parts_are_given_as_the_template_expects_them(template, content, want):
    assert prompt(template, [{"role": "user", "content": content}]) == want


def test_the_form_may_differ_by_role():
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": parts("a", "b")} for role in roles]
    assert prompt(BY_ROLE, messages) == "a\nba|b|<a\nb>a|b|"
    assert messages == [{"role": role, "content": parts("a", "b")} for role in roles]  # the caller's are left alone


def test_many_roles_cost_no_more_requests_than_one(monkeypatch):
    asked = []
    monkeypatch.setattr(POOL, "ask", lambda request: asked.append(request) or Pool.ask(POOL, request))
    messages = [{"role": f"r{i}", "content": parts("a")} for i in range(200)]
    assert prompt(TEXT_ONLY, messages) == "".join(f"<r{i}>a" for i in range(200))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], ValueError, "image_url"),
        ([*parts("a"), {"type": "input_audio"}], ValueError, r"messages\[0\]\['content'\]\[1\].*input_audio"),
        (["a"], ValueError, "str"),
        ([{"text": "a"}], ValueError, "None"),
        (parts(None), TypeError, "NoneType"),
        (None, TypeError, r"messages\[0\]\['content'\].*NoneType"),
        ({"type": "text", "text": "a"}, TypeError, "dict"),
        (object(), TypeError, "object"),
        (5, TypeError, "int"),
        (b"a", TypeError, "bytes"),
    ],
)
@pytest.mark.parametrize("template", [TEXT_ONLY, PARTS_ONLY])
def test_contents_that_are_no_text_are_refused(template, content, error, match):
    with pytest.raises(error, match=match):
        processor(template).chats.prompts([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "messages", [[[]], [], [{"role": None, "content": "x"}], [{"role": 5, "content": "x"}], "Hello"]
)
def test_messages_without_roles_are_refused(messages):
    with pytest.raises(TypeError, match="messages"):
        processor(TEXT_ONLY).chats.prompts(messages)


# -- tool calls -------------------------------------------------------------------------------------------------------

AS_JSON = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}'
)
AS_TEXT = AS_JSON.replace(" | tojson", "")
AS_EITHER = AS_JSON.replace("c.function.arguments | tojson", "A if A is string else A | tojson").replace(
    "A", "c.function.arguments"
)
AS_ITEMS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% for name, value in c.function.arguments | items %}[{{ name }}={{ value }}]{% endfor %}{% endfor %}{% endfor %}"
)


def calling(arguments, content=None):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [USER, {"role": "assistant", "content": content, "tool_calls": [call]}]


@pytest.mark.parametrize("arguments", ['{"a": "é", "b": [1]}', {"a": "é", "b": [1]}])
@pytest.mark.parametrize("template", [AS_JSON, AS_TEXT, AS_EITHER])
def test_arguments_of_tool_calls_are_encoded_once(template, arguments):
    messages = calling(arguments)
    assert prompt(template, messages) == 'Hello{"name": "add", "arguments": {"a": "é", "b": [1]}}'
    assert messages == calling(arguments)


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_that_a_template_spells_out_are_objects(arguments):
    assert prompt(AS_ITEMS, calling(arguments)) == "Hello[a=1]"
    assert prompt(AS_ITEMS, calling("")) == "Hello"


@pytest.mark.parametrize("arguments", ["{", "5", '"a"', "[" * 5000])
def test_arguments_that_are_no_json_object_are_shown_as_the_model_wrote_them(arguments):
    for template in (AS_TEXT, AS_EITHER):
        assert prompt(template, calling(arguments)) == f'Hello{{"name": "add", "arguments": {arguments}}}'
    assert json.loads(prompt(AS_JSON, calling(arguments)).removeprefix("Hello"))["arguments"] == {
        "INVALID_JSON": arguments
    }
    assert prompt(AS_ITEMS, calling(arguments)) == f"Hello[INVALID_JSON={arguments}]"


@pytest.mark.parametrize("calls", ["x", [5], [{"function": 5}], np.array([1, 2]), torch.tensor([1, 2])])
def test_tool_calls_of_another_form_are_refused(calls):
    with pytest.raises(TypeError, match="tool_calls"):
        processor(AS_JSON).chats.prompts([USER, {"role": "assistant", "content": None, "tool_calls": calls}])


SHORT_IDS = (
    "{% macro nine(id) %}{% if id | length != 9 %}{{ raise_exception('not nine') }}{% endif %}{{ id }}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'tool' %}({{ nine(m.tool_call_id) }}={{ m.content }})"
    "{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}[{{ nine(c.id) }}]{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("call_id", ["call_8d1cbb6f35a84d1f8c3e5b0a", "toolu_1", "-" * 9, ""])
def test_ids_of_tool_calls_become_short_for_templates_that_refuse_long_ones(call_id):
    messages = calling({}, "")
    messages[1]["tool_calls"][0]["id"] = call_id
    messages.append({"role": "tool", "tool_call_id": call_id, "content": "5"})
    found = re.fullmatch(r"Hello\[([a-z0-9]{9})\]\(([a-z0-9]{9})=5\)", prompt(SHORT_IDS, messages))
    assert found and found[1] == found[2]
    assert messages[2]["tool_call_id"] == call_id  # the caller's are left alone
    assert call_id in prompt("{% for m in messages %}{{ m.tool_call_id }}{{ m.content }}{% endfor %}", messages)


def test_short_ids_of_tool_calls_are_kept():
    assert prompt(SHORT_IDS, calling({}, "")) == "Hello[abcdefghi]"


def test_messages_of_more_entries_than_a_length_can_say_are_refused():
    for messages in (range(10**30), [range(10**30)]):
        with pytest.raises(TypeError, match="messages must be a list of dicts"):
            processor(AS_JSON).chats.prompts(messages)


def test_content_may_be_missing_beside_tool_calls():
    without = calling({})
    del without[1]["content"]
    for messages in (without, calling({}), calling({}, "")):
        assert prompt(AS_JSON, messages) == 'Hello{"name": "add", "arguments": {}}'


@pytest.mark.parametrize("template", [AS_TEXT, AS_JSON, AS_EITHER])
@pytest.mark.parametrize("function", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}])
def test_call_without_arguments_has_an_empty_object(template, function):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", **function}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert prompt(template, messages) == 'Hello{"name": "add", "arguments": {}}'


@pytest.mark.parametrize("calls", [None, []])
def test_answer_with_null_or_no_tool_calls_is_one_without_the_key(calls):
    """Like an OpenAI client's `message.model_dump()`. Templates such as Llama 3.1's ask for the key alone."""
    calls_of_m = "{% if 'tool_calls' in m %}{{ m.tool_calls | length }} calls{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + calls_of_m + "{% endfor %}"
    assert prompt(template, [USER, {"role": "assistant", "content": "Hi", "tool_calls": calls}]) == "HelloHi"


def test_the_default_model_s_template_takes_parts():
    inputs = InputProcessor(Config(), open_model(None), max_model_len=1000)
    assert inputs.chats.prompts([{"role": "user", "content": parts("Hello")}]) == inputs.chats.prompts([USER])
    with pytest.raises(TypeError, match="enable_thinking"):
        inputs.chats.prompts([USER], enable_thinking=False)
