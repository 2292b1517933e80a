"""Counts and times of requests, for Prometheus. Names are vLLM's where the meaning is the same."""

from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import fields
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from nanovllm import Metrics, RequestOutput

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SECONDS = [base * 10**power for power in (-3, -2, -1, 0, 1, 2) for base in (1, 2, 5)]
_TOKENS = [2**power for power in range(0, 21, 2)]

# The engine's counters since its start, and its gauges: (name, help, field of `Metrics`).
_COUNTERS = (
    ("vllm:num_preemptions", "Times that a running sequence had to wait again.", "num_preemptions"),
    ("vllm:prompt_tokens", "Tokens of prompts.", "prompt_tokens"),
    ("vllm:generation_tokens", "Sampled tokens.", "generated_tokens"),
    ("vllm:prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.", "prompt_tokens"),
    ("vllm:prefix_cache_hits", "Tokens of prompts that the prefix cache had.", "cached_tokens"),
    ("nanovllm:steps", "Steps of the engine.", "num_steps"),
    ("nanovllm:step_seconds", "Seconds spent in steps.", "step_time"),
)
_GAUGES = (
    ("vllm:num_requests_running", "Sequences that have a slot.", "num_running"),
    ("vllm:num_requests_waiting", "Sequences that wait for a slot.", "num_waiting"),
    ("vllm:kv_cache_usage_perc", "Fraction of the KV blocks that running sequences hold, 0 to 1.", "kv_usage"),
    ("nanovllm:free_slots", "Further sequences that could run.", "num_free_slots"),
    ("nanovllm:state_snapshots", "Cached prefixes whose recurrent state is kept.", "num_snapshots"),
    ("nanovllm:free_state_snapshots", "Free slots for recurrent state of cached prefixes.", "num_free_snapshots"),
)
assert {name for *_, name in _COUNTERS + _GAUGES} <= {field.name for field in fields(Metrics)}


class ServerMetrics:
    """The metrics of a server.

    Args:
        model_name: label of all metrics.
    """

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(self))
        self.model_name = model_name
        self.engine: Metrics | None = None
        labels = ["model_name", "finished_reason"]
        self._finished = prometheus_client.Counter(
            "vllm:request_success",
            "Finished samples by reason: stop, length, abort (the client has gone) or error.",
            labels,
            registry=self.registry,
        )
        self._responses = prometheus_client.Counter(
            "nanovllm:http_requests", "Responses by path and status.", ["path", "status"], registry=self.registry
        )
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Seconds to the first token.")
        self._time_per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean seconds between tokens of a request."
        )
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Seconds in the queue.")
        self._latency = self._histogram("vllm:e2e_request_latency_seconds", "Seconds to the last token.")
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens of a request's samples.", _TOKENS)

    def _histogram(self, name: str, text: str, buckets: list[Any] = _SECONDS) -> Histogram:
        made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self.model_name)

    async def observe(
        self, outputs: AsyncGenerator[RequestOutput, None], num_samples: int
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of a request, and count its samples, unless the engine refuses it."""
        reasons: Counter[str] = Counter()
        unfinished = "abort"  # the reason of samples that do not finish
        output = None
        try:
            async for output in outputs:
                for sample in output.outputs:
                    if sample.finish_reason is not None:
                        reasons[sample.finish_reason] += 1
                yield output
            self._observe_end(output, num_samples)
        except (TypeError, ValueError):
            num_samples = 0
            raise
        except Exception:
            unfinished = "error"
            raise
        finally:
            reasons[unfinished] += max(0, num_samples - sum(reasons.values()))
            for reason, count in reasons.items():
                self._finished.labels(self.model_name, reason).inc(count)
            await outputs.aclose()

    def _observe_end(self, output: RequestOutput | None, num_samples: int) -> None:
        """Observe the times of a request that has finished. Work for each token would slow down all streams."""
        if output is None or output.metrics is None:
            return
        times = output.metrics
        if times.first_token_ts:
            self._first_token.observe(times.first_token_latency)
            self._queued.observe(times.scheduled_ts - times.queued_ts)
        if output.total_time is not None:
            self._latency.observe(output.total_time)
        num_steps = times.num_generation_tokens / num_samples - 1
        if num_steps > 0:
            self._time_per_token.observe((times.last_token_ts - times.first_token_ts) / num_steps)
        self._prompt.observe(len(output.prompt_token_ids))
        self._generated.observe(times.num_generation_tokens)

    def count_response(self, path: str, status: int) -> None:
        """Count a response of the server."""
        self._responses.labels(path, status).inc()

    def render(self, engine: Metrics | None) -> bytes:
        """Return all metrics in Prometheus' text format.

        Args:
            engine: the engine's metrics now, or None if it cannot tell them.
        """
        self.engine = engine
        return prometheus_client.generate_latest(self.registry)


class _EngineCollector:
    """Gives the registry the metrics of the engine."""

    def __init__(self, metrics: ServerMetrics):
        self.metrics = metrics

    def collect(self) -> Iterator[Any]:
        engine = self.metrics.engine
        yield GaugeMetricFamily(
            "nanovllm:engine_up", "Whether the engine can serve requests.", float(engine is not None)
        )
        if engine is None:
            return
        for kind, table in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, text, field in table:
                family = kind(name, text, labels=["model_name"])
                family.add_metric([self.metrics.model_name], getattr(engine, field))
                yield family
