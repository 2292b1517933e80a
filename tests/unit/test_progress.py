"""Progress bars that are interrupted or cannot be written to."""

import sys
import threading

import pytest
from tqdm import tqdm

from nanovllm.progress import ProgressBar


class Interrupting:
    """A stderr whose first write is interrupted."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        error, self.error = self.error, None
        if error:
            raise error

    def flush(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError()])
def test_an_interrupted_or_failed_write_leaves_other_bars_usable(error, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Interrupting(error))
    try:
        with ProgressBar(total=2, mininterval=0) as bar:
            bar.update()
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    done = threading.Event()

    def use_other_bars():
        for kind in (ProgressBar, tqdm):
            with kind(total=1, mininterval=0) as bar:
                bar.update()
        done.set()

    threading.Thread(target=use_other_bars, daemon=True).start()
    assert done.wait(60)


def test_a_process_without_stderr_has_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBar(total=1) as bar:
        bar.update()
    assert bar.disable
