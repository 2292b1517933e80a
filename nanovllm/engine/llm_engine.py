"""The engine: takes requests in, drives the steps, gives results out.

Overlap of depth 1 keeps the device busy while the host works:

    host    schedule 1 | launch 1 | schedule 2 | launch 2 | collect 1, update | schedule 3 | launch 3 | collect 2 ...
    device             |    step 1 ...............        |   step 2 ...............       |   step 3 ...
"""

import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceType
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.runner import launcher
from nanovllm.sampling_params import MAX_STOP_IDS, SamplingParams
from nanovllm.utils.hub import open_model


@contextmanager
def _interrupt_after() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a step, so that the engine can be used again; a second one does not wait."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def remember(*_) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


class LLMEngine:
    """Loads a model and answers requests.

    Not safe to call from several threads at once. Close it, or use it as a context manager, to give its memory and its
    processes back.

    Args:
        model: see `Config`.
        **kwargs: the other fields of `Config`; an unknown one raises TypeError.
    """

    def __init__(self, model: str | Path | None = None, **kwargs):
        self.executor = None
        self.error: BaseException | None = None
        self.config = Config(model=model, **kwargs)
        self.source = open_model(self.config.model, self.config.load_format)
        self.executor = launcher.start(self.config, self.source)
        runner = self.executor.runner
        self.max_model_len = runner.max_model_len
        self.num_kvcache_blocks = runner.num_blocks
        self.scheduler = Scheduler(
            self.config.max_num_seqs,
            self.config.max_num_batched_tokens,
            BlockManager(runner.num_blocks, self.config.kvcache_block_size, self.config.enable_prefix_caching),
        )
        self.requests: dict[int, Sequence] = {}
        self.in_flight: deque[Step] = deque()
        self.finished: list[RequestOutput] = []
        self.seeds = random.Random(self.config.seed)

    @cached_property
    def tokenizer(self):
        """The model's transformers tokenizer, loaded when it is first used."""
        return self.source.tokenizer()

    # -- requests ----------------------------------------------------------------------------------------------------

    def add_request(self, prompt: str | SequenceType[int], sampling_params: SamplingParams | None = None) -> int:
        """Queue a request; its id.

        Args:
            prompt: text, which is tokenised with the model's special tokens, or token ids.
            sampling_params: SamplingParams() if None.

        Raises:
            TypeError, ValueError: the request cannot be served; nothing else is affected.
            RuntimeError: the engine is closed or has failed.
        """
        return self._queue(*self._checked(prompt, sampling_params))

    def abort(self, request_id: int) -> RequestOutput | None:
        """End a request in whatever state it is; what it has so far, or None if it is unknown or already finished."""
        seq = self.requests.pop(request_id, None)
        if seq is None:
            return None
        self.scheduler.finish(seq, "abort")
        return self._output(seq)

    def _checked(self, prompt, params: SamplingParams | None) -> tuple[list[int], SamplingParams, frozenset[int]]:
        self._check_usable()
        if self.source.has_tokenizer:
            _ = self.tokenizer  # a broken one refuses requests here: in a step it would take all of them down
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {params!r}")
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, SequenceType) and not isinstance(prompt, bytes):
            token_ids = list(prompt)
        else:
            raise TypeError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
        vocab_size = self.source.config.vocab_size
        if not token_ids:
            raise ValueError("prompt is empty; it must have at least one token")
        if set(map(type, token_ids)) != {int}:
            wrong = next(token_id for token_id in token_ids if type(token_id) is not int)
            raise TypeError(f"prompt must be text or a list of int token ids, got an id {wrong!r}")
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"prompt has the token id {token_id}; ids go from 0 to {vocab_size - 1}")
        total = len(token_ids) + params.max_tokens
        if total > self.max_model_len:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens and max_tokens is {params.max_tokens}; together they must be at "
                f"most max_model_len={self.max_model_len}"
            )
        room = self.num_kvcache_blocks * self.config.kvcache_block_size
        if total > room:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens and max_tokens is {params.max_tokens}; the whole KV cache holds "
                f"{room} tokens: raise num_kvcache_blocks"
            )
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= frozenset(self.source.config.eos_token_ids)
        if params.min_tokens and len(end_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"stop_token_ids and the model's end-of-sequence ids are {len(end_ids)} together; with min_tokens they "
                f"must be at most {MAX_STOP_IDS}"
            )
        out = [i for i in params.stop_token_ids if i >= vocab_size]
        if out:
            raise ValueError(f"stop_token_ids has {out[0]}; ids go from 0 to {vocab_size - 1}")
        return token_ids, params, end_ids

    def _queue(self, token_ids: list[int], params: SamplingParams, end_ids: frozenset[int]) -> int:
        seed = self.seeds.getrandbits(63) if params.seed is None else params.seed
        seq = Sequence(token_ids, params, end_ids, seed)
        self.requests[seq.id] = seq
        self.scheduler.add(seq)
        return seq.id

    # -- steps -------------------------------------------------------------------------------------------------------

    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do or to give."""
        return bool(self.requests or self.in_flight or self.finished)

    def is_finished(self) -> bool:
        """The opposite of `has_unfinished`."""
        return not self.has_unfinished()

    def step(self) -> list[RequestOutput]:
        """Launch the next step, collect the one before, and return the requests that have finished."""
        self._check_usable()
        with _interrupt_after():
            try:
                self._advance()
            except BaseException as error:
                # The ranks' state is unknown now, so no later result could be trusted.
                self.error = error
                self.close()
                raise
        finished, self.finished = self.finished, []
        return finished

    def _advance(self) -> None:
        launched = self.scheduler.schedule()
        if launched:
            self.executor.launch(launched.batch)
            self.in_flight.append(launched)
        elif not self.in_flight:
            return
        if not launched or len(self.in_flight) > self.config.overlap:
            tokens = self.executor.collect()
            for seq in self.scheduler.update(self.in_flight.popleft(), tokens):
                del self.requests[seq.id]
                self.finished.append(self._output(seq))

    def _output(self, seq: Sequence) -> RequestOutput:
        ids = seq.output_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True) if self.source.has_tokenizer else ""
        return RequestOutput(seq.id, list(seq.prompt_ids), ids, text, seq.finish_reason, seq.num_cached)

    def generate(
        self,
        prompts: str | SequenceType[str] | SequenceType[int] | SequenceType[SequenceType[int]],
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all `prompts`, in their order.

        Args:
            prompts: texts, lists of token ids, or a single one of either.
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show a progress bar with tokens/s.

        Raises:
            TypeError, ValueError: a prompt or its parameters are wrong; nothing was queued.
        """
        if not isinstance(prompts, SequenceType) or isinstance(prompts, bytes):
            raise TypeError(f"prompts must be a list of texts or of token id lists, got {type(prompts).__name__}")
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if isinstance(sampling_params, SamplingParams | None):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, SequenceType) or isinstance(sampling_params, str | bytes):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts")
        checked = [self._checked(*pair) for pair in zip(prompts, sampling_params, strict=True)]
        ids = [self._queue(*request) for request in checked]
        outputs: dict[int, RequestOutput] = {}
        others: list[RequestOutput] = []  # of requests that were added before; the next `step` returns them
        mine, tokens, begin = set(ids), 0, time.perf_counter()
        try:
            with tqdm(total=len(ids), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while len(outputs) < len(ids):
                    for output in self.step():
                        if output.request_id not in mine:
                            others.append(output)
                            continue
                        outputs[output.request_id] = output
                        tokens += len(output.token_ids)
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):.0f} tok/s", refresh=False)
                        bar.update()
        finally:
            self.finished = others + self.finished
            for request_id in mine - outputs.keys():  # interrupted: leave nothing behind
                self.abort(request_id)
        return [outputs[request_id] for request_id in ids]

    # -- life --------------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"the engine has failed and must be made anew: {self.error!r}") from self.error
        if self.executor is None:
            raise RuntimeError("the engine is closed")

    def close(self) -> None:
        """Give back memory and processes. May be called again."""
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "executor", None) is not None:
            self.close()
