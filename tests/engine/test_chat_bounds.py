"""Texts and chat templates that would take too long or too much memory are refused, and nothing else is affected."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from nanovllm import LLM
from nanovllm.checkpoints.tokenizers import get_tokenizer
from nanovllm.engine.text_codec import TextCodec
from tests.models.tiny import save_tiny

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=8)
MESSAGES = [{"role": "user", "content": "Hello"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from nanovllm.checkpoints.model_source import open_model

    tokenizer = open_model(None).tokenizer()
    path = save_tiny(tmp_path_factory.mktemp("speaking"), "qwen3", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    with LLM(path, **OPTIONS) as llm:
        llm.llm_engine.input_processor.chats.templates.cpu_seconds = 1
        yield llm


def test_a_long_text_is_refused_after_a_part_of_it_is_tokenized(llm, monkeypatch):
    codec = llm.llm_engine.input_processor.codec
    lengths, encode = [], codec.encode
    monkeypatch.setattr(codec, "encode", lambda text, *args: lengths.append(len(text)) or encode(text, *args))
    monkeypatch.setattr(codec, "max_model_len", 8192)
    text = "many words " * 180_000
    for refused in (
        lambda: llm.add_request(text),
        lambda: llm.chat_prompts([{"role": "user", "content": text}], chat_template=PLAIN),
        lambda: llm.chat_prompts(MESSAGES, chat_template="{{ 'many words ' * 180000 }}"),
    ):
        lengths.clear()
        with pytest.raises(
            ValueError,
            match=r"(prompt|messages): \d+ characters are more than .* tokens, too many for max_model_len=8192",
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
    monkeypatch.delattr(llm.llm_engine.input_processor.chats, "templates")
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
        # Few steps: doubling would touch all of the limit, which may take longer than a slow machine's CPU limit.
        ("{% set n = namespace(x='xy') %}{% for i in range(9) %}{% set n.x = n.x * 64 %}{% endfor %}", "memory"),
        ("{{ 'x' * 200000 }}", "200000 characters, and at most 131072"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for", "tag name|unexpected|Unexpected|end of template"),
    ],
)  # fmt: skip
def test_a_template_of_too_much_work_is_refused_alone(llm, template, reason):
    with pytest.raises(ValueError, match=f"messages do not fit the model's chat template: .*({reason})"):
        llm.chat_prompts(MESSAGES, chat_template=template)
    assert llm.tokenizer.decode(llm.chat_prompts(MESSAGES, chat_template=PLAIN)[0]) == "Hello"


# -- threads ----------------------------------------------------------------------------------------------------------


def codec_of(load):
    source = SimpleNamespace(config=SimpleNamespace(vocab_size=3), has_tokenizer=True, tokenizer=load)
    return TextCodec(source, 128)


def test_threads_that_need_the_tokenizer_at_once_load_it_once():
    loads, second = [], threading.Event()

    def load():
        loads.append(None)
        second.wait(0.2)  # a second thread may load it meanwhile
        return SimpleNamespace(encode=lambda *args, **kwargs: [])

    codec = codec_of(load)
    with ThreadPoolExecutor(4) as threads:
        tokenizers = list(threads.map(lambda _: codec.tokenizer, range(4)))
    assert len(loads) == 1 and len({id(tokenizer) for tokenizer in tokenizers}) == 1


def test_encoding_changes_nothing_that_other_threads_use(tmp_path):
    """transformers turns off a tokenizer's truncation when it encodes; that fails while another thread encodes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    vocabulary.enable_truncation(4)
    vocabulary.enable_padding()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).truncation
    backend = get_tokenizer(tmp_path).backend_tokenizer
    assert backend.truncation is None and backend.padding is None
