"""The forms in which a prompt can be given. No torch here."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceType
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np

from nanovllm.checks import is_list, length, plain, shown
from nanovllm.vllm_options import NEUTRAL_PROMPT, drop_neutral


class _Salted(TypedDict, total=False):
    """Options of a prompt; see `SamplingParams.cache_salt`."""

    cache_salt: str


class TextPrompt(_Salted):
    """A prompt as text."""

    prompt: str


class TokensPrompt(_Salted, total=False):
    """A prompt as token ids. A text that comes with them is only returned."""

    prompt_token_ids: SequenceType[int] | np.ndarray
    prompt: str


# Tensors of token ids are prompts too.
Prompt: TypeAlias = str | SequenceType[int] | np.ndarray | TextPrompt | TokensPrompt


class PromptParts(NamedTuple):
    """The parts of a prompt: a text, token ids, or both."""

    text: str | None
    token_ids: Any
    cache_salt: str | None


def is_array(value: Any) -> bool:
    """Whether `value` is an array of numpy, or a tensor."""
    return all(hasattr(value, name) for name in ("tolist", "dtype", "ndim", "shape"))


def list_prompts(prompts: Any) -> SequenceType[Any]:
    """Return prompts as a list, also if there is only one.

    Raises:
        TypeError: they are neither a prompt nor a list or an array of prompts.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if is_array(prompts) and prompts.ndim > 0:
        # An index would be a label in a pandas Series.
        listed = prompts.tolist() if prompts.ndim == 1 else list(prompts)
        return [prompts] if listed and _is_id(listed[0]) else listed
    if is_list(prompts):
        return [prompts] if length(prompts) and _is_id(prompts[0]) else prompts
    raise TypeError(f"prompts must be a list of texts or of token id lists, got {type(prompts).__name__}")


def _is_id(value: Any) -> bool:
    value = value.tolist() if is_array(value) and value.ndim == 0 else value
    return isinstance(value, Integral) and not isinstance(value, bool)


def split_prompt(prompt: Any) -> PromptParts:
    """Return the parts of a prompt. The token ids are not checked.

    Raises:
        TypeError, ValueError: it has neither text nor token ids, or has what only vLLM can use.
    """
    if isinstance(prompt, str):
        return PromptParts(plain(prompt), None, None)
    if not isinstance(prompt, Mapping):
        return PromptParts(None, prompt, None)
    parts = drop_neutral({str(key): value for key, value in prompt.items()}, NEUTRAL_PROMPT)
    text, token_ids, salt = (parts.pop(name, None) for name in ("prompt", "prompt_token_ids", "cache_salt"))
    if parts:
        raise ValueError(f"prompt has {shown(min(parts))}; it can have prompt, prompt_token_ids and cache_salt")
    if not isinstance(text, str | None):
        raise TypeError(f"prompt['prompt'] must be text, got {shown(text)}")
    if text is None and token_ids is None:
        raise ValueError("prompt must have prompt or prompt_token_ids")
    return PromptParts(text if text is None else plain(text), token_ids, salt)
