"""A GPU on paper: fake CUDA tensors of any size, on any machine, with every operation and every host sync counted.

Tensors on "cuda" are PyTorch's fake tensors: shape, dtype and device, no memory behind them. Tensors on the CPU are
real, and so are the *values of whole numbers* on the card (ids, masks, indices), which are worked out beside. What
depends on any other value cannot be answered and raises, as does an operation whose result has a size that depends on
values. A copy to the host that waits is a sync, counted with the line that asked for it.

A build of PyTorch with CUDA needs nothing more, with or without a card. One without CUDA lacks the device's guard,
without which autograd cannot run; `fake_cuda.cpp` gives it one, compiled in seconds and loaded before PyTorch is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from sleepify.ops import kernels

ROOT = Path(__file__).resolve().parent.parent
# Kernels that one call of ours launches (triton_chunks, triton_chunks_backward, triton_conv).
LAUNCHES = {
    "sleepify::chunked_rule": 4,
    "sleepify::chunked_rule_backward": 7,
    "sleepify::dynamic_conv": 1,
    "sleepify::dynamic_conv_backward": 2,
}
_SMALL = 1 << 22  # elements of which values are kept
_MEMORYLESS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_MEMORYLESS |= {"aten::_unsafe_view"}
# One kernel on a card, but several operations where PyTorch was built without CUDA and has only the composite form.
_FUSED = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
# Reads only as many rows of its first argument as it writes.
_LOOKUPS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index"}


class HostSyncError(RuntimeError):
    """The host asked for a value that only the card has."""


@dataclass
class Count:
    """What was done on the card.

    Attributes:
        operations: calls of ATen and of our own operations, views included.
        launches: kernels by estimate: one per operation that writes, views none, ours as many as they launch.
        moved: bytes read and written by these kernels, each tensor once per kernel.
        flops: of matrix products and attention; those inside our own kernels are not counted.
        syncs: places at which the host waited, and how often.
        copies: places from which something was copied to the card without waiting.
        peak: most bytes alive at a time, beyond those that were there before.
    """

    operations: int = 0
    launches: int = 0
    moved: int = 0
    flops: int = 0
    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    live: int = 0
    peak: int = 0

    def __sub__(self, other: Count) -> Count:
        """What this has beyond another; peaks are not compared."""
        numbers = {name: getattr(self, name) - getattr(other, name) for name in ("operations", "launches", "moved")}
        places = {name: getattr(self, name) - getattr(other, name) for name in ("syncs", "copies", "kinds")}
        return Count(**numbers, flops=self.flops - other.flops, **places)

    def over(self, n: int) -> Count:
        """The share of one of ``n``."""
        numbers = {name: round(getattr(self, name) / n) for name in ("operations", "launches", "moved", "flops")}
        places = {name: Counter({k: v / n for k, v in getattr(self, name).items()}) for name in ("syncs", "copies")}
        return Count(**numbers, **places)

    @property
    def n_syncs(self) -> float:
        return sum(self.syncs.values())


class Paper(TorchDispatchMode):
    """Counts into ``count``, which may be changed for another at any time."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.count = Count()
        self.values = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [leaf for leaf in given if isinstance(leaf, FakeTensor)]
        target = kwargs.get("device")
        to_card = target is not None and torch.device(target).type == "cuda"
        if not fakes and not to_card:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name
        leaves_card = target is not None and torch.device(target).type == "cpu" and name == "aten::_to_copy"
        if leaves_card and fakes[0].device.type == "cuda" and not kwargs.get("non_blocking"):
            return self._ask(func, args, kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            self._note_copy(name, args, kwargs)
        before = {leaf.untyped_storage()._cdata for leaf in fakes}
        try:
            with self.fake:
                result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            answer = self._ask(func, args, kwargs)
            return tree_map(lambda leaf: self.give(leaf) if isinstance(leaf, Tensor) else leaf, answer)
        self._tally(func, name, args, kwargs, given, result, before)
        self._work_out(func, args, kwargs, given, result)
        return result

    def _note_copy(self, name: str, args: Any, kwargs: Any) -> None:
        """Count a copy from the host; one that the host waits for is a sync."""
        source = args[0] if name == "aten::_to_copy" else args[1]
        target = args[0].device if name == "aten::copy_" else kwargs.get("device") or source.device
        if name == "aten::copy_" and target.type == "cpu":
            raise HostSyncError(f"a copy into host memory, {_place()}")
        if source.device.type == "cpu" and target.type == "cuda":
            waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            (self.count.syncs if waits else self.count.copies)[_place()] += 1

    # --- values ----------------------------------------------------------------------------------------------------

    def _known(self, leaf: Any) -> Any:
        return self.values.get(leaf) if isinstance(leaf, FakeTensor) else leaf

    def _ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the host waits for: an operation on values of the card."""
        place = _place()
        if any(isinstance(leaf, Tensor) and self._known(leaf) is None for leaf in tree_leaves((args, kwargs))):
            raise HostSyncError(f"a value that only the card has: {func} for {place}")
        self.count.syncs[place] += 1
        with unset_fake_temporarily():
            return func(*tree_map(self._known, args), **tree_map(self._known, kwargs))

    def give(self, tensor: Tensor) -> Tensor:
        """A real tensor on the card, its values known; not counted."""
        with self.fake:
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        self.values[there] = tensor
        return there

    def _work_out(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        """The same on whole numbers whose values are known."""
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        whole = all(not leaf.is_floating_point() and leaf.numel() <= _SMALL for leaf in outputs)
        if not outputs or not whole or any(self._known(leaf) is None for leaf in given):
            for leaf in outputs:
                self.values.pop(leaf, None)
            return
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("cpu")}
        with unset_fake_temporarily():
            known = func(*tree_map(self._known, args), **tree_map(self._known, kwargs))
        for leaf, value in zip(tree_leaves(result), tree_leaves(known), strict=True):
            if isinstance(leaf, FakeTensor):
                self.values[leaf] = value

    # --- counting --------------------------------------------------------------------------------------------------

    def _tally(
        self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], result: Any, before: set[int]
    ) -> None:
        count = self.count
        count.operations += 1
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        for leaf in outputs:
            storage = leaf.untyped_storage()
            if leaf.device.type == "cuda" and storage._cdata not in before:
                before.add(storage._cdata)
                self._hold(storage)
        is_view = all(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if (is_view and func._schema.returns) or name in _MEMORYLESS or not outputs:
            return
        count.kinds[name] += 1
        count.launches += LAUNCHES.get(name, 1)
        read = given[1:] if name in _LOOKUPS else given
        count.moved += sum(_bytes(leaf) for leaf in {id(leaf): leaf for leaf in [*read, *outputs]}.values())
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            count.flops += formula(*args, **kwargs, out_val=result)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        count, n_bytes = self.count, storage.nbytes()
        count.live += n_bytes
        count.peak = max(count.peak, count.live)
        weakref.finalize(storage, _release, count, n_bytes)


def _release(count: Count, n_bytes: int) -> None:
    count.live -= n_bytes


def _bytes(tensor: Tensor) -> int:
    """What a kernel moves of it: an expanded tensor has less behind it than it shows."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _place() -> str:
    """Who asked: the innermost line of sleepify, else of another package, by file and function."""
    frames = traceback.extract_stack()
    ours = [frame for frame in frames if f"{os.sep}sleepify{os.sep}" in frame.filename]
    others = [frame for frame in frames if f"{os.sep}site-packages{os.sep}transformers{os.sep}" in frame.filename]
    if not ours and not others:
        return f"{Path(frames[-3].filename).name}: {frames[-3].name}"
    innermost = max(ours[-1:] + others[-1:], key=frames.index)
    path = Path(innermost.filename)
    package = "transformers" if innermost in others else "sleepify"
    return f"{package}/{'/'.join(path.parts[path.parts.index(package) + 1 :])}: {innermost.name}"


# --- the card ---------------------------------------------------------------------------------------------------------


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What PyTorch chooses on a card: flash attention without a mask, the memory-efficient kernel with one."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
    attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


@contextmanager
def card() -> Iterator[Paper]:
    """A GPU with PyTorch's attention and our own Triton kernels, on paper."""
    kept = {name: getattr(kernels, name) for name in ("_is_ready", "_rule_is_right", "_ours")}
    attention = torch.nn.functional.scaled_dot_product_attention
    for module in ("triton_rules", "triton_conv"):
        importlib.import_module(f"sleepify.ops.{module}")  # which registers their operations
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    library = torch.library.Library("aten", "IMPL")
    try:
        if torch.version.cuda is None:
            for name in _FUSED:
                library.impl(name, _never, "CUDA")
        kernels._is_ready = lambda module, name: module.startswith("sleepify.")
        kernels._rule_is_right = lambda *sizes: True
        kernels._ours = lambda kernel, traced: traced
        torch.nn.functional.scaled_dot_product_attention = _attention
        with fake, Paper(fake) as paper:
            yield paper
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
        for name, value in kept.items():
            setattr(kernels, name, value)
        library._destroy()


def _never(*_: Any) -> Any:
    raise AssertionError("a fake tensor never reaches a kernel")


def environment(directory: Path) -> dict[str, str]:
    """Variables of a process that can make fake CUDA tensors; what that needs is compiled into ``directory``."""
    if shutil.which("g++") is None:
        raise RuntimeError(
            "expected g++, found none; or use a build of PyTorch with CUDA, which needs no card for this"
        )
    variables = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    library, home = directory / "fake_cuda.so", Path(torch.__file__).parent
    command = ["g++", "-O0", "-fPIC", "-shared", "-std=c++20", f"-I{home}/include", f"-Wl,-rpath,{home}/lib"]
    source = Path(__file__).with_name("fake_cuda.cpp")
    subprocess.run([*command, str(source), "-o", str(library), f"-L{home}/lib", "-ltorch_cpu", "-lc10"], check=True)
    return variables | {"LD_PRELOAD": str(library)}


def in_process(module: str, argv: list[str], main: Callable[[list[str]], int]) -> int:
    """Run ``main`` where fake CUDA tensors can be made: here, or in a process of its own in which ``module`` does."""
    if torch.version.cuda is not None or "fake_cuda" in os.environ.get("LD_PRELOAD", ""):
        return main(argv)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", module, *argv]
        return subprocess.run(command, env=environment(Path(directory))).returncode
