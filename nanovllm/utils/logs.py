"""Set up the logger "nanovllm" in the project's own processes. In others, the user does."""

import logging

_logger = logging.getLogger("nanovllm")


def log_to_stderr(level: int) -> None:
    """Write lines of this level and above to stderr."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    _logger.setLevel(level)


def log_level() -> int:
    """Return the level of this process, for a child process."""
    return _logger.getEffectiveLevel()
