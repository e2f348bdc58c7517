"""A base that is spread over devices, as ``device_map`` does it: what a layer is given is where the layer is."""

from __future__ import annotations

import pytest
import torch
from families import tokens
from far import FAR, FarTensor, far_away, send
from small import sleeping
from tolerances import GROWN, assert_close

from sleepify import SleepCache


def put(module, device):
    """What accelerate's hooks do before a layer is called: what it is given goes to where it is."""

    def move(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(move, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def before(_, positional, keywords):
        return move(positional), {name: move(value) for name, value in keywords.items()}

    module.register_forward_pre_hook(before, with_kwargs=True)


def spread(model):
    """All but the first layer go to another device."""
    decoder = model.language_model.model
    for module in (*decoder.layers[1:], decoder.norm, model.language_model.lm_head):
        put(send(module), FAR)
    put(decoder.layers[0], "cpu")
    for index, layer in model.blocks.inserted.items():
        # No hook sees these: they are where their neighbour is.
        if index > 0:
            send(layer)


@pytest.mark.parametrize("family", ["qwen3", "jet_nemotron"])
def test_rows_of_different_length_are_read_by_layers_on_two_devices(family):
    model = sleeping(family).eval()
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, past_key_values=SleepCache()).logits
    with far_away(), torch.no_grad():
        spread(model)
        logits = model(ids, attention_mask=mask, past_key_values=SleepCache()).logits
    assert isinstance(logits, FarTensor)
    assert_close(logits.near, expected, GROWN)


def fixed_shapes(model, ids, path):
    session = SleepCache(fixed_shapes=True)
    for piece in ids.split([6, 1, 1, 1, 4], dim=1):
        logits = model(piece, past_key_values=session).logits
    return logits


def as_many_passes_as_it_takes(model, ids, path):
    model.config.auto_threshold = 0.5
    return model(ids, past_key_values=SleepCache(), n_loops="auto").logits


def from_a_file(model, ids, path):
    """All of it lies on one device at first."""
    session = SleepCache()
    model(ids, past_key_values=session)
    session.save(path)
    session = SleepCache.load(path)
    first = torch.tensor([[1], [0]])
    model(ids[:, :1], attention_mask=first, past_key_values=session)
    return model(ids[:, :4], past_key_values=session).logits


@pytest.mark.parametrize("family", ["qwen3", "jet_nemotron", "qwen3_next"])
@pytest.mark.parametrize("read", [fixed_shapes, as_many_passes_as_it_takes, from_a_file])
def test_what_a_session_holds_is_brought_to_its_layer(family, read, tmp_path):
    model, ids = sleeping(family).eval(), tokens(2, 13)
    with torch.no_grad():
        expected = read(model, ids, tmp_path / "near")
    with far_away(), torch.no_grad():
        spread(model)
        logits = read(model, ids, tmp_path / "far")
    assert isinstance(logits, FarTensor)
    assert_close(logits.near, expected, GROWN)
