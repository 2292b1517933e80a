"""An evaluation as harnesses do it: log-likelihoods of given answers, and free answers up to a stop string.

    python -m tests.programs.evaluate [model]

The items are this file's own; the default model is the one that example.py talks to.
"""

import sys

from nanovllm import LLM, SamplingParams

CHOICES = [  # context, continuations; the first is right
    ("The capital of France is", [" Paris", " Rome", " Tokyo", " bread"]),
    ("The opposite of hot is", [" cold", " green", " seven", " warm"]),
    ("Two plus two equals", [" four", " nine", " a fish", " twelve"]),
    ("The sun rises in the", [" east", " soup", " night", " west"]),
    ("Water is made of hydrogen and", [" oxygen", " iron", " gold", " helium"]),
    ("A baby cat is called a", [" kitten", " puppy", " calf", " cub"]),
    ("The first month of the year is", [" January", " March", " July", " Monday"]),
    ("Bees make", [" honey", " milk", " glass", " wool"]),
]
SHOTS = (
    "Question: What is the capital of Spain?\nAnswer: Madrid\n\nQuestion: How many legs has a dog?\nAnswer: Four\n\n"
)
QUESTIONS = [("What is the capital of Italy?", "Rome"), ("Which planet do we live on?", "Earth")]


def loglikelihoods(llm: LLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): log p(continuation | context), and whether greedy decoding would give it."""
    contexts = [llm.tokenizer.encode(context) for context, _ in pairs]
    prompts = [llm.tokenizer.encode(context + continuation) for context, continuation in pairs]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    results = []
    for context, prompt, output in zip(contexts, prompts, outputs, strict=True):
        tail = [(output.prompt_logprobs[i][prompt[i]]) for i in range(len(context), len(prompt))]
        results.append((sum(token.logprob for token in tail), all(token.rank == 1 for token in tail)))
    return results


def generate_until(llm: LLM, prompts: list[str], until: list[str]) -> list[str]:
    """Greedy answers, which end before the first of `until`."""
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, stop=until), use_tqdm=False)
    return [output.text for output in outputs]


def main(model: str | None = None) -> None:
    with LLM(model, max_model_len=512) as llm:
        scores = iter(loglikelihoods(llm, [(c, answer) for c, answers in CHOICES for answer in answers]))
        right = 0
        for context, answers in CHOICES:
            totals = [next(scores)[0] / len(answer) for answer in answers]
            best = max(range(len(answers)), key=totals.__getitem__)
            right += best == 0
            print(f"{context}{answers[best]}")
        texts = generate_until(llm, [f"{SHOTS}Question: {q}\nAnswer:" for q, _ in QUESTIONS], ["\n", "Question"])
        for (_, want), text in zip(QUESTIONS, texts, strict=True):
            print(f"{want}: {text.strip()!r}")
        found = sum(want in text for (_, want), text in zip(QUESTIONS, texts, strict=True))
        print(f"acc {right}/{len(CHOICES)} match {found}/{len(QUESTIONS)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
