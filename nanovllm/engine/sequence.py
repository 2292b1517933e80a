"""One request on its way through the engine. No torch here."""

from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count

from nanovllm.sampling_params import SamplingParams

_ids = count()


class Status(Enum):
    WAITING = auto()  # owns nothing
    RUNNING = auto()  # owns a slot and blocks
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and how far the device is with them.

    Three counts say it all (`pending` is 0 or 1 at overlap depth 1):

        token_ids        the tokens the host knows
        pending          tokens sampled on the device that the host has yet to see
        num_computed     tokens whose KV is in the cache, counted when their step is scheduled
    """

    prompt_ids: list[int]
    params: SamplingParams
    end_ids: frozenset[int] = frozenset()  # the ids that finish it: end-of-sequence unless ignored, stop_token_ids
    seed: int = 0
    id: int = field(default_factory=lambda: next(_ids))
    status: Status = Status.WAITING
    token_ids: list[int] = field(init=False)
    pending: int = 0
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when it was first admitted
    finish_reason: str | None = None

    # What it owns while running.
    slot: int = -1
    block_table: list[int] = field(default_factory=list)
    on_device: bool = False  # the slot holds the last token: the next step is a decode row
    in_flight: int = 0  # launched steps that have not been collected and hold a row of this sequence

    # How far its blocks are in the prefix index (see BlockManager.register).
    num_registered: int = 0
    prefix_hash: int = 0
    prefix_uid: int = 0

    def __post_init__(self):
        self.token_ids = list(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """All tokens there are, those the host has yet to see included."""
        return len(self.token_ids) + self.pending

    @property
    def num_generated(self) -> int:
        return self.num_tokens - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]
