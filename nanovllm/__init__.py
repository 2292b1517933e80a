"""nanovllm: a small, fast LLM inference engine."""

from nanovllm.async_llm import AsyncLLM
from nanovllm.engine.step_stats import StepStats
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, Metrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "Metrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StepStats",
    "StructuredOutputsParams",
    "__version__",
]
