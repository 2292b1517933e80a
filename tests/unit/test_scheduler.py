"""Random schedules against an oracle that knows what each block holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Placement, Sequence, Status
from nanovllm.engine.snapshots import Snapshots
from nanovllm.messages import StepOutput
from nanovllm.sampling_params import SamplingParams

BLOCK = 4


def next_token(token_ids):
    """A deterministic model: the next token depends on everything before it."""
    return hash(tuple(token_ids)) % 7


def expected(prompt, params, stop_ids):
    ids = list(prompt)
    while len(ids) - len(prompt) < params.max_tokens:
        ids.append(next_token(ids))
        if ids[-1] in stop_ids and len(ids) - len(prompt) > params.min_tokens:
            break
    return ids[len(prompt) :]


class FakeDevice:
    """Executes batches on a cache of token ids instead of keys and values, and checks each row's view of it.

    The recurrent state of a slot is the tuple of all tokens that went into it.
    """

    def __init__(self, num_slots, num_snapshots=0):
        self.states = [None] * (num_slots + num_snapshots)
        self.has_state = num_snapshots > 0
        self.cache = {}  # (block, offset) -> token
        self.tables = [{} for _ in range(num_slots)]
        self.last = [None] * num_slots
        self.length = [0] * num_slots

    def launch(self, batch):
        for slot, index, block in batch.new_blocks:
            self.tables[slot][index] = block
        assert len(set(batch.slots)) == len(batch.rows)
        for source, target in batch.state_loads:
            assert self.states[source] is not None, "a snapshot is loaded that was never saved"
            self.states[target] = self.states[source]
        assert [row.token_ids is None for row in batch.rows] == [i < batch.num_decode for i in range(len(batch.rows))]
        written = set()
        for row in batch.rows:  # all rows write before any reads, as in a layer
            if row.token_ids is None:
                assert row.start == self.length[row.slot]
            for position, token_id in enumerate(row.token_ids or [self.last[row.slot]], row.start):
                place = self.tables[row.slot][position // BLOCK], position % BLOCK
                assert place not in written, "two rows write to the same place"
                written.add(place)
                self.cache[place] = token_id
            computed = tuple(row.token_ids or [self.last[row.slot]])
            before = self.states[row.slot] if row.start else ()
            if self.has_state:
                assert len(before) == row.start
                self.states[row.slot] = before + computed
        output = StepOutput([self._sample(row) for row in batch.rows])
        saved = [self.states[source] for source, _ in batch.state_saves]
        targets = [target for _, target in batch.state_saves]
        assert len(set(targets)) == len(targets) and not set(targets) & set(batch.slots)
        for target, state in zip(targets, saved, strict=True):
            self.states[target] = state
        return output

    def _sample(self, row):
        end = row.start + row.num_tokens
        seen = [self.cache[self.tables[row.slot][i // BLOCK], i % BLOCK] for i in range(end)]
        if self.has_state:
            assert self.states[row.slot] == tuple(seen)
        self.last[row.slot], self.length[row.slot] = next_token(seen), end
        return (self.last[row.slot],) if row.yields_token else ()


def run(
    requests,
    *,
    num_blocks,
    max_num_seqs,
    budget,
    overlap,
    caching=True,
    aborts=(),
    arrivals=1,
    num_snapshots=0,
    min_blocks=1,
):
    """Serve `requests` (prompt, params, stop_ids), `arrivals` more each step; returns sequences and the scheduler."""
    snapshots = None
    if num_snapshots:
        snapshots = Snapshots(range(max_num_seqs, max_num_seqs + num_snapshots), BLOCK, min_blocks)
    manager = BlockManager(num_blocks, BLOCK, caching, snapshots)
    scheduler = Scheduler(max_num_seqs, budget, manager)
    device = FakeDevice(max_num_seqs, num_snapshots)
    seqs = [Sequence(list(prompt), params, frozenset(stop_ids)) for prompt, params, stop_ids in requests]
    arriving, in_flight, steps = list(seqs), [], 0
    while arriving or scheduler.waiting or scheduler.running or in_flight:
        steps += 1
        assert steps < 5000, "no progress"
        for _ in range(min(arrivals, len(arriving))):
            scheduler.add(arriving.pop(0))
        for step, index in aborts:
            if step == steps and seqs[index] not in arriving:
                scheduler.finish(seqs[index], "abort")
        step = scheduler.schedule()
        if step:
            assert 0 < step.batch.num_tokens <= budget
            assert len(scheduler.running) <= max_num_seqs
            in_flight.append((step, device.launch(step.batch)))
        if in_flight and (not step or len(in_flight) > overlap):
            scheduler.update(*in_flight.pop(0))
        check_integrity(scheduler, seqs)
    return seqs, scheduler


def check_integrity(scheduler, seqs):
    manager = scheduler.block_manager
    placements = [seq.placement for seq in seqs if seq.placement]
    held = [block_id for placement in placements for block_id in placement.block_table]
    for block_id, block in enumerate(manager.blocks):
        assert block.ref_count == held.count(block_id)
        assert (block.ref_count == 0) == (block_id in manager.free_block_ids)
    if manager.snapshots:
        check_snapshots(manager, placements)
    slots = [placement.slot for placement in placements]
    assert sorted(slots + scheduler.free_slots) == list(range(len(slots) + len(scheduler.free_slots)))


def check_snapshots(manager, placements):
    """Every slot has one owner, and every block with a snapshot is in the prefix index."""
    snapshots = manager.snapshots
    new = [placement.new_snapshot for placement in placements if placement.new_snapshot is not None]
    held = [*new, *snapshots.slot_of.values(), *snapshots.free_slots]
    assert sorted(held) == list(range(min(held), min(held) + len(held)))
    assert all(manager.blocks[block_id].uid for block_id in snapshots.slot_of)
    assert snapshots.replaceable <= snapshots.slot_of.keys()


requests_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),  # few ids: prefixes are often shared
        st.builds(
            lambda n, m: SamplingParams(max_tokens=n, min_tokens=min(n, m)), st.integers(1, 12), st.integers(0, 4)
        ),
        st.sets(st.integers(0, 6), max_size=2),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(
    requests=requests_strategy,
    num_blocks=st.integers(8, 24),
    max_num_seqs=st.integers(1, 4),
    extra=st.integers(0, 30),
    overlap=st.integers(0, 1),
    caching=st.booleans(),
    aborts=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 7)), max_size=3),
    arrivals=st.integers(1, 4),
    num_snapshots=st.sampled_from([0, 1, 2, 8]),
    min_blocks=st.integers(1, 3),
)
def test_random_schedules_give_the_oracle_s_tokens(
    requests, num_blocks, max_num_seqs, extra, overlap, caching, aborts, arrivals, num_snapshots, min_blocks
):
    aborts = [(step, index) for step, index in aborts if index < len(requests)]
    seqs, scheduler = run(
        requests,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + extra,
        overlap=overlap,
        caching=caching or num_snapshots > 0,
        aborts=aborts,
        arrivals=arrivals,
        num_snapshots=num_snapshots,
        min_blocks=min_blocks,
    )
    for seq, (prompt, params, stop_ids) in zip(seqs, requests, strict=True):
        want = expected(prompt, params, stop_ids)
        assert seq.status is Status.FINISHED
        if seq.finish_reason == "abort":
            assert seq.output_ids == want[: len(seq.output_ids)]
        else:
            assert seq.output_ids == want
            assert seq.finish_reason == ("stop" if want[-1] in stop_ids and len(want) > params.min_tokens else "length")
    assert scheduler.block_manager.num_free == num_blocks
    assert len(scheduler.free_slots) == max_num_seqs
    if num_snapshots:
        snapshots = scheduler.block_manager.snapshots
        scheduler.block_manager.reset_prefix_cache()
        assert len(snapshots.free_slots) == num_snapshots and not snapshots.slot_of


def cached(prompts, **options):
    """Serve prompts one after the other on a model with recurrent state; return their cached tokens."""
    requests = [(prompt, SamplingParams(max_tokens=options.pop("max_tokens", 2)), ()) for prompt in prompts]
    options = {"num_blocks": 64, "max_num_seqs": 1, "budget": 64, "overlap": 1, "num_snapshots": 8, **options}
    seqs, _ = run(requests, **options)
    return [seq.num_cached for seq in seqs]


def test_an_equal_prompt_starts_from_the_snapshot_at_the_last_block_boundary():
    # The prompt of 12 tokens ends at a block boundary, where it takes another snapshot.
    assert cached([[1] * 11, [1] * 11, [1] * 12, [1] * 13]) == [0, 8, 8, 12]


def test_the_second_prompt_that_leaves_a_prefix_takes_a_snapshot_for_the_third():
    shared = [1, 2, 3, 4, 5, 6, 1, 2]
    assert cached([shared + [i] * 9 for i in (0, 3, 6)]) == [0, 0, 8]


def test_the_next_turn_of_a_chat_starts_from_the_newest_snapshot_of_the_output():
    params = SamplingParams(max_tokens=10)
    first = [1, 2, 3]
    answer = expected(first, params, ())
    second = first + answer + [6, 6]
    requests = [(first, params, ()), (second, params, ())]
    seqs, _ = run(requests, num_blocks=64, max_num_seqs=1, budget=64, overlap=1, num_snapshots=8)
    assert [seq.num_cached for seq in seqs] == [0, 12]  # 12 of the 13 tokens before the turn's end are whole blocks
    assert seqs[1].output_ids == expected(second, params, ())


def test_samples_given_at_once_wait_for_the_snapshot_of_the_first_even_if_it_takes_many_steps():
    requests = [([5] * 33, SamplingParams(max_tokens=2), ())] * 3
    for budget in (8, 64):
        options = {"num_blocks": 64, "max_num_seqs": 3, "overlap": 1, "num_snapshots": 4}
        seqs, _ = run(requests, budget=budget, arrivals=3, **options)
        assert [seq.num_cached for seq in seqs] == [0, 32, 32]


def test_a_preempted_sequence_resumes_from_its_newest_snapshot(monkeypatch):
    start, cached_counts = Snapshots.start, []

    def note_start(snapshots, placement, found, num_cached, num_tokens):
        cached_counts.append((num_cached, num_tokens))
        start(snapshots, placement, found, num_cached, num_tokens)

    monkeypatch.setattr(Snapshots, "start", note_start)
    requests = [([i, 1, 2], SamplingParams(max_tokens=16), ()) for i in range(4)]
    seqs, scheduler = run(requests, num_blocks=8, max_num_seqs=4, budget=64, overlap=1, num_snapshots=8)
    assert scheduler.num_preemptions > 0
    resumed = [num_cached for num_cached, num_tokens in cached_counts if num_tokens > 3]
    assert resumed and max(resumed) >= BLOCK
    for seq, (prompt, params, stop_ids) in zip(seqs, requests, strict=True):
        assert seq.output_ids == expected(prompt, params, stop_ids)


def test_a_tiny_pool_preempts_and_gives_the_same_tokens():
    requests = [([i, 1, 2], SamplingParams(max_tokens=16), ()) for i in range(4)]
    large, _ = run(requests, num_blocks=64, max_num_seqs=4, budget=64, overlap=1)
    small, scheduler = run(requests, num_blocks=6, max_num_seqs=4, budget=64, overlap=1)
    assert scheduler.num_preemptions > 0
    assert [seq.output_ids for seq in small] == [seq.output_ids for seq in large]


def test_a_sequence_that_is_preempted_before_its_first_token_is_counted_once():
    scheduler = Scheduler(2, 4, BlockManager(64, BLOCK))
    seq = Sequence(list(range(10)), SamplingParams(max_tokens=1))
    scheduler.add(seq)
    scheduler.update(scheduler.schedule(), StepOutput([()]))
    admitted = seq.scheduled_ts
    scheduler.preempt_all()
    scheduler.schedule()
    assert seq.placement.num_computed > 0  # a block that it computed before is a prefix hit now
    assert scheduler.num_prompt_tokens == 10 and scheduler.num_cached_tokens == 0
    assert seq.num_cached == 0 and seq.scheduled_ts == admitted
    assert scheduler.num_preemptions == 0  # the KV cache was not full


def test_a_long_prompt_does_not_stop_decoding():
    scheduler = Scheduler(4, 8, BlockManager(64, BLOCK))
    device = FakeDevice(4)
    first = Sequence([1, 2], SamplingParams(max_tokens=30))
    scheduler.add(first)
    step = scheduler.schedule()
    scheduler.update(step, device.launch(step.batch))
    scheduler.add(Sequence([3] * 60, SamplingParams(max_tokens=1)))
    for generated in range(2, 9):
        step = scheduler.schedule()
        assert step.sequences[0] is first and step.batch.num_decode == 1 and len(step.batch.prefill_rows) == 1
        scheduler.update(step, device.launch(step.batch))
        assert len(first.output_ids) == generated


def test_a_long_prompt_with_a_snapshot_does_not_stop_those_admitted_beside_its_first_chunk():
    scheduler = Scheduler(4, 12, BlockManager(64, BLOCK, True, Snapshots(range(4, 12), BLOCK, 1)))
    device = FakeDevice(4, 8)

    def step():
        scheduled = scheduler.schedule()
        scheduler.update(scheduled, device.launch(scheduled.batch))

    shared = [1, 2, 3, 4, 5, 6, 1, 2]
    scheduler.add(Sequence([*shared, *[0] * 9], SamplingParams(max_tokens=1)))  # its snapshot is after these blocks
    step()
    step()
    long, short = Sequence([*shared, *[3] * 60], SamplingParams(max_tokens=1)), Sequence([2, 2], SamplingParams())
    scheduler.add(long)
    scheduler.add(short)
    for generated in range(1, 7):
        step()
        assert len(short.output_ids) == generated and not long.output_ids


def test_requests_given_at_once_share_a_prefix_within_one_step():
    scheduler = Scheduler(4, 64, BlockManager(64, BLOCK))
    for last in range(3):
        scheduler.add(Sequence([5] * 8 + [last], SamplingParams()))
    step = scheduler.schedule()
    assert [row.num_tokens for row in step.batch.rows] == [9, 1, 1]


def test_samples_of_a_long_prompt_are_admitted_in_several_steps():
    """Each shares 500 cached blocks, which takes a millisecond; hundreds at once would stop all other requests."""
    scheduler = Scheduler(32, 3000, BlockManager(700, BLOCK))
    seqs = [Sequence([1] * 2000, SamplingParams(max_tokens=2), index=i) for i in range(32)]
    for seq in seqs:
        scheduler.add(seq)
    num_steps = 0
    while scheduler.waiting or scheduler.running:
        step = scheduler.schedule()
        assert len(step.batch.new_blocks) < 8500 + 500
        num_steps += 1
        scheduler.update(step, StepOutput([(3,) if row.yields_token else () for row in step.batch.rows]))
    assert 3 <= num_steps <= 8
    assert all(seq.finish_reason == "length" for seq in seqs)


def test_at_least_one_token_is_recomputed_on_a_full_hit():
    requests = [([1] * 8, SamplingParams(max_tokens=2), ()), ([1] * 8, SamplingParams(max_tokens=2), ())]
    seqs, _ = run(requests, num_blocks=16, max_num_seqs=1, budget=16, overlap=0)
    assert [seq.num_cached for seq in seqs] == [0, 4]


def test_a_waiting_prompt_is_hashed_once_and_loses_only_the_blocks_that_were_evicted(monkeypatch):
    manager, hashed = BlockManager(8, BLOCK), []
    chain = block_manager_module._chain
    monkeypatch.setattr(block_manager_module, "_chain", lambda *block: hashed.append(block) or chain(*block))
    first, placement = Sequence([1] * 24, SamplingParams()), Placement(0)
    manager.allocate(placement, 24)
    placement.num_computed = 24
    manager.register(first, placement)
    waiting = Sequence([1] * 24 + [2], SamplingParams())
    assert manager.find_prefix(waiting) == placement.block_table
    hashed.clear()
    assert manager.find_prefix(waiting) == placement.block_table and not hashed
    blocks = list(placement.block_table)
    manager.free(placement)
    other = Placement(1)
    manager.allocate(other, 16)  # two blocks that were never used, and the last two of the prefix
    assert manager.find_prefix(waiting) == blocks[:4] and len(hashed) == 1
    placement = Placement(2)
    manager.share(waiting, placement, blocks[:4])
    assert placement.num_computed == 16 and waiting.found_prefix == []


def test_colliding_hashes_miss_instead_of_mixing_prefixes(monkeypatch):
    monkeypatch.setattr(block_manager_module, "_chain", lambda prefix_hash, token_ids: prefix_hash + 1)
    prompts = [[1] * 4 + [9] * 5, [2] * 4 + [9] * 5, [1] * 4 + [9] * 5]
    requests = [(prompt, SamplingParams(max_tokens=6), ()) for prompt in prompts]
    seqs, _ = run(requests, num_blocks=32, max_num_seqs=1, budget=32, overlap=1)
    for seq, (prompt, params, stop_ids) in zip(seqs, requests, strict=True):
        assert seq.output_ids == expected(prompt, params, stop_ids)


def computed(manager, seq):
    """Return a placement for all of `seq`'s tokens, computed and in the prefix index."""
    placement = Placement(slot=0)
    manager.share(seq, placement, [])
    manager.allocate(placement, len(seq.token_ids))
    placement.num_computed = len(seq.token_ids)
    manager.register(seq, placement)
    return placement


