"""Ctrl-C at every line of every public call: the engine stays usable, and no request, block or lock is left behind."""

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nanovllm
from nanovllm.arithmetic import ceil_div
from nanovllm.checkpoints.weight_files import iterate_weights
from nanovllm.engine.interrupts import DeferInterrupts
from tests import helpers
from tests.helpers import assert_nothing_held, finish, greedy, tokens
from tests.models.tiny import save_tiny

PACKAGE = str(Path(nanovllm.__file__).parent)
PROMPTS = [[3, 1, 4, 1, 5] * 4, [9, 2, 6]]
SOON = 60  # seconds after which what has not come never will, on a busy machine too


def engine(model, **options):
    return helpers.engine(model, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, **options)


def answers(llm):
    return tokens(llm, PROMPTS, greedy(3))


HOST_CODE = tuple(f"{PACKAGE}/{part}" for part in ("llm.py", "engine/", "executor/", "runner/"))


class Injector:
    """Sends this process SIGINT at the n-th line of the package's host code that the main thread runs in the body."""

    def __init__(self, line):
        self.line = line
        self.count = 0
        self.where = None

    def trace(self, frame, event, _):
        file = frame.f_code.co_filename
        if not file.startswith(HOST_CODE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.line:
                self.where = f"{file.removeprefix(PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
                signal.raise_signal(signal.SIGINT)
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def generate(llm):
    llm.generate(PROMPTS, greedy(3), use_tqdm=False)


def stream(llm):
    iterator = llm.stream(PROMPTS[0], greedy(3))
    next(iterator)
    iterator.close()


def stream_to_the_end(llm):
    list(llm.stream(PROMPTS[0], greedy(3)))


def stream_that_is_dropped(llm):
    iterator = llm.stream(PROMPTS[0], greedy(5))
    next(iterator)
    del iterator  # Python prints and forgets an exception in here


stream_that_is_dropped.may_forget = True


def add_request(llm):
    llm.add_request(PROMPTS[1], greedy(2), request_id="mine")


def with_requests(call):
    """`call` on an engine that has a running and a waiting request."""

    def prepare(llm):
        for i, prompt in enumerate(PROMPTS):
            llm.add_request(prompt, greedy(5), request_id=f"old {i}")
            llm.step()

    call.prepare = prepare
    return call


@with_requests
def step(llm):
    llm.step()


@with_requests
def abort(llm):
    llm.abort("old 0")


@with_requests
def sleep(llm):
    llm.sleep()


@with_requests
def generate_beside_others(llm):
    llm.generate(PROMPTS[:1], greedy(2), use_tqdm=False)


@with_requests
def reset_prefix_cache(llm):
    llm.reset_prefix_cache()


@with_requests
def metrics(llm):
    llm.metrics()


@with_requests
def update_weights(llm):
    llm.update_weights(llm.config.model)


@with_requests
def update_in_parts(llm):
    llm.start_weight_update()
    for pair in iterate_weights(llm.config.model):
        llm.load_weights([pair])
    llm.finish_weight_update()


def wake_up(llm):
    llm.wake_up()


wake_up.prepare = lambda llm: llm.sleep()


def chat(llm):
    llm.chat([[{"role": "user", "content": "a"}]], greedy(3), use_tqdm=False)


CALLS = [
    generate,
    chat,
    generate_beside_others,
    add_request,
    stream,
    stream_to_the_end,
    stream_that_is_dropped,
    step,
    abort,
]
CALLS += [sleep, wake_up, reset_prefix_cache, metrics, update_weights, update_in_parts]
LINES = 120  # of a call that are interrupted, at most; evenly spread


def interrupted(llm, call, line):
    """Run `call` with an interrupt at a line of it. Return where, and whether it came."""
    getattr(call, "prepare", lambda llm: None)(llm)
    injector = Injector(line)
    try:
        with injector:
            call(llm)
    except KeyboardInterrupt:
        return injector, True
    return injector, False


def check(llm, want, where):
    """Check that the engine is usable: unfinished requests finish, new ones are answered, and nothing stays held."""
    with ThreadPoolExecutor(1) as threads:
        try:
            threads.submit(llm.wake_up).result()
        except RuntimeError as error:  # the lock is held
            raise AssertionError(where) from error
    llm.reset_prefix_cache()
    try:
        llm.llm_engine.ensure_usable()
    except RuntimeError as error:
        assert "the last update_weights failed" in str(error) or "a weight update is open" in str(error), where
        llm.update_weights(llm.config.model)
    unfinished = set(llm.llm_engine.core.requests)
    finished = {output.request_id for output in finish(llm, max_steps=100) if output.finished}
    assert unfinished <= finished and unfinished <= {"mine", "old 0", "old 1"}, (where, unfinished, finished)
    assert answers(llm) == want, where
    assert_nothing_held(llm, where)


def sweep(llm, call, want, most):
    """Interrupt `call` at its lines, `most` of them."""
    check(llm, want, "before")
    probe, _ = interrupted(llm, call, 0)  # how many lines there are
    check(llm, want, "uninterrupted")
    assert probe.count > 5
    stride = ceil_div(probe.count, most)
    for line in range(1, probe.count + 1, stride):
        injector, came = interrupted(llm, call, line)
        assert came or injector.where is None or hasattr(call, "may_forget"), f"lost at {injector.where}"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, injector.where
        check(llm, want, injector.where)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2-tied", num_hidden_layers=1)


@pytest.fixture(scope="module")
def llm(model):
    with engine(model) as llm:
        llm.llm_engine.input_processor.chats.prompts = lambda *_, **__: PROMPTS  # there is no tokenizer
        yield llm


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_interrupt_at_any_line_leaves_a_usable_engine(llm, call):
    sweep(llm, call, answers(llm), LINES)


@pytest.mark.parametrize(
    "call", [generate, stream, step, sleep, wake_up, update_weights, update_in_parts], ids=lambda call: call.__name__
)
def test_an_interrupt_leaves_a_usable_engine_of_two_ranks(two_ranks, call):
    sweep(two_ranks, call, answers(two_ranks), 8)


@pytest.fixture(scope="module")
def two_ranks(model):
    with engine(model, tensor_parallel_size=2) as llm:
        yield llm


def close(llm):
    llm.close()


def leave(llm):
    with llm:
        pass


@pytest.mark.parametrize("call", [close, leave], ids=lambda call: call.__name__)
def test_interrupted_close_can_be_called_again(model, call):
    line, count = 1, 1
    while line <= count:
        llm = engine(model)
        llm.add_request(PROMPTS[0], greedy(5))
        llm.step()
        injector, came = interrupted(llm, call, line)
        assert came or injector.where is None
        if not llm.llm_engine.guard.closed:
            assert llm.has_unfinished()
            llm.generate(PROMPTS, greedy(1), use_tqdm=False)
        llm.close()
        assert not llm.llm_engine.holds_resources and not llm.has_unfinished()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            llm.step()
        count = max(count, injector.count)
        line += 1 if line < 10 else 5


class Owner:
    """A request that has outputs."""

    def __init__(self, has_consumer):
        self.has_consumer = has_consumer


@pytest.mark.parametrize("takes_all", [True, False])
def test_an_interrupt_while_outputs_are_taken_loses_none(llm, takes_all):
    engine = llm.llm_engine
    a, b, iterator = Owner(False), Owner(False), Owner(True)
    outputs = {a: 1, b: 2, iterator: 3}
    for line in range(1, 100):
        engine.core.outputs = dict(outputs)
        injector = Injector(line)
        try:
            with injector:
                taken = engine.take_outputs(None if takes_all else {a})
        except KeyboardInterrupt:
            assert engine.core.outputs == outputs, injector.where
        else:
            break
    assert line > 4 and taken == ([1, 2] if takes_all else [1])
    assert engine.core.outputs == ({iterator: 3} if takes_all else {b: 2, iterator: 3})
    engine.core.outputs = {}


def test_second_interrupt_is_raised_at_once():
    def hang(*_):
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)

    reached = []
    with pytest.raises(KeyboardInterrupt), DeferInterrupts(), DeferInterrupts():
        hang()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_deferred_interrupt_is_raised_even_if_the_block_fails():
    with pytest.raises(KeyboardInterrupt), DeferInterrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the body's own error")


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
def test_alarms_and_sigterm_reach_only_the_code_that_makes_the_weights(number):
    def ring(*_):
        rung.append(making)

    def weights():
        nonlocal making
        signal.raise_signal(number)
        making = False
        yield "a", 1
        making = True
        signal.raise_signal(number)

    rung, making, before = [], True, signal.signal(number, ring)
    try:
        with DeferInterrupts() as deferral:
            for _ in deferral.pull(weights()):
                signal.raise_signal(number)  # held back
                assert rung == [True]
            assert rung == [True, True]
        assert len(rung) == 3
    finally:
        signal.signal(number, before)


