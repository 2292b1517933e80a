"""Text of tokens: increments together are the whole, and none shows what may still change."""

import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from nanovllm.engine.detokenizer import Detokenizer, StopStrings, TokenBytes

TEXTS = ["plain words", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 family 🏳️‍🌈!", "mixed 漢字 and 🎉🎉 end", ""]
BYTES = {byte: bytes([byte]) for byte in range(256)}  # the hardest tokenizer there is: every token is one byte


def increments(text, stop=(), include_stop=False):
    stops = StopStrings(stop) if stop else None
    detokenizer, parts, found = Detokenizer(BYTES, stops, include_stop), [], None
    for byte in text.encode():
        found = detokenizer.add(byte)
        parts.append(detokenizer.take())
        if found is not None:
            break
    detokenizer.finish()
    return [*parts, detokenizer.take()], found, detokenizer.text


@pytest.mark.parametrize("text", TEXTS)
def test_increments_join_to_the_whole_text_without_split_characters(text):
    parts, stop, whole = increments(text)
    assert "".join(parts) == whole == text and stop is None
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stops", "want", "stop"),
    [
        ("one STOP two", ("STOP",), "one ", "STOP"),
        ("one ST", ("STOP",), "one ST", None),
        ("aab aaab", ("aaab",), "aab ", "aaab"),
        ("日本語", ("本",), "日", "本"),
        ("x\n\ny", ("\n\n", "\n"), "x", "\n"),
        ("abc", ("c", "bc"), "a", "bc"),  # both end at once: the longer one
        ("abcd", ("abcd", "bc"), "a", "bc"),  # the one that ends first
    ],
)
def test_stop_strings_end_the_text_and_no_part_of_them_is_shown(text, stops, want, stop, include):
    parts, found, whole = increments(text, stop=stops, include_stop=include)
    want += (stop or "") * include
    assert found == stop and whole == "".join(parts) == want
    shown = ""
    for part in parts[:-1] if stop and not include else []:
        shown += part
        assert want.startswith(shown)


def test_stop_string_before_min_tokens_is_ignored():
    detokenizer = Detokenizer(BYTES, StopStrings(["ab"]))
    assert [detokenizer.add(byte, can_stop=i >= 3) for i, byte in enumerate(b"abab")] == [None, None, None, "ab"]
    assert detokenizer.text == "ab"


def test_ignored_stop_string_is_not_held_back():
    detokenizer = Detokenizer(BYTES, StopStrings(["ab"]))
    for byte in b"ab":
        detokenizer.add(byte, can_stop=False)
    assert detokenizer.take() == "ab"


@pytest.mark.parametrize("place", range(200))
def test_random_stop_strings_are_found_as_by_searching_each(place):
    rng = random.Random(place)
    stops = ["".join(rng.choices("ab日", k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 9))]
    tokens = {i: "".join(rng.choices("ab日c", k=rng.randrange(1, 4))) for i in range(20)}
    drawn = rng.choices(range(20), k=30)
    text = "".join(tokens[i] for i in drawn)
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    detokenizer, shown, found = Detokenizer({i: tokens[i].encode() for i in tokens}, StopStrings(stops)), "", None
    for num_tokens, token_id in enumerate(drawn, 1):
        found = detokenizer.add(token_id)
        shown += detokenizer.take()
        if found:
            break
        so_far = "".join(tokens[i] for i in drawn[:num_tokens])
        held = max(n for n in range(8) if n == 0 or any(stop.startswith(so_far[-n:]) for stop in stops))
        assert shown == so_far[: len(so_far) - held]
    detokenizer.finish()
    shown += detokenizer.take()
    end, negative, stop = min(ends, default=(len(text), 0, None))
    assert (found, shown) == (stop, text[: end + negative])


def test_many_long_stop_strings_cost_about_as_much_as_one():
    stops = [chr(65 + i % 26) + "ab" * 511 + chr(100 + i) for i in range(64)]
    seconds = []
    for some in (stops[:1], stops):
        detokenizer = Detokenizer({0: b"abab", 1: stops[0][:-1].encode()}, StopStrings(some))
        start = time.process_time()  # the machine's load does not count
        for i in range(1000):
            assert detokenizer.add(i % 100 == 0) is None
            detokenizer.take()
        seconds.append(time.process_time() - start)
    assert seconds[1] < 10 * seconds[0] + 1, seconds


