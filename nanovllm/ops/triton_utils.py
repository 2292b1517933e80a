"""Import guard for Triton, so that the kernel modules can be imported on machines without it."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

    class _MissingKernel:
        """Stands in for a `triton.jit` function: fails when it is launched, not when it is defined."""

        def __init__(self, fn: Callable):
            self.name = fn.__name__

        def __getitem__(self, grid: Any) -> Callable:
            raise ImportError(f"kernel {self.name} needs triton, which is not installed; use the *_torch twin instead")

    def _missing_jit(fn: Callable | None = None, **options: Any) -> Any:
        return _MissingKernel if fn is None else _MissingKernel(fn)

    def _next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length()

    # What is evaluated outside of kernel bodies: of `tl`, any name may be, in annotations of kernels' parameters.
    triton: Any = SimpleNamespace(jit=_missing_jit, cdiv=lambda x, y: -(-x // y), next_power_of_2=_next_power_of_2)
    tl: Any = MagicMock()
    TensorDescriptor: Any = None  # no kernel that takes one is ever launched


@lru_cache
def preload_triton() -> Future:
    """Begin what Triton does once in a process before its first kernel: it hashes its library, and builds its driver.

    That takes about as long as CUDA's start and need not wait for it. What fails here fails again, and is told, where
    a kernel needs it.
    """

    def run() -> None:
        _ = triton.runtime.driver.active
        triton.runtime.cache.triton_key()

    executor = ThreadPoolExecutor(1)
    future = executor.submit(run)
    executor.shutdown(wait=False)
    return future


def current_gpu_initializer() -> Callable[[], None] | None:
    """What brings a new thread to this one's GPU: each has a current one, at first the first of all."""
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and make them ready to be launched.

    A kernel's first launch loads it and, in Triton 3.6, waits for a C compiler to build what launches it: in an
    engine's first steps, one after the other, that takes almost as long as all kernels side by side.
    """

    def __init__(self):
        super().__init__(os.cpu_count(), initializer=current_gpu_initializer())

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        def run() -> Any:
            kernel = compile_kernel()
            getattr(kernel, "run", None)  # a property, which makes what it gives
            return kernel

        return super().submit(run)


@contextmanager
def compile_in_parallel() -> Iterator[None]:
    """New kernels are compiled, or read from the cache, side by side, and are ready to be launched when this ends.

    One after the other, an engine's kernels take longer to compile than all else of its start together.
    """
    wait([preload_triton()])
    with _Compilers() as executor, triton.AsyncCompileMode(executor):
        yield


_compiling_only = threading.Lock()


@contextmanager
def compile_without_launch() -> Iterator[None]:
    """Kernels that this thread calls within are compiled, not launched. Other threads' are, as an engine may run."""
    caller = threading.get_ident()
    with _compiling_only:
        run, empty = triton.JITFunction.run, torch.empty

        def compile_instead(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            return run(self, *args, warmup=warmup or threading.get_ident() == caller, **kwargs)

        def zeros_instead(*args: Any, **kwargs: Any) -> torch.Tensor:  # what no kernel writes is an index to others
            return (torch.zeros if threading.get_ident() == caller else empty)(*args, **kwargs)

        with patch.object(triton.JITFunction, "run", compile_instead), patch.object(torch, "empty", zeros_instead):
            yield


@lru_cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; a CPU, where only the interpreter runs, counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


HOPPER_SHARED_MEMORY = 227 << 10


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on `device`."""
    if device.type != "cuda":
        return HOPPER_SHARED_MEMORY
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@lru_cache
def is_hopper_or_newer(device: torch.device) -> bool:
    """Whether `device` has what Hopper brought: loads by TMA, programmatic dependent launch (PDL)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fits_large_tma_tiles(device: torch.device) -> bool:
    """Whether `device` has TMA, and room for large tiles, of which Blackwell's chips for desktops (12.0) have less."""
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


@lru_cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of a kernel of a chain (see below): programmatic dependent launch, where there is such a thing."""
    return {"PDL": True, "launch_pdl": True} if is_hopper_or_newer(device) else {"PDL": False}


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel begin, if that cannot wait for `wait_for_inputs`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_chain(PDL: tl.constexpr):
    """In the first kernel of a chain: what was written before it, all that follow may read before their own wait."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel begin, then wait for the one before to end.

    A kernel so launched begins while the one before it runs. Only this may be read before the wait: what no kernel
    writes, as weights; and what was written before the chain began (see `start_chain`), as the step's inputs. All other
    kernels of a chain must call this, even if they don't need to, in one program at least: the end of one then means
    the end of all before it. Programs that have nothing to do should end without it, and make room for the next
    kernel's.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
