"""Inputs of a step: what the host sends, and what the model gets."""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch


class StepRows(NamedTuple):
    """The rows of a step as the host sends them: R sequences with T tokens in total, int32 arrays or tensors.

    In a step of decode rows only, each row is its slot's last token. Then `slots` says all, and the rest is None.

    Args:
        slots: [R].
        starts: [R], the position of each row's first token; -1 means the slot's length, which the device knows.
        cu_seqlens: [R + 1], index of each row's first token; the last entry is T without padding.
        token_rows: [T], the row of each token.
        token_ids: [T]; -1 means the slot's last token, which the device knows.
    """

    slots: Any
    starts: Any = None
    cu_seqlens: Any = None
    token_rows: Any = None
    token_ids: Any = None

    @property
    def are_decode_rows(self) -> bool:
        """Whether the step has decode rows only."""
        return self.cu_seqlens is None

    @staticmethod
    def size(num_rows: int, num_tokens: int) -> int:
        """Return the number of values in all five arrays."""
        return 3 * num_rows + 1 + 2 * num_tokens

    @classmethod
    def split(cls, packed: Any, num_rows: int, num_tokens: int) -> "StepRows":
        """Return views of the five arrays in one array or tensor that holds them one after the other."""
        ends = accumulate((0, num_rows, num_rows, num_rows + 1, num_tokens, num_tokens))
        return cls(*(packed[start:end] for start, end in pairwise(ends)))


class StepInputs(NamedTuple):
    """Inputs of the model in one step.

    Args:
        input_ids, positions: [T] int64.
        slot_mapping: [T] int64, each token's index in the flattened KV cache.
        context_lens: [R] int32, tokens that each row sees, its own included; 1 for padding rows without tokens.
        last_indices: [R] int64, the last token of each row; None if each row is one token.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    last_indices: torch.Tensor | None
