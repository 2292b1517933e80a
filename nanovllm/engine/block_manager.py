"""Paged KV blocks: who holds which, and which full blocks can be shared. No torch here."""

import struct
from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class Block:
    """One block of the KV cache.

    `uid` is a number no other content ever had. It names the parent in the chain of a prefix: two prefixes whose hashes
    collide have different uids, so a child is never taken for another prefix's.
    """

    ref_count: int = 0
    uid: int = 0  # 0: not in the prefix index
    hash: int = 0
    parent_uid: int | str = 0  # of a prefix's first block 0 or the salt: what it has for a parent
    token_ids: tuple[int, ...] = ()


class BlockManager:
    """Hands out blocks, counts references, and finds shared prefixes.

    A block whose count falls to 0 joins the free list's end but keeps its content until it is taken from the front
    (LRU), so a later request with the same prefix can still have it.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        enable_prefix_caching: whether full blocks enter the prefix index.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.free_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # front: longest unused
        self.index: dict[int, int] = {}  # chained hash -> block id
        self.last_uid = 0

    @property
    def num_free(self) -> int:
        return len(self.free_ids)

    def has_room(self, seq: Sequence, num_new: int) -> bool:
        """Whether the blocks of `seq` hold `num_new` tokens more."""
        return seq.num_computed + num_new <= len(seq.block_table) * self.block_size

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks `seq` lacks to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(seq.block_table))

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Give `seq` the blocks for `num_tokens` tokens, which the pool must have."""
        for _ in range(self.num_missing(seq, num_tokens)):
            block_id, _ = self.free_ids.popitem(last=False)
            self._forget(self.blocks[block_id], block_id)
            self.blocks[block_id].ref_count = 1
            seq.block_table.append(block_id)

    def free(self, seq: Sequence) -> None:
        """Take back all of `seq`'s blocks, its tail first, so that the tail is also reused first."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_ids[block_id] = None
        seq.block_table.clear()
        seq.num_computed = seq.num_registered = 0

    def find_prefix(self, seq: Sequence) -> list[int]:
        """The cached blocks that `seq`'s tokens begin with. At least one token is left to compute."""
        found: list[int] = []
        if not self.enable_prefix_caching:
            return found
        prefix_hash, parent_uid = _root(seq)
        for i in range((len(seq.token_ids) - 1) // self.block_size):
            token_ids = self._tokens(seq, i)
            prefix_hash = _chain(prefix_hash, token_ids)
            block_id = self._lookup(prefix_hash, parent_uid, token_ids)
            if block_id is None:
                break
            parent_uid = self.blocks[block_id].uid
            found.append(block_id)
        return found

    def share(self, seq: Sequence, found: list[int]) -> None:
        """Let `seq`, which owns no block, begin with the blocks `find_prefix` found."""
        for block_id in found:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del self.free_ids[block_id]
            block.ref_count += 1
        seq.block_table.extend(found)
        seq.num_registered = len(found)
        seq.num_computed = len(found) * self.block_size
        last = self.blocks[found[-1]] if found else None
        seq.prefix_hash, seq.prefix_uid = (last.hash, last.uid) if last else _root(seq)

    def register(self, seq: Sequence) -> None:
        """Put `seq`'s full blocks, computed or scheduled to be, in the prefix index.

        A block may be shared as soon as the step that fills it is scheduled: steps run in order on the device, and
        within a step every layer writes all keys and values before any row reads them.
        """
        if not self.enable_prefix_caching or seq.num_computed < (seq.num_registered + 1) * self.block_size:
            return
        for i in range(seq.num_registered, min(seq.num_computed, len(seq.token_ids)) // self.block_size):
            token_ids = self._tokens(seq, i)
            seq.prefix_hash = _chain(seq.prefix_hash, token_ids)
            canonical = self._lookup(seq.prefix_hash, seq.prefix_uid, token_ids)
            if canonical is None:
                canonical = seq.block_table[i]
                block = self.blocks[canonical]
                self.last_uid += 1
                block.uid, block.hash = self.last_uid, seq.prefix_hash
                block.parent_uid, block.token_ids = seq.prefix_uid, token_ids
                self.index[seq.prefix_hash] = canonical
            seq.prefix_uid = self.blocks[canonical].uid
            seq.num_registered = i + 1

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Blocks in use stay with their sequences but are not found any more."""
        for block_id, block in enumerate(self.blocks):
            self._forget(block, block_id)

    def _tokens(self, seq: Sequence, i: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[i * self.block_size : (i + 1) * self.block_size])

    def _lookup(self, prefix_hash: int, parent_uid: int | str, token_ids: tuple[int, ...]) -> int | None:
        block_id = self.index.get(prefix_hash)
        if block_id is None:
            return None
        block = self.blocks[block_id]
        return block_id if block.parent_uid == parent_uid and block.token_ids == token_ids else None

    def _forget(self, block: Block, block_id: int) -> None:
        if block.uid and self.index.get(block.hash) == block_id:
            del self.index[block.hash]
        block.uid, block.token_ids = 0, ()


def _root(seq: Sequence) -> tuple[int, int | str]:
    """Hash and uid of the empty prefix: equal for sequences that may share blocks."""
    salt = seq.params.cache_salt
    return (0, 0) if salt is None else (xxhash.xxh64_intdigest(salt.encode("utf-8", "surrogatepass")), salt)


def _chain(prefix_hash: int, token_ids: tuple[int, ...]) -> int:
    """The hash of a block's tokens and of everything before them."""
    return xxhash.xxh64_intdigest(struct.pack(f"{len(token_ids)}q", *token_ids), seed=prefix_hash)
