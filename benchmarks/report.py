"""Shows figures: progress lines, a table, a JSON file, a plot."""

import json
import shlex
import sys
from argparse import Namespace
from html import escape
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # one figure of one engine

NOTHING_TO_PLOT = "--plot has no limits to draw: give --hbm-tb-s or --tflops for this device"
PLOT_MARK = "<!-- nanovllm bench.py -->"
PLOT_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 }
.note { fill: #59636e }
.track { fill: #8c959f; opacity: 0.25 }
.bar { fill: #2f81f7 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .note { fill: #9198a1 } }
</style>"""

COLUMNS = {
    "limit": "limit",
    "%": "percent",
    "TB/s": "tb_s",
    "TFLOP/s": "tflop_s",
    "host ms/step": "host_ms",
    "GPU ms/step": "gpu_ms",
    "GPU GiB": "gpu_gib",
}


def number(value: float | None) -> str:
    """Format a number with marks for thousands, and with three digits or more if it has a fraction."""
    if value is None:
        return "-"
    for least, digits in ((1000, 0), (100, 1), (1, 2)):
        if value >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.4f}"


def progress(rows: list[Row]) -> list[Row]:
    """Print one line about the rows of a workload to stderr; return the rows."""
    figures = []
    for row in rows:
        figure = f"{row['engine']} {number(row['value'])} {row['unit']}"
        if row["unit"] == "tok/s":
            figure += f" ({row['output_tokens']:,} in {number(row['seconds'])} s)"
        figures.append(figure)
    print(f"{rows[0]['workload']}: {', '.join(figures)}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Return an aligned table, with its numbers to the right."""
    lines = [["workload", "engine", "figure", *COLUMNS]]
    for row in rows:
        values = [number(row.get(key)) for key in COLUMNS.values()]
        lines.append([row["workload"], row["engine"], f"{number(row['value'])} {row['unit']}", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<"] * 3 + [">"] * len(COLUMNS)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*line) for line in lines)


def model_name(args: Namespace) -> str:
    return args.model or "SmolLM2-135M-Instruct"


def device_name(rows: list[Row]) -> str:
    return torch.cuda.get_device_name() if any("gpu_gib" in row for row in rows) else "CPU"


def write_json(path: str, rows: list[Row], args: Namespace, argv: list[str]) -> None:
    """Write the figures with the command and the machine that gave them."""
    result = {
        "command": shlex.join(["bench.py", *argv]),
        "model": model_name(args),
        "device": device_name(rows),
        "torch": torch.__version__,
        "rows": rows,
    }
    Path(path).write_text(json.dumps(result, indent=2) + "\n")


def plot(rows: list[Row], title: str) -> str:
    """Return an SVG that shows each figure as a percentage of its limit.

    It has no background, so that it suits light and dark pages.
    """
    left = 190
    full = 300
    step = 30
    height = 56 + step * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}" role="img">',
        PLOT_MARK,
        PLOT_STYLE,
        f'<text x="0" y="16" class="title">{escape(title)}</text>',
        '<text x="0" y="34" class="note">percent of what memory bandwidth and arithmetic allow</text>',
    ]
    for i, row in enumerate(rows):
        y = 48 + step * i
        reached = row["percent"] / 100
        name = escape(f"{row['workload']}, {row['unit']}")
        value = f"{reached:.0%}: {number(row['value'])} of {number(row['limit'])}"
        lines += [
            f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{name}</text>',
            f'<rect class="track" x="{left}" y="{y}" width="{full}" height="20" rx="3"/>',
            f'<rect class="bar" x="{left}" y="{y}" width="{full * min(reached, 1):.1f}" height="20" rx="3"/>',
            f'<text x="{left + full + 10}" y="{y + 15}">{value}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def write_plot(path: str, rows: list[Row], args: Namespace) -> None:
    """Draw the rows that have a limit."""
    title = f"{Path(model_name(args)).name} on {device_name(rows)}"
    Path(path).write_text(plot([row for row in rows if "percent" in row], title))
