"""The rows of a checkpoint's tensor that a layer holds, in its order, where they are not a slice of the tensor."""

from typing import NamedTuple

import numpy as np


def head_rows(heads: range, head_size: int, dims: np.ndarray) -> np.ndarray:
    """Return the rows of the dimensions `dims` of each head, in a tensor with `head_size` rows per head."""
    return (np.array(heads)[:, None] * head_size + dims).ravel()


def packed_rows(heads: range, sizes: tuple[int, ...]) -> np.ndarray:
    """Return the rows of these heads, regrouped by part.

    The tensor has the parts of head 0, then those of head 1, and so on. The result has the first part of all `heads`,
    then the second part of all. Heads 0 and 1 with parts of sizes (1, 2) give rows 0, 3, 1, 2, 4, 5.

    Args:
        sizes: rows of each part of a head.
    """
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return np.concatenate([head_rows(heads, sum(sizes), part) for part in parts])


def joined_rows(*parts: tuple[range, int, int]) -> np.ndarray:
    """Return rows of a tensor whose parts follow one another.

    Args:
        parts: of each part the heads to return, the rows of a head, and the number of heads.
    """
    rows = []
    start = 0
    for heads, head_size, num_heads in parts:
        rows.append(start + head_rows(heads, head_size, np.arange(head_size)))
        start += num_heads * head_size
    return np.concatenate(rows)


def paired_order(head_dim: int, rotary_dim: int) -> np.ndarray:
    """Return the order [head_dim] of a head's dimensions in which RoPE pairs dimension i with i + head_dim / 2.

    A checkpoint has the `rotary_dim` dimensions that rotate first, and pairs i with i + rotary_dim / 2. The others are
    paired as well, but their angles are 0. Scores do not change if queries and keys have the same order.
    paired_order(8, 4) is 0, 1, 4, 5, 2, 3, 6, 7.
    """
    # Row 0 has the first dimension of each pair, row 1 the second.
    rotated = np.arange(rotary_dim).reshape(2, -1)
    others = np.arange(rotary_dim, head_dim).reshape(2, -1)
    return np.concatenate((rotated, others), axis=1).ravel()


class HeadLayout(NamedTuple):
    """How query and key heads are stored and computed, if not in the usual way.

    Args:
        order: [head_dim], the dimensions of a query or key head in the order in which they are computed.
        has_gate: each query head in the checkpoint has a gate of the output after it. All gates are computed first.
    """

    order: np.ndarray
    has_gate: bool = False

    def query_rows(self, heads: range, num_heads: int, head_dim: int) -> tuple[int, np.ndarray]:
        """Return how many rows the checkpoint's query projection has, and which of them belong to these `heads`."""
        if not self.has_gate:
            return num_heads * head_dim, head_rows(heads, head_dim, self.order)
        gates = head_rows(heads, 2 * head_dim, head_dim + np.arange(head_dim))
        queries = head_rows(heads, 2 * head_dim, self.order)
        return 2 * num_heads * head_dim, np.concatenate((gates, queries))
