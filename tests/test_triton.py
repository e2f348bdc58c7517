"""The Triton kernels of the dynamic convolution against its token-by-token form.

On a machine without a GPU these tests run in Triton's interpreter, in a process of their own: Triton looks for
TRITON_INTERPRET once, when it is imported. With ``-m gpu`` the same tests run compiled, on the GPU. All that they need
is `pip install triton`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from tolerances import FLOAT32, ONE_ROUNDING, Tolerance, assert_close
from torch import Tensor

from sleepify.ops import dynamic_conv, dynamic_conv_reference, kernels

triton = pytest.importorskip("triton", reason="pip install triton (Linux, 200 MB): it needs no GPU for these tests")
from sleepify.ops import triton_conv  # noqa: E402

DEVICE = pytest.param("cpu") if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)
on_device = pytest.mark.parametrize("device", [DEVICE])
NAMES = ("y", "x", "kernels", "state")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """These and the rules', in one process: it takes long to start."""
    pass_in_the_interpreter(__file__, __file__.replace(".py", "_rules.py"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("width, silu, tokens", [(4, True, 16), (3, False, 1)])
def test_the_kernels_compile_for_a_gpu(dtype: str, width: int, silu: bool, tokens: int) -> None:
    # Needs no GPU, and finds what the interpreter lets pass: it takes any Python.
    tensor, gradient = f"*{dtype}", "*fp32" if silu else f"*{dtype}"
    types = dict.fromkeys(("inputs", "kernels", "y", "dy", "dkernels", "dinputs"), tensor) | {"dz": gradient}
    types |= {"row_stride": "i64", "n_tokens": "i32", "n_channels": "i32"}
    values = {"SILU": silu, "WIDTH": width, "BLOCK_T": tokens, "BLOCK_C": 128}
    for kernel in (triton_conv._forward, triton_conv._backward_kernels, triton_conv._backward_inputs):
        names = kernel.arg_names
        source = triton.compiler.ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            {(i,): values[name] for i, name in enumerate(names) if name in values},
        )
        compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


def make_inputs(
    n_tokens: int, n_channels: int, width: int, device: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, kernels, state of 2 rows, and the gradient of y."""
    generator = torch.Generator().manual_seed(n_tokens * width)
    shapes = (2, n_tokens, n_channels), (2, n_tokens, n_channels, width), (2, n_channels, width)
    tensors = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in (*shapes, shapes[0])]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:]


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """What torch.empty returns is full of nan, so that every entry that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_kernels(x: Tensor, taps: Tensor, state: Tensor | None, dy: Tensor, activation: str | None) -> list[Tensor]:
    """y and the gradients of x, kernels and, if given, state."""
    width = taps.shape[-1]
    before = x.new_zeros(x.shape[0], width, x.shape[2]) if state is None else state.mT
    inputs = torch.cat([before, x], dim=1)[:, 1:]
    with empty_is_nan():
        y = triton_conv.convolve(inputs, taps, activation)
        grads = torch.autograd.grad(y, [z for z in (x, taps, state) if z is not None], dy)
    return [y, *grads]


def run_reference(x: Tensor, taps: Tensor, state: Tensor | None, dy: Tensor, activation: str | None) -> list[Tensor]:
    """The same by the reference, in float32."""
    y, _ = dynamic_conv_reference(
        x.float(), taps.float(), None if state is None else state.float(), activation=activation
    )
    return [y, *torch.autograd.grad(y, [z for z in (x, taps, state) if z is not None], dy.float())]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: Tolerance, where: object) -> None:
    for name, ours, theirs in zip(NAMES, actual, expected, strict=False):
        assert_close(ours.float(), theirs.float(), tolerance, f"{name}, {where}")
        assert not ours.isnan().any()


# Every width where the taps reach before the text; at the edges of blocks of tokens one is like another.
SHORT = [(n, activation, width) for n in (1, 2, 3) for activation in ("silu", None) for width in (1, 2, 3, 4)]
LONG = [(n, "silu", 4) for n in (63, 64, 65, 130)] + [(65, None, 3), (65, "silu", 2), (65, None, 1), (130, None, 4)]


@on_device
@pytest.mark.parametrize(("n_tokens", "activation", "width"), SHORT + LONG)
def test_kernels_equal_token_by_token(n_tokens: int, activation: str | None, width: int, device: str) -> None:
    n_channels = 5 if n_tokens > 3 else 130  # less than a block, and a block and a bit
    x, taps, state, dy = make_inputs(n_tokens, n_channels, width, device)
    for given in (state, None):
        expected = run_reference(x, taps, given, dy, activation)
        assert_same(run_kernels(x, taps, given, dy, activation), expected, FLOAT32, (n_tokens, width, given is None))


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_tokens", [1, 65])
def test_half_precision_is_rounded_once(n_tokens: int, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(n_tokens, 130, 4, device, dtype)
    expected = run_reference(*inputs, "silu")
    actual = run_kernels(*inputs, "silu")
    assert {x.dtype for x in actual} == {dtype}
    # The reference's gradients come back in the dtype of its leaves, rounded too.
    assert_same(actual, expected, ONE_ROUNDING, dtype)


@on_device
def test_inputs_and_kernels_may_differ_in_dtype(device: str) -> None:
    x, taps, state, dy = make_inputs(9, 6, 3, device)
    x16, dy16 = x.detach().bfloat16().requires_grad_(), dy.bfloat16()
    state16 = state.detach().bfloat16().requires_grad_()
    actual = run_kernels(x16, taps, state16, dy16, "silu")
    assert [z.dtype for z in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    assert_same(actual, run_reference(x16, taps, state16, dy16, "silu"), ONE_ROUNDING, "mixed")


@on_device
def test_any_layout_gives_the_same(device: str) -> None:
    x, taps, state, dy = make_inputs(9, 6, 3, device)
    dy = dy[:, :, :1].expand_as(dy)  # as after a sum
    expected = run_kernels(x, taps, state, dy.contiguous(), "silu")
    strided = [z.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for z in (x, taps, state)]
    inputs = torch.cat([strided[2].mT, strided[0]], dim=1).mT.contiguous().mT[:, 1:]
    assert not inputs.is_contiguous() and not strided[1].is_contiguous() and inputs.stride(-1) != 1
    y = triton_conv.convolve(inputs, strided[1], "silu")
    grads = torch.autograd.grad(y, strided, dy)
    for name, ours, theirs in zip(NAMES, [y, *grads], expected, strict=True):
        assert torch.equal(ours, theirs), name


@on_device
def test_nothing_is_saved_but_the_inputs(device: str) -> None:
    x, taps = make_inputs(20, 8, 4, device)[0], make_inputs(17, 8, 4, device)[1]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: saved.append(z) or z, lambda z: z):
        triton_conv.convolve(x, taps, "silu")
    assert [z.data_ptr() for z in saved] == [x.data_ptr(), taps.data_ptr()]


@on_device
def test_a_second_derivative_is_refused(device: str) -> None:
    x, taps, _, dy = make_inputs(5, 4, 2, device)
    y = triton_conv.convolve(torch.nn.functional.pad(x, (0, 0, 1, 0)), taps, "silu")
    (grad,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@on_device
def test_dynamic_conv_runs_them(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
        monkeypatch.setattr(kernels, "_load", lambda module, name: (triton_conv.convolve, ""))
    x, taps, state, dy = make_inputs(9, 6, 4, device)
    assert kernels.dynamic_conv_kernel(x, taps) is triton_conv.convolve
    lengths = torch.tensor([9, 2], device=device)
    results = []
    for function in (dynamic_conv, dynamic_conv_reference):
        y, last = function(x, taps, state, lengths)
        results.append([y, last, *torch.autograd.grad((y, last), (x, taps, state), (dy, torch.ones_like(last)))])
    for name, ours, theirs in zip(("y", "new state", *NAMES[1:]), *results, strict=True):
        assert_close(ours, theirs, FLOAT32, name)


@on_device
def test_a_compiled_graph_holds_it_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
        monkeypatch.setattr(kernels, "_load", lambda module, name: (triton_conv.convolve, ""))
    inputs, results = make_inputs(5, 6, 4, device)[:3], []
    for function in (dynamic_conv, torch.compile(dynamic_conv, fullgraph=True, backend="aot_eager")):
        y, last = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum() + last.sum(), inputs)])
    torch._dynamo.reset()
    for name, ours, theirs in zip(NAMES, *results, strict=True):
        assert torch.equal(ours, theirs), name
