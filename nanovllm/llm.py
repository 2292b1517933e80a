"""The class users import."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as SequenceType
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from nanovllm.checks import is_list, length, shown
from nanovllm.config import Config
from nanovllm.engine.interrupts import DeferInterrupts
from nanovllm.engine.request import Request
from nanovllm.engine.step_stats import StepStats
from nanovllm.inputs import Prompt, list_prompts
from nanovllm.outputs import Metric, Metrics, RequestOutput
from nanovllm.progress import GenerationBar
from nanovllm.sampling_params import SamplingParams, copy_params
from nanovllm.vllm_engine import VllmEngine
from nanovllm.vllm_options import NEUTRAL_CALL, check_call

Chat: TypeAlias = SequenceType[dict]


class LLM:
    """A model that generates: `LLM(path).generate(prompts, SamplingParams(...))`.

    Only one thread at a time may use it: the calls of others raise RuntimeError meanwhile (`AsyncLLM` serves many at
    once). A forked child cannot use it. Close it, or use it as a context manager, to give back its memory and its
    processes.

    Args:
        model: see `Config`.
        **kwargs: the other fields of `Config`; an unknown one raises TypeError.
    """

    def __init__(self, model: str | Path | None = None, **kwargs: Any):
        self.llm_engine = VllmEngine(model, **kwargs)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | SequenceType[Prompt] | np.ndarray,
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **neutral: Any,
    ) -> list[RequestOutput]:
        """Generate for all `prompts`. Return an output for each, in their order.

        Args:
            prompts: a list or a numpy array of prompts, or a single one. A prompt is text, a list or an array of token
                ids, or a dict: `TextPrompt` or `TokensPrompt`.
            sampling_params: one for all, or one for each prompt; None are those of `get_default_sampling_params`.
            use_tqdm: show a progress bar with tokens/s.
            neutral: vLLM's `lora_request`, `priority`, `tokenization_kwargs` and `mm_processor_kwargs`, at values
                without effect.

        Raises:
            TypeError, ValueError: a prompt or its parameters are wrong; nothing was queued.
            RuntimeError: the engine is closed, asleep, in use by another thread, or has failed.
        """
        if not isinstance(use_tqdm, bool):
            raise TypeError(f"use_tqdm must be a bool, got {shown(use_tqdm)}")
        listed = list_prompts(prompts)
        check_call(neutral, NEUTRAL_CALL, len(listed))
        pairs = pair_params(listed, sampling_params)
        # One block for all, because installing handlers takes system calls. Interrupts come through between requests
        # and between steps.
        with DeferInterrupts() as interrupts, self.llm_engine.reserved():
            self.llm_engine.ensure_usable()
            requests = []
            for prompt, params in pairs:
                requests.append(self.llm_engine.input_processor.process(prompt, params))
                interrupts.let_through()
            return self._serve(requests, use_tqdm, interrupts)

    def _serve(self, requests: list[Request], use_tqdm: bool, interrupts: DeferInterrupts) -> list[RequestOutput]:
        """Queue requests and run steps until all have finished."""
        engine = self.llm_engine
        wanted = set(requests)
        unfinished = deque(requests)
        outputs: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                engine.queue(request)
            with GenerationBar(len(requests), enabled=use_tqdm) as bar:
                while unfinished:
                    for output in engine.step_for(wanted):
                        outputs[output.request_id] = output
                        bar.add(sum(len(sample.token_ids) for sample in output.outputs))
                    interrupts.let_through()
                    # Only the oldest is looked at, so that a step costs the same for any number of requests.
                    while unfinished and not engine.expects_output(unfinished[0]):
                        unfinished.popleft()
        finally:
            if unfinished:  # an error or an interrupt
                engine.abandon(requests)
        if not all(request.is_finished for request in requests):
            engine.ensure_usable(needs=())  # raises: `on_step` or another thread has closed the engine
        # An output is missing here if `on_step` aborted its request or took it with `step`. It is made again.
        now = time.monotonic()
        return [outputs.get(request.id) or request.take_output(engine.weight_version, now) for request in requests]

    def chat(
        self,
        messages: Chat | SequenceType[Chat],
        sampling_params: SamplingParams | SequenceType[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Generate a reply to each conversation: `generate` with prompts made by the model's chat template.

        Args:
            messages: one conversation, as dicts with "role" and "content", or a list of them.
            sampling_params, use_tqdm: as in `generate`.
            template: options of `chat_prompts`, and the last ones of `generate`.
        """
        neutral = {name: template.pop(name) for name in NEUTRAL_CALL if name in template}
        prompts = self.llm_engine.input_processor.chats.prompts(messages, **template)
        return self.generate(prompts, sampling_params, use_tqdm, **neutral)

    def chat_prompts(self, messages: Chat | SequenceType[Chat], **template: Any) -> list[list[int]]:
        """Return the token ids of conversations.

        Args:
            messages: one conversation, as dicts with "role" and "content", or a list of them. A content is text or a
                list of parts `{"type": "text", "text": ...}`. Arguments of tool calls are JSON text or dicts.
            tools: functions the model may call, as JSON schemas.
            chat_template: Jinja text to use instead of the model's own.
            add_generation_prompt: finish with the tokens that start a reply; True unless `continue_final_message` is.
            continue_final_message: the output continues the last message instead of starting a new one.
            chat_template_kwargs: a dict of variables of the template, such as `enable_thinking` of Qwen3's, and of the
                other arguments except `chat_template`. It overrides arguments of the same name.
            template: variables of the template may also be given as arguments.

        Raises:
            TypeError: the messages are malformed, or the template does not read a variable.
            ValueError: the messages are far too long for `max_model_len`, the model has no chat template, or the
                template does not fit the messages or the tools, or it took too much time or memory.
        """
        return self.llm_engine.input_processor.chats.prompt_ids(messages, **template)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt step by step.

        Each output has what is new since the last one, unless `output_kind` of the parameters says otherwise. Other
        requests go on meanwhile. Closing or dropping the iterator ends the request.

        Raises:
            TypeError, ValueError: at once, if the request cannot be served.
            RuntimeError: as in `generate`.
        """
        request = self.llm_engine.prepare(prompt, sampling_params, stream=True)
        increments = self._increments(request)
        # Needed when an interrupt hits the code at the end of the iterator.
        self.llm_engine.abandon_with_consumer(request, increments)
        try:
            next(increments)
            return increments
        except BaseException:
            increments.close()
            raise

    def _increments(self, request: Request) -> Generator[Any, None, None]:
        """Yield None once, then the outputs of a stream."""
        engine = self.llm_engine
        try:
            engine.queue(request)
            yield  # to `stream`: only an iterator that has started runs its `finally` when it is dropped
            # `abort` or a step for another caller may have ended the request.
            while engine.expects_output(request):
                # A step for another caller may have made an output already.
                for output in engine.take_outputs((request,)) or engine.step_for((request,)):
                    yield output
                    if output.finished:
                        return
            engine.ensure_usable(needs=())
        finally:
            engine.abandon([request])

    # -- single steps ------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: int | str | None = None,
        stream: bool | None = None,
    ) -> str:
        """Queue a request and return its id.

        Args:
            prompt: text, which is tokenized with the model's special tokens, or one of the other forms in `generate`.
            sampling_params: None are those of `get_default_sampling_params`.
            request_id: the request's id; None numbers it. No request that is unfinished, or whose output waits for
                `step`, may have the same id. An integer becomes a string, as all ids are in outputs.
            stream: `step` returns what is new each time there is something, instead of everything at the end. None
                streams if `output_kind` of `sampling_params` asks for it.

        Raises:
            TypeError, ValueError: the request cannot be served; nothing else is affected.
            RuntimeError: the engine is closed, asleep or has failed.
        """
        return self.llm_engine.add_request(prompt, sampling_params, request_id, stream)

    def step(self) -> list[RequestOutput]:
        """Run one step. Return the outputs of finished requests, and what is new in streams.

        The iterators of `stream` keep their outputs.

        Raises:
            RuntimeError: the engine is closed, asleep, in use by another thread, or has failed.
            Exception: the step itself has failed, which closes the engine; or `on_step` has raised, which does not.
        """
        return self.llm_engine.step()

    def abort(self, request_id: int | str) -> RequestOutput | None:
        """End a request in whatever state it is.

        Returns:
            Its output so far (of a stream, the new part), or None if the request is unknown or already finished.

        Raises:
            TypeError, ValueError: `request_id` is no string or integer, or an integer of more than 64 bits.
            RuntimeError: another thread uses the engine.
        """
        return self.llm_engine.abort(request_id)

    def has_unfinished(self) -> bool:
        """Return whether `step` has anything to do or to return."""
        self.llm_engine.end_abandoned()  # streams whose iterators were dropped do not count
        return self.llm_engine.has_unfinished()

    def is_finished(self) -> bool:
        """Return the opposite of `has_unfinished`: nano-vLLM's name."""
        return not self.has_unfinished()

    # -- weights and memory, as training loops need them ---------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str | Path) -> int:
        """Overwrite the weights in place, on all ranks; captured graphs stay valid.

        The prefix cache is emptied. Running requests go on from the tokens they have, recomputed with the new weights.
        Logprobs of a prompt that is not complete start again, so that all are of the same weights.

        Args:
            weights: every tensor of the checkpoint, whole, on any device, by its Hugging Face name; the engine holds
                one at a time. Or a folder with safetensors files, or a GGUF file. Under torchrun each rank gives them.

        Returns:
            The new weight version, which results carry.

        Raises:
            TypeError, ValueError: a tensor is missing, left over, given twice, of the wrong shape or dtype, or not
                finite; or the head differs from the embedding where both are one parameter. Then the old weights may be
                partly overwritten, and the engine refuses to run until an update succeeds. If the path does not exist,
                or the config in it is another model's, nothing has changed.
            RuntimeError: a rank is lost, and with it the engine; or the code that makes the weights uses the engine.
        """
        return self.llm_engine.update_weights(weights)

    def start_weight_update(self) -> None:
        """Start to overwrite the weights in parts, as `update_weights` does in one call.

            llm.start_weight_update()
            for name, param in policy.named_parameters():
                llm.load_weights([(name, param)])
            llm.finish_weight_update()

        Meanwhile the engine refuses to generate. An update that is still open ends, and starts again with no tensors.
        """
        self.llm_engine.start_weight_update()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite some of the weights, in any order, between `start_weight_update` and `finish_weight_update`.

        Args:
            weights: some tensors as in `update_weights`, each of them once in the whole update.

        Raises:
            TypeError, ValueError: a tensor is unknown, given twice, or of the wrong shape or dtype. This ends the
                update, and the engine refuses to run until another one succeeds.
            RuntimeError: no update is open, the weights are asleep, or the engine cannot be used.
        """
        self.llm_engine.load_weights(weights)

    def finish_weight_update(self) -> int:
        """Check that the new weights are whole and finite. Return their version.

        Raises:
            ValueError: as in `update_weights`.
            RuntimeError: no update is open, or the engine cannot be used.
        """
        return self.llm_engine.finish_weight_update()

    def sleep(self, level: int = 1) -> None:
        """Give device memory back until `wake_up`. Unfinished requests stay, and are recomputed later.

        A part that sleeps already stays asleep.

        Args:
            level: 1 frees the KV cache and the captured graphs; 2 also moves the weights to the host's memory (on a CPU
                they are already there and stay).

        Raises:
            TypeError, ValueError: `level` is wrong.
            RuntimeError: the engine cannot be used.
        """
        self.llm_engine.sleep(level)

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Undo `sleep`: bring weights and KV cache back and capture the graphs again. Do nothing when awake.

        Args:
            tags: wake only these parts, "weights" or "kv_cache": a trainer may wake and update the weights before there
                is room for the KV cache. None wakes all.

        Raises:
            TypeError, ValueError: `tags` is wrong.
            RuntimeError: the engine cannot be used; or the device has too little free memory, and the engine sleeps on.
        """
        self.llm_engine.wake_up(tags)

    def is_sleeping(self) -> bool:
        """Whether a part of the memory sleeps."""
        return self.llm_engine.is_sleeping

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, awake or asleep. Return True. Running requests keep their blocks."""
        return self.llm_engine.reset_prefix_cache()

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse vLLM's calls of methods of its workers: no such workers exist here.

        Raises:
            NotImplementedError: always; the message names what to call instead.
        """
        raise NotImplementedError(
            f"collective_rpc({shown(method)}) is not here; update_weights, or start_weight_update, load_weights and "
            "finish_weight_update, reach all ranks. Weights outlast sleep, so nothing needs to be reloaded"
        )

    # -- state -------------------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """Return counters since the engine was made, and what it is doing now."""
        self.llm_engine.end_abandoned()
        return self.llm_engine.metrics()

    def get_metrics(self) -> list[Metric]:
        """Return `metrics` as vLLM does: a list of names and values."""
        return self.metrics().as_vllm()

    @property
    def config(self) -> Config:
        """The options of the engine."""
        return self.llm_engine.config

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of requests without any.

        Their temperature, top_k, top_p, min_p, repetition_penalty and max_tokens are those of the model's
        generation_config.json or GGUF file, as far as it has them. `generation_config="vllm"` turns this off.
        """
        return self.llm_engine.input_processor.default_params.clone()

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer.

        Raises:
            ValueError: `skip_tokenizer_init` is set, or the model has no tokenizer.
        """
        return self.llm_engine.tokenizer

    def get_tokenizer(self) -> Any:
        """Return `tokenizer`."""
        return self.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self.llm_engine.max_model_len

    @property
    def weight_version(self) -> int:
        """How many weight updates have succeeded."""
        return self.llm_engine.weight_version

    @property
    def on_step(self) -> Callable[[StepStats], None] | None:
        """A function to call after each step with its `StepStats`; None by default.

        If it raises, `step` raises the same error. The engine stays usable, and the next `step` returns the outputs.
        """
        return self.llm_engine.on_step

    @on_step.setter
    def on_step(self, call: Callable[[StepStats], None] | None) -> None:
        if call is not None and not callable(call):
            raise TypeError(f"on_step must be a function or None, got {shown(call)}")
        self.llm_engine.on_step = call

    @property
    def time_gpu(self) -> bool:
        """Whether to measure the GPU time of each step too, which costs two CUDA events; False by default."""
        return self.llm_engine.time_gpu

    @time_gpu.setter
    def time_gpu(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"time_gpu must be a bool, got {shown(value)}")
        self.llm_engine.time_gpu = value

    def close(self) -> None:
        """Give back memory and processes. May be called again, and goes on where it was interrupted.

        Another thread's call, such as `generate`, raises RuntimeError at its next step, which this waits for.

        Raises:
            RuntimeError: weights are being updated. Nothing is closed.
        """
        self.llm_engine.close()

    def shutdown(self) -> None:
        """Do the same as `close`."""
        self.close()

    def __enter__(self):
        self.llm_engine.ensure_usable()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def pair_params(prompts: SequenceType[Prompt], params: Any) -> list[tuple[Prompt, SamplingParams | None]]:
    """Return each prompt with its parameters, which may be one for all."""
    if isinstance(params, SamplingParams | None):
        params = copy_params(params)
        return [(prompt, params) for prompt in prompts]
    if not is_list(params):
        raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {shown(params)}")
    if length(params) != length(prompts):
        raise ValueError(f"sampling_params has {length(params)} entries for {length(prompts)} prompts")
    return list(zip(prompts, map(copy_params, params), strict=True))
