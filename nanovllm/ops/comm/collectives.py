"""What the tensor-parallel ranks of one host tell each other, in one launch each, through each other's memory.

A decode step sums few bytes many times, twice a layer, so that latency decides: NCCL takes 9 us for the least of them.
Here every rank writes its numbers into all others' memory (one-shot all-reduce) and adds up what arrives, in the order
of the ranks, so that all have the same sum to the last bit.

    rank 0   write x0 to rank 1's buffer | wait for rank 1's | x0 + x1 | norm
    rank 1   write x1 to rank 0's buffer | wait for rank 0's | x0 + x1 | norm

A product of few rows makes its sum itself, in the same launch: see `sum_unit`.

Before tokens are drawn, each rank has some columns of all rows' logits. They exchange them (all-to-all), so that each
has all columns of some rows, and draws for these: if one rank drew for all, the others and their links would be idle.

How a rank knows that something has arrived: the buffers hold a bit pattern that is never sent, so that every word of 32
bits announces itself (the "Lamport" protocol of TensorRT-LLM). No flag follows the data, no fence comes between.

A place in the buffers is three, of which each call takes the next, and empties the one of the call before. A rank that
has all of call n may send its part of call n + 1 while another still reads; it cannot come to call n + 2 before that
one has sent its own part of n + 1, and then that one is done with call n.

A rank that is told to stop waits no more, and begins to write to others no more: their memory may be gone.
"""

from contextlib import ExitStack
from typing import Any

import torch

from nanovllm.ops.comm.cuda_ipc import Mapping
from nanovllm.ops.comm.overlapped_all_reduce import OverlappedAllReduce, inbox_words, poll_host
from nanovllm.ops.linear.dispatch import MAX_GEMV_TOKENS
from nanovllm.ops.triton_utils import launch_options, sm_count, tl, triton, wait_for_inputs

CAPACITY = 32 << 20  # bytes that a rank can send to another in one launch; more are sent in several
MAX_ONE_SHOT_BYTES = 4 << 20  # that a rank sends in all; a ring (NCCL) sends fewer from three ranks on
MAX_TOKEN_BYTES = 64 << 10  # of the longest row that is summed
UNIT = 512  # words whose calls are counted together
ALL_TO_ALL_BLOCK = 2048  # words of a row that a program exchanges
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int32: tl.int32}
_EMPTY = -0x7FFF8000  # two 16-bit numbers -0.0; as a float32, -4.6e-41
EMPTY = tl.constexpr(_EMPTY)


