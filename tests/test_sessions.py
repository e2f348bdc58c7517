"""Sessions: a call that fails leaves them as they were; rows that end, tokens that wait, rows that go back."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from families import VOCAB, tokens
from small import sleeping
from tolerances import DEVICE32, EXACT, assert_close
from transformers import AutoModelForCausalLM
from transformers.generation import StoppingCriteria

from sleepify import CacheMismatchError, SleepCache

GREEDY = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return sleeping(window_size=4, n_loops=2)


def same(one: SleepCache, other: SleepCache) -> bool:
    """Whether two sessions are equal bit for bit."""
    if (one.now is None) != (other.now is None):
        return False
    if one.now is None or other.now is None:
        return True
    counts = ("open_lengths", "retained", "seen", "windows", "passes", "stale", "columns", "owner")
    tensors = [[*now.memory.tensors(), now.open_ids, now.digest, *now.pending] for now in (one.now, other.now)]
    return all(getattr(one.now, name) == getattr(other.now, name) for name in counts) and all(
        torch.equal(a, b) for a, b in zip(*tensors, strict=True)
    )


# --- a call that fails


def interrupted(model, layer, after):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt

    return model.language_model.model.layers[layer].register_forward_pre_hook(interrupt)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_call_that_is_interrupted_leaves_the_session_as_it_was(model, begun, after):
    cache, ids = SleepCache(), tokens(2, 11, seed=1)
    if begun:
        model(tokens(2, 6), past_key_values=cache)
    before = cache.clone()
    hook = interrupted(model, 2, after)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    hook.remove()
    assert same(cache, before) and (begun or cache.owner is None)
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, past_key_values=before).logits)


def test_wrong_ids_and_labels_leave_the_session_as_it_was(model):
    cache = model(tokens(1, 6)).past_key_values
    before, ids = cache.clone(), tokens(1, 7, seed=2)
    wrong = ids.clone()
    wrong[0, 5] = VOCAB
    for arguments, words in (
        ({"input_ids": wrong}, f"input_ids from 0 to {VOCAB - 1}, got"),
        ({"input_ids": -ids}, "input_ids from 0"),
        ({"input_ids": ids.float()}, "input_ids .* of whole numbers"),
        ({"input_ids": ids, "labels": ids.double()}, "labels of the shape of input_ids"),
        ({"input_ids": ids, "labels": ids - VOCAB}, r"labels from 0 to 96 \(or -100\), got"),
        ({"input_ids": ids, "labels": ids, "num_items_in_batch": 0}, "num_items_in_batch above 0"),
        ({"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(float("nan"))}, "above 0, got nan"),
        ({"input_ids": ids, "awake": torch.ones(1, 3, dtype=torch.bool)}, "awake to be bool of shape"),
        ({"input_ids": ids, "logits_to_keep": torch.tensor([7])}, "columns from 0 to 6"),
        ({"input_ids": ids, "logits_to_keep": -1}, "logits_to_keep"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**arguments, past_key_values=cache)
        assert same(cache, before)
    for arguments, words in (({"input_ids": ids.tolist()}, "tensor"), ({"input_ids": ids, "labels": [1]}, "labels")):
        with pytest.raises(TypeError, match=words):
            model(**arguments, past_key_values=cache)
    with pytest.raises(TypeError, match="SleepCache"):
        model.sleep(None)
    with pytest.raises(ValueError, match="rows from 0 to 0"):
        model.sleep(cache, rows=[1])
    assert same(cache, before)


def test_generation_that_fails_leaves_the_session_as_it_was(model):
    class Fail(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] > 12:
                raise RuntimeError("enough")
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    ids = tokens(1, 9)
    cache = model(ids[:, :6]).past_key_values
    before = cache.clone()
    with pytest.raises(RuntimeError, match="enough"):
        model.generate(ids, past_key_values=cache, stopping_criteria=[Fail()], max_new_tokens=9, eos_token_id=None)
    assert same(cache, before)


# --- what comes in


def test_int32_ids_are_ids(model):
    ids = tokens(1, 9)
    assert torch.equal(model(ids.int(), labels=ids.int()).loss, model(ids, labels=ids).loss)


def test_repeated_and_negative_columns_get_their_logits(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    every = model(ids, attention_mask=mask).logits
    for columns in ([8, 8, 2], [-1, 0, -1], [5]):
        keep = torch.tensor(columns)
        assert_close(model(ids, attention_mask=mask, logits_to_keep=keep).logits, every[:, keep], EXACT, f"{columns}")


@pytest.mark.parametrize("value", [2.0, -1.0, float("nan"), float("-inf"), 0.5])
@pytest.mark.parametrize("with_cache", [False, True])
def test_only_zeros_and_ones_are_a_mask(model, value, with_cache):
    ids, mask = tokens(2, 6), torch.ones(2, 6)
    mask[1, 2] = value
    cache = SleepCache() if with_cache else None
    with pytest.raises(ValueError, match=r"attention_mask of 1 \(real\) and 0 \(padding\)"):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache is None or cache.owner is None
    if value in (2.0, -1.0):
        with pytest.raises(ValueError, match="attention_mask of 1"):
            model(ids, attention_mask=mask.long(), past_key_values=cache)


def test_a_gap_in_a_mask_is_no_right_padding(model):
    """An unread last token, then left padding: the ordinary second turn of a batch."""
    first, second = tokens(2, 6), tokens(2, 4, seed=1)
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])
    cache = model(first).past_key_values
    logits = model(second, attention_mask=mask, past_key_values=cache).logits
    for row in range(2):
        alone = model(first[row : row + 1]).past_key_values
        real = mask[row].bool()
        expected = model(second[row : row + 1, real], past_key_values=alone).logits
        assert_close(logits[row, real], expected[0], EXACT, f"row {row}")
        assert cache.seen[row] == alone.seen[0]
    with pytest.raises(ValueError, match="left-padded"):
        model(second, attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), past_key_values=cache)


def test_fixed_shapes_hold_one_window_whatever_comes_in(model):
    cache = SleepCache(fixed_shapes=True)
    for width in (1, 1, 1, 2, 1, 3, 1, 1, 2):
        model(tokens(1, width), past_key_values=cache)
        assert cache.memory.columns <= 4


# --- settings that change


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_loops", 0),
        ("n_loops", True),
        ("eviction", "slidng"),
        ("window_size", 10**6),
        ("window_size", 2.5),
        ("loop_range", [2, 1]),
        ("loop_range", [1, 2]),  # no fast-weight layer among them
        ("checkpoint", "windows"),
        ("backprop_loops", 0),
        ("fast_weights", None),
    ],
)
def test_settings_changed_on_a_live_model_are_checked(name, value):
    model, ids = sleeping(window_size=4, n_loops=2), tokens(1, 9)
    cache = model(ids).past_key_values
    before, own = cache.clone(), getattr(model.config, name)
    setattr(model.config, name, value)
    for call in (lambda: model(ids), lambda: model(ids, past_key_values=cache), lambda: model.sleep(cache)):
        with pytest.raises(ValueError, match=name):
            call()
    assert same(cache, before)
    setattr(model.config, name, own)
    model(ids, past_key_values=cache)


def test_settings_changed_on_a_live_model_hold():
    model, ids = sleeping(window_size=4, n_loops=2), tokens(1, 9)
    other = sleeping(window_size=3, n_loops=3, loop_range=[0, 3])
    other.load_state_dict(model.state_dict())
    expected = other(ids).logits
    model.config.window_size, model.config.n_loops, model.config.loop_range = 3, 3, [0, 3]
    assert_close(model(ids).logits, expected, EXACT, "changed")
    model.config.loop_range[1] = 4
    assert (model(ids).logits - expected).abs().max() > 1e-6
    model.config.checkpoint = "window"
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_activation_checkpointing


# --- rows that end, and tokens that wait


class EndsAt(StoppingCriteria):
    """Row r ends after so many tokens."""

    def __init__(self, prompt, counts):
        self.ends = torch.tensor([prompt + count for count in counts])

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.ends


def test_what_fills_the_places_of_rows_that_have_ended_is_not_read(model):
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    counts = [9, 2, 5]
    keywords = GREEDY | {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, stopping_criteria=[EndsAt(7, counts)], **keywords)
    more = tokens(3, 3, seed=4)
    after = model(more, past_key_values=out.past_key_values).logits
    for row, count in enumerate(counts):
        prompt = ids[row, mask[row].bool()][None]
        alone = model.generate(prompt, **keywords | {"max_new_tokens": count})
        assert torch.equal(out.sequences[row, 7 : 7 + count], alone.sequences[0, prompt.shape[1] :])
        assert out.past_key_values.seen[row] == alone.past_key_values.seen[0] + 1 + 3
        expected = model(more[row : row + 1], past_key_values=alone.past_key_values).logits
        assert_close(after[row], expected[0], EXACT, f"row {row}")


def test_the_last_token_waits_and_is_read_first(model):
    ids, more = tokens(1, 7), tokens(1, 5, seed=1)
    out = model.generate(ids, max_new_tokens=4, eos_token_id=None, **GREEDY)
    cache = out.past_key_values
    assert cache.seen == [7 + 3] and cache.pending == [[int(out.sequences[0, -1])]]
    expected = model(torch.cat([out.sequences, more], 1)).logits[:, -5:]
    asleep = model.sleep(cache.clone())
    assert asleep.seen == [11] and asleep.pending == [[]]
    assert_close(model(more, past_key_values=cache).logits, expected, EXACT, "after what waited")
    assert cache.seen == [16] and cache.pending == [[]]


def test_generation_goes_on_with_new_tokens_only_or_with_the_whole_conversation(model):
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    keywords = GREEDY | {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    first = model.generate(ids, attention_mask=mask, stopping_criteria=[EndsAt(7, [2, 5])], **keywords)
    question, asked = tokens(2, 3, seed=9), torch.tensor([[0, 1, 1], [1, 1, 1]])
    made = torch.tensor([[1, 1, 0, 0, 0], [1] * 5])
    whole, whole_mask = torch.cat([first.sequences, question], 1), torch.cat([mask, made, asked], 1)
    expected = model.generate(whole, attention_mask=whole_mask, **keywords).sequences[:, -5:]
    kept = first.past_key_values
    on = model.generate(whole, attention_mask=whole_mask, past_key_values=kept.clone(), **keywords)
    assert torch.equal(on.sequences[:, -5:], expected)
    new = model.generate(question, attention_mask=asked, past_key_values=kept, new_tokens=True, **keywords)
    assert torch.equal(new.sequences, torch.cat([question, expected], 1))
    assert kept.seen == [7 - 3 + 2 + 2 + 4, 7 + 5 + 3 + 4]


def test_another_text_is_not_taken_for_the_conversation(model):
    ids = tokens(1, 9)
    cache = model(ids).past_key_values
    before = cache.clone()
    other = ids.clone()
    other[0, 1] += 1
    for prompt in (torch.cat([other, ids], 1), tokens(1, 5), ids):
        with pytest.raises(CacheMismatchError, match=r"9 tokens .* got \d+ tokens.*new_tokens=True"):
            model.generate(prompt, past_key_values=cache, max_new_tokens=2)
        assert same(cache, before)


# --- going back, joining, parting


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_rewinding_is_not_having_read(eviction):
    model = sleeping(window_size=5, n_loops=2, eviction=eviction)
    ids, mask, more = tokens(3, 13), torch.ones(3, 13, dtype=torch.long), tokens(3, 6, seed=3)
    mask[1, :2], mask[2, :9] = 0, 0  # 13, 11 and 4 tokens: 3, 1 and 4 of them awake
    cache = model(ids, attention_mask=mask).past_key_values
    cache.rewind([2, 1, 3])
    assert cache.seen == [11, 10, 1]
    again, branch = model(more, past_key_values=cache.clone()).logits, cache.clone()
    for row, left in enumerate((11, 10, 1)):
        text = ids[row, mask[row].bool()][None, :left]
        alone = model(text).past_key_values
        assert_close(
            again[row], model(more[row : row + 1], past_key_values=alone.clone()).logits[0], EXACT, f"row {row}"
        )
    model.sleep(branch)
    for row, left in enumerate((11, 10, 1)):
        alone = model(ids[row, mask[row].bool()][None, :left]).past_key_values
        model.sleep(alone)
        part = branch.split()[row]
        for mine, theirs in zip(part.memory.tensors(), alone.memory.tensors(), strict=True):
            assert_close(mine, theirs, EXACT, f"slept row {row}")
    with pytest.raises(ValueError, match=r"at most \[1, 0, 1\] tokens, those of the open window"):
        cache.rewind(2)
    cache.crop(-1) if min(cache.open_lengths) else None
    assert cache.seen == [11, 10, 1]


def test_a_session_that_was_cropped_goes_on(model):
    ids = tokens(1, 7)
    cache = model(ids).past_key_values
    cache.crop(5)
    assert cache.seen == [5] and cache.get_seq_length() == 5
    assert_close(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:], EXACT, "read again")
    with pytest.raises(ValueError, match="for good"):
        cache.crop(2)


def test_sessions_join_and_part(model):
    texts, more = [tokens(1, n, seed=n) for n in (3, 8, 13)], tokens(3, 6, seed=1)
    alone = [model(text).past_key_values for text in texts]
    together = SleepCache.join(alone)
    assert together.seen == [3, 8, 13]
    logits = model(more, past_key_values=together).logits
    for row, (cache, part) in enumerate(zip(alone, together.split(), strict=True)):
        expected = model(more[row : row + 1], past_key_values=cache).logits
        assert_close(logits[row], expected[0], EXACT, f"row {row}")
        assert part.seen == cache.seen and part.windows == cache.windows
        for mine, theirs in zip(part.memory.tensors(), cache.memory.tensors(), strict=True):
            assert_close(mine, theirs, EXACT, f"state of row {row}")
    with pytest.raises(CacheMismatchError, match="one model"):
        SleepCache.join([alone[0], SleepCache()])


def test_some_rows_sleep_and_others_do_not(model):
    cache = model(tokens(3, 7), n_loops=1).past_key_values
    model.sleep(cache, rows=[2, 0], n_loops=3)
    assert cache.windows == [2, 1, 2] and cache.passes == [3, 1, 3] and cache.open_lengths == [0, 3, 0]


def test_copies_are_independent(model):
    cache = model(tokens(2, 6)).past_key_values
    for twin in (copy.copy(cache), copy.deepcopy(cache), cache.clone()):
        before = cache.clone()
        model(tokens(2, 5), past_key_values=twin)
        assert same(cache, before) and not same(twin, before)


def test_rows_are_picked_by_number_or_mask_and_nothing_else(model):
    cache = model(tokens(3, 6)).past_key_values
    before = cache.clone()
    picks = ([2, 0], torch.tensor([2, 0]), [-1, 0])
    for indices in (*picks, [True, False, True], torch.tensor([True, False, True])):
        twin = cache.clone()
        twin.batch_select_indices(indices)
        assert len(twin.seen) == 2
    for wrong in ([3], [-4], [], [True, False], [0.5], torch.tensor([False] * 3)):
        with pytest.raises(ValueError, match="expected row"):
            cache.batch_select_indices(wrong)
        assert same(cache, before)


# --- memory


def test_sessions_outside_training_hold_no_graph(model):
    cache = SleepCache()
    for _ in range(3):
        model(tokens(1, 5), past_key_values=cache)
    gc.collect()
    now = cache.now
    assert not any(
        tensor.requires_grad for tensor in [*now.memory.tensors(), *(t for s in now.at_start.values() for t in s)]
    )
    model.sleep(cache)
    assert not any(tensor.requires_grad for tensor in cache.memory.tensors())


def test_a_row_without_a_new_token_has_nothing_to_go_on_from(model):
    ids, mask = tokens(2, 3), torch.tensor([[0, 0, 0], [1, 1, 1]])
    begun = model(tokens(2, 4)).past_key_values
    for cache in (begun, SleepCache()):
        before = cache.clone()
        with pytest.raises(ValueError, match=r"at least one new token in every row to go on from, rows \[0\]"):
            model.generate(ids, attention_mask=mask, past_key_values=cache, new_tokens=True, max_new_tokens=2)
        assert same(cache, before)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda c, v=v: c.crop(v) for v in (None, "a", 1.5, float("nan"))),
        *(lambda c, v=v: c.rewind(v) for v in (None, 1.5, -1, True, [1.5], [0, 0, 1])),
        *(lambda c, v=v: c.batch_repeat_interleave(v) for v in (None, True, 1.5, "2", 0)),
        *(lambda c, v=v: c.batch_select_indices(v) for v in (None, 0, "0", [0.0], [None], torch.tensor(0))),
        *(lambda c, v=v: SleepCache.join(v) for v in (None, SleepCache(), [SleepCache(), None])),
    ],
)
def test_what_is_no_row_or_number_is_refused(model, call):
    for cache in (model(tokens(2, 4)).past_key_values, SleepCache()):
        before = cache.clone()
        with pytest.raises((ValueError, TypeError), match="expected"):
            call(cache)
        assert same(cache, before)


@pytest.mark.parametrize("wrong", ["no", 1, None])
def test_whether_tokens_are_new_is_true_or_false(model, wrong):
    for cache in (None, SleepCache(), model(tokens(1, 5)).past_key_values):
        before = None if cache is None else cache.now
        with pytest.raises(TypeError, match=f"expected new_tokens to be True or False, got {wrong!r}"):
            model.generate(tokens(1, 3), past_key_values=cache, new_tokens=wrong, max_new_tokens=2)
        assert cache is None or cache.now is before


def test_only_the_rows_that_sleep_read_what_waits_for_them(model):
    out = model.generate(tokens(3, 7), max_new_tokens=3, eos_token_id=None, **GREEDY)
    cache, alone = out.past_key_values, out.past_key_values.split()
    model.sleep(cache, rows=[2, 0])
    assert [len(ids) for ids in cache.pending] == [0, 1, 0] and cache.seen == [10, 9, 10]
    for row in (2, 0):
        model.sleep(alone[row])
    after = model(tokens(3, 4, seed=1), past_key_values=cache).logits
    for row, part in enumerate(alone):
        expected = model(tokens(3, 4, seed=1)[row : row + 1], past_key_values=part).logits
        assert_close(after[row], expected[0], EXACT, f"row {row}")


def test_rows_that_wait_have_their_columns_once(model):
    """Where one of two rows sleeps, and the other reads its token later."""
    options = {"eos_token_id": None, "max_new_tokens": 2}
    cache = model.generate(tokens(2, 6), **options | GREEDY).past_key_values
    model.sleep(cache, rows=[0])
    assert [len(ids) for ids in cache.pending] == [0, 1]
    model(tokens(2, 2, seed=1), past_key_values=cache)
    assert (cache.seen, cache.get_seq_length()) == ([10, 10], 10)


def test_cropping_counts_what_waits(model):
    cache = model.generate(tokens(1, 6), max_new_tokens=3, eos_token_id=None, **GREEDY).past_key_values
    twin = cache.clone()
    cache.crop(9)
    assert cache.pending == twin.pending
    cache.crop(8)
    assert cache.pending == [[]] and cache.seen == [8]


def test_columns_count_a_token_that_waited(model):
    """After every turn of `generate`, and after a sleep on it."""
    cache, whole = SleepCache(), {"eos_token_id": None, "max_new_tokens": 2, "past_key_values": None}
    for turn in range(3):
        model.generate(tokens(1, 2, seed=turn), new_tokens=turn > 0, **whole | {"past_key_values": cache})
    model.sleep(cache)
    model(tokens(1, 2, seed=4), past_key_values=cache)
    assert (cache.seen, cache.get_seq_length()) == ([14], 14)
    text = cache.clone()
    model(tokens(1, 1, seed=5), past_key_values=text, attention_mask=torch.ones(1, 15, dtype=torch.long))
    cache.crop(13)
    assert (cache.seen, cache.get_seq_length()) == ([13], 13)


def test_generation_uses_a_session_whatever_the_base_says(model):
    """Trained checkpoints often say `use_cache: false`."""
    found = []
    for use_cache in (True, False):
        cache = SleepCache()
        model(tokens(1, 6), past_key_values=cache)
        options = {"max_new_tokens": 5, "eos_token_id": None, "new_tokens": True, "use_cache": use_cache}
        found.append(model.generate(tokens(1, 3, seed=1), past_key_values=cache, **options)[0].tolist())
        assert cache.seen == [13] and len(cache.pending[0]) == 1
    assert found[0] == found[1]


def test_a_session_outlives_changes_that_change_no_state(tmp_path):
    for change in ("a vocabulary that grew", "dropout"):
        model = sleeping(dtype=torch.float32)
        if change == "dropout":
            model.config.text_config.attention_dropout = 0.1
        else:
            model.resize_token_embeddings(VOCAB + 5)
        cache = SleepCache()
        model.eval()(tokens(1, 12), past_key_values=cache)
        cache.save(tmp_path / "session.safetensors")
        model.save_pretrained(tmp_path / change)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / change)
        taken = again(tokens(1, 2), past_key_values=SleepCache.load(tmp_path / "session.safetensors")).logits
        assert torch.equal(taken, model(tokens(1, 2), past_key_values=cache).logits), change


def test_a_state_is_not_said_to_be_in_another_precision(model):
    cache = model(tokens(1, 6), use_cache=True).past_key_values
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match="expected a state of float32"):
            cache.to(dtype=dtype)


# --- in another precision


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "qwen3_next", "falcon_h1", "nemotron_h", "jet_nemotron"])
def test_a_session_goes_on_where_its_model_is_loaded_in_another_precision(family, fixed_shapes):
    """Whose it is says nothing of the precision; keys and inputs of convolutions become those of the model now."""
    wide = sleeping(family).eval()
    models = {dtype: copy.deepcopy(wide).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}

    def read(first, then):
        session, logits = SleepCache(fixed_shapes), []
        with torch.no_grad():
            for count in (6, 1):
                models[first](tokens(2, count, seed=count), past_key_values=session)
            # One row alone, then both, of which the other has read nothing in the new precision.
            models[then](tokens(2, 1), attention_mask=torch.tensor([[1], [0]]), past_key_values=session)
            logits += [models[then](tokens(2, 1, seed=t), past_key_values=session).logits for t in range(2)]
            # Past the window.
            assert models[then](tokens(2, 5), past_key_values=session).logits.isfinite().all()
        return torch.cat(logits, 1)

    expected = read(torch.float32, torch.float32)
    assert_close(read(torch.float64, torch.float32), expected, DEVICE32, "from float64 to float32")
    assert_close(read(torch.float32, torch.float64).float(), expected, DEVICE32, "from float32 to float64")
    for first, then in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        logits = read(first, then)
        assert logits.isfinite().all() and logits.dtype == then
