"""A request, and the replica that answers it, as the driver sees them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import random
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any
from uuid import uuid4

import ray

from nanovllm import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.inputs import is_array

# Prompts are compared in blocks of so many tokens. A token has about four characters.
_BLOCK_TOKENS = 256
_CHARS_PER_TOKEN = 4
# How many blocks to remember for each replica: 16 million tokens.
_MAX_REMEMBERED = 1 << 16
# The estimate for a request without `max_tokens`.
_NEW_TOKENS = 1024


class Request:
    """An unfinished request.

    Args:
        seeds: makes a seed for parameters without one.
        put: called with each output, and with the error that ends the request.
        kind: kind of the outputs.
        prompt: a prompt, or a conversation if there are options of its `template`.
        params: None are the model's own.

    Attributes:
        message: the pickled arguments of `ReplicaActor.answer`.
        num_tokens: the estimated number of tokens of its prompt and its answer.
        prefixes: a hash of each prefix of its prompt that is whole blocks.
        sent: how many tokens and characters of each sample the consumer of a stream has.
        ended: the samples whose ends the consumer of a stream has.
        is_resumed: another replica was lost after it had sent some outputs of a stream. The outputs of this one have
            each sample whole, so that the part that was sent can be cut off.
        replica: the last replica that it was sent to.
        cost: how many tokens it has added to this replica.
    """

    def __init__(self, seeds: random.Random, put: Any, kind: Any, prompt: Any, params: Any, template: Any = None):
        self.id = uuid4().hex
        self.kind = kind
        self._put = put
        self.message = ray.cloudpickle.dumps((prompt, params, seeds.getrandbits(63), template))
        text = str(prompt.tolist() if is_array(prompt) else prompt)
        size = _BLOCK_TOKENS * _CHARS_PER_TOKEN
        block_hashes = [hash(text[end - size : end]) for end in range(size, len(text) + 1, size)]
        self.prefixes = list(accumulate(block_hashes, lambda prefix, block: hash((prefix, block))))
        params = params if isinstance(params, SamplingParams) else SamplingParams()  # the engine refuses others
        self.num_tokens = len(text) // _CHARS_PER_TOKEN + (params.max_tokens or _NEW_TOKENS) * params.n
        self.sent: dict[int, tuple[int, int]] = {}
        self.ended: set[int] = set()
        self.replica: Replica | None = None
        self._first: RequestOutput | None = None

    def receive(self, item: RequestOutput | Exception) -> None:
        """Give an output or the error to the caller. An output of a stream loses what the caller has already."""
        if isinstance(item, RequestOutput):
            item = self._with_prompt(item)
        if isinstance(item, RequestOutput) and self.kind is not RequestOutputKind.FINAL_ONLY:
            is_delta = self.kind is RequestOutputKind.DELTA
            if self.is_resumed and is_delta:
                # The new replica repeats samples that have ended before.
                item = replace(item, outputs=[each for each in item.outputs if each.index not in self.ended])
            if self.is_resumed and not item.finished and (not item.outputs or any(map(self._is_behind, item.outputs))):
                return
            self.ended.update(sample.index for sample in item.outputs if sample.finish_reason is not None)
            parts = [self._new_part(sample, is_whole=self.is_resumed or not is_delta) for sample in item.outputs]
            item = replace(item, outputs=parts) if is_delta else item
        self._put(item)

    def _with_prompt(self, output: RequestOutput) -> RequestOutput:
        """Return an output with the prompt of the first one, the only one that a replica sends with it."""
        first = self._first
        if first is None:
            self._first = output
            return output
        return replace(
            output,
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs,
        )

    def _is_behind(self, sample: CompletionOutput) -> bool:
        """Return whether the caller has had more of a sample than this."""
        return len(sample.token_ids) < self.sent.get(sample.index, (0, 0))[0]

    def _new_part(self, sample: CompletionOutput, is_whole: bool) -> CompletionOutput:
        """Return what the caller has not had of a sample, which is whole or new."""
        tokens, chars = self.sent.get(sample.index, (0, 0))
        if is_whole:
            logprobs = sample.logprobs and sample.logprobs[tokens:]
            sample = replace(sample, text=sample.text[chars:], token_ids=sample.token_ids[tokens:], logprobs=logprobs)
        self.sent[sample.index] = tokens + len(sample.token_ids), chars + len(sample.text)
        return sample


@dataclass(eq=False)
class Replica:
    """A replica as the driver sees it.

    Args:
        actor: Ray's handle of it.
        requests: its unfinished requests by their ids.
        num_tokens: the sum of their costs.
    """

    actor: Any
    requests: dict[str, Request] = field(default_factory=dict)
    num_tokens: int = 0
    _prefixes: set[Any] = field(default_factory=set)

    def cost(self, request: Request) -> int:
        """Return how many tokens a request would add. A prefix that the replica has had costs nothing."""
        return request.num_tokens - len(self._prefixes.intersection(request.prefixes)) * _BLOCK_TOKENS

    def send(self, request: Request) -> None:
        """Let the replica answer a request."""
        self.requests[request.id] = request
        request.replica = self
        request.cost = self.cost(request)
        self.num_tokens += request.cost
        if len(self._prefixes) > _MAX_REMEMBERED:
            self._prefixes.clear()
        self._prefixes.update(request.prefixes)
        request.is_resumed = bool(request.sent)
        kind = RequestOutputKind.CUMULATIVE if request.is_resumed else request.kind
        self.actor.answer.remote(request.id, kind, request.message)

    def remove(self, request: Request) -> None:
        """Remove a request that has ended."""
        del self.requests[request.id]
        self.num_tokens -= request.cost
