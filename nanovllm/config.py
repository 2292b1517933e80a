"""The options of an engine. They are checked once and then frozen."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from nanovllm.arithmetic import is_power_of_2
from nanovllm.checks import ABOVE_0, check_fields, one_of, plain, shown, within

ATTENTION_BACKENDS = ("auto", "torch", "triton", "flash_attn")


@dataclass(frozen=True, slots=True)
class Config:
    """The arguments of `LLM`.

    Args:
        model: a local folder, a `.gguf` file, a hub id, a shape's name for `load_format="dummy"`, or None for the
            default model.
        enforce_eager: run without CUDA graphs.
        tensor_parallel_size: number of ranks that share the model. Under `torchrun` it must equal the world size.
        max_model_len: longest prompt plus output, in tokens; capped at what the model supports with its RoPE scaling.
        max_num_seqs: how many sequences run at once.
        max_num_batched_tokens: token budget of one step, at least max_num_seqs.
        gpu_memory_utilization: fraction of the GPU's memory for weights, activations and KV cache together.
        kvcache_block_size: tokens in a KV block, a power of two of at least 16.
        num_kvcache_blocks: size of the KV pool; None measures the free memory (GPU) or takes up to 1 GiB (CPU).
        dtype: "auto" is the checkpoint's dtype on a GPU and float32 on a CPU.
        device: "auto" is "cuda" if there is a GPU, else "cpu".
        attention_backend: "auto" chooses one and logs which; a named one that cannot run is an error.
        load_format: "auto" reads the checkpoint; "dummy" makes random weights of the real shapes.
        enable_prefix_caching: share the KV blocks of equal prompt prefixes.
        seed: the engine's seed, from which the seeds of requests without one follow.
        skip_tokenizer_init: never load the tokenizer; prompts must be token ids, and the texts of outputs are "".
        max_num_waiting: how many sequences may wait; more are refused.
        log_steps: log each step to the logger "nanovllm", at level INFO.
        overlap: how many steps are launched before the tokens of the last one are known: 1, or 0 for debugging.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what would be right.
    """

    model: str | Path | None = None
    enforce_eager: bool = False
    tensor_parallel_size: int = within(1, 1024, default=1)
    max_model_len: int = within(2, 1 << 24, default=4096)  # at least one token of prompt and one of output
    max_num_seqs: int = within(1, 1 << 16, default=512)
    max_num_batched_tokens: int = within(1, 1 << 22, default=16384)
    gpu_memory_utilization: float = within(ABOVE_0, 1, default=0.9)
    kvcache_block_size: int = within(16, 1 << 16, default=64)
    num_kvcache_blocks: int | None = within(1, (1 << 31) - 2, default=None)
    dtype: str | torch.dtype = one_of("auto", "float32", "bfloat16", "float16")
    device: str = one_of("auto", "cpu", "cuda")
    attention_backend: str = one_of(*ATTENTION_BACKENDS)
    load_format: str = one_of("auto", "dummy")
    enable_prefix_caching: bool = True
    seed: int = within(0, (1 << 63) - 1, default=0)
    skip_tokenizer_init: bool = False
    max_num_waiting: int = within(1, 1 << 30, default=1 << 20)
    log_steps: bool = False
    overlap: int = within(0, 1, default=1)

    def __post_init__(self):
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        check_fields(self)
        if not is_power_of_2(self.kvcache_block_size):
            raise ValueError(f"kvcache_block_size must be a power of two, got {self.kvcache_block_size}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): a step holds one token of each running sequence"
            )
        if not isinstance(self.model, str | Path | None):
            raise TypeError(f"model must be a path, a hub id or None, got {shown(self.model)}")
        if self.model == "":
            raise ValueError("model must be a path, a hub id or None, got ''")
        if self.model is not None:
            object.__setattr__(self, "model", plain(self.model) if isinstance(self.model, str) else Path(self.model))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA GPU")

    @property
    def device_type(self) -> str:
        """The device without "auto": "cuda" or "cpu"."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def torch_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of weights, activations and KV cache."""
        if self.dtype != "auto":
            return getattr(torch, str(self.dtype))
        return checkpoint_dtype if self.device_type == "cuda" else torch.float32


def check_names(given: Iterable[str], *additional: str) -> None:
    """Raise TypeError unless all given options are fields of Config or `additional` ones."""
    names = [*(field.name for field in fields(Config)), *additional]
    for name in given:
        if name not in names:
            raise TypeError(f"there is no option {name}; the options are {', '.join(names)}")
