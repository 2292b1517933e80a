"""Prompts and outputs as text, end to end: tokenizers that lose spaces, split characters, or fail."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm import SamplingParams, StructuredOutputsParams
from tests.helpers import engine
from tests.models.tiny import save_tiny, save_tiny_with_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def save_with_tokenizer(folder, backend, family="llama"):
    path = save_tiny(folder, family, vocab_size=backend.get_vocab_size(), eos_token_id=2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(path)
    return path


def sentencepiece_like():
    names = ["<unk>", "<s>", "</s>", *BYTES, "▁yes", "▁no", "▁", *"yesno", "▁say", "."]
    names = list(dict.fromkeys(names))
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("▁", "n"), ("▁n", "o")]
    names += [name for name in ("▁y", "▁ye", "▁n") if name not in names]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A model whose tokenizer's decoder removes the first space of a text."""
    return save_with_tokenizer(tmp_path_factory.mktemp("spaced"), sentencepiece_like())


def params(**options):
    return SamplingParams(**{"temperature": 1.0, "seed": 1, "max_tokens": 12, **options})


def joined(llm, prompt, sampling):
    return "".join(sample.text for out in llm.stream(prompt, sampling) for sample in out.outputs)


def test_a_choice_keeps_the_space_that_it_starts_with(spaced):
    with engine(spaced) as llm:
        for structured in (
            StructuredOutputsParams(choice=[" yes", " no"]),
            StructuredOutputsParams(regex=" (yes|no)"),
        ):
            for seed in range(3):
                sampling = params(seed=seed, structured_outputs=structured)
                out = llm.generate(["say"], sampling, use_tqdm=False)[0]
                assert out.text in (" yes", " no") and out.finish_reason == "stop"
                assert joined(llm, "say", sampling) == out.text


def test_a_stop_string_with_a_space_fires_at_its_token(spaced):
    with engine(spaced) as llm:
        yes = llm.tokenizer.convert_tokens_to_ids("▁yes")
        sampling = params(allowed_token_ids=[yes], stop=[" yes"])
        out = llm.generate(["say"], sampling, use_tqdm=False)[0]
        assert (out.token_ids, out.text, out.stop_reason) == ([yes], "", " yes")
        free = llm.generate(["say"], params(allowed_token_ids=[yes], max_tokens=2), use_tqdm=False)[0]
        assert free.text == " yes yes"


def test_characters_cut_by_max_tokens_are_the_same_in_a_stream_and_the_whole(spaced):
    text = "é日🎉"
    with engine(spaced) as llm:
        ids = [llm.tokenizer.convert_tokens_to_ids(BYTES[byte]) for byte in text.encode()]
        for seed in range(6):  # bytes in any order
            sampling = params(seed=seed, allowed_token_ids=ids)
            assert joined(llm, "say", sampling) == llm.generate(["say"], sampling, use_tqdm=False)[0].text
        grammar = StructuredOutputsParams(regex="".join(rf"\x{{{ord(c):x}}}" for c in text))
        for max_tokens in range(1, 10):
            sampling = params(structured_outputs=grammar, max_tokens=max_tokens)
            out = llm.generate(["say"], sampling, use_tqdm=False)[0]
            so_far = text.encode()[:max_tokens].decode(errors="replace")
            assert out.text == joined(llm, "say", sampling) == so_far


def test_aborted_output_is_what_the_stream_gave(spaced):
    with engine(spaced) as llm:
        ids = [llm.tokenizer.convert_tokens_to_ids(BYTES[byte]) for byte in "🎉".encode()[:2]]
        llm.add_request("say", params(allowed_token_ids=ids, max_tokens=60), "whole")
        for _ in range(6):
            llm.step()
        out = llm.abort("whole")
        assert out.token_ids and set(out.text) == {"\ufffd"}


