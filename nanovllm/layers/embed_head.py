"""The embedding and the LM head. Both are split over the vocabulary."""

from typing import Any

import torch
from torch import nn

from nanovllm.arithmetic import ceil_div
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.layer import Layer
from nanovllm.layers.linear import LinearLayer
from nanovllm.layers.residual import LazyNorm, Residual, as_lazy_norm
from nanovllm.weights.formats import Plain, Table
from nanovllm.weights.parameter import CheckpointTensor, check_dtype, check_shape, make_parameter


class VocabParallel(Layer):
    """A layer whose weight has a row for each token of the vocabulary. Each rank holds an equal shard of the rows.

    Args:
        num_embeddings: size of the vocabulary. The last shards are padded if the ranks do not divide it.
    """

    def __init__(self, num_embeddings: int, tp: TensorParallel | None):
        super().__init__()
        self.tp = tp or TensorParallel.default()
        self.num_embeddings = num_embeddings
        self.size = ceil_div(num_embeddings, self.tp.size)
        self.start = self.tp.rank * self.size

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: None = None) -> None:
        rows = self._shard(param, loaded)
        param[: len(rows)].copy_(rows)
        param[len(rows) :].zero_()

    def checkpoint_tensors(self, prefix: str) -> dict[str, CheckpointTensor]:
        params = self.named_parameters()
        return {f"{prefix}.{name}": CheckpointTensor(param, self._shape(param)) for name, param in params}

    def _shape(self, param: nn.Parameter) -> tuple[int, ...]:
        """Return the shape of the whole tensor that `param` loads."""
        return self.num_embeddings, *param.shape[1:]

    def _shard(self, param: nn.Parameter, loaded: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of the whole tensor that `param` loads. Raise ValueError if its shape is wrong."""
        check_shape(loaded, self._shape(param))
        return loaded[self.start : self.start + self.size]


class VocabParallelEmbedding(VocabParallel):
    """Token embedding: ids [T] -> [T, embedding_dim].

    Args:
        num_embeddings: size of the vocabulary, of which each rank holds a shard.
        embedding_dim: size of an embedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        super().__init__(num_embeddings, tp)
        self.weight = make_parameter(self.size, embedding_dim, dtype=dtype, weight_loader=self.weight_loader)
        self.format: Any = Table(self.weight)  # a WeightFormat that has `rows`, also after loading replaced it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x).complete()

    def residual(self, input_ids: torch.Tensor) -> Residual:
        """Start the residual stream with the embeddings. Its first norm all-reduces them."""
        return Residual.from_partial_sum(self.format.rows(input_ids, self.start), self.tp)

    def differs(self, loaded: torch.Tensor) -> torch.Tensor:
        """Return whether the weight has other values than `loaded`, as a bool on the weight's device."""
        check_dtype(loaded, self.weight.dtype)
        rows = self._shard(self.weight, loaded)
        # Compare in chunks: a GPU may lack memory for another copy of all rows.
        chunks = zip(self.weight[: len(rows)].split(4096), rows.split(4096), strict=True)
        return torch.stack([(current != new.to(current)).any() for current, new in chunks]).any()


class ParallelLMHead(VocabParallel, LinearLayer):
    """LM head: hidden states [L, embedding_dim], equal on all ranks -> logits [M, num_embeddings].

    They are those of the M = len(tp.rows(L)) tokens that this rank samples.

    Args:
        num_embeddings, embedding_dim: as in VocabParallelEmbedding.
        bias: must be False; it is here for code written for nano-vLLM.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        tp: TensorParallel | None = None,
    ):
        if bias:
            raise ValueError("bias=True is not supported: ParallelLMHead has no bias")
        super().__init__(num_embeddings, tp)
        self.set_format(Plain.allocate(self.size, embedding_dim, dtype=dtype, weight_loader=self.weight_loader))

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's parameter as the weight."""
        embedding.format = Table(embedding.weight, is_shared=True)
        for name in self.format.parameters:
            delattr(self, name)
        self.set_format(Plain(embedding.weight, is_shared=True))

    def forward(self, x: torch.Tensor | LazyNorm) -> torch.Tensor:
        x, norm = as_lazy_norm(x)
        shard = self.format.linear(x, norm=norm)  # [L, size]: all tokens, this rank's shard of the vocabulary
        logits = self.tp.all_to_all(shard)  # [M, size * ranks]: this rank's tokens, the whole vocabulary
        return logits[:, : self.num_embeddings]  # without the padding of the last shards
