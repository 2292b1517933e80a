"""Arguments of Gated DeltaNet (arXiv:2412.06464) that travel together.

A step has T tokens in R rows. There are HK key heads of DK dimensions and HV value heads of DV dimensions. HV is a
multiple of HK: value head h uses key head h // (HV // HK). The convolution has C = 2 * HK * DK + HV * DV channels.
"""

from typing import NamedTuple

import torch

# Taps of the causal convolution. Its state holds one input more than it reads, so that a token's input can be stored
# while other programs still read the three before it.
CONV_WIDTH = 4
# Tokens of a chunk of a prompt: within a chunk, tokens are computed by matmuls; from chunk to chunk, by a recurrence.
CHUNK = 64


class GdnInputs(NamedTuple):
    """A layer's projections of the hidden states. All may be views of one tensor [T, all].

    Args:
        qkv: [T, C], per token all queries, all keys, all values, before the convolution.
        z: [T, HV * DV], the gate of the output.
        b: [T, HV], the write strength before its sigmoid.
        a: [T, HV], the step size of the decay, before bias and softplus.
    """

    qkv: torch.Tensor
    z: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor


class GdnWeights(NamedTuple):
    """A layer's weights between its projections.

    Args:
        conv: [C, CONV_WIDTH], the last tap belongs to the current token.
        a_log, dt_bias: [HV].
        norm: [DV], a plain (not zero-centered) RMSNorm weight.
        eps: of the RMSNorm.
    """

    conv: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor
    eps: float


class GdnState(NamedTuple):
    """A layer's state by slot, updated in place.

    Args:
        recurrent: [S, HV, DK, DV], float32 or bfloat16.
        conv: [S, CONV_WIDTH, C], the latest inputs of the convolution: position p is at index p % CONV_WIDTH.
    """

    recurrent: torch.Tensor
    conv: torch.Tensor

    @property
    def num_key_heads(self) -> int:
        """HK."""
        _, heads, k_dim, v_dim = self.recurrent.shape
        return (self.conv.shape[2] - heads * v_dim) // (2 * k_dim)

    def check_shapes(self, inputs: GdnInputs, weights: GdnWeights) -> None:
        """Raise ValueError if shapes disagree."""
        _, heads, k_dim, v_dim = self.recurrent.shape
        channels = inputs.qkv.shape[1]
        k_heads, remainder = divmod(channels - heads * v_dim, 2 * k_dim)
        if remainder or k_heads < 1 or heads % k_heads:
            raise ValueError(f"qkv must have {heads} value heads of {v_dim} and key heads of {k_dim}, got {channels}")
        num_tokens = len(inputs.qkv)
        expected = {
            "z": (inputs.z, (num_tokens, heads * v_dim)),
            "b": (inputs.b, (num_tokens, heads)),
            "a": (inputs.a, (num_tokens, heads)),
            "weights.conv": (weights.conv, (channels, CONV_WIDTH)),
            "weights.a_log": (weights.a_log, (heads,)),
            "weights.dt_bias": (weights.dt_bias, (heads,)),
            "weights.norm": (weights.norm, (v_dim,)),
            "state.conv": (self.conv, (len(self.recurrent), CONV_WIDTH, channels)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
