"""The simulator of docs/scale.md: its arithmetic against the models themselves, and what must hold of it anyway."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import NORMS_SHARE, RULE_SHARE

from benchmarks import full_size, models, scale
from sleepify import sleep as algorithm
from sleepify.schedule import cost, passes, schedule
from sleepify.snapshot import Snapshot

NAMES = ("ouro_1.4b", "jet_nemotron_2b")
CARD = scale.Card()


@pytest.fixture(scope="module")
def counted():
    """The models at full size, without memory."""
    return {name: full_size.build(name, "meta", torch.bfloat16) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_model(counted, name):
    exact = sum(p.numel() for p in counted[name].parameters())
    assert scale.SHAPES[name].parameters == pytest.approx(exact, rel=NORMS_SHARE)  # norms and biases apart


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_loops", [1, 3])
def test_operations_are_those_that_are_counted(counted, name, n_loops):
    """Attention weighs little in a window of 512, and the rule's own products in PyTorch are a little other."""
    ours = scale.SHAPES[name].forward_operations(512 + 60, 512, n_loops)
    assert ours == pytest.approx(models._count_forward(counted[name], 512 + 60, 512, n_loops), rel=RULE_SHARE)


@pytest.mark.parametrize("name", NAMES)
def test_a_sessions_bytes_are_those_of_a_session(counted, name):
    model, shape, window = counted[name], scale.SHAPES[name], 16
    options = replace(model.options(1), window_size=window)
    ids = torch.zeros(1, window + 5, dtype=torch.long, device="meta")
    rounds = schedule([0], [window + 5], np.ones((1, window + 5), dtype=bool), window, keep=True).rounds
    empty = Snapshot.empty("counted", 1, window, ids.device)
    session, _ = algorithm.read(model.blocks, empty, ids, rounds, options, keep=True)
    state = sum(x.nbytes for layer in session.at_start.values() for x in layer if x is not None)
    assert shape.state_bytes == state
    assert shape.key_bytes(5) == sum(x.nbytes for pair in session.memory.kv.values() for x in pair)


@pytest.mark.parametrize("name", scale.SHAPES)
@pytest.mark.parametrize("tokens", [12_000, 128_000])
def test_passes_are_those_of_the_schedule(name, tokens):
    """With every layer at the price of one, the operations are `sleepify.schedule.cost`."""
    shape, window = scale.SHAPES[name], 2048

    class Flat(scale.Shape):
        def layer_operations(self, index, window):
            return 1

    flat = Flat(**{**vars(shape), "vocabulary": 0})
    inside = passes(shape.n_loops, shape.loop, shape.last_writer)
    expected = cost(shape.plan(tokens, window).rounds, window, inside, shape.n_layers)
    assert flat.forward_operations(tokens, window, shape.n_loops) == expected


def test_the_figures_counted_on_ouro():
    figures = scale.check().figures
    for ours in figures.values():
        assert ours["ours"] == pytest.approx(ours["counted"], rel=RULE_SHARE)


@pytest.mark.parametrize("name", scale.SHAPES)
def test_what_must_hold_of_any_model(name):
    shape, window = scale.SHAPES[name], 2048
    way = scale.Way(64, 1, 8)
    few, many = (scale.memory_of(shape, way, tokens, window) for tokens in (12_000, 1_000_000))
    boundaries = 1_000_000 // window - 12_000 // window
    assert many - few == pytest.approx(boundaries * (shape.state_bytes + 8 * window))
    for tokens in scale.TEXTS:
        speeds = []
        for gpus in scale.GPUS:
            chosen = scale.choose(CARD, shape, gpus, tokens, window)
            if chosen is None:
                assert not speeds, "what fits on few fits on many"
                continue
            assert scale.memory_of(shape, chosen, tokens, window) <= CARD.memory
            assert chosen.tensor <= CARD.machine and chosen.gpus == gpus
            seconds = scale.step_seconds(CARD, shape, chosen, tokens, window)
            least = 4 * shape.forward_operations(tokens, window, shape.n_loops) / (CARD.speed * chosen.tensor)
            assert seconds >= least, "windows and loops are one after the other, however many GPUs there are"
            speeds.append(chosen.rows * tokens / seconds / gpus)
        assert speeds and max(speeds) <= 1.01 * speeds[0], "more GPUs make no GPU faster"
    figures = scale.serving(CARD, shape, window).figures
    tokens = [figures[str(tokens)] for tokens in scale.TEXTS]
    assert len({each["token"] for each in tokens}) == 1
    assert tokens[0]["base"] < tokens[1]["base"] < tokens[2]["base"]
    one, two = (shape.sleep_operations(window, n) for n in (2, 4))
    assert 1.4 < two / one <= 2.1


def test_the_page_is_what_the_command_makes():
    page = (scale.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for part in scale.parts_of(CARD, 2048):
        assert part.intro in page
        for row in part.rows:
            assert "| " + " | ".join(row) + " |" in page
