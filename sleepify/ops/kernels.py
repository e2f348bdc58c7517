"""The one place where an implementation is chosen: compiled kernels on CUDA where they are right, PyTorch elsewhere.

flash-linear-attention serves half precision only: on float32 its products run as TF32, on float64 not at all, and its
recurrent kernel has no backward, so that one is for decoding. On Hopper most versions of Triton miscompile the backward
of its chunks. Its convolution is not used: the gradient is wrong for texts shorter than the kernel. Where it is absent
or not right, ``triton_rules`` serves both rules, also in float32. causal-conv1d serves the short convolution,
``triton_conv`` the dynamic one. A tensor on the CPU never reaches Triton, whatever is installed. Every ``*_kernel``
function returns None where PyTorch is to be used.

torch.compile does not see how it is chosen: what is installed and right is a constant of a graph, found out by Python
while the graph is made, and every kernel is one operation in it.
"""
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from sleepify.ops import foreign, trials

Rule = Callable[..., tuple[Tensor, Tensor]]
Convolution = Callable[[Tensor, Tensor, "Tensor | None", "str | None"], Tensor]
DynamicConvolution = Callable[[Tensor, Tensor, "str | None"], Tensor]

_CHUNK_DELTA = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
_STEP_DELTA = ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
_CHUNK_HEBBIAN = ("fla.ops.simple_gla", "chunk_simple_gla")
_RULES = ("sleepify.ops.triton_rules", "run_rule")
_CONV = ("causal_conv1d", "causal_conv1d_fn")
_DYNAMIC_CONV = ("sleepify.ops.triton_conv", "convolve")
_MAX_KEY_DIM = 256  # of flash-linear-attention's kernels, and of ours
_HOPPER = 9  # compute capability
_TORCH_RULE = "PyTorch, chunked matrix products"
_HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def gated_delta_kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Rule | None:
    """The kernel for ``gated_delta_rule`` on these tensors."""
    if not _on_cuda(v):
        return None
    needs_grad = _needs_grad(q, k, v, g, beta, state)
    kernel = _STEP_DELTA if q.shape[1] == 1 and not needs_grad else _CHUNK_DELTA
    if _suits_fla(q, v) and _is_ready(*kernel) and not (needs_grad and _backward_is_faulty()):
        return _foreign(kernel, foreign.run_fla_delta, foreign.traced_rule)
    return _our_rule(True, q, k, v, g, beta, state)


def gated_hebbian_kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Rule | None:
    """The kernel for ``gated_hebbian_rule`` on these tensors. A single token is cheaper in PyTorch than as a chunk."""
    if q.shape[1] == 1 or not _on_cuda(v):
        return None
    faulty = _needs_grad(q, k, v, g, beta, state) and _backward_is_faulty()
    if _suits_fla(q, v) and _is_ready(*_CHUNK_HEBBIAN) and not faulty:
        return _foreign(_CHUNK_HEBBIAN, foreign.run_fla_hebbian, foreign.traced_rule)
    return _our_rule(False, q, k, v, g, beta, state)


def short_conv_kernel(inputs: Tensor, weight: Tensor) -> Convolution | None:
    """The kernel for ``short_conv`` on inputs [B,W-1+T,C], the last W-1 inputs of the state in front, and [C,W]."""
    n_channels, width = weight.shape
    dtypes_fit = inputs.dtype in _HALF_OR_SINGLE and weight.dtype in _HALF_OR_SINGLE
    if not (_on_cuda(inputs) and dtypes_fit and n_channels % 8 == 0 and 2 <= width <= 4):
        return None
    return _foreign(_CONV, foreign.run_causal_conv1d, foreign.traced_conv) if _is_ready(*_CONV) else None


def dynamic_conv_kernel(inputs: Tensor, kernels: Tensor) -> DynamicConvolution | None:
    """The kernel for ``dynamic_conv`` on inputs [B,W-1+T,C], the last W-1 of the state in front, and [B,T,C,W]."""
    if not (_on_cuda(inputs) and inputs.dtype in _HALF_OR_SINGLE and kernels.dtype in _HALF_OR_SINGLE):
        return None
    return _ours(_DYNAMIC_CONV, _traced_dynamic_conv) if _is_ready(*_DYNAMIC_CONV) else None


