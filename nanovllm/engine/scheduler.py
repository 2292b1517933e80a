"""Decides what each step computes. No torch here, and no phases.

A step has one token budget. It gives each sequence the tokens that are not computed yet, `num_tokens - num_computed`,
capped by the rest of the budget: a decoding sequence needs one token, a new prompt many, a prompt with a cached prefix
the rest, a preempted sequence all of its tokens again. Running sequences come before new ones, so a long prompt never
stops the others.
"""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Placement, Sequence, Status
from nanovllm.engine.stopping import accept_token
from nanovllm.messages import Admission, Batch, Row, StepOutput

# CPU seconds that a step may spend on masks before it leaves the rest to the next step. A usual mask takes under 1 ms.
STEP_MASK_SECONDS = 0.01
# A sequence whose mask takes more CPU seconds than this is aborted. With an ambiguous grammar, the time of a mask grows
# with the cube of the text's length, so the first mask over the limit is not far over it.
_MAX_MASK_SECONDS = 0.02
# Virtual time of masks (see `Scheduler._compute_masks`), in seconds. A sequence that has had a mask is at most
# _MASK_CREDIT behind the clock: enough for cheap masks to come before costly ones. The first mask of a sequence is
# _MASK_START ahead of the clock: otherwise a steady stream of new, short sequences would starve a longer one.
_MASK_CREDIT = 0.0005
_MASK_START = 0.0001
# A step admits no more sequences once it sends this many block ids to the device. This bounds the host's time, because
# a request may have hundreds of samples of a long prompt. Hashing and sharing this many cached blocks took 13 ms.
_MAX_NEW_BLOCKS = 8500
# A step admits no more sequences after this many had to wait for a snapshot: each lookup hashes a whole prompt in vain.
_MAX_DEFERRED = 8


@dataclass(slots=True)
class ScheduledStep:
    """A batch and the sequence of each of its rows."""

    batch: Batch = field(default_factory=Batch)
    sequences: list[Sequence] = field(default_factory=list)


class _CachedPrefix(NamedTuple):
    """The cached start of a sequence.

    Args:
        cached: ids of the cached blocks that hold its first tokens.
        shared: those of them to share: with recurrent state, only the blocks before a snapshot.
        snapshot: the slot of the snapshot to start from, or None.
    """

    cached: list[int]
    shared: list[int]
    snapshot: int | None = None


