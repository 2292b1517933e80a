"""Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests run them compiled."""

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


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