def _our_rule(
    delta: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> Rule | None:
    """Our own kernels, for more than a token: for a single one they take as many launches."""
    tensors = (q, k, v, g, beta) if state is None else (q, k, v, g, beta, state)
    if q.shape[1] == 1 or q.shape[3] > _MAX_KEY_DIM or any(x.dtype not in _HALF_OR_SINGLE for x in tensors):
        return None
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if not _rule_is_right(delta, dtype, q.shape[3], v.shape[3], _needs_grad(*tensors)):
        return None
    return functools.partial(_ours(_RULES, _traced_rule), delta=delta)


def _foreign(kernel: tuple[str, str], run: Callable[..., Any], traced: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the function itself, or in a graph ``traced`` with its name: Dynamo would look into the function."""
    if torch.compiler.is_compiling():
        return functools.partial(traced, *kernel)
    return functools.partial(run, _load(*kernel)[0])


def _ours(kernel: tuple[str, str], traced: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, or in a graph its operation by name: Dynamo would look into how modules are imported."""
    return traced if torch.compiler.is_compiling() else cast("Callable[..., Any]", _load(*kernel)[0])


def _traced_rule(*tensors: Tensor | None, scale: float, qk_l2norm: bool, delta: bool) -> tuple[Tensor, Tensor]:
    o, last, _, _ = torch.ops.sleepify.chunked_rule(*tensors, scale, qk_l2norm, delta, None)
    return o, last


def _traced_dynamic_conv(inputs: Tensor, kernels: Tensor, activation: str | None) -> Tensor:
    return torch.ops.sleepify.dynamic_conv(inputs, kernels, activation)


def describe() -> dict[str, str]:
    """Which implementation each operation uses on which device, and why."""
    torch_conv = "PyTorch, one product per tap"
    return {
        "gated_delta_rule on cpu": f"{_TORCH_RULE} (Triton kernels need a GPU)",
        "gated_delta_rule on cuda": _explain_rule(True, _CHUNK_DELTA),
        "gated_hebbian_rule on cpu": f"{_TORCH_RULE} (Triton kernels need a GPU)",
        "gated_hebbian_rule on cuda": _explain_rule(False, _CHUNK_HEBBIAN),
        "short_conv on cpu": f"{torch_conv} (causal-conv1d needs a GPU)",
        "short_conv on cuda": _explain(
            _CONV, "causal-conv1d for windows of 2 to 4 and channels divisible by 8; else PyTorch", torch_conv
        ),
        "dynamic_conv on cpu": f"{torch_conv} (Triton needs a GPU)",
        "dynamic_conv on cuda": _explain(_DYNAMIC_CONV, "Triton; PyTorch for float64", torch_conv),
    }


def _explain_rule(delta: bool, kernel: tuple[str, str]) -> str:
    (function, problem), fault = _load(*kernel), _rule_fault(delta, torch.bfloat16, 64, 64, True)
    if function is None:
        return f"{_TORCH_RULE} ({problem}; {fault})" if fault else "sleepify's Triton kernels; PyTorch for float64"
    ours = f"PyTorch (sleepify's own kernels: {fault})" if fault else "sleepify's Triton kernels"
    explanation = f"flash-linear-attention for float16 and bfloat16; for float32, where it is less exact, {ours}"
    if _backward_fault():
        explanation += f", and wherever gradients are taken: {_backward_fault()}"
    return f"{explanation}; PyTorch for float64"


def _explain(kernel: tuple[str, str], with_kernel: str, without: str) -> str:
    function, problem = _load(*kernel)
    return with_kernel if function is not None else f"{without} ({problem})"


@torch.compiler.assume_constant_result
def _is_ready(module: str, name: str) -> bool:
    return _load(module, name)[0] is not None


@torch.compiler.assume_constant_result
def _backward_is_faulty() -> bool:
    return bool(_backward_fault())


@torch.compiler.assume_constant_result
def _rule_is_right(delta: bool, dtype: torch.dtype, key_dim: int, value_dim: int, with_grad: bool) -> bool:
    return not _rule_fault(delta, dtype, key_dim, value_dim, with_grad)


@functools.cache
def _load(module: str, name: str) -> tuple[Callable[..., Any] | None, str]:
    """The kernel, or None and the reason. Nothing is imported without a GPU: Triton fails there, at import or later."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        function = getattr(importlib.import_module(module), name)
        if (module, name) == _DYNAMIC_CONV:
            _apart(trials.try_convolution, function)
        return function, ""
    except ModuleNotFoundError as error:
        return None, f"{(error.name or module).partition('.')[0]} is not installed"
    # Built for another torch, too old, at odds with this transformers, without a C compiler: whatever it is, PyTorch
    # does the same.
    except Exception as error:
        return None, f"{module}.{name} does not load: {error}"


def _rule_fault(delta: bool, dtype: torch.dtype, key_dim: int, value_dim: int, with_grad: bool) -> str:
    """Why our kernels are not to be used for these sizes on this machine; empty where they may."""
    function, problem = _load(*_RULES)
    return problem if function is None else _trial(delta, dtype, key_dim, value_dim, with_grad)


@functools.cache
def _trial(delta: bool, dtype: torch.dtype, key_dim: int, value_dim: int, with_grad: bool) -> str:
    """What a small case of the same compiled kernels found; on Hopper, Triton miscompiles at some sizes only."""
    try:
        _apart(trials.try_rule, delta, dtype, key_dim, value_dim, with_grad)
    except Exception as error:
        name = "delta" if delta else "Hebbian"
        problem = f"the gated {name} rule fails its trial at {dtype}, K = {key_dim}, V = {value_dim}: {error}"
        warnings.warn(f"{problem}; PyTorch is used instead, which is slower", stacklevel=2)
        return problem
    return ""


def _apart(function: Callable[..., None], *arguments: Any) -> None:
    """Run in a thread: there no autocast, inference mode or fake tensors hold that may surround the first use.

    A thread begins on the first GPU. With a process per GPU every one of them would try there, and hold memory of it.
    """
    here = torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_initialized() else nullcontext()

    def run() -> None:
        with here:
            function(*arguments)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


@functools.cache
def _backward_fault() -> str:
    """Why flash-linear-attention is not to be differentiated on this machine; empty where it may.

    On Hopper, Triton 3.4 up to 3.7.0 miscompiles its chunk_bwd_dqkwg (its issue 640): versions before 0.5 return wrong
    gradients there, those since raise in the backward pass, and before 0.5.2 with a mended Triton too.
    """
    if all(torch.cuda.get_device_capability(i)[0] != _HOPPER for i in range(torch.cuda.device_count())):
        return ""
    triton, fla = (TorchVersion(importlib.import_module(name).__version__) for name in ("triton", "fla"))
    if triton < "3.4" or (triton >= "3.7.1" and fla >= "0.5.2"):
        return ""
    return f"on Hopper that takes Triton 3.7.1 and flash-linear-attention 0.5.2 or newer, here are {triton} and {fla}"


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _suits_fla(q: Tensor, v: Tensor) -> bool:
    half = v.dtype in (torch.float16, torch.bfloat16)
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    return _on_cuda(v) and half and key_dim <= _MAX_KEY_DIM and key_dim % 2 == 0 and value_dim % 2 == 0
