"""Jet-Nemotron against the published code's tensors (tests/fixtures/jet_nemotron), and against itself."""

import json
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
from tolerances import EXACT, EXACT_GRAD, PARITY, assert_close
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sleepify.models import JetNemotronConfig, JetNemotronForCausalLM, JetNemotronModel

FIXTURE = Path(__file__).parent / "fixtures" / "jet_nemotron"
CASES = load_file(FIXTURE / "cases.safetensors")
JET_LAYERS = (0, 1, 3, 5)
WINDOW_8 = {"efficient_attention_config": {"swa": {"window_size": 8}}}
# fields of the config and of its "jet" block, window, parameters, tensors, an attention layer, and for the first jet
# layer: heads, key width, value width, generator width, model width
PUBLISHED = {
    "2B": (
        {"layer_types": str([{14: "attn", 19: "attn", 20: "swa", 21: "swa"}.get(i, "jet") for i in range(28)])},
        {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667},
        (1152, 1964806208, 483, 14, (12, 1152, 3072, 384, 1536)),
    ),
    "4B": (
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "layer_types": [
                {17: "attn", 20: "attn", 32: "attn"}.get(i, "swa" if i in (5, 16, 19, 21, 22, 25, 27) else "jet")
                for i in range(36)
            ],
        },
        {"num_heads": 16, "head_dim": 128, "expand_v": 2},
        (2048, 3960424768, 591, 17, (16, 2048, 4096, 512, 2048)),
    ),
}


def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained(FIXTURE, **kwargs).eval()


@pytest.fixture(scope="module")
def model():
    return load(attn_implementation="eager")


def small(seed=0, dtype=torch.float64, attention="sdpa", jet=(), **overrides):
    shape = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "layer_types": ["jet", "swa", "jet", "attn"],
        "initializer_range": 0.2,
        **overrides,
    }
    jet = {"num_heads": 3, "head_dim": 4, "expand_v": 2, "dconv_generator_reduction": 2, **dict(jet)}
    torch.manual_seed(seed)
    efficient = {"jet": jet, "swa": {"window_size": 5}}
    config = JetNemotronConfig(**shape, efficient_attention_config=efficient, attn_implementation=attention)
    model = JetNemotronForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "kernel_generator" in name:  # starts as an almost static, weak kernel: too little to see mistakes by
            torch.nn.init.normal_(parameter, std=0.5)
    return model


# ---- files and configuration


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}])
def test_published_files_load_and_their_code_is_not_run(tmp_path, kwargs):
    check_code_is_not_run(FIXTURE, tmp_path, kwargs, (JetNemotronConfig, JetNemotronModel, JetNemotronForCausalLM))


def test_save_and_load_give_the_same_model_and_the_published_keys(tmp_path, model):
    config = check_saved_as_published(FIXTURE, tmp_path, model, CASES["input_ids"])
    given = json.loads((FIXTURE / "config.json").read_text())
    assert config["efficient_attention_config"] == given["efficient_attention_config"]
    assert config["layer_types"] == model.config.layer_types


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    fields, jet, (window, n_parameters, n_tensors, attention, mixer) = PUBLISHED[name]
    jet = {**jet, "norm_eps": "1e-5", "mode": "chunk", "dconv_implementation": "triton", "conv_size": 4}
    efficient = {"jet": {**jet, "dconv_generator_reduction": 8}, "swa": {"window_size": window}}
    config = JetNemotronConfig(**fields, efficient_attention_config=efficient, rope_theta=1e6)
    assert config.sliding_window == window
    with torch.device("meta"):
        model = JetNemotronForCausalLM(config)
    model.tie_weights()
    tensors = model.state_dict()
    assert (sum(parameter.numel() for parameter in model.parameters()), len(tensors)) == (n_parameters, n_tensors)
    heads, key_width, value_width, bottleneck, width = mixer
    jet_layer, attention_layer = "model.layers.0.self_attn.", f"model.layers.{attention}.self_attn."
    expected = {
        jet_layer + "A_log": (heads,),
        jet_layer + "dt_bias": (heads,),
        jet_layer + "q_proj.weight": (key_width, width),
        jet_layer + "v_proj.weight": (value_width, width),
        jet_layer + "b_proj.weight": (heads, width),
        jet_layer + "dynamic_conv1d.kernel_generator.w1.weight": (bottleneck, width),
        jet_layer + "dynamic_conv1d.kernel_generator.w2.weight": (4 * value_width, bottleneck),
        jet_layer + "dynamic_conv1d.kernel_generator.w2.bias": (4 * value_width,),
        jet_layer + "o_norm.weight": (256,),
        jet_layer + "o_proj.weight": (width, value_width),
        attention_layer + "k_proj.weight": (256, width),
        attention_layer + "k_proj.bias": (256,),
        attention_layer + "o_proj.weight": (width, width),
    }
    assert {key: tuple(tensors[key].shape) for key in expected} == expected
    assert attention_layer + "o_proj.bias" not in tensors


