"""The state of all layers: sized out of one budget, allocated, bound and freed together."""

import torch
from torch import nn

from nanovllm.layers.state import PagedKVSpec, SlotStateSpec, StatefulLayer
from nanovllm.ops.gdn.copy_slots import copy_slots


class StatePool:
    """The state that a model's layers ask for.

    Slots are those of the running sequences, then the scratch slot, then snapshots.

    Args:
        block_size: tokens of a KV block.
        device: where the state lives.
        num_snapshots: slots that belong to no running sequence.

    Attributes:
        block_bytes: bytes of one KV block in all layers.
        slot_bytes: bytes of one slot in all layers; 0 if no layer has state by slot.
        kv_kinds: the different kinds of the layers' caches.
    """

    def __init__(self, model: nn.Module, block_size: int, device: torch.device, num_snapshots: int = 0):
        self.block_size, self.device, self.num_snapshots = block_size, device, num_snapshots
        self.paged: list[tuple[StatefulLayer, PagedKVSpec]] = []
        self.by_slot: dict[SlotStateSpec, list[StatefulLayer]] = {}
        self.layers = [module for module in model.modules() if isinstance(module, StatefulLayer)]
        for layer in self.layers:
            spec = layer.state_spec()
            if isinstance(spec, SlotStateSpec):
                self.by_slot.setdefault(spec, []).append(layer)
            else:
                self.paged.append((layer, spec))
        self.slot_tensors: list[torch.Tensor] = []
        self.block_bytes = sum(spec.block_bytes(block_size) for _, spec in self.paged)
        self.slot_bytes = sum(spec.slot_bytes * len(layers) for spec, layers in self.by_slot.items())
        self.kv_kinds = tuple(sorted({spec.kind for _, spec in self.paged}))

    def divide(self, num_bytes: int, max_num_seqs: int) -> tuple[int, int]:
        """Divide the budget `num_bytes`: return how many sequences can run at once, and the number of KV blocks.

        Slots take at most half of the budget, but at least one sequence can run.
        """
        if not self.slot_bytes:
            return max_num_seqs, num_bytes // self.block_bytes
        others = 1 + self.num_snapshots
        num_seqs = max(1, min(max_num_seqs, num_bytes // 2 // self.slot_bytes - others))
        rest = num_bytes - (num_seqs + others) * self.slot_bytes
        return num_seqs, max(0, rest) // self.block_bytes

    def allocate(self, num_blocks: int, num_seqs: int) -> None:
        """Allocate blocks, and slots for `num_seqs` running sequences. The present state is freed first."""
        self.free()
        for layer, spec in self.paged:
            layer.bind(spec.allocate(num_blocks, self.block_size, self.device))
        for spec, layers in self.by_slot.items():
            tensors = spec.allocate(len(layers), num_seqs + 1 + self.num_snapshots, self.device)
            self.slot_tensors += tensors
            for index, layer in enumerate(layers):
                layer.bind([tensor[index] for tensor in tensors])

    def copy_slots(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy slots in all layers.

        Args:
            sources, targets: [N] int32 or int64 on the device. No slot is both a source and a target.
        """
        for tensor in self.slot_tensors:
            copy_slots(tensor, sources, targets)

    def free(self) -> None:
        """Free the state of all layers."""
        self.slot_tensors.clear()
        for layer in self.layers:
            layer.bind(None)
