"""The benchmark of perplexity."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import perplexity
from benchmarks.perplexity import Comparison, compare, windows_of
from tests.engine.reference import load_reference
from tests.models.tiny import save_tiny_with_tokenizer

TEXT = "The text of a test, in bytes. " * 5


def test_perplexity_is_that_of_transformers_and_rises_with_quantized_weights(tmp_path):
    path = save_tiny_with_tokenizer(tmp_path, "llama")
    results = compare(path, TEXT, 40, ["plain", "weights"], device="cpu", max_num_batched_tokens=64, max_num_seqs=4)
    from transformers import PreTrainedTokenizerFast

    ids = PreTrainedTokenizerFast.from_pretrained(path)(TEXT).input_ids
    losses = []
    for window in windows_of(ids, 40):
        with torch.inference_mode():
            logits = load_reference(path)(torch.tensor([window])).logits[0, :-1]
        losses += F.cross_entropy(logits, torch.tensor(window[1:]), reduction="none").tolist()
    plain, weights = results["plain"], results["weights"]
    assert plain.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert (plain.increase, plain.error, plain.distance) == (0, 0, 0)
    assert weights.increase == pytest.approx(math.log(weights.perplexity / plain.perplexity))
    assert abs(weights.increase) <= weights.distance and 0 < weights.error < weights.distance


def test_comparison_has_the_standard_error_of_paired_differences():
    result = Comparison.of([-1.0, -2.0, -3.0, -4.0], [-1.0, -1.0, -3.0, -3.0])
    assert result == (pytest.approx(math.exp(2.5)), 0.5, 0.25, 0.5)
    assert windows_of(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--window 1", "--window must be at least 2, got 1"), ("--model /nowhere", "'/nowhere' is not")],
)
def test_wrong_options_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["perplexity", *flags.split()])
    with pytest.raises(SystemExit):
        perplexity.main()
    assert message in capsys.readouterr().err
