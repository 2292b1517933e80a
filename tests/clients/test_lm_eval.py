"""lm-eval's `vllm` model and its models of servers, on own items: the figures are those of its `hf` model."""

import json

import lm_eval
import pytest

CHOICES = [
    {"question": "The sky is", "choices": ["blue", "made of bread", "seven"], "answer": 0},
    {"question": "Two plus two", "choices": ["is four", "sings", "is a fish, as everybody knows"], "answer": 0},
    {"question": "", "choices": ["x", "yy", "z z z"], "answer": 2},
]
TEXTS = [{"text": text} for text in ("A short one.", "One that is longer than a window. " * 9, "ünïcødé — 你好 🙂")]
QUESTIONS = [{"question": f"What is {i} times {i}?", "answer": str(i * i)} for i in range(5)]


def tasks(folder):
    """Return the configs of a task of each kind, with their items in files of `folder`."""

    def config(name, items, **options):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, items)))
        data = {"data_files": {"test": str(folder / f"{name}.json")}}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **options}

    metrics = [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")]
    choices = config(
        "own_choices",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_target="answer",
        doc_to_choice="choices",
        metric_list=metrics,
    )
    perplexity = config(
        "own_perplexity",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    answers = config(
        "own_answers",
        QUESTIONS,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n", "pa", "l("], "max_gen_toks": 20, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean"}],
    )
    return [choices, perplexity, answers]


def evaluate(folder, model, apply_chat_template=False, only=None, /, **model_args):
    return lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[config for config in tasks(folder) if only in (None, config["task"])],
        log_samples=True,
        bootstrap_iters=0,
        batch_size=4,
        apply_chat_template=apply_chat_template,
    )


def figures(results):
    """Return the metrics of all tasks, without their names' filters."""
    return {
        (task, metric): value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def samples(results, task):
    """Return the answers of the model to each item, in order."""
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def assert_equal_figures(got, want):
    expected = figures(want)
    assert len(expected) >= 6
    # Perplexities of a random model reach 10**12, so the difference of large figures is relative.
    assert figures(got) == pytest.approx(expected, rel=1e-4, abs=1e-3)
    choices, reference = samples(got, "own_choices"), samples(want, "own_choices")
    assert len(choices) == len(CHOICES)
    for answers, wanted in zip(choices, reference, strict=True):
        assert [logprob for logprob, _ in answers] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-3)
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
    assert samples(got, "own_answers") == samples(want, "own_answers")


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 1}])
def test_figures_of_vllm_equal_those_of_hf(model, tmp_path, options):
    # The windows of a rolling perplexity are two tokens shorter with `vllm`.
    got = evaluate(tmp_path, "vllm", pretrained=model, max_model_len=130, dtype="float32", **options)
    want = evaluate(tmp_path, "hf", pretrained=model, max_length=128, dtype="float32", device="cpu")
    assert_equal_figures(got, want)


def test_figures_with_the_chat_template_equal_those_of_hf(chat_model, tmp_path):
    got = evaluate(tmp_path, "vllm", True, pretrained=chat_model, max_model_len=130, dtype="float32")
    want = evaluate(tmp_path, "hf", True, pretrained=chat_model, max_length=128, dtype="float32", device="cpu")
    assert_equal_figures(got, want)


def test_figures_of_a_servers_completions_equal_those_of_hf(server, tmp_path):
    # The windows of a rolling perplexity are two tokens shorter here as well.
    url, options = f"{server.url}/v1/completions", {"max_length": 130, "num_concurrent": 4, "tokenizer": server.folder}
    got = evaluate(tmp_path, "local-completions", base_url=url, model=server.model, **options)
    want = evaluate(tmp_path, "hf", pretrained=server.folder, max_length=128, dtype="float32", device="cpu")
    assert_equal_figures(got, want)


def test_answers_of_a_servers_chat_equal_those_of_hf(server, tmp_path):
    task, url = "own_answers", f"{server.url}/v1/chat/completions"
    got = evaluate(tmp_path, "local-chat-completions", True, task, base_url=url, model=server.model, num_concurrent=4)
    want = evaluate(tmp_path, "hf", True, task, pretrained=server.folder, dtype="float32", device="cpu")
    assert figures(got) == figures(want)
    assert samples(got, task) == samples(want, task)
