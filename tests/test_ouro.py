"""Ouro against the published code's tensors (tests/fixtures/ouro), and against itself in other shapes."""

from pathlib import Path

import pytest
import torch
from published import (
    check_cache_changes_nothing_drawn,
    check_code_is_not_run,
    check_rows_are_generated_as_alone,
    check_saved_as_published,
    left_padded,
)
from safetensors.torch import load_file
from tolerances import EXACT, PARITY, assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from sleepify.models import OuroConfig, OuroForCausalLM, OuroModel
from sleepify.models.ouro import OuroRMSNorm

FIXTURE = Path(__file__).parent / "fixtures" / "ouro"
CASES = load_file(FIXTURE / "cases.safetensors")
N_LAYERS, N_LOOPS = 3, 4


def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained(FIXTURE, **kwargs).eval()


@pytest.fixture(scope="module")
def model():
    return load(attn_implementation="eager")


def small(seed=0, dtype=torch.float64, attention="sdpa", **overrides):
    shape = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "total_ut_steps": 3,
        "initializer_range": 0.2,
        **overrides,
    }
    torch.manual_seed(seed)
    config = OuroConfig(**shape, attn_implementation=attention)
    return OuroForCausalLM(config).to(dtype).eval()


# ---- files


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}])
def test_published_files_load_and_their_code_is_not_run(tmp_path, kwargs):
    check_code_is_not_run(FIXTURE, tmp_path, kwargs, (OuroConfig, OuroModel, OuroForCausalLM))


def test_save_and_load_give_the_same_model_and_the_published_keys(tmp_path, model):
    config = check_saved_as_published(FIXTURE, tmp_path, model, CASES["input_ids"])
    assert (config["total_ut_steps"], config["early_exit_threshold"], config["head_dim"]) == (4, 1.0, 16)


@pytest.mark.parametrize(("n_layers", "n_parameters", "n_tensors"), [(24, 1434652673, 269), (48, 2667974657, 533)])
def test_published_sizes(n_layers, n_parameters, n_tensors):
    config = OuroConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
    )
    with torch.device("meta"):
        tensors = OuroForCausalLM(config).state_dict()
    assert (sum(tensor.numel() for tensor in tensors.values()), len(tensors)) == (n_parameters, n_tensors)
    layer = f"model.layers.{n_layers - 1}."
    expected = {
        "model.embed_tokens.weight": (49152, 2048),
        "model.early_exit_gate.weight": (1, 2048),
        "model.early_exit_gate.bias": (1,),
        "lm_head.weight": (49152, 2048),
        layer + "self_attn.o_proj.weight": (2048, 2048),
        layer + "mlp.down_proj.weight": (2048, 5632),
        layer + "post_attention_layernorm_2.weight": (2048,),
    }
    assert {key: tuple(tensors[key].shape) for key in expected} == expected


def test_config_refuses_what_no_ouro_is():
    with pytest.raises(ValueError, match="total_ut_steps must be at least 1, got 0"):
        OuroConfig(total_ut_steps=0)
    with pytest.raises(ValueError, match="Ouro attends fully"):
        OuroConfig(use_sliding_window=True)
    with pytest.raises(ValueError, match="sliding_attention"):
        OuroConfig(num_hidden_layers=1, layer_types=["sliding_attention"])


# ---- the recurrence and the exit rules


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("n_loops", [1, 2, 3, 4])
def test_every_number_of_passes(n_loops, attention):
    model = load(total_ut_steps=n_loops, attn_implementation=attention)
    assert_close(model(CASES["input_ids"]).logits, CASES[f"u{n_loops}.logits"], PARITY, f"{n_loops} passes")


@torch.no_grad()
def test_states_gates_and_exit_distribution(model):
    loops = model.model(CASES["input_ids"], output_loop_states=True).loop_hidden_states
    assert len(loops) == N_LOOPS
    for t, state in enumerate(loops):
        assert_close(state, CASES[f"hidden.step{t}"], PARITY, f"state {t}")
        assert_close(model.model.early_exit_gate(state), CASES[f"gate.step{t}"], PARITY, f"gate {t}")
    pdf = model.model.exit_distribution(loops)
    assert_close(pdf, CASES["exit_pdf"], PARITY, "exit distribution")
    assert_close(pdf.sum(-1), torch.ones(2, 32), PARITY, "its sum")
    assert torch.equal(model.model.exit_steps(loops, 0.6), CASES["threshold0.6.exit_steps"])


