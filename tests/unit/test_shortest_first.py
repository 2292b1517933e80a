"""Threads that take the shortest of the calls that wait."""

import threading

import pytest

from nanovllm.utils.shortest_first import ShortestFirst


def test_the_shortest_call_that_was_not_cancelled_is_next_and_equal_ones_keep_their_order():
    threads, release, done = ShortestFirst(1, "test"), threading.Event(), []
    first = threads.submit(100, release.wait)
    calls = [
        threads.submit(work * 5000, lambda work=work, i=i: done.append((work, i)))
        for i, work in enumerate([9, 5, 7, 5, 1])
    ]
    assert calls[2].cancel()
    release.set()
    threads.shutdown()
    assert first.result() and done == [(1, 4), (5, 1), (5, 3), (9, 0)]
    assert [call.cancelled() for call in calls] == [False, False, True, False, False]


def test_short_calls_overtake_a_long_one_for_a_while_only(monkeypatch):
    threads, release, done = ShortestFirst(1, "test"), threading.Event(), []
    threads.submit(0, release.wait)
    for seconds, num_chars, name in (
        (0, 5_000, "long"),
        (1, 10**9, "huge"),
        (4, 0, "short"),
        (6, 0, "late"),
        (62, 0, "last"),
    ):
        monkeypatch.setattr("time.monotonic", lambda seconds=seconds: seconds)
        threads.submit(num_chars, lambda name=name: done.append(name))
    monkeypatch.undo()
    release.set()
    threads.shutdown()
    assert done == ["short", "long", "late", "huge", "last"]


def test_errors_are_those_of_the_call():
    threads = ShortestFirst(2, "test")
    with pytest.raises(ZeroDivisionError):
        threads.submit(1, lambda: 1 // 0).result()
    assert threads.submit(1, lambda: 2).result() == 2
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(1, lambda: 2)


def test_a_call_whose_caller_was_interrupted_takes_the_turn_of_no_other(monkeypatch):
    threads, done = ShortestFirst(1, "test"), []

    def interrupt(call):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threads._threads, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            threads.submit(1, lambda: done.append(1))
    threads.submit(2, lambda: done.append(2)).result(60)
    threads.shutdown()
    assert done == [2]
