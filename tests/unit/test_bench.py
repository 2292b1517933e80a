"""bench.py: its counts compared with numbers computed by hand, its flags, and its outputs."""

import gzip
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import bench
from benchmarks.engines import Nanovllm, write_config
from benchmarks.limits import body_parameters, count_costs, find_peaks
from benchmarks.run import figure_row, run_workload
from benchmarks.trace import TRACE_STEPS
from benchmarks.workloads import Figure, is_allowed, latency, offline
from nanovllm.checkpoints.model_source import open_model
from nanovllm.layers.gated_delta_net import GatedDeltaNetConfig
from nanovllm.layers.moe import MoEConfig
from nanovllm.messages import Batch, Row
from nanovllm.models import model_config
from nanovllm.models.model_config import ModelConfig
from tests.models.tiny import TINY, save_tiny, tiny_model

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position=64,
)
SMALL = ["--num-seqs", "3", "--input-len", "4", "20", "--output-len", "9", "12", "--latency-tokens", "5"]
SMALL += ["--prefill-seqs", "2", "--prefix-seqs", "3", "--prefix-len", "130", "--max-num-seqs", "4"]

FAKE_VLLM = """
import json, os, types

class SamplingParams(types.SimpleNamespace):
    pass

class LLM:
    def __init__(self, **options):
        self.calls = [options]

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, params, use_tqdm):
        self.calls.append([[prompt["prompt_token_ids"], vars(one)] for prompt, one in zip(prompts, params)])
        with open(os.environ["FAKE_VLLM_CALLS"], "w") as file:
            json.dump(self.calls, file)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("bench"), "qwen2"))


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Install a fake module `vllm` for this process and its children. Return the file with its calls."""
    folder, calls = tmp_path / "modules", tmp_path / "calls.json"
    folder.mkdir()
    (folder / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FAKE_VLLM_CALLS", str(calls))
    return calls


# -- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_body_parameters_are_all_but_embedding_and_head(name, tmp_path):
    whole = tiny_model(name)
    config = open_model(save_tiny(tmp_path, name)).config
    ends = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    assert body_parameters(config) == whole.num_parameters() - ends


DECODE = Row(0, 6, None, True)


def batches():
    """Return three steps with blocks of 4 tokens.

    The first step computes a prompt of 6 tokens. The second decodes one token of it, and computes a chunk of another
    prompt that shares its first block. The third computes one more token of that prompt.
    """
    return [
        Batch([Row(0, 0, [1] * 6, True)], new_blocks=[(0, 0, 5), (0, 1, 2)]),
        Batch([DECODE, Row(1, 4, [1] * 3, False)], num_decode=1, new_blocks=[(1, 0, 5), (1, 1, 3)]),
        Batch([Row(1, 7, [1], False)]),
    ]


def test_costs_equal_those_computed_by_hand():
    costs = count_costs(batches(), CONFIG, itemsize=2, block_size=4)
    body = 2 * 8 * (2 * 8 + 2 * 4 + 3 * 16 + 2) + 8  # 1192; the head has 80, and a token's K and V take 32 bytes
    assert body_parameters(CONFIG) == body == 1192
    # weights and embedding rows, then contexts read and tokens written
    first = (1192 + 80 + 6 * 8) * 2 + 32 * (6 + 6)
    second = (1192 + 80 + 4 * 8) * 2 + 32 * (4 + 3 + 3 + 4)  # the shared block's 4 tokens once, and 3 more of each row
    third = (1192 + 1 * 8) * 2 + 32 * (8 + 1)  # no head, as no token is sampled
    assert costs.bytes.tolist() == [first, second, third] == [3024, 3056, 2688]
    # GEMMs, minus 512 in the last layer for each token that is not the last of its row. Then in each of the two layers
    # 32 for each token attended to: 1 + ... + 6, then 6; 7 and 5 + 6 + 7, then 7 and 7; 8, then 8.
    first = 2 * (1192 * 6 - 512 * 5) + 160 + 32 * (21 + 6)
    second = 2 * (1192 * 4 - 512 * 2) + 160 + 32 * (25 + 14)
    third = 2 * 1192 + 32 * (8 + 8)
    assert costs.flops.tolist() == [first, second, third] == [10208, 8896, 2896]


def test_weights_of_one_byte_halve_the_bytes_of_the_body_alone():
    costs, halved = (count_costs(batches(), CONFIG, 2, block_size=4, body_itemsize=size) for size in (None, 1))
    assert (costs.bytes - halved.bytes).tolist() == [body_parameters(CONFIG)] * 3
    assert halved.flops.tolist() == costs.flops.tolist()


def test_products_in_fp8_count_as_twice_as_fast():
    costs, fp8 = (count_costs(batches(), CONFIG, 2, block_size=4, body_itemsize=size) for size in (None, 1))
    assert not costs.fp8_flops.any()
    # All but the head's 160 in the first two steps, and attention.
    assert fp8.fp8_flops.tolist() == [2 * (1192 * 6 - 512 * 5), 2 * (1192 * 4 - 512 * 2), 2 * 1192]
    assert fp8.limit(float("inf"), 8.0) == (costs.flops - fp8.fp8_flops / 2).sum() / 8
    assert costs.limit(float("inf"), 8.0) == costs.flops.sum() / 8


def test_costs_of_experts_are_those_that_the_tokens_choose():
    moe = MoEConfig(num_experts=4, experts_per_token=1, intermediate_size=5, norm_topk_prob=True, dense_layers=(0,))
    dense, sparse = (replace(CONFIG, moe=replace(moe, dense_layers=layers)) for layers in ((0, 1), (0,)))
    # The last layer has a router of 4 * 8 and experts of 3 * 8 * 5 in place of an MLP of 3 * 8 * 16.
    others = 1192 - 384 + 32
    assert body_parameters(sparse) == others + 4 * 120 and body_parameters(dense) == 1192
    costs, dense_costs = (count_costs(batches(), config, itemsize=2, block_size=4) for config in (sparse, dense))
    # In the last layer, the steps have 1, 2 and 1 tokens. Two tokens choose 4 * (1 - 0.75 ** 2) experts on average.
    saved = 384 - 32 - 120 * np.array([1, 1.75, 1])
    assert costs.bytes.tolist() == pytest.approx((dense_costs.bytes - 2 * saved).tolist())
    saved = (384 - 32 - 120) * np.array([1, 2, 1])
    assert costs.flops.tolist() == (dense_costs.flops - 2 * saved).tolist()
    # In other layers, all tokens of the step choose.
    costs = count_costs(batches()[:1], replace(CONFIG, moe=replace(moe, dense_layers=(1,))), itemsize=2, block_size=4)
    experts = 4 * (1 - 0.75**6)
    assert costs.bytes[0] == pytest.approx(dense_costs.bytes[0] - 2 * (384 - 32 - 120 * experts))
    assert costs.flops[0] == dense_costs.flops[0] - 2 * (384 - 32 - 120) * 6


def test_costs_of_an_unknown_kind_of_recurrent_layer_are_refused(monkeypatch):
    monkeypatch.setattr(model_config, "LAYER_TYPES", (*model_config.LAYER_TYPES, "mamba"))
    with pytest.raises(ValueError, match="the costs of layers of type 'mamba' are unknown"):
        body_parameters(replace(CONFIG, layer_types=("mamba", "full_attention")))


def test_costs_of_recurrent_layers_are_their_state_and_no_context():
    gdn = GatedDeltaNetConfig(num_key_heads=1, num_value_heads=2, key_head_dim=16, value_head_dim=16)
    hybrid = replace(CONFIG, gated_delta_net=gdn, layer_types=("gated_delta_net", "full_attention"))
    # Projections of 64 channels, 32 gates and 2 + 2 numbers, and from 32 values; convolution; gates; norm; two norms.
    body = 1192 - 8 * (2 * 8 + 2 * 4) + 8 * (64 + 32 + 2 + 2 + 32) + 64 * 4 + 2 + 2 + 16
    assert body_parameters(hybrid) == body
    costs = count_costs(batches(), hybrid, itemsize=2, block_size=4, state_itemsize=4)
    state = 2 * 16 * 16 * 4 + 3 * 64 * 2
    first = (body + 80 + 6 * 8) * 2 + 16 * (6 + 6) + state  # a sequence starts: its state is only written
    second = (body + 80 + 4 * 8) * 2 + 16 * (4 + 3 + 3 + 4) + 4 * state
    third = (body + 1 * 8) * 2 + 16 * (8 + 1) + 2 * state
    assert costs.bytes.tolist() == [first, second, third]
    on_state = 6 * 2 * 16 * 16
    assert costs.flops[0] == 2 * (body * 6 - 512 * 5) + 160 + 32 * 6 + 6 * on_state
    # As the last layer, Gated DeltaNet needs its gate and output projection for a sequence's last token only.
    last = count_costs(batches(), replace(hybrid, layer_types=hybrid.layer_types[::-1]), itemsize=2, block_size=4)
    assert last.bytes.tolist() == costs.bytes.tolist()
    assert last.flops[0] == 2 * (body * 6 - (2 * 8 * 32 + 384) * 5) + 160 + 32 * 21 + 6 * on_state
    small = count_costs(batches(), hybrid, itemsize=2, block_size=4, state_itemsize=2)
    assert (costs.bytes - small.bytes).tolist() == [1024, 4096, 2048]


def test_layers_with_a_window_read_and_attend_to_what_it_shows():
    """The first of the two layers sees 3 tokens."""
    options = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 3}
    costs = count_costs(batches(), replace(CONFIG, **options), itemsize=2, block_size=4)
    full = count_costs(batches(), CONFIG, itemsize=2, block_size=4)
    # 16 bytes a token: the contexts of 7 and 7 tokens shrink to 3, and to the 5 that 3 queries see; they share a block.
    assert (full.bytes - costs.bytes).tolist() == [0, 16 * (10 - 8), 16 * (8 - 3)]
    # Contexts of the queries: 1 to 6; 7 and 5 to 7; 8.
    assert (full.flops - costs.flops).tolist() == [32 * (1 + 2 + 3), 32 * (4 + 2 + 3 + 4), 32 * 5]


