"""The base class of all layers."""

from typing import Any

from torch import nn


class Layer(nn.Module):
    """A module without hooks, whose submodules are found as fast as any attribute.

    When a CPU decodes one token, torch's call and its search for submodules take a tenth of the time.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__call__ = cls.forward

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_modules", ()):  # there are none before nn.Module's __init__
            self.__dict__[name] = value