def test_requests_with_different_salts_share_no_blocks_even_if_hashes_collide(monkeypatch):
    monkeypatch.setattr(block_manager_module, "_chain", lambda prefix_hash, token_ids: 1)
    manager = BlockManager(8, BLOCK)
    for salt in ("a", "b", None):
        seq = Sequence([1] * 5, SamplingParams(cache_salt=salt))
        assert manager.find_prefix(seq) == []
        placement = computed(manager, seq)
        assert manager.find_prefix(Sequence([1] * 5, seq.params)) == placement.block_table[:1]


def test_blocks_are_evicted_in_lru_order_and_the_end_of_a_prefix_first():
    manager = BlockManager(6, BLOCK)
    manager.free(computed(manager, Sequence(list(range(12)), SamplingParams())))
    assert list(manager.free_block_ids) == [3, 4, 5, 2, 1, 0]
    manager.allocate(Placement(slot=1), 16)  # takes the unused blocks and the end of the prefix
    assert manager.find_prefix(Sequence(list(range(13)), SamplingParams())) == [0, 1]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "in flight", "finished"])
def test_abort_in_every_state_returns_the_blocks(state):
    manager = BlockManager(16, BLOCK)
    scheduler = Scheduler(2, 4, manager)
    device = FakeDevice(2)
    seq = Sequence(list(range(3 if state in ("decoding", "in flight") else 10)), SamplingParams(max_tokens=3))
    scheduler.add(seq)
    pending = []
    if state != "waiting":
        step = scheduler.schedule()
        pending.append((step, device.launch(step.batch)))
    if state in ("decoding", "prefilling"):
        scheduler.update(*pending.pop())
    if state == "finished":
        scheduler.finish(seq, "abort")
    scheduler.finish(seq, "abort")
    for step, tokens in pending:
        scheduler.update(step, tokens)
    scheduler.finish(seq, "abort")
    assert manager.num_free == 16 and len(scheduler.free_slots) == 2 and not (scheduler.waiting or scheduler.running)


