"""AsyncLLM: many requests from coroutines, on one engine thread."""

import asyncio
import contextlib
import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanovllm import LLM, AsyncLLM, SamplingParams, async_llm
from tests.engine.test_generate import greedy, prompts_of, tokens
from tests.models.tiny import save_tiny

OPTIONS = dict(device="cpu", kvcache_block_size=16, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256)
SECONDS = 120  # until what does not end is a failure, on a busy machine too


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


def with_engine(model, use, **options):
    """Run the coroutine `use(llm)` with an engine; no thread is left behind."""
    others = set(threading.enumerate())

    async def run():
        async with AsyncLLM(model, **OPTIONS, **options) as llm:
            return await asyncio.wait_for(use(llm), SECONDS)

    result = asyncio.run(run())
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("nanovllm")]
    return result


class Steps:
    """An engine's steps from now on. None does anything once none is `left`, so that what is unfinished stays so."""

    def __init__(self, llm, left):
        self.llm, self.left, self.step, llm._llm.step = llm, left, llm._llm.step, self

    def __call__(self):
        if not self.left:
            time.sleep(0.001)
            return []
        self.left -= 1
        return self.step()

    async def allow(self, left):
        await self.llm._call(lambda engine: setattr(self, "left", left))  # not in the middle of one

    async def done(self):
        for _ in range(1000 * SECONDS):
            if not self.left:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("the engine does not go on")


class Gate:
    """Holds the preparation of one prompt, or of all chats, until it is opened."""

    def __init__(self, llm, prompt=None):
        self.processor, self.prompt = llm._llm.input_processor, prompt
        self.reached, self.opened = threading.Event(), threading.Event()
        self.process, self.processor.process = self.processor.process, self.held
        self.chat_prompts, self.processor.chat_prompts = self.processor.chat_prompts, self.held_chat

    def held(self, prompt, *args, **kwargs):
        if prompt == self.prompt:
            self.wait()
        return self.process(prompt, *args, **kwargs)

    def held_chat(self, messages, **kwargs):
        self.wait()
        return [[len(messages)]]

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


def test_the_engine_is_on_the_caller_s_gpu(monkeypatch):
    """Which is that of its thread: others begin with the first."""
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

    monkeypatch.setattr(async_llm, "LLM", Engine)
    torch.cuda.set_device(1)
    AsyncLLM().close()
    assert chosen == [1]


def test_many_concurrent_requests_have_the_batch_s_tokens(model):
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
        taken, deliver, counts = threading.Semaphore(0), llm._deliver, []

        def deliver_and_wait(output):
            deliver(output)
            assert taken.acquire(timeout=SECONDS)

        llm._deliver = deliver_and_wait
        async for out in llm.generate([5, 6], greedy(20)):
            counts.append(len(out.token_ids))
            taken.release()
        return counts

    assert with_engine(model, use) == [1] * 20


def test_a_slow_consumer_gets_what_has_gathered(model):
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


def test_no_more_than_so_many_requests_are_in_the_engine(model):
    async def use(llm):
        seen, step, begin = [], llm._llm.step, threading.Event()

        def watched():
            metrics = llm._llm.metrics()
            seen.append(metrics.num_running + metrics.num_waiting)
            return step()

        llm._llm.step = watched
        adds, add = [], llm._add

        def counted(*request):
            add(*request)
            adds.append(request)
            if len(adds) == 3:  # the first step comes after all that can be added before
                assert begin.wait(SECONDS)

        llm._add = counted
        tasks = [asyncio.create_task(collect(llm, prompt, greedy(8))) for prompt in prompts_of([4] * 20)]
        while len(adds) < 3:
            await asyncio.sleep(0.001)
        begin.set()
        await asyncio.gather(*tasks)
        return max(seen)

    assert with_engine(model, use, max_concurrent_requests=3) == 3


def test_event_loops_come_and_go(model):
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


def test_cancelled_left_and_aborted_requests_free_the_engine(model):
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    async def use(llm):
        steps = Steps(llm, 5)
        task = asyncio.create_task(collect(llm, [5] * 20, long))
        await steps.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await steps.allow(5)
        left = llm.generate([6] * 20, long)
        await anext(left)
        await left.aclose()
        await steps.allow(5)
        aborted = llm.generate([7] * 20, long, "mine")
        await anext(aborted)
        await llm.abort("mine")
        rest = [out async for out in aborted]
        assert rest[-1].finish_reason == "abort" and rest[-1].finished
        await llm.abort("mine")
        await llm.abort("unknown")
        await steps.allow(5)  # for what is in flight, not for what is left of the requests
        busy = True
        while busy:
            metrics = await llm.metrics()
            busy = metrics.num_running or metrics.num_waiting or metrics.kv_usage
        await steps.allow(-1)
        assert len(await collect(llm, [5], greedy(5))) == 5

    with_engine(model, use)