def test_layer_types_in_every_form():
    ours = ["linear_attention", "sliding_attention", "full_attention"]
    for given in (["jet", "swa", "attn"], "['jet', 'swa', 'attn']", ours, ["jet", "sliding_attention", "attn"]):
        config = JetNemotronConfig(num_hidden_layers=3, layer_types=given, **WINDOW_8)
        assert (config.layer_types, config.sliding_window) == (ours, 8)
    assert small(jet={"norm_eps": "1e-3"}).model.layers[0].self_attn.o_norm.eps == 1e-3
    assert JetNemotronConfig(num_hidden_layers=2).layer_types == ["full_attention"] * 2
    assert JetNemotronConfig(num_hidden_layers=2).sliding_window is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layer_types": "__import__('os').getcwd()"}, ValueError, "a string holding one"),
        ({"layer_types": ["jet", "mamba"]}, ValueError, r"got \['mamba'\]"),
        ({"layer_types": ["jet"]}, ValueError, "expected 2 layer_types"),
        ({"layer_types": ["jet", "swa"]}, ValueError, "window of at least 2 tokens"),
        ({"layer_types": ["jet", "swa"], "sliding_window": 1}, ValueError, "got 1"),
        ({"efficient_attention_config": {"jet": {"conv_sise": 4}}}, TypeError, "conv_sise"),
        ({"layer_types": ["swa", "swa"], "sliding_window": 4, **WINDOW_8}, ValueError, "contradicts"),
    ],
)
def test_config_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        JetNemotronConfig(num_hidden_layers=2, **fields)


# ---- forward, states, loss


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_hidden_states_and_states(attention):
    model, ids = load(attn_implementation=attention), CASES["input_ids"]
    last = []  # transformers' last hidden state is already normalised
    model.model.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    out = model(ids, output_hidden_states=True, use_cache=True)
    assert_close(last[0][0], CASES["hidden_row0.layer.5"], PARITY, "layer.5")
    assert_close(out.logits, CASES["logits_full"], PARITY, "logits")
    names = ["embed", *(f"layer.{i}" for i in range(5)), "final_norm"]
    assert len(out.hidden_states) == len(names)
    for name, state in zip(names, out.hidden_states, strict=True):
        assert_close(state[0], CASES[f"hidden_row0.{name}"], PARITY, name)
    check_states(out.past_key_values, "state")