# -- bytes of tokens --------------------------------------------------------------------------------------------------


def sentencepiece_like():
    """Return a tokenizer as Llama 2's: decoding removes the first space of a text; characters may be byte tokens."""
    words = ["<s>", "▁yes", "▁no", "no", "▁", "▁▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def byte_level(words=()):
    names = ["<|end|>", *sorted(ByteLevel.alphabet()), *words]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_spaces_that_start_an_output_are_kept():
    tokenizer = sentencepiece_like()
    token_bytes, ids = TokenBytes(tokenizer, True), tokenizer.token_to_id
    assert tokenizer.decode([ids("▁yes")]) == "yes"
    assert token_bytes.text([ids("▁yes"), ids("▁no"), ids("no")]) == " yes nono"
    assert token_bytes.text([ids("▁"), ids("▁▁"), ids("<0x20>"), ids("é")]) == "    é"


@pytest.mark.parametrize("metaspace", [decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never")])
def test_metaspace_keeps_spaces_too(metaspace):
    tokenizer = sentencepiece_like()
    tokenizer.decoder = metaspace
    assert TokenBytes(tokenizer, True).text([1, 2, 3]) == " yes nono"


def test_invalid_bytes_leave_neighboring_tokens_unchanged():
    tokenizer = sentencepiece_like()
    token_bytes = TokenBytes(tokenizer, True)
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é日".encode()]
    assert "é" not in tokenizer.decode(ids[:-1])
    assert token_bytes.text(ids[:-1]) == "é\ufffd" and token_bytes.text(ids) == "é日"


def test_special_tokens_have_text_only_where_it_is_wanted():
    for tokenizer, name in ((sentencepiece_like(), "<s>"), (byte_level(), "<|end|>")):
        special = tokenizer.token_to_id(name)
        assert TokenBytes(tokenizer, True)[special] == b""
        assert TokenBytes(tokenizer, False)[special] == name.encode()


def test_ids_unknown_to_the_tokenizer_have_no_text():
    assert TokenBytes(byte_level(), True).text([100_000]) == ""


def test_tokens_without_a_decoder_are_words():
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
    assert TokenBytes(tokenizer, True).text([0, 1]) == " hello world"


def test_byte_level_text_is_the_tokenizer_s():
    rng = random.Random(0)
    alphabet = sorted(ByteLevel.alphabet())
    words = {"".join(rng.choices(alphabet, k=rng.randrange(2, 5))) for _ in range(500)}
    tokenizer = byte_level(sorted(words))
    token_bytes = TokenBytes(tokenizer, True)
    for _ in range(500):
        ids = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randrange(1, 30))
        assert token_bytes.text(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
def test_increments_are_the_whole_for_random_tokens(make):
    rng, tokenizer = random.Random(1), make()
    token_bytes = TokenBytes(tokenizer, True)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randrange(1, 30))
        detokenizer, shown = Detokenizer(token_bytes), ""
        for token_id in ids:
            detokenizer.add(token_id)
            shown += detokenizer.take()
        detokenizer.finish()
        assert shown + detokenizer.take() == detokenizer.text == token_bytes.text(ids)


def test_invalid_bytes_are_not_held_back():
    detokenizer, rng = Detokenizer(BYTES), random.Random(0)
    for _ in range(500):
        detokenizer.add(rng.randrange(128, 192))  # only ever the middle of a character
    assert detokenizer.take() == "\ufffd" * 500


@pytest.mark.parametrize("count", [1, 64, 500])
def test_a_character_after_many_tokens_without_text_is_whole(count):
    detokenizer, shown = Detokenizer(BYTES | {0: b""}), ""
    for byte in ([0] * count + [*"🎉é".encode()]) * 2:
        detokenizer.add(byte)
        shown += detokenizer.take()
    assert shown == "🎉é🎉é"
