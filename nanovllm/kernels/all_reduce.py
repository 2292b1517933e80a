"""The sum over the tensor-parallel ranks of one host in one launch, through each other's memory.

A decode step sums few bytes many times, twice a layer, so that latency decides: NCCL takes 12 us for the least of them.
Here every rank writes its numbers into all others' memory (one-shot all-reduce) and adds up what arrives, in the order
of the ranks, so that all have the same sum to the last bit.

    rank 0   write x0 to rank 1's buffer | wait for rank 1's | x0 + x1
    rank 1   write x1 to rank 0's buffer | wait for rank 0's | x0 + x1

How a rank knows that something has arrived is NCCL's two protocols:

    few bytes    ("LL") a message is 64 bits, 32 of data and the number of the call: it announces itself
    more         ("Simple") data alone; a flag with the number of the call follows once the data is there

A program writes, and waits for, the same block of numbers on every rank. A block has two places, for even and odd
calls: a rank that has all of call n may send its part of call n + 1 while another still reads, and it cannot come to
call n + 2 before that one has sent its own part of n + 1.
"""

from typing import NamedTuple

import torch

from nanovllm.kernels._triton import launch_options, tl, triton, wait_for_inputs


class Protocol(NamedTuple):
    """One of the two ways.

    Args:
        max_bytes: of a summand, times the ranks it is sent to; chosen by measurements on two H100 (see README.md).
        block: 32-bit words of data of a program. Fixed: each place in the buffers is only ever written by one program.
        width: bits of a message.
    """

    max_bytes: int
    block: int
    width: int
    num_warps: int

    @property
    def num_words(self) -> int:
        """Words of data that a buffer holds."""
        return self.max_bytes // 4

    @property
    def num_blocks(self) -> int:
        return self.num_words // self.block


LL = Protocol(1 << 17, 512, 64, 4)
SIMPLE = Protocol(1 << 22, 2048, 32, 8)


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
    """The data of the messages at `place`, once all are of `call`; anything once the ranks are told to stop."""
    message = tl.load(place, mask=mask, other=0, volatile=True)
    missing = tl.max(((message >> 32).to(tl.int32) != call).to(tl.int32) * mask.to(tl.int32), 0)
    while (missing != 0) & (tl.load(stop_ptr, volatile=True) == 0):
        message = tl.load(place, mask=mask, other=0, volatile=True)
        missing = tl.max(((message >> 32).to(tl.int32) != call).to(tl.int32) * mask.to(tl.int32), 0)
    return message.to(tl.int32)


@triton.jit
def _await(flag_ptr, call, stop_ptr):
    """Return once the flag is that of `call`, with all that was written before it; or when told to stop."""
    flag = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    while (flag != call) & (tl.load(stop_ptr, volatile=True) == 0):
        flag = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")


