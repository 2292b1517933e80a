"""Steps as CUDA graphs: from the slots' inputs to the drawn tokens, one replay each."""

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm.engine.scheduler import Batch
from nanovllm.kernels.step_inputs import StepRows

if TYPE_CHECKING:
    from nanovllm.runner.model_runner import ModelRunner


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of decode steps that get a graph: 1, 2, 4, every 8, every 16 from 256 on, and the maximum itself."""
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 16), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def mixed_sizes(max_num_batched_tokens: int) -> list[int]:
    """Token counts of steps with prompt tokens that get a graph. Larger steps take the GPU longer than the host."""
    sizes = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    return [size for size in sizes if size <= max_num_batched_tokens]


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device for captures: cuBLAS keeps a workspace of 32 MiB for each stream it ever saw."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """Captures `ModelRunner.step` and replays it.

    A decode step is told its slots, and only when they change. A step with prompt tokens is told its rows; decode rows
    among them are attended as prompts of one token, so that one graph does for any mixture.

    Rows beyond the batch are given the scratch slot, whose state never advances.
    """

    def __init__(self, runner: "ModelRunner"):
        self.state, max_num_seqs = runner.state, runner.config.max_num_seqs
        self.pool, self.stream = torch.cuda.graph_pool_handle(), capture_stream(runner.device)
        self.slots = torch.full((max_num_seqs,), self.state.scratch_slot, dtype=torch.int32, device=runner.device)
        self.current: list[int] = []  # what `slots` holds
        self.decode: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.mixed: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, int, torch.Tensor]] = {}
        gc.collect()
        gc.disable()  # a collection during capture could free CUDA memory, which capture forbids
        try:
            if runner.backend.capturable_prefill:
                for size in reversed(mixed_sizes(runner.config.max_num_batched_tokens)):
                    self._capture_mixed(runner, size, min(size, max_num_seqs) + 1)
            for size in reversed(decode_sizes(max_num_seqs)):  # the largest first: the others fit in its memory
                slots = self.slots[:size]
                self.decode[size] = self._capture(lambda slots=slots: runner.step(slots, len(slots)))
        finally:
            gc.enable()
        torch.cuda.synchronize()

    def _capture_mixed(self, runner: "ModelRunner", num_tokens: int, num_rows: int) -> None:
        packed = torch.from_numpy(self.state.pack(Batch(), num_rows, num_tokens)).to(runner.device)
        rows = StepRows.split(packed, num_rows, num_tokens)
        graph, tokens = self._capture(lambda: runner.step(rows, 0, num_tokens, runner.max_model_len))
        self.mixed[num_tokens] = graph, tokens, num_rows, packed

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()  # compiles kernels and sets up libraries
            self.stream.synchronize()
            graph.capture_begin(pool=self.pool)
            tokens = run()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, tokens

    def fits(self, batch: Batch) -> bool:
        """Whether there is a graph that holds `batch`."""
        return not batch.chunks or batch.num_tokens <= max(self.mixed, default=0)

    def replay(self, batch: Batch) -> torch.Tensor:
        """Run `batch`; its rows' tokens, int64, valid until the next replay."""
        to_device = self.state.staging.to_device
        if batch.chunks:
            size = min(size for size in self.mixed if size >= batch.num_tokens)
            graph, tokens, num_rows, packed = self.mixed[size]
            packed.copy_(to_device(self.state.pack(batch, num_rows, size)))
        else:
            slots = batch.decode_slots
            graph, tokens = self.decode[min(size for size in self.decode if size >= len(slots))]
            if slots != self.current:
                padded = np.full(len(self.slots), self.state.scratch_slot, dtype=np.int32)
                padded[: len(slots)] = slots
                self.slots.copy_(to_device(padded))
                self.current = list(slots)
        graph.replay()
        return tokens[: batch.num_rows]
