"""Each operation of sleepify.ops beside its reference and the best implementation that exists elsewhere.

    python -m benchmarks.operations [--repeats 10] [--output docs/results/operations.md]

Shapes are those of Jet-Nemotron 2B's layers and of the Jet layers inserted into Ouro 1.4B. On a GPU
(benchmarks/gpu.py) flash-linear-attention's kernel and causal-conv1d join where they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.report import Claim, Part, Spread, alternate, page_arguments, publish, ratio
from sleepify import ops

Function = Callable[..., Any]
WIDTH = 4


@dataclass(frozen=True)
class Shape:
    """One layer's: H heads, K, V per head; T tokens, from a state or from nothing."""

    name: str
    heads: int
    key_dim: int
    value_dim: int
    tokens: int
    state: bool = False

    def text(self) -> str:
        return f"{self.name}, T = {self.tokens:,}" + (", with a state" if self.state else "")


JET_2B = Shape("Jet-Nemotron 2B", 12, 96, 256, 2048)
OURO = Shape("Jet layer in Ouro 1.4B", 8, 128, 256, 2048)


@dataclass(frozen=True)
class Case:
    """One operation on one shape: inputs, and by name whoever computes it.

    Attributes:
        slow: contenders of whom only the forward pass is timed, in few rounds (the reference keeps a state per token).
    """

    shape: Shape
    inputs: list[Tensor | None]
    contenders: dict[str, Function]
    slow: tuple[str, ...] = ()


def delta_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """The gated delta rule."""
    draw = _drawing(device, dtype)
    keys, values = (1, shape.tokens, shape.heads, shape.key_dim), (1, shape.tokens, shape.heads, shape.value_dim)
    gates = keys[:3]
    state = draw(1, shape.heads, shape.key_dim, shape.value_dim).float() if shape.state else None
    inputs = [draw(*keys), draw(*keys), draw(*values), -draw(*gates).float().abs(), draw(*gates).sigmoid(), state]
    scale = shape.key_dim**-0.5
    contenders: dict[str, Function] = {
        "ours": partial(ops.gated_delta_rule, scale=scale, qk_l2norm=True),
        "transformers' fallback": _transformers_delta,
        "reference": partial(ops.gated_delta_reference, scale=scale, qk_l2norm=True),
    }
    kernel = _find("fla.ops.gated_delta_rule", "chunk_gated_delta_rule") if device == "cuda" else None
    if kernel is not None:
        contenders["flash-linear-attention"] = partial(_fla_delta, kernel)
        contenders["ours, PyTorch"] = partial(ops.gated_delta_chunked, scale=scale, qk_l2norm=True)
    return Case(shape, _require_grad(inputs), contenders, ("reference",) if shape.tokens > 256 else ())


def dynamic_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """Jet's convolution, a kernel for every token."""
    draw = _drawing(device, dtype)
    channels = shape.heads * shape.value_dim
    state = draw(1, channels, WIDTH) if shape.state else None
    inputs = [draw(1, shape.tokens, channels), draw(1, shape.tokens, channels, WIDTH), state]
    contenders: dict[str, Function] = {
        "ours": _output_of(ops.dynamic_conv),
        "unfold, multiply, sum": _unfolded_dynamic,
        "reference": _output_of(ops.dynamic_conv_reference),
    }
    return Case(shape, _require_grad(inputs), contenders, ("reference",) if shape.tokens > 256 else ())


def short_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """The fixed short convolution over the channels of q, k and v of a Gated DeltaNet layer."""
    draw = _drawing(device, dtype)
    channels = shape.heads * (2 * shape.key_dim + shape.value_dim)
    state = draw(1, channels, WIDTH) if shape.state else None
    inputs = [draw(1, shape.tokens, channels), draw(channels, WIDTH), None, state]
    contenders: dict[str, Function] = {
        "ours": _output_of(ops.short_conv),
        "F.conv1d, as in transformers": _grouped_conv,
        "reference": _output_of(ops.short_conv_reference),
    }
    kernel = _find("causal_conv1d", "causal_conv1d_fn") if device == "cuda" else None
    if kernel is not None:
        contenders["causal-conv1d"] = partial(_causal_conv1d, kernel)
    return Case(shape, _require_grad(inputs), contenders, ("reference",) if shape.tokens > 256 else ())


# --- the others, with arguments in our order --------------------------------------------------------------------------


