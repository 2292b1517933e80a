"""Gated DeltaNet in plain torch: the reference of the kernels in this folder, and what a CPU runs.

Every function computes in float32 and rounds where transformers does: after the convolution's SiLU, the sigmoid of b,
the delta rule and the norm.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanovllm.arithmetic import ceil_div
from nanovllm.ops.gdn.inputs import CHUNK, CONV_WIDTH, GdnInputs, GdnState, GdnWeights
from nanovllm.ops.state.rows import StateRows


def gated_rms_norm_torch(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `gated_rms_norm_triton`; the norm is over the last dimension of x and z."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return ((normed * weight).to(x.dtype) * F.silu(z.float())).to(x.dtype)


def l2_norm_torch(x: torch.Tensor) -> torch.Tensor:
    """Divide float32 x by the norm of its last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def causal_conv_torch(x: torch.Tensor, weight: torch.Tensor, history: torch.Tensor, start: int) -> torch.Tensor:
    """Return SiLU of the causal convolution of one row, and store the row's latest inputs.

    Args:
        x: [N, C], the row's tokens.
        weight: [C, CONV_WIDTH].
        history: [CONV_WIDTH, C], the slot's convolution state, updated in place.
        start: position of the first token.
    """
    before = torch.zeros(CONV_WIDTH - 1, x.shape[1], dtype=torch.float32, device=x.device)
    for back in range(1, min(start, CONV_WIDTH - 1) + 1):
        before[-back] = history[(start - back) % CONV_WIDTH]
    padded = torch.cat((before, x.float()))
    taps = weight.float().T.contiguous()
    convolved = padded[: len(x)] * taps[0]
    for tap in range(1, CONV_WIDTH):
        convolved.addcmul_(padded[tap : tap + len(x)], taps[tap])
    latest = torch.arange(max(0, len(x) - CONV_WIDTH), len(x), device=x.device)
    history[(start + latest) % CONV_WIDTH] = x[latest].to(history.dtype)
    return F.silu(convolved).to(x.dtype)


