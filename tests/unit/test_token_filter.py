"""Bad words, as tokenizers of several kinds spell them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from nanovllm import SamplingParams
from nanovllm.engine.token_filter import make_filter

BYTES = pre_tokenizers.ByteLevel.alphabet()


def byte_level(**options):
    tokens = [*sorted(BYTES), "ok", "Ġok", "oke", "ĊĊ", "=ok", "=Ċ"]
    merges = [("o", "k"), ("Ġ", "ok"), ("ok", "e"), ("Ċ", "Ċ"), ("=", "Ċ")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(prepend):
    """Two ways to put a space before a text: a normalizer's, as in Llama 2, or the pre-tokenizer's."""
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnop=1", "ok", "▁ok", "▁a", "▁=", "▁1"]
    merges = [("o", "k"), ("▁", "ok"), ("▁", "a"), ("▁", "="), ("▁", "1")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(add_prefix_space=False),
    "byte-level with a space": byte_level(add_prefix_space=True),
    "normalizer": sentencepiece("normalizer"),
    "metaspace": sentencepiece("always"),
    "metaspace first": sentencepiece("first"),
}


def banned(tokenizer, word, after=(), vocab_size=None, **options):
    """The tokens that may not come after some others."""
    vocab_size = vocab_size or tokenizer.get_vocab_size()
    params = SamplingParams(bad_words=[word], **options)
    token_filter = make_filter(
        params,
        vocab_size,
        lambda texts: [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)],
        (),
    )
    for token in after:
        token_filter.accept(tokenizer.token_to_id(token))
    bits = np.unpackbits(token_filter.compute_mask().view(np.uint8), bitorder="little")[:vocab_size]
    return {tokenizer.id_to_token(int(i)) for i in np.flatnonzero(bits == 0)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_word_is_banned_with_and_without_a_space_before_it(name):
    space = "Ġ" if name.startswith("byte") else "▁"
    assert banned(TOKENIZERS[name], "ok") == {"ok", space + "ok"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_word_that_begins_with_a_space_is_banned_with_it_only(name):
    space = "Ġ" if name.startswith("byte") else "▁"
    assert banned(TOKENIZERS[name], " ok") == {space + "ok"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_newline_bans_the_newline_and_not_the_space(name):
    assert banned(TOKENIZERS[name], "\n") == {"Ċ" if name.startswith("byte") else "<0x0A>"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_space_bans_the_space(name):
    assert banned(TOKENIZERS[name], " ") == {"Ġ" if name.startswith("byte") else "▁"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_word_of_several_tokens_is_banned_at_its_last_one(name):
    space = "Ġ" if name.startswith("byte") else "▁"
    for first in ("ok", space + "ok"):
        assert banned(TOKENIZERS[name], "okab", after=(first, "a")) == {"b"}
    assert banned(TOKENIZERS[name], "okab", after=("b", "a")) == set()


def test_a_word_that_merges_with_what_is_before_it_is_spelled_after_something_else():
    assert banned(TOKENIZERS["byte-level"], "\n\n") == {"ĊĊ"}


def test_a_word_has_the_spellings_after_each_kind_of_text():
    """GPT-2's pre-tokenizer splits "a's" into "a" and "'s", but "='s" into "='" and "s"."""
    tokens = [*sorted(BYTES), "'s"]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("'", "s")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert banned(tokenizer, "'s") == {"'s"}
    assert banned(tokenizer, "'s", after=("'",)) == {"'s", "s"}


@pytest.mark.parametrize("word", ["ok", "okab", "bok"])
def test_spellings_with_tokens_beyond_the_model_s_vocabulary_are_dropped(word):
    tokenizer = TOKENIZERS["byte-level"]
    vocab_size = tokenizer.token_to_id("ok")  # the first that the model lacks
    for after in ((), ("b",), ("o", "k", "a")):
        assert banned(tokenizer, word, after, vocab_size) == set()
    assert banned(tokenizer, "b", (), vocab_size) == {"b"}
