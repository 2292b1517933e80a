"""The parts of an engine's memory that can sleep apart, and the arguments that name them."""

from typing import Any

from nanovllm.checks import is_list, shown

# As vLLM names them.
MEMORY = ("weights", "kv_cache")


def parts_of_level(level: Any) -> tuple[str, ...]:
    """Return the parts that `sleep(level)` gives back. Raise TypeError or ValueError for a wrong level."""
    message = f"level must be the integer 1 (KV cache) or 2 (KV cache and weights), got {shown(level)}"
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(message)
    if level not in (1, 2):
        raise ValueError(message)
    return MEMORY if level == 2 else ("kv_cache",)


def parts_of_tags(tags: Any) -> tuple[str, ...]:
    """Return the parts that `wake_up(tags)` wakes. Raise TypeError or ValueError for wrong tags."""
    if tags is None:
        return MEMORY
    is_listed = is_list(tags) or isinstance(tags, set | frozenset)
    if not is_listed or not all(isinstance(part, str) for part in tags):
        raise TypeError(f"tags must be None or a list of {' and '.join(MEMORY)}, got {shown(tags)}")
    parts = tuple(tags)
    if unknown := [part for part in parts if part not in MEMORY]:
        raise ValueError(f"tags must be None or a list of {' and '.join(MEMORY)}, got {shown(unknown[0])}")
    return parts
