"""SleepForCausalLM as a citizen of transformers: generation, compilation, embeddings, devices, training habits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_base, tokens, true_float64
from safetensors import safe_open
from safetensors.torch import save_file
from small import sleeping
from tolerances import DEVICE32, EXACT, EXACT_GRAD, FLOAT32, PARITY, assert_close
from transformers import AutoModelForCausalLM, DynamicCache, TextStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from sleepify import (
    CacheMismatchError,
    CheckpointError,
    FastWeightConfig,
    SleepCache,
    SleepConfig,
    SleepForCausalLM,
    sleepify,
)
from sleepify.fast_weights.layer import FastWeightLayer

# --- generate


def test_sampling_is_reproducible_and_streams():
    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(map(str, torch.as_tensor(ids).flatten().tolist())) + " "

    class Keep(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            self.kept = getattr(self, "kept", "") + text

    model, ids = sleeping(), tokens(1, 7)
    streamer = Keep(Tokenizer(), skip_prompt=True)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        keywords = {"streamer": streamer} if not drawn else {}
        drawn.append(model.generate(ids, max_new_tokens=9, do_sample=True, top_k=20, eos_token_id=None, **keywords))
    assert torch.equal(*drawn)
    assert streamer.kept.split() == [str(token) for token in drawn[0][0, 7:].tolist()]


def test_generation_goes_on_with_a_returned_cache():
    model, ids = sleeping(), tokens(2, 7)
    keywords = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=12, **keywords)
    first = model.generate(ids, max_new_tokens=5, **keywords)
    assert isinstance(first.past_key_values, SleepCache)
    rest = model.generate(first.sequences, max_new_tokens=7, past_key_values=first.past_key_values, **keywords)
    assert torch.equal(rest.sequences, whole.sequences)
    uncached = model.generate(ids, max_new_tokens=12, use_cache=False, **keywords)
    assert torch.equal(uncached.sequences, whole.sequences)


def test_loops_can_be_chosen_per_generation_and_per_call():
    model, ids = sleeping(), tokens(1, 12)
    logits = {n: model(ids, n_loops=n).logits for n in (1, 3)}
    assert_close(model(ids).logits, logits[3], EXACT, "the model's own N")
    assert (logits[1] - logits[3]).abs().max() > 1e-2
    generated = {n: model.generate(ids, max_new_tokens=8, do_sample=False, n_loops=n) for n in (1, 3)}
    assert not torch.equal(generated[1], generated[3])


def test_guidance_holds_a_session_of_its_own_for_what_is_not_asked():
    """transformers reads the prompt's last token and what is made as the other text, in a cache that it keeps."""
    model, ids, scale = sleeping(), tokens(1, 9), 1.7
    made = model.generate(
        ids, max_new_tokens=8, do_sample=False, guidance_scale=scale, output_scores=True, return_dict_in_generate=True
    )
    for column, scores in zip(range(9, 17), made.scores, strict=True):
        asked, other = (
            model(made.sequences[:, begin:column]).logits[:, -1].log_softmax(-1).float() for begin in (0, 8)
        )
        assert_close(scores.float(), scale * (asked - other) + other, FLOAT32, f"column {column}")


def test_beam_search_is_that_without_a_cache():
    model = sleeping()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    keywords = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **keywords), model.generate(ids, use_cache=False, **keywords))
    session = SleepCache()
    with pytest.raises(ValueError, match="expected num_beams=1 with a SleepCache, got 3"):
        model.generate(ids, **keywords, past_key_values=session)
    assert session.now is None


def test_assisted_decoding_and_foreign_caches_are_refused_by_name():
    model, ids = sleeping(), tokens(1, 6)
    with pytest.raises(ValueError, match="assisted generation"):
        model.generate(ids, assistant_model=tiny_base("qwen3"), max_new_tokens=3)
    with pytest.raises(ValueError, match="assisted generation"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="SleepCache"):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=3)
    with pytest.raises(ValueError, match="SleepCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="quantized", max_new_tokens=3)


def test_several_sequences_from_one_prompt():
    model, ids = sleeping(), tokens(1, 6)
    torch.manual_seed(0)
    out = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=4, eos_token_id=None)
    assert out.shape == (3, 10) and (out[:, :6] == ids).all()


