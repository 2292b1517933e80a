"""Gated DeltaNet (arXiv:2412.06464) between a layer's input and output projections."""

import torch

from nanovllm.ops.gdn.decode import default_decode_config, gdn_decode_triton
from nanovllm.ops.gdn.gated_norm import gated_rms_norm_triton
from nanovllm.ops.gdn.inputs import GdnInputs, GdnState, GdnWeights
from nanovllm.ops.gdn.prompt import gdn_prompt_triton
from nanovllm.ops.gdn.reference import gated_delta_net_torch
from nanovllm.ops.state.rows import StateRows


def gated_delta_net_triton(inputs: GdnInputs, weights: GdnWeights, state: GdnState, rows: StateRows) -> torch.Tensor:
    """Compute `gated_delta_net` with Triton kernels."""
    out = torch.empty(inputs.z.shape, dtype=inputs.z.dtype, device=inputs.z.device)
    _, heads, _, v_dim = state.recurrent.shape
    config = default_decode_config(len(rows.slots), heads, v_dim, state.recurrent.dtype)
    decode_norms = rows.cu_seqlens is None and config.slices == 1
    if rows.cu_seqlens is not None:
        gdn_prompt_triton(inputs, weights, state, rows, out)
    gdn_decode_triton(inputs, weights, state, rows, out, config, norm=decode_norms)
    return out if decode_norms else gated_rms_norm_triton(out, inputs.z, weights.norm, weights.eps, out=out)


def gated_delta_net(inputs: GdnInputs, weights: GdnWeights, state: GdnState, rows: StateRows) -> torch.Tensor:
    """Apply convolution, gated delta rule, norm and output gate to the tokens of a step; update the rows' state.

    A row continues from its slot's state at any token boundary. Nothing waits for the device, so a CUDA graph can
    capture the step.

    Returns:
        [T, HV * DV], zeros for padding tokens that belong to no row.
    """
    state.check_shapes(inputs, weights)
    run = gated_delta_net_triton if inputs.qkv.is_cuda else gated_delta_net_torch
    return run(inputs, weights, state, rows)
