"""Exact FP8 in Triton's interpreter, whose own conversion to FP8 does not carry when it rounds up."""

import numpy as np
import pytest
import torch

from nanovllm.ops.triton_utils import HAVE_TRITON, tl
from tests.kernels.interpreter import patch_language_once_per_launch

if HAVE_TRITON:
    patch_language_once_per_launch()


def _convert(data: np.ndarray, source, target) -> np.ndarray:
    """Convert numbers between e4m3, as bytes, and another dtype as torch does; saturate, as the hardware does.

    Args:
        source, target: Triton's dtypes. bfloat16 is stored as its bits.
    """
    dtypes = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
    dtypes[tl.float8e4nv] = torch.float8_e4m3fn
    x = torch.from_numpy(np.ascontiguousarray(data).view(f"u{data.itemsize}")).view(dtypes[source]).float()
    if target == tl.float8e4nv:
        x = x.clamp(-448, 448)
    x = x.to(dtypes[target])
    return x.view(getattr(torch, f"uint{8 * x.itemsize}")).numpy().reshape(data.shape)


@pytest.fixture(autouse=True)
def exact_fp8(monkeypatch):
    if not HAVE_TRITON:
        return
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if tl.float8e4nv in (source, target):
            return _convert(data, source, target)
        return original(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
