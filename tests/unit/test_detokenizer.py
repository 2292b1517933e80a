"""Increments of text: together they are the whole, and none shows what may still change."""

import random

import pytest

from nanovllm.engine.detokenizer import Detokenizer

TEXTS = ["plain words", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 family 🏳️‍🌈!", "mixed 漢字 and 🎉🎉 end", ""]


def by_bytes(ids):
    """The hardest tokenizer there is: every token is one byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def increments(text, **options):
    detokenizer, parts, stop = Detokenizer(by_bytes, **options), [], None
    for byte in text.encode():
        stop = detokenizer.add(byte)
        parts.append(detokenizer.take())
        if stop is not None:
            break
    detokenizer.finish()
    return [*parts, detokenizer.take()], stop, detokenizer.text


@pytest.mark.parametrize("text", TEXTS)
def test_joined_increments_are_the_whole_and_no_character_is_split(text):
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
        ("abc", ("c", "bc"), "ab", "c"),  # whichever is complete first
    ],
)
def test_stop_strings_end_the_text_and_no_part_of_them_is_shown(text, stops, want, stop, include):
    parts, found, whole = increments(text, stop=stops, include_stop=include)
    want += (stop or "") * include
    if stop == "c":
        want = "a" if not include else "abc"
    if stop != "c":
        assert found == stop and whole == "".join(parts) == want
    shown = ""
    for part in parts[:-1] if stop and not include else []:
        shown += part
        assert want.startswith(shown)


def test_what_is_no_text_is_not_held_back_for_ever():
    detokenizer, rng = Detokenizer(by_bytes), random.Random(0)
    calls = []
    detokenizer.decode = lambda ids: calls.append(len(ids)) or by_bytes(ids)
    for _ in range(500):
        detokenizer.add(rng.randrange(128, 192))  # only ever the middle of a character
    assert max(calls) <= 2 * 64 and detokenizer.text
    detokenizer.finish()
    assert set(detokenizer.text) == {"\ufffd"}


@pytest.mark.parametrize("count", [1, 62, 63, 64, 65, 500])
def test_a_character_after_many_tokens_without_text_is_whole(count):
    calls = []

    def without_zeros(ids):
        calls.append(len(ids))
        return by_bytes([byte for byte in ids if byte])

    detokenizer, shown = Detokenizer(without_zeros), ""
    for byte in ([0] * count + [*"🎉é".encode()]) * 2:
        detokenizer.add(byte)
        shown += detokenizer.take()
    assert shown == "🎉é🎉é" and max(calls) < 3 * 64


def test_a_stop_string_does_not_count_too_early():
    detokenizer = Detokenizer(by_bytes, stop=("ab",))
    assert [detokenizer.add(byte, can_stop=i >= 3) for i, byte in enumerate(b"abab")] == [None, None, None, "ab"]
    assert detokenizer.text == "ab"
