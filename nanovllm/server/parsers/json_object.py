"""Reads a JSON object that arrives in pieces."""

import json

import regex

_CONTROL_CHARACTERS = {code: json.dumps(chr(code))[1:-1] for code in range(32)}
_STRING_CHARACTERS = regex.compile(r'[^"\\]*+')
# Numbers, words such as true, and what separates values. Without `_` and `<`, so that `[TOOL_CALLS]` and tags break an
# object: else an object that is never finished would be read to the end of the text.
_BETWEEN = regex.compile(r"[a-zA-Z0-9\s.,:+-]*+")


class JsonObject:
    """Finds the end of a JSON object while its text arrives. Only strings and brackets are checked.

    Args:
        is_open: the object's first bracket was read before.

    Attributes:
        is_complete: the object's last bracket was read.
        is_broken: the text that follows the part that was read cannot belong to an object.
    """

    def __init__(self, is_open: bool = False):
        self.is_complete = self.is_broken = False
        self._open = ["}"] if is_open else []  # the brackets that must follow
        self._in_string = self._is_escaped = False

    def read(self, text: str, start: int) -> tuple[str, int]:
        """Read on from the index `start`.

        Returns:
            The object's part of the text, with control characters of strings escaped, and the index after it.
        """
        pieces = []
        index = start
        while index < len(text) and not self.is_complete and not self.is_broken:
            end = self._read_string(text, index) if self._in_string else self._read_bracket(text, index)
            piece = text[index:end]
            pieces.append(piece.translate(_CONTROL_CHARACTERS) if self._in_string else piece)
            index = end
        return "".join(pieces), index

    def _read_string(self, text: str, index: int) -> int:
        """Read characters of a string, an escape, or the quote that ends the string. Return the index after it."""
        if self._is_escaped:
            self._is_escaped = False
            return index + 1
        found = _STRING_CHARACTERS.match(text, index)
        if found and found.end() > index:
            return found.end()
        self._is_escaped = text[index] == "\\"
        self._in_string = self._is_escaped
        return index + 1

    def _read_bracket(self, text: str, index: int) -> int:
        """Read a bracket, the quote that starts a string, or what is between them. Return the index after it."""
        found = _BETWEEN.match(text, index)
        if found and found.end() > index:
            return found.end()
        character = text[index]
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
        elif self._open and character == self._open[-1]:
            self._open.pop()
            self.is_complete = not self._open
        else:
            self.is_broken = True
            return index
        return index + 1
