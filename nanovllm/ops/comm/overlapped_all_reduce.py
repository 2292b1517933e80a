# pyright: reportPossiblyUnboundVariable=false
# Names in the kernel are bound under the same compile-time conditions under which they are read.
"""All-reduce of large tensors over two ranks, overlapped with their computation.

The all-reduce of a prompt's hidden states takes at least half as long as the GEMM that computes them. Each slice of the
result is copied to the other rank while the next slice is computed. Copy engines move the data, so all SMs compute:

    rank 0   compute slice 0 | compute slice 1         | ... | add slices, norm
    engine                   | copy slice 0 to rank 1  | copy slice 1 ...

A slice has arrived when a word that is written after it holds the number of the all-reduce.

An inbox has two halves, used alternately. When a rank sends all-reduce n + 2, the other rank has read n from that half:
it reads n before it sends n + 1, which the first rank has received. This holds only if each tensor that is sent is also
added. One that is not, such as hidden states that nobody reads, may leave wrong data in the inbox until the ranks wait
for each other in a later all-reduce.
"""

from collections.abc import Iterator

import torch

from nanovllm.ops.comm import cuda_ipc
from nanovllm.ops.dispatch import MAX_CAPTURED_TOKENS
from nanovllm.ops.norm_rope.rms_norm import normalize
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

MAX_BYTES = 256 << 20
MIN_BYTES = 16 << 20  # smaller tensors do not gain
MIN_TOKENS = MAX_CAPTURED_TOKENS + 1  # a captured step cannot count its all-reduces
NUM_SLICES = 4
TOKENS_PER_PROGRAM = 8  # whose sum a program computes; all belong to one slice
POLL_INTERVAL = tl.constexpr(1 << 16)  # pyright: ignore[reportCallIssue]  # tries: see `poll_host`


def inbox_words(largest: int) -> int:
    """Return the 32-bit words of an inbox for tensors of up to `largest` bytes: two tensors and the slices' words."""
    if largest < MIN_BYTES:
        return 0
    num_bytes = 2 * min(largest, MAX_BYTES)
    return num_bytes // 16 * 4 + NUM_SLICES  # whole 16 bytes, which are 4 words


@triton.jit
def poll_host(tries, host_stop_ptr, stop_ptr):
    """Copy the host's stop request to GPU memory, once in POLL_INTERVAL tries of a wait.

    Reads of host memory must be rare: they may be serialized, about 1 us each, and launches wait for them meanwhile
    (docs/benchmarks.md).
    """
    stop = tl.load(host_stop_ptr, mask=tries % POLL_INTERVAL == 0, other=0, volatile=True)
    tl.store(stop_ptr, 1, mask=stop != 0)


@triton.jit
def _wait_for_slice(words_ptr, index, number, host_stop_ptr, stop_ptr):
    """Wait until the slice's word holds the number of this all-reduce or a later one, or until a stop request."""
    # One thread of the program executes the atomic and broadcasts the result. So all threads see what was written
    # before the word, and all leave the loop together.
    distance = tl.atomic_add(words_ptr + index, 0, sem="acquire", scope="sys") - number
    stopped = 0
    tries = 0
    while (distance < 0) & (stopped == 0):
        distance = tl.atomic_add(words_ptr + index, 0, sem="acquire", scope="sys") - number
        stopped = tl.atomic_add(stop_ptr, 0, sem="acquire", scope="gpu")
        tries += 1
        poll_host(tries, host_stop_ptr, stop_ptr)


