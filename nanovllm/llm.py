"""The class users import."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """A model that generates: `LLM(path).generate(prompts, SamplingParams(...))`."""
