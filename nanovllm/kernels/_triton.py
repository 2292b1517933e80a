"""Import guard for Triton, so that the kernel modules can be imported on machines without it."""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

    class _MissingKernel:
        """Stands in for a `triton.jit` function: fails when it is launched, not when it is defined."""

        def __init__(self, fn: Callable):
            self.name = fn.__name__

        def __getitem__(self, grid: Any) -> Callable:
            raise ImportError(f"kernel {self.name} needs triton, which is not installed; use the *_torch twin instead")

    class _MissingTriton:
        """The part of the `triton` module that is evaluated outside of kernel bodies."""

        @staticmethod
        def jit(fn: Callable | None = None, **options: Any) -> Any:
            return _MissingKernel(fn) if fn is not None else _MissingKernel

        @staticmethod
        def cdiv(x: int, y: int) -> int:
            return -(-x // y)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

    class _MissingLanguage:
        """Answers every `tl.<name>`, which annotations and defaults of kernel parameters read at definition time."""

        def __getattr__(self, name: str) -> Any:
            return None

    triton: Any = _MissingTriton()
    tl: Any = _MissingLanguage()

__all__ = ["HAVE_TRITON", "tl", "triton"]
