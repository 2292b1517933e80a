# pyright: reportPossiblyUnboundVariable=false
# Names in kernels are bound under the same compile-time conditions under which they are read.
"""All-reduce and all-to-all between the tensor-parallel ranks of one host, in one launch each, through peer memory.

A decode step all-reduces a few bytes twice per layer, so latency decides, and NCCL is slow there (docs/benchmarks.md).
Here every rank writes its values into all other ranks' memory (one-shot all-reduce) and sums what arrives in the order
of the ranks, so that all ranks get the same sum to the last bit:

    rank 0   write x0 to rank 1's buffer | wait for rank 1's | x0 + x1 | norm
    rank 1   write x1 to rank 0's buffer | wait for rank 0's | x0 + x1 | norm

A GEMV fuses its own all-reduce: see `sum_unit`.

Before sampling, each rank has some columns of all sequences' logits. An all-to-all gives each rank all columns of some
sequences, for which it samples. If one rank sampled for all, the others and their links would be idle.

**Arrival.** A buffer holds a bit pattern, EMPTY, that is never sent, so every 32-bit word announces itself (the
"Lamport" protocol of TensorRT-LLM). No flag follows the data and no fence comes between.

**Reuse.** A buffer has three regions. Each call uses the next one and resets the region of the previous call to EMPTY.
A rank that has received call n may send call n + 1 while another rank still reads call n. It cannot reach call n + 2
before that rank has sent call n + 1, and by then that rank has finished call n.

**Stop.** After a stop request, a rank waits for nothing and starts no writes to others: their memory may be gone.
"""

import torch

from nanovllm.ops.comm.overlapped_all_reduce import poll_host
from nanovllm.ops.comm.peer_memory import ALL_TO_ALL_BLOCK, DTYPES, EMPTY_WORD, UNIT, PeerMemory
from nanovllm.ops.triton_utils import tl, triton, wait_for_inputs

EMPTY = tl.constexpr(EMPTY_WORD)  # pyright: ignore[reportCallIssue]


