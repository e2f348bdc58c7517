"""The recurrences and convolutions against their token-by-token forms: outputs, states, every gradient."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BFLOAT16, EXACT, EXACT_GRAD, FLOAT32, ROUNDING32, assert_close
from torch import Tensor

from sleepify import ops
from sleepify.ops import dynamic_conv, gated_delta_rule, gated_hebbian_rule, kernels, short_conv

RULES = {
    "delta": (gated_delta_rule, ops.gated_delta_chunked, ops.gated_delta_reference),
    "hebbian": (gated_hebbian_rule, ops.gated_hebbian_chunked, ops.gated_hebbian_reference),
}
NAMES = ("q", "k", "v", "g", "beta", "state")


@pytest.fixture(autouse=True)
def no_trial_is_remembered() -> Iterator[None]:
    """Trials of what a test puts in place of the kernels."""
    yield
    kernels._trial.cache_clear()


def make_inputs(
    seed: int,
    n_tokens: int,
    *,
    batch: int = 2,
    heads: int = 2,
    key_dim: int = 8,
    value_dim: int = 6,
    with_state: bool = True,
    strong_decay: bool = False,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """q, k, v, g, beta, state. Keys have unit norm; strong decay puts g = -50 on every third token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = normal(batch, n_tokens, heads, key_dim), normal(batch, n_tokens, heads, key_dim)
    v = normal(batch, n_tokens, heads, value_dim)
    g = -torch.rand(batch, n_tokens, heads, generator=generator, dtype=dtype) * 0.3
    if strong_decay:
        g[:, ::3] = -50.0
    beta = torch.rand(batch, n_tokens, heads, generator=generator, dtype=dtype)
    state = normal(batch, heads, key_dim, value_dim) if with_state else None
    return [q, k / k.norm(dim=-1, keepdim=True), v, g, beta, state]


def run_with_grads(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor | None], **keywords: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, state, and the gradients of a fixed random functional of both with respect to all inputs."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs, state = function(*leaves, **keywords)
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (outputs, state)]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad((outputs, state), wanted, seeds)
    return outputs.detach(), state.detach(), list(grads)


def assert_same(
    actual: tuple[Tensor, Tensor, list[Tensor]], expected: tuple[Tensor, Tensor, list[Tensor]], where: object
) -> None:
    assert_close(actual[0], expected[0], EXACT, f"outputs, {where}")
    assert_close(actual[1], expected[1], EXACT, f"state, {where}")
    for name, ours, theirs in zip(NAMES, actual[2], expected[2], strict=False):
        assert_close(ours, theirs, EXACT_GRAD, f"gradient of {name}, {where}")


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(
    n_tokens=st.one_of(st.integers(1, 200), st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 75, 130])),
    with_state=st.booleans(),
    strong_decay=st.booleans(),
    qk_l2norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_token_by_token(
    rule: str, n_tokens: int, with_state: bool, strong_decay: bool, qk_l2norm: bool, seed: int
) -> None:
    _, chunked, reference = RULES[rule]
    inputs = make_inputs(seed, n_tokens, with_state=with_state, strong_decay=strong_decay)
    keywords = {"scale": 0.3, "qk_l2norm": qk_l2norm}
    expected = run_with_grads(reference, inputs, **keywords)
    assert_same(run_with_grads(chunked, inputs, **keywords), expected, n_tokens)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_tokens", [63, 64, 65, 75, 130])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_chunk_size_changes_nothing(rule: str, n_tokens: int, chunk_size: int) -> None:
    (_, chunked, reference), inputs = RULES[rule], make_inputs(3, n_tokens)
    expected = run_with_grads(reference, inputs, scale=0.3)
    assert_same(run_with_grads(chunked, inputs, scale=0.3, chunk_size=chunk_size), expected, n_tokens)


