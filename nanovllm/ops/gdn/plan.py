"""The chunks of a step's prompts for the Gated DeltaNet kernels, planned once a step for all layers."""

from typing import NamedTuple

import torch

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.gdn.inputs import CHUNK
from nanovllm.ops.triton_utils import tl, triton

_ROWS_PER_TILE = 64
_CHUNKS_PER_PROGRAM = 64


class PromptPlan(NamedTuple):
    """The prompt rows of a step, which are its rows of two or more tokens, and their chunks.

    Args:
        rows: [P] int32, the prompt rows; -1 after the last one.
        first_chunks: [P] int32, the index of each prompt row's first chunk.
        chunk_rows: [N] int32, the row of each chunk; -1 for unused chunks, which come last.
        chunk_tokens: [N] int32, each chunk's first token. Unused chunks cover the padding tokens, and more.
    """

    rows: torch.Tensor
    first_chunks: torch.Tensor
    chunk_rows: torch.Tensor
    chunk_tokens: torch.Tensor


@triton.jit(do_not_specialize=["num_rows", "max_prompts", "num_chunks"])
def _prompt_plan_kernel(
    cu_ptr,
    rows_ptr,
    first_ptr,
    chunk_rows_ptr,
    chunk_tokens_ptr,
    num_rows,
    max_prompts,
    num_chunks,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # No `wait_for_inputs`: this runs before the chain, whose kernels read these outputs before they wait.
    is_first = tl.program_id(0) == 0
    chunks = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    owners = tl.full([CHUNKS], -1, tl.int32)
    tokens = tl.zeros([CHUNKS], tl.int32)
    num_prompts = num_rows * 0
    num_used = num_rows * 0
    for tile in range(0, num_rows, ROWS):
        rows = tile + tl.arange(0, ROWS)
        is_row = rows < num_rows
        starts = tl.load(cu_ptr + rows, mask=is_row, other=0)
        lengths = tl.load(cu_ptr + rows + 1, mask=is_row, other=0) - starts
        is_prompt = lengths > 1
        counts = tl.where(is_prompt, (lengths + CHUNK - 1) // CHUNK, 0)
        first = num_used + tl.cumsum(counts, 0) - counts
        index = num_prompts + tl.cumsum(is_prompt.to(tl.int32), 0) - 1
        if is_first:
            fits = is_prompt & (index < max_prompts)
            tl.store(rows_ptr + index, rows, mask=fits)
            tl.store(first_ptr + index, first, mask=fits)
        in_chunk = chunks[:, None] - first[None, :]
        owned = (in_chunk >= 0) & (in_chunk < counts[None, :])
        owners = tl.maximum(owners, tl.max(tl.where(owned, rows[None, :], -1), 1))
        tokens += tl.sum(tl.where(owned, starts[None, :] + in_chunk * CHUNK, 0), 1)
        num_prompts += tl.sum(is_prompt.to(tl.int32), 0)
        num_used += tl.sum(counts, 0)
    padding = tl.load(cu_ptr + num_rows) + (chunks - num_used) * CHUNK
    tokens = tl.where(owners < 0, padding, tokens)
    tl.store(chunk_rows_ptr + chunks, owners, mask=chunks < num_chunks)
    tl.store(chunk_tokens_ptr + chunks, tokens, mask=chunks < num_chunks)
    if is_first:
        for tile in range(0, max_prompts, ROWS):
            rows = tile + tl.arange(0, ROWS)
            tl.store(rows_ptr + rows, -1, mask=(rows >= num_prompts) & (rows < max_prompts))


def prompt_plan_triton(cu_seqlens: torch.Tensor, num_tokens: int, max_prompts: int) -> PromptPlan:
    """Return the plan of a step, computed on the device. Call this before the model's first kernel of the step.

    Args:
        cu_seqlens: [R + 1] int32.
        num_tokens: T, padding included.
        max_prompts: P, at least the number of rows of two or more tokens.
    """
    # One more than there can be, because the recurrence loads the gates of the chunk after the last one.
    num_chunks = ceil_div(num_tokens, CHUNK) + max_prompts + 1
    rows, first = torch.empty((2, max_prompts), dtype=torch.int32, device=cu_seqlens.device).unbind(0)
    chunk_rows, tokens = torch.empty((2, num_chunks), dtype=torch.int32, device=cu_seqlens.device).unbind(0)
    _prompt_plan_kernel[(ceil_div(num_chunks, _CHUNKS_PER_PROGRAM),)](
        cu_seqlens,
        rows,
        first,
        chunk_rows,
        tokens,
        len(cu_seqlens) - 1,
        max_prompts,
        num_chunks,
        CHUNK=CHUNK,
        ROWS=_ROWS_PER_TILE,
        CHUNKS=_CHUNKS_PER_PROGRAM,
        num_warps=4,
    )
    return PromptPlan(rows, first, chunk_rows, tokens)
