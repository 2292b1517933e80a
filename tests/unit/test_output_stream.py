"""The stream of one request's outputs, whose consumer may be slow."""

import asyncio
import random

import pytest

from nanovllm.output_stream import OutputStream, keep_newest


def test_outputs_that_nobody_reads_are_copied_a_few_times_each():
    copied = 0

    def merge(first, second):
        nonlocal copied
        copied += len(first) + len(second)
        return first + second

    async def use():
        stream = OutputStream(merge, copies=True)
        for i in range(4096):
            stream.put([i])
        return await stream.get()

    assert asyncio.run(use()) == list(range(4096))
    assert copied <= 4096 * 13


@pytest.mark.parametrize("seed", range(20))
def test_a_consumer_gets_all_outputs_in_order_and_then_the_error(seed):
    choose = random.Random(seed)

    async def use():
        stream, got = OutputStream(lambda first, second: first + second, copies=True), []
        for i in range(200):
            stream.put([i])
            if choose.random() < 0.1:
                got += await stream.get()
        stream.put([200])
        stream.put(RuntimeError("the end"))
        got += await stream.get()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the end"):
                await stream.get()
        return got

    assert asyncio.run(use()) == list(range(201))


def test_the_newest_of_whole_outputs_replaces_the_others_at_once():
    async def use():
        stream = OutputStream(keep_newest, copies=False)
        for i in range(10):
            stream.put(i)
            assert len(stream._outputs) == 1
        return await stream.get()

    assert asyncio.run(use()) == 9
