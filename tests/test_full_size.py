"""The published architectures at full size, on the meta device, and the script that runs them on a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import full_size
from sleepify import FastWeightConfig


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "expected"), [("jet_nemotron_2b", 1_964_806_208), ("ouro_1.4b", 1_434_652_673)])
def test_bases_have_the_published_number_of_parameters(name, expected):
    model = full_size.build(name, "meta", torch.bfloat16)
    assert parameters(model.language_model) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_jet_nemotron_loops_its_middle_half_and_gets_nothing_inserted():
    model = full_size.build("jet_nemotron_2b", "meta", torch.bfloat16, window_size=2000)
    assert model.config.loop_range == [7, 21] and len(model.fast_weights) == 0


def test_ouro_gets_six_jet_layers_of_less_than_a_tenth_of_its_size():
    model = full_size.build("ouro_1.4b", "meta", torch.bfloat16)
    assert model.config.fast_weights.rule == "jet" and len(model.fast_weights) == 6
    assert model.config.loop_range == [0, 24]
    share = parameters(model.fast_weights) / parameters(model.language_model)
    assert 0.05 < share < 0.10
    wider = full_size.build(
        "ouro_1.4b", "meta", torch.bfloat16, fast_weights=FastWeightConfig(rule="jet", num_heads=12)
    )
    assert parameters(wider.fast_weights) > parameters(model.fast_weights)


def test_the_script_runs_tiny(capsys):
    full_size.main(["--device", "cpu", "--tiny", "--tokens", "24", "--window_size", "8", "--n_loops", "2"])
    printed = capsys.readouterr().out
    assert printed.count("training step") == 2 and printed.count("gradients finite") == 2