class Scheduler:
    """Owns the queues, the slots and the block manager.

    Args:
        max_num_seqs: how many sequences may run at once, which is the number of slots.
        max_num_batched_tokens: token budget of a step, at least max_num_seqs.
        block_manager: owns the KV blocks.
        limit_masks: whether to limit the CPU time of masks. Schedules then depend on the host's speed.
    """

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, block_manager: BlockManager, limit_masks: bool = True
    ):
        self.max_num_batched_tokens = max_num_batched_tokens
        self.limit_masks = limit_masks
        self.block_manager = block_manager
        self.snapshots = block_manager.snapshots
        # A request may end while a million others wait: a dict removes it without a search.
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: list[Sequence] = []  # in order of admission; the last is preempted first
        self.mask_clock = 0.0  # see `_compute_masks`
        self.free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0

    def add(self, seq: Sequence) -> None:
        self.waiting[seq] = None

    def schedule(self) -> ScheduledStep | None:
        """Return the next step, or None if every sequence is done, waits for a step in flight, or lacks its mask."""
        self._compute_masks()
        if self.snapshots:
            self.snapshots.start_step()
        builder = _StepBuilder(self.block_manager)
        budget = self.max_num_batched_tokens
        blocks = self.block_manager
        preempted = False
        running = list(self.running)
        for i, seq in enumerate(running, start=1):
            placement = seq.placement
            if placement is None:
                continue  # preempted for a sequence before it
            num_tokens = seq.num_tokens
            if num_tokens - len(seq.prompt_ids) >= seq.max_tokens:
                continue  # its last token is in flight
            if seq.token_filter and seq.lacks_mask:
                continue
            # Leave one token for each sequence after this one. The budget suffices: it is at least `max_num_seqs`.
            # Others may follow an unfinished prompt: a snapshot can end its chunk early, and the rest of that step
            # admits new sequences.
            num_after = len(running) - i
            num_new = min(num_tokens - placement.num_computed, budget - num_after)
            if self.snapshots:
                num_new = self.snapshots.limit(placement, num_new)
            end = placement.num_computed + num_new
            if num_missing := blocks.num_missing(placement, end):
                if num_missing > blocks.num_free:
                    preempted = True
                    if not self._make_room(seq, num_missing):
                        break  # it was the last one and preempted itself
                builder.allocate(placement, end)
            builder.add_row(seq, placement, num_new)
            budget -= num_new
        if not preempted:  # else new sequences would take the blocks that were just freed
            self._admit(builder, budget)
        return builder.finish()

    def update(self, step: ScheduledStep, output: StepOutput) -> list[Sequence]:
        """Take in the results of a step.

        Tokens and logprobs of sequences that have finished in the meantime are dropped. So are those of a sequence
        whose mask allowed no token.

        Returns:
            The sequences that have new tokens or have finished.
        """
        changed = []
        for seq in step.sequences:
            seq.num_in_flight -= 1
            if seq.status is not Status.FINISHED and seq.token_filter and (error := seq.token_filter.error):
                self.finish(seq, "abort", error)
                changed.append(seq)
        self._take_logprobs(step, output)
        for seq, token_ids in zip(step.sequences, output.token_ids, strict=True):
            if not token_ids:
                continue  # its row was not sampled
            seq.num_pending -= 1
            if seq.status is not Status.FINISHED:
                self._append(seq, token_ids)
                changed.append(seq)
        for seq in step.sequences:
            if seq.status is Status.FINISHED:
                self._release(seq)
        return changed

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End `seq` in whatever state it is. Its slot and blocks are freed once no step in flight uses them."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.WAITING:
            del self.waiting[seq]
        else:
            self.running.remove(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        self._release(seq)

    def preempt_all(self) -> None:
        """Preempt every sequence and empty the prefix cache, because the KV is no longer valid.

        No step may be in flight.
        """
        while self.running:
            self._preempt(self.running[-1])
        self.block_manager.reset_prefix_cache()

    def restart_prompt_logprobs(self) -> None:
        """Forget logprobs of prompts that are not complete: the rest will come from other weights.

        All sequences wait.
        """
        for seq in self.waiting:
            if seq.num_unscored:
                seq.num_scored = 0
                seq.prompt_logprobs = seq.prompt_logprobs[:1]

    # -- parts of schedule -------------------------------------------------------------------------------------------

    def _compute_masks(self) -> None:
        """Compute the masks that sequences need now, until the step has spent its time for that.

        The others wait for the next step, so that neither a costly grammar nor many of them delay other requests. If
        there is too little time for all, sequences get equal shares of it, as in start-time fair queuing (Goyal, Vin
        and Cheng, 1996): a mask moves its sequence's virtual time on by what it cost, and the sequence that is furthest
        behind comes first. The clock shows the latest virtual time at which a mask was computed.
        """
        candidates = [*self.running, *islice(self.waiting, len(self.free_slots))]
        # Most sequences have no filter, and this looks at all of them in each step.
        lacking = [
            (seq, seq.token_filter) for seq in candidates if seq.token_filter and seq.lacks_mask and not seq.num_pending
        ]
        budget = STEP_MASK_SECONDS if self.limit_masks else math.inf
        clock = self.mask_clock
        for seq, _ in lacking:
            if seq.virtual_time:
                seq.virtual_time = max(seq.virtual_time, clock - _MASK_CREDIT)
            else:
                seq.virtual_time = clock + _MASK_START
        for seq, token_filter in sorted(lacking, key=lambda pair: pair[0].virtual_time):
            if budget <= 0:
                break
            self.mask_clock = max(self.mask_clock, seq.virtual_time)
            start = time.thread_time()
            seq.mask = token_filter.compute_mask()
            seconds = time.thread_time() - start
            budget -= seconds
            seq.virtual_time += seconds
            if self.limit_masks and seconds > _MAX_MASK_SECONDS:
                limit = f"{1000 * _MAX_MASK_SECONDS:.0f} ms of CPU time"
                seq.mask_error = f"the next token mask took over {limit}: the grammar is too ambiguous"

    def _make_room(self, seq: Sequence, num_missing: int) -> bool:
        """Preempt the newest sequences until `num_missing` blocks are free, or `seq` itself is preempted.

        Returns:
            Whether `seq` still runs.
        """
        while num_missing > self.block_manager.num_free and seq.placement is not None:
            self._preempt(self.running[-1])
            self.num_preemptions += 1
        return seq.placement is not None

    def _preempt(self, seq: Sequence) -> None:
        """Move `seq` to the front of the queue. It keeps its tokens, but their KV must be computed again.

        Its blocks can have a new owner at once: the device runs steps in order, so whatever a step in flight writes to
        them comes before the new owner's writes.
        """
        self.running.remove(seq)
        self.waiting[seq] = None
        self.waiting.move_to_end(seq, last=False)
        seq.status = Status.WAITING
        self._free_placement(seq)

    def _admit(self, builder: "_StepBuilder", budget: int) -> None:
        """Start waiting sequences while there are slots, blocks and budget.

        The first sequence that lacks something stops the loop, so that later ones do not overtake it. Only one that
        waits for its mask, or for a snapshot of this step, is passed over: it starts in one of the next steps.
        """
        num_deferred = 0
        for seq in list(islice(self.waiting, len(self.free_slots))):
            if budget == 0:
                break
            if num_deferred == _MAX_DEFERRED or len(builder.batch.new_blocks) >= _MAX_NEW_BLOCKS:
                break
            if seq.num_pending:
                # It was preempted: the host must know all of its tokens before they are computed again. That takes one
                # step. The sequences after it wait as well, so that they do not overtake it.
                break
            if seq.lacks_mask:
                continue
            prefix = self._find_cached(seq)
            if self.snapshots and prefix.snapshot in self.snapshots.saving:
                num_deferred += 1
                continue
            num_shared = len(prefix.shared) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_shared, budget)
            # It gets the blocks of all its tokens now. If it started with those of its first chunk, a later chunk could
            # lack some, and the sequence would be preempted and start again, over and over. One free block stays in
            # reserve for each running sequence. Without it the next decode step could preempt the new sequence.
            if not self.block_manager.can_start(prefix.shared, seq.num_tokens, reserve=len(self.running)):
                break
            placement = self._start(seq, prefix.shared)
            builder.add_admission(seq, placement)
            if self.snapshots:
                self.snapshots.start(placement, prefix.cached, num_shared, seq.num_tokens)
                num_new = self.snapshots.limit(placement, num_new)
                if prefix.snapshot is not None:
                    builder.batch.state_loads.append((prefix.snapshot, placement.slot))
            builder.allocate(placement, seq.num_tokens)
            builder.add_row(seq, placement, num_new)
            budget -= num_new

    def _find_cached(self, seq: Sequence) -> _CachedPrefix:
        """Find what the prefix cache has of a waiting sequence. Logits of cached tokens cannot score a prompt."""
        cached = [] if seq.num_unscored else self.block_manager.find_prefix(seq)
        if not self.snapshots:
            return _CachedPrefix(cached, cached)
        return _CachedPrefix(cached, *self.snapshots.find(cached))

    def _start(self, seq: Sequence, shared: list[int]) -> Placement:
        """Run a waiting sequence in a new placement, which starts with the cached blocks `shared`."""
        del self.waiting[seq]
        self.running.append(seq)
        seq.status = Status.RUNNING
        seq.placement = placement = Placement(self.free_slots.pop())
        self.block_manager.share(seq, placement, shared)
        if not seq.scheduled_ts:  # else it was counted before it was preempted
            seq.num_cached = placement.num_computed
            seq.scheduled_ts = time.monotonic()
            self.num_prompt_tokens += len(seq.prompt_ids)
            self.num_cached_tokens += placement.num_computed
        return placement

    # -- parts of update ---------------------------------------------------------------------------------------------

    def _append(self, seq: Sequence, token_ids: tuple[int, ...]) -> None:
        """Append sampled tokens to `seq` until one of them ends it."""
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            self.num_generated_tokens += 1
            if seq.placement is not None:  # else it was preempted
                self.block_manager.register(seq, seq.placement)
            reasons = accept_token(seq, token_id)
            if reasons is not None:
                self.finish(seq, *reasons)
                return

    def _take_logprobs(self, step: ScheduledStep, output: StepOutput) -> None:
        """Append the logprobs of a step to those of its unfinished sequences."""
        batch = step.batch
        for rows, logprobs in zip(batch.logprob_rows.values(), output.logprobs, strict=True):
            for i, row in enumerate(rows):
                seq = step.sequences[row]
                if seq.status is not Status.FINISHED:
                    seq.append_logprobs(logprobs.row(i, seq.num_logprobs or 0))
        for rows, logprobs in zip(batch.scored_rows.values(), output.prompt_logprobs, strict=True):
            start = 0  # index of the row's first scored token in `logprobs`
            for row in rows:
                seq = step.sequences[row]
                end = start + len(batch.rows[row].scored_ids)
                if seq.status is not Status.FINISHED:
                    for i in range(start, end):
                        seq.prompt_logprobs.append(logprobs.row(i, seq.num_prompt_logprobs or 0))
                start = end

    def _release(self, seq: Sequence) -> None:
        """Free the placement of a finished sequence, unless a step in flight still uses it."""
        if seq.num_in_flight == 0:
            self._free_placement(seq)

    def _free_placement(self, seq: Sequence) -> None:
        if seq.placement is not None:
            self.block_manager.free(seq.placement)
            self.free_slots.append(seq.placement.slot)
            seq.placement = None


