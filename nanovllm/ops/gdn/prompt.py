"""Gated DeltaNet of prompt rows, in chunks of 64 tokens.

Within a chunk, with g the running sum of the decay's logarithm and S the state before the chunk:

    A      = beta_i (k_i k_j) exp(g_i - g_j)   for j < i
    solved = (I + A)^-1 diag(beta)
    W      = solved (V - exp(g) K S)                       what each token writes
    O      = exp(g) Q S + scores W                         scores_ij = (q_i k_j) exp(g_i - g_j) for j <= i
    S     <- exp(g_last) S + (exp(g_last - g) K)^T W

Three kernels do this:

1. Convolution, one program per chunk and head: convolution, SiLU, norms of q and k.
2. Chunk, one program per chunk and value head: gates, `solved` and `scores`. Nothing depends on the state, so all
   chunks run in parallel.
3. Recurrence, one program per row, value head and slice of the value dimensions: it walks over the chunks with the
   state in registers, and stores the outputs. It computes everything transposed (S^T, W^T, O^T). The result of a matmul
   is then the left operand of the next one and stays in registers.

Between the kernels, chunks are padded with zeros to whole tiles, so that loads need no masks.
"""

import torch

from nanovllm.ops.gdn.inputs import GdnInputs, GdnState, GdnWeights
from nanovllm.ops.gdn.plan import PromptPlan
from nanovllm.ops.gdn.prompt_chunk import solve_chunks_triton
from nanovllm.ops.gdn.prompt_convolution import convolve_triton
from nanovllm.ops.gdn.prompt_recurrence import gdn_recurrence_triton
from nanovllm.ops.gdn.prompt_tiles import ChunkTiles, GdnPromptConfig
from nanovllm.ops.state.rows import StateRows


def gdn_prompt_triton(
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    out: torch.Tensor,
    config: GdnPromptConfig | None = None,
) -> None:
    """Compute `gated_delta_net` of the rows of two or more tokens, without the norm and the gate at its end.

    Args:
        rows: the rows of the step, with a `PromptPlan`.
        out: [T, HV * DV], contiguous. The tokens of these rows are written, and zeros for padding tokens; other rows
            are undefined afterwards.
    """
    plan: PromptPlan | None = rows.plan
    if plan is None:
        raise ValueError("rows.plan must be a PromptPlan, got None")
    v_dim = state.recurrent.shape[-1]
    config = config or GdnPromptConfig(slices=2 if v_dim >= 32 else 1)  # tl.dot needs tiles of 16
    tiles = ChunkTiles.allocate(len(plan.chunk_rows), inputs.qkv, state)
    convolve_triton(tiles, inputs, weights, state, rows, plan, out, config)
    solve_chunks_triton(tiles, inputs, weights, rows, plan, config)
    gdn_recurrence_triton(tiles, inputs, state, rows, plan, out, config)
