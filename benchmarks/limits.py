"""The least time that the hardware needs for the steps that ran: bytes to move and operations to do."""

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.layers.gated_delta_net import GatedDeltaNetConfig
from nanovllm.messages import Batch
from nanovllm.models.model_config import ModelConfig

# HBM TB/s as a plain read measures it, and dense bf16 TFLOP/s as large GEMMs do, of one GPU, by a part of its name.
PEAKS = {"H100 80GB": (3.0, 790.0), "H200": (4.3, 790.0)}


@dataclass(frozen=True)
class Costs:
    """The bytes that each step of a run must move at least and the operations that it must do, all [steps].

    Args:
        fp8_flops: those of the operations that are products in FP8.
    """

    bytes: np.ndarray
    flops: np.ndarray
    fp8_flops: np.ndarray

    def limit(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Return the run's seconds if every step keeps either the memory or the arithmetic fully busy.

        Args:
            flops_per_s: operations on 16-bit numbers. Tensor cores do twice as many in FP8.
        """
        arithmetic = (self.flops - self.fp8_flops / 2) / flops_per_s
        return float(np.maximum(self.bytes / bytes_per_s, arithmetic).sum())


def find_peaks(args: Namespace, gpu_name: str | None, itemsize: int) -> tuple[float, float] | None:
    """Return bytes/s and operations/s of all devices together, or None if both are unknown.

    A peak that the user gave replaces the known one. A peak that is unknown does not limit.

    Args:
        gpu_name: None on a CPU.
        itemsize: bytes of a weight; the known peaks are those of 2.
    """
    hbm_tb_s = None
    tflops = None
    if gpu_name is not None and itemsize == 2:
        for part, (known_tb_s, known_tflops) in PEAKS.items():
            if part in gpu_name:
                hbm_tb_s = known_tb_s
                tflops = known_tflops
    hbm_tb_s = args.hbm_tb_s or hbm_tb_s
    tflops = args.tflops or tflops
    if hbm_tb_s is None and tflops is None:
        return None
    scale = 1e12 * (args.tensor_parallel_size or 1)
    infinity = float("inf")
    return scale * (hbm_tb_s or infinity), scale * (tflops or infinity)


def gated_delta_net(config: ModelConfig, layer: int) -> GatedDeltaNetConfig | None:
    """Return the options of a layer with recurrent state; None if the layer has attention.

    Raises:
        ValueError: the layer has recurrent state of a kind whose costs this file does not know.
    """
    if not config.is_recurrent(layer):
        return None
    if config.layer_type(layer) != "gated_delta_net":
        raise ValueError(f"the costs of layers of type {config.layer_type(layer)!r} are unknown; count them here")
    return config.gated_delta_net


def mixer_parameters(config: ModelConfig, layer: int) -> int:
    """Return the number of parameters of a layer's attention or Gated DeltaNet, and its two norms."""
    hidden = config.hidden_size
    gdn = gated_delta_net(config, layer)
    if gdn is not None:
        heads = gdn.num_value_heads
        values = gdn.num_value_heads * gdn.value_head_dim
        projections = gdn.num_channels + 2 * values + 2 * heads
        return hidden * (projections + 2) + gdn.num_channels * gdn.conv_width + 2 * heads + gdn.value_head_dim
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    projected = queries * (2 if config.attention_gate else 1) + 2 * keys
    count = hidden * (projected + queries + 2)
    if config.qk_norm:
        count += 2 * config.head_dim
    if config.whole_qk_norm:
        count += queries + keys
    if config.qkv_bias:
        count += projected
    if config.o_bias:
        count += hidden
    return count


def skippable_mixer_parameters(config: ModelConfig, layer: int) -> int:
    """Return the number of those parameters that a token needs only if something reads the layer's output for it."""
    gdn = gated_delta_net(config, layer)
    if gdn is not None:
        return 2 * config.hidden_size * gdn.num_value_heads * gdn.value_head_dim
    return (3 if config.attention_gate else 2) * config.hidden_size * config.num_heads * config.head_dim


def count_state(config: ModelConfig, itemsize: int, state_itemsize: int) -> tuple[int, int]:
    """Return the bytes of a sequence's recurrent state, and the operations of a token on it.

    Args:
        state_itemsize: bytes of a number in the matrices of Gated DeltaNet.
    """
    num_bytes = num_operations = 0
    for gdn in filter(None, (gated_delta_net(config, layer) for layer in range(config.num_layers))):
        matrices = gdn.num_value_heads * gdn.key_head_dim * gdn.value_head_dim
        num_bytes += matrices * state_itemsize + gdn.num_channels * (gdn.conv_width - 1) * itemsize
        num_operations += 6 * matrices  # each token multiplies key and query with the matrices, and adds to them
    return num_bytes, num_operations


def mlp_parameters(config: ModelConfig, layer: int, num_experts: float) -> float:
    """Return the number of parameters of a layer's MLP, or of its router, shared expert and `num_experts` experts."""
    hidden = config.hidden_size
    inner = config.intermediate_size
    moe = config.moe
    if moe is None or layer in moe.dense_layers:
        return 3 * hidden * inner + (2 * inner + hidden if config.mlp_bias else 0)
    count = hidden * (moe.num_experts + 3 * moe.intermediate_size * num_experts)
    if moe.shared_intermediate_size:
        count += hidden * (3 * moe.shared_intermediate_size + 1)
    return count


def body_parameters(config: ModelConfig, num_experts: float | None = None) -> float:
    """Return the number of parameters of the layers and the last norm.

    Args:
        num_experts: count so many experts of each layer; all of them if None.
    """
    if num_experts is None:
        num_experts = 0 if config.moe is None else config.moe.num_experts
    layers = range(config.num_layers)
    mlps = sum(mlp_parameters(config, layer, num_experts) for layer in layers)
    return sum(mixer_parameters(config, layer) for layer in layers) + mlps + config.hidden_size


def distinct_experts(config: ModelConfig, num_tokens: int) -> float:
    """Return how many experts of a layer so many tokens choose on average, if they choose at random."""
    if config.moe is None:
        return 0.0
    chosen = config.moe.experts_per_token / config.moe.num_experts
    return config.moe.num_experts * (1 - (1 - chosen) ** num_tokens)


class BlockTables:
    """The block tables of the slots, rebuilt from the batches, to count shared blocks once."""

    def __init__(self, batches: Sequence[Batch], block_size: int):
        new_blocks = np.array([new for batch in batches for new in batch.new_blocks], dtype=np.int64).reshape(-1, 3)
        num_slots, width, num_blocks = new_blocks.max(axis=0, initial=-1) + 1
        self.table = np.zeros((num_slots, width), dtype=np.int64)
        self.filled = np.zeros(num_blocks, dtype=np.int64)
        self.block_size = block_size

    def apply(self, batch: Batch) -> None:
        """Enter the new blocks of a batch."""
        if batch.new_blocks:
            slots, indices, blocks = np.array(batch.new_blocks).T
            self.table[slots, indices] = blocks

    def distinct_tokens(self, slots: np.ndarray, contexts: np.ndarray) -> int:
        """Return the number of tokens in the blocks of these sequences, each block counted once.

        Args:
            slots, contexts: the slot and the context length of each sequence, [R].
        """
        starts = np.arange(0, contexts.max(), self.block_size)  # of each block in a table
        used = starts < contexts[:, None]  # [R, blocks]
        blocks = self.table[slots, : len(starts)][used]
        # Sequences only share full blocks, so it does not matter which of them writes a block's count.
        self.filled[blocks] = np.minimum(contexts[:, None] - starts, self.block_size)[used]
        total = int(self.filled.sum())
        self.filled[blocks] = 0
        return total


def attended_tokens(before: np.ndarray, new: np.ndarray, window: int) -> int:
    """Return how many tokens the queries of rows see in a layer, all together.

    Args:
        before, new: the tokens of each row before this step, and those of this step, which are the queries.
        window: how many tokens a query sees at most.
    """

    def seen_up_to(length: np.ndarray) -> np.ndarray:
        short = np.minimum(length, window)
        return short * (short + 1) // 2 + (length - short) * window

    return int((seen_up_to(before + new) - seen_up_to(before)).sum())


def count_costs(
    batches: Sequence[Batch],
    config: ModelConfig,
    itemsize: int,
    block_size: int,
    state_itemsize: int = 4,
    kv_token_bytes: int | None = None,
    body_itemsize: int | None = None,
) -> Costs:
    """Count what the steps of a run move and compute at least. No sequence may run when the run starts.

    A step reads the body's weights once, the LM head if it samples, and an embedding for each token; of experts, it
    reads those that its tokens choose. It reads the keys and values that its sequences see, shared blocks once, and
    writes those of its tokens. It reads the recurrent state of each sequence, unless the sequence starts, and writes
    it. In the last layer, only the last token of each sequence needs more than its keys and values, or its state.

    Args:
        kv_token_bytes: bytes of a token's keys and values in one layer; None if they have the weights' itemsize.
        itemsize: bytes of a number.
        state_itemsize: bytes of a number in the matrices of Gated DeltaNet.
        body_itemsize: bytes of a weight of the body, if not `itemsize`: of all of them, because few differ. A body of
            one byte a weight computes in FP8.
    """
    windows = {
        layer: config.window(layer, config.max_position) or config.max_position
        for layer in range(config.num_layers)
        if not config.is_recurrent(layer)
    }
    state_bytes, state_flops = count_state(config, itemsize, state_itemsize)
    last = config.num_layers - 1
    active = 0 if config.moe is None else config.moe.experts_per_token
    without_experts = body_parameters(config, 0)
    one_expert = body_parameters(config, 1) - without_experts  # of every layer that has experts
    one_last_expert = mlp_parameters(config, last, 1) - mlp_parameters(config, last, 0)
    multiplied_by_all = without_experts + active * one_expert
    head = config.vocab_size * config.hidden_size
    queries = config.num_heads * config.head_dim
    kv_bytes = kv_token_bytes or 2 * config.num_kv_heads * config.head_dim * itemsize
    skippable = skippable_mixer_parameters(config, last) + mlp_parameters(config, last, active)
    tables = BlockTables(batches, block_size)
    step_bytes = []
    step_flops = []
    step_fp8_flops = []
    for batch in batches:
        tables.apply(batch)
        slots, before, new = np.array([(row.slot, row.start, row.num_tokens) for row in batch.rows]).T
        num_tokens = int(new.sum())
        num_sampled = sum(row.yields_token for row in batch.rows)
        distinct = tables.distinct_tokens(slots, before + new)
        attended = 0
        kv_tokens = 0
        for window, num_layers in Counter(windows.values()).items():
            attended += num_layers * attended_tokens(before, new, window)
            seen = int(np.minimum(before + new, new - 1 + window).sum())
            kv_tokens += num_layers * (min(distinct, seen) + num_tokens)
        if last in windows:
            attended += int(np.minimum(before + new, windows[last]).sum())
            attended -= attended_tokens(before, new, windows[last])
        experts = distinct_experts(config, num_tokens)
        last_experts = distinct_experts(config, len(batch.rows))
        weights = without_experts + experts * one_expert - (experts - last_experts) * one_last_expert
        embeddings = (head if num_sampled else 0) + num_tokens * config.hidden_size
        num_states = len(before) + int((before > 0).sum())  # written and read
        weight_bytes = weights * (body_itemsize or itemsize) + embeddings * itemsize
        step_bytes.append(weight_bytes + kv_bytes * kv_tokens + state_bytes * num_states)
        body_flops = 2 * (multiplied_by_all * num_tokens - skippable * (num_tokens - len(batch.rows)))
        step_flops.append(body_flops + 2 * head * num_sampled + 4 * queries * attended + state_flops * num_tokens)
        step_fp8_flops.append(body_flops if body_itemsize == 1 else 0)
    return Costs(*(np.array(steps, dtype=float) for steps in (step_bytes, step_flops, step_fp8_flops)))