def test_requests_are_told_when_waking_up_fails(model):
    def out_of_memory():
        raise MemoryError("no room to wake up")

    async def use(llm):
        steps = Steps(llm, 5)
        task = asyncio.create_task(collect(llm, [1, 2, 3], greedy(100)))
        await steps.done()
        await llm.sleep(1)
        llm._llm.executor.runner.wake_up = out_of_memory
        with pytest.raises(MemoryError):
            await llm.wake_up()
        with pytest.raises(MemoryError):
            await task
        with pytest.raises(RuntimeError, match="no room"):
            await llm.metrics()

    with_engine(model, use)


def test_requests_are_told_when_closing_fails(model):
    def broken():
        raise ValueError("the GPU is in a bad state")

    async def run():
        llm = AsyncLLM(model, **OPTIONS)
        steps = Steps(llm, 5)
        task = asyncio.create_task(collect(llm, [1, 2, 3], greedy(100)))
        await steps.done()
        executor = llm._llm.executor
        llm._llm.executor.close, close = broken, executor.close
        with pytest.raises(ValueError, match="bad state"):
            await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(task, SECONDS)
        executor.close = close
        llm.close()

    asyncio.run(run())


def test_an_engine_that_is_dropped_is_gone(model):
    def make():
        llm = AsyncLLM(model, **OPTIONS)
        return weakref.ref(llm), weakref.ref(llm._llm)

    refs = make()
    deadline = time.monotonic() + SECONDS
    while any(ref() for ref in refs) and time.monotonic() < deadline:
        gc.collect()
    assert not any(ref() for ref in refs)


def test_a_forked_child_is_told(model):
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


def test_a_call_that_is_cancelled_does_no_harm(model):
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
        await steps.allow(-1)
        return await good, await again

    one, two = with_engine(model, use)
    assert len(one) == 30 and one == two


def test_closing_ends_what_goes_on_and_what_comes(model):
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
        def breaks(engine):
            engine.executor.launch = lambda batch: 1 / 0

        async def wait():
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                await collect(llm, [5], SamplingParams(max_tokens=100, ignore_eos=True))

        steps = Steps(llm, 5)
        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await steps.done()
        llm._call(breaks)
        await steps.allow(-1)
        await asyncio.gather(*waiting)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await llm.metrics()

    with_engine(model, use)


def test_a_model_that_is_not_there_is_the_caller_s_error():
    with pytest.raises(ValueError, match="nowhere"):
        AsyncLLM("./nowhere")
    with pytest.raises(ValueError, match="max_concurrent_requests"):
        AsyncLLM(max_concurrent_requests=0)


def test_weights_and_memory_between_steps(model, tmp_path):
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
        gate = Gate(llm, [999])
        wrong = asyncio.create_task(collect(llm, [999], greedy(5), "same"))
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


def test_closing_ends_what_is_being_prepared(model):
    async def use():
        llm = AsyncLLM(model, **OPTIONS)
        gate = Gate(llm, [9, 9])
        tasks = [asyncio.create_task(collect(llm, [9, 9], greedy(5))) for _ in range(20)]  # most wait for a thread
        tasks.append(asyncio.create_task(llm.chat_prompt([{"role": "user"}])))
        await gate.closed()
        closing = asyncio.create_task(asyncio.to_thread(llm.close))
        while llm._end is None:
            await asyncio.sleep(0.001)
        gate.opened.set()
        await closing
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, RuntimeError) and "closed" in str(result)

    asyncio.run(asyncio.wait_for(use(), SECONDS))


def test_an_error_of_any_kind_while_preparing_is_the_caller_s(model):
    class Panic(BaseException):
        """As tokenizers raises when its code in Rust fails."""

    def panic(*args, **kwargs):
        raise Panic("too many spaces")

    async def use(llm):
        process = llm._llm.input_processor.process
        llm._llm.input_processor.process = panic
        with pytest.raises(Panic, match="spaces"):
            await collect(llm, [5, 6], greedy(3))
        llm._llm.input_processor.process = process
        return await collect(llm, [5, 6], greedy(3))

    assert len(with_engine(model, use)) == 3


def test_the_tokenizer_of_structured_outputs_is_made_when_the_engine_starts(tmp_path):
    from nanovllm.checkpoints.hub import open_model

    tokenizer = open_model(None).tokenizer()
    path = save_tiny(tmp_path, "qwen3", vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.save_pretrained(path)
    with LLM(path, **OPTIONS) as llm:
        assert "grammars" not in vars(llm.input_processor)

    async def use(llm):
        while "grammars" not in vars(llm._llm.input_processor):
            await asyncio.sleep(0.01)

    with_engine(path, use)
