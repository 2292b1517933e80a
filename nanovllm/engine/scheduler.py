"""Decides what each step computes. No torch here, and no phases.

A step has one budget of tokens. Each sequence is given *known - computed* of them, capped by what is left: a decoding
sequence needs 1, a prompt many, one whose prefix is cached or that was preempted whatever is missing. Running sequences
come before new ones, so a long prompt never starves decoding.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, Status
from nanovllm.outputs import TokenLogprobs
from nanovllm.sampling_params import SamplingParams


@dataclass(slots=True)
class Admission:
    """A slot's new owner: what the sampler must know of it."""

    slot: int
    params: SamplingParams
    seed: int
    min_length: int  # while the sequence is shorter, `end_ids` cannot be drawn
    end_ids: tuple[int, ...]
    is_filtered: bool = False  # its masks come with the batches
    prompt_ids: list[int] = field(default_factory=list)  # both only for penalties
    output_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Chunk:
    """Tokens start .. start + len(token_ids) of the sequence in `slot`.

    `samples` if they are its last known ones. A token is drawn for each row, but only then does it mean anything.
    """

    slot: int
    start: int
    token_ids: list[int]
    samples: bool
    scores: list[int] = field(default_factory=list)  # prompt tokens whose logprobs are wanted: the chunk's next ones,
    first_scored: int = 0  # from what this token of the chunk predicts on


@dataclass(slots=True)
class Batch:
    """One step as plain data; what every rank is sent."""

    decode_slots: list[int] = field(default_factory=list)  # one token each, which the device has
    chunks: list[Chunk] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, place in its table, block id)
    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (slot, tokens it may draw from now on)
    logprobs: list[int] = field(default_factory=list)  # rows whose token's logprobs are wanted
    num_logprobs: int = 0  # how many of the most likely tokens' at most, for `logprobs` and chunks' `scores`
    processes_logprobs: bool = False  # whether some of them are those that tokens are drawn with

    @property
    def slots(self) -> list[int]:
        """Of each row."""
        return [*self.decode_slots, *(chunk.slot for chunk in self.chunks)]

    @property
    def has_scores(self) -> bool:
        return any(chunk.scores for chunk in self.chunks)

    @property
    def num_rows(self) -> int:
        return len(self.decode_slots) + len(self.chunks)

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(slots=True)
class StepOutput:
    """What the device says of a step.

    Args:
        token_ids: the one drawn for each row.
        logprobs: of the rows in the batch's `logprobs`.
        prompt_logprobs: of the chunks' `scores`, one after the other.
    """

    token_ids: list[int]
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class Step:
    """A batch and the sequences behind its rows, decode rows first."""

    batch: Batch = field(default_factory=Batch)
    decoding: list[Sequence] = field(default_factory=list)
    chunked: list[Sequence] = field(default_factory=list)
    has_logprobs: bool = False  # whether a row's token wants some

    @property
    def rows(self) -> list[Sequence]:
        return self.decoding + self.chunked

    @property
    def samples(self) -> list[bool]:
        """Whether each row's token is the next one of its sequence."""
        return [True] * len(self.decoding) + [chunk.samples for chunk in self.batch.chunks]