def recurrent_delta_rule_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the gated delta rule token by token.

    Args:
        q, k: [N, HV, DK] float32, normalized, q scaled.
        v: [N, HV, DV] float32.
        g, beta: [N, HV] float32, logarithm of the decay, and write strength.
        state: [HV, DK, DV] float32, unchanged.

    Returns:
        The outputs [N, HV, DV] and the state after the last token.
    """
    outputs = []
    for index in range(len(q)):
        out, state = delta_rule_step_torch(q[index], k[index], v[index], g[index], beta[index], state)
        outputs.append(out)
    return torch.stack(outputs), state


def delta_rule_step_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one token to each state [..., DK, DV]; q, k: [..., DK], v: [..., DV], g, beta: [...]."""
    state = state * g.exp()[..., None, None]
    written = (v - (k.unsqueeze(-2) @ state).squeeze(-2)) * beta.unsqueeze(-1)
    state = state + k.unsqueeze(-1) * written.unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def chunk_delta_rule_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the gated delta rule chunk by chunk, like the kernels in prompt.py; arguments as in the recurrent form."""
    num_tokens = len(q)
    num_chunks = ceil_div(len(q), CHUNK)

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """Return x [N, HV, ...] as [HV, chunks, CHUNK, ...], zeros after the last token."""
        padded = F.pad(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), (0, 0, 0, 0, 0, num_chunks * CHUNK - len(x)))
        return padded.movedim(1, 0).unflatten(1, (num_chunks, CHUNK))

    q = chunks(q)
    k = chunks(k)
    v = chunks(v)
    beta = chunks(beta).squeeze(-1)
    g = chunks(g).squeeze(-1).cumsum(-1)
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill_(_above_diagonal(q.device), float("-inf")).exp_()
    system = k @ k.mT * decay * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, beta.diag_embed(), upper=False, unitriangular=True)
    scores = (q @ k.mT).mul_(decay)
    # Each token sees the state at the start of its chunk, decayed up to the token.
    q = q * g.exp().unsqueeze(-1)
    k_seen = k * g.exp().unsqueeze(-1)
    k_kept = k * (g[..., -1:] - g).exp().unsqueeze(-1)
    kept = g[..., -1].exp()[..., None, None]
    out = torch.empty_like(v)
    for chunk in range(num_chunks):
        written = solved[:, chunk] @ (v[:, chunk] - k_seen[:, chunk] @ state)
        out[:, chunk] = q[:, chunk] @ state + scores[:, chunk] @ written
        state = state * kept[:, chunk] + k_kept[:, chunk].mT @ written
    return out.flatten(1, 2)[:, :num_tokens].movedim(1, 0), state


def gated_delta_net_torch(
    inputs: GdnInputs,
    weights: GdnWeights,
    state: GdnState,
    rows: StateRows,
    delta_rule: Callable = chunk_delta_rule_torch,
) -> torch.Tensor:
    """Compute `gated_delta_net`, with `delta_rule` for rows of two or more tokens."""
    if rows.cu_seqlens is None:
        return _decode(inputs, weights, state, rows.slots, rows.starts)
    out = torch.zeros(inputs.z.shape, dtype=inputs.z.dtype, device=inputs.z.device)
    lengths = rows.cu_seqlens.diff()
    singles = (lengths == 1).nonzero().squeeze(1)
    if len(singles):
        tokens = rows.cu_seqlens[singles].long()
        few = GdnInputs(*(x[tokens] for x in inputs))
        out[tokens] = _decode(few, weights, state, rows.slots[singles], rows.starts[singles])
    for row in (lengths > 1).nonzero().squeeze(1).tolist():
        first, last = rows.cu_seqlens[row : row + 2].tolist()
        slot = int(rows.slots[row])
        start = int(rows.starts[row])
        row_inputs = GdnInputs(*(x[first:last] for x in inputs))
        qkv = causal_conv_torch(row_inputs.qkv, weights.conv, state.conv[slot], start)
        before = state.recurrent[slot].float()
        if start == 0:
            before = torch.zeros_like(before)
        attended, after = delta_rule(*_operands(qkv, row_inputs, weights, state), before)
        state.recurrent[slot] = after.to(state.recurrent.dtype)
        out[first:last] = _gated(attended, row_inputs.z, weights)
    return out


def _decode(
    inputs: GdnInputs, weights: GdnWeights, state: GdnState, slots: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Compute rows of one token each."""
    slots = slots.long()
    starts = starts.long()
    convolved = inputs.qkv.float() * weights.conv[:, -1].float()
    for back in range(1, CONV_WIDTH):
        x = state.conv[slots, (starts - back) % CONV_WIDTH].float()
        convolved += x.masked_fill((starts < back).unsqueeze(1), 0) * weights.conv[:, -1 - back].float()
    state.conv[slots, starts % CONV_WIDTH] = inputs.qkv.to(state.conv.dtype)
    qkv = F.silu(convolved).to(inputs.qkv.dtype)
    before = state.recurrent[slots].float().masked_fill_((starts == 0)[:, None, None, None], 0)
    q, k, v, g, beta = _operands(qkv, inputs, weights, state)
    attended, after = delta_rule_step_torch(q, k, v, g, beta, before)
    state.recurrent[slots] = after.to(state.recurrent.dtype)
    return _gated(attended, inputs.z, weights)


def _operands(qkv: torch.Tensor, inputs: GdnInputs, weights: GdnWeights, state: GdnState) -> tuple[torch.Tensor, ...]:
    """Return q, k, v, g, beta of the delta rule from the convolution's output, a key head's q and k repeated."""
    _, heads, k_dim, v_dim = state.recurrent.shape
    values = heads * v_dim
    keys = (qkv.shape[1] - values) // 2
    q, k, v = (
        x.float().unflatten(1, (-1, size))
        for x, size in zip(qkv.split([keys, keys, values], 1), (k_dim, k_dim, v_dim), strict=True)
    )
    q, k = (l2_norm_torch(x).repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    g = -weights.a_log.float().exp() * F.softplus(inputs.a.float() + weights.dt_bias.float())
    return q * k_dim**-0.5, k, v, g, inputs.b.sigmoid().float()


def _gated(attended: torch.Tensor, z: torch.Tensor, weights: GdnWeights) -> torch.Tensor:
    """Norm and gate outputs [T, HV, DV] of the delta rule; return [T, HV * DV]."""
    z = z.unflatten(1, attended.shape[1:])
    return gated_rms_norm_torch(attended.to(z.dtype), z, weights.norm, weights.eps).flatten(1)


def _above_diagonal(device: torch.device) -> torch.Tensor:
    return torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).triu_(1)
