"""Snapshots of recurrent state: with one, a sequence can start after a cached prefix. No torch here.

Layers with recurrent state keep one state per sequence, and overwrite it with each token. So the KV blocks of a prefix
are of use only up to a block boundary whose state was copied. A snapshot is such a copy. It belongs to the block that
ends at the boundary, and is dropped with it.
"""

from collections import OrderedDict
from collections.abc import Iterable

from nanovllm.engine.sequence import Placement
from nanovllm.messages import Batch

# Least distance between two snapshots of a sequence, in blocks. Denser snapshots would gain nothing: a step of a few
# hundred tokens takes no longer than a step of one token, because both read all weights.
MIN_SNAPSHOT_BLOCKS = 4


class Snapshots:
    """Decides where snapshots are taken, and owns the state slots that hold them.

    A snapshot is taken at three kinds of block boundary: the last one in the prompt, the one where the prompt diverges
    from a cached prefix, and every few blocks of output. Of the last kind, a sequence keeps only the newest one, unless
    another sequence has started from it. Two snapshots of a sequence are at least `min_blocks` apart.

    A snapshot's slot has one owner at a time:

    1. `free_slots`, until `take` gives it to the placement whose state the step saves (`new_snapshot`).
    2. The placement, until its block enters the prefix index: `attach` then gives it to that block. `discard` frees it
       if the sequence ends before that.
    3. The block (`slot_of`), until the block leaves the index, a newer snapshot of the same decoding sequence replaces
       it, or it is the longest unused one when another is needed (`drop`).

    Args:
        slots: ids of the state slots for snapshots.
        block_size: tokens per block.
        min_blocks: least number of blocks between two snapshots of a sequence.
    """

    def __init__(self, slots: Iterable[int], block_size: int, min_blocks: int = MIN_SNAPSHOT_BLOCKS):
        self.free_slots = list(slots)
        self.block_size = block_size
        self.min_tokens = min_blocks * block_size
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # by block id; front: longest unused
        # Blocks whose snapshot the decoding sequence that took it may replace: no other sequence has started from it.
        self.replaceable: set[int] = set()
        self.saving: set[int] = set()  # slots that the step which is being scheduled writes at its end

    def start_step(self) -> None:
        """Start to schedule a step. It can load the snapshots that earlier steps save."""
        self.saving.clear()

    def find(self, block_ids: list[int]) -> tuple[list[int], int | None]:
        """Return the blocks of a cached prefix that come before its last snapshot, and the snapshot's slot."""
        for i in range(len(block_ids), 0, -1):
            slot = self.slot_of.get(block_ids[i - 1])
            if slot is not None:
                return block_ids[:i], slot
        return [], None

    def start(self, placement: Placement, cached: list[int], num_shared: int, num_tokens: int) -> None:
        """Plan the snapshots of a new sequence.

        Args:
            cached: ids of the cached blocks that hold its first tokens.
            num_shared: how many of these tokens come before the snapshot from which it starts.
            num_tokens: how many of its tokens are known.
        """
        if num_shared:
            block_id = cached[num_shared // self.block_size - 1]
            self.slot_of.move_to_end(block_id)
            self.replaceable.discard(block_id)
        placement.last_snapshot = num_shared
        last = num_shared
        # One token is left to compute: a prompt that is equal to this one cannot use its last block in full.
        for position in (len(cached) * self.block_size, (num_tokens - 1) // self.block_size * self.block_size):
            if position - last >= self.min_tokens:
                placement.planned_snapshots.append(position)
                last = position

    def limit(self, placement: Placement, num_new: int) -> int:
        """Return how many of the next `num_new` tokens come before the next planned snapshot."""
        if not placement.planned_snapshots:
            return num_new
        return min(num_new, placement.planned_snapshots[0] - placement.num_computed)

    def take(self, placement: Placement, batch: Batch) -> None:
        """Let the step save the state after the computed tokens of `placement`, if a snapshot is due."""
        position = placement.num_computed
        planned = placement.planned_snapshots
        if planned and planned[0] == position:
            planned.pop(0)
        elif not self._is_due(placement):
            return
        self.discard(placement)
        if placement.is_decoding and placement.snapshot_block in self.replaceable:
            self.drop(placement.snapshot_block)
        slot = self._allocate()
        if slot is not None:
            self.saving.add(slot)
            batch.state_saves.append((placement.slot, slot))
            placement.last_snapshot = position
            placement.new_snapshot = slot

    def _is_due(self, placement: Placement) -> bool:
        """Whether a decoding sequence needs another snapshot now."""
        position = placement.num_computed
        is_boundary = placement.is_decoding and position % self.block_size == 0
        return is_boundary and position - placement.last_snapshot >= self.min_tokens

    def attach(self, placement: Placement, block_id: int) -> None:
        """Give the new snapshot of `placement` to the block in the prefix index that ends there."""
        slot, placement.new_snapshot = placement.new_snapshot, None
        if slot is None:
            return
        if block_id in self.slot_of:  # another sequence with the same tokens has taken a snapshot
            self.free_slots.append(slot)
            return
        self.slot_of[block_id] = slot
        placement.snapshot_block = block_id
        if placement.is_decoding:
            self.replaceable.add(block_id)

    def discard(self, placement: Placement) -> None:
        """Free the new snapshot of `placement`, whose block did not enter the prefix index."""
        if placement.new_snapshot is not None:
            self.free_slots.append(placement.new_snapshot)
            placement.new_snapshot = None

    def drop(self, block_id: int) -> None:
        """Free the snapshot of a block, if it has one."""
        slot = self.slot_of.pop(block_id, None)
        if slot is not None:
            self.free_slots.append(slot)
            self.replaceable.discard(block_id)

    def _allocate(self) -> int | None:
        """Return a slot for a snapshot, the longest unused one if none is free; None if this step saves to all."""
        for i, slot in enumerate(self.free_slots):
            if slot not in self.saving:
                return self.free_slots.pop(i)
        for block_id, slot in self.slot_of.items():
            if slot not in self.saving:
                self.drop(block_id)
                return self.free_slots.pop()
        return None
