"""AsyncLLM: many requests from coroutines, on one engine thread."""

import asyncio
import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from nanovllm import LLM, AsyncLLM, RequestOutputKind, SamplingParams, StructuredOutputsParams, async_llm
from nanovllm.checkpoints.weight_files import iterate_weights
from nanovllm.vllm_options import NEUTRAL_ASYNC
from tests.helpers import greedy, prompts_of, tokens
from tests.models.tiny import save_tiny, save_tiny_with_tokenizer

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256)
SECONDS = 120  # until what does not end is a failure, on a busy machine too


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


def with_engine(model, use, **options):
    """Return the result of the coroutine `use(llm)` with an engine. Check that its threads have ended."""
    others = set(threading.enumerate())

    async def run():
        async with AsyncLLM(model, **OPTIONS, **options) as llm:
            return await asyncio.wait_for(use(llm), SECONDS)

    result = asyncio.run(run())
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("nanovllm")]
    return result


class Steps:
    """Replaces an engine's `step`: lets a number of steps run, and then keeps unfinished requests as they are.

    Args:
        num_allowed: how many steps may run; -1 allows all.
    """

    def __init__(self, llm, num_allowed):
        self.num_allowed = num_allowed
        self.lock = threading.Lock()
        self.step, llm.llm_engine.step = llm.llm_engine.step, self

    def __call__(self):
        with self.lock:
            if self.num_allowed:
                self.num_allowed -= 1
                return self.step()
        time.sleep(0.001)
        return []

    def allow(self, num_allowed):
        with self.lock:
            self.num_allowed = num_allowed

    async def done(self):
        for _ in range(1000 * SECONDS):
            if not self.num_allowed:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("the engine does not go on")


class Gate:
    """Holds the preparation of one prompt, or of all chats, until it is opened."""

    def __init__(self, llm, prompt=None):
        self.processor = llm.llm_engine.input_processor
        self.prompt = prompt
        self.reached, self.opened = threading.Event(), threading.Event()
        self.process, self.processor.process = self.processor.process, self.held
        self.processor.chats.texts_and_ids = self.held_chat

    def held(self, prompt, *args, **kwargs):
        if prompt == self.prompt:
            self.wait()
        return self.process(prompt, *args, **kwargs)

    def held_chat(self, messages, **kwargs):
        self.wait()
        return [("", [len(messages)])]

    def wait(self):
        self.reached.set()
        assert self.opened.wait(SECONDS)

    async def closed(self):
        """Wait until a preparation is held."""
        while not self.reached.is_set():
            await asyncio.sleep(0.001)


async def collect(llm, *args):
    token_ids, last = [], None
    async for last in llm.generate(*args):
        for sample in last.outputs:
            token_ids += sample.token_ids
    assert last.finished
    return token_ids


