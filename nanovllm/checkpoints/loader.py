"""Copy the tensors of checkpoints into a decoder: strictly, one tensor at a time."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from nanovllm.checkpoints.given_weights import checked_weights
from nanovllm.checkpoints.weight_files import EMBEDDING, HEAD, TIED, full_name
from nanovllm.checks import shown
from nanovllm.distributed.parallel import TensorParallel
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import LinearLayer
from nanovllm.models.decoder import Decoder
from nanovllm.models.families import FAMILIES
from nanovllm.models.model_config import ModelConfig
from nanovllm.progress import ProgressBar
from nanovllm.weights.parameter import (
    BAD_SCALE,
    CheckpointTensor,
    MergedTensor,
    Storage,
    is_scale,
    is_valid,
    storage_of,
)
from nanovllm.weights.quantization import QuantizedLoading

_DIFFERENT_HEAD = (
    f"the tensor {HEAD} differs from the embedding, but the model was loaded with one parameter for both; "
    "make a new engine"
)


def _is_skipped(config: ModelConfig, name: str) -> bool:
    """Return whether checkpoints may have this tensor, but the model does not load it.

    Old checkpoints have tensors that the model computes.
    """
    return name.endswith("rotary_emb.inv_freq") or name.startswith(FAMILIES[config.model_type].unused_tensors)


def _meta_targets(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Return the tensors that a checkpoint of this model must have, by name. Allocate nothing."""
    with torch.device("meta"):
        return Decoder(config, tp=TensorParallel()).checkpoint_tensors()


def _is_quantized(target: CheckpointTensor) -> bool:
    """Return whether the checkpoint has one of `_meta_targets` quantized."""
    return storage_of(target.param) is not Storage.PLAIN


def _merged_tensors(targets: Mapping[str, CheckpointTensor]) -> dict[str, dict[str, MergedTensor]]:
    """Return the merged tensors that a checkpoint may have in place of some targets: by name, and then by target."""
    merged: dict[str, dict[str, MergedTensor]] = {}
    for name, target in targets.items():
        if target.merged is not None:
            merged.setdefault(target.merged.name, {})[name] = target.merged
    return merged


