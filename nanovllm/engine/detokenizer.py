"""Turns tokens into text, one at a time: never half a character, and never part of a stop string. No torch here."""

import codecs
import re
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no UTF-8, or not all of a character's
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]

# Byte-level tokenizers spell each byte as a character: printable ones as themselves, the others from U+0100 on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


class TokenBytes(dict):
    """Maps a token id to the UTF-8 bytes that the token adds to a text.

    Bytes do not depend on the tokens around, so the text of an output is what follows its prompt, and it is the same
    however it is cut into increments. The tokenizer's own `decode` gives neither: it may remove the space that starts
    a text, and it replaces a whole run of byte tokens if one is wrong. `tokenizers.decoders.DecodeStream` raises on
    such a run, takes quadratic time over tokens without text, and loses an unfinished character at the end.

    Args:
        tokenizer: decodes in any way in which a token's bytes are the same wherever it stands behind another.
        skip_special_tokens: special tokens have no text.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool):
        super().__init__()
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        """Find the bytes of a token at its first use. An id that the tokenizer does not know has none."""
        # Behind itself, because the first token of a text may lose its space.
        text = self._decode([token_id, token_id])[len(self._decode([token_id])) :]
        self[token_id] = self._spelled_bytes(token_id, text) if _REPLACEMENT in text else text.encode()
        return self[token_id]

    def text(self, token_ids: Iterable[int]) -> str:
        """Return the text of a whole output."""
        return b"".join(self[token_id] for token_id in token_ids).decode(errors="replace")

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)

    def _spelled_bytes(self, token_id: int, text: str) -> bytes:
        """Return the bytes of a token that holds only a part of a character, from the token's name."""
        name = self.tokenizer.id_to_token(token_id)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return text.encode()


class StopStrings:
    """Finds the first of some strings in a text that comes one character at a time (Aho-Corasick).

    A state is a node of the trie of the strings: the longest end of the text that one of them starts with. A character
    costs the same for one string and for many.

    The nodes lie in arrays, string after string, so a node's first child is the next node. This keeps 64 strings of
    1,024 characters near 1 MB.

    Attributes:
        match: for each state, the length of the longest string that ends there; 0 if none does.
        num_held: for each state, how many last characters of the text may begin a string that is still to be completed.
    """

    def __init__(self, strings: Iterable[str]):
        labels, parents = [""], [0]  # of each node, the last character and the node without it
        depths, match = array("i", [0]), array("i", [0])
        self._branches: dict[tuple[int, str], int] = {}  # (node, character) -> child, if it is not the next node
        path = [0]  # the nodes of the last string's prefixes
        for string in sorted(set(strings)):
            common = 0
            while common < len(path) - 1 and labels[path[common + 1]] == string[common]:
                common += 1
            del path[common + 1 :]
            for character in string[common:]:
                node, parent = len(labels), path[-1]
                if node != parent + 1:
                    self._branches[parent, character] = node
                labels.append(character)
                parents.append(parent)
                depths.append(len(path))
                match.append(0)
                path.append(node)
            match[path[-1]] = len(string)
        self._labels = "\0" + "".join(labels) + "\0"
        self._depths = depths + array("i", [0])  # no node follows the last one
        self.match, self.num_held = match, depths[:]
        # For each node, the longest proper suffix that is a node too. It is shorter, so it comes before in this order.
        self._suffixes = array("i", bytes(match.itemsize * len(match)))
        for node in sorted(range(1, len(match)), key=depths.__getitem__):
            suffix = self.next(self._suffixes[parents[node]], labels[node]) if parents[node] else 0
            self._suffixes[node] = suffix
            match[node] = match[node] or match[suffix]
            if self._depths[node + 1] <= depths[node]:  # it has no child
                self.num_held[node] = self.num_held[suffix]

    def next(self, state: int, character: str) -> int:
        """Return the state after one more character; 0 is the state of an empty text."""
        while True:
            if self._labels[state + 1] == character and self._depths[state + 1] > self._depths[state]:
                return state + 1
            if child := self._branches.get((state, character)):
                return child
            if not state:
                return 0
            state = self._suffixes[state]


class Detokenizer:
    """The text of one sample.

    Args:
        token_bytes: the bytes of each token.
        stops: strings that end the text, which the samples of a request share; None if there are none.
        include_stop: whether the text ends after the stop string or before it.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], stops: StopStrings | None = None, include_stop: bool = False):
        self.token_bytes, self.stops, self.include_stop = token_bytes, stops, include_stop
        self.text = ""  # whole characters only
        self.num_taken = 0  # characters of `text` that `take` has given
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps the bytes of half a character
        self._state = 0

    def add(self, token_id: int, can_stop: bool = True) -> str | None:
        """Add a token. Return the stop string that it completes; the text ends there, before or after the string.

        Args:
            can_stop: whether a stop string that this token completes counts.
        """
        new = self._decoder.decode(self.token_bytes[token_id])
        start = len(self.text)
        self.text += new
        if self.stops is None:
            return None
        for end, character in enumerate(new, start + 1):
            self._state = self.stops.next(self._state, character)
            length = self.stops.match[self._state]
            if length and can_stop:
                stop = self.text[end - length : end]
                self.text = self.text[: end if self.include_stop else end - length]
                self.ended = True
                return stop
        return None

    def finish(self) -> None:
        """End the text: no more tokens come. Bytes of an unfinished character become a replacement character."""
        if not self.ended:
            self.text += self._decoder.decode(b"", final=True)
            self.ended = True

    def take(self) -> str:
        """Return the text that is new since the last call, without an end that may begin a stop string."""
        end = len(self.text)
        if self.stops and not self.ended:
            end -= self.stops.num_held[self._state]
        start, self.num_taken = self.num_taken, max(self.num_taken, end)
        return self.text[start:end]
