"""The engines that can be measured, each behind the interface of `Engine`."""

import gc
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.limits import count_costs, find_peaks
from benchmarks.workloads import Group
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoints.model_source import ModelSource, open_model
from nanovllm.config import Config
from nanovllm.engine.step_stats import StepStats
from nanovllm.layers.state import PagedKVSpec
from nanovllm.models.model_config import ModelConfig

SHARED_OPTIONS = (
    "load_format",
    "max_num_seqs",
    "tensor_parallel_size",
    "enforce_eager",
    "dtype",
    "quantization",
    "kv_cache_dtype",
)
# Options that other engines do not have, or name differently.
OWN_OPTIONS = ("device", "attention_backend", "overlap")


def given_options(args: Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options among `names` that the user gave."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def nanovllm_options(args: Namespace) -> dict[str, Any]:
    """Return the arguments of `LLM`."""
    return given_options(args, ("model", "max_model_len", *SHARED_OPTIONS, *OWN_OPTIONS))


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


class Engine:
    """An engine that has loaded a model.

    Attributes:
        name: what the tables call it.
        config: the model's shape.
        max_model_len: the longest prompt plus output, in tokens.
        on_gpu: whether the model is on a GPU.
        peaks: bytes/s and operations/s of the devices, if they are known and this engine's steps can be counted.
    """

    name: str
    config: ModelConfig
    max_model_len: int
    on_gpu: bool
    peaks: tuple[float, float] | None = None

    def reset(self) -> None:
        """Forget cached prefixes."""

    def generate(self, group: Group) -> None:
        """Answer the requests of a group."""
        raise NotImplementedError

    def instrument(self, group: Group) -> dict[str, float]:
        """Return what only a run of its own can show, because measuring it costs time."""
        return {}

    def close(self) -> None:
        """Give back memory and files."""


class Nanovllm(Engine):
    """This engine. It also reports what its steps cost and where they spend their time."""

    name = "nanovllm"

    def __init__(self, args: Namespace):
        self.llm = LLM(**nanovllm_options(args))
        # Else the garbage collector visits all that torch has made in two of three runs, which takes 0.1 s.
        gc.collect()
        gc.freeze()
        self.config = self.llm.llm_engine.source.config
        self.max_model_len = self.llm.max_model_len
        self.dtype = self.llm.config.torch_dtype(self.config.dtype)
        self.on_gpu = self.llm.config.device_type == "cuda"
        self.peaks = find_peaks(args, torch.cuda.get_device_name() if self.on_gpu else None, self.dtype.itemsize)

    def reset(self) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, group: Group) -> None:
        self.llm.generate(group.prompts, self.sampling_params(group), use_tqdm=False)

    @staticmethod
    def sampling_params(group: Group) -> list[SamplingParams]:
        options = {"temperature": group.temperature, "ignore_eos": True, **group.options}
        return [SamplingParams(max_tokens=n, **options) for n in group.lens]

    @contextmanager
    def recorded_steps(self, time_gpu: bool = False) -> Iterator[list[StepStats]]:
        """Collect the stats of the steps that run inside."""
        steps: list[StepStats] = []
        self.llm.on_step, self.llm.time_gpu = steps.append, time_gpu
        try:
            yield steps
        finally:
            self.llm.on_step, self.llm.time_gpu = None, False

    def instrument(self, group: Group) -> dict[str, float]:
        """Return what the steps cost, and the seconds in which the host and the GPU worked."""
        with self.recorded_steps(time_gpu=True) as steps:
            seconds = timed(self.generate, group)
        batches = [step.batch for step in steps if step.batch is not None]
        state_itemsize = getattr(torch, self.llm.config.state_dtype).itemsize
        block_size = self.llm.config.kvcache_block_size
        body_itemsize = self.dtype.itemsize
        scheme = self.config.quantization
        device = torch.device(self.llm.config.device_type)
        hidden_size = self.config.hidden_size
        if scheme is not None and scheme.has_kernels(device, self.dtype, (hidden_size, hidden_size)):
            body_itemsize = 1
        costs = count_costs(
            batches,
            self.config,
            self.dtype.itemsize,
            block_size,
            state_itemsize,
            body_itemsize=body_itemsize,
            kv_token_bytes=self.kv_token_bytes(),
        )
        measured = {
            "steps": len(batches),
            "bytes": float(costs.bytes.sum()),
            "flops": float(costs.flops.sum()),
            "host": seconds - sum(step.wait_seconds for step in steps),
        }
        if self.peaks is not None:
            measured["limit"] = costs.limit(*self.peaks)
        gpu_seconds = [step.gpu_seconds for step in steps if step.gpu_seconds is not None]
        if gpu_seconds:
            measured["gpu"] = sum(gpu_seconds)
        return measured

    def kv_token_bytes(self) -> int:
        """Return the bytes of a token's keys and values in one layer, of all KV heads."""
        dtype = self.llm.config.torch_kv_dtype(self.dtype)
        return PagedKVSpec(self.config.num_kv_heads, self.config.head_dim, dtype).block_bytes(block_size=1)

    def close(self) -> None:
        self.llm.close()
        gc.unfreeze()