@triton.jit
def _all_reduce_kernel(
    x_ptr,
    buffers_ptr,
    flags_ptr,
    calls_ptr,
    stop_ptr,
    num_words,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LL: tl.constexpr,
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
    places = (call & 1) * (SIZE * NUM_WORDS) + words  # of rank 0's words; those of the others follow
    flags = (call & 1) * (SIZE * (NUM_WORDS // BLOCK)) + block
    MESSAGE: tl.constexpr = tl.int64 if LL else tl.int32
    message = ((call.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)) if LL else own
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            buffer = tl.multiple_of(tl.load(buffers_ptr + peer).to(tl.pointer_type(MESSAGE)), 16)
            tl.store(buffer + places + RANK * NUM_WORDS, message, mask=mask)
    if not LL:
        tl.debug_barrier()  # the flags follow what all threads have written
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                flag_ptr = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32))
                tl.atomic_xchg(flag_ptr + flags + RANK * (NUM_WORDS // BLOCK), call, sem="release", scope="sys")
    buffer = tl.multiple_of(tl.load(buffers_ptr + RANK).to(tl.pointer_type(MESSAGE)), 16)
    flag_ptr = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32))
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        data = own
        if peer != RANK:
            if LL:
                data = _receive(buffer + places + peer * NUM_WORDS, mask, call, stop_ptr)
            else:
                _await(flag_ptr + flags + peer * (NUM_WORDS // BLOCK), call, stop_ptr)
                data = tl.load(buffer + places + peer * NUM_WORDS, mask=mask, other=0, cache_modifier=".cg")
        low += _low(data, DTYPE)
        if not DTYPE.is_fp32():
            high += _high(data, DTYPE)
    if DTYPE.is_fp32():
        tl.store(x_ptr + words, low.to(tl.int32, bitcast=True), mask=mask)
    else:
        tl.store(x_ptr + words, _bits(low, DTYPE) | (_bits(high, DTYPE) << 16), mask=mask)
    tl.store(calls_ptr + block, call)


class Channel:
    """What one protocol needs of every rank.

    Args:
        memory: each rank's buffer, int32 zeros at first: [2, ranks, num_words] messages, [2, ranks, num_blocks] flags.
    """

    def __init__(self, protocol: Protocol, memory: list[torch.Tensor], device: torch.device):
        flags = 2 * len(memory) * protocol.num_words * protocol.width // 32
        self.protocol = protocol
        self.buffers, self.flags = (
            torch.tensor([part.data_ptr() + 4 * place for part in memory], dtype=torch.int64, device=device)
            for place in (0, flags)
        )
        self.calls = torch.zeros(protocol.num_blocks, dtype=torch.int32, device=device)

    @staticmethod
    def size(protocol: Protocol, ranks: int) -> int:
        """Numbers in a rank's buffer."""
        return 2 * ranks * (protocol.num_words * protocol.width // 32 + protocol.num_blocks)


class PeerMemory:
    """Memory of all ranks that every rank can write.

    Args:
        rank: this rank's number.
        memory: each rank's, from `new_memory`, as this process sees it.
    """

    def __init__(self, rank: int, memory: list[torch.Tensor]):
        self.rank, self.size, self.memory = rank, len(memory), memory
        self.device = memory[rank].device
        sizes = [Channel.size(protocol, self.size) for protocol in (LL, SIMPLE)]
        parts = zip(*(whole.split(sizes) for whole in memory), strict=True)
        self.ll, self.simple = (
            Channel(protocol, list(part), self.device) for protocol, part in zip((LL, SIMPLE), parts, strict=True)
        )
        self.stop = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def fits(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_triton` takes `x` and is the fastest to sum it."""
        return x.nbytes * (self.size - 1) <= SIMPLE.max_bytes and x.nbytes % 4 == 0 and x.is_contiguous()

    def end(self) -> None:
        """End all sums on this rank, now and later: a rank they wait for may be gone. Safe in any thread."""
        stream = torch.cuda.Stream(self.device)  # the others may never be free
        with torch.inference_mode(), torch.cuda.stream(stream):  # `stop` may have been made in that mode
            self.stop.copy_(self._one, non_blocking=True)


def new_memory(ranks: int, device: torch.device) -> torch.Tensor:
    """A rank's own part of a PeerMemory."""
    num_words = sum(Channel.size(protocol, ranks) for protocol in (LL, SIMPLE))
    return torch.zeros(num_words, dtype=torch.int32, device=device)


def share_memory(memory: torch.Tensor) -> list:
    """What another process on this host needs to `open_memory`: strings and integers."""
    _, handle, num_bytes, offset, counter, counter_offset, *_ = memory.untyped_storage()._share_cuda_()
    return [handle.hex(), num_bytes, offset, counter.hex(), counter_offset]


def open_memory(shared: list, like: torch.Tensor) -> torch.Tensor:
    """Another process's part, mapped for the GPU of `like`; RuntimeError if that GPU cannot reach it."""
    handle, num_bytes, offset, counter, counter_offset = shared
    storage = torch.UntypedStorage._new_shared_cuda(
        like.device.index, bytes.fromhex(handle), num_bytes, offset, bytes.fromhex(counter), counter_offset, b"", False
    )
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, like.shape)


def all_reduce_triton(x: torch.Tensor, peers: PeerMemory) -> torch.Tensor:
    """Sum `x` over the ranks, in place; all ranks must make the same calls in the same order.

    Args:
        x: any float dtype; `peers.fits(x)` must hold.
    """
    num_words, few = x.nbytes // 4, x.nbytes * (peers.size - 1) <= LL.max_bytes
    channel = peers.ll if few else peers.simple
    protocol = channel.protocol
    _all_reduce_kernel[(triton.cdiv(num_words, protocol.block),)](
        x.view(-1).view(torch.int32),
        channel.buffers,
        channel.flags,
        channel.calls,
        peers.stop,
        num_words,
        RANK=peers.rank,
        SIZE=peers.size,
        LL=few,
        NUM_WORDS=protocol.num_words,
        BLOCK=protocol.block,
        DTYPE={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype],
        num_warps=protocol.num_warps,
        **launch_options(x.device),
    )
    return x
