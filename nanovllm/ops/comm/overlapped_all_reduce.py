"""Large sums over two ranks: each part is on its way to the other while the next is still computed.

The sum of a prompt's rows takes half as long as the product that makes them, or longer. Copy engines move the parts
meanwhile, so that all multiprocessors multiply:

    rank 0   multiply part 0 | multiply part 1        | ... | add parts, norm
    engine                   | copy part 0 to rank 1  | copy part 1 ...

A part has arrived when the number of the sum stands in a word that is written after it. An inbox has room for two sums,
taken in turn. A rank that writes the sum after the next has all of the next from the other one, which had read its
whole inbox before it sent that. (What is sent and never added, as hidden states that nobody reads, is garbage in an
inbox until ranks meet in another sum.)
"""

from collections.abc import Iterator

import torch

from nanovllm.ops.comm import cuda_ipc
from nanovllm.ops.linear.dispatch import MAX_CAPTURED_TOKENS
from nanovllm.ops.norm_rope.rms_norm import normalize
from nanovllm.ops.triton_utils import launch_options, tl, triton, wait_for_inputs

MAX_BYTES = 256 << 20  # bytes of the largest sum
MIN_BYTES = 16 << 20  # bytes of the smallest that is worth it
MIN_TOKENS = MAX_CAPTURED_TOKENS + 1  # a captured step cannot count its all-reduces
NUM_SLICES = 4
TOKENS_PER_PROGRAM = 8  # for a program; all are of one part
POLL_INTERVAL = tl.constexpr(1 << 16)  # tries: see `poll_host`


def inbox_words(largest: int) -> int:
    """32-bit words of an inbox for sums of up to `largest` bytes: two sums, then what tells that parts are there."""
    return 2 * min(largest, MAX_BYTES) // 16 * 4 + NUM_SLICES if largest >= MIN_BYTES else 0


@triton.jit
def poll_host(tries, host_stop_ptr, stop_ptr):
    """In a wait that is long: bring to `stop`, in the GPU's memory, what the host tells this rank in its own.

    Seldom: a GPU may read the host's memory one word after the other, 1 us each, and launches wait for it meanwhile.
    When ranks on two H100 asked every 256 tries, a step took 55 ms instead of 5.
    """
    stop = tl.load(host_stop_ptr, mask=tries % POLL_INTERVAL == 0, other=0, volatile=True)
    tl.store(stop_ptr, 1, mask=stop != 0)


@triton.jit
def _wait_for_slice(words_ptr, part, number, host_stop_ptr, stop_ptr):
    """Wait until the word of the part tells of this sum, or of the next one; or until this rank is told to stop."""
    # A program's atomics are one thread's, which tells the others: they see what was written before, and go on as one.
    distance = tl.atomic_add(words_ptr + part, 0, sem="acquire", scope="sys") - number
    stopped = 0
    tries = 0
    while (distance < 0) & (stopped == 0):
        distance = tl.atomic_add(words_ptr + part, 0, sem="acquire", scope="sys") - number
        stopped = tl.atomic_add(stop_ptr, 0, sem="acquire", scope="gpu")
        tries += 1
        poll_host(tries, host_stop_ptr, stop_ptr)