class ReplicatedNanovllm(Engine):
    """Several engines of this project in Ray actors. Each takes `tensor_parallel_size` GPUs, or one CPU."""

    def __init__(self, args: Namespace, num_replicas: int):
        from nanovllm.ray import Replicas  # optional

        options = nanovllm_options(args)
        self.name = f"nanovllm x {num_replicas}"
        self.config = open_model(args.model, args.load_format or "auto").config
        self.max_model_len = min(args.max_model_len or Config().max_model_len, self.config.max_position)
        self.on_gpu = False  # their memory is that of other processes
        self.llm = Replicas(num_replicas, **options)

    def reset(self) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, group: Group) -> None:
        self.llm.generate(group.prompts, Nanovllm.sampling_params(group), use_tqdm=False)

    def close(self) -> None:
        self.llm.close()


class Vllm(Engine):
    """vLLM, with the same token ids, lengths and sampling."""

    name = "vllm"

    def __init__(self, args: Namespace):
        import vllm  # pyright: ignore[reportMissingImports]  # optional

        source = open_model(args.model, args.load_format or "auto")
        self.config = source.config
        self.max_model_len = min(args.max_model_len or 4096, self.config.max_position)
        self.folder = tempfile.TemporaryDirectory()
        self.sampling_params = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=str(source.path or write_config(source, self.folder.name)),
            skip_tokenizer_init=True,
            max_model_len=self.max_model_len,
            gpu_memory_utilization=0.9,
            **given_options(args, SHARED_OPTIONS),
        )
        self.on_gpu = torch.cuda.is_available()

    def reset(self) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, group: Group) -> None:
        options = {"temperature": group.temperature, "ignore_eos": True, "detokenize": False}
        params = [self.sampling_params(max_tokens=n, **options) for n in group.lens]
        self.llm.generate([{"prompt_token_ids": ids} for ids in group.prompts], params, use_tqdm=False)

    def close(self) -> None:
        self.folder.cleanup()


class Transformers(Engine):
    """transformers' own batched, left-padded `generate`, with the weights, dtype and device of a nanovllm engine.

    It generates as many tokens for each request as the longest one asks for; what the others did not ask for is waste.
    """

    name = "transformers"

    def __init__(self, engine: Nanovllm):
        from transformers import AutoModelForCausalLM

        self.config = engine.config
        self.max_model_len = engine.max_model_len
        self.on_gpu = engine.on_gpu
        self.device = torch.device(engine.llm.config.device_type)
        folder = engine.llm.llm_engine.source.path
        options = {}
        if folder is None:
            raise ValueError("transformers needs a model with weights")
        if folder.is_file():
            folder, options = folder.parent, {"gguf_file": folder.name}
        model = AutoModelForCausalLM.from_pretrained(folder, **options, dtype=engine.dtype)
        self.model: Any = model.to(self.device).eval()  # pyright: ignore[reportArgumentType]

    def generate(self, group: Group) -> None:
        longest = max(map(len, group.prompts))
        token_ids = torch.zeros((len(group.prompts), longest), dtype=torch.int64)
        mask = torch.zeros_like(token_ids)
        for i, prompt in enumerate(group.prompts):
            token_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        self.model.generate(
            token_ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max(group.lens),
            do_sample=True,
            temperature=group.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )


