"""The sum over the tensor-parallel ranks of one host in one launch, through each other's memory.

A decode step sums few bytes many times, twice a layer, so that latency decides: NCCL takes about 10 us for each. Here
every rank writes its numbers into all others' memory (one-shot all-reduce) and adds up what arrives, in the order of
the ranks, so that all have the same sum to the last bit. A message is 64 bits: 32 of data and the number of the call,
so that it announces its own arrival and needs no barrier (the "LL" protocol of NCCL).

    rank 0   write x0 to rank 1's buffer | wait for rank 1's words | x0 + x1
    rank 1   write x1 to rank 0's buffer | wait for rank 0's words | x0 + x1

Each word has two places, for even and odd calls: a rank that has all words of call n may send those of call n + 1 while
another still reads, and it cannot come to call n + 2 before that one has sent its own words of n + 1.
"""

import torch

from nanovllm.kernels._triton import launch_options, tl, triton, wait_for_inputs

BLOCK = 512  # words of a program; fixed, so that a place in the buffers is always written by the same program
MAX_BYTES = 1 << 20  # of a summand; with more, NCCL's bandwidth wins
NUM_WORDS = MAX_BYTES // 4  # 32 bits of data each


@triton.jit
def _low(data, DTYPE: tl.constexpr):
    """The first number of each 32-bit word, as float32."""
    if DTYPE.is_fp32():
        return data.to(tl.float32, bitcast=True)
    else:
        return (data & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(data, DTYPE: tl.constexpr):
    """The second number of each word of two."""
    return (data >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _bits(x, DTYPE: tl.constexpr):
    """float32 numbers rounded to a 16-bit type, in the lower half of a word."""
    return x.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _receive(place, mask, call, stop_ptr):
    """The data at `place`, once all of it is that of `call`; anything once the ranks are told to stop."""
    message = tl.load(place, mask=mask, other=0, volatile=True)
    waiting = tl.max(((message >> 32).to(tl.int32) != call).to(tl.int32) * mask.to(tl.int32), 0)
    while (waiting != 0) & (tl.load(stop_ptr, volatile=True) == 0):
        message = tl.load(place, mask=mask, other=0, volatile=True)
        waiting = tl.max(((message >> 32).to(tl.int32) != call).to(tl.int32) * mask.to(tl.int32), 0)
    return message.to(tl.int32)


@triton.jit
def _all_reduce_kernel(
    x_ptr,
    addresses_ptr,
    calls_ptr,
    stop_ptr,
    num_words,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    block = tl.program_id(0)
    call = tl.load(calls_ptr + block) + 1
    words = block * BLOCK + tl.arange(0, BLOCK)
    mask = words < num_words
    own = tl.load(x_ptr + words, mask=mask, other=0)
    message = (call.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    parity = (call & 1) * (SIZE * NUM_WORDS)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            buffer = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(buffer + parity + RANK * NUM_WORDS + words, message, mask=mask)
    buffer = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64))
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        data = own
        if peer != RANK:
            data = _receive(buffer + parity + peer * NUM_WORDS + words, mask, call, stop_ptr)
        low += _low(data, DTYPE)
        if not DTYPE.is_fp32():
            high += _high(data, DTYPE)
    if DTYPE.is_fp32():
        tl.store(x_ptr + words, low.to(tl.int32, bitcast=True), mask=mask)
    else:
        tl.store(x_ptr + words, _bits(low, DTYPE) | (_bits(high, DTYPE) << 16), mask=mask)
    tl.store(calls_ptr + block, call)


class PeerMemory:
    """Buffers of all ranks, which every rank can write.

    Args:
        rank: this rank's number.
        buffers: each rank's buffer [2, ranks, NUM_WORDS] int64, zeros at first.
    """

    def __init__(self, rank: int, buffers: list[torch.Tensor]):
        self.rank, self.size, self.buffers = rank, len(buffers), buffers
        self.device = device = buffers[rank].device
        self.addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64, device=device)
        self.calls = torch.zeros(triton.cdiv(NUM_WORDS, BLOCK), dtype=torch.int32, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def fits(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_triton` takes `x` and is the fastest to sum it."""
        return x.nbytes <= MAX_BYTES and x.nbytes % 4 == 0 and x.is_contiguous()

    def end(self) -> None:
        """End all sums on this rank, now and later: a rank they wait for may be gone. Safe in any thread."""
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream()):  # the others may never be free
            self.stop.copy_(self._one, non_blocking=True)


def new_buffer(size: int, device: torch.device) -> torch.Tensor:
    """A rank's own buffer for PeerMemory."""
    return torch.zeros((2, size, NUM_WORDS), dtype=torch.int64, device=device)


def share_buffer(buffer: torch.Tensor) -> list:
    """What another process on this host needs to `open_buffer`: strings and integers."""
    _, handle, num_bytes, offset, counter, counter_offset, *_ = buffer.untyped_storage()._share_cuda_()
    return [handle.hex(), num_bytes, offset, counter.hex(), counter_offset]


def open_buffer(shared: list, like: torch.Tensor) -> torch.Tensor:
    """Another process's buffer, mapped for the GPU of `like`; RuntimeError if that GPU cannot reach it."""
    handle, num_bytes, offset, counter, counter_offset = shared
    storage = torch.UntypedStorage._new_shared_cuda(
        like.device.index, bytes.fromhex(handle), num_bytes, offset, bytes.fromhex(counter), counter_offset, b"", False
    )
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, like.shape)


def all_reduce_triton(x: torch.Tensor, peers: PeerMemory) -> torch.Tensor:
    """Sum `x`, contiguous and of at most MAX_BYTES, over the ranks, in place; all must call this in the same order."""
    num_words = x.nbytes // 4
    _all_reduce_kernel[(triton.cdiv(num_words, BLOCK),)](
        x.view(torch.int32),
        peers.addresses,
        peers.calls,
        peers.stop,
        num_words,
        RANK=peers.rank,
        SIZE=peers.size,
        NUM_WORDS=NUM_WORDS,
        BLOCK=BLOCK,
        DTYPE={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype],
        num_warps=4,
        **launch_options(x.device),
    )
    return x