@torch.no_grad()
def test_exit_rules_in_their_order(model):
    ids = CASES["input_ids"]

    def logits(**kwargs):
        return model(ids, **kwargs).logits

    for k in range(N_LOOPS):
        got = logits(exit_at_step=k, exit_threshold=0.6, use_weighted_exit=True)
        assert_close(got, CASES[f"exit_at_step{k}.logits"], PARITY, f"step {k} goes first")
    by_threshold = logits(exit_threshold=0.6, use_weighted_exit=True)
    assert_close(by_threshold, CASES["threshold0.6.logits"], PARITY, "threshold goes before the weights")
    for outside in (-1, N_LOOPS):
        assert torch.equal(logits(exit_at_step=outside, exit_threshold=0.6), by_threshold)
    assert_close(logits(exit_threshold=0), CASES["exit_at_step0.logits"], PARITY, "threshold 0 is the first pass")
    assert_close(logits(use_weighted_exit=True), CASES["u4.logits"], PARITY, "the config's threshold 1 is the last")
    keep = logits(exit_threshold=0.6, logits_to_keep=3)
    assert_close(keep, CASES["threshold0.6.logits"][:, -3:], PARITY, "kept logits")
    chosen = logits(exit_at_step=1, logits_to_keep=torch.tensor([0, 7]))
    assert_close(chosen, CASES["exit_at_step1.logits"][:, [0, 7]], PARITY, "chosen logits")


@torch.no_grad()
def test_exit_rules_from_the_config_at_call_time():
    model = load()
    model.config.early_exit_threshold = None
    assert_close(model(CASES["input_ids"], use_weighted_exit=True).logits, CASES["weighted.logits"], PARITY, "weighted")
    assert_close(model(CASES["input_ids"]).logits, CASES["u4.logits"], PARITY, "no rule: the last pass")
    model.config.early_exit_step = 2
    assert_close(model(CASES["input_ids"]).logits, CASES["exit_at_step2.logits"], PARITY, "early_exit_step")
    model.config.total_ut_steps = 2
    assert_close(model(CASES["input_ids"]).logits, CASES["u2.logits"], PARITY, "fewer passes")


@torch.no_grad()
def test_threshold_one_is_the_last_pass_in_bfloat16():
    model = load(dtype=torch.bfloat16)
    model.model.early_exit_gate.bias.fill_(20.0)  # sigmoid rounds to 1 even in float32
    last = model(CASES["input_ids"], exit_at_step=N_LOOPS - 1).logits
    assert torch.equal(model(CASES["input_ids"]).logits, last)
    assert not torch.equal(model(CASES["input_ids"], exit_threshold=0.999).logits, last)
    loops = model.model(CASES["input_ids"], output_loop_states=True).loop_hidden_states
    assert (model.model.exit_steps(loops, 1.0) == N_LOOPS - 1).all()


# ---- loss and gradients


def test_loss_and_every_gradient():
    model = load(attn_implementation="eager").train()
    out = model(CASES["input_ids"], labels=CASES["labels"], use_cache=False, exit_at_step=0)
    assert_close(out.loss.detach(), CASES["loss"][0], PARITY, "loss")
    assert_close(out.logits.detach(), CASES["loss.logits"], PARITY, "expected logits")
    out.loss.backward()
    gradients = {key[5:]: value for key, value in CASES.items() if key.startswith("grad.")}
    assert len(gradients) == 13
    parameters = dict(model.named_parameters())
    for name, expected in gradients.items():
        error = (parameters[name].grad - expected).norm() / expected.norm()
        assert_close(error, torch.tensor(0.0), PARITY, f"gradient of {name}, relative norm")


@torch.no_grad()
def test_loss_over_a_given_number_of_items(model):
    labels = CASES["labels"]
    n_kept = (labels[:, 1:] != -100).sum()
    loss = model(CASES["input_ids"], labels=labels, num_items_in_batch=n_kept * 2).loss
    assert_close(loss * 2, CASES["loss"][0], PARITY, "loss")


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(22).view(2, 11)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# ---- cache, padding, generation


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [lambda: None, lambda: DynamicCache()], ids=["own", "given"])
def test_cached_decoding_and_its_slots(model, make_cache):
    ids = CASES["input_ids"]
    out = model(ids[:, :20], past_key_values=make_cache(), use_cache=True)
    assert_close(out.logits, CASES["cached.prefill_logits"], PARITY, "prefill")
    cache = out.past_key_values
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 32)]
    assert_close(torch.cat(steps, 1), CASES["cached.decode_logits"], PARITY, "decoding")
    assert len(cache.layers) == N_LAYERS * N_LOOPS
    for slot in (0, N_LAYERS + 1, N_LAYERS * N_LOOPS - 1):
        assert_close(cache.layers[slot].keys, CASES[f"cached.key.slot{slot}"], PARITY, f"keys of slot {slot}")
        assert_close(cache.layers[slot].values, CASES[f"cached.value.slot{slot}"], PARITY, f"values of slot {slot}")


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_batch_and_its_decoding(attention):
    model = load(attn_implementation=attention)
    ids, mask, positions = (CASES[f"padded.{name}"] for name in ("input_ids", "attention_mask", "position_ids"))
    real = mask.bool()
    assert_close(model(ids, mask).logits[real], CASES["padded.logits"][real], PARITY, "positions 0..23")
    out = model(ids, mask, position_ids=positions, use_cache=True)
    assert_close(out.logits[real], CASES["padded.logits_position_ids"][real], PARITY, "positions by mask")
    following = {name: CASES[f"padded_cached.{name}"] for name in ("next_ids", "attention_mask", "position_ids")}
    for t in range(4):
        step = model(
            following["next_ids"][:, t : t + 1],
            following["attention_mask"][:, : 25 + t],
            position_ids=following["position_ids"][:, 24 + t : 25 + t],
            past_key_values=out.past_key_values,
        )
        assert_close(step.logits[:, 0], CASES["padded_cached.decode_logits"][:, t], PARITY, f"step {t}")


