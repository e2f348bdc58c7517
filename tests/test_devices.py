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


@pytest.mark.parametrize("family", ["qwen3", "jet_nemotron"])
def test_rows_of_different_length_are_read_by_layers_on_two_devices(family):
    model = sleeping(family).eval()
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, past_key_values=SleepCache()).logits
    decoder = model.language_model.model
    with far_away(), torch.no_grad():
        for module in (*decoder.layers[1:], decoder.norm, model.language_model.lm_head):
            put(send(module), FAR)
        put(decoder.layers[0], "cpu")
        for index, layer in model.blocks.inserted.items():
            # No hook sees these: they are where their neighbour is.
            if index > 0:
                send(layer)
        logits = model(ids, attention_mask=mask, past_key_values=SleepCache()).logits
    assert isinstance(logits, FarTensor)
    assert_close(logits.near, expected, GROWN)
