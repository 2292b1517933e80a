"""Compare the decoder's logits with those of transformers, in float32."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.arithmetic import ceil_div
from nanovllm.attention import select_backend
from nanovllm.checkpoints.loader import load_weights
from nanovllm.checkpoints.model_source import open_model
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.models.decoder import Decoder
from nanovllm.ops.attention.paged_cache import PagedRows
from nanovllm.ops.state.rows import StateRows
from nanovllm.runner.state_pool import StatePool, StateSizes
from nanovllm.utils.context import Context, set_context
from tests.models.tiny import TINY, fill_randomly, save_tiny, tiny_model

BLOCK = 16


@torch.inference_mode()
def prefill_logits(model, ids):
    """Return all logits of one prompt, whose KV is in scattered blocks of a small cache."""
    num_tokens = len(ids)
    num_blocks = ceil_div(num_tokens, BLOCK)
    pool = StatePool(model, BLOCK, torch.device("cpu"))
    pool.allocate(StateSizes(2 * num_blocks + 1, num_seqs=1))
    slots, cu_seqlens = torch.tensor([0], dtype=torch.int32), torch.tensor([0, num_tokens], dtype=torch.int32)
    table = torch.arange(2 * num_blocks, 0, -2)
    positions = torch.arange(num_tokens)
    context = Context(
        backend=select_backend("torch", torch.device("cpu"), model.config.head_dim, BLOCK, torch.float32),
        kv_kinds=pool.kv_kinds,
        num_decode=0,
        rows=PagedRows(
            torch.stack([table, torch.zeros_like(table)]).int(),
            slots=slots,
            context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        ),
        slot_mapping=table[positions // BLOCK] * BLOCK + positions % BLOCK,
        counters=torch.zeros(64, dtype=torch.int32),
        cu_seqlens_q=cu_seqlens,
        max_seqlen_q=num_tokens,
        max_context_len=num_tokens,
        state_rows=dict.fromkeys(pool.slot_classes, StateRows(slots, torch.zeros_like(slots), cu_seqlens)),
    )
    context.backend.prepare(context)
    with set_context(context):
        return model.compute_logits(model(ids, positions))


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(tmp_path, name):
    reference = tiny_model(name)
    source = open_model(save_tiny(tmp_path, name))
    model = Decoder(source.config, dtype=torch.float32)
    load_weights(model, source.weights())
    ids = torch.randint(source.config.vocab_size, (150,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(prefill_logits(model, ids), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["olmo2", "olmo3"])
def test_norms_of_olmo_round_once_as_in_transformers(tmp_path, name):
    reference = tiny_model(name).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    model = Decoder(source.config, dtype=torch.bfloat16, tp=TensorParallel())
    load_weights(model, source.weights())
    x = torch.randn(50, source.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = model.layers[0], reference.model.layers[0]
    with torch.inference_mode():
        assert torch.equal(model.norm(x), reference.model.norm(x))
        norm = theirs.post_feedforward_layernorm
        assert torch.equal(ours.post_feedforward_layernorm(x), norm(x))
        qkv = torch.randn(50, 2000, generator=torch.Generator().manual_seed(1)).bfloat16()
        attention = theirs.self_attn
        sizes = [len(attention.q_norm.weight), len(attention.k_norm.weight)]
        expected = [attention.q_norm(qkv[:, : sizes[0]]), attention.k_norm(qkv[:, sizes[0] : sum(sizes)])]
        got = ours.self_attn.whole_qk_norm(qkv.clone())[:, : sum(sizes)]
        assert torch.equal(got, torch.cat(expected, dim=1))


def test_a_random_model_has_random_values_in_the_buffers_of_its_checkpoint():
    """A selection bias is a buffer, and 0 in a new model: a router that ignored it would give the same logits."""
    options = {"hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "vocab_size": 8}
    options |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("glm4_moe", **options, n_routed_experts=8, first_k_dense_replace=0)
    new, filled = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    fill_randomly(filled)
    bias = filled.state_dict()["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert len(bias.unique()) == 8
    for name, buffer in new.named_buffers():  # the frequencies of RoPE are in no checkpoint
        assert name not in new.state_dict() or not torch.equal(buffer, filled.get_buffer(name))
        assert name in new.state_dict() or torch.equal(buffer, filled.get_buffer(name))


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("qwen3", {"rope_type": "yarn", "factor": 4.0}),
        ("qwen3.5-tied", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
        ("ministral3", {"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.4}),
        ("llama3", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("mistral", {"rope_type": "longrope", "short_factor": [1.1] * 5, "long_factor": [4.0] * 5}),
        ("olmo3", {"rope_type": "yarn", "factor": 4.0}),
    ],
)
def test_original_positions_next_to_the_rope_options_count_as_in_transformers(tmp_path, name, scaling):
    folder = save_tiny(tmp_path, name)
    options = json.loads((folder / "config.json").read_text())
    if (factor := options.pop("rope_parameters").get("partial_rotary_factor")) is not None:
        options["partial_rotary_factor"] = factor
    options |= {"rope_theta": 1e4, "rope_scaling": scaling, "original_max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(options))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_model(folder)
    model = Decoder(source.config, dtype=torch.float32)
    load_weights(model, source.weights())
    num_tokens = 40 if scaling.get("rope_type") == "longrope" else 100
    ids = torch.randint(source.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(prefill_logits(model, ids), expected, atol=2e-4, rtol=2e-4)
