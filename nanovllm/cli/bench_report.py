"""The figures of a load test."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm.cli.http_stream import Answer


@dataclass(frozen=True)
class Run:
    """The measurements of a load test. Its lists have an entry for each request.

    Args:
        output_lens: the number of tokens that each request asked for.
        start: when the run started, on the clock of the answers.
        cpu_seconds: CPU time of this process meanwhile.
        late: by how much each request was sent after its time, if it had one.
    """

    answers: list[Answer]
    input_lens: list[int]
    output_lens: list[int]
    start: float
    cpu_seconds: float
    late: list[float]


@dataclass(frozen=True)
class Times:
    """The times of a request that was answered, in seconds.

    Args:
        ttft: from sending the request, before the connection is made, to the first text.
        tpot: the mean time of each token after the first; None if there was one token only.
        e2e: from sending the request to the end of the stream.
    """

    ttft: float
    tpot: float | None
    e2e: float

    @classmethod
    def from_answer(cls, answer: Answer) -> "Times":
        first = answer.times[0]
        last = answer.times[-1]
        num_tokens = answer.num_tokens
        tpot = (last - first) / (num_tokens - 1) if num_tokens > 1 else None
        return cls(first - answer.start, tpot, answer.end - answer.start)


# The fields of `Times` that goodput may have goals for.
GOALS = ("ttft", "tpot", "e2e")
_DISTRIBUTIONS = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per further token, ms",
    "itl_ms": "between pieces of a stream, ms",
    "e2e_ms": "end to end, ms",
}
# A client that uses more of a core may slow the streams down.
_BUSY = 0.8
_LATE_MS = 20.0


def summary(run: Run, goals: dict[str, float]) -> dict[str, Any]:
    """Return the figures of a run. Each distribution has its mean and its percentiles."""
    done = [i for i, answer in enumerate(run.answers) if _failure(answer) is None]
    answers = [run.answers[i] for i in done]
    times = [Times.from_answer(answer) for answer in answers]
    seconds = max((answer.end for answer in run.answers), default=run.start) - run.start
    num_tokens = [answer.num_tokens for answer in answers]
    num_pieces = sum(len(answer.times) for answer in answers)
    failures = Counter(filter(None, map(_failure, run.answers)))
    intervals = [np.diff(answer.times) for answer in answers]
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(run.answers) - len(done),
        "errors": dict(failures.most_common(10)),
        "shorter_than_asked": sum(count < run.output_lens[i] for i, count in zip(done, num_tokens, strict=True)),
        "seconds": seconds,
        "input_tokens": sum(run.input_lens[i] for i in done),
        "output_tokens": sum(num_tokens),
        "requests_per_s": len(done) / seconds,
        "input_tok_s": sum(run.input_lens[i] for i in done) / seconds,
        "output_tok_s": sum(num_tokens) / seconds,
        "tokens_per_piece": sum(num_tokens) / num_pieces if num_pieces else None,
        "ttft_ms": _distribution([each.ttft for each in times]),
        "tpot_ms": _distribution([each.tpot for each in times if each.tpot is not None]),
        "itl_ms": _distribution(np.concatenate(intervals) if intervals else ()),
        "e2e_ms": _distribution([each.e2e for each in times]),
        "client_cpu": run.cpu_seconds / seconds,
        "client_late_ms": _distribution(run.late),
    }
    if goals:
        good = sum(_reaches(each, goals) for each in times)
        figures["goals_ms"] = {name: goal * 1000 for name, goal in goals.items()}
        figures["goodput_requests_per_s"] = good / seconds
        figures["good"] = good
    return figures


def _failure(answer: Answer) -> str | None:
    """Return why a request counts as failed."""
    if answer.error is None and not (answer.times and answer.num_tokens):
        return "the stream had no tokens, or did not count them"
    return answer.error


def _reaches(times: Times, goals: dict[str, float]) -> bool:
    """Return whether a request reached all goals. A time that it does not have reaches its goal."""
    values = {name: getattr(times, name) for name in goals}
    return all(value is None or value <= goals[name] for name, value in values.items())


def _distribution(seconds: Any) -> dict[str, float] | None:
    """Return mean, percentiles and maximum of some times, in ms."""
    values = np.asarray(seconds, dtype=float) * 1000
    if not values.size:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines of text."""
    lines = [f"{figures['completed']} requests answered in {figures['seconds']:.2f} s, {figures['failed']} failed"]
    lines += [f"  {count} x {error}" for error, count in figures["errors"].items()]
    if figures["shorter_than_asked"]:
        lines.append(f"  {figures['shorter_than_asked']} answers are shorter than asked for")
    if figures["completed"]:
        lines += _throughput(figures)
        lines.append(f"{'':32}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}")
        for name, title in _DISTRIBUTIONS.items():
            if values := figures[name]:
                lines.append(f"{title:32}" + "".join(f"{value:10.2f}" for value in values.values()))
    return "\n".join([*lines, *_client(figures)])


def _throughput(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{'requests/s':32}{figures['requests_per_s']:10.2f}",
        f"{'input tok/s':32}{figures['input_tok_s']:10.1f}",
        f"{'output tok/s':32}{figures['output_tok_s']:10.1f}",
        f"{'tokens in a piece of a stream':32}{figures['tokens_per_piece']:10.2f}",
    ]
    if "good" in figures:
        goals = " ".join(f"{name}:{goal:g}" for name, goal in figures["goals_ms"].items())
        share = 100 * figures["good"] / (figures["completed"] + figures["failed"])
        lines.append(f"{'goodput, requests/s':32}{figures['goodput_requests_per_s']:10.2f}  ({share:.0f}%, {goals})")
    return lines


def _client(figures: dict[str, Any]) -> list[str]:
    """Return what the load generator itself took, with a warning if it may have slowed the streams down."""
    late = figures["client_late_ms"]
    words = f", requests sent {late['p99']:.1f} ms late (p99)" if late else ""
    lines = [f"load generator: {100 * figures['client_cpu']:.0f}% of a core{words}"]
    if figures["client_cpu"] > _BUSY or (late and late["p99"] > _LATE_MS):
        lines.append("warning: the load generator was too slow for this rate; the server may be faster than it seems")
    return lines