def test_limit_of_a_step_is_the_longer_of_memory_and_arithmetic():
    costs = count_costs(batches(), CONFIG, itemsize=2, block_size=4)
    assert costs.limit(1000, 3000) == pytest.approx(10208 / 3000 + 3056 / 1000 + 2688 / 1000)
    assert costs.limit(1000, float("inf")) == pytest.approx((3024 + 3056 + 2688) / 1000)


def test_reused_slot_starts_with_an_empty_context():
    again = [
        Batch([Row(0, 0, [1] * 2, True)], new_blocks=[(0, 0, 1)]),
        Batch([Row(0, 2, None, True)], num_decode=1),
    ]
    costs = count_costs(batches() + again, CONFIG, itemsize=2, block_size=4)
    alone = count_costs(again, CONFIG, itemsize=2, block_size=4)
    assert costs.bytes[3:].tolist() == alone.bytes.tolist()
    assert costs.flops[3:].tolist() == alone.flops.tolist()


def test_figure_row_has_percent_and_rates():
    measured = {"seconds": [2.0], "limit": [0.5], "bytes": [4e12], "flops": [6e12], "steps": [10], "host": [1.0]}
    row = figure_row(Figure("tok/s", 100), measured)
    assert (row["value"], row["limit"], row["percent"]) == (50, 200, 25)
    assert (row["tb_s"], row["tflop_s"], row["host_ms"]) == (2, 3, 100)
    assert "gpu_ms" not in row
    row = figure_row(Figure("ms/token", 100), measured)
    assert (row["value"], row["limit"], row["percent"]) == (20, 5, 25)


