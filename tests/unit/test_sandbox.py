"""A pool of child processes: limits, threads, killed children, interrupts and the end."""

import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from nanovllm.sandbox.pool import _SERVE, Pool, TooCostly, _Child
from nanovllm.utils.child_process import import_path
from tests.helpers import wait_until

PLAIN = "{{ messages[0].content }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def request(template=PLAIN):
    arguments = {"conversation": [{"role": "user", "content": "Hello"}], "chat_template": template}
    return {"arguments": arguments, "max_chars": 1000}


def made(**limits):
    pool = Pool("templates", {}, "refused")
    for name, value in limits.items():
        setattr(pool, name, value)
    return pool


def has_ended(child):
    try:
        os.kill(child.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_thread_that_comes_meanwhile_gets_a_child_of_its_own_and_close_ends_all():
    pool, errors = made(), []

    def ask():
        try:
            pool.ask(request(ENDLESS))
        except RuntimeError as error:
            errors.append(str(error))

    assert pool.ask(request()) == {"text": "Hello"}
    (first,) = pool._idle
    thread = threading.Thread(target=ask)
    thread.start()
    while pool._idle:  # until the thread has taken it
        pass
    assert pool.ask(request()) == {"text": "Hello"}
    (second,) = pool._children - {first}
    pool.close()
    thread.join()
    assert errors == ["the engine is closed"]
    assert has_ended(first) and has_ended(second)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        pool.ask(request())
    pool.close()


def test_a_pool_that_is_dropped_ends_its_children():
    pool = made()
    pool.ask(request())
    (child,) = pool._idle
    del pool
    assert has_ended(child)


def test_a_child_that_was_killed_while_idle_is_replaced():
    pool = made()
    pool.ask(request())
    (child,) = pool._idle
    child.process.kill()
    child.process.wait()
    assert pool.ask(request()) == {"text": "Hello"}
    assert pool._children == set(pool._idle) != {child}
    pool.close()


def test_idle_children_that_were_killed_cost_no_request():
    pool = made()
    threads = [threading.Thread(target=pool.ask, args=[request()]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wait_until(lambda: not pool._num_starting)
    for child in pool._idle:
        child.process.kill()
        child.process.wait()
    assert pool.ask(request()) == {"text": "Hello"}
    pool.close()


def killing(pool, monkeypatch, times):
    """Let the children that `pool` takes be killed right before they are asked."""
    take, killed = pool._take, []

    def take_and_kill():
        child = take()
        if len(killed) < times:
            child.process.send_signal(signal.SIGKILL)
            killed.append(child)
        return child

    monkeypatch.setattr(pool, "_take", take_and_kill)
    return killed


def test_a_child_that_has_grown_is_replaced():
    pool = made(memory=600 << 20)
    for i in range(20):
        pool.ask(request(f"{i}"))
    (first,) = pool._idle
    kept = '{% if false %}{{ "x" * 60000000 }}{% endif %}{{ messages[0].content }}'  # Jinja makes the text once
    for i in range(5):
        assert pool.ask(request(kept.replace("x", chr(97 + i)))) == {"text": "Hello"}
    assert pool.ask(request()) == {"text": "Hello"}
    assert has_ended(first) and first not in pool._children and len(pool._children) == 1
    pool.close()


def test_a_request_whose_child_was_killed_is_asked_once_more(monkeypatch):
    pool = made()
    killed = killing(pool, monkeypatch, 1)
    assert pool.ask(request()) == {"text": "Hello"}
    assert len(killed) == 1 and len(pool._children) == 1
    killed = killing(pool, monkeypatch, 2)
    with pytest.raises(RuntimeError, match="refused: two processes ended, the last with code -9"):
        pool.ask(request())
    assert len(killed) == 2 and not pool._children
    pool.close()


def test_a_request_beyond_a_limit_is_refused_and_not_asked_again():
    pool = made(cpu_seconds=1)
    with pytest.raises(ValueError, match="refused: it took more than 1 s of CPU time"):
        pool.ask(request(ENDLESS))
    pool.close()
    pool = made()
    with pytest.raises(TooCostly, match=r"refused: it took more than 0\.1 s of CPU time"):
        pool.ask(request(ENDLESS), cpu_seconds=0.1)
    assert pool.ask(request()) == {"text": "Hello"}
    pool.close()
    pool = made(wall_seconds=0.5)
    with pytest.raises(ValueError, match=r"refused: it took more than 0\.5 s"):
        pool.ask(request(ENDLESS))
    assert not pool._children
    pool.close()


def test_a_parent_that_ignores_or_blocks_the_signal_of_the_limit_changes_nothing():
    previous = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    pool = made()
    try:
        with pytest.raises(TooCostly):
            pool.ask(request(ENDLESS), cpu_seconds=0.1)
    finally:
        pool.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        signal.signal(signal.SIGPROF, previous)


def test_an_interrupted_request_leaves_no_reply_for_the_next(monkeypatch):
    pool = made()
    pool.ask(request())
    (child,) = pool._idle
    monkeypatch.setattr(type(child.channel), "recv_bytes", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pool.ask(request())
    monkeypatch.undo()
    assert has_ended(child)
    assert pool.ask(request("{{ 1 + 1 }}")) == {"text": "2"}
    pool.close()


def test_an_interrupt_while_the_timer_starts_leaves_no_thread(monkeypatch):
    pool = made()
    pool.ask(request())

    def start(timer):
        threading.Thread.start(timer)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", start)
    with pytest.raises(KeyboardInterrupt):
        pool.ask(request())
    monkeypatch.undo()
    pool.close()
    assert wait_until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))


def test_ctrl_c_in_a_terminal_does_not_reach_a_child():
    pool = made()
    pool.ask(request())
    (child,) = pool._idle
    assert os.getsid(child.process.pid) != os.getsid(0)
    pool.close()


@pytest.mark.parametrize("executable", ["", "/nowhere/python"])
def test_a_child_that_cannot_be_started_is_a_clear_error(monkeypatch, executable):
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(RuntimeError, match=r"refused: no process can be started: .*(sys.executable|/nowhere/python)"):
        made().ask(request())


def test_children_start_without_standard_streams(tmp_path):
    program = """
import sys
from tests.unit.test_sandbox import made, request
with open(sys.argv[1], "w") as file:
    print(made().ask(request()), file=file)
"""
    command = ["sh", "-c", 'exec "$0" "$@" 0<&- 1>&- 2>&-', sys.executable, "-c", program, str(tmp_path / "reply")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0
    assert (tmp_path / "reply").read_text() == "{'text': 'Hello'}\n"


def test_a_deleted_working_folder_is_left_out_of_the_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert import_path()[0] == str(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert not {"", str(tmp_path / "gone")} & set(import_path())
    pool = made()
    assert pool.ask(request()) == {"text": "Hello"}
    pool.close()


def test_without_a_free_descriptor_the_error_is_clear_and_nothing_stays_open():
    pool = made()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 4, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(4):  # a child needs more
            with pytest.raises(RuntimeError, match=r"no process can be started: .*Too many open files"):
                pool.ask(request())
            os.close(taken.pop())
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not pool._children and len(os.listdir("/proc/self/fd")) == len(before)


def test_close_ends_a_child_that_was_being_started(monkeypatch):
    pool, children = made(), []

    class Slow(_Child):
        def __init__(self, *args):
            super().__init__(*args)
            children.append(self)
            pool.close()

        def ask(self, *messages, wall_seconds):
            pytest.fail("it was asked")

    monkeypatch.setattr("nanovllm.sandbox.pool._Child", Slow)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        pool.ask(request())
    assert wait_until(lambda: has_ended(children[0])) and not pool._children


def test_requests_that_come_at_once_take_the_first_child_that_is_idle():
    """A new child takes a second, a request some milliseconds. So the first child does the work of all."""
    pool, answering, replies = made(), [], []
    pool.ask(request())
    (first,) = pool._children
    ask = first.ask
    first.ask = lambda *messages, **options: (answering.append(messages), ask(*messages, **options))[1]
    threads = [threading.Thread(target=lambda: replies.append(pool.ask(request()))) for _ in range(4)]
    first.process.send_signal(signal.SIGSTOP)
    for thread in threads:
        thread.start()
    assert wait_until(lambda: pool._num_waiting == 3)
    first.process.send_signal(signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert replies == [{"text": "Hello"}] * 4 and len(answering) > 1
    assert wait_until(lambda: not pool._num_starting) and len(pool._children) <= 4
    pool.close()


def test_a_child_ends_with_its_parent():
    code = (
        "import os, signal; from tests.unit.test_sandbox import made, request; pool = made(); pool.ask(request())\n"
        "print(pool._idle[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
    assert parent.returncode == -signal.SIGKILL
    while os.path.exists(f"/proc/{pid}/exe"):  # a zombie has none
        pass


@pytest.mark.parametrize("program", ["templates", "grammars"])
def test_a_child_imports_neither_the_packages_code_nor_torch(program):
    code = (
        "import runpy, sys; load = runpy.run_path(sys.argv[1])['load']; assert load(sys.argv[2]).prepare\n"
        "print('torch' in sys.modules, hasattr(sys.modules['nanovllm'], 'LLM'))"
    )
    command = [sys.executable, "-c", code, str(_SERVE), program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
