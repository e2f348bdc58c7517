"""How far a layer's attention looks back, where that is said by a number and not by a mask."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# One thread at a time changes modules for the length of a call: what another one puts back would be gone before the
# first has used it, or what it found there would be put back for good.
ALONE = threading.RLock()


class Narrowing:
    """Lets the attention of one layer look back less far, for the length of a call.

    Flash attention is told by the keyword ``sliding_window``. Some layers of transformers hand keywords through to it;
    others name this one themselves, from an attribute of their own or from their configuration. Only these are changed,
    and they are again what they were when the call ends, however it ends.

    Args:
        layer: a decoder layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        # What is put back is what was there when nothing ran: another thread may be inside a call right now.
        self._kept: list[tuple[Any, str, Any]] = []
        for module in layer.modules():
            if "sliding_window" in vars(module):
                self._kept.append((module, "sliding_window", vars(module)["sliding_window"]))
            elif "config" in vars(module) and _names_the_keyword(module):
                self._kept.append((module, "config", vars(module)["config"]))

    @property
    def by_module(self) -> bool:
        """Whether the layer's modules decide; else the layer takes ``sliding_window`` as a keyword."""
        return bool(self._kept)

    @contextmanager
    def to(self, reach: int | None) -> Iterator[None]:
        """Within it, a token sees ``reach`` positions, itself included (None: all); other threads wait for its end."""
        with ALONE:
            try:
                for module, name, value in self._kept:
                    if name == "config":
                        value = copy.copy(value)
                        value.sliding_window = reach
                        module.config = value
                    else:
                        module.sliding_window = reach
                yield
            finally:
                for module, name, value in self._kept:
                    setattr(module, name, value)


def _names_the_keyword(module: nn.Module) -> bool:
    """Whether a module's forward passes on ``sliding_window=...``, so that handing it in would name it twice."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    constants = code.co_consts if code is not None else ()
    return any(isinstance(names, tuple) and "sliding_window" in names for names in constants)
