"""Triton for the modules of `ops`: an import that works without it, compilation, and dependent launches."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import MagicMock, patch

import torch

from nanovllm.arithmetic import ceil_div

if TYPE_CHECKING:  # kernels are written in a language of their own: a type checker sees all of it as Any

    class _AnyAttribute(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_AnyAttribute):
        constexpr: TypeAlias = Any

    triton: Any = None
    TensorDescriptor: Any = None
    HAVE_TRITON: bool = True
else:
    try:
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor

        HAVE_TRITON = True
    except ImportError:
        HAVE_TRITON = False

        class _MissingKernel:
            """Replace a `triton.jit` function. It can be defined; launching it raises ImportError."""

            def __init__(self, fn: Callable):
                self.name = fn.__name__

            def __getitem__(self, grid: Any) -> Callable:
                raise ImportError(
                    f"kernel {self.name} needs triton, which is not installed; call the *_torch reference instead"
                )

        def _missing_jit(fn: Callable | None = None, **options: Any) -> Any:
            return _MissingKernel if fn is None else _MissingKernel(fn)

        def _next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

        triton = SimpleNamespace(jit=_missing_jit, cdiv=ceil_div, next_power_of_2=_next_power_of_2)
        tl = MagicMock()  # the parameters of kernels are annotated with its attributes
        TensorDescriptor = None

TRITON_VERSION: tuple[int, ...] = (0,)
if HAVE_TRITON:
    TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def kernel_constant(value: Any) -> Any:
    """Return a constant of a module that kernels can read."""
    return tl.constexpr(value)  # pyright: ignore[reportCallIssue]


# Whether kernels run in Triton's interpreter, which knows no inline assembly.
INTERPRETED = kernel_constant(os.environ.get("TRITON_INTERPRET") == "1")


@lru_cache
def preload_triton() -> Future:
    """Start Triton's one-time setup in a thread: hashing its library and building its driver.

    The setup takes about as long as starting CUDA and can run at the same time. An error is not lost: the first kernel
    launch fails the same way and raises it.
    """

    def run() -> None:
        _ = triton.runtime.driver.active
        triton.runtime.cache.triton_key()

    executor = ThreadPoolExecutor(1)
    future = executor.submit(run)
    executor.shutdown(wait=False)
    return future


def current_gpu_initializer() -> Callable[[], None] | None:
    """Return a thread initializer that selects the caller's GPU. A new thread would otherwise use GPU 0."""
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None


class _KernelCompilers(ThreadPoolExecutor):
    """Threads that compile and load kernels.

    A kernel's first launch loads it. Triton 3.6 also waits there for a C compiler to build the launcher. Done one by
    one in an engine's first steps, that takes almost as long as compiling all kernels in parallel.
    """

    def __init__(self):
        super().__init__(os.cpu_count(), initializer=current_gpu_initializer())

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        def compile_and_load() -> Any:
            kernel = fn(*args, **kwargs)
            getattr(kernel, "run", None)  # reading this property builds the launcher and loads the kernel
            return kernel

        return super().submit(compile_and_load)


@lru_cache
def _load_launchers_one_by_one() -> None:
    """Keep Triton 3.6 from giving a kernel the launcher of another one that a second thread loads.

    Its launchers are C modules of one name. When Python loads such a module again, it writes the attributes into the
    last module of that name, which another thread may be about to read. Later versions have one launcher for all.
    """
    if TRITON_VERSION != (3, 6):
        return
    build = triton.runtime.build
    lock = threading.Lock()
    load = build._load_module_from_path

    def load_and_copy(name: str, path: str) -> SimpleNamespace:
        with lock:
            return SimpleNamespace(**vars(load(name, path)))

    build._load_module_from_path = load_and_copy


@contextmanager
def compile_in_parallel() -> Iterator[None]:
    """Compile the kernels launched in this context in parallel threads; all are loaded when it exits.

    Compiling them one after the other takes longer than the rest of an engine's start.
    """
    wait([preload_triton()])
    _load_launchers_one_by_one()
    try:
        with _KernelCompilers() as executor, triton.AsyncCompileMode(executor):
            yield
    except BaseException:
        # If a compilation fails, Triton 3.6 stays in the mode, and no engine could start in this process any more.
        triton.runtime._async_compile.active_mode.set(None)
        raise


_compiling = threading.Lock()


@contextmanager
def compile_without_launch() -> Iterator[None]:
    """Compile the kernels that this thread launches in this context, but do not run them.

    Other threads still launch theirs, because another engine may be running.
    """
    caller = threading.get_ident()
    with _compiling:
        run = triton.JITFunction.run
        empty = torch.empty

        def compile_instead(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            return run(self, *args, warmup=warmup or threading.get_ident() == caller, **kwargs)

        def zeros_instead(*args: Any, **kwargs: Any) -> torch.Tensor:  # torch's own kernels may index with the result
            return (torch.zeros if threading.get_ident() == caller else empty)(*args, **kwargs)

        with patch.object(triton.JITFunction, "run", compile_instead), patch.object(torch, "empty", zeros_instead):
            yield


@lru_cache
def sm_count(device: torch.device) -> int:
    """Return the number of SMs (streaming multiprocessors) of `device`; 1 for a CPU, which runs the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


HOPPER_SHARED_MEMORY = 227 << 10


@lru_cache
def shared_memory_bytes(device: torch.device) -> int:
    """Return the largest shared memory of one program on `device`."""
    if device.type != "cuda":
        return HOPPER_SHARED_MEMORY
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@lru_cache
def is_hopper_or_newer(device: torch.device) -> bool:
    """Return whether `device` has TMA loads and programmatic dependent launch (PDL)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def fits_large_tma_tiles(device: torch.device) -> bool:
    """Return whether `device` has TMA and shared memory for large tiles; desktop Blackwell (12.0) has too little."""
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


@lru_cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Return the launch options of a kernel in a dependent chain: PDL where the device supports it."""
    return {"PDL": True, "launch_pdl": True} if is_hopper_or_newer(device) else {"PDL": False}


@triton.jit
def ordered_int(bits):
    """Map the int32 bits of a float32 to an int32 of the same order. The map is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Allow the next kernel to start. Call this early if `wait_for_inputs` comes too late for that."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_chain(PDL: tl.constexpr):
    """Start a chain of dependent launches. Its later kernels may read everything written before it without waiting."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Allow the next kernel to start, then wait until the previous kernel has finished.

    Under PDL a kernel starts while the previous one still runs. Before this wait it may read only what no kernel of
    the chain writes: weights, and the step's inputs, which are written before the chain starts (`start_chain`).

    At least one program of every kernel in a chain must call this, even if it needs no input: the end of a kernel then
    implies the end of all earlier ones. Other programs without work should exit without waiting, to make room for the
    next kernel.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
