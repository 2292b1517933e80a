"""Parts of the Gated DeltaNet kernels that work value by value. They round where reference.py rounds."""

from nanovllm.ops.triton_utils import tl, triton


@triton.jit
def silu(x):
    """Return x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def log_decay(a, a_log, dt_bias):
    """Return the logarithm of the decay of the state; all float32."""
    return -tl.exp(a_log) * softplus(a + dt_bias)


@triton.jit
def l2_scale(x, AXIS: tl.constexpr):
    """Return the inverse norm of float32 x over AXIS."""
    return tl.rsqrt(tl.sum(x * x, AXIS) + 1e-6)


@triton.jit
def gated_norm_tile(x, z, weight, eps, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Return RMSNorm(x) * weight * silu(z) of tiles [N, SIZE]; weight is [1, SIZE] float32."""
    x = x.to(DTYPE).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    normed = (x * scale[:, None]).to(DTYPE).to(tl.float32)
    return ((normed * weight).to(DTYPE).to(tl.float32) * silu(z.to(tl.float32))).to(DTYPE)
