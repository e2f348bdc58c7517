"""Every family of hosts: N = 1 is the base (contract 4), a negative control, and the contract where it can go wrong."""

from __future__ import annotations

import gc

import pytest
import small
import torch
from families import FAMILIES, HYBRID, randomise, tiny_base, tokens, true_float64
from tolerances import EXACT, EXACT_GRAD, FLOAT32, assert_close
from transformers import AutoModelForCausalLM, GPT2Config, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sleepify import FastWeightConfig, SleepCache, UnsupportedModelError, sleepify
from sleepify import hosts as hosts_module
from sleepify.memory import Memory


@pytest.fixture
def exactly():
    with true_float64():
        yield


def base_logits(base, family, ids, **keywords):
    """The base's own logits; Ouro is slept at one step awake, so at one step it is compared."""
    if family == "ouro":
        keywords["exit_at_step"] = 0
    with torch.no_grad():
        return base(ids, use_cache=False, **keywords).logits


def sleeping(family, **keywords):
    return small.sleeping(family, **({"window_size": 4, "fast_weights": None} | keywords))


def test_every_listed_family_has_a_row():
    assert set(FAMILIES) == set(hosts_module.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_within_the_window_is_the_base(family, exactly):
    base, ids = tiny_base(family), tokens(2, 11)
    expected = base_logits(base, family, ids)
    model = sleepify(base, n_loops=1, window_size=11)
    assert len(model.fast_weights) == (0 if family in HYBRID else 1)
    assert_close(model(ids).logits, expected, EXACT, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_control(family, exactly):
    """A driver that ignored the loops, the inserted layers or the eviction would pass the test above."""
    ids = tokens(2, 11)
    expected = base_logits(tiny_base(family), family, ids)
    plain = sleepify(tiny_base(family), n_loops=1, window_size=4)
    thrice = plain(ids, n_loops=3).logits
    with torch.no_grad():
        assert (plain(ids).logits[:, 4:] - expected[:, 4:]).abs().max() > 1e-2, "eviction changes nothing"
        if family in HYBRID:
            assert (thrice[:, 4:] - plain(ids).logits[:, 4:]).abs().max() > 1e-2, "three loops change nothing"
        inserted = sleepify(tiny_base(family), n_loops=1, window_size=11, fast_weights=FastWeightConfig(layers=[1, 2]))
        same = inserted(ids).logits
        assert_close(same, expected, EXACT, "at its start")
        randomise(inserted.fast_weights)
        assert (inserted(ids).logits - expected).abs().max() > 1e-2, "inserted layers change nothing"
        inserted.config.window_size = 4
        assert (inserted(ids, n_loops=3).logits - inserted(ids).logits).abs().max() > 1e-2, "loops change nothing"


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_in_any_way_and_padded_in_any_way(family, eviction, exactly):
    model = sleeping(family, eviction=eviction)
    lengths = (11, 7, 4)
    ids, mask = torch.zeros(2, 3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 11 - length :], mask[row, 11 - length :] = tokens(1, length, seed=row)[0], 1
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        following = tokens(3, 6, seed=9)
        continued = model(following, past_key_values=together.past_key_values).logits
        for row, length in enumerate(lengths):
            cache = SleepCache()
            alone = tokens(1, length, seed=row)
            pieces = [model(piece, past_key_values=cache).logits for piece in alone.split([1, length - 2, 1], dim=1)]
            assert_close(together.logits[row, 11 - length :], torch.cat(pieces, 1)[0], EXACT, f"row {row}")
            after = [model(following[row : row + 1, t : t + 1], past_key_values=cache).logits for t in range(6)]
            assert_close(continued[row], torch.cat(after, 1)[0], EXACT, f"row {row} continued")


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "jet_nemotron"])
def test_a_base_of_recurrent_layers_alone_goes_on_where_nothing_is_evicted(family, exactly):
    base, ids = tiny_base(family, layer_types=["linear_attention"] * 4), tokens(2, 11)
    expected = base_logits(base, family, ids)
    assert_close(sleepify(base, n_loops=1, window_size=4)(ids).logits, expected, EXACT, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_generates(family):
    model = sleeping(family).to(torch.float32).train()
    ids = tokens(2, 11)
    loss = model(ids, labels=ids).loss
    loss.backward()
    missing = [
        name
        for name, p in model.named_parameters()
        # The gate of early exit has no part in a slept Ouro, and experts only in what they are routed.
        if p.grad is None and "early_exit_gate" not in name and "expert" not in name
    ]
    assert loss.isfinite() and not missing
    out = model.eval().generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    greedy = ids
    for _ in range(6):
        with torch.no_grad():
            greedy = torch.cat([greedy, model(greedy, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_waits_for_pythons_collector(family):
    """A tensor in a cycle of references stays until Python happens to look: windows of activations, on a GPU."""
    model = sleeping(family, checkpoint="window").to(torch.float32).train()
    model.gradient_checkpointing_enable()
    ids = tokens(2, 11)
    model(ids, labels=ids).loss.backward()  # what is made once and kept
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        model(ids, labels=ids).loss.backward()
        gc.collect()
        left = [type(thing).__name__ for thing in gc.garbage if isinstance(thing, torch.Tensor | SleepCache | Memory)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


def test_bfloat16_keeps_its_state_in_float32():
    for family in ("qwen3", "jet_nemotron", "qwen3_next", "bamba"):
        model = sleeping(family).to(torch.bfloat16)
        with torch.no_grad():
            cache = model(tokens(1, 10)).past_key_values
            model(tokens(1, 1), past_key_values=cache)
        assert {layer.recurrent.dtype for layer in cache.memory.state.values()} == {torch.float32}


LENGTHENED = {
    "phi3": {
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 3.1, 3.2],
            "factor": 4.0,
            "original_max_position_embeddings": 12,
            "partial_rotary_factor": 1.0,
        },
    },
    "llama": {
        "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize("family", LENGTHENED)
def test_positions_past_what_a_base_was_trained_on_rotate_no_row_and_no_piece_otherwise(family):
    """transformers makes the tables of a whole call from its longest position, and some keep them."""
    with true_float64():
        model = small.sleeping(tiny_base(family, **LENGTHENED[family]), window_size=8, eviction="sliding")
        ids, session = tokens(1, 30), SleepCache()
        with torch.no_grad():
            whole = model(ids).logits
            pieces = [model(piece, past_key_values=session).logits for piece in ids.split([11, 1, 1, 17], dim=1)]
            assert_close(torch.cat(pieces, 1), whole, EXACT, "in pieces")
            short = torch.zeros_like(ids).index_copy(1, torch.arange(21, 30), ids[:, :9])
            mask = torch.ones(2, 30, dtype=torch.long).index_fill(1, torch.arange(21), 0)
            mask[1] = 1
            together = model(torch.cat([short, ids]), attention_mask=mask).logits
            assert_close(together[0, 21:], model(ids[:, :9]).logits[0], EXACT, "beside a longer row")
        gradients = []
        for model.config.checkpoint in ("none", "window"):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert_close(gradients[1], gradients[0], EXACT_GRAD, "recomputed")
        assert small.sleeping(tiny_base(family, **LENGTHENED[family]), window_size=None).options().window_size == 12
        with pytest.raises(ValueError, match="window_size to be at most 12"):
            small.sleeping(tiny_base(family, **LENGTHENED[family]), window_size=13)


# --- families that are not listed


def unlisted(name, **changes):
    common = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**(common | changes))).eval()


@pytest.mark.parametrize("name", ["granite", "cohere", "starcoder2", "olmo3"])
def test_an_unlisted_family_of_the_convention_works(name):
    changes = {"granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0}, "cohere": {"logit_scale": 0.3}}
    base, ids = unlisted(name, **changes.get(name, {})), tokens(2, 9)
    with torch.no_grad():
        expected = base(ids).logits
        model = sleepify(base, n_loops=1, window_size=9)
        assert_close(model(ids).logits, expected, FLOAT32, name)


def test_a_family_that_does_more_around_its_layers_is_refused():
    """A factor between embedding and layers that the driver does not know: never silently wrong."""
    base = unlisted("granite")
    forward = type(base.model.rotary_emb).forward
    base.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] * 1.5,) if base.model.own else None)
    base.model.own = False
    original = base.model.forward

    def own_forward(*args, **kwargs):
        base.model.own = True
        try:
            return original(*args, **kwargs)
        finally:
            base.model.own = False

    base.model.forward = own_forward
    with pytest.raises(UnsupportedModelError, match="convention"):
        sleepify(base)
    assert type(base.model.rotary_emb).forward is forward


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97), "layers"),
        (CONFIG_MAPPING["bloom"](n_layer=2, hidden_size=32, n_head=2, vocab_size=97), "layers"),
    ],
)
def test_a_base_without_the_parts_is_refused_by_name(config, missing):
    with pytest.raises(UnsupportedModelError, match=missing):
        sleepify(AutoModelForCausalLM.from_config(config))


def test_an_encoder_decoder_is_refused():
    from transformers import T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=97)
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        sleepify(T5ForConditionalGeneration(config))


def test_flash_linear_attention_without_a_gpu_is_said_clearly(monkeypatch):
    """With it installed transformers' recurrent layers reach Triton on a CPU too, and fail with Triton's words."""
    base = tiny_base("qwen3_next")

    def triton(*_, **__):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(type(base.model.layers[0].linear_attn), "forward", triton)
    with pytest.raises(UnsupportedModelError, match="flash-linear-attention"):
        sleepify(base)
