"""Settings and intermediate tensors of the prompt kernels of Gated DeltaNet; see prompt.py."""

from typing import NamedTuple

import torch

from nanovllm.ops.gdn.inputs import CHUNK, GdnState


class GdnPromptConfig(NamedTuple):
    """Settings of the kernels.

    Attributes:
        convolution_warps, chunk_warps: warps per program of the first two kernels.
        slices: parts into which the recurrence splits the value dimensions. A part has at least 16.
        num_stages: pipeline stages of the recurrence.
        merge_precision: of the matmuls that build the inverse; see tl.dot.
    """

    slices: int
    convolution_warps: int = 8
    chunk_warps: int = 4
    num_stages: int = 2
    merge_precision: str = "tf32"


class ChunkTiles(NamedTuple):
    """Output of the first two kernels and input of the third: tiles of N chunks.

    Args:
        q, k: [N, HK, CHUNK, DK], normalized, q scaled.
        v: [N, HV, CHUNK, DV].
        solved, scores: [N, HV, CHUNK, CHUNK].
        g: [N, HV, CHUNK] float32, running sum within the chunk.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    solved: torch.Tensor
    scores: torch.Tensor
    g: torch.Tensor

    @classmethod
    def allocate(cls, num_chunks: int, qkv: torch.Tensor, state: GdnState) -> "ChunkTiles":
        """Make tiles in the dtype and on the device of `qkv`."""
        _, heads, k_dim, v_dim = state.recurrent.shape
        k_heads = state.num_key_heads

        def empty(*shape: int, dtype: torch.dtype = qkv.dtype) -> torch.Tensor:
            return torch.empty((num_chunks, *shape), dtype=dtype, device=qkv.device)

        return cls(
            empty(k_heads, CHUNK, k_dim),
            empty(k_heads, CHUNK, k_dim),
            empty(heads, CHUNK, v_dim),
            empty(heads, CHUNK, CHUNK),
            empty(heads, CHUNK, CHUNK),
            empty(heads, CHUNK, dtype=torch.float32),
        )