class CostlyFilter:
    """A grammar whose masks take `cost` seconds of a fake clock."""

    depends_on_output, is_complete, error = True, False, None

    def __init__(self, clock, cost):
        self.clock, self.cost = clock, cost

    def accept(self, token_id):
        pass

    def compute_mask(self):
        self.clock.now += self.cost
        return self.cost


class Clock:
    """A fake clock. `passed` is the time since it was last asked for."""

    def __init__(self, monkeypatch):
        self.now = self.before = 0.0
        monkeypatch.setattr(scheduler_module.time, "thread_time", lambda: self.now)

    def passed(self):
        passed, self.before = self.now - self.before, self.now
        return passed


def filtered(clock, cost, num_tokens=20):
    seq = Sequence([1, 2, 3], SamplingParams(max_tokens=num_tokens))
    seq.token_filter = CostlyFilter(clock, cost)
    seq.mask = seq.token_filter.compute_mask()  # as the input processor does
    return seq


def serve(scheduler, clock, overlap=1):
    """Run steps until all is done. Return the times that masks took in each step."""
    device, in_flight, times = FakeDevice(len(scheduler.free_slots)), [], []
    clock.passed()
    while scheduler.waiting or scheduler.running or in_flight:
        step = scheduler.schedule()
        times.append(clock.passed())
        assert len(times) < 2000, "no progress"
        if step:
            in_flight.append((step, device.launch(step.batch)))
            with_mask = {slot for slot, _ in step.batch.masks}
            for seq, row in zip(step.sequences, step.batch.rows, strict=True):
                assert (row.slot in with_mask) == bool(row.yields_token and seq.token_filter)
        if in_flight and (not step or len(in_flight) > overlap):
            scheduler.update(*in_flight.pop(0))
    return times


