"""Everything an engine is told, checked once and then frozen."""

from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHOICES = {
    "dtype": ("auto", *_DTYPES),
    "device": ("auto", "cpu", "cuda"),
    "attention_backend": ("auto", "torch", "triton", "flash_attn"),
    "load_format": ("auto", "dummy"),
}


@dataclass(frozen=True, slots=True)
class Config:
    """The arguments of `LLM`.

    Args:
        model: a local folder, a `.gguf` file, a hub id, a shape's name for `load_format="dummy"`, or None for the
            embedded default model.
        enforce_eager: run without CUDA graphs.
        tensor_parallel_size: ranks the model is split over. Under `torchrun` it must equal the world size.
        max_model_len: longest prompt plus output, in tokens; at most what the model knows.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step, at least max_num_seqs.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and KV cache together.
        kvcache_block_size: tokens in a KV block, a power of two of at least 16.
        num_kvcache_blocks: size of the KV pool; None measures the free memory (GPU) or takes up to 1 GiB (CPU).
        dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU.
        device: "auto" is "cuda" where there is one.
        attention_backend: "auto" picks and logs; a named one is used or raises.
        load_format: "auto" reads the checkpoint; "dummy" draws random weights of the real shapes.
        enable_prefix_caching: share the KV blocks of equal prompt prefixes.
        seed: the engine's own; requests without a seed draw theirs from it.
        skip_tokenizer_init: never load the tokenizer: token ids in, token ids out, and texts are "".
        max_num_waiting: sequences that may wait; more are refused.
        log_steps: tell the logger "nanovllm", at level INFO, of each step.
        overlap: steps launched ahead of the one whose tokens are awaited: 1, or 0 for debugging.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
    """

    model: str | Path | None = None
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    max_model_len: int = 4096
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    kvcache_block_size: int = 64
    num_kvcache_blocks: int | None = None
    dtype: str | torch.dtype = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    load_format: str = "auto"
    enable_prefix_caching: bool = True
    seed: int = 0
    skip_tokenizer_init: bool = False
    max_num_waiting: int = 1 << 20
    log_steps: bool = False
    overlap: int = 1

    def __post_init__(self):
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        self._integer("tensor_parallel_size", 1, 1024)
        self._integer("max_model_len", 2, 1 << 24)  # one token of prompt, one of output
        self._integer("max_num_seqs", 1, 1 << 16)
        self._integer("max_num_batched_tokens", 1, 1 << 22)
        self._integer("kvcache_block_size", 16, 1 << 16)
        self._integer("max_num_waiting", 1, 1 << 30)
        self._integer("seed", 0, (1 << 63) - 1)
        self._integer("overlap", 0, 1)
        if self.num_kvcache_blocks is not None:
            self._integer("num_kvcache_blocks", 1, (1 << 31) - 2)
        for name in ("enforce_eager", "enable_prefix_caching", "skip_tokenizer_init", "log_steps"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, one of {', '.join(choices)}, got {value!r}")
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be a number above 0 and up to 1, got {share!r}")
        if self.kvcache_block_size & (self.kvcache_block_size - 1):
            raise ValueError(f"kvcache_block_size must be a power of two, got {self.kvcache_block_size}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): a step holds one token of each running sequence"
            )
        if not isinstance(self.model, str | Path | None):
            raise TypeError(f"model must be a path, a hub id or None, got {self.model!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' was asked for, but torch sees no CUDA GPU here; use 'cpu' or 'auto'")

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        object.__setattr__(self, name, int(value))  # numpy's narrow integers would wrap around in sums

    @property
    def device_type(self) -> str:
        """ "cuda" or "cpu"."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def torch_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The dtype of weights, activations and KV cache."""
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        return checkpoint_dtype if self.device_type == "cuda" else torch.float32