def check_states(cache, prefix):
    for i in JET_LAYERS:
        assert_close(cache.layers[i].recurrent_states[0], CASES[f"{prefix}.{i}.recurrent_state"], PARITY, f"matrix {i}")
        assert_close(cache.layers[i].conv_states[0], CASES[f"{prefix}.{i}.conv_state"], PARITY, f"window {i}")
    for i in (2, 4) if prefix == "state" else ():
        for name, got in (("key_state", cache.layers[i].keys), ("value_state", cache.layers[i].values)):
            # transformers keeps window - 1 keys of a sliding layer, the published cache one more.
            expected = CASES[f"{prefix}.{i}.{name}"][:, :, 1 if i == 4 else 0 :]
            assert_close(got, expected, PARITY, f"{name} {i}")


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(25, *[1] * 15), (3, 2, 20, 1, 2, 12)])
def test_cached_decoding(model, sizes):
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        parts.append(model(CASES["input_ids"][:, start : start + size], past_key_values=cache).logits)
        start += size
    assert_close(torch.cat(parts, 1), CASES["logits_cached"], PARITY, "logits")
    check_states(cache, "state")


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_left_padded_batch_and_its_decoding(attention, size):
    model = load(attn_implementation=attention)
    mask = CASES["padded.attention_mask"]
    out = model(CASES["padded.input_ids"], mask, use_cache=True)
    assert_close(out.logits[mask.bool()], CASES["padded.logits"][mask.bool()], PARITY, "prefill")
    parts = []
    for start in range(0, 6, size):
        mask = torch.cat([mask, mask.new_ones(3, size)], 1)
        ids = CASES["padded.decode_input_ids"][:, start : start + size]
        parts.append(model(ids, mask, past_key_values=out.past_key_values).logits)
    assert_close(torch.cat(parts, 1), CASES["padded.decode_logits"], PARITY, "decoding")
    check_states(out.past_key_values, "padded.state")


@pytest.mark.parametrize("train", [False, True])
def test_loss_and_every_gradient(train):
    model = load(attn_implementation="eager").train(train)  # 40 tokens: the published code refuses to train on these
    ids = CASES["input_ids"]
    out = model(ids, labels=ids)
    assert_close(out.loss.detach(), CASES["loss"][0], PARITY, "loss")
    out.loss.backward()
    gradients = {key[5:]: value for key, value in CASES.items() if key.startswith("grad.")}
    assert len(gradients) == 52
    parameters = dict(model.named_parameters())
    for name, expected in gradients.items():
        error = (parameters[name].grad - expected).norm() / expected.norm()
        assert_close(error, torch.tensor(0.0), PARITY, f"gradient of {name}, relative norm")
    halved = model(ids, labels=ids, num_items_in_batch=2 * 2 * 39).loss.detach()
    assert_close(halved * 2, CASES["loss"][0], PARITY, "loss over a given number of items")


def test_attention_is_told_its_window(monkeypatch):
    """Flash attention takes no mask for it."""
    windows = []

    def spy(module, query, key, value, attention_mask, sliding_window, **kwargs):
        windows.append(sliding_window)
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "spy", spy)
    small(attention="spy")(torch.arange(8)[None])
    assert windows == [5, None]


# ---- the cache as the decoder layer uses it


def test_gradient_flows_through_a_cache_that_writes_in_place():
    gradients = []
    for sizes in ((12,), (5, 1, 6)):
        model = small().train()
        ids = torch.arange(24).view(2, 12)
        cache, logits, start = DynamicCache(config=model.config), [], 0
        for size in sizes:
            logits.append(model(ids[:, start : start + size], past_key_values=cache).logits)
            start += size
        torch.cat(logits, 1).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, whole in gradients[0].items():
        assert_close(gradients[1][name], whole, EXACT_GRAD, name)


@torch.no_grad()
def test_what_was_read_from_the_cache_is_not_written_to(model):
    """The layer's new states must not alias the buffers that an in-place cache then overwrites."""
    cache = model(CASES["input_ids"][:, :9], use_cache=True).past_key_values
    taken = {}
    for i in JET_LAYERS:
        original = model.model.layers[i].self_attn.forward
        taken[i] = original(
            torch.zeros(2, 1, 64), (cache.layers[i].conv_states[0], cache.layers[i].recurrent_states[0])
        )[1]
    kept = {i: tuple(tensor.clone() for tensor in state) for i, state in taken.items()}
    model(CASES["input_ids"][:, 9:12], past_key_values=cache)
    for i in JET_LAYERS:
        assert all(torch.equal(*pair) for pair in zip(taken[i], kept[i], strict=True))


