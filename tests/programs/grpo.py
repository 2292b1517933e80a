"""A GRPO-style training loop (arXiv:2402.03300): the engine rolls out, transformers trains, the engine is updated.

    python -m tests.programs.grpo FOLDER [iterations]

The reward is how many of a rollout's tokens are even, so that a small random model learns it in a few steps.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

PROMPTS = [[5, 9, 12], [100, 3], [44, 45, 46, 47], [7]]
NUM_SAMPLES, NUM_TOKENS = 8, 12


def rewards_of(samples: list[list[int]]) -> torch.Tensor:
    return torch.tensor([sum(i % 2 == 0 for i in ids) / len(ids) for ids in samples])


def policy_logprobs(policy, prompt: list[int], samples: list[list[int]]) -> torch.Tensor:
    """[samples, tokens], with gradient."""
    ids = torch.tensor([prompt + sample for sample in samples])
    logits = policy(ids).logits[:, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]


def main(folder: str, iterations: str = "6") -> None:
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    options = dict(max_tokens=NUM_TOKENS, ignore_eos=True, n=NUM_SAMPLES, logprobs=0)
    with LLM(folder, device="cpu", max_model_len=64, max_num_seqs=32, max_num_batched_tokens=512) as llm:
        for step in range(int(iterations)):
            params = SamplingParams(temperature=1.0, seed=step, **options)
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            assert {output.weight_version for output in outputs} == {step}
            llm.sleep(1)  # the trainer gets the memory

            losses, rewards, gap = [], [], 0.0
            for output in outputs:
                samples = [sample.token_ids for sample in output.outputs]
                reward = rewards_of(samples)
                advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
                logprobs = policy_logprobs(policy, output.prompt_token_ids, samples)
                rolled = torch.tensor(
                    [[row[i].logprob for row, i in zip(s.logprobs, s.token_ids, strict=True)] for s in output.outputs]
                )
                gap = max(gap, (logprobs.detach() - rolled).abs().max().item())
                ratio = (logprobs - rolled).exp()
                losses.append(-(ratio.clamp(0.8, 1.2) * advantage[:, None]).mean())
                rewards.append(reward.mean().item())
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()

            llm.wake_up()
            llm.update_weights(policy.state_dict().items())
            print(f"step {step} reward {sum(rewards) / len(rewards):.3f} gap {gap:.1e}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
