"""A load generator, `nanovllm bench serve`: it sends streamed completions and reports how fast a server answers."""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from nanovllm.checks import ABOVE_0, check_fields, within
from nanovllm.cli.bench_report import GOALS, Run, summary, table
from nanovllm.cli.http_stream import Answer, Server, public_url
from nanovllm.library_errors import refusing
from nanovllm.progress import ProgressBar
from nanovllm.utils.open_files import allow_open_files

_MAX_PROMPTS = 1 << 20
_TOP_TOKEN_ID = 10_000
_SPARE_FILES = 100  # descriptors for everything but connections


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The arguments of `nanovllm bench serve`.

    Args:
        url: the server's address. The environment's proxy variables are not used.
        api_key: sent to the server as a Bearer token; by default the first key in NANOVLLM_API_KEY.
        model: the model's name in the API; None asks the server for its first one.
        num_prompts: number of requests.
        request_rate: how many requests are sent in a second on average, at random times (a Poisson process); inf sends
            all at once.
        max_concurrency: how many requests the server has at once; more wait here, and their times start when they are
            sent. None sets no limit.
        input_len: shortest and longest prompt, in tokens.
        output_len: smallest and largest number of tokens that a request asks for.
        temperature: of the requests.
        vocab_size: prompts have token ids below it, and none above 10000.
        seed: seed of prompts, lengths and times.
        goodput: goals of a request in ms, as ttft:200 tpot:50. Goodput counts the requests that reach all of them. ttft
            is the time to the first token, tpot the mean time of each further one, e2e the whole time.
        json: file for the figures, which is overwritten.
    """

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str | None = None
    num_prompts: int = within(1, _MAX_PROMPTS, default=256)
    request_rate: float = within(ABOVE_0, math.inf, default=math.inf)
    max_concurrency: int | None = within(1, _MAX_PROMPTS, default=None)
    input_len: tuple[int, int] = field(default=(100, 1024), metadata={"metavar": ("LOW", "HIGH")})
    output_len: tuple[int, int] = field(default=(100, 1024), metadata={"metavar": ("LOW", "HIGH")})
    temperature: float = within(0, 100, default=0.6)
    vocab_size: int = within(2, 1 << 30, default=_TOP_TOKEN_ID + 1)
    seed: int = within(0, (1 << 63) - 1, default=0)
    goodput: tuple[str, ...] = ()
    json: str | None = None

    def __post_init__(self):
        check_fields(self)
        for name in ("input_len", "output_len"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be two numbers 1 <= LOW <= HIGH, got {low} {high}")
        object.__setattr__(self, "goodput", tuple(self.goodput))
        self.goals()
        Server(self.url, self.api_key)
        if self.json is not None:
            path = Path(self.json).absolute()
            if path.is_dir() or not path.parent.is_dir():
                raise ValueError(f"json must be a file in a folder that exists, got {self.json!r:.200}")

    def goals(self) -> dict[str, float]:
        """Return the goals of `goodput` in seconds, by their names.

        Raises:
            ValueError: a goal has no valid name or number.
        """
        goals = {}
        for text in self.goodput:
            name, _, number = text.partition(":")
            if name in goals:
                raise ValueError(f"goodput must have one goal for each name, got another for {name}")
            try:
                goals[name] = float(number) / 1000
            except ValueError:
                goals[name] = 0.0
            if name not in GOALS or not 0 < goals[name] < math.inf:
                names = ", ".join(GOALS)
                raise ValueError(f"goodput must have goals NAME:MS with the names {names}, got {text!r:.100}")
        return goals


def bench_serve(options: BenchOptions) -> int:
    """Measure a server. Print the figures and return 0, or 1 if no request was answered.

    Raises:
        RuntimeError: the server cannot be reached, or refuses requests.
    """
    run = asyncio.run(_Load(options).measure())
    figures = summary(run, options.goals())
    print(table(figures))
    if options.json is not None:
        shown = {name: getattr(options, name) for name in BenchOptions.__slots__ if name not in ("api_key", "json")}
        shown["url"] = public_url(options.url)
        shown["request_rate"] = None if math.isinf(options.request_rate) else options.request_rate
        with refusing(f"{options.json} cannot be written", OSError):
            Path(options.json).write_text(json.dumps({"options": shown, **figures}, indent=2) + "\n")
    return 0 if figures["completed"] else 1


def make_requests(options: BenchOptions) -> tuple[list[list[int]], list[int]]:
    """Return prompts of token ids, and how many tokens each asks for: those of bench.py's offline workload."""
    rng = Random(options.seed)
    top = min(_TOP_TOKEN_ID, options.vocab_size - 1)
    low, high = options.input_len
    prompts = []
    for _ in range(options.num_prompts):
        num_tokens = rng.randint(low, high)
        prompts.append([rng.randint(0, top) for _ in range(num_tokens)])
    return prompts, [rng.randint(*options.output_len) for _ in prompts]


