"""The files of deploy/ agree with the server."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.serving import with_client

DEPLOY = Path(__file__).parents[2] / "deploy"
METRIC = re.compile(r"\b(?:vllm|nanovllm):\w+")


def test_the_dashboard_asks_for_metrics_and_labels_that_the_server_has(llm):
    async def metrics_after_a_request(client, state):
        await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
        return (await client.get("/metrics")).text

    text = with_client(llm, metrics_after_a_request)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    labels: dict[str, set[str]] = {}
    for line in lines:
        labels.setdefault(re.split("[{ ]", line, maxsplit=1)[0], set()).update(re.findall(r'(\w+)="', line))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 15
    for query in queries:
        for name in METRIC.findall(query):
            assert name in labels, query
            used = re.findall(rf"{name}{{(\w+)=~", query) + re.findall(r"by \((\w+)\)", query)
            assert set(used) <= labels[name], query


def test_the_dashboard_has_panels_that_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    cells = set()
    for panel in panels:
        at = panel["gridPos"]
        covered = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not covered & cells, panel["title"]
        cells |= covered
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_accepts_the_unit(tmp_path):
    # The program is not installed here.
    text = (DEPLOY / "nanovllm.service").read_text()
    unit = tmp_path / "nanovllm.service"
    unit.write_text(text.replace("/opt/nanovllm/venv/bin/nanovllm", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_image_copies_what_the_package_needs():
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "README.md", "LICENSE", "nanovllm"} == names
    assert all((DEPLOY.parent / name).exists() for name in names)
