"""example.py: what a user does wrong ends in one line, not in a traceback."""

import sys

import pytest

import example
from tests.models.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("example"), "qwen2"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "has no tokenizer: give prompts as token ids"),
        (["--model", "~no-such-user/model"], "'~no-such-user/model' is not a path"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size must be from 1"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(flags, message, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py", "--device", "cpu", "--model", model, *flags])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