def test_async_engine_runs_on_the_gpu_of_the_calling_thread(monkeypatch):
    """A new thread starts with the first GPU, so the engine's thread must be set to the caller's."""
    thread, chosen = threading.local(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(thread, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: setattr(thread, "gpu", gpu))

    class Engine:
        def __init__(self, model):
            chosen.append(torch.cuda.current_device())
            self.input_processor = self

        def close(self):
            pass

    monkeypatch.setattr(async_llm, "LLMEngine", Engine)
    torch.cuda.set_device(1)
    AsyncLLM().close()
    assert chosen == [1]


def test_concurrent_requests_give_the_tokens_of_one_batch(model):
    prompts, params = prompts_of(range(1, 41)), greedy(20)
    with LLM(model, **OPTIONS) as llm:
        want = tokens(llm, prompts, params)

    async def use(llm):
        got = await asyncio.gather(*(collect(llm, prompt, params) for prompt in prompts))
        metrics = await llm.metrics()
        return got, metrics

    got, metrics = with_engine(model, use, max_concurrent_requests=30)
    assert got == want and metrics.generated_tokens == 800 and metrics.num_running == 0


def test_tokens_come_one_after_the_other(model):
    async def use(llm):
        taken, counts, steps = threading.Semaphore(0), [], []

        def wait_for_consumer(stats):
            steps.append(stats)
            if len(steps) > 2:  # the first step collects no token, and the second one's is delivered after this call
                assert taken.acquire(timeout=SECONDS)

        llm.llm_engine.on_step = wait_for_consumer
        async for out in llm.generate([5, 6], greedy(20)):
            counts.append(len(out.token_ids))
            taken.release()
        return counts

    assert with_engine(model, use) == [1] * 20


def test_slow_consumer_gets_the_gathered_tokens_in_one_output(model):
    async def use(llm):
        sizes = []
        async for out in llm.generate([5, 6], greedy(60, logprobs=0)):
            assert len(out.token_ids) == len(out.logprobs)
            sizes.append(len(out.token_ids))
            while (await llm.metrics()).num_running:
                pass
        return sizes

    sizes = with_engine(model, use)
    assert sum(sizes) == 60 and len(sizes) <= 2  # what was there at first, and all the rest


def test_engine_never_has_more_than_max_concurrent_requests(model):
    async def use(llm):
        engine, seen, queued, start = llm.llm_engine, [], [], threading.Event()
        step, queue = engine.step, engine.queue

        def watched():
            metrics = engine.metrics()
            seen.append(metrics.num_running + metrics.num_waiting)
            return step()

        def counted(request):
            request_id = queue(request)
            queued.append(request_id)
            if len(queued) == 3:  # the first step comes after all requests that can be queued before
                assert start.wait(SECONDS)
            return request_id

        engine.step, engine.queue = watched, counted
        tasks = [asyncio.create_task(collect(llm, prompt, greedy(8))) for prompt in prompts_of([4] * 20)]
        while len(queued) < 3:
            await asyncio.sleep(0.001)
        start.set()
        await asyncio.gather(*tasks)
        return max(seen)

    assert with_engine(model, use, max_concurrent_requests=3) == 3


def test_engine_serves_event_loops_one_after_the_other_and_at_once(model):
    """Several, one after the other and at once; one is closed without a word to those who wait in it."""

    async def three(llm):
        return await asyncio.gather(*(collect(llm, prompt, greedy(8)) for prompt in prompts_of([4] * 3)))

    async def leave(llm):
        generators.append(llm.generate([1, 2, 3], greedy(120)))
        await anext(generators[0])

    with contextlib.closing(AsyncLLM(model, **OPTIONS, max_concurrent_requests=1)) as llm:
        want = asyncio.run(three(llm))
        assert asyncio.run(three(llm)) == want
        loop, generators = asyncio.new_event_loop(), []
        loop.run_until_complete(leave(llm))
        loop.close()
        counts = [asyncio.run(llm.metrics()).num_running for _ in range(10)]
        assert counts[-1] == 0  # long before its 120 tokens
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(lambda _: asyncio.run(three(llm)), range(3))) == [want] * 3


def test_cancelled_closed_and_aborted_requests_hold_nothing(model):
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    async def use(llm):
        steps = Steps(llm, 5)
        task = asyncio.create_task(collect(llm, [5] * 20, long))
        await steps.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        steps.allow(5)
        left = llm.generate([6] * 20, long)
        await anext(left)
        await left.aclose()
        steps.allow(5)
        aborted = llm.generate([7] * 20, long, "mine")
        await anext(aborted)
        await llm.abort("mine")
        rest = [out async for out in aborted]
        assert rest[-1].finish_reason == "abort" and rest[-1].finished
        await llm.abort("mine")
        await llm.abort("unknown")
        steps.allow(5)  # for what is in flight, not for what is left of the requests
        busy = True
        while busy:
            metrics = await llm.metrics()
            busy = metrics.num_running or metrics.num_waiting or metrics.kv_usage
        steps.allow(-1)
        assert len(await collect(llm, [5], greedy(5))) == 5

    with_engine(model, use)


def test_requests_raise_the_error_when_waking_up_fails(model):
    def out_of_memory(*_, **__):
        raise MemoryError("no room to wake up")

    async def use(llm):
        steps = Steps(llm, 5)
        task = asyncio.create_task(collect(llm, [1, 2, 3], greedy(100)))
        await steps.done()
        await llm.sleep(1)
        llm.llm_engine.executor.runner.wake_up = out_of_memory
        with pytest.raises(MemoryError):
            await llm.wake_up()
        with pytest.raises(MemoryError):
            await task
        with pytest.raises(RuntimeError, match="no room"):
            await llm.metrics()

    with_engine(model, use)


def test_requests_raise_closed_when_closing_fails(model):
    def broken():
        raise ValueError("the GPU is in a bad state")

    async def run():
        llm = AsyncLLM(model, **OPTIONS)
        steps = Steps(llm, 5)
        task = asyncio.create_task(collect(llm, [1, 2, 3], greedy(100)))
        await steps.done()
        executor = llm.llm_engine.executor
        close, executor.close = executor.close, broken
        with pytest.raises(ValueError, match="bad state"):
            await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(task, SECONDS)
        executor.close = close
        llm.close()

    asyncio.run(run())


