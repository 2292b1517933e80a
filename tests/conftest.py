"""Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests run them compiled."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