@triton.jit(do_not_specialize=["number", "rows", "part_rows"])
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
    rows,
    part_rows,
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
    _wait_for_slice(
        departed_ptr, first // part_rows, number, host_stop_ptr, stop_ptr
    )  # the sum takes the place of what is sent
    _wait_for_slice(arrived_ptr, first // part_rows, number, host_stop_ptr, stop_ptr)
    if NORM:
        norm = tl.load(norm_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    for row in range(TOKENS_PER_PROGRAM):
        mask = columns < tl.where(first + row < rows, N, 0)
        places = (first + row) * N + columns
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        x = (x + tl.load(inbox_ptr + places, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(x_ptr + places, x, mask=mask)
        if NORM:  # of the rounded sum
            normed = normalize(x.to(tl.float32), eps, N, dtype) * norm
            tl.store(out_ptr + places, normed.to(dtype), mask=mask)


class OverlappedAllReduce:
    """What a rank needs to sum with the other one.

    Args:
        inbox: this rank's, `inbox_words` zeros of int32.
        other_inbox: address of the other's, as this process sees it.
        host_stop: in the host's memory, not 0 once no part may be waited for, nor sent, any more.
        device_stop: the same in the GPU's, which may hear of it later.
    """

    def __init__(self, inbox: torch.Tensor, other_inbox: int, host_stop: torch.Tensor, device_stop: torch.Tensor):
        self.inbox, self.other_inbox, self.host_stop, self.device_stop = inbox, other_inbox, host_stop, device_stop
        self.arrived, self.departed = (
            inbox[-NUM_SLICES:],
            torch.zeros(NUM_SLICES, dtype=torch.int32, device=inbox.device),
        )
        self.capacity = (len(inbox) - NUM_SLICES) // 2 * 4  # bytes of a sum
        self.number = 0  # of the sum
        self.pending: torch.Tensor | None = None  # what of it has been sent
        self.stream = torch.cuda.Stream(inbox.device) if inbox.is_cuda else None

    def fits(self, x: torch.Tensor) -> bool:
        """Whether `x` [T, N] is to be sent ahead: it is large enough, there is room, and calls can be counted."""
        fits = len(x) >= MIN_TOKENS and MIN_BYTES <= x.nbytes <= self.capacity
        whole = x.is_contiguous() and x.shape[1] * x.itemsize % 16 == 0  # as copy engines like it
        return fits and whole and not torch.cuda.is_current_stream_capturing()

    def slices(self, x: torch.Tensor) -> Iterator[slice]:
        """Rows of `x` [T, N], part after part: each is sent when the next is asked for, and must be computed then."""
        self.number = (self.number + 1 + (1 << 31)) % (1 << 32) - (1 << 31)
        size = _part_rows(x)
        for part, start in enumerate(range(0, len(x), size)):
            rows = slice(start, min(start + size, len(x)))
            yield rows
            self._send(x[rows], start * x.shape[1] * x.itemsize, part)
        self.pending = x

    def _half(self) -> int:
        """Where the sum's half of an inbox begins, in bytes."""
        return self.number % 2 * self.capacity

    def _send(self, x: torch.Tensor, offset: int, part: int) -> None:
        if self.host_stop.item():
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        cuda_ipc.copy(self.other_inbox + self._half() + offset, x.data_ptr(), x.nbytes, self.stream)
        cuda_ipc.write(self.other_inbox + 2 * self.capacity + 4 * part, self.number, self.stream)
        cuda_ipc.write(self.departed[part:].data_ptr(), self.number, self.stream)

    def finish(self, x: torch.Tensor, norm: tuple[torch.Tensor, float] | None = None) -> torch.Tensor:
        """Add to x, which was `sent`, what the other sent, and return it; or its RMSNorm, as `all_reduce_triton`."""
        out = x if norm is None else torch.empty_like(x)
        weight, eps = (x, 0.0) if norm is None else norm
        half = self.inbox[self._half() // 4 :].view(x.dtype)
        words = self.arrived, self.departed, self.host_stop, self.device_stop
        block = triton.next_power_of_2(x.shape[1])
        _add_kernel[(triton.cdiv(len(x), TOKENS_PER_PROGRAM),)](
            x,
            half,
            *words,
            weight,
            out,
            self.number,
            len(x),
            _part_rows(x),
            eps,
            TOKENS_PER_PROGRAM=TOKENS_PER_PROGRAM,
            N=x.shape[1],
            BLOCK=block,
            NORM=norm is not None,
            num_warps=min(8, max(1, block // 512)),
            **launch_options(x.device),
        )
        return out


def _part_rows(x: torch.Tensor) -> int:
    """Rows of each part but the last, of which a program has only one part's."""
    return triton.cdiv(triton.cdiv(len(x), NUM_SLICES), TOKENS_PER_PROGRAM) * TOKENS_PER_PROGRAM
