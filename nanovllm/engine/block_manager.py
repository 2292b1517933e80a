"""Paged KV blocks: who owns which, and which full blocks can be shared. No torch here."""

import struct
from collections import OrderedDict
from dataclasses import dataclass
from itertools import takewhile

import xxhash

from nanovllm.arithmetic import ceil_div
from nanovllm.engine.sequence import Placement, PrefixUid, Sequence
from nanovllm.engine.snapshots import Snapshots


@dataclass(slots=True)
class Block:
    """One block of the KV cache.

    Args:
        ref_count: how many sequences own the block.
        uid: identifies the block's content and is never used again; 0 if the block is not in the prefix index. A block
            stores its parent's uid, so a hash collision cannot mix up two prefixes.
        hash: hash of all tokens up to the block's end.
        parent_uid: uid of the prefix before it. A cache salt is a string there, so it equals no block's uid.
        token_ids: the tokens whose KV it holds.
    """

    ref_count: int = 0
    uid: int = 0
    hash: int = 0
    parent_uid: PrefixUid = 0
    token_ids: tuple[int, ...] = ()


class BlockManager:
    """Allocates blocks, counts references, and finds shared prefixes.

    A block whose count falls to 0 goes to the end of the free list but keeps its content until it is allocated again
    from the front (LRU). Until then a request with the same prefix can share it.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens per block.
        enable_prefix_caching: whether full blocks enter the prefix index.
        snapshots: snapshots of recurrent state; None if the model has no such state, or prefixes are not cached.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        snapshots: Snapshots | None = None,
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.snapshots = snapshots
        self.blocks = [Block() for _ in range(num_blocks)]
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # front: longest unused
        self.hash_to_block_id: dict[int, int] = {}  # the prefix index: hash of a prefix -> id of its last block
        self.last_uid = 0

    @property
    def num_free(self) -> int:
        return len(self.free_block_ids)

    def num_missing(self, placement: Placement, num_tokens: int) -> int:
        """Return how many more blocks `placement` needs to hold `num_tokens` tokens."""
        num_uncovered = num_tokens - len(placement.block_table) * self.block_size
        return ceil_div(num_uncovered, self.block_size) if num_uncovered > 0 else 0

    def can_start(self, shared: list[int], num_tokens: int, reserve: int) -> bool:
        """Return whether a new sequence that shares the blocks `shared` can hold `num_tokens` tokens.

        Args:
            reserve: how many blocks must stay free.
        """
        num_new = ceil_div(num_tokens, self.block_size) - len(shared)
        num_unused = sum(self.blocks[block_id].ref_count == 0 for block_id in shared)  # these leave the free list
        return num_new + num_unused + reserve <= self.num_free

    def allocate(self, placement: Placement, num_tokens: int) -> None:
        """Extend `placement` to hold `num_tokens` tokens. The pool must have enough free blocks."""
        for _ in range(self.num_missing(placement, num_tokens)):
            block_id, _ = self.free_block_ids.popitem(last=False)
            self._remove_from_index(block_id)
            self.blocks[block_id].ref_count = 1
            placement.block_table.append(block_id)

    def free(self, placement: Placement) -> None:
        """Release all blocks of `placement`, the last first, so that the end of a prefix is evicted first."""
        for block_id in reversed(placement.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_block_ids[block_id] = None
        placement.block_table.clear()
        if self.snapshots:
            self.snapshots.discard(placement)

    def find_prefix(self, seq: Sequence) -> list[int]:
        """Return the cached blocks that `seq`'s tokens start with. At least one token is left to compute.

        A sequence that waits for room asks in every step, and hashing a long prompt takes milliseconds. So it starts
        from what it has found before, as far as these blocks still have the same uid.
        """
        if not self.enable_prefix_caching:
            return []
        found = list(takewhile(self._is_unchanged, seq.found_prefix))
        seq.found_prefix = found  # the loop below appends to it
        prefix_hash, parent_uid = _empty_prefix(seq)
        if found:
            prefix_hash = self.blocks[found[-1][0]].hash
            parent_uid = found[-1][1]
        for i in range(len(found), (len(seq.token_ids) - 1) // self.block_size):
            token_ids = self._block_tokens(seq, i)
            prefix_hash = _chain(prefix_hash, token_ids)
            block_id = self._lookup(prefix_hash, parent_uid, token_ids)
            if block_id is None:
                break
            parent_uid = self.blocks[block_id].uid
            found.append((block_id, parent_uid))
        return [block_id for block_id, _ in found]

    def share(self, seq: Sequence, placement: Placement, shared: list[int]) -> None:
        """Start an empty `placement` of `seq` with these cached blocks."""
        seq.found_prefix = []
        for block_id in shared:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del self.free_block_ids[block_id]
            block.ref_count += 1
        placement.block_table.extend(shared)
        placement.num_registered = len(shared)
        placement.num_computed = len(shared) * self.block_size
        placement.prefix_hash, placement.prefix_uid = _empty_prefix(seq)
        if shared:
            last = self.blocks[shared[-1]]
            placement.prefix_hash, placement.prefix_uid = last.hash, last.uid

    def register(self, seq: Sequence, placement: Placement) -> None:
        """Add `seq`'s full blocks to the prefix index.

        A block can be shared as soon as the step that fills it is scheduled: the device runs steps in order, and within
        a step every layer writes all keys and values before it attends.
        """
        if not self.enable_prefix_caching:
            return
        # Most calls stop here: every row of every step calls this, and few rows fill a block.
        if placement.num_computed < (placement.num_registered + 1) * self.block_size:
            return
        # Pending tokens count as computed, but the host does not know their ids yet.
        num_full = min(placement.num_computed, len(seq.token_ids)) // self.block_size
        for i in range(placement.num_registered, num_full):
            token_ids = self._block_tokens(seq, i)
            placement.prefix_hash = _chain(placement.prefix_hash, token_ids)
            # If the index has an equal block already, that stays the shared one. The sequence keeps its own copy, and
            # its next block is registered as a child of the shared one.
            block_id = self._lookup(placement.prefix_hash, placement.prefix_uid, token_ids)
            if block_id is None:
                block_id = placement.block_table[i]
                self._add_to_index(block_id, placement, token_ids)
            placement.prefix_uid = self.blocks[block_id].uid
            placement.num_registered = i + 1
            # The newest snapshot ends with this block. It is attached once.
            if self.snapshots and placement.last_snapshot == placement.num_registered * self.block_size:
                self.snapshots.attach(placement, block_id)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix index. Sequences keep their blocks, but no other will share them."""
        for block_id in range(self.num_blocks):
            self._remove_from_index(block_id)

    def _is_unchanged(self, found: tuple[int, int]) -> bool:
        """Return whether a block still has the content that it had when it was found: (block id, uid)."""
        block_id, uid = found
        return self.blocks[block_id].uid == uid

    def _block_tokens(self, seq: Sequence, i: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[i * self.block_size : (i + 1) * self.block_size])

    def _lookup(self, prefix_hash: int, parent_uid: PrefixUid, token_ids: tuple[int, ...]) -> int | None:
        block_id = self.hash_to_block_id.get(prefix_hash)
        if block_id is None:
            return None
        block = self.blocks[block_id]
        return block_id if block.parent_uid == parent_uid and block.token_ids == token_ids else None

    def _add_to_index(self, block_id: int, placement: Placement, token_ids: tuple[int, ...]) -> None:
        block = self.blocks[block_id]
        self.last_uid += 1
        block.uid = self.last_uid
        block.hash = placement.prefix_hash
        block.parent_uid = placement.prefix_uid
        block.token_ids = token_ids
        self.hash_to_block_id[block.hash] = block_id

    def _remove_from_index(self, block_id: int) -> None:
        block = self.blocks[block_id]
        if block.uid and self.hash_to_block_id.get(block.hash) == block_id:
            del self.hash_to_block_id[block.hash]
        block.uid = 0
        block.token_ids = ()
        if self.snapshots:
            self.snapshots.drop(block_id)


def _empty_prefix(seq: Sequence) -> tuple[int, PrefixUid]:
    """Return hash and uid of the empty prefix. Sequences with different salts share no blocks."""
    salt = seq.params.cache_salt
    if salt is None:
        return 0, 0
    return xxhash.xxh64_intdigest(salt.encode("utf-8", "surrogatepass")), salt


def _chain(prefix_hash: int, token_ids: tuple[int, ...]) -> int:
    """Return the hash of a prefix that continues the one of `prefix_hash` by a block of `token_ids`."""
    return xxhash.xxh64_intdigest(struct.pack(f"{len(token_ids)}q", *token_ids), seed=prefix_hash)
