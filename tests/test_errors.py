"""Bad input: a clear error, early, and nothing touched."""

from __future__ import annotations

import pytest
import torch
from families import randomise, tiny_base, tokens
from small import sleeping

from sleepify import (
    CacheMismatchError,
    FastWeightConfig,
    NonFiniteStateError,
    SleepCache,
    SleepConfig,
    sleepify,
)


@pytest.fixture(scope="module")
def model():
    return sleeping(n_loops=2, window_size=4)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"n_loops": 0}, "n_loops.*at least 1.*0"),
        ({"n_loops": 2.5}, "n_loops.*2.5"),
        ({"n_loops": True}, "n_loops.*True"),
        ({"window_size": 0}, "window_size.*at least 1"),
        ({"window_size": 129}, "window_size.*128.*129"),
        ({"loop_range": (2, 9)}, "loop_range.*4 layers.*(2, 9)"),
        ({"loop_range": (2, 2)}, "loop_range"),
        ({"loop_range": (-1, 2)}, "loop_range"),
        ({"loop_range": (3, 4), "fast_weights": FastWeightConfig(layers=[0])}, "at least one fast-weight layer"),
        ({"fast_weights": FastWeightConfig(num_layers=0)}, "at least one fast-weight layer"),
        ({"fast_weights": FastWeightConfig(layers=[4])}, "layers.*0 to 3"),
        ({"fast_weights": {"rule": "hebb"}}, "rule.*gdn.*hebb"),
        ({"fast_weights": {"heads": 2}}, "heads"),
        ({"eviction": "soft"}, "eviction.*hard, sliding.*soft"),
        ({"checkpoint": "layer"}, "checkpoint.*none, window, loop"),
        ({"backprop_loops": 0}, "backprop_loops"),
        ({"backprop_windows": -1}, "backprop_windows"),
    ],
)
def test_settings(keywords, words):
    base = tiny_base("qwen3")
    before, config = {name: p.clone() for name, p in base.state_dict().items()}, base.config.to_dict()
    with pytest.raises(ValueError, match=words):
        sleepify(base, **keywords)
    assert base.config.to_dict() == config and base.config._attn_implementation == "sdpa"
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())


def test_unknown_keywords_and_models(model):
    with pytest.raises(TypeError, match="loops.*n_loops"):
        sleepify(tiny_base("qwen3"), loops=3)
    with pytest.raises(TypeError, match="both"):
        sleepify(tiny_base("qwen3"), config=SleepConfig(), n_loops=3)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        sleepify(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="sleeps already"):
        sleepify(model)
    with pytest.raises(ValueError, match="n_loops"):
        sleepify("no/such-model", n_loops=0)  # said before anything is fetched


def test_per_call_loops(model):
    for call in (
        lambda n: model(tokens(1, 9), n_loops=n),
        lambda n: model.generate(tokens(1, 9), n_loops=n, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="n_loops"):
            call(0)


def test_shapes(model):
    ids = tokens(2, 9)
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 9\).*\(2, 8\)"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"labels.*\(2, 9\).*\(2, 8\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="input_ids"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="input_ids"):
        model(ids.float())
    mask = torch.ones(2, 9)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        model(ids, attention_mask=mask)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 3\) or \(2, 12\).*\(2, 5\)"):
        model(ids[:, :3], attention_mask=torch.ones(2, 5), past_key_values=cache)


def test_a_cache_of_another_model_or_batch(model):
    cache = model(tokens(2, 9)).past_key_values
    with pytest.raises(CacheMismatchError, match="2 rows.*3"):
        model(tokens(3, 2), past_key_values=cache)
    other = sleepify(tiny_base("qwen2"), window_size=4)
    with pytest.raises(CacheMismatchError, match="another"):
        other(tokens(2, 2), past_key_values=cache)
    other_window = sleepify(tiny_base("qwen3"), window_size=6, fast_weights=FastWeightConfig(layers=[0, 2]))
    with pytest.raises(CacheMismatchError, match="L=6.*L=4"):
        other_window.sleep(cache)
    with pytest.raises(ValueError, match="empty"):
        model.sleep(SleepCache())
    # Refused calls leave the session as it was.
    assert cache.seen == [9, 9] and torch.isfinite(model(tokens(2, 2), past_key_values=cache).logits).all()


def test_half_precision_state_is_refused(model):
    cache = model(tokens(1, 9)).past_key_values
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="float32"):
            cache.to(dtype=dtype)
    assert cache.to("cpu") is cache


def test_nan_in_the_state_names_layer_and_window():
    model = sleepify(
        tiny_base("qwen3"), n_loops=1, window_size=4, fast_weights=FastWeightConfig(layers=[0, 2]), check_finite=True
    )
    randomise(model.fast_weights)
    ids = tokens(1, 14)
    model(ids)
    model.fast_weights[1].mixer.v_proj.weight.data[0, 0] = float("nan")
    cache = SleepCache()
    with pytest.raises(NonFiniteStateError, match="inserted after base layer 2, window 0") as error:
        model(ids, past_key_values=cache)
    assert (error.value.layer, error.value.window) == (2, 0)
    model.config.check_finite = False
    model(ids)


def test_a_failed_call_can_be_repeated(model):
    """Whatever is refused is refused before the session moves."""
    cache = model(tokens(1, 6)).past_key_values
    untouched = cache.clone()
    with pytest.raises(ValueError, match="labels"):
        model(tokens(1, 3), past_key_values=cache, labels=tokens(1, 2))
    again = model(tokens(1, 3), past_key_values=cache).logits
    assert torch.equal(again, model(tokens(1, 3), past_key_values=untouched).logits)


def test_inserted_layers_changed_in_a_live_configuration_are_noticed(model):
    inserted = model.config.fast_weights
    model.options()
    for value in (FastWeightConfig(layers=[3]), None, "gdn"):
        model.config.fast_weights = value
        with pytest.raises(ValueError, match="fast_weights as they were inserted"):
            model(tokens(1, 3))
    model.config.fast_weights = inserted
    model(tokens(1, 3))


@pytest.mark.parametrize("count", ["many", [3], torch.tensor([1, 2]), float("inf"), float("nan"), 0])
def test_a_loss_is_divided_by_one_number_above_zero(model, count):
    with pytest.raises((TypeError, ValueError), match="expected num_items_in_batch"):
        model(tokens(1, 3), labels=tokens(1, 3), num_items_in_batch=count)


def test_a_setting_of_another_type_is_not_taken_for_the_one_before(model):
    for name, valid, other in (("loop_range", [1, 3], [True, 3]), ("n_loops", 1, True)):
        before = getattr(model.config, name)
        setattr(model.config, name, valid)
        model(tokens(1, 3))
        setattr(model.config, name, other)
        with pytest.raises(ValueError, match=name):
            model(tokens(1, 3))
        setattr(model.config, name, before)
