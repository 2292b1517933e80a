"""Third kernel of Gated DeltaNet of prompt rows: the state walks over the chunks; see prompt.py."""

import torch

from nanovllm.ops.gdn.inputs import CHUNK, CONV_WIDTH, GdnInputs, GdnState
from nanovllm.ops.gdn.plan import PromptPlan
from nanovllm.ops.gdn.prompt_tiles import ChunkTiles, GdnPromptConfig
from nanovllm.ops.state.rows import StateRows
from nanovllm.ops.triton_utils import launch_dependents, launch_options, tl, triton, wait_for_inputs


@triton.jit
def _copy_channels(source_ptrs, target_ptrs, channels, tokens):
    """Copy channels of the tokens that exist."""
    mask = tl.broadcast_to((tokens >= 0)[:, None], [tokens.shape[0], channels.shape[0]])
    x = tl.load(source_ptrs[:, None] + channels[None, :], mask=mask, other=0.0)
    tl.store(target_ptrs[:, None] + channels[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["slots_ptr", "starts_ptr", "cu_ptr", "rows_ptr", "first_chunks_ptr"])
def _gdn_recurrence_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    solved_ptr,
    scores_ptr,
    g_ptr,
    qkv_ptr,
    recurrent_ptr,
    conv_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    cu_ptr,
    rows_ptr,
    first_chunks_ptr,
    qkv_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SLICE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    first_value = tl.program_id(1) * SLICE
    prompt = tl.program_id(2)
    row = tl.load(rows_ptr + prompt)
    if row < 0:
        wait_for_inputs(PDL)  # perhaps no program has work
        return
    launch_dependents(PDL)
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    KEYS: tl.constexpr = K_HEADS * K_DIM
    CHANNELS: tl.constexpr = 2 * KEYS + V_HEADS * V_DIM
    k_head = head // GROUP
    first_chunk = tl.load(first_chunks_ptr + prompt).to(tl.int64)
    first = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - first
    slot = tl.load(slots_ptr + row).to(tl.int64)
    start = tl.load(starts_ptr + row).to(tl.int32)
    num_chunks = tl.cdiv(length, CHUNK)

    index = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_DIM)
    values = first_value + tl.arange(0, SLICE)
    state_ptrs = recurrent_ptr + (slot * V_HEADS + head) * (K_DIM * V_DIM) + keys[:, None] * V_DIM + values[None, :]
    has_past = tl.full([K_DIM, SLICE], start, tl.int32) > 0
    state = tl.trans(tl.load(state_ptrs, mask=has_past, other=0.0).to(tl.float32))

    tile = first_chunk * K_HEADS + k_head
    k_ptrs = k_ptr + tile * (CHUNK * K_DIM) + index[:, None] * K_DIM + keys[None, :]
    q_ptrs = q_ptr + tile * (CHUNK * K_DIM) + index[:, None] * K_DIM + keys[None, :]
    tile = first_chunk * V_HEADS + head
    v_ptrs = v_ptr + tile * (CHUNK * V_DIM) + index[:, None] * V_DIM + values[None, :]
    square = tile * (CHUNK * CHUNK) + index[:, None] * CHUNK + index[None, :]
    solved_ptrs = solved_ptr + square
    scores_ptrs = scores_ptr + square
    g_ptrs = g_ptr + tile * CHUNK + index
    last_ptr = g_ptr + tile * CHUNK + CHUNK - 1
    token_offsets = (first + index).to(tl.int64)[:, None]
    out_ptrs = out_ptr + (token_offsets * V_HEADS + head) * V_DIM + values[None, :]
    dtype: tl.constexpr = q_ptr.dtype.element_ty

    wait_for_inputs(PDL)
    # The gates of a chunk are loaded one iteration before they are used; there is an unused chunk after the last one.
    g = tl.load(g_ptrs)
    last = tl.load(last_ptr)
    for chunk in tl.range(0, num_chunks, num_stages=STAGES):
        is_token = tl.broadcast_to((chunk * CHUNK + index < length)[:, None], [CHUNK, SLICE])
        g_next = tl.load(g_ptrs + V_HEADS * CHUNK)
        last_next = tl.load(last_ptr + V_HEADS * CHUNK)
        k = tl.load(k_ptrs)
        q = tl.load(q_ptrs)
        v = tl.load(v_ptrs)
        solved = tl.load(solved_ptrs)
        scores = tl.load(scores_ptrs)
        decay = tl.exp(g)[None, :]
        rounded = state.to(dtype)
        predicted = tl.dot(rounded, tl.trans(k), input_precision=DOT) * decay
        attended = tl.dot(rounded, tl.trans(q), input_precision=DOT) * decay
        error = (tl.trans(v).to(tl.float32) - predicted).to(dtype)
        written = tl.dot(error, tl.trans(solved), input_precision=DOT)
        attended = tl.dot(written.to(dtype), tl.trans(scores), attended, input_precision=DOT)
        kept = (written * tl.exp(last - g)[None, :]).to(dtype)
        state = tl.dot(kept, k, state * tl.exp(last), input_precision=DOT)
        out = tl.trans(attended.to(dtype))
        tl.store(out_ptrs, out, mask=is_token)
        g = g_next
        last = last_next
        k_ptrs += K_HEADS * CHUNK * K_DIM
        q_ptrs += K_HEADS * CHUNK * K_DIM
        v_ptrs += V_HEADS * CHUNK * V_DIM
        solved_ptrs += V_HEADS * CHUNK * CHUNK
        scores_ptrs += V_HEADS * CHUNK * CHUNK
        g_ptrs += V_HEADS * CHUNK
        last_ptr += V_HEADS * CHUNK
        out_ptrs += CHUNK * V_HEADS * V_DIM
    tl.store(state_ptrs, tl.trans(state).to(recurrent_ptr.dtype.element_ty))

    # All reads of the convolution's state were in the kernel before.
    latest = length - 1 - tl.arange(0, WIDTH)
    x_ptrs = qkv_ptr + (first + latest).to(tl.int64) * qkv_stride
    ring_ptrs = conv_ptr + slot * WIDTH * CHANNELS + ((start + latest) & (WIDTH - 1)) * CHANNELS
    _copy_channels(x_ptrs, ring_ptrs, 2 * KEYS + head * V_DIM + values, latest)
    if (head % GROUP == 0) & (first_value == 0):
        _copy_channels(x_ptrs, ring_ptrs, k_head * K_DIM + keys, latest)
        _copy_channels(x_ptrs, ring_ptrs, KEYS + k_head * K_DIM + keys, latest)


def gdn_recurrence_triton(
    tiles: ChunkTiles,
    inputs: GdnInputs,
    state: GdnState,
    rows: StateRows,
    plan: PromptPlan,
    out: torch.Tensor,
    config: GdnPromptConfig,
) -> None:
    """Update the state and write `out`, which still needs `gated_rms_norm_triton`."""
    k_heads = state.num_key_heads
    _, heads, k_dim, v_dim = state.recurrent.shape
    size = v_dim // config.slices
    exact = out.dtype == torch.float32
    _gdn_recurrence_kernel[(heads, config.slices, len(plan.rows))](
        *tiles,
        inputs.qkv,
        state.recurrent,
        state.conv,
        out,
        rows.slots,
        rows.starts,
        rows.cu_seqlens,
        plan.rows,
        plan.first_chunks,
        inputs.qkv.stride(0),
        K_HEADS=k_heads,
        V_HEADS=heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        SLICE=size,
        WIDTH=CONV_WIDTH,
        CHUNK=CHUNK,
        DOT="ieee" if exact else "tf32",
        STAGES=1 if exact else config.num_stages,
        # One warp per 16 value dimensions: then no operand crosses warps.
        num_warps=max(4, size // 16),
        **launch_options(out.device),
    )