@triton.jit(do_not_specialize=["number", "num_tokens", "slice_tokens"])
def _add_kernel(
    x_ptr,
    inbox_ptr,
    arrived_ptr,
    departed_ptr,
    host_stop_ptr,
    stop_ptr,
    norm_ptr,
    out_ptr,
    number,
    num_tokens,
    slice_tokens,
    eps,
    TOKENS_PER_PROGRAM: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    dtype = x_ptr.dtype.element_ty
    wait_for_inputs(PDL)
    first = tl.program_id(0).to(tl.int64) * TOKENS_PER_PROGRAM
    # The sum overwrites x, so it must have been sent.
    _wait_for_slice(departed_ptr, first // slice_tokens, number, host_stop_ptr, stop_ptr)
    _wait_for_slice(arrived_ptr, first // slice_tokens, number, host_stop_ptr, stop_ptr)
    if NORM:
        norm = tl.load(norm_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    for i in range(TOKENS_PER_PROGRAM):
        mask = columns < tl.where(first + i < num_tokens, N, 0)
        offsets = (first + i) * N + columns
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = (x + tl.load(inbox_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(x_ptr + offsets, x, mask=mask)
        if NORM:  # takes the rounded sum
            normed = normalize(x.to(tl.float32), eps, N, norm_ptr.dtype.element_ty) * norm
            tl.store(out_ptr + offsets, normed.to(dtype), mask=mask)


class OverlappedAllReduce:
    """All-reduce between this rank and one other, in two parts: send slices as they are computed, then add.

    Args:
        inbox: this rank's inbox, `inbox_words` zeros of int32.
        other_inbox: address of the other rank's inbox, as this process sees it.
        host_stop: in host memory; nonzero once this rank must neither wait nor send any more.
        device_stop: the same in GPU memory, possibly set later.

    Attributes:
        pending: the tensor that was sent and not added yet.
        number: counts the all-reduces, modulo 2^32.
    """

    def __init__(self, inbox: torch.Tensor, other_inbox: int, host_stop: torch.Tensor, device_stop: torch.Tensor):
        self.inbox, self.other_inbox = inbox, other_inbox
        self.host_stop, self.device_stop = host_stop, device_stop
        self.arrived = inbox[-NUM_SLICES:]
        self.departed = torch.zeros(NUM_SLICES, dtype=torch.int32, device=inbox.device)
        self.capacity = (len(inbox) - NUM_SLICES) // 2 * 4  # bytes of a tensor
        self.number = 0
        self.pending: torch.Tensor | None = None
        self.stream = torch.cuda.Stream(inbox.device) if inbox.is_cuda else None

    def fits(self, x: torch.Tensor) -> bool:
        """Return whether to send `x` [T, N] while it is computed: it is large, fits the inbox, and is not captured."""
        has_size = len(x) >= MIN_TOKENS and MIN_BYTES <= x.nbytes <= self.capacity
        is_aligned = x.is_contiguous() and x.shape[1] * x.itemsize % 16 == 0  # fast for copy engines
        return has_size and is_aligned and not torch.cuda.is_current_stream_capturing()

    def slices(self, x: torch.Tensor) -> Iterator[slice]:
        """Yield slices of the tokens of `x` [T, N]. The caller computes each one before it asks for the next."""
        self.number = (self.number + 1 + (1 << 31)) % (1 << 32) - (1 << 31)  # add 1, wrapping around as an int32 does
        slice_tokens = _slice_tokens(x)
        for index, start in enumerate(range(0, len(x), slice_tokens)):
            tokens = slice(start, min(start + slice_tokens, len(x)))
            yield tokens
            self._send(x[tokens], start * x.shape[1] * x.itemsize, index)
        self.pending = x

    def _inbox_offset(self) -> int:
        """Return the start of this all-reduce's half of an inbox, in bytes."""
        return self.number % 2 * self.capacity

    def _send(self, x: torch.Tensor, offset: int, index: int) -> None:
        if self.host_stop.item() or self.stream is None:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        cuda_ipc.copy(self.other_inbox + self._inbox_offset() + offset, x.data_ptr(), x.nbytes, self.stream)
        cuda_ipc.write(self.other_inbox + 2 * self.capacity + 4 * index, self.number, self.stream)
        cuda_ipc.write(self.departed[index:].data_ptr(), self.number, self.stream)

    def finish(self, x: torch.Tensor, norm: tuple[torch.Tensor, float] | None = None) -> torch.Tensor:
        """Add the other rank's tensor to x, which must have been sent. Return x, or its RMSNorm as a new tensor."""
        out = x if norm is None else torch.empty_like(x)
        weight, eps = (x, 0.0) if norm is None else norm
        block = triton.next_power_of_2(x.shape[1])
        _add_kernel[(triton.cdiv(len(x), TOKENS_PER_PROGRAM),)](
            x,
            self.inbox[self._inbox_offset() // 4 :].view(x.dtype),
            self.arrived,
            self.departed,
            self.host_stop,
            self.device_stop,
            weight,
            out,
            self.number,
            len(x),
            _slice_tokens(x),
            eps,
            TOKENS_PER_PROGRAM=TOKENS_PER_PROGRAM,
            N=x.shape[1],
            BLOCK=block,
            NORM=norm is not None,
            num_warps=min(8, max(1, block // 512)),
            **launch_options(x.device),
        )
        return out


def _slice_tokens(x: torch.Tensor) -> int:
    """Return the tokens of each slice but the last, a multiple of TOKENS_PER_PROGRAM."""
    return triton.cdiv(triton.cdiv(len(x), NUM_SLICES), TOKENS_PER_PROGRAM) * TOKENS_PER_PROGRAM