@torch.no_grad()
def test_bfloat16_keeps_the_matrix_in_float32():
    model = load(dtype=torch.bfloat16)
    cache = model(CASES["input_ids"][:, :9], use_cache=True).past_key_values
    model(CASES["input_ids"][:, 9:10], past_key_values=cache)
    assert {cache.layers[i].recurrent_states[0].dtype for i in JET_LAYERS} == {torch.float32}
    assert {cache.layers[i].conv_states[0].dtype for i in JET_LAYERS} == {torch.bfloat16}


@torch.no_grad()
def test_norm_multiplies_before_the_cast(model):
    norm = load(dtype=torch.bfloat16).model.norm
    norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), (unit * norm.weight.float()).bfloat16())
    assert not torch.equal(norm(x), norm.weight * unit.bfloat16())


@torch.no_grad()
def test_right_padded_rows_by_lengths():
    model, lengths = small(), torch.tensor([7, 2, 11])
    ids = torch.arange(33).view(3, 11)
    together = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=together, lengths=lengths).logits
    for row, length in enumerate(lengths.tolist()):
        alone = DynamicCache(config=model.config)
        expected = model(ids[row : row + 1, :length], past_key_values=alone).logits
        assert_close(logits[row : row + 1, :length], expected, EXACT, "logits")
        for layer in (0, 2):
            for name in ("conv_states", "recurrent_states"):
                got, state = (getattr(cache.layers[layer], name)[0] for cache in (together, alone))
                got, state = got[row], state[0]
                assert_close(got, state, EXACT, f"{name} of layer {layer}, row {row}")


# ---- other shapes, generation, initialisation


SHAPES = {
    "grouped by 3": {},
    "short convolution": {"jet": {"conv_size": 2}},
    "expand_v not an integer": {"jet": {"head_dim": 6, "expand_v": 2.6666666667}},
    "untied, eps, theta": {"tie_word_embeddings": False, "jet": {"norm_eps": "1e-3"}, "rope_theta": 100.0},
    "head_dim": {"head_dim": 8, "num_key_value_heads": 6},
    "attention first": {"layer_types": ["attn", "jet", "jet", "swa"]},
    "only jet": {"layer_types": ["jet"] * 4},
    "no jet": {"layer_types": ["swa", "attn", "swa", "swa"]},
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whole_is_split_and_padded_is_alone(shape):
    model = small(**shape)
    ids, mask = left_padded((23, 15), 37)
    whole = model(ids, mask).logits
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in (9, 1, 2, 1, 3, 7):
        stop = start + size
        parts.append(model(ids[:, start:stop], mask[:, :stop], past_key_values=cache).logits)
        start = stop
    assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], EXACT, "split")
    alone = model(ids[1:, 8:]).logits
    # Positions differ by the padding: rotary angles are float32, so only their difference is the same.
    assert_close(whole[1:, 8:], alone, PARITY, "a padded row is the row")
    kept = model(ids, mask, logits_to_keep=2).logits
    assert_close(kept, whole[:, -2:], EXACT, "kept logits")


def test_greedy_generation_of_left_padded_rows_is_that_of_each_row():
    check_rows_are_generated_as_alone(small())


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3}])
def test_sampling_and_beams_do_not_depend_on_the_cache(settings):
    check_cache_changes_nothing_drawn(small(), **settings)


def test_initialisation_of_the_jet_blocks():
    torch.manual_seed(0)
    config = JetNemotronConfig(vocab_size=11, num_hidden_layers=1, layer_types=["jet"])
    block = JetNemotronForCausalLM(config).model.layers[0].self_attn
    generator = block.dynamic_conv1d.kernel_generator
    assert not generator.w2.weight.any()
    assert generator.w1.weight.std() > 0.01
    assert 0.019 < generator.w2.bias.std() < 0.021
    assert ((block.A_log.exp() > 0) & (block.A_log.exp() <= 16)).all()
    step = torch.nn.functional.softplus(block.dt_bias)
    assert ((step > 0.9e-3) & (step < 0.11)).all()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        small()()
