"""What a request asks of the sampler and when it ends."""

import math
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from numbers import Integral, Real

MAX_STOP_IDS = 32  # ids the device can ban per request while min_tokens holds


def _number(name: str, value, kind, low, high, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if not (low <= value <= high):  # NaN fails this too
        raise ValueError(f"{name} must be {what}, got {value!r}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Frozen, and checked when it is made.

    The order is: ban stop ids (min_tokens) -> temperature -> top_k -> top_p -> min_p -> draw.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        seed: makes the draws repeatable whatever else runs in the batch; None draws a seed from the engine's.
        max_tokens: most tokens to generate.
        min_tokens: end-of-sequence and stop ids cannot be drawn before this many tokens.
        stop_token_ids: up to 32 ids that end the request; the id itself is kept in `token_ids`.
        ignore_eos: go on past the model's end-of-sequence tokens.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        _number("temperature", self.temperature, Real, 0, 100, "a number from 0 to 100")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.001, got {self.temperature!r}")
        _number("max_tokens", self.max_tokens, Integral, 1, 2**31 - 1, "an integer of at least 1")
        _number("top_k", self.top_k, Integral, 0, 2**31 - 1, "an integer of at least 0 (0 keeps all)")
        _number("top_p", self.top_p, Real, math.ulp(0.0), 1, "a number above 0 and up to 1")
        _number("min_p", self.min_p, Real, 0, 1, "a number from 0 to 1")
        if self.seed is not None:
            _number("seed", self.seed, Integral, 0, 2**63 - 1, "None or an integer from 0 to 2**63 - 1")
        _number("min_tokens", self.min_tokens, Integral, 0, self.max_tokens, "an integer from 0 to max_tokens")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be a bool, got {self.ignore_eos!r}")
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, SequenceType):
            raise TypeError(f"stop_token_ids must be a list or tuple of token ids, got {self.stop_token_ids!r}")
        for token_id in self.stop_token_ids:
            _number("stop_token_ids", token_id, Integral, 0, 2**31 - 1, "a list of token ids of at least 0")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids must have at most {MAX_STOP_IDS} ids, got {len(self.stop_token_ids)}")
        # Python's own numbers: numpy's narrow ones would wrap around in sums.
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        for name in ("max_tokens", "top_k", "min_tokens", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
