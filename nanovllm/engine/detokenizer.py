"""Text from tokens, one at a time: never half a character, and never part of a stop string. No torch here."""

from collections.abc import Callable

_INCOMPLETE = "\ufffd"  # what the bytes of half a character decode to
_MAX_WINDOW = 64  # tokens that may lack a character's end before they are taken as they are


class Detokenizer:
    """The text of one sample.

    A token's text depends on its neighbours (spaces, bytes of one character), so the last tokens are decoded together,
    with and without the new one. A window of them moves on at each whole character.

    Args:
        decode: token ids to text.
        stop: strings that end the text.
        include_stop: whether the text ends after the stop string or before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = (), include_stop: bool = False):
        self.decode, self.stop, self.include_stop = decode, stop, include_stop
        self.text = ""  # whole characters only
        self.num_taken = 0  # characters of `text` that `take` has given
        self.window: list[int] = []  # tokens whose text may still change, and before them some that they depend on
        self.num_known = 0  # of the window's tokens, those whose text is in `text`
        self.num_closed = 0  # those and the ones behind them that brought no text, as special tokens do
        self.ended = False

    def add(self, token_id: int, can_stop: bool = True) -> str | None:
        """Take in a token; the stop string that the text has now, which ends before or after it from then on.

        Args:
            can_stop: whether a stop string that this token completes counts.
        """
        self.window.append(token_id)
        before, new = len(self.text), self._new_text()
        if not new:
            del self.window[self.num_known : -_MAX_WINDOW]  # the oldest are forgotten
            self.num_closed = len(self.window)
            return None
        if new.endswith(_INCOMPLETE) and len(self.window) - self.num_closed < _MAX_WINDOW:
            return None
        self.text += new
        del self.window[: self.num_known]
        self.num_known = self.num_closed = len(self.window)
        return self._find_stop(before) if can_stop and self.stop else None

    def finish(self) -> None:
        """There are no more tokens: what is left of them is text too, whole or not."""
        if not self.ended:
            self.text += self._new_text()
            self.window, self.ended = [], True

    def take(self) -> str:
        """What is new since the last call, but for an end that may turn out to begin a stop string."""
        end = len(self.text) - (0 if self.ended else self._num_held())
        start, self.num_taken = self.num_taken, max(self.num_taken, end)
        return self.text[start:end]

    def _new_text(self) -> str:
        if self.num_known == len(self.window):
            return ""
        return self.decode(self.window)[len(self.decode(self.window[: self.num_known])) :]

    def _find_stop(self, before: int) -> str | None:
        """Look for the first stop string that ends behind `before`, and cut the text there."""
        places = [(self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self.stop]
        places = [(place, stop) for place, stop in places if place >= 0]
        if not places:
            return None
        place, stop = min(places)
        self.text = self.text[: place + len(stop) * self.include_stop]
        self.window, self.num_known, self.ended = [], 0, True
        return stop

    def _num_held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self.stop), default=1) - 1
        for n in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-n:]) for stop in self.stop):
                return n
        return 0
