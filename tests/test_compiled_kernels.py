"""`model.compile()` with the kernels of a GPU: no graph breaks, the same numbers. Stand-ins play the packages' part."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from families import randomise, tiny_base, tokens
from test_ops import NAMES, make_inputs, run_with_grads
from tolerances import BFLOAT16, FLOAT32, assert_close
from torch import Tensor

from sleepify import FastWeightConfig, ops, sleepify
from sleepify.ops import kernels


class Packages:
    """flash-linear-attention and causal-conv1d as torch.compile finds them: it may not look inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        found = {
            "fla.ops.gated_delta_rule": (self.chunk_gated_delta_rule, self.fused_recurrent_gated_delta_rule),
            "fla.ops.simple_gla": (self.chunk_simple_gla,),
            "causal_conv1d": (self.causal_conv1d_fn,),
        }
        for module, functions in found.items():
            stand_in = ModuleType(module)
            for function in functions:
                setattr(stand_in, function.__name__, torch.compiler.disable(function))
            monkeypatch.setitem(sys.modules, module, stand_in)
        monkeypatch.setattr(kernels, "_on_cuda", lambda x: True)
        monkeypatch.setattr(kernels, "_backward_fault", lambda: "")
        monkeypatch.setattr(kernels, "_load", lambda module, name: (getattr(importlib.import_module(module), name), ""))

    def chunk_gated_delta_rule(self, **given: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("chunk")
        tensors = (given[name] for name in ("q", "k", "v", "g", "beta", "initial_state"))
        return ops.gated_delta_reference(*tensors, scale=given["scale"], qk_l2norm=given["use_qk_l2norm_in_kernel"])

    def fused_recurrent_gated_delta_rule(self, **given: Any) -> tuple[Tensor, Tensor]:
        return self.chunk_gated_delta_rule(**given)

    def chunk_simple_gla(self, **given: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("gla")
        q, k, v, g, state = (given[name] for name in ("q", "k", "v", "g", "initial_state"))
        return ops.gated_hebbian_reference(q, k, v, g, torch.ones_like(g), state, scale=given["scale"])

    def causal_conv1d_fn(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
        self.calls.append("conv")
        # The real one takes a weight of another dtype than its input, too.
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[1])
        y = y[..., : x.shape[2]]
        return y if activation is None else torch.nn.functional.silu(y)


def in_a_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("rule, called", [("delta", "chunk"), ("hebbian", "gla")])
def test_a_rule_of_fla_is_one_operation(
    rule: str, called: str, with_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Packages(monkeypatch)
    inputs = make_inputs(0, 5, with_state=with_state, dtype=torch.float32)
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    function = getattr(ops, f"gated_{rule}_rule")
    expected = run_with_grads(function, inputs, scale=0.3, qk_l2norm=True)
    actual = run_with_grads(in_a_graph(function), inputs, scale=0.3, qk_l2norm=True)
    assert packages.calls == [called] * 3  # the graph's backward runs the forward again
    for name, ours, theirs in zip(
        ("o", "state", *NAMES), [*actual[:2], *actual[2]], [*expected[:2], *expected[2]], strict=False
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("with_bias", [True, False])
def test_causal_conv1d_is_one_operation(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = Packages(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, state = (
        torch.randn(*shape, generator=generator) for shape in ((2, 7, 8), (8, 4), (8,), (2, 8, 4))
    )
    inputs = [x, weight, bias if with_bias else None, state]
    expected = run_with_grads(ops.short_conv, inputs)
    actual = run_with_grads(in_a_graph(ops.short_conv), inputs)
    assert packages.calls == ["conv"] * 3
    for name, ours, theirs in zip(
        ("y", "state", "x", "weight"), [*actual[:2], *actual[2]], [*expected[:2], *expected[2]], strict=False
    ):
        assert_close(ours, theirs, FLOAT32, name)


@pytest.mark.parametrize("rule, called", [("gdn", "chunk"), ("mamba2", "gla")])
def test_an_inserted_layer_compiles_without_breaks(rule: str, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = Packages(monkeypatch)
    base = tiny_base("qwen3", torch.bfloat16, num_hidden_layers=1)
    model = sleepify(base, n_loops=1, window_size=4, fast_weights=FastWeightConfig(rule=rule, layers=[0]))
    randomise(model.fast_weights)
    twin, ids = copy.deepcopy(model), tokens(2, 8)
    torch._dynamo.reset()
    twin.fast_weights[0].compile(backend="aot_eager", fullgraph=True)  # as model.compile does with every layer
    for each in (model, twin):
        each.train()(ids, labels=ids).loss.backward()
    assert packages.calls.count("conv") > 0 and packages.calls.count(called) > 0
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if mine.grad is not None:
            assert_close(theirs.grad, mine.grad, BFLOAT16, name)
    arguments = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    assert torch.equal(twin.eval().generate(ids, **arguments), model.eval().generate(ids, **arguments))
    torch._dynamo.reset()
