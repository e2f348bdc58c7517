"""The one place where an implementation is chosen: compiled kernels on CUDA where they are right, PyTorch elsewhere.

flash-linear-attention serves half precision only: on float32 its products run as TF32, on float64 not at all, and its
recurrent kernel has no backward, so that one is for decoding. On Hopper most versions of Triton miscompile the backward
of its chunks. Its convolution is not used: the gradient is wrong for texts shorter than the kernel. causal-conv1d
serves the short convolution, ``triton_conv`` the dynamic one. A tensor on the CPU never reaches Triton, whatever is
installed. Every ``*_kernel`` function returns None where PyTorch is to be used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from sleepify.ops import chunking

Rule = Callable[..., tuple[Tensor, Tensor]]
Convolution = Callable[[Tensor, Tensor, "Tensor | None", "str | None"], Tensor]
DynamicConvolution = Callable[[Tensor, Tensor, "str | None"], Tensor]

_CHUNK_DELTA = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
_STEP_DELTA = ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
_CHUNK_HEBBIAN = ("fla.ops.simple_gla", "chunk_simple_gla")
_CONV = ("causal_conv1d", "causal_conv1d_fn")
_DYNAMIC_CONV = ("sleepify.ops.triton_conv", "convolve")
_FLA_MAX_KEY_DIM = 256
_HOPPER = 9  # compute capability
_HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def gated_delta_kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Rule | None:
    """The kernel for ``gated_delta_rule`` on these tensors."""
    if not _suits_fla(q, v):
        return None
    needs_grad = _needs_grad(q, k, v, g, beta, state)
    function, _ = _load(*(_STEP_DELTA if q.shape[1] == 1 and not needs_grad else _CHUNK_DELTA))
    if function is None or (needs_grad and _backward_fault()):
        return None
    return functools.partial(_run_fla_delta, function)


def gated_hebbian_kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Rule | None:
    """The kernel for ``gated_hebbian_rule`` on these tensors. A single token is cheaper in PyTorch than as a chunk."""
    if q.shape[1] == 1 or not _suits_fla(q, v):
        return None
    function, _ = _load(*_CHUNK_HEBBIAN)
    if function is None or (_needs_grad(q, k, v, g, beta, state) and _backward_fault()):
        return None
    return functools.partial(_run_fla_hebbian, function)


def short_conv_kernel(inputs: Tensor, weight: Tensor) -> Convolution | None:
    """The kernel for ``short_conv`` on inputs [B,W-1+T,C], the last W-1 inputs of the state in front, and [C,W]."""
    n_channels, width = weight.shape
    dtypes_fit = inputs.dtype in _HALF_OR_SINGLE and weight.dtype in _HALF_OR_SINGLE
    if not (_on_cuda(inputs) and dtypes_fit and n_channels % 8 == 0 and 2 <= width <= 4):
        return None
    function, _ = _load(*_CONV)
    return None if function is None else functools.partial(_run_causal_conv1d, function)


def dynamic_conv_kernel(inputs: Tensor, kernels: Tensor) -> DynamicConvolution | None:
    """The kernel for ``dynamic_conv`` on inputs [B,W-1+T,C], the last W-1 of the state in front, and [B,T,C,W]."""
    if not (_on_cuda(inputs) and inputs.dtype in _HALF_OR_SINGLE and kernels.dtype in _HALF_OR_SINGLE):
        return None
    function, _ = _load(*_DYNAMIC_CONV)
    return function


def describe() -> dict[str, str]:
    """Which implementation each operation uses on which device, and why."""
    torch_rule, torch_conv = "PyTorch, chunked matrix products", "PyTorch, one product per tap"
    fla = "flash-linear-attention for float16 and bfloat16; PyTorch for float32 and float64, where it is less exact"
    if _load(*_CHUNK_DELTA)[0] is not None and _backward_fault():
        fla = f"{fla}, and wherever gradients are taken: {_backward_fault()}"
    return {
        "gated_delta_rule on cpu": f"{torch_rule} (Triton kernels need a GPU)",
        "gated_delta_rule on cuda": _explain(_CHUNK_DELTA, fla, torch_rule),
        "gated_hebbian_rule on cpu": f"{torch_rule} (Triton kernels need a GPU)",
        "gated_hebbian_rule on cuda": _explain(_CHUNK_HEBBIAN, fla, torch_rule),
        "short_conv on cpu": f"{torch_conv} (causal-conv1d needs a GPU)",
        "short_conv on cuda": _explain(
            _CONV, "causal-conv1d for windows of 2 to 4 and channels divisible by 8; else PyTorch", torch_conv
        ),
        "dynamic_conv on cpu": f"{torch_conv} (Triton needs a GPU)",
        "dynamic_conv on cuda": _explain(_DYNAMIC_CONV, "Triton; PyTorch for float64", torch_conv),
    }


def _explain(kernel: tuple[str, str], with_kernel: str, without: str) -> str:
    function, problem = _load(*kernel)
    return with_kernel if function is not None else f"{without} ({problem})"


@functools.cache
def _load(module: str, name: str) -> tuple[Callable[..., Any] | None, str]:
    """The kernel, or None and the reason. Nothing is imported without a GPU: Triton fails there, at import or later."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        function = getattr(importlib.import_module(module), name)
        if (module, name) == _DYNAMIC_CONV:
            _try_out(function)
        return function, ""
    except ModuleNotFoundError as error:
        return None, f"{(error.name or module).partition('.')[0]} is not installed"
    # Built for another torch, too old, at odds with this transformers, without a C compiler: whatever it is, PyTorch
    # does the same.
    except Exception as error:
        return None, f"{module}.{name} does not load: {error}"


def _try_out(convolve: DynamicConvolution) -> None:
    """Compile and run the smallest case, or raise. Triton needs a C compiler, which many machines with a GPU lack."""
    one = torch.ones(1, 1, 1, device="cuda")
    convolve(one, one.unsqueeze(-1), None)


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
    return _on_cuda(v) and half and key_dim <= _FLA_MAX_KEY_DIM and key_dim % 2 == 0 and value_dim % 2 == 0


def _run_fla_delta(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    # The state is [B,H,K,V] by default there too; layers of theirs ask for [B,H,V,K].
    o, new_state = function(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=g.float(),
        beta=beta,
        scale=scale,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=qk_l2norm,
    )
    return o.to(v.dtype), new_state.float()


def _run_fla_hebbian(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    if qk_l2norm:
        q, k = chunking.l2norm(q.float()), chunking.l2norm(k.float())
    o, new_state = function(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=(v.float() * beta.float().unsqueeze(-1)).to(v.dtype),
        g=g.float(),
        scale=scale,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
    )
    return o.to(v.dtype), new_state.float()


def _run_causal_conv1d(
    function: Callable[..., Any], inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    # [B,C,T'] with the channels adjacent in memory, as the kernel wants them. The state goes in as ordinary inputs and
    # its outputs are dropped: that needs no layout of initial_states, and gradient reaches the state.
    # Never None: without a bias, the backward pass of version 1.5.0 fails.
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(weight.dtype)
    y = function(x=inputs.mT, weight=weight.contiguous(), bias=bias, activation=activation)
    return y.mT[:, weight.shape[1] - 1 :]