@pytest.mark.parametrize("overlap", [0, 1])
def test_costly_masks_of_many_requests_share_the_time_of_a_step(monkeypatch, overlap):
    clock = Clock(monkeypatch)
    limit = scheduler_module.STEP_MASK_SECONDS
    costly = [filtered(clock, 0.9 * limit) for _ in range(6)]
    cheap = filtered(clock, 0.01 * limit)
    plain = Sequence([7], SamplingParams(max_tokens=20))
    scheduler = Scheduler(8, 64, BlockManager(64, BLOCK))
    for seq in (*costly, cheap, plain):
        scheduler.add(seq)
    finished = []
    monkeypatch.setattr(
        scheduler, "finish", lambda seq, *why: (finished.append(seq), Scheduler.finish(scheduler, seq, *why))
    )
    times = serve(scheduler, clock, overlap)
    assert max(times) < 2 * limit
    assert set(finished[:2]) == {cheap, plain}  # no costly one delays them
    for seq in (*costly, cheap, plain):
        assert seq.finish_reason == "length" and seq.output_ids == expected(seq.prompt_ids, seq.params, ())


@pytest.mark.parametrize("overlap", [0, 1])
def test_costly_masks_of_preempted_requests_share_the_time_of_a_step(monkeypatch, overlap):
    clock = Clock(monkeypatch)
    limit = scheduler_module.STEP_MASK_SECONDS
    seqs = [filtered(clock, 0.9 * limit) for _ in range(5)]
    scheduler = Scheduler(8, 64, BlockManager(9, BLOCK))
    for seq in seqs:
        scheduler.add(seq)
    assert max(serve(scheduler, clock, overlap)) < 2 * limit
    assert scheduler.num_preemptions
    for seq in seqs:
        assert seq.output_ids == expected(seq.prompt_ids, seq.params, ())


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_a_long_structured_request_gets_its_share_among_endless_short_ones(monkeypatch, num_tokens):
    """A step has time for 10 of 40 masks, and each short request that ends makes room for the next one."""
    clock = Clock(monkeypatch)
    cost = scheduler_module.STEP_MASK_SECONDS / 10
    scheduler = Scheduler(40, 64, BlockManager(400, BLOCK))
    device, in_flight = FakeDevice(40), []
    long = filtered(clock, cost, num_tokens=100)
    scheduler.add(long)
    steps = 0
    while long.status is not Status.FINISHED:
        steps += 1
        assert steps < 500  # one of 40 requests gets a mask every four steps
        while len(scheduler.waiting) + len(scheduler.running) < 40:
            scheduler.add(filtered(clock, cost, num_tokens))
        if step := scheduler.schedule():
            in_flight.append((step, device.launch(step.batch)))
        if in_flight and (not step or len(in_flight) > 1):
            scheduler.update(*in_flight.pop(0))
    assert long.output_ids == expected(long.prompt_ids, long.params, ())


