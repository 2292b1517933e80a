"""Let programs written for vLLM run on nanovllm: `import nanovllm.as_vllm` before they import vllm.

    import nanovllm.as_vllm
    from vllm import LLM, SamplingParams  # nanovllm's

    python -m nanovllm.as_vllm lm_eval --model vllm ...  # the same for a command

This gives nanovllm's objects vLLM's module names, and nothing else: what they do is theirs. There are two exceptions:
`sleep` moves the weights at level 1 too, and the outputs of `AsyncLLM` have everything so far by default. A module or a
name that is not in `MODULES` is not there. Nothing else imports this file.
"""

import importlib.metadata
import importlib.util
import runpy
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import nanovllm
from nanovllm.checkpoints.tokenizers import get_tokenizer
from nanovllm.engine.chat_template import resolve_chat_template
from nanovllm.engine.memory_parts import parts_of_level

# The vLLM whose names these are. Programs compare it to know which names there are.
VLLM_VERSION = "0.26.0"


def _absent(name: str) -> type:
    """Return a class for a name that programs import and may never use. Using it raises NotImplementedError."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"nanovllm has no {name}")

    return type(name, (), {"__init__": refuse, "__module__": __name__})


class LLM(nanovllm.LLM):
    """`nanovllm.LLM` for programs that need the memory of the weights while it sleeps, whatever the level."""

    def sleep(self, level: int = 1) -> None:
        parts_of_level(level)  # raises for a wrong level
        super().sleep(2)


class AsyncLLM(nanovllm.AsyncLLM):
    """`nanovllm.AsyncLLM` for programs that read the whole text from the last output: CUMULATIVE is the default.

    Its `sleep` is that of `LLM` here.
    """

    async def sleep(self, level: int = 1) -> None:
        parts_of_level(level)  # raises for a wrong level
        await super().sleep(2)

    def generate(
        self,
        prompt: Any,
        sampling_params: nanovllm.SamplingParams | None = None,
        request_id: int | str | None = None,
        **neutral: Any,
    ) -> AsyncIterator[nanovllm.RequestOutput]:
        if sampling_params is None:
            sampling_params = self.llm_engine.input_processor.default_params
        if isinstance(sampling_params, nanovllm.SamplingParams) and sampling_params.output_kind is None:
            sampling_params = sampling_params.clone(output_kind=nanovllm.RequestOutputKind.CUMULATIVE)
        return super().generate(prompt, sampling_params, request_id, **neutral)


def _resolve_chat_template(
    tokenizer: Any, chat_template: Any = None, tools: Any = None, *, model_config: Any = None
) -> str | None:
    """Call `resolve_chat_template`. vLLM's function also has the model's config, which decides nothing here."""
    return resolve_chat_template(tokenizer, chat_template, tools)


# The names of each module. The packages above them have no names but these modules.
MODULES: dict[str, dict[str, Any]] = {
    "vllm": {
        "__version__": VLLM_VERSION,
        "LLM": LLM,
        "CompletionOutput": nanovllm.CompletionOutput,
        "RequestOutput": nanovllm.RequestOutput,
        "SamplingParams": nanovllm.SamplingParams,
        "TextPrompt": nanovllm.TextPrompt,
        "TokensPrompt": nanovllm.TokensPrompt,
    },
    "vllm.entrypoints.llm": {"LLM": LLM},
    "vllm.inputs": {"TextPrompt": nanovllm.TextPrompt, "TokensPrompt": nanovllm.TokensPrompt},
    "vllm.logprobs": {"Logprob": nanovllm.Logprob},
    "vllm.outputs": {"CompletionOutput": nanovllm.CompletionOutput, "RequestOutput": nanovllm.RequestOutput},
    "vllm.renderers.hf": {"resolve_chat_template": _resolve_chat_template},
    "vllm.sampling_params": {
        "RequestOutputKind": nanovllm.RequestOutputKind,
        "SamplingParams": nanovllm.SamplingParams,
        "StructuredOutputsParams": nanovllm.StructuredOutputsParams,
    },
    "vllm.tokenizers": {"get_tokenizer": get_tokenizer},
    "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
    # Imported by programs for features that are not here.
    "vllm.distributed.weight_transfer.nccl_engine": {
        name: _absent(name) for name in ("NCCLTrainerSendWeightsArgs", "NCCLWeightTransferEngine")
    },
    "vllm.lora.request": {"LoRARequest": _absent("LoRARequest")},
    "vllm.utils.network_utils": {"get_ip": _absent("get_ip")},
}

_METADATA = f"""Metadata-Version: 2.1
Name: vllm
Version: {VLLM_VERSION}
Summary: vLLM's names for nanovllm
"""


class _Distribution(importlib.metadata.Distribution):
    """The metadata of a package vllm."""

    def read_text(self, filename: str) -> str | None:
        return {"METADATA": _METADATA, "top_level.txt": "vllm\n"}.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    """Finds that package's metadata. The modules need no finder: they are in `sys.modules`."""

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[_Distribution]:
        if getattr(context, "name", None) in (None, "vllm"):
            yield _Distribution()


def _install() -> None:
    """Put the modules into `sys.modules`. ImportError if another vllm is there."""
    loaded = sys.modules.get("vllm")
    if loaded is not None:
        raise ImportError(f"import nanovllm.as_vllm before vllm, which is loaded: {loaded!r}")
    names = {name.rsplit(".", i)[0] for name in MODULES for i in range(name.count(".") + 1)}
    for name in sorted(names):  # packages before what they have
        module = ModuleType(name, f"nanovllm under vLLM's name, see {__name__}.")
        module.__spec__ = ModuleSpec(name, loader=None, origin=__file__, is_package=True)
        module.__path__ = []  # nothing else is found below it
        module.__dict__.update(MODULES.get(name, {}))
        sys.modules[name] = module
        package, _, child = name.rpartition(".")
        if package:
            setattr(sys.modules[package], child, module)
    sys.meta_path.insert(0, _Finder())


def _check_command(name: str) -> None:
    """Exit with one line unless there is a module `name` that can run."""
    if name.partition(".")[0] == "vllm":
        sys.exit(f"{name} is no command: vllm has nanovllm's names only. The server is `nanovllm serve`")
    if name.endswith(".py") or "/" in name:
        sys.exit(f"{name} is no module: give its name without .py, or import nanovllm.as_vllm at the top of the script")
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:  # a package above it cannot be imported, or the name is empty
        sys.exit(f"the module {name} cannot run: {error}")
    if spec is None:
        sys.exit(f"there is no module {name} that can run")


_install()

if __name__ == "__main__":
    sys.modules["nanovllm.as_vllm"] = sys.modules[__name__]  # the command may import it
    if len(sys.argv) < 2:
        sys.exit("usage: python -m nanovllm.as_vllm MODULE [ARGUMENTS...]")
    sys.argv = sys.argv[1:]
    _check_command(sys.argv[0])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
