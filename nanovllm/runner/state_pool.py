"""The state of all layers: sized out of one budget, allocated, bound and freed together."""

import torch
from torch import nn

from nanovllm.layers.state import StatefulLayer


class StatePool:
    """The state that a model's layers ask for.

    Args:
        block_size: tokens of a KV block.
        device: where the state lives.

    Attributes:
        block_bytes: bytes of one block in all layers.
        kv_kinds: the different kinds of the layers' caches.
    """

    def __init__(self, model: nn.Module, block_size: int, device: torch.device):
        layers = [module for module in model.modules() if isinstance(module, StatefulLayer)]
        self.block_size, self.device = block_size, device
        self.layers = [(layer, layer.state_spec()) for layer in layers]
        self.block_bytes = sum(spec.block_bytes(block_size) for _, spec in self.layers)
        self.kv_kinds = tuple(sorted({spec.kind for _, spec in self.layers}))

    def blocks_in(self, num_bytes: int) -> int:
        """Return how many blocks the budget `num_bytes` holds."""
        return num_bytes // self.block_bytes

    def allocate(self, num_blocks: int) -> None:
        """Allocate blocks for all layers. The present ones are freed first."""
        self.free()
        for layer, spec in self.layers:
            layer.bind(spec.allocate(num_blocks, self.block_size, self.device))

    def free(self) -> None:
        """Free the state of all layers."""
        for layer, _ in self.layers:
            layer.bind(None)
