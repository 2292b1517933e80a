"""A Triton driver without a GPU: it compiles kernels to Hopper machine code instead of launching them."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanovllm.ops import triton_utils


class CompileOnly:
    """The part of a driver that Triton uses before it launches anything."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(CompileOnly())
original = triton_utils.launch_options
for module in list(sys.modules.values()):  # kernel modules that are imported already have bound the name
    if getattr(module, "launch_options", None) is original:
        module.launch_options = lambda device: {"PDL": True, "launch_pdl": True}
launch = JITFunction.run
compiled = []


def compile_instead(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.append((self.__name__, kernel))
    return kernel


JITFunction.run = compile_instead
__all__ = ["compiled", "triton"]
