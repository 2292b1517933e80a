"""Estimates the work of replicas and requests in tokens. A prefix that a replica has seen costs nothing."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanovllm.checks import length
from nanovllm.sampling_params import SamplingParams

# Prompts are compared in blocks of so many tokens, up to a bound. A token has about four characters.
_BLOCK_TOKENS = 256
_MAX_TOKENS = 1 << 15
_CHARS_PER_TOKEN = 4
# How many blocks to remember for each replica: 16 million tokens.
_MAX_REMEMBERED = 1 << 16
# The estimate for a request without `max_tokens`.
_NEW_TOKENS = 1024


class Work(NamedTuple):
    """The estimated size of a request in tokens, and a hash of each prefix of its prompt that is whole blocks."""

    prompt_tokens: int
    new_tokens: int
    prefixes: list[int]


def estimate(content: Any, params: SamplingParams | None) -> Work:
    """Return the work of a request whose prompt is a text or token ids."""
    scale = _CHARS_PER_TOKEN if isinstance(content, str) else 1
    size = length(content) // scale
    key, prefixes = 0, []
    for start in range(0, min(size, _MAX_TOKENS) - _BLOCK_TOKENS + 1, _BLOCK_TOKENS):
        key = hash((key, str(content[start * scale : (start + _BLOCK_TOKENS) * scale])))
        prefixes.append(key)
    new_tokens = _NEW_TOKENS if params is None else (params.max_tokens or _NEW_TOKENS) * params.n
    return Work(size, new_tokens, prefixes)


@dataclass(eq=False)
class Replica:
    """A replica as the driver sees it.

    Args:
        actor: Ray's handle of it.
        num_restarts: how many replicas were lost in its place before.
        num_requests: number of unfinished requests.
        num_tokens: their tokens, without those of prefixes that the replica had before.
    """

    actor: Any
    num_restarts: int
    num_requests: int = 0
    num_tokens: int = 0
    _prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def cost(self, work: Work) -> int:
        """Return how many tokens a request would add."""
        num_known = next((i for i, key in enumerate(work.prefixes) if key not in self._prefixes), len(work.prefixes))
        return work.prompt_tokens - num_known * _BLOCK_TOKENS + work.new_tokens

    def add(self, work: Work) -> int:
        """Add a request. Return its cost, which `remove` takes back."""
        cost = self.cost(work)
        self.num_requests += 1
        self.num_tokens += cost
        for key in work.prefixes:
            self._prefixes[key] = None
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > _MAX_REMEMBERED:
            self._prefixes.popitem(last=False)
        return cost

    def remove(self, cost: int) -> None:
        """Remove a request that has ended."""
        self.num_requests -= 1
        self.num_tokens -= cost
