"""Texts and chat templates that would take too long or too much memory are refused, and nothing else is affected."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine import template_renderer
from nanovllm.engine.input_processor import InputProcessor
from tests.models.tiny import save_tiny

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=8)
MESSAGES = [{"role": "user", "content": "Hello"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from nanovllm.checkpoints.hub import open_model

    tokenizer = open_model(None).tokenizer()
    path = save_tiny(tmp_path_factory.mktemp("speaking"), "qwen3", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    with LLM(path, **OPTIONS) as llm:
        yield llm


def test_a_long_text_is_refused_after_a_part_of_it_is_tokenised(llm, monkeypatch):
    lengths, encode = [], llm.tokenizer.encode
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **kwargs: lengths.append(len(text)) or encode(text))
    monkeypatch.setattr(llm.llm_engine.input_processor, "max_model_len", 8192)
    text = "many words " * 180_000
    for refused in (
        lambda: llm.add_request(text),
        lambda: llm.chat_prompts([{"role": "user", "content": text}], chat_template=PLAIN),
        lambda: llm.chat_prompts(MESSAGES, chat_template="{{ 'many words ' * 180000 }}"),
    ):
        lengths.clear()
        with pytest.raises(
            ValueError, match=r"(prompt|messages) are more than .* tokens, too many for max_model_len=8192"
        ):
            refused()
        assert 0 < sum(lengths) < len(text) // 5


def test_a_text_of_few_long_tokens_is_served(llm):
    text = " " * 1100
    assert len(text) > 8 * 128
    ids = llm.tokenizer.encode(text)
    assert len(ids) < 128
    assert llm.chat_prompts([{"role": "user", "content": text}], chat_template=PLAIN) == [ids]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x" * (1 << 18)}],
        [{"role": "user", "content": "x"}] * 3000,
        [{"role": "user", "content": [["x"] * 3000]}],
        [{"role": "user", "tool_calls": {str(i): i for i in range(3000)}}],
    ],
    ids=["long", "messages", "list", "dict"],
)
def test_too_large_messages_are_refused_before_they_are_rendered(llm, monkeypatch, messages):
    monkeypatch.delattr(llm.llm_engine.input_processor, "renderer")
    with pytest.raises(ValueError, match=r"messages.*too many for max_model_len=128"):
        llm.chat_prompts(messages, chat_template=PLAIN)


@pytest.mark.parametrize("data", ["loop", "deep", "object"])
def test_messages_that_are_no_plain_data_are_refused(llm, data):
    value = []
    if data == "loop":
        value.append(value)
    elif data == "deep":
        for _ in range(1500):
            value = [value]
    else:
        value = object()
    with pytest.raises((TypeError, ValueError), match="messages"):
        llm.chat_prompts([{"role": "user", "content": value}], chat_template=PLAIN)
    with pytest.raises(ValueError, match="messages"):
        llm.chat_prompts([{"role": "user", "content": "x", "name": value}], chat_template=PLAIN)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 s of CPU time"),
        ("{{ 'x' * 10 ** 11 }}", "too much memory"),
        ("{% set n = namespace(x='xy') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "memory"),
        ("{{ 'x' * 200000 }}", "200000 characters, and at most 131072"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for", "tag name|unexpected|Unexpected|end of template"),
    ],
)  # fmt: skip
def test_a_template_of_too_much_work_is_refused_alone(llm, monkeypatch, template, reason):
    monkeypatch.setattr(template_renderer, "CPU_SECONDS", 1)
    with pytest.raises(ValueError, match=f"messages do not fit the model's chat template: .*({reason})"):
        llm.chat_prompts(MESSAGES, chat_template=template)
    assert llm.tokenizer.decode(llm.chat_prompts(MESSAGES, chat_template=PLAIN)[0]) == "Hello"


def test_each_thread_renders_in_a_process_of_its_own_and_close_ends_them(llm):
    renderer = template_renderer.TemplateRenderer()
    endless = {"conversation": MESSAGES, "chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}"}
    endless["chat_template"] += "{% endfor %}{% endfor %}"
    errors = []

    def render(renderer):
        try:
            renderer.render(endless, 1000)
        except ValueError as error:
            errors.append(str(error))

    renderer.render({"conversation": MESSAGES, "chat_template": PLAIN}, 1000)
    (first,) = renderer._children
    thread = threading.Thread(target=render, args=(renderer,))
    thread.start()
    while renderer._idle:  # until the thread has taken it
        pass
    assert renderer.render({"conversation": MESSAGES, "chat_template": PLAIN}, 1000) == "Hello"
    (second,) = renderer._children - {first}
    renderer.close()
    thread.join()
    assert len(errors) == 1
    for child in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(child.process.pid, 0)
    assert renderer.render({"conversation": MESSAGES, "chat_template": PLAIN}, 1000) == "Hello"
    (third,) = renderer._children
    third.process.kill()  # as the system does where memory is short
    third.process.wait()
    assert renderer.render({"conversation": MESSAGES, "chat_template": PLAIN}, 1000) == "Hello"
    del renderer
    assert third.process.poll() is not None


def test_an_interrupted_render_leaves_no_reply_for_the_next(llm, monkeypatch):
    renderer = template_renderer.TemplateRenderer()
    renderer.render({"conversation": MESSAGES, "chat_template": PLAIN}, 1000)
    (child,) = renderer._idle
    monkeypatch.setattr(type(child.channel), "recv_bytes", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        renderer.render({"conversation": MESSAGES, "chat_template": PLAIN}, 1000)
    monkeypatch.undo()
    assert child.process.poll() is not None
    assert renderer.render({"conversation": MESSAGES, "chat_template": "{{ 1 + 1 }}"}, 1000) == "2"
    renderer.close()


# -- threads ----------------------------------------------------------------------------------------------------------


def processor_of(load):
    source = SimpleNamespace(config=SimpleNamespace(vocab_size=3), has_tokenizer=True, tokenizer=load)
    return InputProcessor(Config(device="cpu"), source, 128, 128)


def test_threads_that_need_the_tokenizer_at_once_load_it_once():
    loads, second = [], threading.Event()

    def load():
        loads.append(None)
        second.wait(0.2)  # a second thread may load it meanwhile
        return SimpleNamespace(encode=lambda *args, **kwargs: [])

    processor = processor_of(load)
    with ThreadPoolExecutor(4) as threads:
        tokenizers = list(threads.map(lambda _: processor.tokenizer, range(4)))
    assert len(loads) == 1 and len({id(tokenizer) for tokenizer in tokenizers}) == 1


def test_encoding_changes_nothing_that_other_threads_use():
    """transformers turns off a tokenizer's truncation when it encodes; that fails while another thread encodes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    vocabulary.enable_truncation(4)
    vocabulary.enable_padding()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>")
    assert tokenizer.backend_tokenizer.truncation
    backend = processor_of(lambda: tokenizer).tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
