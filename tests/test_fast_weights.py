"""The mixers and the layer around them: state, padding, initialisation, and Jet's published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tolerances import BFLOAT16, EXACT, EXACT_GRAD, PARITY, assert_close
from torch import Tensor, nn

from sleepify.config import FastWeightConfig
from sleepify.fast_weights import LAYERS, FastWeightLayer, FastWeightState, JetBlock, Mixer
from sleepify.fast_weights.parts import RMSNorm

FIXTURE = Path(__file__).parent / "fixtures" / "jet_nemotron"
WIDTH = 16


def make_config(rule: str, **changes: Any) -> FastWeightConfig:
    return FastWeightConfig(
        **{"rule": rule, "num_layers": 1, "num_heads": 2, "head_dim": 6, "expand_v": 1.5, **changes}
    )


def make_mixer(rule: str) -> Mixer:
    """A mixer in float64 whose every parameter matters."""
    torch.manual_seed(0)
    mixer = LAYERS[rule].from_config(make_config(rule), WIDTH).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


def make_text(batch: int, n_tokens: int) -> Tensor:
    return torch.randn(batch, n_tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_state(mixer: Mixer, batch: int) -> FastWeightState:
    """The state after some earlier text."""
    return mixer(make_text(batch, 5).flip(1))[1]


def in_pieces(module: nn.Module, x: Tensor, state: FastWeightState | None, cuts: list[int]) -> tuple[Tensor, ...]:
    outputs = []
    for piece in x.tensor_split(cuts, dim=1):
        y, state = module(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), *state


def with_grads(module: nn.Module, x: Tensor, state: FastWeightState | None, cuts: list[int]) -> tuple[list, list]:
    """Outputs and states of ``in_pieces``, and gradients of input, given state and all parameters."""
    given = [] if state is None else [part.detach().clone().requires_grad_() for part in state]
    x = x.clone().requires_grad_()
    results = in_pieces(module, x, tuple(given) or None, cuts)
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in results]
    return list(results), list(torch.autograd.grad(results, [x, *given, *module.parameters()], seeds))


@pytest.mark.parametrize("rule", LAYERS)
@pytest.mark.parametrize("from_state", [True, False])
@pytest.mark.parametrize("cuts", [[33], [1, 3, 4, 39], list(range(1, 40))], ids=["split", "ragged", "token by token"])
def test_a_text_in_pieces_is_the_whole_text(rule: str, from_state: bool, cuts: list[int]) -> None:
    mixer, x = make_mixer(rule), make_text(2, 40)
    state = make_state(mixer, 2) if from_state else None
    whole, whole_grads = with_grads(mixer, x, state, [])
    pieces, pieces_grads = with_grads(mixer, x, state, cuts)
    for name, actual, expected in zip(("output", "conv_state", "matrix"), pieces, whole, strict=True):
        assert_close(actual, expected, EXACT, name)
    names = ["input", *(["conv_state", "matrix"] if from_state else []), *(n for n, _ in mixer.named_parameters())]
    for name, actual, expected in zip(names, pieces_grads, whole_grads, strict=True):
        assert expected.abs().max() > 0, f"no gradient reaches {name}"
        assert_close(actual, expected, EXACT_GRAD, f"gradient of {name}")


@pytest.mark.parametrize("rule", LAYERS)
def test_rows_padded_on_the_right_are_as_if_alone(rule: str) -> None:
    mixer, x = make_mixer(rule), make_text(4, 37)
    state, lengths = make_state(mixer, 4), torch.tensor([37, 2, 20, 0])
    outputs, after = mixer(x, state, lengths)
    for row, length in enumerate(lengths.tolist()):
        before = [part[row : row + 1] for part in state]
        alone, last = mixer(x[row : row + 1, :length], tuple(before)) if length else (x[row : row + 1, :0], before)
        assert_close(outputs[row : row + 1, :length], alone, EXACT, f"outputs of row {row}")
        assert_close(after[0][row : row + 1], last[0], EXACT, f"conv_state of row {row}")
        assert_close(after[1][row : row + 1], last[1], EXACT, f"matrix of row {row}")
    assert torch.equal(after[1][3], state[1][3]) and torch.equal(after[0][3], state[0][3])


@pytest.mark.parametrize("rule", LAYERS)
def test_rows_padded_on_the_left_are_as_if_alone(rule: str) -> None:
    mixer, x = make_mixer(rule), make_text(3, 37)
    pads = torch.tensor([0, 35, 6])
    mask = torch.arange(37) >= pads.unsqueeze(1)
    outputs, after = mixer(x, mask=mask)
    for row, pad in enumerate(pads.tolist()):
        alone, last = mixer(x[row : row + 1, pad:])
        assert_close(outputs[row : row + 1, pad:], alone, EXACT, f"outputs of row {row}")
        assert_close(after[0][row : row + 1], last[0], EXACT, f"conv_state of row {row}")
        assert_close(after[1][row : row + 1], last[1], EXACT, f"matrix of row {row}")
    with pytest.raises(ValueError, match="not both"):
        mixer(x, lengths=pads, mask=mask)


@pytest.mark.parametrize("rule", LAYERS)
def test_a_new_layer_changes_nothing_but_its_state(rule: str) -> None:
    layer = FastWeightLayer(LAYERS[rule].from_config(make_config(rule), WIDTH), norm_eps=1e-6)
    x = make_text(2, 9).float()
    outputs, (_, matrix) = layer(x)
    assert torch.equal(outputs, x) and matrix.abs().max() > 0
    assert layer.o_proj is layer.mixer.o_proj and layer.o_proj.weight.count_nonzero() == 0
    nn.init.normal_(layer.o_proj.weight)
    assert not torch.allclose(layer(x)[0], x)
    # Only the output projection is zero, so training leaves the identity at its first step.
    layer.reset_parameters()
    layer(x)[0].square().sum().backward()
    assert layer.o_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("rule", LAYERS)
def test_initialisation_draws_from_torchs_generator_also_after_meta(rule: str) -> None:
    def build(seed: int, device: str = "cpu") -> FastWeightLayer:
        torch.manual_seed(seed)
        with torch.device(device):
            return FastWeightLayer(LAYERS[rule].from_config(make_config(rule, num_heads=64), WIDTH), 1e-6)

    layer = build(0, "meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    once = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    torch.manual_seed(3)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all() and torch.equal(parameter, once[name]), name
    for name, parameter in build(4).named_parameters():
        fixed = name in ("mixer.o_proj.weight", "norm.weight", "mixer.o_norm.weight") or "w2.weight" in name
        assert torch.equal(parameter, once[name]) == fixed, name

    mixer = layer.mixer
    decay, step = mixer.A_log.exp(), nn.functional.softplus(mixer.dt_bias)
    assert 0 < decay.min() < 2 and 14 < decay.max() <= 16
    assert 1e-3 * 0.99 < step.min() < 3e-3 and 0.03 < step.max() < 0.1 * 1.01
    assert mixer.A_log._no_weight_decay and mixer.dt_bias._no_weight_decay


@pytest.mark.parametrize("rule", LAYERS)
def test_reset_spares_what_a_checkpoint_has_filled(rule: str) -> None:
    layer = FastWeightLayer(LAYERS[rule].from_config(make_config(rule), WIDTH), 1e-6)
    layer.mixer.A_log._is_hf_initialized = True
    before = {name: parameter.detach().clone() for name, parameter in layer.mixer.named_parameters()}
    layer.reset_parameters()
    assert torch.equal(layer.mixer.A_log, before["A_log"]) and not torch.equal(layer.mixer.dt_bias, before["dt_bias"])


@pytest.mark.parametrize("rule", LAYERS)
@pytest.mark.parametrize("autocast", [True, False])
def test_the_matrix_stays_in_float32(rule: str, autocast: bool) -> None:
    exact = make_mixer(rule)
    x = make_text(2, 40)
    mixer = make_mixer(rule).to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs, (_, matrix) = mixer(x.float() if autocast else x.bfloat16())
    assert outputs.dtype == torch.bfloat16 and matrix.dtype == torch.float32
    assert mixer._log_decay(x.to(mixer.A_log.dtype)).dtype == torch.float32
    expected, (_, expected_matrix) = exact(x)
    assert (outputs.double() - expected).norm() < BFLOAT16.rtol * expected.norm()
    assert (matrix.double() - expected_matrix).norm() < BFLOAT16.rtol * expected_matrix.norm()


def test_a_value_width_that_is_not_whole_is_refused() -> None:
    assert LAYERS["gdn"].from_config(make_config("gdn", head_dim=96, expand_v=2.6666666667), 8).value_dim == 256
    with pytest.raises(ValueError, match="must be an integer"):
        LAYERS["gdn"].from_config(make_config("gdn", head_dim=96, expand_v=2.666), 8)
    with pytest.raises(ValueError, match="must be set"):
        LAYERS["jet"].from_config(make_config("jet", head_dim=None), 8)


def test_jet_block_has_the_published_parameters() -> None:
    with torch.device("meta"):
        block = JetBlock(1536, 12, 96, 2.6666666667, 4, 8, 1e-5)
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    generator = "dynamic_conv1d.kernel_generator"
    assert shapes == {
        "A_log": (12,),
        "dt_bias": (12,),
        "q_proj.weight": (1152, 1536),
        "k_proj.weight": (1152, 1536),
        "v_proj.weight": (3072, 1536),
        "g_proj.weight": (3072, 1536),
        "b_proj.weight": (12, 1536),
        "a_proj.weight": (12, 1536),
        f"{generator}.w1.weight": (384, 1536),
        f"{generator}.w2.weight": (12288, 384),
        f"{generator}.w2.bias": (12288,),
        "o_norm.weight": (256,),
        "o_proj.weight": (1536, 3072),
    }
    assert set(block.state_dict()) == set(shapes)
    assert sum(parameter.numel() for parameter in block.parameters()) == 23_052_568


def test_jet_block_computes_what_the_published_code_does() -> None:
    config = json.loads((FIXTURE / "config.json").read_text())
    weights, cases = load_file(FIXTURE / "model.safetensors"), load_file(FIXTURE / "cases.safetensors")
    jet, width = config["efficient_attention_config"]["jet"], config["hidden_size"]
    norm = RMSNorm(width, config["rms_norm_eps"])
    norm.weight.data = weights["model.layers.0.input_layernorm.weight"]
    block = JetBlock(
        width,
        jet["num_heads"],
        jet["head_dim"],
        jet["expand_v"],
        jet["conv_size"],
        jet["dconv_generator_reduction"],
        float(jet["norm_eps"]),
    )
    prefix = "model.layers.0.self_attn."
    block.load_state_dict({key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)})

    hidden = cases["hidden_row0.embed"].unsqueeze(0)
    mixed, (conv_state, matrix) = block(norm(hidden))
    assert_close(conv_state, cases["state.0.conv_state"][:1], PARITY, "conv_state")
    assert_close(matrix, cases["state.0.recurrent_state"][:1], PARITY, "recurrent_state")
    # The rest of the layer, to see the mixer's output in the published residual stream.
    hidden = hidden + mixed
    norm.weight.data = weights["model.layers.0.post_attention_layernorm.weight"]
    gate, up, down = (weights[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    x = norm(hidden)
    hidden = hidden + (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_close(hidden[0], cases["hidden_row0.layer.0"], PARITY, "hidden states after the layer")