def test_a_panic_of_the_tokenizer_refuses_its_prompt_alone(tmp_path):
    """A pattern that backtracks too often panics, which is no Exception."""
    backend = Tokenizer(models.BPE({"<unk>": 0, "b": 1, "</s>": 2, "a": 3}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a)*b|a"), "isolated")
    backend.decoder = decoders.Fuse()
    path = save_with_tokenizer(tmp_path, backend)
    template = "{{ messages[0]['content'] }}"
    with engine(path) as llm:
        with pytest.raises(BaseException, match="retry-limit"):
            llm.tokenizer.encode("a" * 40)
        for add in (
            lambda: llm.generate("a" * 40),
            lambda: llm.add_request("a" * 40),
            lambda: llm.stream("a" * 40),
            lambda: llm.chat([{"role": "user", "content": "a" * 40}], chat_template=template),
            lambda: llm.generate("b", params(bad_words=["a" * 40])),
        ):
            with pytest.raises(ValueError, match="cannot be tokenized"):
                add()
        assert not llm.has_unfinished()
        assert len(llm.generate("ab", params(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].token_ids) == 2


def test_prompts_do_not_depend_on_how_the_caller_uses_the_tokenizer(tmp_path, monkeypatch):
    """A call with truncation or padding sets them in the tokenizer's backend, also for calls of other threads."""
    with engine(save_tiny_with_tokenizer(tmp_path, "llama")) as llm:
        want = llm.tokenizer.encode("abc def")
        # As if another thread made its call between that of a request and the work in Rust.
        monkeypatch.setattr(llm.tokenizer, "set_truncation_and_padding", lambda *args, **kwargs: None)
        llm.tokenizer.backend_tokenizer.enable_truncation(3)
        llm.tokenizer.backend_tokenizer.enable_padding(length=60)
        assert llm.tokenizer.encode("abc def") != want
        assert llm.generate("abc def", params(max_tokens=1), use_tqdm=False)[0].prompt_token_ids == want
        chat = [{"role": "user", "content": "abc def"}]
        assert llm.chat_prompts(chat, chat_template="{{ messages[0]['content'] }}") == [want]
        llm.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
        assert llm.chat_prompts(chat) == [[*want, want[0] - ord("a") + ord("!")]]


def test_an_interrupt_while_tokenising_stays_what_it_is(spaced, monkeypatch):
    class Stop(BaseException):
        pass

    class Interrupted:
        def encode_batch_fast(self, *args, **kwargs):
            raise Stop

    with engine(spaced) as llm:
        monkeypatch.setattr(llm.llm_engine.input_processor.codec, "backend", Interrupted())
        with pytest.raises(Stop):
            llm.generate("say")


def test_the_folder_s_own_tokenizer_is_used_where_mistral_common_is_installed(tmp_path):
    mistral_common = pytest.importorskip("mistral_common")
    (data,) = mistral_common.__path__
    path = save_with_tokenizer(tmp_path, sentencepiece_like(), "mistral")
    (path / "tekken.json").symlink_to(f"{data}/data/tekken_240911.json")
    with engine(path) as llm:
        sampling = params(structured_outputs=StructuredOutputsParams(choice=[" yes"]))
        assert llm.generate(["say"], sampling, use_tqdm=False)[0].text == joined(llm, "say", sampling) == " yes"
        chat = [{"role": "user", "content": "say"}]
        with pytest.raises(ValueError, match="no chat template"):
            llm.chat(chat)
        assert llm.chat_prompts(chat, chat_template="{{ messages[0]['content'] }}")[0] == llm.tokenizer.encode("say")


def test_a_tokenizer_that_fails_at_each_text_is_refused_when_the_engine_starts(tmp_path):
    path = save_tiny_with_tokenizer(tmp_path, "llama")
    options = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(options | {"model_max_length": "4096"}))
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be read"):
        engine(path)


@pytest.mark.parametrize("steps", [decoders.BPEDecoder(), decoders.Sequence([decoders.CTC()])])
def test_a_decoder_that_needs_all_tokens_is_refused_when_the_engine_starts(tmp_path, steps):
    backend = sentencepiece_like()
    backend.decoder = steps
    path = save_with_tokenizer(tmp_path, backend)
    with pytest.raises(ValueError, match=r"its decoder (BPEDecoder|CTC) needs all tokens of a text"):
        engine(path)
    with engine(path, skip_tokenizer_init=True) as llm:
        assert llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)[0].text == ""


def test_a_tokenizer_of_another_library_is_refused_when_the_engine_starts(spaced, monkeypatch, tmp_path):
    import transformers

    path = save_tiny(tmp_path, "llama")
    (path / "vocab.json").write_text("{}")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: object())
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be read"):
        engine(path)
    with engine(path, skip_tokenizer_init=True) as llm:
        assert (
            len(llm.generate([[3, 4]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].token_ids) == 2
        )
