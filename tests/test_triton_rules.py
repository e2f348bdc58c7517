"""The Triton kernels of the two rules against their token-by-token forms: outputs, states, every gradient.

As in ``test_triton``: in Triton's interpreter where there is no GPU, in a process of its own, and compiled with
``-m gpu``. The interpreter multiplies float32 as it is, so what TF32 costs shows on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from test_ops import NAMES, make_inputs, run_with_grads
from test_triton import DEVICE, empty_is_nan
from tolerances import DECAYED32, HALF_IN_NORM, ROUNDING32
from torch import Tensor

from sleepify import ops
from sleepify.ops import gated_delta_rule, gated_hebbian_rule, kernels, trials

triton = pytest.importorskip("triton", reason="pip install triton (Linux, 200 MB): it needs no GPU for these tests")
from sleepify.ops import triton_chunks, triton_chunks_backward, triton_rules  # noqa: E402

on_device = pytest.mark.parametrize("device", [DEVICE])
REFERENCES = {"delta": ops.gated_delta_reference, "hebbian": ops.gated_hebbian_reference}
RULES = {"delta": gated_delta_rule, "hebbian": gated_hebbian_rule}
KERNELS = {
    triton_chunks: ("prepare", "solve", "carry_states", "read_out"),
    triton_chunks_backward: ("spread_back", "carry_back", "values_back", "keys_back", "finish"),
}
FORWARD = ["prepare", "solve", "carry_states", "read_out"]
BACKWARD = ["solve", "carry_states", "spread_back", "carry_back", "values_back", "keys_back", "finish"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_slow_ones_in_the_interpreter() -> None:
    """`test_triton` runs the others."""
    pass_in_the_interpreter("-m", "slow", __file__)


def compare(
    rule: str, inputs: list[Tensor | None], device: str, limit: float = ROUNDING32, qk_l2norm: bool = True
) -> list[Tensor]:
    """Outputs, state and gradients by the kernels; each within ``limit`` of the reference in float64, in norm."""
    keywords = {"scale": 0.3, "qk_l2norm": qk_l2norm}
    exact = run_with_grads(REFERENCES[rule], [None if x is None else x.double() for x in inputs], **keywords)
    there = [None if x is None else x.to(device) for x in inputs]
    with empty_is_nan():
        ours = run_with_grads(partial(triton_rules.run_rule, delta=rule == "delta"), there, **keywords)
    results = [*ours[:2], *ours[2]]
    for name, mine, theirs in zip(("outputs", "last state", *NAMES), results, [*exact[:2], *exact[2]], strict=False):
        error = (mine.double().cpu() - theirs).norm() / theirs.norm()
        assert error < limit, f"{rule}, {name}: {error:.1e}"  # nan is not
    return results


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("n_tokens", [1, 5, 64, 65, 130])
def test_kernels_equal_token_by_token(rule: str, n_tokens: int, device: str) -> None:
    inputs = make_inputs(n_tokens, n_tokens, batch=1, heads=1, key_dim=6, value_dim=10, dtype=torch.float32)
    compare(rule, inputs, device, qk_l2norm=n_tokens % 2 == 0)


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("n_tokens", [5, 65])
def test_without_a_state(rule: str, n_tokens: int, device: str) -> None:
    compare(rule, make_inputs(0, n_tokens, batch=1, heads=1, with_state=False, dtype=torch.float32), device)


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
def test_rows_and_heads_do_not_mix(rule: str, device: str) -> None:
    inputs = make_inputs(0, 3, batch=2, heads=2, key_dim=17, value_dim=33, dtype=torch.float32)
    together = compare(rule, inputs, device)
    alone = compare(rule, [x[1:] for x in inputs], device)
    assert torch.equal(together[0][1:], alone[0])


@on_device
def test_strong_decay_is_exact(device: str) -> None:
    compare("delta", make_inputs(7, 65, batch=1, heads=1, strong_decay=True, dtype=torch.float32), device, DECAYED32)


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(3, 66, batch=1, heads=1, key_dim=64, value_dim=128, dtype=torch.float32)
    inputs[:3], inputs[4] = [x.to(dtype) for x in inputs[:3]], inputs[4].to(dtype)
    results = compare("delta", inputs, device, HALF_IN_NORM)
    half, single = dtype, torch.float32
    assert [x.dtype for x in results] == [half, single, half, half, half, single, half, single]


@on_device
@pytest.mark.slow
@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("key_dim, value_dim", [(64, 128), (96, 256), (128, 256), (256, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_widths(rule: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(3, 200, batch=1, heads=2, key_dim=key_dim, value_dim=value_dim, dtype=torch.float32)
    inputs[:3] = [x.to(dtype) for x in inputs[:3]]
    compare(rule, inputs, device, ROUNDING32 if dtype == torch.float32 else HALF_IN_NORM)


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
def test_neutral_tokens_leave_the_state_alone(rule: str, device: str) -> None:
    q, k, v, g, beta, state = (
        x.to(device) for x in make_inputs(4, 66, batch=1, heads=1, key_dim=16, value_dim=16, dtype=torch.float32)
    )
    _, untouched = triton_rules.run_rule(
        q, k, v, 0 * g, 0 * beta, state, scale=0.3, qk_l2norm=True, delta=rule == "delta"
    )
    assert torch.equal(untouched, state)


@on_device
def test_parts_of_one_tensor_are_read_where_they_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randn(2, 3, 2 * 2 * 8 + 2 * 16, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = (x.unflatten(-1, (2, -1)) for x in packed.split([16, 16, 32], -1))
    _, _, _, g, beta, state = (x.to(device) for x in make_inputs(0, 3, value_dim=16, dtype=torch.float32))
    inputs = [q, k, v, g.mT.contiguous().mT, beta, state.mT.contiguous().mT]
    assert not any(x.is_contiguous() for x in (*inputs[:4], inputs[5]))
    run = partial(triton_rules.run_rule, scale=0.3, qk_l2norm=True, delta=True)
    expected, last = run(*(x.contiguous() for x in inputs))
    monkeypatch.setattr(triton_rules, "_rows", lambda x: x)  # no copies
    actual, same = run(*inputs)
    assert torch.equal(actual, expected) and torch.equal(same, last)


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
def test_a_loss_of_the_outputs_or_of_the_state_alone(rule: str, device: str) -> None:
    inputs = [x.to(device).requires_grad_() for x in make_inputs(0, 3, batch=1, heads=1, dtype=torch.float32)]
    run = partial(triton_rules.run_rule, delta=rule == "delta")
    for which in (0, 1):
        grads, expected = (
            torch.autograd.grad(function(*inputs, scale=0.3, qk_l2norm=True)[which].sum(), inputs, allow_unused=True)
            for function in (run, REFERENCES[rule])
        )
        for name, ours, theirs in zip(NAMES, grads, expected, strict=True):
            theirs = torch.zeros_like(ours) if theirs is None else theirs
            assert (ours - theirs).norm() <= ROUNDING32 * max(theirs.norm(), 1), name


@on_device
def test_a_second_derivative_is_refused(device: str) -> None:
    inputs = [x.to(device).requires_grad_() for x in make_inputs(0, 2, batch=1, heads=1, dtype=torch.float32)]
    o, _ = triton_rules.run_rule(*inputs, scale=1.0, qk_l2norm=True, delta=True)
    (grad,) = torch.autograd.grad(o.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
def test_a_compiled_graph_holds_them_whole(rule: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        loaded = {"sleepify.ops.triton_rules": triton_rules}
        monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
        monkeypatch.setattr(kernels, "_trial", lambda *sizes: "")
        monkeypatch.setattr(
            kernels,
            "_load",
            lambda module, name: (getattr(loaded[module], name), "") if module in loaded else (None, ""),
        )
    inputs = [x.to(device) for x in make_inputs(0, 5, dtype=torch.float32)]
    compiled = torch.compile(RULES[rule], fullgraph=True, backend="aot_eager")
    expected = run_with_grads(RULES[rule], inputs, scale=0.3, qk_l2norm=True)
    actual = run_with_grads(compiled, inputs, scale=0.3, qk_l2norm=True)
    torch._dynamo.reset()
    for name, ours, theirs in zip(
        ("outputs", "last state", *NAMES), [*actual[:2], *actual[2]], [*expected[:2], *expected[2]], strict=True
    ):
        assert torch.equal(ours, theirs), name


@on_device
@pytest.mark.parametrize("rule", REFERENCES)
def test_a_trial_passes_and_sees_five_percent(rule: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_TOKENS", 5)
    arguments = rule == "delta", torch.bfloat16, 16, 16, True, device
    trials.try_rule(*arguments)
    right = triton_chunks_backward.finish

    class Wrong:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*inputs: Any, **sizes: Any) -> None:
                right[grid](*inputs, **sizes)
                inputs[8].mul_(1.05)

            return launch

    monkeypatch.setattr(triton_chunks_backward, "finish", Wrong())
    with pytest.raises(ArithmeticError, match="of k is off by [45]"):
        trials.try_rule(*arguments)
    trials.try_rule(*arguments[:4], False, device)


class Recorder:
    """Stands for a kernel; keeps what it is launched with and computes nothing."""

    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched = []
        for module, names in KERNELS.items():
            for name in names:
                monkeypatch.setattr(module, name, self._standing_for(getattr(module, name)))

    def _standing_for(self, kernel: Any) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *inputs, **sizes: recorder.launched.append((kernel, inputs, sizes))

        return Kernel()

    def names(self) -> list[str]:
        return [kernel.fn.__name__ for kernel, _, _ in self.launched]


def run_both_ways(rule: str, key_dim: int, value_dim: int, dtype: torch.dtype, n_tokens: int = 130) -> None:
    inputs = make_inputs(0, n_tokens, batch=1, heads=16, key_dim=key_dim, value_dim=value_dim, dtype=torch.float32)
    inputs[:3] = [x.to(dtype) for x in inputs[:3]]
    run_with_grads(partial(triton_rules.run_rule, delta=rule == "delta"), inputs, scale=0.3, qk_l2norm=True)


@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("n_tokens", [2, 4096])
def test_the_number_of_launches_is_the_same_for_any_text(
    rule: str, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    run_both_ways(rule, 8, 8, torch.bfloat16, n_tokens)
    assert recorder.names() == FORWARD + BACKWARD


SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have, by compute capability
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compile_for(capability: int, kernel: Any, inputs: tuple[Any, ...], sizes: dict[str, Any]) -> Any:
    """What Triton compiles at a launch with these arguments."""
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages") if name in sizes}
    values = dict(zip(kernel.arg_names, inputs, strict=False)) | sizes
    types, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if name.isupper():
            types[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], attributes[(position,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    source = triton.compiler.ASTSource(kernel, types, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "rule, key_dim, value_dim, dtype, names",
    [
        ("delta", 16, 16, torch.bfloat16, ["carry_back"]),
        *(
            pytest.param(rule, *widths, dtype, FORWARD + BACKWARD[2:], marks=pytest.mark.slow)
            for rule in REFERENCES
            for widths in ((96, 256), (256, 512))
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ],
)
def test_they_compile_and_fit_into_shared_memory(
    rule: str, key_dim: int, value_dim: int, dtype: torch.dtype, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Needs no GPU, and finds what the interpreter lets pass: it takes any Python.
    recorder = Recorder(monkeypatch)
    run_both_ways(rule, key_dim, value_dim, dtype)
    for kernel, inputs, sizes in recorder.launched:
        name = kernel.fn.__name__
        for capability, room in SHARED_MEMORY.items() if name in names else ():
            compiled = compile_for(capability, kernel, inputs, dict(sizes))
            assert compiled.asm["cubin"] and compiled.metadata.shared <= room, (name, capability)


def test_no_axis_of_a_grid_but_the_first_grows_with_the_rows() -> None:
    # CUDA ends the others at 65,535; a call of many short texts has more pairs of a row and a head.
    q, k, v = (torch.empty(5000, 100, 16, 256, device="meta") for _ in range(3))
    at = triton_rules._Launch(q, k, v, 1.0, True, "ieee")
    assert at.by_chunk == (80_000, 2) and at.by_chunk_and_key == (80_000, 2, 8) and at.by_column == (80_000, 16)
