"""The rows of a step for layers with recurrent state, the same for all layers of a class."""

from typing import Any, NamedTuple

import torch


class StateRows(NamedTuple):
    """The rows of a step and the slots that hold their state.

    Args:
        slots: [R] int32, the slot of each row in the state pool. Padding rows of one token use the scratch slot.
        starts: [R] int32 or int64, the position of each row's first token. A row that starts at 0 ignores the slot's
            content. Padding rows of one token start at 0; those without tokens start anywhere.
        cu_seqlens: [R + 1] int32, the index of each row's first token, and the number of tokens without padding; None
            in a step of decode rows only.
        plan: what the layers' kernels need to know about rows of two or more tokens, as `StatefulLayer.plan_prompts`
            returns it; None in a step of decode rows only.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    plan: Any = None