# --- logits, loss


def test_logits_to_keep():
    model = sleeping()
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    every = model(ids, attention_mask=mask).logits
    assert_close(model(ids, attention_mask=mask, logits_to_keep=3).logits, every[:, -3:], EXACT, "last three")
    chosen = torch.tensor([12, 2, 7])
    assert_close(model(ids, attention_mask=mask, logits_to_keep=chosen).logits, every[:, chosen], EXACT, "chosen")
    out = model(ids, attention_mask=mask, labels=ids, logits_to_keep=0)
    assert_close(out.logits, every, EXACT, "with labels")


def test_a_batch_without_a_single_label_has_loss_zero_and_can_be_differentiated():
    model, ids = sleeping().train(), tokens(2, 13)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    assert loss == 0
    loss.backward()
    # All of them: DDP waits for each.
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters() if parameter.requires_grad)


def test_the_loss_is_made_in_pieces_without_changing_it(monkeypatch):
    model = sleeping().train()
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[1, 9:] = 0

    def loss_and_gradients():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    whole = loss_and_gradients()
    monkeypatch.setattr("sleepify.loss.PIECE", 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(ids, labels=ids)
    assert not any(VOCAB in shape and shape[0] > 7 for shape in kept if len(shape) == 2 and shape != (VOCAB, 32))
    for actual, expected in zip(loss_and_gradients(), whole, strict=True):
        assert_close(actual, expected, EXACT_GRAD, "in pieces")


def test_output_types():
    model, ids = sleeping(), tokens(1, 6)
    out = model(ids)
    assert isinstance(out, CausalLMOutputWithPast) and out.loss is None
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].dim() == 0
    assert model(ids, labels=ids).past_key_values is None
    assert model.train()(ids).past_key_values is None
    for keyword in ({"output_attentions": True}, {"inputs_embeds": torch.zeros(1, 6, 32)}):
        with pytest.raises(ValueError, match="to be off"):
            model(ids, **keyword)


# Inductor compiles flex attention; for a sliding mask on a CPU torch 2.13 writes C++ with an undeclared variable.
BROKEN = pytest.mark.skipif(torch.__version__.startswith("2.13"), reason="torch 2.13's C++ for it does not compile")


@pytest.mark.parametrize(
    "implementation, eviction",
    [
        ("eager", "hard"),
        ("eager", "sliding"),
        pytest.param("flex_attention", "hard", marks=pytest.mark.slow),
        pytest.param("flex_attention", "sliding", marks=[pytest.mark.slow, BROKEN]),
    ],
)
def test_attention_implementations_agree(implementation, eviction):
    model = sleeping(dtype=torch.float32, eviction=eviction)
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :6] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        assert model.language_model.config._attn_implementation == implementation
        assert_close(model(ids, attention_mask=mask).logits, expected, PARITY, implementation)


def test_the_wake_step_compiles():
    base = tiny_base("qwen3", torch.float32, num_hidden_layers=1)
    model = sleeping(base, window_size=2, n_loops=2, fast_weights=FastWeightConfig(layers=[0]))
    ids = tokens(2, 4)
    with torch.no_grad():
        expected, cache = model(ids), SleepCache()
        compiled = torch.compile(model, backend="eager")
        steps = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4)]
    assert_close(torch.cat(steps, 1), expected.logits, FLOAT32, "compiled steps")
    torch._dynamo.reset()


def graphs_of_compiled_layers(model, ids) -> int:
    """Compares a model with itself, compiled: a step of training and generation. Returns how many graphs that took."""
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Which experts a token goes to is known only when it gets there, and ends a graph.
    has_experts = any("experts" in name for name, _ in model.named_modules())
    twin.compile(backend="eager", fullgraph=not has_experts)
    for each in (model, twin):
        each.train()(ids, labels=ids, n_loops=3).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if mine.grad is not None:
            assert_close(theirs.grad, mine.grad, FLOAT32, name)
    arguments = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(twin.eval().generate(ids, **arguments), model.eval().generate(ids, **arguments))
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return n_graphs