class _StepBuilder:
    """Collects the rows of one step and counts their tokens as computed."""

    def __init__(self, block_manager: BlockManager):
        self.block_manager = block_manager
        self.batch = Batch()
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.decode_rows: list[Row] = []
        self.prefill_rows: list[Row] = []
        self.wants_logprobs = False  # spares most steps the search for rows that want logprobs

    def add_admission(self, seq: Sequence, placement: Placement) -> None:
        """Describe a new sequence, whose placement holds the cached prefix, to the runner."""
        params = seq.params
        batch = self.batch
        admission = Admission(
            slot=placement.slot,
            params=params.for_ranks(),
            seed=seq.seed,
            min_length=len(seq.prompt_ids) + params.min_tokens,
            stop_ids=tuple(sorted(seq.stop_ids)),
            is_filtered=seq.token_filter is not None,
        )
        if params.penalizes:
            admission.prompt_ids = seq.prompt_ids
            admission.output_ids = seq.output_ids
        batch.admissions.append(admission)
        if seq.token_filter and not seq.token_filter.depends_on_output:
            batch.masks.append((placement.slot, seq.token_filter.compute_mask()))
        self._send_blocks(placement, first=0)

    def allocate(self, placement: Placement, num_tokens: int) -> None:
        """Extend `placement` to hold `num_tokens` tokens."""
        first = len(placement.block_table)
        self.block_manager.allocate(placement, num_tokens)
        self._send_blocks(placement, first)

    def add_row(self, seq: Sequence, placement: Placement, num_new: int) -> None:
        """Add a row that computes the next `num_new` tokens of `seq`. Its placement has their blocks."""
        # 1. The row. Its kind follows from the placement and the pending tokens before this step.
        start = placement.num_computed
        yields_token = start + num_new == seq.num_tokens
        if placement.is_decoding:
            self.decode_rows.append(Row(placement.slot, start, None, yields_token))
            self.decoding.append(seq)
        else:
            self._add_prefill_row(seq, placement.slot, start, num_new, yields_token)
        # 2. The progress with this step. A decode row is always sampled, so the sequence goes on decoding.
        placement.is_decoding = yields_token
        if yields_token:
            seq.num_pending += 1
            if seq.num_logprobs is not None:
                self._note_logprobs(seq)
            if seq.mask is not None:
                self.batch.masks.append((placement.slot, seq.mask))
                seq.mask = None
        placement.num_computed += num_new
        seq.num_in_flight += 1
        # 3. A snapshot of that progress, then the prefix index: `register` gives the snapshot to its block.
        if self.block_manager.snapshots:
            self.block_manager.snapshots.take(placement, self.batch)
        self.block_manager.register(seq, placement)

    def finish(self) -> ScheduledStep | None:
        """Return the step, or None if it has no rows."""
        batch = self.batch
        batch.rows = self.decode_rows + self.prefill_rows
        batch.num_decode = len(self.decode_rows)
        sequences = self.decoding + self.prefilling
        if self.wants_logprobs:
            for i, (seq, row) in enumerate(zip(sequences, batch.rows, strict=True)):
                if row.yields_token and seq.num_logprobs is not None:
                    batch.logprob_rows.setdefault(_next_power_of_2(seq.num_logprobs), []).append(i)
                if row.scored_ids and seq.num_prompt_logprobs is not None:
                    batch.scored_rows.setdefault(_next_power_of_2(seq.num_prompt_logprobs), []).append(i)
        return ScheduledStep(batch, sequences) if sequences else None

    def _send_blocks(self, placement: Placement, first: int) -> None:
        """Send a placement's blocks from index `first` on to the device."""
        for i in range(first, len(placement.block_table)):
            self.batch.new_blocks.append((placement.slot, i, placement.block_table[i]))

    def _add_prefill_row(self, seq: Sequence, slot: int, start: int, num_new: int, yields_token: bool) -> None:
        scored_ids = ()
        first_scored = 0
        if seq.num_unscored:
            # Prompt logprobs: the token at position p is scored by the logits at p - 1.
            first = seq.num_scored
            end = min(start + num_new, len(seq.prompt_ids) - 1)
            if first < end:
                scored_ids = seq.prompt_ids[first + 1 : end + 1]
                first_scored = first - start
                seq.num_scored = end
                self.wants_logprobs = True
        token_ids = seq.token_ids[start : start + num_new]
        self.prefill_rows.append(Row(slot, start, token_ids, yields_token, scored_ids, first_scored))
        self.prefilling.append(seq)

    def _note_logprobs(self, seq: Sequence) -> None:
        """Note that the step must compute logprobs of the token that it samples for `seq`."""
        self.wants_logprobs = True
        if seq.params.logprobs_mode == "processed_logprobs":
            self.batch.wants_processed_logprobs = True


def _next_power_of_2(k: int) -> int:
    """Return the next power of two, or 0 for 0, so that a step computes logprobs in a few groups of rows."""
    return 1 << (k - 1).bit_length() if k else 0