@torch.no_grad()
def test_padded_decoding_in_one_chunk(model):
    ids, mask, positions = (CASES[f"padded.{name}"] for name in ("input_ids", "attention_mask", "position_ids"))
    cache = model(ids, mask, position_ids=positions, use_cache=True).past_key_values
    next_ids, mask, positions = (CASES[f"padded_cached.{n}"] for n in ("next_ids", "attention_mask", "position_ids"))
    out = model(next_ids, mask, position_ids=positions[:, 24:], past_key_values=cache)
    assert_close(out.logits, CASES["padded_cached.decode_logits"], PARITY, "chunk")


@pytest.mark.parametrize("cache_kind", [None, "static"])
def test_greedy_generation(model, cache_kind):
    tokens = model.generate(
        CASES["greedy.prompt"], max_new_tokens=12, min_new_tokens=12, do_sample=False, cache_implementation=cache_kind
    )
    assert torch.equal(tokens[:, 8:], CASES["greedy.tokens"])


def test_generation_of_left_padded_rows_is_that_of_each_row():
    check_rows_are_generated_as_alone(small(dtype=torch.float32), exit_threshold=0.7)


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3}])
def test_sampling_and_beams_do_not_depend_on_the_cache(settings):
    check_cache_changes_nothing_drawn(small(), **settings)


@torch.no_grad()
def test_a_cache_of_other_passes_is_refused():
    model, ids = small(), torch.arange(8)[None]
    cache = model(ids, use_cache=True).past_key_values
    model.config.total_ut_steps = 4
    with pytest.raises(ValueError, match="was not filled by 4 passes over 2 layers"):
        model(ids, past_key_values=cache)
    model.config.total_ut_steps = 2
    model(ids, past_key_values=cache)  # the two first passes are all there
    model.config.total_ut_steps = 3
    with pytest.raises(ValueError, match="was not filled by 3 passes over 2 layers"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


# ---- other shapes, and the parts that sleepify drives itself


SHAPES = {
    "grouped": {},
    "one kv head, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "one pass": {"total_ut_steps": 1, "num_key_value_heads": 4},
    "five passes, tied": {"total_ut_steps": 5, "tie_word_embeddings": True},
    "eps, theta": {"rms_norm_eps": 1e-3, "rope_theta": 100.0},
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whole_is_split(shape):
    model = small(**shape)
    ids, mask = left_padded((23, 15), 37)
    whole = model(ids, mask, exit_threshold=0.5).logits
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in (9, 1, 1, 5, 7):
        stop = start + size
        out = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache, exit_threshold=0.5)
        parts.append(out.logits)
        start = stop
    assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], EXACT, "split")
    alone = model(ids[1:, 8:], exit_threshold=0.5).logits
    # Positions differ by the padding: rotary angles are float32, so only their difference is the same.
    assert_close(whole[1:, 8:], alone, PARITY, "a padded row is the row")


@torch.no_grad()
def test_eager_is_sdpa():
    ids, mask = left_padded((23, 15), 37)
    eager, sdpa = (small(dtype=torch.float32, attention=name)(ids, mask).logits for name in ("eager", "sdpa"))
    assert_close(eager[mask.bool()], sdpa[mask.bool()], PARITY, "eager and sdpa")


@torch.no_grad()
def test_hidden_states_and_attentions(model):
    ids = CASES["input_ids"]
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == N_LAYERS * N_LOOPS + 1
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    first = model.model.norm(out.hidden_states[N_LAYERS])
    assert_close(first, CASES["hidden.step0"], PARITY, "after the first pass, before its norm")
    assert_close(out.hidden_states[-1], CASES[f"hidden.step{N_LOOPS - 1}"], PARITY, "after all passes, normalised")
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 32, 32)] * (N_LAYERS * N_LOOPS)


@torch.no_grad()
def test_layers_called_by_hand_use_their_own_slot(model):
    decoder, ids = model.model, CASES["input_ids"]
    hidden, cache = decoder.embed_tokens(ids), DynamicCache()
    positions = torch.arange(32)[None]
    mask = torch.full((32, 32), torch.finfo(torch.float32).min).triu(1)[None, None]
    for i, layer in enumerate(decoder.layers):
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=decoder.rotary_emb(hidden, positions),
        )
        assert len(cache.layers) == i + 1
    assert_close(model.lm_head(decoder.norm(hidden)), CASES["u1.logits"], PARITY, "one pass by hand")


def test_norm_casts_before_the_weight_and_keeps_float64():
    norm = OuroRMSNorm(64, 1e-6).to(torch.bfloat16)
    torch.manual_seed(0)
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), norm.weight * unit.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * unit).bfloat16())
    x = torch.randn(4, 64, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert_close(norm.double()(x), expected, EXACT, "float64")