class LlamaCpp(Engine):
    """llama.cpp with the GGUF file, context length and number of threads of a nanovllm engine on a CPU.

    It answers requests one after the other, as its Python package does.
    """

    name = "llama.cpp"

    def __init__(self, engine: Nanovllm):
        import llama_cpp  # pyright: ignore[reportMissingImports]  # optional

        path = engine.llm.llm_engine.source.path
        if engine.on_gpu or path is None or not path.is_file():
            raise ValueError("--compare llama.cpp needs a GGUF file on a CPU")
        self.config = engine.config
        self.max_model_len = engine.max_model_len
        self.on_gpu = False
        threads = torch.get_num_threads()
        sizes = {"n_ctx": self.max_model_len, "n_threads": threads, "n_threads_batch": threads}
        self.llm = llama_cpp.Llama(str(path), **sizes, verbose=False)

    def generate(self, group: Group) -> None:
        for prompt, length in zip(group.prompts, group.lens, strict=True):
            self.llm.reset()
            tokens = self.llm.generate(prompt, temp=group.temperature, top_k=0, top_p=1.0, min_p=0.0)
            for _ in range(length):
                next(tokens)

    def close(self) -> None:
        self.llm.close()


# The engines of `--compare`, and the workloads that they run.
PEERS: dict[str, tuple[type[Transformers] | type[LlamaCpp], list[str]]] = {
    Transformers.name: (Transformers, ["offline"]),
    LlamaCpp.name: (LlamaCpp, ["latency", "offline"]),
}
ENGINES: dict[str, type[Nanovllm] | type[Vllm]] = {engine.name: engine for engine in (Nanovllm, Vllm)}


# Classes of the types of shapes, and the types of configs that contain those of text.
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForConditionalGeneration",
}
OUTER_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}


def write_config(source: ModelSource, folder: str) -> str:
    """Write the config.json of a shape without weights, for engines that do not know such shapes; return the folder."""
    from transformers import AutoConfig

    options = asdict(source.config)
    del options["quantization"]  # the shapes have plain weights
    moe = options.pop("moe")
    gdn = options.pop("gated_delta_net")
    model_type = options["model_type"]
    options["dtype"] = "bfloat16"
    if moe is not None:
        options["num_experts"] = moe["num_experts"]
        options["num_experts_per_tok"] = moe["experts_per_token"]
        options["moe_intermediate_size"] = moe["intermediate_size"]
        options["norm_topk_prob"] = moe["norm_topk_prob"]
        options["mlp_only_layers"] = list(moe["dense_layers"])
        options["shared_expert_intermediate_size"] = moe["shared_intermediate_size"]
    if gdn is not None:
        options |= {f"linear_{name}": gdn[name] for name in ("num_key_heads", "num_value_heads", "key_head_dim")}
        options["linear_value_head_dim"] = gdn["value_head_dim"]
    if options["layer_types"] is not None:
        theirs = {"gated_delta_net": "linear_attention"}
        options["layer_types"] = [theirs.get(layer_type, layer_type) for layer_type in options["layer_types"]]
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": options.pop("rope_theta")}
    options["rope_parameters"]["partial_rotary_factor"] = options.pop("partial_rotary_factor")
    options["num_hidden_layers"] = options.pop("num_layers")
    options["num_attention_heads"] = options.pop("num_heads")
    options["num_key_value_heads"] = options.pop("num_kv_heads")
    options["max_position_embeddings"] = options.pop("max_position")
    if model_type in OUTER_TYPES:
        options = {"model_type": OUTER_TYPES[model_type], "text_config": options, "dtype": "bfloat16"}
    options["architectures"] = [ARCHITECTURES[model_type]]
    AutoConfig.for_model(**options).save_pretrained(folder)
    return folder