def _transformers_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Any:
    return torch_chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def _fla_delta(kernel: Function, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> Any:
    scale = q.shape[-1] ** -0.5
    return kernel(
        q, k, v, g=g, beta=beta, scale=scale, initial_state=state, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def _output_of(function: Function) -> Function:
    """Without the state, which the others do not make."""
    return lambda *inputs: function(*inputs)[0]


def _unfolded_dynamic(x: Tensor, kernels: Tensor, state: Tensor | None) -> Tensor:
    before = x.new_zeros(x.shape[0], WIDTH - 1, x.shape[2]) if state is None else state.mT[:, 1:]
    return F.silu((torch.cat([before, x], 1).unfold(1, WIDTH, 1) * kernels).sum(-1))


def _grouped_conv(x: Tensor, weight: Tensor, bias: None, state: Tensor | None) -> Tensor:
    channels = x.mT if state is None else torch.cat([state[..., 1:], x.mT], -1)
    padding = WIDTH - 1 if state is None else 0
    y = F.conv1d(channels, weight.unsqueeze(1), padding=padding, groups=weight.shape[0])
    return F.silu(y[..., : x.shape[1]]).mT


def _causal_conv1d(kernel: Function, x: Tensor, weight: Tensor, bias: None, state: Tensor | None) -> Tensor:
    inputs = x if state is None else torch.cat([state.mT[:, 1:], x], 1)
    return kernel(inputs.mT, weight, activation="silu").mT[:, -x.shape[1] :]


def _find(module: str, name: str) -> Function | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError):  # absent, or built for another torch
        return None


def _drawing(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)


def _require_grad(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None else x.requires_grad_() for x in inputs]


# --- timing -----------------------------------------------------------------------------------------------------------


def check_agreement(case: Case) -> None:
    """Compare every contender's output with ours.

    Raises:
        AssertionError: if one differs by more than rounding does.
    """
    with torch.no_grad():
        outputs = {name: _first(function(*case.inputs)) for name, function in case.contenders.items()}
    ours = outputs["ours"].float()
    allowed = 1e-3 if outputs["ours"].dtype == torch.float32 else 5e-2
    for name, output in outputs.items():
        error = float((output.float() - ours).abs().max() / ours.abs().max())
        assert error < allowed, f"{name} differs from ours by {error:.1e} on {case.shape.text()}"


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def forward(function: Function, inputs: list[Tensor | None]) -> None:
    """Forward alone, without a graph."""
    with torch.no_grad():
        function(*inputs)


def forward_backward(function: Function, inputs: list[Tensor | None]) -> None:
    """Forward, and the gradient of every input from output and final state."""
    output = function(*inputs)
    parts = output if isinstance(output, tuple) else (output,)
    torch.autograd.grad([part.sum() for part in parts], [x for x in inputs if x is not None])


def measure(title: str, cases: list[Case], repeats: int, device: str, seconds: float | None = None) -> Part:
    """Milliseconds of every contender, and over ours."""
    part = Part(
        title,
        "Milliseconds; in brackets the quartiles; then the time over ours.",
        ["shape", "who", "forward", "over ours", "forward and backward", "over ours"],
    )
    for case in cases:
        check_agreement(case)
        fast = {name: f for name, f in case.contenders.items() if name not in case.slow}
        slow = {name: case.contenders[name] for name in ("ours", *case.slow)} if case.slow else {}
        results: dict[str, list[tuple[Spread, Spread]]] = {}
        for kind in (forward, forward_backward):
            actions = {name: partial(kind, f, case.inputs) for name, f in fast.items()}
            times = alternate(actions, repeats, device=device, seconds=seconds)
            results |= {n: results.get(n, []) + [(Spread.of(times[n]), ratio(times, n, "ours"))] for n in fast}
        if slow:
            actions = {name: partial(forward, f, case.inputs) for name, f in slow.items()}
            times = alternate(actions, min(2, repeats), device=device, seconds=seconds)
            results |= {name: [(Spread.of(times[name]), ratio(times, name, "ours"))] for name in case.slow}
        for name, found in results.items():
            cells = [cell for spread, over in found for cell in (spread.text(1e3), over.text())]
            part.rows.append([case.shape.text(), name, *cells, *([""] * (4 - len(cells)))])
            part.figures[f"{case.shape.text()}: {name}"] = dict(zip(("forward", "both"), found, strict=False))
    return part


def delta_claims(part: Part, shapes: list[Shape], rival: str) -> None:
    """Ours is at least as fast as a rival, forward and with its backward pass."""
    for shape in shapes:
        for kind, label in (("forward", "forward"), ("both", "forward and backward")):
            _, over = part.figures[f"{shape.text()}: {rival}"][kind]
            what = f"gated delta, ours over {rival}, {label}, {shape.text()}"
            part.claims.append(Claim(what, 1 / over.median, at_most=1.0))


def measure_all(device: str, dtype: torch.dtype, repeats: int, tiny: bool, seconds: float | None = None) -> list[Part]:
    """All operations on all shapes."""
    long, short = (40, 8) if tiny else (2048, 64)
    bases = [replace(JET_2B, heads=2, key_dim=8, value_dim=16)] if tiny else [JET_2B, OURO]
    shapes = [
        shape
        for base in bases
        for shape in (replace(base, tokens=long), replace(base, tokens=short, state=True))
    ]  # fmt: skip
    parts = []
    for title, make in (
        ("Gated delta rule", delta_case),
        ("Dynamic convolution", dynamic_case),
        ("Short convolution", short_case),
    ):
        parts.append(measure(title, [make(shape, device, dtype) for shape in shapes], repeats, device, seconds))
    delta_claims(parts[0], shapes, "transformers' fallback")
    return parts


def main(argv: list[str] | None = None) -> list[Part]:
    arguments = page_arguments(argv, __doc__, "operations", repeats=10)
    parts = measure_all("cpu", torch.float32, arguments.repeats, arguments.tiny)
    intro = (
        "Batch 1, one thread, float32, processor time, the contenders in turn in one run. Median (quartiles). "
        "transformers' fallback is what its own hybrids run on a CPU; the reference goes token by token. All agree "
        "with ours, or the run stops."
    )
    return publish(arguments, "Operations", intro, parts)


if __name__ == "__main__":
    main()