def test_all_handlers_of_held_back_signals_are_called_even_if_one_raises():
    def note(number, frame):
        called.append(number)
        raise RuntimeError

    called = []
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        with pytest.raises(RuntimeError), DeferInterrupts():
            for number in before:
                signal.raise_signal(number)
            assert not called
        assert sorted(called) == sorted(before)
        assert all(signal.getsignal(number) is note for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handler_that_the_caller_installs_meanwhile_stays():
    before, mine = signal.getsignal(signal.SIGINT), lambda *args: None
    try:
        with DeferInterrupts():
            signal.signal(signal.SIGINT, mine)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_generate_raises_when_on_step_closes_the_engine(model):
    llm = engine(model)
    llm.on_step = lambda stats: llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[3, 4, 5]], greedy(20), use_tqdm=False)


def test_generate_raises_when_another_thread_closes_the_engine(model):
    def launch_and_report(batch):
        launched.set()
        launch(batch)

    llm, launched = engine(model), threading.Event()
    executor = llm.llm_engine.executor
    launch, executor.launch = executor.launch, launch_and_report
    with ThreadPoolExecutor(1) as threads:
        endless = threads.submit(llm.generate, [PROMPTS[1]] * 2000, greedy(50), False)
        assert launched.wait(SOON)
        llm.close()
        assert isinstance(endless.exception(SOON), RuntimeError)
        assert "the engine is closed" in str(endless.exception())
    assert not llm.llm_engine.holds_resources and not llm.has_unfinished()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("stream", lambda llm: llm.add_request([1], greedy(2), stream="false")),
        ("stream", lambda llm: llm.add_request([1], greedy(2), stream=0)),
        ("use_tqdm", lambda llm: llm.generate([[1]], greedy(2), use_tqdm="no")),
        ("use_tqdm", lambda llm: llm.generate([[1]], greedy(2), use_tqdm=0)),
        ("level", lambda llm: llm.sleep(1.0)),
        ("level", lambda llm: llm.sleep(True)),
        ("level", lambda llm: llm.sleep("1" * 5000)),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(llm, name, call):
    with pytest.raises(TypeError, match=f"^{name} must be") as error:
        call(llm)
    assert len(str(error.value)) < 200
    assert_nothing_held(llm)


def test_an_empty_conversation_is_refused(model):
    with engine(model) as llm, pytest.raises(TypeError, match="messages must be a list of dicts"):
        llm.chat_prompts([[]], chat_template="{{ messages }}")