@triton.jit
def _low(data, DTYPE: tl.constexpr):
    """Return the first value of each 32-bit word, as float32 or int32."""
    if DTYPE.primitive_bitwidth == 32:
        return data.to(DTYPE, bitcast=True)
    else:
        return (data & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(data, DTYPE: tl.constexpr):
    """Return the second value of each word; 0 if a word holds only one."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.zeros(data.shape, tl.float32)
    else:
        return (data >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def pack_words(low, high, DTYPE: tl.constexpr):
    """Round values to their type and pack them into 32-bit words."""
    if DTYPE.primitive_bitwidth == 32:
        return low.to(tl.int32, bitcast=True)
    else:
        low = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _buffer(buffers_ptr, rank):
    """Return the pointer to a rank's buffer."""
    return tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def buffers_of(buffers_ptr, SIZE: tl.constexpr):
    """Return the pointers to all ranks' buffers."""
    buffers = ()
    for rank in tl.static_range(SIZE):
        buffers += (_buffer(buffers_ptr, rank),)
    return buffers


@triton.jit
def send(words, call, indices, mask, buffers, RANK, SIZE, NUM_WORDS):
    """Write words to all other ranks' buffers. Return them as sent: a word that equals EMPTY becomes 0."""
    words = tl.where(words == EMPTY, 0, words)
    current = call * ((SIZE - 1) * NUM_WORDS) + indices
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(buffers[peer] + current + (RANK - (peer < RANK)) * NUM_WORDS, words, mask=mask)
    return words


@triton.jit
def _receive(ptrs, mask, host_stop_ptr, stop_ptr):
    """Wait for the words at `ptrs` and return them. After a stop request, return 0 for missing words."""
    data = tl.load(ptrs, mask=mask, other=0, volatile=True)
    missing = tl.max((data == EMPTY).to(tl.int32), 0)
    tries = 0
    while missing != 0:
        data = tl.load(ptrs, mask=mask, other=0, volatile=True)
        tries += 1
        poll_host(tries, host_stop_ptr, stop_ptr)
        stopped = tl.load(stop_ptr, mask=tries % 256 == 0, other=0, volatile=True)
        # Warps may read different values of `stopped`, so only their common maximum may decide.
        waits = (data == EMPTY) & (stopped == 0)
        missing = tl.max(waits.to(tl.int32), 0)
    return tl.where(data == EMPTY, 0, data)


@triton.jit
def _count(calls_ptr, first, UNITS: tl.constexpr):
    """Count a call of UNITS units. All warps have read the old counts by now, because a `_receive` came between."""
    units = tl.arange(0, triton.next_power_of_2(UNITS))
    calls = tl.load(calls_ptr + first + units, mask=units < UNITS, other=0)
    tl.store(calls_ptr + first + units, tl.where(calls == 2, 0, calls + 1), mask=units < UNITS)


@triton.jit
def _sum_received(
    local, residual, call, indices, sent, whole, buffers, host_stop_ptr, stop_ptr, RANK, SIZE, NUM_WORDS, DTYPE
):
    """Return the words of residual + the sum over ranks, in the order of the ranks.

    Args:
        local: this rank's words.
        sent: mask of the words that ranks have sent.
        whole: mask of the words of the previous call's region that are set to EMPTY.
    """
    low = _low(residual, DTYPE)
    high = _high(residual, DTYPE)
    current = call * ((SIZE - 1) * NUM_WORDS) + indices
    previous = tl.where(call == 0, 2, call - 1) * ((SIZE - 1) * NUM_WORDS) + indices
    for peer in tl.static_range(SIZE):
        data = local
        if peer != RANK:
            slot = (peer - (peer > RANK)) * NUM_WORDS
            data = _receive(buffers[RANK] + current + slot, sent, host_stop_ptr, stop_ptr)
            tl.store(buffers[RANK] + previous + slot, EMPTY, mask=whole)
        low += _low(data, DTYPE)
        high += _high(data, DTYPE)
    return pack_words(low, high, DTYPE)


@triton.jit
def sum_unit(out_ptr, pointers, unit, num_words, RANK, SIZE, NUM_WORDS, UNIT):
    """All-reduce one unit of `out`, whose tokens have `num_words` words; other programs of the launch compute and send.

    After those programs have sent their words, and so have read the unit's call count, they store them at `local_ptr`.
    Only this program reads them there; it resets them to EMPTY at once.
    """
    local_ptr, buffers_ptr, calls_ptr, host_stop_ptr, stop_ptr = pointers
    units = tl.cdiv(num_words, UNIT)
    words = unit % units * UNIT + tl.arange(0, UNIT)
    indices = unit * UNIT + tl.arange(0, UNIT)
    mask = words < num_words
    buffers = buffers_of(buffers_ptr, SIZE)
    call = tl.load(calls_ptr + unit)
    stopped = tl.load(stop_ptr, volatile=True)
    sent = words < tl.where(stopped == 0, num_words, 0)
    local = _receive(local_ptr + indices, mask, host_stop_ptr, stop_ptr)
    tl.store(local_ptr + indices, EMPTY, mask=mask)
    whole = words < tl.where(stopped == 0, units * UNIT, 0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    zeros = tl.zeros(local.shape, tl.int32)
    data = _sum_received(
        local, zeros, call, indices, sent, whole, buffers, host_stop_ptr, stop_ptr, RANK, SIZE, NUM_WORDS, dtype
    )
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + unit // units * num_words + words, data, mask=mask)
    _count(calls_ptr, unit, 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _all_reduce_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    buffers_ptr,
    calls_ptr,
    host_stop_ptr,
    stop_ptr,
    num_tokens,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    words = tl.arange(0, BLOCK)
    mask = words < WORDS
    UNITS: tl.constexpr = (WORDS + UNIT - 1) // UNIT
    IS_WIDE: tl.constexpr = norm_ptr.dtype.element_ty == tl.float32  # else two values of the weight are a word
    if NORM:
        norm = tl.load(norm_ptr + (2 * words if IS_WIDE else words), mask=mask, other=0)
        if IS_WIDE:
            high_norm = tl.load(norm_ptr + 2 * words + 1, mask=mask, other=0)
    buffers = buffers_of(buffers_ptr, SIZE)
    wait_for_inputs(PDL)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        stopped = tl.load(stop_ptr, volatile=True)
        local = tl.load(x_ptr + token * WORDS + words, mask=mask, other=0)
        sent = words < tl.where(stopped == 0, WORDS, 0)  # mask of the words that are sent and received
        whole = words < tl.where(stopped == 0, UNITS * UNIT, 0)  # all are reset: rows of another length may follow
        indices = token * (UNITS * UNIT) + words
        call = tl.load(calls_ptr + indices // UNIT, mask=whole, other=0)
        local = send(local, call, indices, sent, buffers, RANK, SIZE, NUM_WORDS)
        residual = tl.zeros([BLOCK], tl.int32)
        if ADD:
            residual = tl.load(residual_ptr + token * WORDS + words, mask=mask, other=0)
        data = _sum_received(
            local, residual, call, indices, sent, whole, buffers, host_stop_ptr, stop_ptr, RANK, SIZE, NUM_WORDS, DTYPE
        )
        tl.store(x_ptr + token * WORDS + words, data, mask=mask)
        _count(calls_ptr, token * UNITS, UNITS)
        if NORM:  # takes the rounded sum, and rounds where rms_norm rounds
            low = _low(data, DTYPE)
            high = _high(data, DTYPE)
            count: tl.constexpr = WORDS * (32 // DTYPE.primitive_bitwidth)
            scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / count + eps)
            if IS_WIDE:
                low = low * scale * norm
                high = high * scale * high_norm
            else:
                data = pack_words(low * scale, high * scale, DTYPE)
                low = _low(data, DTYPE) * _low(norm, DTYPE)
                high = _high(data, DTYPE) * _high(norm, DTYPE)
            tl.store(out_ptr + token * WORDS + words, pack_words(low, high, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_per_rank"])
def _all_to_all_kernel(
    x_ptr,
    out_ptr,
    buffers_ptr,
    calls_ptr,
    host_stop_ptr,
    stop_ptr,
    num_rows,
    rows_per_rank,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    blocks: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    for item in range(tl.program_id(0), rows_per_rank * blocks, tl.num_programs(0)):
        row = item // blocks  # index among each rank's rows
        words = item % blocks * BLOCK + tl.arange(0, BLOCK)
        indices = item * BLOCK + tl.arange(0, BLOCK)
        call = tl.load(calls_ptr + indices // UNIT)
        current = call * ((SIZE - 1) * NUM_WORDS) + indices
        previous = tl.where(call == 0, 2, call - 1) * ((SIZE - 1) * NUM_WORDS) + indices
        stopped = tl.load(stop_ptr, volatile=True)
        for peer in tl.static_range(SIZE):
            peer_row = peer * rows_per_rank + row
            exists = peer_row < num_rows
            valid = words < tl.where(exists, WORDS, 0)
            data = tl.load(x_ptr + peer_row * WORDS + words, mask=valid, other=0)
            if peer == RANK:
                tl.store(out_ptr + (row * SIZE + peer) * WORDS + words, data, mask=valid)
            else:
                buffer = _buffer(buffers_ptr, peer)
                data = tl.where(data == EMPTY, 0, data)
                sent = words < tl.where(stopped == 0, tl.where(exists, WORDS, 4), 0)  # 4: see `all_to_all_triton`
                tl.store(buffer + current + (RANK - (peer < RANK)) * NUM_WORDS, data, mask=sent)
        buffer = _buffer(buffers_ptr, RANK)
        exists = RANK * rows_per_rank + row < num_rows
        valid = words < tl.where(exists, WORDS, 0)
        awaited = words < tl.where(stopped == 0, tl.where(exists, WORDS, 4), 0)
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                slot = (peer - (peer > RANK)) * NUM_WORDS
                data = _receive(buffer + current + slot, awaited, host_stop_ptr, stop_ptr)
                tl.store(buffer + previous + slot, EMPTY)
                tl.store(out_ptr + (row * SIZE + peer) * WORDS + words, data, mask=valid)
        _count(calls_ptr, item * (BLOCK // UNIT), BLOCK // UNIT)


def all_reduce_triton(
    x: torch.Tensor,
    peers: PeerMemory,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """All-reduce `x` in place; all ranks must make the same calls in the same order.

    Args:
        x: [T, N], accepted by `peers.fits_all_reduce`.
        norm: weight [N], in the dtype of x or in float32, and epsilon of an RMSNorm of the sum.
        residual: [T, N], contiguous, the same on all ranks; it is added to the sum once.

    Returns:
        [T, N]: a new tensor with the norm of the sum, or `x` without a norm.
    """
    words = x.shape[1] * x.itemsize // 4
    out = x if norm is None else torch.empty_like(x)
    weight, eps = (x, 0.0) if norm is None else norm
    addends = x if residual is None else residual
    block = max(UNIT, triton.next_power_of_2(words))
    pointers, constants = peers.launch_arguments()
    max_tokens = peers.num_words // (triton.cdiv(words, UNIT) * UNIT)  # per launch
    chunks = zip(x.split(max_tokens), addends.split(max_tokens), out.split(max_tokens), strict=True)
    for x_chunk, addend, out_chunk in chunks:
        num_tokens = len(x_chunk)
        max_warps = 8 if num_tokens <= peers.num_sms else 4  # fewer where tokens share an SM
        _all_reduce_kernel[(min(num_tokens, peers.max_programs),)](
            x_chunk.view(torch.int32),
            addend.view(torch.int32),
            weight.view(torch.int32) if weight.dtype == x.dtype else weight,
            out_chunk.view(torch.int32),
            *pointers,
            num_tokens,
            eps,
            WORDS=words,
            BLOCK=block,
            DTYPE=DTYPES[x.dtype],
            ADD=residual is not None,
            NORM=norm is not None,
            num_warps=min(max_warps, max(1, block // 256)),
            **constants,
        )
    return out


def rows_of_rank(rank: int, count: int, num_ranks: int) -> slice:
    """Return the slice of `count` rows that belongs to a rank; the last ranks' slices may be smaller, or empty."""
    rows_per_rank = triton.cdiv(count, num_ranks)
    return slice(min(count, rank * rows_per_rank), min(count, (rank + 1) * rows_per_rank))


def all_to_all_triton(x: torch.Tensor, peers: PeerMemory) -> torch.Tensor:
    """Exchange this rank's columns of all rows for all columns of this rank's rows.

    A rank without rows still receives four words from each other rank. Otherwise it would finish without them, and its
    words of the next call could arrive while another rank still resets the region of the previous one. One word would
    do, but the compiler uses 16-byte accesses only if it knows that all bounds are multiples of 16 bytes.

    Args:
        x: [B, N], accepted by `peers.fits_all_to_all`.

    Returns:
        [M, ranks * N], the M rows of `rows_of_rank`.
    """
    num_rows = len(x)
    words = x.shape[1] * x.itemsize // 4
    rows_per_rank = triton.cdiv(num_rows, peers.size)
    rows = rows_of_rank(peers.rank, num_rows, peers.size)
    out = torch.empty((rows.stop - rows.start, peers.size * x.shape[1]), dtype=x.dtype, device=x.device)
    pointers, constants = peers.launch_arguments()
    num_items = rows_per_rank * triton.cdiv(words, ALL_TO_ALL_BLOCK)
    _all_to_all_kernel[(min(num_items, peers.max_programs),)](
        x.view(torch.int32),
        out.view(torch.int32),
        *pointers,
        num_rows,
        rows_per_rank,
        WORDS=words,
        BLOCK=ALL_TO_ALL_BLOCK,
        num_warps=8,
        **constants,
    )
    return out
