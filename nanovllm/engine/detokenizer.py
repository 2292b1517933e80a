"""Turns tokens into text one by one. Holds back parts of characters and of stop strings. No torch here."""

import codecs
import re
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Stands for bytes that are not UTF-8, or only a part of a character.
_REPLACEMENT = "\ufffd"
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]

# Byte-level tokenizers spell each byte as a character: printable ones as themselves, the others from U+0100 on.
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(_UNPRINTABLE)}


class TokenBytes(dict):
    """Maps a token id to the UTF-8 bytes that the token adds to a text.

    Bytes do not depend on neighboring tokens. So the text of an output is exactly what follows its prompt, and it is
    the same in one piece and in increments. The tokenizer's own `decode` ensures neither: it may remove the space that
    starts a text, and it replaces a whole run of byte tokens if one is wrong. `tokenizers.decoders.DecodeStream` raises
    on such a run, takes quadratic time for tokens without text, and loses an unfinished character at the end.

    Args:
        tokenizer: its decoder gives a token the same bytes after any other token; `load_tokenizer` refuses others.
        skip_special_tokens: special tokens have no text.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool):
        super().__init__()
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        """Find and keep the bytes of a token at its first use. An id that the tokenizer does not know has none."""
        # The token is decoded after itself, because the first token of a text may lose its space.
        text = self._decode([token_id, token_id])[len(self._decode([token_id])) :]
        self[token_id] = self._spelled_bytes(token_id, text) if _REPLACEMENT in text else text.encode()
        return self[token_id]

    def text(self, token_ids: Iterable[int]) -> str:
        """Return the text of a whole output."""
        return b"".join(self[token_id] for token_id in token_ids).decode(errors="replace")

    def text_of(self, token_id: int) -> str:
        """Return the text of one token. Bytes that are a part of a character are replacement characters."""
        return self[token_id].decode(errors="replace")

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)

    def _spelled_bytes(self, token_id: int, text: str) -> bytes:
        """Return the bytes of a token that holds only a part of a character, from the token's name."""
        name = self.tokenizer.id_to_token(token_id)
        if name is None:
            return text.encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return text.encode()


class StopStrings:
    """Finds the first of several strings in a text that arrives one character at a time (Aho-Corasick).

    A state is a node of the strings' trie: it stands for the longest suffix of the text with which one of them starts.
    The cost of a character does not depend on the number of strings.

    The nodes are stored in arrays, string after string, so a node's first child is the next node. With 64 strings of
    1,024 characters this takes about 1 MB.

    Attributes:
        match: for each state, the length of the longest string that ends there; 0 if none does.
        num_held: for each state, how many of the text's last characters may start a string that is not complete yet.
    """

    def __init__(self, strings: Iterable[str]):
        # The last character of each node, and the node without that character.
        labels = [""]
        parents = [0]
        depths = array("i", [0])
        match = array("i", [0])
        # (node, character) -> child, if it is not the next node
        self._branches: dict[tuple[int, str], int] = {}
        # The nodes of the current string's prefixes.
        path = [0]
        for string in sorted(set(strings)):
            common = 0
            while common < len(path) - 1 and labels[path[common + 1]] == string[common]:
                common += 1
            del path[common + 1 :]
            for character in string[common:]:
                node = len(labels)
                parent = path[-1]
                if node != parent + 1:
                    self._branches[parent, character] = node
                labels.append(character)
                parents.append(parent)
                depths.append(len(path))
                match.append(0)
                path.append(node)
            match[path[-1]] = len(string)
        # An entry for the root, and one after the last node, because `next` looks at the node after a state. Its depth
        # of 0 says that it is nobody's child.
        self._labels = "\0" + "".join(labels) + "\0"
        self._depths = depths + array("i", [0])
        self.match = match
        self.num_held = depths[:]
        # For each node, the longest proper suffix that is a node too. Shorter nodes come first, because longer ones use
        # their suffixes.
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
    """Makes the text of one sample.

    Args:
        token_bytes: maps a token id to the token's bytes.
        stops: strings that end the text; None if there are none. The samples of a request share them.
        include_stop: whether the text ends after the stop string or before it.

    Attributes:
        text: the whole characters so far.
        num_taken: how many characters `take` has returned.
        ended: whether the text is complete.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], stops: StopStrings | None = None, include_stop: bool = False):
        self.token_bytes = token_bytes
        self.stops = stops
        self.include_stop = include_stop
        self.text = ""
        self.num_taken = 0
        self.ended = False
        # Keeps the bytes of an unfinished character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._state = 0

    def add(self, token_id: int, can_stop: bool = True) -> str | None:
        """Add a token. Return the stop string that it completes, which ends the text, or None.

        Args:
            can_stop: whether to stop at a stop string that this token completes.
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
        """End the text, because no more tokens come. Replace an unfinished character by a replacement character."""
        if not self.ended:
            self.text += self._decoder.decode(b"", final=True)
            self.ended = True

    def take(self) -> str:
        """Return the new text since the last call. Keep back characters that may start a stop string."""
        end = len(self.text)
        if self.stops and not self.ended:
            end -= self.stops.num_held[self._state]
        new = self.text[self.num_taken : end]
        self.num_taken = max(self.num_taken, end)
        return new

    @property
    def taken(self) -> str:
        """The text that all calls of `take` have returned."""
        return self.text[: self.num_taken]