def test_a_request_that_waits_for_its_mask_does_not_stop_those_behind_it(monkeypatch):
    clock = Clock(monkeypatch)
    scheduler = Scheduler(4, 64, BlockManager(64, BLOCK))
    seqs = [filtered(clock, scheduler_module.STEP_MASK_SECONDS) for _ in range(3)]
    plain = Sequence([7], SamplingParams(max_tokens=20))
    for seq in seqs:
        seq.mask = None  # as after a preemption
        scheduler.add(seq)
    scheduler.add(plain)
    assert set(scheduler.schedule().sequences) == {seqs[0], plain}


@pytest.mark.parametrize("num_snapshots", [0, 8])
@pytest.mark.parametrize("caching", [True, False])
def test_a_long_prompt_starts_only_when_all_of_it_fits(caching, num_snapshots):
    """Its first chunk fits beside the others. The whole prompt fits only after they end."""
    short = [([i], SamplingParams(max_tokens=24, ignore_eos=True), ()) for i in range(4)]
    long = (list(range(100, 220)), SamplingParams(max_tokens=4, ignore_eos=True), ())
    snapshots = num_snapshots if caching else 0
    seqs, scheduler = run(
        [*short, long],
        num_blocks=36,
        max_num_seqs=8,
        budget=16,
        overlap=1,
        caching=caching,
        num_snapshots=snapshots,
    )
    assert scheduler.num_preemptions == 0  # so nothing was computed twice
    for seq in seqs:
        assert seq.output_ids == expected(seq.prompt_ids, seq.params, ())