@pytest.mark.parametrize("rule", RULES)
def test_strong_decay_is_exact_in_float32(rule: str) -> None:
    # As differences of running sums, the small decays behind a strong one would lose three digits, and the upper
    # triangle would hold exp(550): nan in the gradients.
    _, chunked, reference = RULES[rule]
    inputs = make_inputs(7, 75, strong_decay=True, dtype=torch.float32)
    actual = run_with_grads(chunked, inputs, scale=0.3)
    expected = run_with_grads(reference, [x.double() for x in inputs], scale=0.3)
    names = ("outputs", "state", *NAMES)
    for name, ours, exact in zip(names, (*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert (ours.double() - exact).norm() < ROUNDING32 * exact.norm(), name


def test_delta_reference_is_the_papers_formula() -> None:
    # §3.1: S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t, with S [V,K].
    q, k, v, g, beta, state = make_inputs(0, 7)
    outputs, last = ops.gated_delta_reference(q, k, v, g, beta, state, scale=1.0)
    for row in range(2):
        for head in range(2):
            s = state[row, head].T
            for t in range(7):
                key, value = k[row, t, head], v[row, t, head]
                a, b = g[row, t, head].exp(), beta[row, t, head]
                s = a * s @ (torch.eye(8, dtype=s.dtype) - b * torch.outer(key, key)) + b * torch.outer(value, key)
                assert_close(outputs[row, t, head], s @ q[row, t, head], EXACT, f"o, token {t}")
            assert_close(last[row, head].T, s, EXACT, "state")


def test_hebbian_reference_is_equation_3() -> None:
    # Unrolled: o_t = sum_{s <= t} (prod_{s < r <= t} a_r) b_s (k_s . q_t) v_s, from an empty state.
    q, k, v, g, beta, _ = make_inputs(0, 7, with_state=False)
    outputs, _ = ops.gated_hebbian_reference(q, k, v, g, beta, scale=0.5)
    for t in range(7):
        expected = sum(
            (g[:, s + 1 : t + 1].sum(1).exp() * beta[:, s] * (k[:, s] * q[:, t]).sum(-1)).unsqueeze(-1) * v[:, s]
            for s in range(t + 1)
        )
        assert_close(outputs[:, t], 0.5 * expected, EXACT, f"token {t}")


@pytest.mark.parametrize("rule", RULES)
def test_gradients_by_finite_differences(rule: str) -> None:
    _, chunked, _ = RULES[rule]
    leaves = [x.requires_grad_() for x in make_inputs(1, 5, batch=1, key_dim=3, value_dim=2)]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(*inputs, scale=0.7, qk_l2norm=True, chunk_size=3)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", [1, 31, 64, 74])
def test_a_carried_state_continues_the_text(rule: str, cut: int) -> None:
    (function, _, _), inputs = RULES[rule], make_inputs(2, 75)

    def in_two_calls(*inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        *sequences, state = inputs
        first, state = function(*(x[:, :cut] for x in sequences), state, scale=scale)
        second, state = function(*(x[:, cut:] for x in sequences), state, scale=scale)
        return torch.cat([first, second], dim=1), state

    assert_same(run_with_grads(in_two_calls, inputs, scale=0.3), run_with_grads(function, inputs, scale=0.3), cut)


@pytest.mark.parametrize("rule", RULES)
def test_neutral_tokens_leave_the_state_alone(rule: str) -> None:
    function, _, _ = RULES[rule]
    q, k, v, g, beta, state = make_inputs(4, 90)
    _, untouched = function(q, k, v, torch.zeros_like(g), torch.zeros_like(beta), state, scale=0.3)
    assert torch.equal(untouched, state)

    real = torch.tensor([37, 90])
    padding = (torch.arange(90) >= real[:, None]).unsqueeze(-1)
    outputs, last = function(q, k, v, g.masked_fill(padding, 0), beta.masked_fill(padding, 0), state, scale=0.3)
    alone, last_alone = function(*(x[:1, :37] for x in (q, k, v, g, beta)), state[:1], scale=0.3)
    assert_close(outputs[:1, :37], alone, EXACT, "outputs")
    assert_close(last[:1], last_alone, EXACT, "state")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_tokens", [1, 70])
def test_half_precision_inputs_are_computed_in_float32(rule: str, n_tokens: int) -> None:
    function, _, reference = RULES[rule]
    exact = make_inputs(5, n_tokens, dtype=torch.float32)
    half = [x.bfloat16() for x in exact[:5]]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # would round every product, and the state with it
        outputs, state = function(*half, exact[5], scale=0.3)
    expected, expected_state = reference(*(x.double() for x in half), exact[5].double(), scale=0.3)
    assert outputs.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(state.double(), expected_state, FLOAT32, "state")
    assert_close(outputs, expected.bfloat16(), BFLOAT16, "outputs")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("position, name", [(1, "k"), (2, "v"), (3, "g"), (4, "beta"), (5, "state")])
def test_shapes_that_do_not_fit_are_refused(rule: str, position: int, name: str) -> None:
    for function in RULES[rule]:
        inputs = make_inputs(0, 4)
        inputs[position] = inputs[position][:, :1]
        with pytest.raises(ValueError, match=f"^{name} must"):
            function(*inputs, scale=1.0)


def conv_inputs(n_tokens: int, width: int, *, dynamic: bool, with_state: bool = True) -> list[Tensor | None]:
    """x, kernels [, bias], state for 3 rows of 5 channels."""
    generator = torch.Generator().manual_seed(n_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kernel = [normal(3, n_tokens, 5, width)] if dynamic else [normal(5, width), normal(5)]
    return [normal(3, n_tokens, 5), *kernel, normal(3, 5, width) if with_state else None]


CONVS = {"short": (short_conv, ops.short_conv_reference), "dynamic": (dynamic_conv, ops.dynamic_conv_reference)}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("n_tokens, width", [(1, 4), (2, 4), (3, 4), (4, 4), (9, 4), (9, 2), (5, 1)])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution_equals_token_by_token(
    kind: str, n_tokens: int, width: int, with_state: bool, activation: str | None
) -> None:
    fast, reference = CONVS[kind]
    inputs = conv_inputs(n_tokens, width, dynamic=kind == "dynamic", with_state=with_state)
    for lengths in (None, torch.tensor([n_tokens, n_tokens // 2, 0])):
        keywords = {"lengths": lengths, "activation": activation}
        expected = run_with_grads(reference, inputs, **keywords)
        assert_same(run_with_grads(fast, inputs, **keywords), expected, (n_tokens, width, lengths))


def test_convolution_is_torchs_conv1d() -> None:
    x, weight, bias, _ = conv_inputs(9, 4, dynamic=False, with_state=False)
    expected = torch.nn.functional.conv1d(x.mT, weight.unsqueeze(1), bias, padding=3, groups=5)[..., :9].mT
    actual, state = short_conv(x, weight, bias, activation=None)
    assert_close(actual, expected, EXACT, "y")
    assert torch.equal(state, x[:, -4:].mT)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_a_carried_convolution_state_continues_the_text(kind: str, cut: int) -> None:
    function, _ = CONVS[kind]
    inputs = conv_inputs(9, 4, dynamic=kind == "dynamic")

    def in_two_calls(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *kernel, state = rest
        ys = []
        for part in (slice(None, cut), slice(cut, None)):
            here = [kernel[0][:, part]] if kind == "dynamic" else kernel
            y, state = function(x[:, part], *here, state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    assert_same(run_with_grads(in_two_calls, inputs), run_with_grads(function, inputs), cut)


@pytest.mark.parametrize("kind", CONVS)
def test_convolution_gradients_by_finite_differences(kind: str) -> None:
    convolve, _ = CONVS[kind]
    leaves = [x if x is None else x.requires_grad_() for x in conv_inputs(4, 3, dynamic=kind == "dynamic")]
    assert torch.autograd.gradcheck(convolve, leaves)
    assert torch.autograd.gradgradcheck(convolve, leaves)


def test_convolution_state_does_not_keep_the_text_alive() -> None:
    _, state = short_conv(torch.randn(1, 500, 8), torch.randn(8, 4))
    assert state.untyped_storage().nbytes() == 8 * 4 * 4


def test_convolution_refuses_what_does_not_fit() -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match="activation"):
        short_conv(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="weight must"):
        short_conv(x, weight[:3])
    with pytest.raises(ValueError, match="state must"):
        short_conv(x, weight, state=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="lengths must"):
        short_conv(x, weight, lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="kernels must"):
        dynamic_conv(x, torch.randn(2, 2, 4, 4))


class FakeKernels:
    """Stands for the compiled packages: same signatures, computed by the reference; records what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
        monkeypatch.setattr(kernels, "_backward_fault", lambda: "")
        monkeypatch.setattr(kernels, "_trial", lambda *sizes: "")
        monkeypatch.setattr(kernels, "_load", lambda module, name: (getattr(self, name), ""))

    def _delta(self, name: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self.calls.append((name, arguments))
        assert arguments["output_final_state"] and arguments["g"].dtype == torch.float32
        assert arguments["q"].dtype == arguments["k"].dtype == arguments["v"].dtype
        return ops.gated_delta_reference(
            *(arguments[key] for key in ("q", "k", "v", "g", "beta", "initial_state")),
            scale=arguments["scale"],
            qk_l2norm=arguments["use_qk_l2norm_in_kernel"],
        )

    def chunk_gated_delta_rule(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        return self._delta("chunk", arguments)

    def fused_recurrent_gated_delta_rule(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        return self._delta("step", arguments)

    def chunk_simple_gla(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(("gla", arguments))
        assert arguments["output_final_state"] and arguments["g"].dtype == torch.float32
        ones = torch.ones_like(arguments["g"])
        q, k, v, g = (arguments[key] for key in ("q", "k", "v", "g"))
        return ops.gated_hebbian_reference(q, k, v, g, ones, arguments["initial_state"], scale=arguments["scale"])

    def run_rule(self, *tensors: Tensor, delta: bool, **keywords: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(("ours", {"delta": delta}))
        return (ops.gated_delta_reference if delta else ops.gated_hebbian_reference)(*tensors, **keywords)

    def convolve(self, inputs: Tensor, kernels: Tensor, activation: str | None) -> Tensor:
        self.calls.append(("dynamic", {"inputs": inputs}))
        y = sum(inputs[:, w : w + kernels.shape[1]] * tap for w, tap in enumerate(kernels.unbind(-1)))
        return y if activation is None else torch.nn.functional.silu(y)

    def causal_conv1d_fn(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
        self.calls.append(("conv", {"x": x}))
        assert x.stride(1) == 1 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0 and weight.is_contiguous()
        y = torch.nn.functional.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[1])
        y = y[..., : x.shape[2]]
        return y if activation is None else torch.nn.functional.silu(y)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_state", [True, False])
def test_kernels_get_what_they_expect(rule: str, with_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    function, _, reference = RULES[rule]
    inputs = make_inputs(6, 20, with_state=with_state, dtype=torch.float32)
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    expected, expected_state = reference(*inputs, scale=0.3, qk_l2norm=True)
    fake = FakeKernels(monkeypatch)
    actual, state = function(*inputs, scale=0.3, qk_l2norm=True)
    assert [name for name, _ in fake.calls] == [{"delta": "chunk", "hebbian": "gla"}[rule]]
    assert actual.dtype == torch.bfloat16 and state.dtype == torch.float32
    # The Hebbian path hands rounded v * beta and normalised q, k to the kernel.
    assert_close(actual, expected, BFLOAT16, "outputs")
    assert_close(state, expected_state, BFLOAT16, "state")


def test_the_kernel_without_backward_is_for_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernels(monkeypatch)
    one, many = make_inputs(0, 1, dtype=torch.bfloat16), make_inputs(0, 2, dtype=torch.bfloat16)
    one[5], many[5] = one[5].float(), many[5].float()
    gated_delta_rule(*one, scale=1.0)
    gated_delta_rule(*many, scale=1.0)
    gated_delta_rule(*one[:5], one[5].requires_grad_(), scale=1.0)
    with torch.no_grad():
        gated_delta_rule(*one, scale=1.0)
    assert [name for name, _ in fake.calls] == ["step", "chunk", "chunk", "step"]


@pytest.mark.parametrize("rule", RULES)
def test_a_faulty_backward_is_not_used(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, _, _ = RULES[rule]
    fake = FakeKernels(monkeypatch)
    monkeypatch.setattr(kernels, "_backward_fault", lambda: "wrong")
    inputs = make_inputs(0, 3, dtype=torch.bfloat16)
    inputs[5] = inputs[5].float()
    function(*inputs[:5], inputs[5].requires_grad_(), scale=1.0)
    assert fake.calls == [("ours", {"delta": rule == "delta"})]
    with torch.no_grad():
        function(*inputs, scale=1.0)
    assert len(fake.calls) == 2 and fake.calls[1][0] != "ours"


@pytest.mark.parametrize(
    "capability, triton, fla, faulty",
    [
        ((8, 0), "3.6.0", "0.5.0", False),  # Ampere
        ((10, 0), "3.6.0", "0.5.0", False),  # Blackwell
        ((9, 0), "3.3.1", "0.4.0", False),
        ((9, 0), "3.4.0", "0.4.2", True),
        ((9, 0), "3.6.0+git1", "0.5.2", True),
        ((9, 0), "3.7.1", "0.5.0", True),
        ((9, 0), "3.10.0", "0.6.0", False),
    ],
)
def test_where_the_backward_is_faulty(
    capability: tuple[int, int], triton: str, fla: str, faulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device else (8, 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(__version__=fla))
    monkeypatch.setattr(kernels, "_load", lambda module, name: (print, ""))
    monkeypatch.setattr(kernels, "_trial", lambda *sizes: "")
    kernels._backward_fault.cache_clear()
    assert bool(kernels._backward_fault()) == faulty
    assert ("wherever gradients are taken" in ops.describe()["gated_delta_rule on cuda"]) == faulty
    kernels._backward_fault.cache_clear()


@pytest.mark.parametrize("changes", [{"dtype": torch.float64}, {"key_dim": 258}, {"n_tokens": 1, "value_dim": 5}])
def test_inputs_that_a_kernel_cannot_take_go_to_pytorch(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernels(monkeypatch)
    inputs = make_inputs(0, **{"n_tokens": 3, "dtype": torch.bfloat16, **changes})
    gated_delta_rule(*inputs, scale=1.0)
    gated_hebbian_rule(*inputs, scale=1.0)
    assert fake.calls == []


@pytest.mark.parametrize("changes", [{"dtype": torch.float32}, {"dtype": torch.bfloat16, "value_dim": 5}])
def test_inputs_that_fla_cannot_take_go_to_our_kernels(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernels(monkeypatch)
    inputs = make_inputs(0, 3, **changes)
    gated_delta_rule(*inputs, scale=1.0)
    gated_hebbian_rule(*inputs, scale=1.0)
    assert fake.calls == [("ours", {"delta": True}), ("ours", {"delta": False})]


def test_a_trial_that_fails_leaves_the_rule_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def miscompiled(*arguments: object) -> None:
        raise ArithmeticError("gradient of q is off by 3e-1")

    def run(*inputs: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("was used")

    monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
    monkeypatch.setattr(kernels, "_load", lambda module, name: (run if "sleepify" in module else None, "no fla"))
    monkeypatch.setattr(kernels.trials, "try_rule", miscompiled)
    inputs = make_inputs(0, 3, dtype=torch.float32)
    with pytest.warns(UserWarning, match="gated delta rule fails its trial at torch.float32, K = 8, V = 6: gradient"):
        actual, _ = gated_delta_rule(*inputs, scale=1.0)
    assert torch.equal(actual, ops.gated_delta_chunked(*inputs, scale=1.0)[0])
    with warnings.catch_warnings(action="error"):  # once
        gated_delta_rule(*inputs, scale=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="Hebbian"):
        assert "off by 3e-1" in ops.describe()["gated_hebbian_rule on cuda"]


def test_a_trial_is_made_on_the_gpu_of_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread begins on the first one, in a process that has another, too."""
    current = threading.local()
    current.number = 3

    @contextmanager
    def on(number: int) -> Iterator[None]:
        current.number = number
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.number)
    monkeypatch.setattr(torch.cuda, "device", on)
    tried: list[Any] = []
    kernels._apart(lambda: tried.append((getattr(current, "number", 0), threading.current_thread())))
    ((number, thread),) = tried
    assert number == 3 and thread is not threading.current_thread()


def test_short_conv_kernel_continues_from_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, state = (
        torch.randn(*shape, generator=generator) for shape in ((2, 7, 8), (8, 4), (8,), (2, 8, 4))
    )
    expected = [run_with_grads(short_conv, [x[:, :n], weight, bias, state]) for n in (2, 3, 7)]
    fake = FakeKernels(monkeypatch)
    for n, reference in zip((2, 3, 7), expected, strict=True):
        actual = run_with_grads(short_conv, [x[:, :n], weight, bias, state])
        for ours, theirs in zip((*actual[:2], *actual[2]), (*reference[:2], *reference[2]), strict=True):
            assert_close(ours, theirs, FLOAT32, f"{n} tokens")
    assert len(fake.calls) == 3
    short_conv(x.double(), weight.double())  # no float64 there
    short_conv(x[..., :5], weight[:5])  # nor channels that 8 does not divide
    short_conv(x, torch.randn(8, 5))  # nor wide windows
    short_conv(x[:, :1], weight, bias, state)  # nor for one more token
    assert len(fake.calls) == 3


def test_dynamic_conv_kernel_continues_from_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    double = conv_inputs(7, 3, dynamic=True)
    inputs, lengths = [x.float() for x in double], torch.tensor([7, 2, 0])
    expected = run_with_grads(ops.dynamic_conv_reference, inputs, lengths=lengths)
    fake = FakeKernels(monkeypatch)
    actual = run_with_grads(dynamic_conv, inputs, lengths=lengths)
    for ours, theirs in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert_close(ours, theirs, FLOAT32, "dynamic_conv")
    assert len(fake.calls) == 1
    dynamic_conv(*double)  # no float64 there
    dynamic_conv(inputs[0], double[1])
    assert len(fake.calls) == 1


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "gcc")])
def test_triton_that_cannot_compile_is_found_out_beforehand(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(convolve: object) -> None:
        raise error

    monkeypatch.setattr(kernels, "_trial", lambda *sizes: "no GPU")
    kernels._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "sleepify.ops.triton_conv", SimpleNamespace(convolve=print))
    monkeypatch.setattr(kernels.trials, "try_convolution", fail)
    assert f"does not load: {error}" in ops.describe()["dynamic_conv on cuda"]
    monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
    assert kernels.dynamic_conv_kernel(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)) is None
    kernels._load.cache_clear()


def test_cpu_tensors_never_reach_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str, name: str) -> None:
        raise AssertionError(f"{module}.{name} was asked for")

    monkeypatch.setattr(kernels, "_load", fail)
    inputs = make_inputs(0, 3, dtype=torch.bfloat16)
    gated_delta_rule(*inputs, scale=1.0)
    gated_hebbian_rule(*inputs, scale=1.0)
    short_conv(torch.randn(1, 3, 8), torch.randn(8, 4))
    dynamic_conv(torch.randn(1, 3, 8), torch.randn(1, 3, 8, 4))


def test_describe_names_every_operation_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_trial", lambda *sizes: "no GPU")
    kernels._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows, names = ops.describe(), ("gated_delta_rule", "gated_hebbian_rule", "short_conv", "dynamic_conv")
    assert set(rows) == {f"{name} on {device}" for name in names for device in ("cpu", "cuda")}
    assert "no CUDA device" in rows["gated_delta_rule on cuda"]
    kernels._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla", None)  # what Python takes for absent
    assert "fla is not installed" in ops.describe()["gated_hebbian_rule on cuda"]
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sleepify.ops.triton_conv", raising=False)
    kernels._load.cache_clear()
    assert "triton is not installed" in ops.describe()["dynamic_conv on cuda"]
    kernels._load.cache_clear()
