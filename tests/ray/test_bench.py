"""bench.py --replicas."""

import json

import pytest

import bench

pytestmark = pytest.mark.xdist_group("ray")


def test_bench_shows_one_replica_and_several(cluster, model, tmp_path, capsys):
    sizes = ["--num-seqs", "12", "--input-len", "4", "40", "--output-len", "4", "20", "--max-model-len", "128"]
    file = tmp_path / "figures.json"
    bench.main(["--model", model, "--device", "cpu", "--replicas", "2", *sizes, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["nanovllm x 1", "nanovllm x 2"]
    assert all(row["value"] > 0 and row["output_tokens"] == rows[0]["output_tokens"] for row in rows)
    assert "nanovllm x 2" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--workload", "all"], ["--compare", "transformers"], ["--plot", "x.svg"]])
def test_bench_refuses_what_replicas_cannot_show(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--replicas", "2", *flags])
    assert "--replicas" in capsys.readouterr().err