@pytest.mark.parametrize("limit_masks", [True, False])
def test_a_request_whose_mask_takes_too_long_ends_unless_ranks_schedule_for_themselves(monkeypatch, limit_masks):
    clock = Clock(monkeypatch)
    seqs = [filtered(clock, cost) for cost in (1.0, 0.001, 1.0)]
    # These need no more masks after their second token.
    seqs += [filtered(clock, 1.0, num_tokens=2), filtered(clock, 1.0)]
    second_token = expected(seqs[0].prompt_ids, seqs[0].params, ())[1]
    seqs[4].stop_ids = frozenset([second_token])
    scheduler = Scheduler(8, 64, BlockManager(64, BLOCK), limit_masks=limit_masks)
    for seq in seqs:
        scheduler.add(seq)
    times = serve(scheduler, clock)
    if limit_masks:
        assert max(times) < 1.1
        assert [seq.finish_reason for seq in seqs] == ["abort", "length", "abort", "length", "stop"]
        assert "took over 20 ms" in seqs[0].stop_reason and len(seqs[0].output_ids) == 2
    else:  # then schedules must not depend on the clock
        assert max(times) > 2
        assert [seq.finish_reason for seq in seqs] == ["length"] * 4 + ["stop"]


def test_a_request_ends_without_a_search_among_those_that_wait():
    class Counting(Sequence):
        num_compared = 0
        __hash__ = object.__hash__

        def __eq__(self, other):
            Counting.num_compared += 1
            return self is other

    scheduler = Scheduler(2, 64, BlockManager(64, BLOCK))
    seqs = [Counting([1, 2], SamplingParams()) for _ in range(5000)]
    for seq in seqs:
        scheduler.add(seq)
    for seq in seqs[2000:]:
        scheduler.finish(seq, "abort")
    assert len(scheduler.waiting) == 2000 and Counting.num_compared < 100
    assert scheduler.schedule().sequences == seqs[:2]
