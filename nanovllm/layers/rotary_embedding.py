"""Rotary position embedding (RoPE, arXiv:2104.09864): the table of angles and the types of scaling."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.weights.row_order import paired_order

# The supported types and the options that a checkpoint must give for each.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "original_max_position_embeddings"),
    "frequency_factors": ("factors",),  # GGUF files with llama3: a divisor for each frequency
}
# The types with a number of original positions that config.json may have next to the RoPE options.
ROPE_WITH_ORIGINAL = ("llama3", "yarn", "longrope")
# Optional options and their types: those of yarn and longrope, and Ministral 3's factor of queries.
ROPE_OPTIONAL = {
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "truncate": bool,
    "llama_4_scaling_beta": float,
}


def _llama3(inv_freq: torch.Tensor, options: dict) -> torch.Tensor:
    """Scale frequencies as Llama 3.1: divide slow ones by the factor, keep fast ones, blend linearly in between."""
    low = options["low_freq_factor"]
    high = options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * kept + inv_freq / options["factor"] * (1 - kept)


def _yarn(inv_freq: torch.Tensor, theta: float, options: dict) -> tuple[torch.Tensor, float]:
    """Return the frequencies of YaRN (arXiv:2309.00071), and the factor of cos and sin.

    Here the blend is linear in the index of the dimension.
    """
    factor = options["factor"]
    dim = 2 * len(inv_freq)

    def index_of(turns: float) -> float:
        span = options["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(theta))

    def mscale(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    low = index_of(options.get("beta_fast") or 32)
    high = index_of(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    blend = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = inv_freq / factor * blend + inv_freq * (1 - blend)
    if options.get("attention_factor") is not None:
        return inv_freq, options["attention_factor"]
    scale = options.get("mscale")
    scale_all = options.get("mscale_all_dim")
    if scale and scale_all:
        return inv_freq, mscale(scale) / mscale(scale_all)
    return inv_freq, mscale(1)


def _longrope(inv_freq: torch.Tensor, options: dict) -> tuple[torch.Tensor, float]:
    """Return the frequencies of LongRoPE (arXiv:2402.13753) for the original positions, and the factor of cos and sin.

    Each frequency has a divisor. Longer texts have other divisors, at all positions.
    """
    attention_factor = options.get("attention_factor")
    factor = options["factor"]
    if attention_factor is None:
        original = options["original_max_position_embeddings"]
        attention_factor = math.sqrt(1 + max(0.0, math.log(factor)) / math.log(original))
    return inv_freq / torch.tensor(options["short_factor"], dtype=torch.float32), attention_factor


def rope_frequencies(head_dim: int, theta: float | None, scaling: dict | None = None) -> tuple[torch.Tensor, float]:
    """Return inverse frequencies (radians per position), [head_dim / 2] float32, and the factor of cos and sin.

    Args:
        theta: the base of the frequencies; None for a layer without RoPE, whose frequencies are 0.
        scaling: None, or the checkpoint's options with one of ROPE_TYPES as "rope_type".
    """
    if theta is None:
        return torch.zeros(head_dim // 2), 1.0
    inv_freq = theta ** (torch.arange(0, head_dim, 2).float() / -head_dim)  # [head_dim / 2]
    scaling = scaling or {"rope_type": "default"}
    attention_factor = 1.0
    match scaling["rope_type"]:
        case "linear":
            inv_freq = inv_freq / scaling["factor"]
        case "llama3":
            inv_freq = _llama3(inv_freq, scaling)
        case "yarn":
            inv_freq, attention_factor = _yarn(inv_freq, theta, scaling)
        case "longrope":
            inv_freq, attention_factor = _longrope(inv_freq, scaling)
        case "frequency_factors":
            inv_freq = inv_freq / torch.tensor(scaling["factors"], dtype=torch.float32)
    return inv_freq, attention_factor


def rope_table(
    head_dim: int, max_position: int, theta: float | None, scaling: dict | None = None, rotary_dim: int | None = None
) -> torch.Tensor:
    """Return cos (first half) and sin (second half) of each position's angles, [max_position, head_dim] float32.

    Args:
        theta, scaling: see `rope_frequencies`.
        rotary_dim: number of dimensions that rotate, in the order of `paired_order`; all if None.
    """
    rotary_dim = rotary_dim or head_dim
    inv_freq, attention_factor = rope_frequencies(rotary_dim, theta, scaling)
    angles = torch.outer(torch.arange(max_position).float(), inv_freq)
    padding = (0, (head_dim - rotary_dim) // 2)
    cos = F.pad(angles.cos() * attention_factor, padding, value=1.0)
    sin = F.pad(angles.sin() * attention_factor, padding)
    return torch.cat((cos, sin), dim=-1)


def query_scale_table(max_position: int, scaling: dict | None) -> torch.Tensor | None:
    """Return the factor of the queries at each position, [max_position] float32; None for models without one."""
    beta = (scaling or {}).get("llama_4_scaling_beta")
    if scaling is None or beta is None:
        return None
    num_originals = torch.arange(max_position) // scaling["original_max_position_embeddings"]
    return 1 + beta * torch.log1p(num_originals.to(torch.float32))


class RotaryEmbedding(nn.Module):
    """The tables of layers with the same RoPE. The kernel that stores K and V applies them.

    Args:
        max_position: number of positions in the tables. The angles do not depend on it.
        theta, scaling, rotary_dim: see `rope_table`.

    Attributes:
        cos_sin: see `rope_table`.
        query_scale: see `query_scale_table`.
        order: the order that queries and keys must have; None if it is that of a checkpoint.
    """

    cos_sin: torch.Tensor
    query_scale: torch.Tensor | None

    def __init__(
        self,
        head_dim: int,
        max_position: int,
        theta: float | None,
        scaling: dict | None = None,
        rotary_dim: int | None = None,
    ):
        super().__init__()
        self.max_position = max_position
        self.order = None if rotary_dim in (None, head_dim) else paired_order(head_dim, rotary_dim)
        device = torch.get_default_device()
        if device.type == "meta":  # arithmetic on meta tensors would import torch's compiler, which takes seconds
            table = torch.empty((max_position, head_dim))
            query_scale = None
        else:
            with torch.device("cpu"):
                table = rope_table(head_dim, max_position, theta, scaling, rotary_dim)
                query_scale = query_scale_table(max_position, scaling)
        self.register_buffer("cos_sin", table.to(device), persistent=False)
        self.register_buffer("query_scale", None if query_scale is None else query_scale.to(device), persistent=False)
