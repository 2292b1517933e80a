"""Chat with a model. With no argument: fetch a small default model and answer two prompts, with or without a GPU."""

import argparse
import os
import time

# Set before torch is imported: its threads then sleep while they wait, so other programs can use the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from nanovllm import LLM, SamplingParams

PROMPTS = ["Introduce yourself.", "What is the capital of France?"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a model.")
    parser.add_argument("--prompt", action="append", help="the question; may be given several times")
    parser.add_argument("--model", help="a local folder, a .gguf file or a hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks to split over (default: 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    args = parser.parse_args()
    prompts = args.prompt or PROMPTS
    try:
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        llm = LLM(args.model, tensor_parallel_size=args.tensor_parallel_size, device=args.device)
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))

    with llm:
        inputs = prompts
        try:
            # Token ids, not text: the template already has the special tokens that encoding text would add.
            if llm.tokenizer.chat_template:
                chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
                inputs = llm.chat_prompts(chats)
            start = time.perf_counter()
            outputs = llm.generate(inputs, params)
        except ValueError as error:
            parser.error(str(error))
        seconds = time.perf_counter() - start

    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"\nPrompt: {prompt}\nCompletion: {output.text.strip()}")
    num_tokens = sum(len(output.token_ids) for output in outputs)
    print(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
