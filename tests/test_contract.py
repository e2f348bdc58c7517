"""The ten points of the contract (docs/contract.md), in float64, against the slow reference in reference.py."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, randomise, tiny_base, tokens, true_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import IGNORE, loss_of, read_row
from small import sleeping
from tolerances import EXACT, EXACT_GRAD, assert_close

from sleepify import FastWeightConfig, SleepCache, sleepify


@pytest.fixture(autouse=True, scope="module")
def exactly():
    """Sums come in another order where passes are shared, batched or split; float32 inside would round them apart."""
    with true_float64():
        yield


SETTINGS = settings(max_examples=12)
EVICTION = st.sampled_from(["hard", "sliding"])


@pytest.fixture(scope="module")
def models():
    """One model per eviction; tests set ``window_size`` and N as they go."""
    return {eviction: sleeping(eviction=eviction) for eviction in ("hard", "sliding")}


def assert_same_session(actual: SleepCache, expected: SleepCache, what: str) -> None:
    assert actual.open_lengths == expected.open_lengths and actual.windows == expected.windows, what
    pairs = [(actual.at_start, expected.at_start), (actual.memory.state, expected.memory.state)]
    for mine, theirs in pairs:
        for key in mine.keys() | theirs.keys():
            # A state that was never written is zero: a row beside one that slept has it in so many zeros.
            one, other = mine.get(key), theirs.get(key)
            zeros = [torch.zeros_like(tensor) for tensor in one or other]
            for left, right in zip(one or zeros, other or zeros, strict=True):
                assert_close(left, right, EXACT, f"{what}: state {key}")
    assert actual.memory.kv_lengths == expected.memory.kv_lengths, what
    for layer, pair in actual.memory.kv.items():
        for left, right in zip(pair, expected.memory.kv[layer], strict=True):
            for row, length in enumerate(actual.memory.kv_lengths):
                n = left.shape[2] - length, right.shape[2] - length
                assert_close(left[row, :, n[0] :], right[row, :, n[1] :], EXACT, f"{what}: keys of layer {layer}")


# --- 1. Blocks


@SETTINGS
@given(
    eviction=EVICTION,
    rule=st.sampled_from(["gdn", "jet", "mamba2"]),
    loop_range=st.sampled_from([(0, 4), (1, 3), (0, 1), (2, 4)]),
    n_loops=st.integers(1, 4),
    window=st.integers(1, 7),
    length=st.integers(1, 16),
)
def test_01_prelude_loops_and_coda_are_algorithm_1(eviction, rule, loop_range, n_loops, window, length):
    model = sleeping(
        eviction=eviction,
        loop_range=loop_range,
        n_loops=n_loops,
        window_size=window,
        fast_weights=FastWeightConfig(rule=rule, layers=[0, 2]),
    )
    ids = tokens(1, length, seed=length)
    out = model(ids)
    trace = read_row(model, ids[0])
    assert_close(out.logits[0], trace.logits, EXACT, "logits")
    if trace.states:
        for layer, expected in trace.states[-1].items():
            for left, right in zip(out.past_key_values.at_start[(layer, 1)], expected, strict=True):
                assert_close(left, right, EXACT, f"state after layer {layer}")


def test_01_each_part_runs_as_often_as_it_should():
    model = sleeping(loop_range=(1, 3), n_loops=4, window_size=5)
    calls = [0] * 4
    for index, layer in enumerate(model.language_model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    model(tokens(1, 6), logits_to_keep=1)
    # One consolidation (layer 3 writes nothing that survives, so it is left out) and one wake pass over token 6.
    assert calls == [1 + 1, 4 + 1, 4 + 1, 0 + 1]


def test_01_default_ranges():
    assert sleepify(tiny_base("llama")).config.loop_range == [0, 4]
    assert sleepify(tiny_base("jet_nemotron")).config.loop_range == [1, 3]


def test_01_ouro_closes_each_loop_with_its_norm():
    for loop_range in ((0, 4), (1, 3)):
        model = sleeping("ouro", loop_range=loop_range)
        ids = tokens(1, 12)
        assert_close(model(ids).logits[0], read_row(model, ids[0]).logits, EXACT, f"logits, loop range {loop_range}")


# --- 2. When sleep runs


@SETTINGS
@given(eviction=EVICTION, length=st.integers(2, 18), data=st.data())
def test_02_the_same_text_gives_the_same_state_however_it_arrives(models, eviction, length, data):
    model = models[eviction]
    ids = tokens(2, length, seed=length)
    cuts = data.draw(st.lists(st.integers(1, length - 1), unique=True, max_size=4).map(sorted))
    whole = model(ids)
    split = SleepCache()
    pieces = [
        model(ids[:, a:b], past_key_values=split).logits for a, b in zip([0, *cuts], [*cuts, length], strict=True)
    ]
    assert_close(torch.cat(pieces, 1), whole.logits, EXACT, "logits")
    assert_same_session(split, whole.past_key_values, f"cut at {cuts}")
    # With only the last logits asked for, full windows are never read awake: the state must not notice.
    prompt = model(ids, logits_to_keep=1)
    assert_close(prompt.logits, whole.logits[:, -1:], EXACT, "last logits")
    assert_same_session(prompt.past_key_values, whole.past_key_values, "as a prompt")


def test_02_token_by_token(models):
    for eviction, model in models.items():
        ids = tokens(2, 17)
        whole, cache = model(ids), SleepCache()
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17)]
        assert_close(torch.cat(steps, 1), whole.logits, EXACT, eviction)
        assert_same_session(cache, whole.past_key_values, eviction)


def test_02_a_training_batch_leaves_the_state_of_a_session(models):
    for eviction, model in models.items():
        ids = tokens(2, 13)
        labels = torch.full_like(ids, IGNORE)
        labels[:, -2:] = ids[:, -2:]
        trained = model(ids, labels=labels, use_cache=True).past_key_values
        assert_same_session(trained, model(ids).past_key_values, eviction)


def test_02_nothing_is_spent_on_a_window_at_which_the_text_ends(models):
    for length, sleeps in ((1, 0), (5, 0), (6, 1), (10, 1), (11, 2)):
        assert models["hard"](tokens(1, length)).past_key_values.windows == [sleeps]


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_02_sleep_on_demand_full_or_not(models, eviction):
    model, ids = models[eviction], tokens(2, 8)
    cache = model(ids).past_key_values
    model.sleep(cache)
    assert cache.windows == [2, 2] and cache.open_lengths == [0, 0]
    # The second window had three tokens: as if the window size had been three from there on.
    expected = model(ids[:, :5]).past_key_values
    model.sleep(expected)
    expected_after = model(ids[:, 5:], past_key_values=expected).past_key_values
    model.sleep(expected_after)
    assert_same_session(cache, expected_after, "on demand")
    again = cache.clone()
    model.sleep(again)
    assert_same_session(again, cache, "nothing awake, nothing to do")


# --- 3. Supervised windows


@SETTINGS
@given(eviction=EVICTION, length=st.integers(2, 17), data=st.data())
def test_03_predictions_are_made_awake_wherever_they_are(models, eviction, length, data):
    model = models[eviction]
    ids = tokens(1, length, seed=length + 1)
    supervised = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    labels = torch.where(torch.tensor([supervised]), ids, IGNORE)
    trace = read_row(model, ids[0])
    total, count = loss_of(trace, labels[0])
    out = model(ids, labels=labels)
    assert_close(out.loss, total / max(count, 1), EXACT, f"loss over {count} labels")
    assert_close(out.logits, model(ids).logits, EXACT, "logits beside a loss in evaluation")
    divided = model(ids, labels=labels, num_items_in_batch=7).loss
    assert_close(divided, total / 7, EXACT, "num_items_in_batch")


def test_03_the_window_of_a_prediction_is_that_of_the_token_before_the_label(models):
    model, ids = models["hard"], tokens(1, 11)
    labels = torch.full_like(ids, IGNORE)
    labels[0, 5] = ids[0, 5]  # first token of the second window, predicted by the last of the first
    before = model(ids[:, :5]).logits[0, -1]
    expected = torch.nn.functional.cross_entropy(before[None], ids[0, 5:6])
    assert_close(model(ids, labels=labels).loss, expected, EXACT, "loss at a boundary")


# --- 4. N = 1 is the base model (all families: test_families.py)


def test_04_a_text_within_the_window_gives_the_logits_of_the_base():
    base = tiny_base("qwen3")
    ids = tokens(2, 9)
    expected = base(ids).logits
    model = sleepify(base, n_loops=1, window_size=9)
    assert torch.equal(model(ids).logits, expected)
    randomise(model.fast_weights)
    assert (model(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", ["jet_nemotron", "mistral"])
def test_04_any_length_where_nothing_that_the_base_uses_is_evicted(family):
    # Every attention layer of the base sees six positions at most, and sliding eviction keeps as many.
    changes = {"sliding_window": 6}
    if family == "jet_nemotron":
        changes = {
            "layer_types": ["jet", "swa", "jet", "swa"],
            "efficient_attention_config": {
                "swa": {"window_size": 6},
                "jet": {"num_heads": 2, "head_dim": 8, "expand_v": 2, "conv_size": 4},
            },
        }
    base = tiny_base(family, **changes)
    ids = tokens(2, 23)
    expected = base(ids, use_cache=False).logits
    model = sleepify(base, n_loops=1, window_size=6, eviction="sliding")
    assert_close(model(ids).logits, expected, EXACT, "logits past three windows")


def test_04_a_purely_recurrent_base_at_any_length_under_hard_eviction():
    base = tiny_base("jet_nemotron", layer_types=["jet"] * 4)
    ids = tokens(2, 23)
    model = sleepify(base, n_loops=1, window_size=4)
    assert_close(model(ids).logits, base(ids, use_cache=False).logits, EXACT, "logits past five windows")


# --- 5. Evicted means gone


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_05_only_state_and_retained_keys_cross_a_boundary(models, eviction):
    model = models[eviction]
    one, other = tokens(1, 10, seed=1), tokens(1, 10, seed=2)
    mine = model.sleep(model(one).past_key_values)
    theirs = model.sleep(model(other).past_key_values)
    after = tokens(1, 8, seed=3)
    differs = model(after, past_key_values=theirs.clone()).logits
    theirs.memory, theirs.at_start = mine.memory, mine.at_start
    expected = model(after, past_key_values=mine).logits
    assert torch.equal(model(after, past_key_values=theirs).logits, expected)
    assert (differs - expected).abs().max() > 1e-3


def test_05_without_fast_weights_hard_eviction_forgets_everything():
    model = sleepify(tiny_base("qwen3"), n_loops=3, window_size=5)  # output projections at zero
    one, other = tokens(1, 8, seed=1), tokens(1, 8, seed=1)
    other[:, :5] = tokens(1, 5, seed=2)
    assert torch.equal(model(one).logits[:, 5:], model(other).logits[:, 5:])


def test_05_convolution_inputs_cross_windows():
    model = sleeping(window_size=2, n_loops=2)
    cache = model(tokens(1, 7)).past_key_values
    conv = cache.at_start[(0, 1)].conv
    assert conv.shape[-1] == 4 and conv.abs().amax(1).gt(0).all()  # four taps hold the last two windows of two tokens


# --- 6. Retained keys


def test_06_retained_keys_are_those_of_the_last_pass():
    model = sleeping(eviction="sliding", n_loops=3, window_size=4)
    ids = tokens(1, 4)
    cache = model.sleep(model(ids).past_key_values)
    longer = read_row(model, tokens(1, 5)[0])
    assert cache.memory.kv_lengths == (3,)
    for layer, pair in longer.kept[-1].items():
        for mine, theirs in zip(cache.memory.kv[layer], pair, strict=True):
            assert_close(mine, theirs, EXACT, f"keys of layer {layer}")


def test_06_no_token_sees_further_than_the_window():
    model = sleepify(tiny_base("qwen3"), eviction="sliding", n_loops=1, window_size=4)  # fast weights say nothing
    base_one_layer = tiny_base("qwen3", num_hidden_layers=1)
    model = sleepify(base_one_layer, eviction="sliding", n_loops=1, window_size=4)
    one = tokens(1, 14, seed=1)
    other = one.clone()
    other[:, 9] = (other[:, 9] + 1) % VOCAB
    changed = (model(one).logits - model(other).logits).abs().amax(-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == [9, 10, 11, 12]


# --- 7. Positions


def test_07_positions_restart_under_hard_and_run_on_under_sliding_eviction(models):
    for eviction, expected in (("hard", set(range(5))), ("sliding", set(range(17)))):
        model, seen = models[eviction], set()
        hook = model.language_model.model.rotary_emb.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.update(args[1].flatten().tolist())
        )
        model(tokens(1, 17), logits_to_keep=1)  # three windows asleep, the last awake
        hook.remove()
        assert seen == expected


def test_07_a_stream_may_be_longer_than_the_base_has_positions():
    model = sleeping(window_size=8)
    longest = model.config.text_config.max_position_embeddings
    logits = model(tokens(1, longest + 20), logits_to_keep=1).logits
    assert logits.isfinite().all()


# --- 8. A batch is its rows


@SETTINGS
@given(
    eviction=EVICTION,
    lengths=st.lists(st.integers(1, 17), min_size=2, max_size=4),
    side=st.sampled_from(["left", "right", "mixed"]),
    data=st.data(),
)
def test_08_loss_logits_and_state_of_padded_rows(models, eviction, lengths, side, data):
    model = models[eviction]
    width = max(lengths) + data.draw(st.integers(0, 2))
    ids, mask, labels = torch.zeros(3, len(lengths), width, dtype=torch.long)
    labels.fill_(IGNORE)
    places = []
    for row, length in enumerate(lengths):
        left = {"left": width - length, "right": 0}.get(side)
        left = data.draw(st.integers(0, width - length)) if left is None else left
        places.append(slice(left, left + length))
        ids[row, places[-1]] = tokens(1, length, seed=row + 10)[0]
        mask[row, places[-1]] = 1
        supervised = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        labels[row, places[-1]] = torch.where(supervised, ids[row, places[-1]], IGNORE)
    out = model(ids, attention_mask=mask)
    traces = [read_row(model, ids[row, place]) for row, place in enumerate(places)]
    for row, (place, trace) in enumerate(zip(places, traces, strict=True)):
        assert_close(out.logits[row, place], trace.logits, EXACT, f"logits of row {row}")
        assert (out.logits[row][mask[row] == 0] == 0).all()
    totals, counts = zip(
        *(loss_of(t, labels[r, p]) for r, (t, p) in enumerate(zip(traces, places, strict=True))), strict=True
    )
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert_close(loss, sum(totals) / max(sum(counts), 1), EXACT, "loss")
    if side == "left":
        for row, place in enumerate(places):
            alone = model(ids[row : row + 1, place]).past_key_values
            together = out.past_key_values.clone()
            together.batch_select_indices(torch.tensor([row]))
            assert_same_session(together, alone, f"row {row}")


def test_08_gradients_do_not_depend_on_padding(models):
    model = models["hard"]
    ids, lengths = tokens(3, 13), [13, 4, 9]
    labels = ids.clone()
    gradients = []
    for side in ("left", "right"):
        padded, mask, marked = torch.zeros(3, 3, 13, dtype=torch.long)
        marked.fill_(IGNORE)
        for row, length in enumerate(lengths):
            place = slice(13 - length, 13) if side == "left" else slice(0, length)
            padded[row, place], mask[row, place] = ids[row, :length], 1
            marked[row, place] = labels[row, :length]
        model.zero_grad()
        model(padded, attention_mask=mask, labels=marked).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for row, length in enumerate(lengths):
        model(ids[row : row + 1, :length], labels=labels[row : row + 1, :length], num_items_in_batch=23).loss.backward()
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, EXACT_GRAD, f"{name}, right against left")
        assert_close(dict(model.named_parameters())[name].grad, expected, EXACT_GRAD, f"{name}, rows alone")


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_08_generation_from_left_padded_prompts(models, eviction):
    model = models[eviction]
    prompts = [tokens(1, length, seed=length) for length in (3, 12, 7)]
    ids, mask = torch.zeros(2, 3, 12, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 12 - prompt.shape[1] :], mask[row, 12 - prompt.shape[1] :] = prompt[0], 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=14, do_sample=False, eos_token_id=None)
        assert together[row, 12:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_08_right_padding_with_a_cache_is_refused(models):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match="left-padded"):
        models["hard"].generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="left-padded"):
        models["hard"](ids, attention_mask=mask, past_key_values=SleepCache())


# --- 9. Memory


def test_09_state_is_constant_and_keys_are_bounded(models):
    for eviction, bound in (("hard", 5), ("sliding", 2 * 5 - 1)):
        model, cache, sizes, columns = models[eviction], SleepCache(), set(), []
        for step in range(5 * 12):
            with torch.no_grad():
                model(tokens(2, 1, seed=step), past_key_values=cache)
            sizes.add(cache.state_bytes)
            columns.append(cache.memory.columns)
        assert len(sizes) == 1 and sizes.pop() > 0
        assert max(columns) == bound
        model.sleep(cache)
        assert cache.memory.columns == model.options().retained
        for tensor in cache.memory.tensors():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view keeps evicted memory alive"


# --- 10. Latency


def test_10_a_wake_token_runs_every_layer_once_for_any_loops_and_past(models):
    model = models["hard"]
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.language_model.model.layers]
    hooks += [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.fast_weights]
    for n_loops in (1, 6):
        for windows in (1, 12):
            cache = model(tokens(1, 5 * windows + 1), n_loops=n_loops).past_key_values
            calls.clear()
            model(tokens(1, 1), past_key_values=cache, n_loops=n_loops)
            assert len(calls) == 4 + 2 and cache.memory.columns == 2
    for hook in hooks:
        hook.remove()