def test_equal_layers_share_their_compiled_graphs(monkeypatch):
    """What the first layer has had compiled, and the inserted one behind it, serves all others."""
    base = tiny_base("qwen3", torch.float32, num_hidden_layers=3)
    model = sleepify(base, n_loops=1, window_size=4, fast_weights=FastWeightConfig(layers=[0, 1, 2]))
    compiled_by = dict.fromkeys((0, 1, 2), 0)
    compile_all = SleepForCausalLM.compile

    def compile_and_watch(self, **keywords):
        compile_all(self, **keywords)
        for layers in (self.blocks.layers, self.fast_weights):
            for place, layer in enumerate(layers):
                layer._compiled_call_impl = watched(layer._compiled_call_impl, place)

    def watched(call, place):
        def counting(*args, **kwargs):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            output = call(*args, **kwargs)
            compiled_by[place] += torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
            return output

        return counting

    monkeypatch.setattr(SleepForCausalLM, "compile", compile_and_watch)
    n_graphs = graphs_of_compiled_layers(model, tokens(2, 11))
    assert compiled_by == {0: n_graphs, 1: 0, 2: 0} and n_graphs > 0


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "falcon_h1"])
def test_fixed_shapes_change_nothing(family, eviction):
    with true_float64():
        compare_fixed_with_usual_shapes(sleeping(family, eviction=eviction))


def compare_fixed_with_usual_shapes(model) -> None:
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    sessions = [SleepCache(), SleepCache(fixed_shapes=True)]
    seen = set()
    with torch.no_grad():
        for piece, real in [(ids, mask), *((tokens(2, 1, seed=t), None) for t in range(12)), (tokens(2, 4), None)]:
            usual, fixed = (model(piece, attention_mask=real, past_key_values=session) for session in sessions)
            assert_close(fixed.logits, usual.logits, EXACT, f"{sessions[1].seen}")
            if (arena := sessions[1].memory.arena) is not None:
                seen |= {keys.shape for keys, _ in arena.kv.values()}
        assert len(seen) == 1
        cut = sessions[1].clone()
        cut.batch_select_indices(torch.tensor([1]))
        alone = model(tokens(1, 1), past_key_values=cut).logits
        sessions[0].batch_select_indices(torch.tensor([1]))
        assert_close(alone, model(tokens(1, 1), past_key_values=sessions[0]).logits, EXACT, "one row")
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    fixed = model.generate(ids, cache_implementation="static", return_dict_in_generate=True, **arguments)
    assert fixed.past_key_values.fixed_shapes
    assert torch.equal(fixed.sequences, model.generate(ids, **arguments))


