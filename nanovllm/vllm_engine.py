"""`LLM`'s engine: with the parts of vLLM's engine that clients reach through `LLM.llm_engine`."""

from collections.abc import Iterable
from types import SimpleNamespace

import torch

from nanovllm.engine.llm_engine import LLMEngine


class VllmEngine(LLMEngine):
    """An engine with vLLM's paths to `max_model_len` and to `load_weights` of its model.

    Attributes:
        finishes_update: whether `load_trainer_weights` started the open weight update. The next call that needs the
            engine then finishes it.
    """

    finishes_update = False

    @property
    def model_config(self) -> SimpleNamespace:
        """The part of vLLM's model config that clients read: `max_model_len`."""
        return SimpleNamespace(max_model_len=self.max_model_len)

    @property
    def model_executor(self) -> SimpleNamespace:
        """The path on which trainers reach `load_weights` of vLLM's model; see `load_trainer_weights`."""
        model = SimpleNamespace(load_weights=self.load_trainer_weights)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        worker.worker = worker  # the path of older versions
        return SimpleNamespace(driver_worker=worker)

    def load_trainer_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Overwrite some of the weights, for trainers that know `load_weights` of vLLM's model and nothing else.

        The first call starts a weight update. The next call that needs the weights, or `reset_prefix_cache`, finishes
        it.
        """
        with self._section():
            if not self.guard.update_open:
                self.start_weight_update()
                self.finishes_update = True
            return self.load_weights(weights)

    def start_weight_update(self) -> None:
        """Start to overwrite the weights in parts; see `LLM.start_weight_update`."""
        with self._section():
            super().start_weight_update()
            self.finishes_update = False

    def _before_use(self) -> None:
        """Finish the weight update that `load_trainer_weights` has started."""
        if self.guard.update_open and self.finishes_update:
            self.finish_weight_update()
