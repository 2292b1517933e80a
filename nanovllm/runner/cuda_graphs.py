"""The decode step as CUDA graphs, one for each batch-size bucket."""

import gc
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from nanovllm.runner.model_runner import ModelRunner


def buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then every 8, and the maximum itself."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


class DecodeGraphs:
    """Captures `ModelRunner.decode`, from the slots' inputs to the sampled tokens, and replays it.

    Rows beyond the batch are given the scratch slot, whose state never advances.
    """

    def __init__(self, runner: "ModelRunner"):
        self.state = runner.state
        self.sizes = buckets(runner.config.max_num_seqs)
        self.slots = torch.full((self.sizes[-1],), self.state.scratch_slot, dtype=torch.int32, device=runner.device)
        self.current: list[int] = []  # what `slots` holds
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = None
        gc.collect()
        gc.disable()  # a collection during capture could free CUDA memory, which capture forbids
        try:
            for size in reversed(self.sizes):  # the largest first: the smaller ones fit in its memory
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    runner.decode(self.slots[:size])  # compiles kernels and sets up libraries
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    tokens = runner.decode(self.slots[:size])
                pool = pool or graph.pool()
                self.graphs[size] = graph, tokens
        finally:
            gc.enable()
        torch.cuda.synchronize()

    def replay(self, slots: list[int]) -> torch.Tensor:
        """Run one decode step for `slots`; their tokens [len(slots)] int64, valid until the next replay."""
        size = next(size for size in self.sizes if size >= len(slots))
        if slots != self.current:
            padded = np.full(self.sizes[-1], self.state.scratch_slot, dtype=np.int32)
            padded[: len(slots)] = slots
            self.slots.copy_(self.state.staging.to_device(padded))
            self.current = list(slots)
        graph, tokens = self.graphs[size]
        graph.replay()
        return tokens[: len(slots)]