def test_fixed_shapes_need_no_new_graph_from_token_to_token():
    base = tiny_base("qwen3", torch.float32, num_hidden_layers=1)
    model = sleeping(base, window_size=7, fast_weights=FastWeightConfig(layers=[0])).eval()
    model.compile(backend="eager", fullgraph=True, dynamic=False)

    def graphs(session: SleepCache) -> list[int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        counts = []
        with torch.no_grad():
            for t in range(7):
                model(tokens(1, 1, seed=t), past_key_values=session)
                counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
        return counts

    usual, fixed = graphs(SleepCache()), graphs(SleepCache(fixed_shapes=True))
    # A window's first token finds no keys, the second makes room for all, the others find it.
    assert fixed[2] == fixed[-1] and usual[2] + 4 <= usual[-1], (fixed, usual)


@pytest.mark.slow
def test_compiled_layers_write_into_the_same_room():
    model = sleeping(dtype=torch.float32, window_size=9).eval()
    caches = [SleepCache(fixed_shapes=True), SleepCache(fixed_shapes=True)]
    rooms = set()
    with torch.no_grad():
        expected = [model(tokens(2, 1, seed=t), past_key_values=caches[0]).logits for t in range(8)]
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
        for t in range(8):
            logits = model(tokens(2, 1, seed=t), past_key_values=caches[1]).logits
            assert_close(logits, expected[t], DEVICE32, f"token {t}")
            rooms.add(id(caches[1].memory.arena))
    # None at the window's first token.
    assert len(rooms) == 2
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles(family):
    assert graphs_of_compiled_layers(sleeping(family, torch.float32), tokens(2, 11)) > 0


# --- embeddings, parameters, copies


def test_resizing_embeddings_tied_or_not():
    for tied in (False, True):
        model = sleepify(tiny_base("qwen3", tie_word_embeddings=tied), window_size=5)
        ids = tokens(1, 8)
        before = model(ids).logits
        model.resize_token_embeddings(VOCAB + 3)
        assert model.get_input_embeddings().weight.shape[0] == VOCAB + 3 == model.config.text_config.vocab_size
        after = model(ids).logits
        assert after.shape[-1] == VOCAB + 3
        assert_close(after[..., :VOCAB], before, EXACT, "old logits")
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same == tied


def test_tied_embeddings_survive_a_round_trip(tmp_path):
    model = sleepify(tiny_base("qwen3", dtype=torch.float32, tie_word_embeddings=True), window_size=5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again(tokens(1, 8)).logits, model(tokens(1, 8)).logits)


def test_freezing_and_counting(capsys):
    model = sleeping()
    model.freeze_base()
    model.print_trainable_parameters()
    trained = sum(p.numel() for p in model.fast_weights.parameters())
    assert f"trainable params: {trained:,}" in capsys.readouterr().out
    model(tokens(1, 12), labels=tokens(1, 12)).loss.backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    assert all(p.grad is not None for p in model.fast_weights.parameters())
    model.freeze_base(False)
    assert all(p.requires_grad for p in model.parameters())


def test_the_base_comes_back_unchanged():
    base, ids = tiny_base("qwen3"), tokens(1, 9)
    expected = base(ids).logits
    model = sleepify(base, window_size=4)
    model.generate(ids, max_new_tokens=4)
    assert model.unload() is base and torch.equal(base(ids).logits, expected)


def test_copies_and_pickles_are_models_of_their_own():
    model, ids = sleeping(), tokens(1, 9)
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    twin.fast_weights[0].o_proj.weight.data.zero_()
    assert torch.equal(model(ids).logits, expected) and not torch.equal(twin(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


@pytest.mark.parametrize("part", ["layers", "model"])
def test_parts_of_the_base_may_be_changed_for_others(part):
    model, ids = sleeping(), tokens(1, 12)
    before = model(ids).logits
    holder = model.language_model.model if part == "layers" else model.language_model
    other = copy.deepcopy(getattr(holder, part))
    for parameter in other.parameters():
        parameter.data.mul_(1.2)
    setattr(holder, part, other)
    after = model(ids).logits
    assert not torch.equal(after, before) and torch.equal(after, copy.deepcopy(model)(ids).logits)


def test_built_from_a_configuration_alone():
    config = SleepConfig(text_config=tiny_base("qwen3").config, n_loops=2, window_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, SleepForCausalLM) and model.fast_weights[0].o_proj.weight.count_nonzero() == 0
    assert model.language_model.model.layers[0].self_attn.q_proj.weight.std() > 0
    loss = model(tokens(1, 9), labels=tokens(1, 9)).loss
    loss.backward()
    assert loss.isfinite()


def test_a_base_that_checkpoints_its_own_layers_does_not_lose_its_state():
    base = tiny_base("jet_nemotron").train()
    base.gradient_checkpointing_enable()
    model = sleepify(base, window_size=4, n_loops=2)
    assert model.training and not any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    expected = model.eval()(tokens(1, 11)).logits
    assert_close(model.train()(tokens(1, 11), logits_to_keep=0).logits, expected, EXACT, "in training")


def test_inserted_layers_are_drawn_once():
    """So that a seed begins with the weights that it always began with."""
    base = tiny_base("qwen3")
    torch.manual_seed(5)
    model = sleepify(base, window_size=4, fast_weights=FastWeightConfig(layers=[0]))
    after = torch.rand(3)
    torch.manual_seed(5)
    mixer = type(model.fast_weights[0].mixer).from_config(model.config.fast_weights, base.config.hidden_size)
    made = FastWeightLayer(mixer, model.config.fast_weights.norm_eps).parameters()
    assert all(torch.equal(a.to(b), b) for a, b in zip(made, model.fast_weights[0].parameters(), strict=True))
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("training", [True, False])
def test_the_modules_of_a_base_stay_in_their_modes(training):
    base = tiny_base("qwen3").train(training)
    base.model.layers[0].train(not training)
    before = {name: module.training for name, module in base.named_modules()}
    model = sleepify(base, window_size=4)
    assert {name: module.training for name, module in base.named_modules()} == before
    assert model.training == training and all(layer.training == training for layer in model.fast_weights.modules())


def test_lora_finds_its_targets():
    peft = pytest.importorskip("peft", reason="peft is an optional extra")
    model = sleeping(dtype=torch.float32)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    )
    targets = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A")]
    assert len(targets) == 2 * (4 + 2)  # in four layers of the base and two inserted ones
    ids = tokens(2, 12)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert wrapped.generate(input_ids=ids, max_new_tokens=7, do_sample=False).shape == (2, 19)


# --- sessions


def test_sessions_do_not_share_anything():
    model = sleeping()
    cache = model(tokens(2, 7)).past_key_values
    branch = cache.clone()
    one = model(tokens(2, 6, seed=1), past_key_values=cache).logits
    other = model(tokens(2, 6, seed=1), past_key_values=branch).logits
    assert torch.equal(one, other)
    cache.reset()
    assert_close(model(tokens(1, 7), past_key_values=cache).logits, model(tokens(1, 7)).logits, EXACT, "after a reset")


def test_rows_can_be_picked_and_repeated():
    model, ids = sleeping(eviction="sliding"), tokens(3, 12)
    cache, more = model(ids).past_key_values, tokens(3, 7, seed=5)
    picked = cache.clone()
    picked.batch_select_indices(torch.tensor([2, 0]))
    whole = model(more, past_key_values=cache.clone()).logits
    assert_close(model(more[[2, 0]], past_key_values=picked).logits, whole[[2, 0]], EXACT, "picked")
    cache.batch_repeat_interleave(2)
    twice = model(more.repeat_interleave(2, 0), past_key_values=cache).logits
    assert_close(twice, whole.repeat_interleave(2, 0), EXACT, "repeated")


def test_a_session_can_be_detached():
    model = sleeping().train()
    cache = SleepCache()
    model(tokens(1, 7), past_key_values=cache)
    cache.detach_()
    assert not any(tensor.requires_grad for tensor in cache.memory.tensors())
    model(tokens(1, 5), past_key_values=cache).logits.sum().backward()


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_session_can_be_saved_and_read_on_by_the_model_loaded_elsewhere(tmp_path, eviction):
    model = sleeping(dtype=torch.float32, eviction=eviction)
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :6] = 0
    cache, after = model(ids, attention_mask=mask).past_key_values, tokens(2, 8, seed=4)
    cache.save(tmp_path / "session.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["session.safetensors"]
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = SleepCache.load(tmp_path / "session.safetensors")
    assert repr(loaded) == repr(cache)
    expected = model(after, past_key_values=cache).logits
    # Read back, tensors lie contiguous in memory, and matrix products may round in another order.
    assert_close(again(after, past_key_values=loaded).logits, expected, FLOAT32, "read on")
    with pytest.raises(CacheMismatchError, match="another"):
        sleeping("qwen2", dtype=torch.float32)(after, past_key_values=SleepCache.load(tmp_path / "session.safetensors"))


def test_damaged_sessions_are_refused(tmp_path):
    file = tmp_path / "session.safetensors"
    sleeping(dtype=torch.float32)(tokens(1, 9)).past_key_values.save(file)
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(
        {k: v.half() if "recurrent" in k else v for k, v in tensors.items()}, tmp_path / "half", metadata=metadata
    )
    save_file(tensors, tmp_path / "foreign")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:200])
    for name, words in (("half", "not those that its manifest lists"), ("foreign", "version"), ("cut", "damaged")):
        with pytest.raises(CheckpointError, match=words):
            SleepCache.load(tmp_path / name)
    with pytest.raises(ValueError, match="empty"):
        SleepCache().save(file)
