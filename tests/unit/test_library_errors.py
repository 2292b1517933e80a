"""Exceptions of signal handlers reach the caller; errors of libraries become ValueError."""

import functools
import json
import signal
import struct

import numpy as np
import pytest
import safetensors
import transformers

from nanovllm.checkpoints.default_model import default_model
from nanovllm.checkpoints.model_source import open_model
from nanovllm.checkpoints.tokenizers import get_tokenizer
from nanovllm.checkpoints.weight_files import iterate_weights
from nanovllm.library_errors import refusing
from nanovllm.progress import ProgressBar
from tests.helpers import engine, greedy, tokens
from tests.models.tiny import save_tiny, save_tiny_with_tokenizer


class AlarmError(Exception):
    pass


def stop(*_):
    raise TimeoutError("my alarm")  # an OSError


def stop_in_a_type_of_my_own(*_):
    raise AlarmError("my alarm")


class Stopper:
    def stop(self, *_):
        stop()

    def __call__(self, *_):
        stop()


@pytest.fixture
def handler():
    """Return a function that sets the handler of alarms."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handle: signal.signal(signal.SIGALRM, handle)
    signal.signal(signal.SIGALRM, before)


def alarm_in(monkeypatch, owner, name):
    """Let an alarm come while `owner.name` runs."""
    function = getattr(owner, name)

    def run(*args, **options):
        signal.raise_signal(signal.SIGALRM)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, run)


@pytest.mark.parametrize("handle", [stop, stop_in_a_type_of_my_own])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (transformers.AutoConfig, "from_pretrained", open_model),
        (transformers.PretrainedConfig, "get_config_dict", open_model),
        (transformers.PreTrainedTokenizerFast, "from_pretrained", get_tokenizer),
        (json, "loads", open_model),
        (safetensors, "safe_open", lambda folder: list(iterate_weights(folder))),
        (np, "memmap", lambda folder: open_model(folder / "model.gguf")),
    ],
)
def test_an_exception_of_a_signal_handler_reaches_who_reads_a_model(
    tmp_path, monkeypatch, handler, handle, owner, name, call
):
    folder = save_tiny_with_tokenizer(tmp_path, "qwen3")
    (folder / "model.gguf").write_bytes(b"")
    handler(handle)
    alarm_in(monkeypatch, owner, name)
    with pytest.raises((TimeoutError, AlarmError), match="my alarm"):
        call(folder)


def test_an_exception_of_a_signal_handler_reaches_who_downloads(tmp_path, monkeypatch, handler):
    handler(stop)
    alarm_in(monkeypatch, __import__("huggingface_hub"), "snapshot_download")
    with pytest.raises(TimeoutError, match="my alarm"):
        open_model("owner/name")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    alarm_in(monkeypatch, __import__("subprocess"), "run")
    with pytest.raises(TimeoutError, match="my alarm"):
        default_model()


def test_an_alarm_while_an_update_reads_the_config_reaches_the_caller(tmp_path, monkeypatch, handler):
    folder = save_tiny(tmp_path, "qwen3")
    handler(stop)
    with engine(folder) as llm:
        want = tokens(llm, [[5, 6]], greedy(4))
        with monkeypatch.context() as patch:
            alarm_in(patch, transformers.AutoConfig, "from_pretrained")
            with pytest.raises(TimeoutError, match="my alarm"):
                llm.update_weights(folder)
        llm.update_weights(folder)
        assert tokens(llm, [[5, 6]], greedy(4)) == want


@pytest.mark.parametrize(
    "handle", [stop, lambda *args: stop(), Stopper(), Stopper().stop, functools.partial(functools.partial(stop, 1), 2)]
)
def test_each_form_of_a_signal_handler_is_known_also_if_a_library_replaces_its_exception(handler, handle):
    def read():
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception:
            raise OSError("cannot be loaded") from None

    handler(handle)
    with pytest.raises(TimeoutError, match="my alarm"), refusing("bad", Exception):
        read()


def test_an_error_of_a_library_is_refused_although_an_alarm_came_before(handler):
    handler(stop)
    for error in (KeyError("x"), TimeoutError("of a disk"), struct.error("y")):
        try:
            signal.raise_signal(signal.SIGALRM)
        except TimeoutError:
            with (
                pytest.raises(ValueError, match="the file is bad: ") as caught,
                refusing("the file is bad", Exception),
            ):
                raise error  # noqa: B904
    assert isinstance(caught.value.__cause__, struct.error)
    with pytest.raises(KeyError), refusing("bad", OSError):
        raise KeyError
    error = OSError("its own cause")
    with pytest.raises(ValueError, match="its own cause"), refusing("bad", OSError):
        raise error from error


def test_an_exception_of_a_signal_handler_is_not_lost_in_a_progress_bar(monkeypatch, handler):
    class Terminal:
        def write(self, text):
            signal.raise_signal(signal.SIGALRM)

        def flush(self):
            pass

    handler(stop)
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(TimeoutError, match="my alarm"):
        ProgressBar(total=1, mininterval=0)
