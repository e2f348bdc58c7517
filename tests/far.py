"""A device that is not there: tensors say that they are on a GPU, their values lie on the CPU, and waits are counted.

A GPU computes behind the host's back until the host wants a value of it: then it waits. What makes it wait are copies
to the CPU and whatever takes a shape or a branch from values. Here every such operation is written down with the line
of code that asked for it, on any machine, with the values that a CPU gives.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

# Neither the processor nor a device that wants a driver.
FAR = torch.device("meta")
_ATEN = torch.ops.aten
# Operations whose result is a value on the host, or has a shape that depends on values.
_READS = {
    *(_ATEN._local_scalar_dense.default, _ATEN.item.default, _ATEN.equal.default, _ATEN.is_nonzero.default),
    *(_ATEN.nonzero.default, _ATEN.masked_select.default, _ATEN.unique_consecutive.default),
    *(_ATEN._unique2.default, _ATEN.unique_dim.default, _ATEN.bincount.default),
    *(_ATEN.repeat_interleave.Tensor, _ATEN.allclose.default),
}
_CROSSING = {_ATEN.copy_.default, _ATEN._to_copy.default}
_BY_INDEX = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


def _leaves(value: Any) -> Iterator[Any]:
    """What an operation is given or gives: plain containers, which torch's own walkers take ten times as long for."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _changed(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_changed(change, each) for each in value])
    if isinstance(value, dict):
        return {name: _changed(change, each) for name, each in value.items()}
    return change(value)


class FarTensor(Tensor):
    """A tensor of the far device; its values are in ``near``."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor, requires_grad: bool = False) -> FarTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
            requires_grad=requires_grad,
        )
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FarTensor({self.near!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the far device outside of `far_away`")


class Waits(TorchDispatchMode):
    """Carries out on the CPU what is asked of the far device, and writes down what waits for it.

    Attributes:
        seen: (operation, "file:line function" of sleepify or transformers that asked for it) of each.
        coming: copies on their way to the host; whoever looks at one before an `Event` says that it is there, waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.coming: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = list(_leaves((args, kwargs)))
        assert not any(isinstance(leaf, Tensor) and leaf.is_meta and not isinstance(leaf, FarTensor) for leaf in leaves)
        far = [leaf for leaf in leaves if isinstance(leaf, FarTensor)]
        near = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, FarTensor)]
        if far and any(leaf.dim() for leaf in near) and func not in _CROSSING:
            raise RuntimeError(f"expected all tensors of {func} on one device, found some on {FAR} and some on the CPU")
        home = kwargs.get("device")
        to = None if home is None else torch.device(home)
        if to == FAR:
            kwargs["device"] = torch.device("cpu")
        # Back to the device a copy goes behind its own coming, unseen by the host.
        looks = to != FAR and any(leaf is copy for leaf in near for copy in self.coming)
        if looks or _waits(func, args, kwargs, bool(far), to):
            self.note(str(func))
        near_args, near_kwargs = _changed(_near, (args, kwargs)) if far else (args, kwargs)
        with no_dispatch():
            output = func(*near_args, **near_kwargs)
        if to == torch.device("cpu") or not (far or to == FAR):
            if far and func is _ATEN._to_copy.default and kwargs.get("non_blocking"):
                self.coming.append(output)
            return output
        given = {id(leaf.near): leaf for leaf in far}

        def sent(leaf: Any) -> Any:
            # What an operation in place gives back is what it was given.
            return given.get(id(leaf), FarTensor(leaf)) if isinstance(leaf, Tensor) else leaf

        return _changed(sent, output)

    def note(self, what: str) -> None:
        """Write down that the host waits, and who made it."""
        places = [
            f"{frame.filename}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if "/sleepify/" in frame.filename or "/transformers/" in frame.filename
        ]
        self.seen.append((what, places[-1] if places else "the test itself"))


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, FarTensor) else leaf


def _waits(func: Any, args: Any, kwargs: dict[str, Any], any_far: bool, to: torch.device | None) -> bool:
    if func in _READS or (func in _BY_INDEX and any(x is not None and x.dtype == torch.bool for x in args[1])):
        return any_far
    if func is _ATEN.copy_.default and isinstance(args[1], Tensor):
        crosses = isinstance(args[0], FarTensor) != isinstance(args[1], FarTensor)
        return crosses and (isinstance(args[1], FarTensor) or not (len(args) > 2 and args[2]))
    if func is _ATEN._to_copy.default and to is not None and any_far != (to == FAR):
        return not kwargs.get("non_blocking")
    return False


class Stream:
    """The far device's only stream, and what ``torch.get_device_module`` gives for it."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def current_stream(self, device: torch.device) -> Stream:
        assert device == FAR
        return self

    def record_event(self) -> Event:
        return Event(self.waits)


class Event:
    """What was asked for before it is there when the host has waited for it.

    That is no wait for the device, which goes on with what it was asked since.
    """

    def __init__(self, waits: Waits) -> None:
        self.waits, self.before = waits, list(waits.coming)

    def synchronize(self) -> None:
        self.waits.coming = [copy for copy in self.waits.coming if not any(copy is each for each in self.before)]


class _Made(TorchFunctionMode):
    """Tensors made of Python's numbers on the far device, made by torch without asking anybody: a copy that waits."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]) == FAR and not isinstance(args[0], FarTensor):
                self.waits.note(func.__name__)
                return FarTensor(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def far_away() -> Iterator[Waits]:
    """Within it the far device is there."""
    near = torch.get_device_module
    with Waits() as waits, _Made(waits):

        def module_of(device: torch.device | str | None = None) -> Any:
            return Stream(waits) if device == FAR else near(device)

        with patch.object(torch, "get_device_module", module_of):
            yield waits


def send(module: nn.Module) -> nn.Module:
    """A module with its parameters and buffers on the far device."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(FarTensor(parameter.data), requires_grad=parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = FarTensor(buffer)
    return module
