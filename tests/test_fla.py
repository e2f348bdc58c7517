"""flash-linear-attention's own functions through our wrappers, in Triton's interpreter, against the reference.

Opt-in: `pip install flash-linear-attention` beside, then `pytest -m slow tests/test_fla.py`. The interpreter compiles
nothing, so this is about arguments, layouts and gradients, not about what a GPU's compiler makes of it.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from functools import partial
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from test_ops import NAMES, make_inputs, run_with_grads
from tolerances import FLA32, HALF_IN_NORM

from sleepify import ops
from sleepify.ops import foreign, kernels

pytest.importorskip("triton", reason="pip install triton (Linux, 200 MB)")
pytest.importorskip("fla", reason="pip install flash-linear-attention: opt-in")
pytestmark = pytest.mark.slow

RULES = {
    "delta": (kernels._CHUNK_DELTA, foreign.run_fla_delta, ops.gated_delta_reference),
    "hebbian": (kernels._CHUNK_HEBBIAN, foreign.run_fla_hebbian, ops.gated_hebbian_reference),
}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    pass_in_the_interpreter("-m", "slow", __file__)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their kernels need of the interpreter: no timing of variants, and loop counters that are tensors too."""
    import triton.language
    from triton.runtime.autotuner import Autotuner

    class Counter(int):
        def to(self, dtype: Any) -> Any:
            return triton.language.cast(int(self), dtype)

    def counting(*bounds: Any) -> Any:
        numbers = [int(x.handle.data.item()) if hasattr(x, "handle") else int(x) for x in bounds]
        return (Counter(i) for i in builtins.range(*numbers))

    monkeypatch.setattr(Autotuner, "_bench", lambda self, *inputs, config, **sizes: [0.0, 0.0, 0.0])
    for (module, _), _, _ in RULES.values():
        importlib.import_module(module)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            monkeypatch.setattr(module, "range", counting, raising=False)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter only")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "n_tokens, key_dim, value_dim", [(1, 6, 10), (5, 6, 10), (64, 6, 10), (70, 64, 32), (65, 256, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fla_equals_token_by_token(rule: str, n_tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    kernel, run, reference = RULES[rule]
    inputs = make_inputs(0, n_tokens, batch=1, key_dim=key_dim, value_dim=value_dim, dtype=torch.float32)
    inputs[:3] = [x.to(dtype) for x in inputs[:3]]
    keywords = {"scale": 0.3, "qk_l2norm": True}
    exact = run_with_grads(reference, [x.double() for x in inputs], **keywords)
    function = getattr(importlib.import_module(kernel[0]), kernel[1])
    for way in (partial(run, function), partial(foreign.traced_rule, *kernel)):
        ours = run_with_grads(way, inputs, **keywords)
        names = ("outputs", "last state", *NAMES)
        for name, mine, theirs in zip(names, [*ours[:2], *ours[2]], [*exact[:2], *exact[2]], strict=True):
            error = (mine.double() - theirs).norm() / theirs.norm()
            assert error < (FLA32 if dtype == torch.float32 else HALF_IN_NORM), f"{name}: {error:.1e}"
