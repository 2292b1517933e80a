"""The base class of all layers."""

from typing import Any

from torch import nn


class Layer(nn.Module):
    """A module that costs little to call. Its own hooks run; torch's hooks for all modules do not.

    When a CPU decodes one token, torch's call and its search for submodules would take a tenth of the time.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_modules", ()):  # there are none before nn.Module's __init__
            self.__dict__[name] = value  # found before nn.Module looks for it