def _shapes(
    targets: Mapping[str, CheckpointTensor], merged: Mapping[str, Mapping[str, MergedTensor]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of separate and merged tensors, by name."""
    shapes = {name: target.shape for name, target in targets.items()}
    return shapes | {part.name: part.shape for parts in merged.values() for part in parts.values()}


def _unknown_tensor(name: str) -> ValueError:
    return ValueError(f"the checkpoint has the tensor {name:.200}, which the model does not have")


def _check_complete(config: ModelConfig, needed: Iterable[str], found: Iterable[str]) -> None:
    """Raise ValueError with the names of tensors of `needed` that are not in `found`."""
    found = set(found)
    if config.tie_word_embeddings:
        # One of the two tied tensors is enough. If both are missing, the message names the embedding.
        if HEAD in found:
            found.add(EMBEDDING)
        found.add(HEAD)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")


class _ExpectedTensors(NamedTuple):
    """The tensors of a model's checkpoints.

    Attributes:
        shapes: the shape of each tensor that a checkpoint may have, by its name.
        needed: the names of the tensors that a checkpoint must have, if it merges none.
        parts_of: the names of the separate tensors that a merged tensor stands for, by its name.
    """

    shapes: dict[str, tuple[int, ...]]
    needed: list[str]
    parts_of: dict[str, list[str]]


def _expected_tensors(config: ModelConfig) -> _ExpectedTensors:
    targets = _meta_targets(config)
    merged = _merged_tensors(targets)
    shapes = _shapes(targets, merged)
    parts_of = {name: list(parts) for name, parts in merged.items()}
    scheme = config.quantization
    if scheme is None:
        return _ExpectedTensors(shapes, list(targets), parts_of)
    # Any matrix may be quantized in the checkpoint, also one that is merged with others that are not.
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    stored = {name: scheme.stored(name, shape) for name, shape in matrices.items()}
    for weight, shape in matrices.items():
        shapes |= {name: tensor.shape for name, tensor in stored[weight].items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in scheme.constants(weight, shape).items()}
    needed = []
    for name, target in targets.items():
        needed += stored[name] if _is_quantized(target) else [name]
    for name, parts in merged.items():
        if name in stored:
            # A scheme stores the same kinds of tensors, in the same order, for the merged weight and for each part.
            for merged_name, *part_names in zip(stored[name], *(stored[part] for part in parts), strict=True):
                parts_of[merged_name] = part_names
    return _ExpectedTensors(shapes, needed, parts_of)


def _check_numbers(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if a checkpoint has fewer layers or experts than the config says."""
    layers: set[str] = set()
    experts: set[str] = set()
    num_merged = 0  # experts in a tensor of all experts
    for name, shape in shapes.items():
        if match := re.match(r"model\.layers\.(\d+)\.", full_name(name)):
            layers.add(match[1])
        if match := re.search(r"\.experts\.(\d+)\.", name):
            experts.add(match[1])
        elif ".experts." in name and shape:
            num_merged = max(num_merged, shape[0])
    if config.num_layers > len(layers):
        raise ValueError(f"the model's num_layers is {config.num_layers}, but the checkpoint has {len(layers)} layers")
    num_found = max(len(experts), num_merged)
    if config.moe is not None and config.moe.num_experts > num_found:
        num_experts = config.moe.num_experts
        raise ValueError(f"the model's num_experts is {num_experts}, but the checkpoint has {num_found} experts")


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a config's sizes with a checkpoint's tensors, before memory of these sizes is allocated.

    Args:
        shapes: the shape of each tensor of the checkpoint, by its name there.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape than the config's sizes imply.
    """
    _check_numbers(config, shapes)
    expected = _expected_tensors(config)
    found: set[str] = set()
    for given, shape in shapes.items():
        name = full_name(given)
        if _is_skipped(config, given):
            continue
        if name not in expected.shapes:
            raise _unknown_tensor(given)
        needed_shape = expected.shapes[name]
        if tuple(shape) != needed_shape:
            has = shown(list(shape))
            raise ValueError(f"the tensor {given:.200} has shape {has}, but the model needs {list(needed_shape)}")
        found.update(expected.parts_of.get(name, (name,)))
    _check_complete(config, expected.needed, found)


class _UnfinishedWeight(NamedTuple):
    """A layer's weight while it is loaded.

    Attributes:
        targets: all tensors of the weight, by name.
        missing: the names of those that were not loaded yet.
    """

    layer: LinearLayer
    targets: dict[str, CheckpointTensor]
    missing: set[str]


class WeightUpdate:
    """Copy a whole checkpoint into a decoder's parameters: in place, and in any number of parts.

    All ranks of a group must make the same calls: at the end they agree on whether the weights are valid. Until
    `finish` returns the parameters may be partly overwritten. After an error only a new update can complete them.

    Args:
        model: the decoder. Its weights become writable.
    """

    def __init__(self, model: Decoder):
        self.model = model
        self.seen: set[str] = set()
        # Whether the checkpoint's head differs from its embedding: a bool on the device, if one parameter is both.
        self.head_differs: torch.Tensor | None = None
        self.layers = [
            module for module in model.modules() if isinstance(module, (LinearLayer, VocabParallelEmbedding))
        ]
        # Whether the tensors of finished layers are valid: bools on the device, by name.
        self.valid: dict[str, torch.Tensor] = {}
        # Parameters made in inference mode can only be written in it.
        with torch.inference_mode():
            for layer in self.layers:
                layer.format = layer.format.start_loading()
        self.targets = model.checkpoint_tensors()
        self.merged = _merged_tensors(self.targets)
        scheme = model.config.quantization
        self.quantized = None
        if scheme is not None:
            self.quantized = QuantizedLoading(scheme, self.targets, self.merged, self._plain_shapes)
        # The weights that can be finished before all are loaded, by the names of their tensors.
        self.unfinished: dict[str, _UnfinishedWeight] = {}
        # On a GPU, finishing a weight early would save no memory.
        if model.embed_tokens.weight.device.type == "cpu":
            self._track_unfinished()

    def _track_unfinished(self) -> None:
        by_param = _by_param(self.targets)
        for layer in self.layers:
            # `_copy` may still compare the head with the embedding, so it must stay as it was loaded.
            if not isinstance(layer, LinearLayer) or layer is self.model.lm_head:
                continue
            targets: dict[str, CheckpointTensor] = {}
            for param in layer.format.parameters.values():
                targets |= by_param.get(param, {})
            weight = _UnfinishedWeight(layer, targets, missing=set(targets))
            self.unfinished |= dict.fromkeys(targets, weight)

    def _plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the checkpoint's tensors would have if none was quantized."""
        targets = _meta_targets(self.model.config)
        return _shapes(targets, _merged_tensors(targets))

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy some tensors. Each rank takes its shards. Return their names.

        Args:
            weights: the checkpoint's transformers names and whole tensors, each once in all calls and in any order.
                This method holds one of them at a time.

        Raises:
            ValueError: a tensor is unknown, given twice, or of the wrong dtype or shape.
        """
        names: set[str] = set()
        bar = ProgressBar(
            self._separate(weights, names),
            desc="Loading weights",
            total=len(self.targets) - len(self.seen),
            enabled=False if self.model.tp.rank else None,  # None: only on a terminal
            delay=2,
            leave=False,
        )
        with torch.inference_mode():
            for given, name, merged, loaded in bar:
                if name in self.seen:
                    raise ValueError(f"the checkpoint has the tensor {given:.200} twice")
                if name not in self.targets:
                    raise _unknown_tensor(given)
                try:
                    tensors = {name: loaded if merged is None else merged.part(loaded)}
                    stored_name = name if merged is None else merged.name
                    if self.quantized is not None and stored_name not in self.quantized.dequantized:
                        tensors = self.quantized.quantize_if_needed(name, tensors[name])
                    for target, tensor in tensors.items():
                        self._copy(target, tensor)
                        self.seen.add(target)
                        self._finish_layer(target)
                except ValueError as error:
                    raise ValueError(f"the tensor {given:.200} {error}") from None
        return names

    def _separate(
        self, weights: Iterable[tuple[str, torch.Tensor]], names: set[str]
    ) -> Iterator[tuple[str, str, MergedTensor | None, torch.Tensor]]:
        """Iterate over what to load: the given name, the target's name, and the tensor.

        A merged tensor comes once for each of its parts, whole, together with the `MergedTensor` that finds the part.

        Args:
            names: receives the given names.
        """
        for given, loaded in checked_weights(weights):
            names.add(given)
            name = full_name(given)
            if _is_skipped(self.model.config, given):
                continue
            ready = {name: loaded} if self.quantized is None else self.quantized.receive(name, loaded)
            for ready_name, tensor in ready.items():
                for target, merged in self.merged.get(ready_name, {ready_name: None}).items():
                    yield given, target, merged, tensor

    def _finish_layer(self, name: str) -> None:
        """Convert a weight once its last tensor is loaded, so that few weights are held as they were loaded."""
        weight = self.unfinished.get(name)
        if weight is None:
            return
        weight.missing.discard(name)
        if not weight.missing:
            self.valid |= {target_name: _is_valid(target) for target_name, target in weight.targets.items()}
            weight.layer.format = weight.layer.format.finish_loading()
            self.layers.remove(weight.layer)

    def _copy(self, name: str, loaded: torch.Tensor) -> None:
        """Copy a tensor to its target. A second tied tensor is only compared if one parameter holds both."""
        other = TIED.get(name) if self.model.config.tie_word_embeddings else None
        is_shared = self.model.lm_head.weight is self.model.embed_tokens.weight
        if is_shared and other in self.seen:
            self.head_differs = self.model.embed_tokens.differs(loaded)
            return
        self.targets[name].load(loaded)
        # The first of two tied tensors fills both parameters.
        if other is not None and other not in self.seen and not is_shared:
            self.targets[other].load(loaded)

    def finish(self) -> None:
        """Check that the weights are whole and finite, and convert them to their fastest formats.

        Raises:
            ValueError: a tensor is missing or not finite, or the head differs from the embedding where both are one
                parameter.
        """
        # A quantized weight that waits for some of its tensors lacks these, not the weight itself.
        waiting = {} if self.quantized is None else self.quantized.missing()
        missing_tensors = set().union(*waiting.values())
        waiting_targets = {target for weight in waiting for target in self.merged.get(weight, (weight,))}
        needed = dict.fromkeys([*sorted(missing_tensors), *self.targets])
        _check_complete(self.model.config, needed, self.seen | (waiting_targets - missing_tensors))
        with torch.inference_mode():
            _check_finite(self.targets, self.valid, self.model.tp)
            if self.head_differs is not None and _first_true([self.head_differs], self.model.tp) is not None:
                raise ValueError(_DIFFERENT_HEAD)
            for layer in self.layers:
                layer.format = layer.format.finish_loading()


def load_weights(model: Decoder, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a whole checkpoint into the parameters; see `WeightUpdate`."""
    update = WeightUpdate(model)
    update.load(weights)
    update.finish()


def _check_finite(targets: Mapping[str, CheckpointTensor], valid: dict[str, torch.Tensor], tp: TensorParallel) -> None:
    """Raise ValueError with the name of a tensor that has NaN or infinity, or a negative scale: the same on all ranks.

    Whole parameters are checked first, because thousands of experts' tensors would take thousands of small kernels.

    Args:
        valid: whether a tensor is valid, for those that were checked before.
    """
    name = _first_invalid(targets, valid, tp)
    if name is not None:
        param = targets[name].param
        wrong = BAD_SCALE if is_scale(param) else f"has values that are NaN or infinite in {param.dtype}"
        raise ValueError(f"the tensor {name} {wrong}")


def _first_invalid(
    targets: Mapping[str, CheckpointTensor], valid: dict[str, torch.Tensor], tp: TensorParallel
) -> str | None:
    """Return the name of a tensor that is not valid, the same on all ranks; None if all are valid."""
    index = _first_true([~flag for flag in valid.values()], tp)
    if index is not None:
        return list(valid)[index]
    by_param = _by_param({name: target for name, target in targets.items() if name not in valid})
    param_index = _first_true([~is_valid(param, is_scale(param)) for param in by_param], tp)
    if param_index is None:
        return None
    suspects = list(by_param.values())[param_index]
    index = _first_true([~_is_valid(target) for target in suspects.values()], tp)
    return list(suspects)[index or 0]


def _is_valid(target: CheckpointTensor) -> torch.Tensor:
    return is_valid(target.destination, is_scale(target.param))


def _by_param(targets: Mapping[str, CheckpointTensor]) -> dict[torch.nn.Parameter, dict[str, CheckpointTensor]]:
    """Return the targets of each parameter, by name."""
    by_param: dict[torch.nn.Parameter, dict[str, CheckpointTensor]] = {}
    for name, target in targets.items():
        by_param.setdefault(target.param, {})[name] = target
    return by_param


def _first_true(flags: list[torch.Tensor], tp: TensorParallel) -> int | None:
    """Return the index of the first flag that is true on any rank, the same on all ranks; None if all are false.

    Args:
        flags: bools on the device. The host reads all of them at once.
    """
    if not flags:
        return None
    stacked = torch.stack(flags)
    values = stacked.tolist()
    index = values.index(True) if True in values else len(flags)
    if tp.group is not None:
        index = tp.all_reduce_min(index, stacked.device)
    return index if index < len(flags) else None


def dummy_weights(model: Decoder, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over a checkpoint of small random numbers, and of constants where layers declare them.

    It is the same for any number of ranks.
    """
    param = next(model.parameters())
    scheme = model.config.quantization
    generator = torch.Generator(param.device).manual_seed(seed)
    targets = model.checkpoint_tensors()
    for name, target in _meta_targets(model.config).items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue
        tensor = torch.empty(target.shape, dtype=param.dtype, device=param.device)
        if target.dummy is None:
            tensor.normal_(std=0.02, generator=generator)
        else:
            tensor.fill_(target.dummy)
        if scheme is not None and _is_quantized(target):
            yield from scheme.quantize(name, tensor).items()
        else:
            yield name, tensor.to(targets[name].param.dtype)