def test_latency_separates_the_first_token_from_the_others():
    args = bench.make_parser().parse_args(["--latency-tokens", "10"])
    groups, (first, others) = latency(args, 131, 512)
    assert [group.lens for group in groups] == [[1], [11]] * 3
    assert first.value([1, 3, 2, 6, 3, 6]) == 2000
    assert others.value([1, 3, 2, 6, 3, 6]) == pytest.approx(300)


@pytest.mark.parametrize(
    ("name", "itemsize", "flags", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", 2, "", (3.0e12, 790e12)),
        ("NVIDIA H200", 2, "--tensor-parallel-size 2", (8.6e12, 1580e12)),
        ("NVIDIA H100 80GB HBM3", 2, "--hbm-tb-s 2", (2e12, 790e12)),
        ("NVIDIA H100 80GB HBM3", 4, "", None),
        ("NVIDIA H100 PCIe", 2, "", None),
        (None, 2, "", None),
        (None, 4, "--hbm-tb-s 0.05 --tflops 0.5", (0.05e12, 0.5e12)),
        (None, 4, "--hbm-tb-s 0.05", (0.05e12, float("inf"))),
    ],
)
def test_peaks_are_known_by_name_or_given(name, itemsize, flags, peaks):
    found = find_peaks(bench.make_parser().parse_args(flags.split()), name, itemsize)
    assert found == (peaks and pytest.approx(peaks))


