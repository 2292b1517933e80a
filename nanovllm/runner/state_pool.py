"""The state of all layers: sized out of one budget, allocated, bound and freed together."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from nanovllm.layers.state import PagedKVSpec, SlotStateSpec, StatefulLayer
from nanovllm.ops.state.copy_slots import copy_slots

# Fraction of the memory left after the running sequences' slots that goes to snapshots. The rest is for KV blocks.
_SNAPSHOT_FRACTION = 0.2
# Bounds the snapshots for each running sequence where the memory would hold far more of them than can be of use.
_SNAPSHOTS_PER_SEQUENCE = 4


class StateSizes(NamedTuple):
    """How the memory for state is divided.

    Padding rows have a block and a slot of their own, the scratch ones, which come on top of these numbers.

    Args:
        num_blocks: KV blocks.
        num_seqs: sequences that run at once. Each has a slot.
        num_snapshots: further slots, which hold copies of recurrent state.
    """

    num_blocks: int
    num_seqs: int
    num_snapshots: int = 0

    @property
    def scratch_block(self) -> int:
        """The block of padding rows, after all others."""
        return self.num_blocks

    @property
    def num_slots(self) -> int:
        """Number of all slots: those of the sequences, the scratch slot, then those for snapshots."""
        return self.num_seqs + 1 + self.num_snapshots

    @property
    def snapshot_slots(self) -> range:
        """The slots for snapshots."""
        return range(self.num_seqs + 1, self.num_slots)


class StatePool:
    """The state that a model's layers ask for.

    Args:
        block_size: tokens of a KV block.
        device: where the state lives.
        kv_dtype: dtype of keys and values; None takes the dtype of each layer's specification.

    Attributes:
        block_bytes: bytes of one KV block in all layers.
        slot_bytes: bytes of one slot in all layers; 0 if no layer has state by slot.
        slot_classes: the classes of the layers that have state by slot.
        kv_kinds: the different kinds of the layers' caches.
    """

    def __init__(self, model: nn.Module, block_size: int, device: torch.device, kv_dtype: torch.dtype | None = None):
        self.block_size, self.device = block_size, device
        self.paged: list[tuple[StatefulLayer, PagedKVSpec]] = []
        self.by_slot: dict[SlotStateSpec, list[StatefulLayer]] = {}
        self.layers = [module for module in model.modules() if isinstance(module, StatefulLayer)]
        for layer in self.layers:
            spec = layer.state_spec()
            if isinstance(spec, SlotStateSpec):
                self.by_slot.setdefault(spec, []).append(layer)
            else:
                self.paged.append((layer, replace(spec, dtype=kv_dtype or spec.dtype)))
        self.slot_tensors: list[torch.Tensor] = []
        self.block_bytes = sum(spec.block_bytes(block_size) for _, spec in self.paged)
        self.slot_bytes = sum(spec.slot_bytes * len(layers) for spec, layers in self.by_slot.items())
        self.slot_classes = tuple(dict.fromkeys(type(layer) for layers in self.by_slot.values() for layer in layers))
        self.kv_kinds = tuple(sorted({spec.kind for _, spec in self.paged}))

    def divide(self, num_bytes: int, max_num_seqs: int, num_blocks: int | None, caches_prefixes: bool) -> StateSizes:
        """Divide the budget `num_bytes`.

        Running sequences' slots take at most half of it, but at least one sequence can run.

        Args:
            num_blocks: the configured number of KV blocks, not part of the budget; None for as many as fit.
            caches_prefixes: whether snapshots are wanted.
        """
        num_seqs = max_num_seqs
        num_snapshots = 0
        rest = num_bytes
        if self.slot_bytes:
            num_seqs = max(1, min(max_num_seqs, num_bytes // 2 // self.slot_bytes - 1))  # one is the scratch slot
            rest = max(0, num_bytes - (num_seqs + 1) * self.slot_bytes)
            if caches_prefixes:
                fitting = int(rest * _SNAPSHOT_FRACTION) // self.slot_bytes
                num_snapshots = min(fitting, _SNAPSHOTS_PER_SEQUENCE * num_seqs)
                rest -= num_snapshots * self.slot_bytes
        if num_blocks is None:
            num_blocks = rest // self.block_bytes
        return StateSizes(num_blocks, num_seqs, num_snapshots)

    def num_bytes(self, sizes: StateSizes) -> int:
        """Return the bytes that `allocate` takes."""
        return (sizes.scratch_block + 1) * self.block_bytes + sizes.num_slots * self.slot_bytes

    def allocate(self, sizes: StateSizes) -> None:
        """Allocate blocks and slots, with the scratch ones. The present state is freed first."""
        self.free()
        for layer, spec in self.paged:
            layer.bind(spec.allocate(sizes.scratch_block + 1, self.block_size, self.device))
        for spec, layers in self.by_slot.items():
            tensors = spec.allocate(len(layers), sizes.num_slots, self.device)
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
