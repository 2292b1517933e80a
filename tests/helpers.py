"""What tests of several folders share."""

import random

from nanovllm import LLM, SamplingParams

BLOCK = 16


def engine(path, **options):
    """Return a small engine on the CPU."""
    defaults = dict(
        device="cpu", kvcache_block_size=BLOCK, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256
    )
    return LLM(path, **{**defaults, **options})


def prompts_of(lengths, vocab_size=131, seed=0):
    """Return prompts of random token ids with these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def greedy(num_tokens, **options):
    """Return parameters for exactly this many of the most likely tokens."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **options)


def sampled(num_tokens, seed=None, **options):
    """Return parameters for exactly this many sampled tokens."""
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=num_tokens, ignore_eos=True, **options)


def tokens(llm, prompts, params):
    """Return the generated token ids of each prompt."""
    return [out.token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def finish(llm, max_steps=10_000):
    """Run steps until all requests have finished. Return the outputs."""
    outputs = []
    for _ in range(max_steps):
        if not llm.has_unfinished():
            return outputs
        outputs += llm.step()
    raise AssertionError(f"some requests have not finished after {max_steps} steps")


def assert_nothing_held(llm, context=None):
    """Check that there is nothing to do, and that no request holds a KV block or a slot."""
    assert not llm.has_unfinished(), context
    metrics = llm.metrics()
    assert (metrics.num_running, metrics.num_waiting, metrics.kv_usage) == (0, 0, 0), context
    assert len(llm.llm_engine.scheduler.free_slots) == llm.config.max_num_seqs, context