# -- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-seqs 0", "from 1 to 9999999, got '0'"),
        ("--repeat 0", "from 1 to 9999999, got '0'"),
        ("--num-seqs 10000000000", "from 1 to 9999999, got '10000000000'"),
        ("--repeat x", "from 1 to 9999999, got 'x'"),
        ("--tflops nan", "above 0, got 'nan'"),
        ("--input-len 10 5", "--input-len: LOW must be at most HIGH, got 10 5"),
        ("--output-len 3 2", "--output-len: LOW must be at most HIGH, got 3 2"),
        ("--engine other", "invalid choice: 'other'"),
        ("--engine nanovllm nanovllm", "an engine twice"),
        ("--plot limits.png", "'limits.png' must end in .svg"),
        ("--trace trace.txt", "'trace.txt' must end in .json or .json.gz"),
        ("--json nowhere/figures.json", "no folder for 'nowhere/figures.json'"),
        ("--json /", "'/' is a folder"),
        ("--json x.json --trace ./x.json --model nowhere.gguf", "must be different files"),
        ("--plot x.svg --workload start", "need a workload other than start"),
        ("--workload prefix --compare transformers", "runs the offline workload only"),
        ("--model qwen3-8b --load-format dummy --compare transformers", "needs a model with weights"),
        ("--load-format dummy --compare transformers", "needs a model with weights"),
        ("--model nowhere.gguf", "'nowhere.gguf' is not a folder"),
        ("--workload start --model nowhere.gguf", "'nowhere.gguf' is not a folder"),
        (
            "--workload start --model qwen3-0.6b --load-format dummy --max-model-len 128",
            "start has a request of 129 tokens, but max_model_len is 128",
        ),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(flags.split())
    assert message in capsys.readouterr().err


def test_figures_that_cannot_be_written_are_printed(monkeypatch, capsys):
    row = {"workload": "offline", "tokens_per_second": 5.0}
    monkeypatch.setattr(bench, "run_engines", lambda args, command: [row])
    monkeypatch.setattr(bench, "table", str)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--json", "/dev/full"])
    shown = capsys.readouterr()
    assert "tokens_per_second" in shown.out and "the figures cannot be written: [Errno 28]" in shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--compare transformers", "cannot be combined with another --engine"),
        ("--workload start", "measures nanovllm only"),
        ("--overlap 0", "--overlap: nanovllm's own"),
        ("--plot x.svg", "other engines do not report their steps"),
    ],
)
def test_flags_that_vllm_does_not_have_are_refused(flags, message, capsys, fake_vllm):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--engine", "vllm", *flags.split()])
    assert message in capsys.readouterr().err