def arrivals(options: BenchOptions) -> Iterator[float]:
    """Yield when each request is sent, in seconds from the start."""
    rng = Random(options.seed + 1)
    now = 0.0
    for _ in range(options.num_prompts):
        yield now
        if options.request_rate < math.inf:
            now += rng.expovariate(options.request_rate)


class _Load:
    """Sends the requests of one run."""

    def __init__(self, options: BenchOptions):
        self.options = options
        self.server = Server(options.url, options.api_key)
        self.url = public_url(options.url)
        self.limit = asyncio.Semaphore(options.max_concurrency or options.num_prompts)
        self.late: list[float] = []

    async def measure(self) -> Run:
        """Check that the server answers, then send all requests. Return what came back."""
        model = self.options.model or await self._first_model()
        await self._try(model)
        prompts, lens = make_requests(self.options)
        # Made before the clock starts: writing JSON would delay the requests.
        requests = [
            self._completion(model, prompt, num_tokens, f"bench-{i}")
            for i, (prompt, num_tokens) in enumerate(zip(prompts, lens, strict=True))
        ]
        allow_open_files(_SPARE_FILES + min(self.options.max_concurrency or len(requests), len(requests)))
        with ProgressBar(total=len(requests), desc="Requests", enabled=None, dynamic_ncols=True) as bar:
            start = time.perf_counter()
            cpu_start = time.process_time()
            answers = await self._send_all(requests, start, bar)
            cpu_seconds = time.process_time() - cpu_start
        return Run(
            answers=answers,
            input_lens=[len(prompt) for prompt in prompts],
            output_lens=lens,
            start=start,
            cpu_seconds=cpu_seconds,
            late=self.late,
        )

    async def _send_all(self, requests: list[bytes], start: float, bar: ProgressBar) -> list[Answer]:
        tasks = []
        for request, arrival in zip(requests, arrivals(self.options), strict=True):
            if (wait := start + arrival - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if self.options.request_rate < math.inf:
                self.late.append(time.perf_counter() - start - arrival)
            tasks.append(asyncio.create_task(self._send(request, bar)))
        return await asyncio.gather(*tasks)

    async def _send(self, request: bytes, bar: ProgressBar) -> Answer:
        async with self.limit:
            answer = await self.server.send(request)
        bar.update()
        return answer

    async def _first_model(self) -> str:
        answer = await self.server.send(self.server.request("GET", "/v1/models"))
        if answer.error is not None:
            raise RuntimeError(f"{self.url} does not list its models: {answer.error}")
        models = answer.json().get("data")
        names = [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        if not names or not isinstance(names[0], str):
            raise RuntimeError(f"{self.url} lists no models; give --model")
        return names[0]

    async def _try(self, model: str) -> None:
        """Send one short request, so that a refusal is reported once and before the run."""
        answer = await self.server.send(self._completion(model, [1] * self.options.input_len[0], 2, "bench-first"))
        if answer.error is not None:
            raise RuntimeError(f"{self.url} refused the first request: {answer.error}")
        if not answer.num_tokens:
            raise RuntimeError(f"{self.url} does not count the tokens of its streams (stream_options)")

    def _completion(self, model: str, prompt: list[int], num_tokens: int, request_id: str) -> bytes:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": self.options.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self.server.request("POST", "/v1/completions", body, request_id)