@triton.jit
def _low(data, DTYPE: tl.constexpr):
    """The first number of each 32-bit word, as float32 or int32."""
    if DTYPE.primitive_bitwidth == 32:
        return data.to(DTYPE, bitcast=True)
    else:
        return (data & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(data, DTYPE: tl.constexpr):
    """The second number of each word of two; 0 if there is none."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.zeros(data.shape, tl.float32)
    else:
        return (data >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def pack_words(low, high, DTYPE: tl.constexpr):
    """32-bit words of the numbers, rounded to their type."""
    if DTYPE.primitive_bitwidth == 32:
        return low.to(tl.int32, bitcast=True)
    else:
        low = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _buffer(buffers_ptr, rank):
    """A rank's buffer."""
    return tl.multiple_of(tl.load(buffers_ptr + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def buffers_of(buffers_ptr, SIZE: tl.constexpr):
    """All ranks' buffers."""
    buffers = ()
    for rank in tl.static_range(SIZE):
        buffers += (_buffer(buffers_ptr, rank),)
    return buffers


@triton.jit
def send(words, call, places, mask, buffers, RANK, SIZE, NUM_WORDS):
    """Write words to all other ranks' buffers, and return what is sent."""
    words = tl.where(words == EMPTY, 0, words)
    now = call * ((SIZE - 1) * NUM_WORDS) + places
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(buffers[peer] + now + (RANK - (peer < RANK)) * NUM_WORDS, words, mask=mask)
    return words


@triton.jit
def _receive(place, mask, host_stop_ptr, stop_ptr):
    """The words at `place` once all are there; once this rank is told to stop, zeros for those that are not."""
    data = tl.load(place, mask=mask, other=0, volatile=True)
    missing = tl.max((data == EMPTY).to(tl.int32), 0)
    tries = 0
    while missing != 0:
        data = tl.load(place, mask=mask, other=0, volatile=True)
        tries += 1
        poll_host(tries, host_stop_ptr, stop_ptr)
        stopped = tl.load(stop_ptr, mask=tries % 256 == 0, other=0, volatile=True)
        # Each warp may read another `stopped`: only together can they decide to go on.
        waits = (data == EMPTY) & (stopped == 0)
        missing = tl.max(waits.to(tl.int32), 0)
    return tl.where(data == EMPTY, 0, data)


@triton.jit
def _count(calls_ptr, first, UNITS: tl.constexpr):
    """Count a call of UNITS units. All warps have read their counts: a `_receive` came between."""
    units = tl.arange(0, triton.next_power_of_2(UNITS))
    calls = tl.load(calls_ptr + first + units, mask=units < UNITS, other=0)
    tl.store(calls_ptr + first + units, tl.where(calls == 2, 0, calls + 1), mask=units < UNITS)


@triton.jit
def _add_received(
    own, residual, call, places, sent, whole, buffers, host_stop_ptr, stop_ptr, RANK, SIZE, NUM_WORDS, DTYPE
):
    """Words of residual + the sum over the ranks, each of which has `sent` some.

    Empties the `whole` place of the call before.
    """
    low = _low(residual, DTYPE)
    high = _high(residual, DTYPE)
    now = call * ((SIZE - 1) * NUM_WORDS) + places
    before = tl.where(call == 0, 2, call - 1) * ((SIZE - 1) * NUM_WORDS) + places
    for peer in tl.static_range(SIZE):
        data = own
        if peer != RANK:
            slot = (peer - (peer > RANK)) * NUM_WORDS
            data = _receive(buffers[RANK] + now + slot, sent, host_stop_ptr, stop_ptr)
            tl.store(buffers[RANK] + before + slot, EMPTY, mask=whole)
        low += _low(data, DTYPE)
        high += _high(data, DTYPE)
    return pack_words(low, high, DTYPE)


@triton.jit
def sum_unit(out_ptr, pointers, unit, num_words, RANK, SIZE, NUM_WORDS, UNIT):
    """Sum up a unit of the rows of `out`, of `num_words` each, which other programs of the launch compute and send.

    When these have sent words, and so have read the unit's count of calls, they write them at `own_ptr`. Only this
    program reads them there, and empties their place at once.
    """
    own_ptr, buffers_ptr, calls_ptr, host_stop_ptr, stop_ptr = pointers
    units = tl.cdiv(num_words, UNIT)
    words = unit % units * UNIT + tl.arange(0, UNIT)
    places = unit * UNIT + tl.arange(0, UNIT)
    mask = words < num_words
    buffers = buffers_of(buffers_ptr, SIZE)
    call = tl.load(calls_ptr + unit)
    stopped = tl.load(stop_ptr, volatile=True)
    sent = words < tl.where(stopped == 0, num_words, 0)
    own = _receive(own_ptr + places, mask, host_stop_ptr, stop_ptr)
    tl.store(own_ptr + places, EMPTY, mask=mask)
    whole = words < tl.where(stopped == 0, units * UNIT, 0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    zeros = tl.zeros(own.shape, tl.int32)
    data = _add_received(
        own, zeros, call, places, sent, whole, buffers, host_stop_ptr, stop_ptr, RANK, SIZE, NUM_WORDS, dtype
    )
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + unit // units * num_words + words, data, mask=mask)
    _count(calls_ptr, unit, 1)


@triton.jit
def _all_reduce_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    buffers_ptr,
    calls_ptr,
    host_stop_ptr,
    stop_ptr,
    rows,
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
    if NORM:
        norm = tl.load(norm_ptr + words, mask=mask, other=0)
    buffers = buffers_of(buffers_ptr, SIZE)
    wait_for_inputs(PDL)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        stopped = tl.load(stop_ptr, volatile=True)
        own = tl.load(x_ptr + row * WORDS + words, mask=mask, other=0)
        sent = words < tl.where(stopped == 0, WORDS, 0)  # and received
        whole = words < tl.where(stopped == 0, UNITS * UNIT, 0)  # to be emptied: rows of another length may follow
        places = row * (UNITS * UNIT) + words
        call = tl.load(calls_ptr + places // UNIT, mask=whole, other=0)
        own = send(own, call, places, sent, buffers, RANK, SIZE, NUM_WORDS)
        residual = tl.zeros([BLOCK], tl.int32)
        if ADD:
            residual = tl.load(residual_ptr + row * WORDS + words, mask=mask, other=0)
        data = _add_received(
            own, residual, call, places, sent, whole, buffers, host_stop_ptr, stop_ptr, RANK, SIZE, NUM_WORDS, DTYPE
        )
        tl.store(x_ptr + row * WORDS + words, data, mask=mask)
        _count(calls_ptr, row * UNITS, UNITS)
        if NORM:  # of the rounded sum, and rounded itself where rms_norm is
            low = _low(data, DTYPE)
            high = _high(data, DTYPE)
            count: tl.constexpr = WORDS * (32 // DTYPE.primitive_bitwidth)
            scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / count + eps)
            data = pack_words(low * scale, high * scale, DTYPE)
            low = _low(data, DTYPE) * _low(norm, DTYPE)
            high = _high(data, DTYPE) * _high(norm, DTYPE)
            tl.store(out_ptr + row * WORDS + words, pack_words(low, high, DTYPE), mask=mask)


@triton.jit
def _all_to_all_kernel(
    x_ptr,
    out_ptr,
    buffers_ptr,
    calls_ptr,
    host_stop_ptr,
    stop_ptr,
    rows,
    share,
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
    for item in range(tl.program_id(0), share * blocks, tl.num_programs(0)):
        row = item // blocks  # of each rank's share
        words = item % blocks * BLOCK + tl.arange(0, BLOCK)
        places = item * BLOCK + tl.arange(0, BLOCK)
        call = tl.load(calls_ptr + places // UNIT)
        now = call * ((SIZE - 1) * NUM_WORDS) + places
        before = tl.where(call == 0, 2, call - 1) * ((SIZE - 1) * NUM_WORDS) + places
        stopped = tl.load(stop_ptr, volatile=True)
        for peer in tl.static_range(SIZE):
            there = peer * share + row
            here = there < rows
            valid = words < tl.where(here, WORDS, 0)
            data = tl.load(x_ptr + there * WORDS + words, mask=valid, other=0)
            if peer == RANK:
                tl.store(out_ptr + (row * SIZE + peer) * WORDS + words, data, mask=valid)
            else:
                buffer = _buffer(buffers_ptr, peer)
                data = tl.where(data == EMPTY, 0, data)
                sent = words < tl.where(stopped == 0, tl.where(here, WORDS, 4), 0)  # 4: see `all_to_all_triton`
                tl.store(buffer + now + (RANK - (peer < RANK)) * NUM_WORDS, data, mask=sent)
        buffer = _buffer(buffers_ptr, RANK)
        here = RANK * share + row < rows
        valid = words < tl.where(here, WORDS, 0)
        awaited = words < tl.where(stopped == 0, tl.where(here, WORDS, 4), 0)
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                slot = (peer - (peer > RANK)) * NUM_WORDS
                data = _receive(buffer + now + slot, awaited, host_stop_ptr, stop_ptr)
                tl.store(buffer + before + slot, EMPTY)
                tl.store(out_ptr + (row * SIZE + peer) * WORDS + words, data, mask=valid)
        _count(calls_ptr, item * (BLOCK // UNIT), BLOCK // UNIT)


class PeerMemory:
    """Memory of all ranks that every rank can write.

    Args:
        rank: this rank's number.
        memory: each rank's, from `new_peer_memory`, as this process sees it.

    Attributes:
        ahead: for sums that are sent while they are computed, or None.
    """

    def __init__(self, rank: int, memory: list[torch.Tensor | Mapping]):
        self.rank, self.size, self.memory = rank, len(memory), memory
        self.device = memory[rank].device
        pointers = [part.data_ptr() for part in memory]
        self.buffers = torch.tensor(pointers, dtype=torch.int64, device=self.device)
        self.calls = torch.zeros(CAPACITY // 4 // UNIT, dtype=torch.int32, device=self.device)
        self.own = torch.full((MAX_GEMV_TOKENS * MAX_TOKEN_BYTES // 4,), _EMPTY, dtype=torch.int32, device=self.device)
        on_gpu = self.device.type == "cuda"
        # A kernel that waits is told by the host's memory: other ways to the GPU may be full of what waits for it.
        self.host_stop = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self.device_stop = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.num_sms = sm_count(self.device)
        self.max_programs = 4 * self.num_sms  # that run at once, as they wait
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # for `stop`: the others may never be free
        start, self.overlapped = _buffer_words(self.size), None
        if len(memory[rank]) > start:
            self.overlapped = OverlappedAllReduce(
                memory[rank][start:], pointers[1 - rank] + 4 * start, self.host_stop, self.device_stop
            )

    def launch_arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What every kernel here takes of this: pointers, then constants and options."""
        constants = {"RANK": self.rank, "SIZE": self.size, "NUM_WORDS": CAPACITY // 4, "UNIT": UNIT}
        return (self.buffers, self.calls, self.host_stop, self.device_stop), constants | launch_options(self.device)

    def fits_all_reduce(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_triton` takes `x` and is the fastest to sum it."""
        if x.dtype not in DTYPES or x.ndim != 2 or not x.is_contiguous():
            return False
        row_bytes = x.shape[1] * x.itemsize
        few = self.size == 2 or x.nbytes * (self.size - 1) <= MAX_ONE_SHOT_BYTES
        return few and row_bytes % 4 == 0 and 0 < row_bytes <= MAX_TOKEN_BYTES

    def fits_all_to_all(self, x: torch.Tensor) -> bool:
        """Whether `all_to_all_triton` takes `x`."""
        row_bytes, block_bytes = x.shape[1] * x.itemsize, 4 * ALL_TO_ALL_BLOCK
        num_blocks = triton.cdiv(len(x), self.size) * triton.cdiv(row_bytes, block_bytes)
        return num_blocks * block_bytes <= CAPACITY and row_bytes % 4 == 0 and x.is_contiguous()

    def stop(self) -> None:
        """End all waits of this rank here, and all that it writes later. Safe in any thread."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # these may have been made in that mode
            self.host_stop.fill_(1)
            self.device_stop.copy_(self.host_stop, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Give back the other ranks' memory. Waits for what this rank still runs, which must end without them."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        memory, self.memory, self.overlapped = self.memory, [], None
        with ExitStack() as stack:  # closes all even if one fails
            for part in memory:
                if isinstance(part, Mapping):
                    stack.callback(part.close)


def _buffer_words(ranks: int) -> int:
    """Size of [3, ranks - 1, words that each other rank sends]."""
    return 3 * (ranks - 1) * (CAPACITY // 4)


def new_peer_memory(ranks: int, device: torch.device, largest_sum: int = 0) -> torch.Tensor:
    """A rank's own part of a PeerMemory: buffers, and of two ranks an inbox if `largest_sum`, in bytes, needs one."""
    start = _buffer_words(ranks)
    inbox = inbox_words(largest_sum) if ranks == 2 else 0
    memory = torch.full((start + inbox,), _EMPTY, dtype=torch.int32, device=device)
    memory[start:].zero_()
    return memory


def all_reduce_triton(
    x: torch.Tensor,
    peers: PeerMemory,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum `x` over the ranks, in place; all ranks must make the same calls in the same order.

    Args:
        x: [T, N], for which `peers.fits_all_reduce(x)`.
        norm: weight [N] and epsilon of an RMSNorm of the sum.
        residual: [T, N], contiguous, the same on all ranks, or None; it is added to the sum, once.

    Returns:
        [T, N], the norm of the sum if there is one, a new tensor; else `x`.
    """
    words = x.shape[1] * x.itemsize // 4
    out = x if norm is None else torch.empty_like(x)
    weight, eps = (x, 0.0) if norm is None else norm
    block = max(UNIT, triton.next_power_of_2(words))
    pointers, constants = peers.launch_arguments()
    most = CAPACITY // 4 // (triton.cdiv(words, UNIT) * UNIT)
    addends = x if residual is None else residual
    for part, addend, out_part in zip(x.split(most), addends.split(most), out.split(most), strict=True):
        _all_reduce_kernel[(min(len(part), peers.max_programs),)](
            part.view(torch.int32),
            addend.view(torch.int32),
            weight.view(torch.int32),
            out_part.view(torch.int32),
            *pointers,
            len(part),
            eps,
            WORDS=words,
            BLOCK=block,
            DTYPE=DTYPES[x.dtype],
            ADD=residual is not None,
            NORM=norm is not None,
            num_warps=min(8 if len(part) <= peers.num_sms else 4, max(1, block // 256)),  # fewer where rows share an SM
            **constants,
        )
    return out


def rows_of_rank(rank: int, count: int, ranks: int) -> slice:
    """A rank's share of `count` rows; the last ranks' may be smaller, or empty."""
    share = -(-count // ranks)
    return slice(min(count, rank * share), min(count, (rank + 1) * share))


def all_to_all_triton(x: torch.Tensor, peers: PeerMemory) -> torch.Tensor:
    """The ranks' columns of all rows -> all columns of this rank's rows.

    A rank that gets no row gets four words of each other rank all the same: else it would be done without them, and
    what it sent in the call after this one could come while another still empties the place in the call before. One
    would do, but accesses are of 16 bytes only where the compiler knows that all bounds are multiples of that.

    Args:
        x: [R, N], for which `peers.fits_all_to_all(x)`.

    Returns:
        [S, ranks N], S of the rows: see `rows_of_rank`.
    """
    rows, words = len(x), x.shape[1] * x.itemsize // 4
    share, own = triton.cdiv(rows, peers.size), rows_of_rank(peers.rank, rows, peers.size)
    out = torch.empty((own.stop - own.start, peers.size * x.shape[1]), dtype=x.dtype, device=x.device)
    pointers, constants = peers.launch_arguments()
    items = share * triton.cdiv(words, ALL_TO_ALL_BLOCK)
    _all_to_all_kernel[(min(items, peers.max_programs),)](
        x.view(torch.int32),
        out.view(torch.int32),
        *pointers,
        rows,
        share,
        WORDS=words,
        BLOCK=ALL_TO_ALL_BLOCK,
        num_warps=8,
        **constants,
    )
    return out