def test_missing_vllm_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--engine", "vllm"])
    assert "vllm: it is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "prefix"], "prefix has a request of 2176 tokens, but max_model_len is 512"),
        (["--workload", "latency", "--latency-tokens", "5", "--trace", "trace.json"], "offline has a request of"),
        ([*SMALL, "--plot", "limits.svg"], "--plot has no limits to draw"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_measured(flags, message, model, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--model", model, "--device", "cpu", *flags])
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


@pytest.mark.parametrize(
    ("workload", "on_gpu", "notices"), [("offline", False, 1), ("offline", True, 0), ("prefix", False, 0)]
)
def test_sizes_of_a_gpu_on_a_cpu_give_a_notice(workload, on_gpu, notices, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    with pytest.raises(SystemExit):  # after the notice, because the model does not exist
        bench.main(["--workload", workload, "--device", "cpu", "--model", str(tmp_path / "none")])
    assert capsys.readouterr().err.count("takes long on a CPU") == notices


def test_short_model_runs_requests_that_fit(model, capsys):
    lengths = ["--num-seqs", "2", "--input-len", "3", "9", "--output-len", "2", "7", "--max-model-len", "16"]
    bench.main(["--model", model, "--device", "cpu", *lengths])
    assert "offline" in capsys.readouterr().out


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["offline", "latency", "prefill", "prefix"])
def test_workload_reports_its_figures(workload, model, tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = ["--model", model, "--device", "cpu", "--workload", workload, "--hbm-tb-s", "1", "--tflops", "2"]
    bench.main([*flags, *SMALL, "--repeat", "2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["unit"] for row in rows] == {
        "offline": ["tok/s"],
        "latency": ["ms to first token", "ms/token"],
        "prefill": ["tok/s in"],
        "prefix": ["req/s"],
    }[workload]
    for row in rows:
        assert 0 < row["percent"] < 100
        assert row["steps"] >= 1 and row["host_ms"] > 0 and row["bytes"] > 0
        assert "gpu_ms" not in row
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 + len(rows)
    assert shown.err.startswith(f"{workload}: nanovllm ")


def test_start_measures_a_new_process(model, tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench.main(["--model", model, "--device", "cpu", "--workload", "start", "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["unit"] == "s to first token" and 0 < row["ready_s"] < row["value"]
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["start", "nanovllm"]


def test_features_need_a_large_enough_vocabulary(model, capsys):
    bench.main(["--model", model, "--device", "cpu", "--workload", "features", "--load-format", "dummy", *SMALL])
    rows = capsys.readouterr().out
    assert (
        "tok/s, penalties" in rows and "tok/s, 100 biases" in rows and "allowed ids" not in rows
    )  # as there are only 131 tokens


def test_transformers_runs_next_to_nanovllm(model, capsys):
    bench.main(["--model", model, "--device", "cpu", *SMALL, "--compare", "transformers"])
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["offline", "nanovllm"],
        ["offline", "transformers"],
    ]
    assert " times transformers" in shown.err


class FakeEvent:
    """A CUDA event. The time between any two is 2 ms."""

    made = 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        FakeEvent.made += 1

    def record(self, stream):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def elapsed_time(self, end):
        assert self.recorded and end.recorded and self is not end
        return 2.0


def test_gpu_time_and_memory_are_reported(model, monkeypatch):
    args = bench.make_parser().parse_args(["--model", model, "--device", "cpu", *SMALL])
    engine = Nanovllm(args)
    try:
        monkeypatch.setattr(engine, "on_gpu", True)
        monkeypatch.setattr(engine.llm.llm_engine, "gpu", torch.device("cuda", 0))
        monkeypatch.setattr(FakeEvent, "made", 0)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 3 << 30))
        (row,) = run_workload(engine, "offline", args)
    finally:
        engine.close()
    assert row["gpu_ms"] == pytest.approx(2) and row["gpu_gib"] == 2
    assert FakeEvent.made == 2 * row["steps"]  # the timed run has no events
    assert "percent" not in row


def test_trace_that_cannot_be_written_leaves_the_figures(model, capsys):
    path = "/proc/self/trace.json"  # a folder that takes no files
    bench.main(["--model", model, "--device", "cpu", *SMALL, "--trace", path])
    shown = capsys.readouterr()
    assert "the trace cannot be written: [Errno 2]" in shown.err and "offline" in shown.out


def test_features_that_need_a_tokenizer_are_left_out_without_one(model):
    args = bench.make_parser().parse_args(["--model", model])
    assert not list(Path(model).glob("tokenizer*"))
    assert not is_allowed({"stop": "a"}, args, 1000) and is_allowed({"logit_bias": {5: 1.0}}, args, 1000)


def test_trace_of_too_few_decode_steps_says_so(model, tmp_path, capsys):
    path = tmp_path / "trace.json"
    bench.main(["--model", model, "--device", "cpu", *SMALL, "--output-len", "1", "1", "--trace", str(path)])
    shown = capsys.readouterr()
    assert "fewer than 6 decode steps; raise --output-len" in shown.err and "offline" in shown.out
    assert not path.exists()


def test_plot_and_trace_are_written(model, tmp_path):
    plot, trace = tmp_path / "limits.svg", tmp_path / "trace.json.gz"
    flags = ["--model", model, "--device", "cpu", *SMALL, "--plot", str(plot), "--trace", str(trace)]
    for _ in range(2):  # the second run overwrites the files of the first
        bench.main([*flags, "--hbm-tb-s", "1"])
    texts = [element.text for element in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "qwen2 on CPU" and texts[2] == "offline, tok/s" and "% of" not in texts[3]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in sorted(events, key=lambda event: event.get("ts", 0))]
    phases = [f"host: {name}" for name in ("schedule", "launch", "collect", "update")]
    assert [name for name in names if name in phases] == phases * TRACE_STEPS
    assert names.count("host: step") == TRACE_STEPS


def test_foreign_svg_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "mine.svg"
    path.write_text("<svg/>")
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--plot", str(path)])
    assert path.read_text() == "<svg/>"


def test_vllm_receives_the_same_requests_side_by_side(model, tmp_path, fake_vllm, capsys):
    path = tmp_path / "figures.json"
    bench.main(["--engine", "vllm", "nanovllm", "--model", model, *SMALL, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["workload"], row["engine"]) for row in rows] == [("offline", "vllm"), ("offline", "nanovllm")]
    assert "percent" not in rows[0] and rows[1]["steps"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    options, warm_up, requests = json.loads(fake_vllm.read_text())
    assert options["model"] == model and options["max_model_len"] == 512 and options["max_num_seqs"] == 4
    assert len(warm_up) == 4
    args = bench.make_parser().parse_args(SMALL)
    (group,), _ = offline(args, 131, 512)
    assert [ids for ids, _ in requests] == group.prompts
    assert [params["max_tokens"] for _, params in requests] == group.lens
    assert all(params["temperature"] == 0.6 and params["ignore_eos"] for _, params in requests)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-30b-a3b", "qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_vllm_receives_a_shape_as_a_folder(name, tmp_path):
    source = open_model(name, "dummy")
    found = open_model(write_config(source, str(tmp_path)), "dummy").config
    assert replace(found, eos_token_ids=source.config.eos_token_ids) == source.config