class Scheduler:
    """Owns the queues, the slots and the block manager.

    Args:
        max_num_seqs: sequences that may run at once, which is the number of slots.
        max_num_batched_tokens: token budget of a step, at least max_num_seqs.
        block_manager: the pool.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, block_manager: BlockManager):
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_manager = block_manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission; the last is preempted first
        self.free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_preemptions = self.num_prompt_tokens = self.num_cached_tokens = self.num_generated_tokens = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to launch: all is done or waits for tokens in flight."""
        step = Step()
        budget, preemptions = self.max_num_batched_tokens, self.num_preemptions
        for seq in list(self.running):
            # The sequence's properties, spelt out: this runs for each row of each step.
            num_tokens = len(seq.token_ids) + seq.pending
            num_new = min(num_tokens - seq.num_computed, budget)
            num_generated = num_tokens - len(seq.prompt_ids)
            if seq.status is not Status.RUNNING or num_new == 0 or num_generated >= seq.params.max_tokens:
                continue  # preempted for one before it, out of budget, or its last token is in flight
            if seq.token_filter and seq.waits:
                continue
            if not self._make_room(seq, num_new):
                break  # it was the last one and preempted itself
            self._add_row(seq, num_new, step)
            budget -= num_new
        if self.num_preemptions == preemptions:
            self._admit(budget, step)
        if step.has_logprobs:
            rows = enumerate(zip(step.rows, step.samples, strict=True))
            step.batch.logprobs = [i for i, (seq, samples) in rows if samples and seq.params.logprobs is not None]
        return step if step.decoding or step.chunked else None

    def update(self, step: Step, output: StepOutput) -> list[Sequence]:
        """Take in a collected step's tokens, one a row; the sequences that have new ones or have finished, in order.

        A token of a sequence that has ended meanwhile is dropped.
        """
        changed, rows = [], step.rows
        for seq in rows:
            seq.in_flight -= 1
        self._take_logprobs(step, output)
        for seq, samples, token_id in zip(rows, step.samples, output.token_ids, strict=True):
            if not samples:
                continue
            seq.pending -= 1
            if seq.status is Status.FINISHED:
                continue
            seq.token_ids.append(token_id)
            self.num_generated_tokens += 1
            self.block_manager.register(seq)
            self._check_end(seq, token_id)
            changed.append(seq)
        for seq in rows:
            if seq.status is Status.FINISHED:
                self._release(seq)
        return changed

    def _take_logprobs(self, step: Step, output: StepOutput) -> None:
        rows = step.rows
        for i, seq in enumerate(rows[row] for row in step.batch.logprobs):
            if seq.status is not Status.FINISHED:
                seq.logprobs.append(output.logprobs, i, seq.params.logprobs)
        if output.prompt_logprobs:
            pairs = zip(step.chunked, step.batch.chunks, strict=True)
            for i, seq in enumerate(seq for seq, chunk in pairs for _ in chunk.scores):
                seq.prompt_logprobs.append(output.prompt_logprobs, i, seq.params.prompt_logprobs)

    def _check_end(self, seq: Sequence, token_id: int) -> None:
        """Finish `seq` if its newest token ends it."""
        params, num_generated = seq.params, len(seq.token_ids) - len(seq.prompt_ids)
        can_stop = num_generated > params.min_tokens
        ends = can_stop and token_id in seq.end_ids
        stop = None
        if seq.detokenizer and (not ends or params.include_stop_str_in_output):
            stop = seq.detokenizer.add(token_id, can_stop)
        if seq.token_filter:
            seq.token_filter.accept(token_id)
        if seq.token_filter and seq.token_filter.error:
            self.finish(seq, "abort", seq.token_filter.error)
        elif ends:
            self.finish(seq, "stop", token_id if token_id in params.stop_token_ids else None)
        elif stop is not None:
            self.finish(seq, "stop", stop)
        elif seq.token_filter and seq.token_filter.is_complete:
            self.finish(seq, "stop")
        elif num_generated >= params.max_tokens:
            self.finish(seq, "length")

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End `seq` in whatever state it is. Its slot and blocks return once no step in flight uses them."""
        if seq.status is Status.FINISHED:
            return
        (self.waiting if seq.status is Status.WAITING else self.running).remove(seq)
        seq.status, seq.finish_reason, seq.stop_reason = Status.FINISHED, reason, stop_reason
        self._release(seq)

    def preempt_all(self) -> None:
        """Send all back to wait: what was computed is worth nothing any more. No step may be in flight."""
        while self.running:
            self._preempt(self.running[-1])
        self.block_manager.reset_prefix_cache()

    # -- parts of schedule -------------------------------------------------------------------------------------------

    def _make_room(self, seq: Sequence, num_new: int) -> bool:
        """Preempt from the end until `seq` can have `num_new` tokens more; False if that took `seq` itself."""
        if self.block_manager.has_room(seq, num_new):
            return True
        while self.block_manager.num_missing(seq, seq.num_computed + num_new) > self.block_manager.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Put `seq` back to the front of the queue. Its tokens are kept, also one in flight; their KV is recomputed.

        Steps run in order on the device, so what a step in flight still writes comes before what the blocks' next owner
        writes.
        """
        self.running.remove(seq)
        self.waiting.appendleft(seq)
        seq.status = Status.WAITING
        self._give_back(seq)
        self.num_preemptions += 1

    def _admit(self, budget: int, step: Step) -> None:
        while self.waiting and self.free_slots and budget > 0:
            seq = self.waiting[0]
            if seq.pending:  # preempted with a token in flight: wait until the host knows it
                break
            found = [] if seq.num_to_score else self.block_manager.find_prefix(seq)
            num_cached = len(found) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, budget)
            # What is found but unused leaves the free list too; one block in reserve for each that runs keeps a new
            # sequence from being preempted by the next decode step.
            needed = -(-(num_cached + num_new) // self.block_manager.block_size) - len(found)
            needed += sum(self.block_manager.blocks[block_id].ref_count == 0 for block_id in found)
            if needed + len(self.running) > self.block_manager.num_free:
                break
            self.waiting.popleft()
            self.running.append(seq)
            seq.status, seq.slot = Status.RUNNING, self.free_slots.pop()
            self.block_manager.share(seq, found)
            if seq.num_tokens == len(seq.prompt_ids):
                seq.num_cached = num_cached
                self.num_prompt_tokens += len(seq.prompt_ids)
                self.num_cached_tokens += num_cached
            step.batch.admissions.append(self._admission(seq))
            if seq.token_filter and not seq.token_filter.depends_on_output:
                step.batch.masks.append((seq.slot, seq.token_filter.mask()))
            step.batch.new_blocks += [(seq.slot, i, block_id) for i, block_id in enumerate(found)]
            self._add_row(seq, num_new, step)
            budget -= num_new

    def _admission(self, seq: Sequence) -> Admission:
        known = (seq.prompt_ids, seq.output_ids) if seq.params.penalises else ([], [])
        min_length = len(seq.prompt_ids) + seq.params.min_tokens
        end_ids, is_filtered = tuple(sorted(seq.end_ids)), seq.token_filter is not None
        return Admission(seq.slot, seq.params.for_ranks(), seq.seed, min_length, end_ids, is_filtered, *known)

    def _add_row(self, seq: Sequence, num_new: int, step: Step) -> None:
        """Give `seq` its blocks and a row of `num_new` tokens in `step`, and count them as computed."""
        start, first = seq.num_computed, len(seq.block_table)
        if not self.block_manager.has_room(seq, num_new):
            self.block_manager.allocate(seq, start + num_new)
            step.batch.new_blocks += [(seq.slot, i, seq.block_table[i]) for i in range(first, len(seq.block_table))]
        samples = start + num_new == seq.num_tokens
        if seq.on_device:
            step.batch.decode_slots.append(seq.slot)
            step.decoding.append(seq)
        else:
            chunk = Chunk(seq.slot, start, seq.token_ids[start : start + num_new], samples)
            step.batch.chunks.append(chunk)
            step.chunked.append(seq)
            seq.on_device = samples
            if seq.num_to_score:
                self._score(seq, chunk, step.batch)
        if samples and seq.params.logprobs is not None:
            step.has_logprobs = True
            step.batch.num_logprobs = max(step.batch.num_logprobs, seq.params.logprobs)
            step.batch.processes_logprobs |= seq.params.logprobs_mode == "processed_logprobs"
        if samples and seq.token_filter and seq.token_filter.depends_on_output:
            step.batch.masks.append((seq.slot, seq.token_filter.mask()))
        seq.num_computed += num_new
        seq.in_flight += 1
        seq.pending += samples
        self.block_manager.register(seq)

    def _score(self, seq: Sequence, chunk: Chunk, batch: Batch) -> None:
        """Ask for the logprobs of the prompt tokens that the chunk's tokens predict, but for those known."""
        end = min(chunk.start + len(chunk.token_ids), len(seq.prompt_ids) - 1)
        if end > seq.num_scored:
            chunk.scores = seq.prompt_ids[seq.num_scored + 1 : end + 1]
            chunk.first_scored = seq.num_scored - chunk.start
            seq.num_scored = end
            batch.num_logprobs = max(batch.num_logprobs, seq.params.prompt_logprobs)

    # -- giving back -------------------------------------------------------------------------------------------------

    def _release(self, seq: Sequence) -> None:
        if seq.in_flight == 0:
            self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        if seq.slot >= 0:
            self.free_slots.append(seq.slot)
        seq.slot, seq.on_device = -1, False
