"""Messages between the server's process and the engine's, its child. They are pickled: nobody else can send any.

Messages are tuples that begin with their kind. The server sends its options first and then
    ("generate", key, prompt, sampling_params, request_id), ("leave", key), ("call", key, method, arguments),
where `method` is a coroutine of `AsyncLLM` and `key` numbers what the server asks for. It gets
    ("ready", max_model_len, default_params) or ("failed", error), then
    ("outputs", [(key, output), ...]), ("result", key, value), ("error", key, error),
where outputs and errors are packed by the functions here.
"""

from operator import attrgetter, itemgetter
from typing import TypeAlias

from nanovllm.outputs import CompletionOutput, RequestOutput

PackedError: TypeAlias = tuple[str, str]
# The samples, the request's progress, and the fields of its prompt; see `pack_output`.
PackedOutput: TypeAlias = tuple[list[tuple], tuple | None, tuple | None]

# The fields of a `CompletionOutput`, in their order.
_sample_fields = attrgetter(*CompletionOutput.__slots__)
_ERRORS = {kind.__name__: kind for kind in (TypeError, ValueError, RecursionError, RuntimeError)}


def pack_error(error: BaseException) -> PackedError:
    """Return the kind and the text of an error. Kinds that the engine does not promise become RuntimeError."""
    for kind in type(error).__mro__:
        if kind.__name__ in _ERRORS:
            return kind.__name__, str(error)
    return "RuntimeError", f"{type(error).__name__}: {error}"


def unpack_error(packed: PackedError) -> Exception:
    """Return the error that `pack_error` was given."""
    kind, text = packed
    return _ERRORS[kind](text)


def pack_output(output: RequestOutput, is_first: bool) -> PackedOutput:
    """Return an output as small tuples: its samples, the request's progress, and its prompt.

    Only the first and the last output of a request have the progress, and only the first has the prompt: each stream
    has an output in each step, and pickling them takes time from the next step.
    """
    samples = [_sample_fields(sample) for sample in output.outputs]
    progress = prompt = None
    if is_first or output.finished:
        times = output.time_to_first_token, output.total_time
        progress = (output.finished, *times, output.weight_version, output.metrics)
    if is_first:
        logprobs = output.prompt_logprobs
        if logprobs is not None:  # the first token has no row
            logprobs = logprobs.with_texts(output.prompt_token_ids[:1])
        prompt = (output.prompt, output.prompt_token_ids, output.num_cached_tokens, logprobs)
    return samples, progress, prompt


def merge_packed_deltas(first: PackedOutput, second: PackedOutput) -> PackedOutput:
    """Merge two successive outputs that have only what is new. Unpacking them first would cost time at each token."""
    samples = {sample[0]: sample for sample in first[0]}
    for new in second[0]:
        index, text, token_ids, finish_reason, stop_reason, logprobs, cumulative_logprob = new
        if old := samples.get(index):
            _, old_text, old_token_ids, _, _, old_logprobs, _ = old
            text = old_text + text
            token_ids = old_token_ids + token_ids
            logprobs = old_logprobs + logprobs if logprobs is not None else None
        samples[index] = (index, text, token_ids, finish_reason, stop_reason, logprobs, cumulative_logprob)
    merged = list(samples.values())
    if len(merged) > 1:
        merged.sort(key=itemgetter(0))
    return merged, second[1] or first[1], first[2] or second[2]


def keep_newest_packed(first: PackedOutput, second: PackedOutput) -> PackedOutput:
    """Merge two successive outputs that have everything since the start."""
    return second[0], second[1] or first[1], first[2] or second[2]


def unpack_output(samples: list[tuple], progress: tuple, prompt: tuple, request_id: str) -> RequestOutput:
    """Return an output from its samples, and from the newest progress and prompt that `pack_output` gave."""
    finished, time_to_first_token, total_time, weight_version, metrics = progress
    text, token_ids, num_cached_tokens, prompt_logprobs = prompt
    return RequestOutput(
        request_id=request_id,
        prompt=text,
        prompt_token_ids=token_ids,
        outputs=[CompletionOutput(*sample) for sample in samples],
        finished=finished,
        num_cached_tokens=num_cached_tokens,
        prompt_logprobs=prompt_logprobs,
        time_to_first_token=time_to_first_token,
        total_time=total_time,
        weight_version=weight_version,
        metrics=metrics,
    )
