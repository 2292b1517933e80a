"""What a request gives back."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request.

    Reads as attributes (`out.text`) and, as nano-vLLM's dicts do, by key (`out["text"]`).

    Args:
        request_id: the id `add_request` gave it.
        prompt_token_ids, token_ids: what went in, and what was generated (the token that ended it included).
        text: `token_ids` decoded without special tokens; "" when the engine has no tokenizer.
        finish_reason: "stop" (end-of-sequence or stop id), "length" or "abort".
        num_cached_tokens: prompt tokens taken from the prefix cache.
    """

    request_id: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    num_cached_tokens: int

    def __getitem__(self, key: str) -> Any:
        if key in self.__slots__:
            return getattr(self, key)
        raise KeyError(key)

    def keys(self) -> tuple[str, ...]:
        """The field names, so that `dict(out)` works."""
        return tuple(self.__slots__)