def test_dropped_async_engine_is_garbage_collected(model):
    def make():
        llm = AsyncLLM(model, **OPTIONS)
        return weakref.ref(llm), weakref.ref(llm.llm_engine)

    refs = make()
    deadline = time.monotonic() + SECONDS
    while any(ref() for ref in refs) and time.monotonic() < deadline:
        gc.collect()
    assert not any(ref() for ref in refs)


def test_forked_child_gets_an_error_about_the_fork(model):
    llm = AsyncLLM(model, **OPTIONS)
    pid = os.fork()
    if pid == 0:
        gc.disable()  # other tests' engines may still be garbage, and have threads that are not here
        try:
            asyncio.run(asyncio.wait_for(collect(llm, [1], greedy(2)), SECONDS))
        except RuntimeError as error:
            os._exit(42 if "forked" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    llm.close()


def test_an_engine_can_be_made_in_a_child_that_was_forked_after_torch_has_used_threads(model):
    program = """
import os, sys
from nanovllm import LLM, SamplingParams
options = dict(device="cpu", max_model_len=512)
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
def answer(llm):
    return llm.generate([[5] * 400], params, use_tqdm=False)[0].token_ids
llm = LLM(sys.argv[1], **options)
want = answer(llm)
child = os.fork()
if child == 0:
    os._exit(42 if answer(LLM(sys.argv[1], **options)) == want else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program, model], env=environment, timeout=SECONDS, check=False)
    assert done.returncode == 42


def test_cancelled_calls_do_not_affect_other_requests(model):
    async def use(llm):
        going_on = asyncio.create_task(collect(llm, [5, 6], greedy(60)))
        for _ in range(30):
            task = asyncio.create_task(llm.metrics())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0.001)
        return await going_on, await llm.metrics()

    token_ids, metrics = with_engine(model, use)
    assert len(token_ids) == 60 == metrics.generated_tokens


def test_a_bad_request_fails_alone(model):
    async def use(llm):
        good = asyncio.create_task(collect(llm, [5, 6], greedy(30)))
        for prompt, error in (([], ValueError), ([999], ValueError), (5, TypeError)):
            with pytest.raises(error, match="prompt"):
                await collect(llm, prompt, greedy(3))
        steps = Steps(llm, 5)
        again = asyncio.create_task(collect(llm, [5, 6], greedy(30), "same"))
        await steps.done()
        with pytest.raises(ValueError, match="same"):
            await collect(llm, [5, 6], greedy(3), "same")
        steps.allow(-1)
        return await good, await again

    one, two = with_engine(model, use)
    assert len(one) == 30 and one == two


def test_a_receive_that_raises_ends_its_own_request_only(model):
    """The other requests of the same step get all their tokens."""

    async def use(llm):
        reported, items = [], []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        def fail(item):
            items.append(item)
            raise ZeroDivisionError

        alone = await collect(llm, [5, 6], greedy(20))
        before = [asyncio.create_task(collect(llm, [5, 6], greedy(20))) for _ in range(2)]
        for prompt in ([7], [8, 9]):
            await llm.submit(prompt, greedy(100), receive=fail)
        after = [asyncio.create_task(collect(llm, [5, 6], greedy(20))) for _ in range(2)]
        assert await asyncio.gather(*before, *after) == [alone] * 4
        assert len(items) == 2 and [type(context["exception"]) for context in reported] == [ZeroDivisionError] * 2
        while (await llm.metrics()).num_running:
            await asyncio.sleep(0.01)
        assert (await llm.metrics()).kv_usage == 0

    with_engine(model, use)


def test_requests_next_to_a_receive_that_raises_see_that_the_engine_is_closed(model):
    async def use():
        llm = AsyncLLM(model, **OPTIONS)
        steps = Steps(llm, 3)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)

        def fail_at_the_end(item):
            if isinstance(item, BaseException):
                raise item

        await llm.submit([7], greedy(100), receive=fail_at_the_end)
        waiting = asyncio.create_task(collect(llm, [5, 6], greedy(100)))
        await steps.done()
        await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="closed"):
            await waiting

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_an_interrupt_in_receive_leaves_the_items_of_others_to_the_event_loop(model):
    loop = asyncio.new_event_loop()
    got = []

    def interrupt(item):
        raise KeyboardInterrupt

    async def start():
        llm = AsyncLLM(model, **OPTIONS)
        steps = Steps(llm, 0)
        await llm.submit([7], greedy(1), receive=interrupt)
        await llm.submit([5, 6], greedy(1), receive=got.append)
        steps.allow(-1)
        return llm

    async def wait_for_item():
        while not got:
            await asyncio.sleep(0.01)

    llm = loop.run_until_complete(start())
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.wait_for(wait_for_item(), SECONDS))
        loop.run_until_complete(asyncio.wait_for(wait_for_item(), SECONDS))
        assert got[0].finished
    finally:
        llm.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.close()


def test_running_and_new_requests_raise_once_the_engine_is_closed(model):
    async def use():
        llm = AsyncLLM(model, **OPTIONS)
        Steps(llm, 5)
        going_on = llm.generate([5], SamplingParams(max_tokens=100, ignore_eos=True))
        await anext(going_on)
        llm.close()
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            while True:
                await anext(going_on)
        with pytest.raises(RuntimeError, match="closed"):
            await collect(llm, [5])

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_a_failed_engine_is_an_error_for_everyone(model):
    async def use(llm):
        async def wait():
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                await collect(llm, [5], SamplingParams(max_tokens=100, ignore_eos=True))

        steps = Steps(llm, 5)
        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await steps.done()
        llm.llm_engine.executor.launch = lambda batch: 1 / 0
        steps.allow(-1)
        await asyncio.gather(*waiting)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await llm.metrics()

    with_engine(model, use)


def test_missing_model_and_bad_limit_raise_in_the_constructor():
    with pytest.raises(ValueError, match="nowhere"):
        AsyncLLM("./nowhere")
    with pytest.raises(ValueError, match="max_concurrent_requests"):
        AsyncLLM(max_concurrent_requests=0)


@pytest.mark.parametrize("launcher", ["torchrun", "external_launcher"])
def test_processes_that_others_started_cannot_share_an_async_engine(model, launcher, monkeypatch):
    """Requests reach them at different times, so their steps would differ, and gloo would abort them."""
    options: dict = {"tensor_parallel_size": 2}
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    else:
        options["distributed_executor_backend"] = launcher
    with pytest.raises(ValueError, match="use LLM, or distributed_executor_backend='mp'"):
        AsyncLLM(model, **OPTIONS, **options)


def test_update_sleep_and_wake_up_run_between_steps(model, tmp_path):
    other = save_tiny(tmp_path, "qwen3", seed=1)
    with LLM(other, **OPTIONS) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))[0]

    async def use(llm):
        before = await collect(llm, [5, 6], greedy(9))
        assert await llm.update_weights(other) == 1
        await llm.sleep(2)
        with pytest.raises(RuntimeError, match="asleep"):
            await collect(llm, [5, 6], greedy(9))
        await llm.wake_up()
        return before, await collect(llm, [5, 6], greedy(9))

    before, after = with_engine(model, use)
    assert before != want == after


def test_requests_that_finish_while_the_engine_falls_asleep_get_their_output(model):
    async def use(llm):
        def sleep_after_the_first_step(stats):
            llm.llm_engine.on_step = None
            llm._engine_thread.submit(llm._run, lambda engine: engine.sleep())  # before the step that collects

        llm.llm_engine.on_step = sleep_after_the_first_step
        outputs = [output async for output in llm.generate(prompts_of([5])[0], greedy(1))]
        assert outputs[-1].finished and await llm.is_sleeping()

    with_engine(model, use)


def test_weights_updated_in_parts_let_requests_wait(model, tmp_path):
    other = save_tiny(tmp_path, "qwen3", seed=1)
    with LLM(other, **OPTIONS) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))[0]

    async def use(llm):
        steps = Steps(llm, 5)
        request = asyncio.create_task(collect(llm, [5, 6], greedy(100)))
        await steps.done()
        steps.allow(-1)
        await llm.start_weight_update()
        num_steps = (await llm.metrics()).num_steps
        with pytest.raises(RuntimeError, match="a weight update is open"):
            await collect(llm, [7], greedy(9))
        for name, tensor in iterate_weights(other):
            await llm.load_weights([(name, tensor)])
        assert (await llm.metrics()).num_steps == num_steps
        assert await llm.finish_weight_update() == 1
        return await collect(llm, [5, 6], greedy(9)), await request

    after, request = with_engine(model, use)
    assert after == want and len(request) == 100


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_failed_update_raises_in_iterations_and_the_next_one_serves_again(model, tmp_path, in_parts):
    other = save_tiny(tmp_path, "qwen3", seed=1)
    bad = [("model.extra", torch.zeros(2))]
    with LLM(other, **OPTIONS) as llm:
        want = tokens(llm, [[5, 6]], greedy(9))[0]

    async def use(llm):
        steps = Steps(llm, 5)
        # The last token of the short request is in flight when the update starts.
        short = asyncio.create_task(collect(llm, [7, 8], greedy(5)))
        waiting = [asyncio.create_task(collect(llm, [5, index], greedy(100))) for index in range(3)]
        await steps.done()
        steps.allow(-1)
        with pytest.raises(ValueError, match=r"model\.extra"):
            if in_parts:
                await llm.start_weight_update()
                await llm.load_weights(bad)
            await llm.update_weights(bad)
        assert len(await short) == 5
        for request in waiting:
            with pytest.raises(RuntimeError, match=r"update_weights failed.*model\.extra"):
                await request
        with pytest.raises(RuntimeError, match="update_weights failed"):
            await collect(llm, [7], greedy(9))
        assert await llm.update_weights(other) == 1
        metrics = await llm.metrics()
        assert metrics.num_running == metrics.num_waiting == 0
        return await collect(llm, [5, 6], greedy(9))

    assert with_engine(model, use) == want


def test_state_of_the_engine_is_public(model):
    async def use(llm):
        await llm.check_health()
        assert llm.max_model_len == 128 and await llm.reset_prefix_cache()
        await llm.sleep(2)
        await llm.check_health()
        assert await llm.is_sleeping()
        await llm.wake_up(["weights"])
        assert await llm.is_sleeping()
        await llm.wake_up(tags=["kv_cache"])
        assert not await llm.is_sleeping()
        with pytest.raises(ValueError, match="has no tokenizer"):
            _ = llm.tokenizer
        llm.shutdown()
        with pytest.raises(RuntimeError, match="closed"):
            await llm.check_health()

    with_engine(model, use)


def test_health_of_an_engine_that_has_failed_is_its_error(model):
    async def use(llm):
        def fail(batch):
            raise ZeroDivisionError("mine")

        llm.llm_engine.executor.launch = fail
        with pytest.raises(ZeroDivisionError):
            await collect(llm, [5, 6], greedy(9))
        with pytest.raises(RuntimeError, match="mine"):
            await llm.check_health()

    with_engine(model, use)


def test_faults_of_a_request_raise_before_its_first_output_is_awaited(model):
    async def use(llm):
        faults = [
            (([],), ValueError, "prompt is empty"),
            (([999],), ValueError, "prompt has 999"),
            (([1] * 128,), ValueError, "prompt has 128 tokens"),
            ((5,), TypeError, "prompt must be"),
            (([1], {"max_tokens": 5}), TypeError, "sampling_params must be"),
            (([1], None, 1.5), TypeError, "request_id"),
            (([1] * 100, SamplingParams(max_tokens=50, min_tokens=40)), ValueError, "min_tokens must be at most 28"),
            (([1], greedy(1, logprobs=4)), ValueError, "max_logprobs=3"),
            (([1], greedy(1, stop="x")), ValueError, "stop strings need a tokenizer"),
            (({"prompt_token_ids": [1], "cache_salt": "a"}, greedy(1, cache_salt="b")), ValueError, "cache_salt"),
        ]
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            params = greedy(1, **{name: {999: 1} if name == "logit_bias" else [999]})
            faults.append((([1], params), ValueError, f"{name} has 999"))
        for arguments, error, match in faults:
            with pytest.raises(error, match=match):
                llm.generate(*arguments)
        await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate([1])

    with_engine(model, use, max_logprobs=3)


def test_arguments_of_vllms_generate_are_accepted_without_effect_and_refused_with(model):
    acting = {
        "data_parallel_rank": 1,
        "kv_hints": object(),
        "lora_request": object(),
        "mm_processor_kwargs": {"num_crops": 4},
        "priority": 1,
        "prompt_text": "text",
        "reasoning_ended": False,
        "reasoning_parser_kwargs": {"a": 1},
        "session_id": "mine",
        "tokenization_kwargs": {"truncation": True},
        "trace_headers": {"a": "b"},
    }

    async def use(llm):
        assert acting.keys() == NEUTRAL_ASYNC.keys()
        neutral = {name: values[0] for name, values in NEUTRAL_ASYNC.items() if values}
        for arguments in (dict.fromkeys(acting), neutral):
            outputs = [output async for output in llm.generate([1], greedy(1), "id", **arguments)]
            assert outputs[-1].finished
        for name, value in acting.items():
            with pytest.raises(ValueError, match=f"{name} is an option of vLLM"):
                llm.generate([1], greedy(1), **{name: value})
        with pytest.raises(TypeError, match="prioritie"):
            llm.generate([1], greedy(1), prioritie=None)

    with_engine(model, use)


def test_tokenizer_and_default_parameters_are_the_models(tmp_path):
    path = save_tiny_with_tokenizer(tmp_path, "qwen3")
    (path / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 3}')
    with LLM(path, **OPTIONS) as llm:
        want = tokens(llm, ["Hello"], None)[0]

    async def use(llm):
        assert llm.tokenizer is await llm.get_tokenizer() and llm.tokenizer.decode(llm.tokenizer.encode("Hi")) == "Hi"
        return await collect(llm, "Hello")

    assert with_engine(path, use) == want and len(want) == 3


def test_an_assignment_to_parameters_changes_later_requests_only(model):
    async def use(llm):
        params = llm.get_default_sampling_params()
        params.max_tokens, params.ignore_eos = 5, True
        outputs, items, gate = llm.generate([5, 6], params), asyncio.Queue(), Gate(llm, [5, 6])
        submitting = asyncio.create_task(llm.submit([5, 6], params, receive=items.put_nowait))
        await gate.closed()
        params.max_tokens = 2
        gate.opened.set()
        await submitting
        assert len([token_id async for output in outputs for token_id in output.outputs[0].token_ids]) == 5
        num_tokens, finished = 0, False
        while not finished:
            output = await items.get()
            num_tokens, finished = num_tokens + len(output.outputs[0].token_ids), output.finished
        assert num_tokens == 5

    with_engine(model, use)


def test_arguments_of_a_wrong_type_are_refused_by_name(tmp_path):
    async def use(llm):
        for value in (5, None, ["a"]):
            with pytest.raises(TypeError, match="text must be a string, got"):
                await llm.encode(value)
        for value in (5, None, "a"):
            with pytest.raises(TypeError, match="tokens must be a list of token ids, got"):
                await llm.decode(value)
        with pytest.raises(TypeError, match="receive must be a function, got 5"):
            await llm.submit([7], greedy(1), receive=5)

    with_engine(save_tiny_with_tokenizer(tmp_path, "qwen3"), use)


def test_abort_ends_several_requests(model):
    async def use(llm):
        steps = Steps(llm, 3)
        requests = [asyncio.create_task(finish_reason(llm, [5, i], greedy(100), f"{i}")) for i in range(3)]
        await steps.done()
        await llm.abort(["0", "2", "unknown"])
        with pytest.raises(TypeError, match="request_id"):
            await llm.abort(["1", 1.5])
        steps.allow(-1)
        return await asyncio.gather(*requests)

    assert with_engine(model, use) == ["abort", "length", "abort"]


@pytest.mark.parametrize("slow", [False, True])
def test_outputs_have_what_the_kind_of_output_says(slow):
    """The default model has a tokenizer. A slow consumer gets several outputs as one."""
    params = dict(temperature=0, max_tokens=12, logprobs=0, n=2, stop=["never in the text"])

    async def use(llm):
        results = {}
        for kind in (None, *RequestOutputKind):
            results[kind] = outputs = []
            async for output in llm.generate("Once upon a time", SamplingParams(**params, output_kind=kind)):
                outputs.append(output)
                await asyncio.sleep(0.05 if slow else 0)
        return results

    results = with_engine(None, use)
    (final,) = results[RequestOutputKind.FINAL_ONLY]
    assert final.finished and len(final.text) > 5 and len(final.token_ids) == 12
    for kind in (None, RequestOutputKind.DELTA):
        for sample in final.outputs:
            parts = [new for out in results[kind] for new in out.outputs if new.index == sample.index]
            assert "".join(part.text for part in parts) == sample.text
            assert [token_id for part in parts for token_id in part.token_ids] == sample.token_ids
    *earlier, last = results[RequestOutputKind.CUMULATIVE]
    assert [sample.text for sample in last.outputs] == [sample.text for sample in final.outputs] and earlier
    for before, after in itertools.pairwise([*earlier, last]):
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert new.text.startswith(old.text) and new.token_ids[: len(old.token_ids)] == old.token_ids
            assert len(new.logprobs) == len(new.token_ids)


async def finish_reason(llm, prompt, params, request_id):
    async for output in llm.generate(prompt, params, request_id):
        if output.finished:
            return output.outputs[0].finish_reason


# -- preparing --------------------------------------------------------------------------------------------------------


def test_a_request_that_is_being_prepared_does_not_stop_others(model):
    async def use(llm):
        gate = Gate(llm, [9, 9])
        slow = asyncio.create_task(collect(llm, [9, 9], greedy(4)))
        chat = asyncio.create_task(llm.chat_prompt([{"role": "user"}]))
        await gate.closed()
        quick = await collect(llm, [5, 6], greedy(20))
        assert not slow.done() and not chat.done()
        gate.opened.set()
        return quick, await slow, await chat

    quick, slow, chat = with_engine(model, use)
    assert len(quick) == 20 and len(slow) == 4 and chat == [1]


def test_a_usual_grammar_does_not_wait_for_costly_ones():
    """llguidance takes 20 s for this schema."""
    patterns = [{"type": "string", "pattern": f".*[a-k].{{{i}}}"} for i in range(5, 20)]
    costly = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputsParams(json={"allOf": patterns}))
    usual = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputsParams(regex="[a-c]{3}"))

    async def use(llm):
        llm.llm_engine.input_processor.grammars._pool.cpu_seconds = 60
        waiting = [asyncio.create_task(collect(llm, "a", costly)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await collect(llm, "a", usual)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()

    with_engine(None, use)


def test_requests_wait_for_threads_by_what_there_is_to_read(model, monkeypatch):
    async def use(llm):
        amounts = []
        for threads in llm._input_threads._threads.values():
            monkeypatch.setattr(threads, "submit", lambda amount, call: (amounts.append(amount), Future())[1])
        params = SamplingParams(bad_words=["a", "b"])
        choice = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a" * 90, "b"]))
        chats = [{"role": "user", "content": "a" * 40}, {"role": "user", "content": [{"type": "text"}]}]
        requests = [
            llm.generate("a" * 50),
            llm.generate([5] * 50),
            llm.generate([5], params),
            llm.generate([5], choice),
        ]
        preparing = [
            *(anext(request) for request in requests),
            llm.chat_prompt(chats),
            llm.chat_prompt(7),
            llm.encode("a" * 60),
            llm.encode(None),
            llm.decode([5] * 70),
        ]
        tasks = [asyncio.ensure_future(each) for each in preparing]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        monkeypatch.undo()
        return amounts

    assert with_engine(model, use) == [50, 3, 256, 91, 168, 0, 60, 0, 70]


def test_chats_do_not_wait_for_templates_that_clients_give(model):
    async def use(llm):
        opened, prepared = threading.Event(), []

        def texts_and_ids(messages, chat_template=None):
            if chat_template:
                assert opened.wait(SECONDS)
                prepared.append(chat_template)
            return [("", [1])]

        llm.llm_engine.input_processor.chats.texts_and_ids = texts_and_ids
        chats = [asyncio.create_task(llm.chat_prompt([{}], chat_template=str(i))) for i in range(20)]
        await asyncio.sleep(0)
        assert await llm.chat_prompt([{}]) == [1]
        for chat in chats[:-1]:
            chat.cancel()
        await asyncio.wait(chats[:-1])
        opened.set()
        assert await chats[-1] == [1]
        return prepared

    prepared = with_engine(model, use)
    assert "19" in prepared and len(prepared) <= 5  # those that had started, and the last


def test_short_grammars_do_not_wait_for_long_ones(model):
    async def use(llm):
        gate = Gate(llm, [9, 9])
        form = StructuredOutputsParams(choice=["a" * 1000 + str(i) for i in range(20)])
        long = [asyncio.create_task(collect(llm, [9, 9], SamplingParams(structured_outputs=form))) for _ in range(20)]
        await gate.closed()
        with pytest.raises(ValueError, match="tokenizer"):  # the model has none
            await collect(llm, [5, 6], SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+")))
        assert not any(task.done() for task in long)
        gate.opened.set()
        await asyncio.wait(long)

    with_engine(model, use)


def test_plain_requests_do_not_wait_for_templates_and_grammars(model):
    """Each of these may take seconds, and a client may send any number of them."""
    regex = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))

    async def use(llm):
        gate = Gate(llm, [9, 9])
        grammars = [asyncio.create_task(collect(llm, [9, 9], regex)) for _ in range(20)]
        chats = [asyncio.create_task(llm.chat_prompt([{"role": "user"}])) for _ in range(20)]
        await gate.closed()
        assert len(await collect(llm, [5, 6], greedy(3))) == 3
        assert not any(task.done() for task in [*grammars, *chats])
        gate.opened.set()
        with pytest.raises(ValueError, match="tokenizer"):
            await grammars[0]  # the model has no tokenizer
        assert await chats[0] == [1]
        await asyncio.wait([*grammars, *chats])
        assert all(task.exception() for task in grammars)

    with_engine(model, use)


def test_a_request_that_is_aborted_while_it_is_prepared_gives_no_token(model):
    async def use(llm):
        gate = Gate(llm, [9, 9])
        outputs = llm.generate([9, 9], greedy(50), "mine")
        first = asyncio.create_task(anext(outputs))
        await gate.closed()
        await llm.abort("mine")
        gate.opened.set()
        output = await first
        assert output.finished and output.finish_reason == "abort" and output.token_ids == []
        assert [out async for out in outputs] == []
        assert len(await collect(llm, [5], greedy(3), "mine")) == 3

    with_engine(model, use)


def test_an_id_of_a_request_that_is_being_prepared_is_refused(model):
    async def use(llm):
        gate = Gate(llm, "a text")
        wrong = asyncio.create_task(collect(llm, "a text", greedy(5), "same"))  # there is no tokenizer
        await gate.closed()
        with pytest.raises(ValueError, match=r"request_id 'same' .* being prepared"):
            await collect(llm, [5, 6], greedy(3), "same")
        gate.opened.set()
        with pytest.raises(ValueError, match="prompt"):
            await wrong
        with pytest.raises(TypeError, match="request_id"):
            await collect(llm, [5, 6], greedy(3), ["same"])
        return await collect(llm, [5, 6], greedy(3), "same")

    assert len(with_engine(model, use)) == 3


def test_an_id_whose_event_loop_has_closed_is_free_again(model):
    async def start(llm):
        task = asyncio.ensure_future(anext(llm.generate(prompts_of([5])[0], greedy(1), "mine")))
        await asyncio.sleep(0)
        return task

    llm = AsyncLLM(model, **OPTIONS)
    loop = asyncio.new_event_loop()
    abandoned = loop.run_until_complete(start(llm))
    loop.close()

    async def again():
        return [output async for output in llm.generate(prompts_of([5])[0], greedy(1), "mine")]

    assert asyncio.run(again())[-1].finished
    assert not abandoned.done()
    llm.close()


def test_a_request_that_is_cancelled_while_it_is_prepared_never_reaches_the_engine(model):
    async def use(llm):
        gate = Gate(llm, [9, 9])
        tasks = [asyncio.create_task(collect(llm, [9, 9], greedy(50), str(i))) for i in range(20)]  # most wait
        await gate.closed()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        gate.opened.set()
        assert len(await collect(llm, [5], greedy(3), "0")) == 3
        return await llm.metrics()

    metrics = with_engine(model, use, max_concurrent_requests=10)
    assert metrics.generated_tokens == 3 and metrics.prompt_tokens == 1


def test_requests_in_preparation_raise_once_the_engine_is_closed(model):
    async def use():
        llm = AsyncLLM(model, **OPTIONS)
        gate = Gate(llm, [9, 9])
        tasks = [asyncio.create_task(collect(llm, [9, 9], greedy(5))) for _ in range(20)]  # most wait for a thread
        tasks.append(asyncio.create_task(llm.chat_prompt([{"role": "user"}])))
        await gate.closed()
        closing = asyncio.create_task(asyncio.to_thread(llm.close))
        with pytest.raises(RuntimeError, match="closed"):
            while True:
                await llm.metrics()
        gate.opened.set()
        await closing
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, RuntimeError) and "closed" in str(result)

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_any_error_while_preparing_reaches_only_its_caller(model):
    class Panic(BaseException):
        """As tokenizers raises when its code in Rust fails."""

    def panic(*args, **kwargs):
        raise Panic("too many spaces")

    async def use(llm):
        processor = llm.llm_engine.input_processor
        process, processor.process = processor.process, panic
        with pytest.raises(Panic, match="spaces"):
            await collect(llm, [5, 6], greedy(3))
        processor.process = process
        return await collect(llm, [5, 6], greedy(3))

    assert len(with_engine(model, use)) == 3


def test_the_tokenizer_of_structured_outputs_is_made_when_the_engine_starts(tmp_path):
    from nanovllm.checkpoints.model_source import open_model

    tokenizer = open_model(None).tokenizer()
    path = save_tiny(tmp_path, "qwen3", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    with LLM(path, **OPTIONS) as llm:
        assert "grammars" not in vars(llm.llm_engine.input_processor)

    async def use(llm):
        while "grammars" not in vars(llm.llm_engine.input_processor):
            await asyncio.sleep(0.01)

    with_engine(path, use)
