"""The options of an engine. They are checked once and then frozen."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nanovllm.arithmetic import is_power_of_2
from nanovllm.checks import ABOVE_0, check_fields, one_of, plain, shown, within
from nanovllm.vllm_options import NEUTRAL, RENAMED, translate

# Names of dtypes that vLLM knows too.
_DTYPES = {"half": "float16", "float": "float32"}
_KV_DTYPES = {"fp8_e4m3": "fp8"}

ATTENTION_BACKENDS = ("auto", "torch", "triton", "flash_attn")


@dataclass(frozen=True, slots=True)
class Config:
    """The arguments of `LLM`. Passing None to any of them selects its default.

    Args:
        model: a local folder, a `.gguf` file, a hub id, a shape's name for `load_format="dummy"`, or None for the
            default model.
        enforce_eager: run without CUDA graphs.
        tensor_parallel_size: number of ranks that share the model. Under `torchrun` it must divide the world size.
        max_model_len: longest prompt plus output, in tokens; at most what the model supports with its RoPE scaling, and
            what num_kvcache_blocks hold.
        max_num_seqs: how many sequences run at once; None is 512 on a GPU and 256 on a CPU, or max_num_batched_tokens
            if that is less. Fewer run if their recurrent state would take more than half of the memory for KV cache and
            recurrent state.
        max_num_batched_tokens: token budget of one step, at least max_num_seqs: prompts get what decoding sequences
            leave of it, and all requests wait until the step is done. None is 16384 on a GPU and 512 on a CPU, or twice
            max_num_seqs if that is more.
        gpu_memory_utilization: fraction of the GPU's memory for weights, activations and KV cache together.
        kvcache_block_size: tokens in a KV block, a power of two of at least 16.
        num_kvcache_blocks: size of the KV pool; None measures the free memory (GPU), or takes up to 1 GiB (CPU) for KV
            and recurrent state together, but on a CPU at least the KV of one sequence of max_model_len tokens.
        dtype: "auto" is the checkpoint's dtype on a GPU and float32 on a CPU, where it keeps quantized GGUF weights in
            4 or 8 bits. "float32" dequantizes them.
        kv_cache_dtype: dtype of the KV cache. "auto" is that of activations; "fp8", also spelt "fp8_e4m3", holds almost
            twice the tokens, on GPUs with FP8 (Ada, Hopper or newer).
        state_dtype: dtype of the recurrent state of hybrid models, "float32" or "bfloat16".
        quantization: "fp8" quantizes the weights of linear layers and experts while they load, a scale for each 128 x
            128 values. None keeps the checkpoint's format, which may be FP8. A CPU, or a GPU before Ada, computes with
            the dequantized weights.
        device: "auto" is "cuda" if there is a GPU, else "cpu".
        attention_backend: "auto" chooses one and logs which; a named one that cannot run is an error.
        load_format: "auto" reads the checkpoint; "dummy" makes random weights of the real shapes.
        enable_prefix_caching: share the KV blocks of equal prompt prefixes.
        seed: the engine's seed, from which the seeds of requests without one follow.
        skip_tokenizer_init: never load the tokenizer; prompts must be token ids, and the texts of outputs are "".
        max_num_waiting: how many sequences may wait; more are refused.
        tokenizer: a folder, a `.gguf` file or a hub id whose tokenizer and chat template replace the model's.
        revision: branch, tag or commit of the model's hub id. Another hub id of the tokenizer takes its default branch.
        download_dir: folder for what a hub id needs to download; None is the hub's cache.
        logprobs_mode: the mode of requests that choose none; see `SamplingParams`.
        generation_config: what requests without SamplingParams get. "auto": what the model's generation_config.json or
            GGUF file says. "vllm": SamplingParams().
        max_logprobs: most log-probabilities of a token that a request may ask for; -1 sets no limit but that of
            `SamplingParams`.
        distributed_executor_backend: how ranks are started. "mp": by the engine. "external_launcher": by torchrun or
            the caller; each tensor_parallel_size successive ranks of the world are one engine. "uni": one rank. None
            chooses.
        log_steps: log each step to the logger "nanovllm", at level INFO.
        overlap: how many launched steps may wait to be collected when the next one is scheduled: 1, or 0 for debugging.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what would be right.
    """

    model: str | Path | None = None
    enforce_eager: bool = False
    tensor_parallel_size: int = within(1, 1024, default=1)
    max_model_len: int = within(2, 1 << 24, default=4096)  # at least one token of prompt and one of output
    max_num_seqs: int = within(1, 1 << 16, default=None)
    max_num_batched_tokens: int = within(1, 1 << 22, default=None)
    gpu_memory_utilization: float = within(ABOVE_0, 1, default=0.9)
    kvcache_block_size: int = within(16, 1 << 16, default=64)
    num_kvcache_blocks: int | None = within(1, (1 << 31) - 2, default=None)
    dtype: str | torch.dtype = one_of("auto", "float32", "bfloat16", "float16")
    kv_cache_dtype: str = one_of("auto", "fp8")
    state_dtype: str = one_of("float32", "bfloat16")
    quantization: str | None = one_of("fp8", default=None)
    device: str = one_of("auto", "cpu", "cuda")
    attention_backend: str = one_of(*ATTENTION_BACKENDS)
    load_format: str = one_of("auto", "dummy")
    enable_prefix_caching: bool = True
    seed: int = within(0, (1 << 63) - 1, default=0)
    skip_tokenizer_init: bool = False
    max_num_waiting: int = within(1, 1 << 30, default=1 << 20)
    tokenizer: str | Path | None = None
    revision: str | None = None
    download_dir: str | Path | None = None
    logprobs_mode: str = one_of("raw_logprobs", "processed_logprobs")
    generation_config: str = one_of("auto", "vllm")
    max_logprobs: int = within(-1, 1 << 22, default=-1)
    distributed_executor_backend: str | None = one_of("mp", "external_launcher", "uni", default=None)
    log_steps: bool = False
    overlap: int = within(0, 1, default=1)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "Config":
        """Make a config from the arguments of `LLM`, which may have vLLM's names."""
        check_names(options)
        return cls(**translate(options))

    def __post_init__(self):
        for declared in fields(self):
            if getattr(self, declared.name) is None:
                self._set(declared.name, declared.default)
        if isinstance(self.dtype, torch.dtype):
            self._set("dtype", str(self.dtype).removeprefix("torch."))
        elif isinstance(self.dtype, str):
            self._set("dtype", _DTYPES.get(self.dtype, self.dtype))
        if isinstance(self.kv_cache_dtype, str):
            self._set("kv_cache_dtype", _KV_DTYPES.get(self.kv_cache_dtype, self.kv_cache_dtype))
        check_fields(self)
        self._set_budget()
        if not is_power_of_2(self.kvcache_block_size):
            raise ValueError(f"kvcache_block_size must be a power of two, got {self.kvcache_block_size}")
        for name, what in (
            ("model", "a path, a hub id"),
            ("tokenizer", "a path, a hub id"),
            ("download_dir", "a path"),
            ("revision", "a text"),
        ):
            self._check_path(name, what)
        if self.distributed_executor_backend == "uni" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"distributed_executor_backend='uni' is one rank, but tensor_parallel_size={self.tensor_parallel_size}"
            )
        self._check_kv_cache()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA GPU")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_budget(self) -> None:
        """Set the sizes of a step that are not given, and check that they fit each other."""
        on_gpu = self.device_type == "cuda"
        default_budget = 16384 if on_gpu else 512
        default_num_seqs = 512 if on_gpu else 256
        if self.max_num_batched_tokens is None:
            self._set("max_num_batched_tokens", max(default_budget, 2 * (self.max_num_seqs or 0)))
        if self.max_num_seqs is None:
            self._set("max_num_seqs", min(default_num_seqs, self.max_num_batched_tokens))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): a step holds one token of each running sequence"
            )

    def _check_kv_cache(self) -> None:
        """Check that the attention backend can read a cache in FP8. `select_backend` checks the GPU."""
        if self.kv_cache_dtype != "fp8":
            return
        if self.device_type == "cpu":
            raise ValueError("kv_cache_dtype='fp8' needs a GPU with FP8 (Ada, Hopper or newer); on a CPU use 'auto'")
        if self.attention_backend == "flash_attn":
            raise ValueError("kv_cache_dtype='fp8' needs attention_backend='triton' or 'auto', got 'flash_attn'")

    def _check_path(self, name: str, what: str) -> None:
        """Check an option that is a text, a path or None."""
        value = getattr(self, name)
        is_text = value is None or isinstance(value, str)
        is_path = isinstance(value, Path) and name != "revision"
        if not is_text and not is_path:
            raise TypeError(f"{name} must be {what} or None, got {shown(value)}")
        if value == "":
            raise ValueError(f"{name} must be {what} or None, got ''")
        if value is not None:
            self._set(name, plain(value) if isinstance(value, str) else Path(value))

    @property
    def device_type(self) -> str:
        """The device without "auto": "cuda" or "cpu"."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def torch_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of weights and activations."""
        if self.dtype != "auto":
            return getattr(torch, str(self.dtype))
        return checkpoint_dtype if self.device_type == "cuda" else torch.float32

    def torch_kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the KV cache of a model with activations in `dtype`."""
        return torch.float8_e4m3fn if self.kv_cache_dtype == "fp8" else dtype


def check_names(given: Iterable[str], *additional: str) -> None:
    """Raise TypeError unless all given options are fields of Config, options of vLLM or `additional` ones."""
    names = [*(field.name for field in fields(Config)), *additional]
    for name in given:
        if name not in names and name not in RENAMED and name not in NEUTRAL:
            raise TypeError(f"there is no option {name:.100}; the options are {', '.join(names)}")
