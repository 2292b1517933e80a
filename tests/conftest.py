"""Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests run them compiled."""

import gc
import os
import signal

# Before torch is imported, and for all child processes: there is a worker for each core, and threads of several
# processes that wait for each other at every small operation cost more than the operations.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

# A shell ignores Ctrl-C in the commands that it runs in the background, and then Python installs no handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Exclude what is imported by now from garbage collections: most objects, and never garbage.

    Each `close` and `sleep` of an engine collects garbage, which would take longer than most tests themselves.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    # Otherwise extension modules call these objects leaks.
    gc.unfreeze()


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
