"""The fields and flags of a slot's sampling parameters, as constants of kernels; see state.py.

Kernels must import these names, not this module: Triton's cache knows only the values of names.
"""

from typing import Any

from nanovllm.ops.sampling import state
from nanovllm.ops.triton_utils import kernel_constant


def _offset(field: str) -> Any:
    """Return the offset of a field from the start of a slot's parameters, in int32."""
    fields: Any = state.PARAMS_DTYPE.fields
    return kernel_constant(fields[field][1] // 4)


SEED = _offset("seed")
TEMPERATURE = _offset("temperature")
TOP_K = _offset("top_k")
TOP_P = _offset("top_p")
MIN_P = _offset("min_p")
MIN_LENGTH = _offset("min_length")
FLAGS = _offset("flags")
REPETITION = _offset("repetition")
PRESENCE = _offset("presence")
FREQUENCY = _offset("frequency")
NUM_BIAS = _offset("num_bias")
STOP_IDS = _offset("stop_ids")

PARAMS_STRIDE = kernel_constant(state.PARAMS_STRIDE)
MAX_STOP_IDS = kernel_constant(state.MAX_STOP_IDS)
MAX_COUNT = kernel_constant(state.MAX_COUNT)

HAS_PENALTIES = kernel_constant(state.HAS_PENALTIES)
HAS_MASK = kernel_constant(state.HAS_MASK)
HAS_BIAS = kernel_constant(state.HAS_BIAS)
# Not a flag of a slot: the context's length decides. It takes the bit of PROCESSED_LOGPROBS, which the sampler ignores.
BANS_STOP_IDS = kernel_constant(state.PROCESSED_LOGPROBS)
