"""Probes against plain computations on tiny models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from families import tiny_base
from small import sleeping
from tolerances import EXACT, GROWN, assert_close

from benchmarks import probes as command
from sleepify import FastWeightConfig, SleepForCausalLM, probes
from sleepify import sleep as algorithm
from sleepify.memory import Memory
from sleepify.recording import recorded
from sleepify.snapshot import Window
from sleepify.tasks.base import IGNORE, Example, Query
from sleepify.tasks.hops import Hops

L = 4


def model_of(**keywords) -> SleepForCausalLM:
    torch.manual_seed(0)
    return sleeping(**({"window_size": L} | keywords)).eval()


def rows_of(lengths: list[int], seed: int = 0) -> list[Example]:
    """Rows whose last token, and the one three before it, are asked for."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(1, 30, (length,), generator=generator).tolist()
        queries = [Query(2, length - 3, length - 2), Query(1, length - 2, length)]
        examples.append(Example(ids, [IGNORE] * length, queries))
    return examples


def alone(model: SleepForCausalLM, example: Example, **keywords) -> torch.Tensor:
    """Log-probabilities [T, V] of what follows each token of one row, read by itself."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids]), use_cache=False, **keywords).logits[0]
    return logits.log_softmax(-1)


def test_answers_are_those_of_rows_read_alone():
    # Lengths that take other numbers of windows, and one that ends where a window does.
    model, examples = model_of(), rows_of([5, 14, 9, 4, 14, 12])
    found = probes.answer(model, examples, batch_size=2)
    place = 0
    for row, example in enumerate(examples):
        known = alone(model, example)
        for query in example.queries:
            at = known[query.start - 1 : query.stop - 1]
            wanted = torch.tensor(example.input_ids[query.start : query.stop])
            assert (int(found.row[place]), int(found.difficulty[place])) == (row, query.difficulty)
            assert bool(found.correct[place]) == bool((at.argmax(-1) == wanted).all())
            assert int(found.first[place]) == int(at[0].argmax())
            assert_close(found.entropy[place], -(at.exp() * at).sum(-1).mean(), EXACT)
            assert_close(found.log_probability[place], at[torch.arange(len(wanted)), wanted].sum(), EXACT)
            place += 1
    assert place == len(found.row)
    assert set(found.of(2).difficulty.tolist()) == {2} and found.of(2).row.tolist() == list(range(6))


def test_an_answer_counts_as_right_when_all_of_it_is():
    model, (example,) = model_of(), rows_of([11])
    for query in example.queries:
        for token in range(query.start, query.stop):
            example.input_ids[token] = int(alone(model, example)[token - 1].argmax())
    found = probes.answer(model, [example])
    assert found.correct.all() and found.accuracy == 1.0
    example.input_ids[-1] = 1 + example.input_ids[-1] % 29
    assert probes.answer(model, [example]).correct.tolist() == [True, False]


def test_after_each_pass_of_one_window_it_is_a_sleep_of_so_few():
    model, examples = model_of(), rows_of([2 * L, 2 * L])
    found = probes.answer_by_pass(model, examples, [1, 2, 3, 5])
    for m, each in zip([1, 2, 3, 5], found, strict=True):
        shorter = probes.answer(model, examples, n_loops=m)
        assert_close(each.log_probability, shorter.log_probability, EXACT)
    assert (found[0].log_probability - found[2].log_probability).abs().min() > GROWN.atol


def test_after_each_pass_only_the_last_window_is_slept_on_for_less():
    model, examples = model_of(), rows_of([15, 15])
    assert all(query.start > 3 * L for example in examples for query in example.queries[1:])
    examples = [replace(example, queries=example.queries[1:]) for example in examples]
    ids = torch.tensor([example.input_ids for example in examples])
    ends = []
    # The memories themselves, woken by hand.
    model.branch = lambda each, earlier: ends.append(earlier)
    with torch.no_grad():
        model(ids, use_cache=False)
        model.branch = None
        window = Window(ids[:, 3 * L :], (3, 3), (0, 0))
        for m in (1, 2):
            hidden, _, _ = algorithm.wake(model.blocks, window, ends[-1][m - 1], model.options(), False)
            known = model.blocks.logits(hidden).log_softmax(-1)
            found = probes.answer(model, examples, last_n_loops=m)
            for row, example in enumerate(examples):
                wanted = torch.tensor(example.input_ids[13:15])
                assert_close(found.log_probability[row], known[row, [0, 1], wanted].sum(), EXACT)
    assert len(ends) == 3


def test_further_windows_stand_between_the_text_and_the_queries():
    model, examples = model_of(), rows_of([2 * L, 2 * L])
    further = [[7] * (2 * L), list(range(1, 2 * L + 1))]
    found = probes.interference(model, examples, further, [1, 3])
    assert found.n_loops == (1, 3) and found.accuracy().shape == (2, 3)
    for n, answers in zip(found.n_loops, found.answers, strict=True):
        for count, each in enumerate(answers):
            for row, example in enumerate(examples):
                ids = example.input_ids[:L] + further[row][: count * L] + example.input_ids[L:]
                known = alone(model, Example(ids, ids, []), n_loops=n)
                right = known[-4, example.input_ids[-3]]
                assert_close(each.log_probability[2 * row], right, EXACT)
    with pytest.raises(ValueError, match="whole windows of 4 tokens"):
        probes.interference(model, examples, [[1] * 5, [1] * 5], [1])


@pytest.mark.parametrize("exponent", [0.25, 1.0])
def test_later_passes_decay_less(exponent):
    # One looped layer with an inserted one behind it, one before and one after the loop.
    model = model_of(fast_weights=FastWeightConfig(layers=[0, 1, 2]), loop_range=(1, 2))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])
    mixer, blocks, settings = model.fast_weights[1].mixer, model.blocks, model.options()
    with torch.no_grad():
        mixer.A_log += 3  # decays that are seen in windows of four tokens
        memory, kept = Memory(2), mixer.A_log.clone()
        for begin in (0, L):
            hidden, frame = blocks.open(ids[:, begin : begin + L], (L, L), (0, 0), memory, False)
            hidden, now = blocks.run(hidden, memory, frame, 0, 1)
            for loop in range(settings.n_loops):
                # exp(A_log) is a factor of log a_t.
                mixer.A_log.copy_(kept + math.log(exponent) * (loop > 0))
                hidden, now = blocks.run(hidden, now.reenter(memory, 1, 2), frame, 1, 2)
            mixer.A_log.copy_(kept)
            _, memory = blocks.run(hidden, now, frame, 2, 3)
            memory = memory.last_keys(0)
        usual = model(ids, use_cache=True).past_key_values.now.at_start
        with probes.later_decay(model, exponent):
            found = model(ids, use_cache=True).past_key_values.now.at_start
        after = model(ids, use_cache=True).past_key_values.now.at_start
    moved = []
    for key, state in usual.items():
        assert_close(found[key].recurrent, memory.state[key].recurrent, EXACT)
        assert torch.equal(after[key].recurrent, state.recurrent)
        moved.append(float((found[key].recurrent - state.recurrent).abs().max()))
    assert max(moved) > GROWN.atol if exponent < 1 else max(moved) == 0


def test_less_decay_is_refused_where_there_is_none_at_hand():
    with pytest.raises(ValueError, match="0 or more, got -1"), probes.later_decay(model_of(), -1):
        pass
    for wrong in (True, "1", None):
        with pytest.raises(TypeError, match="0 or more"), probes.later_decay(model_of(), wrong):
            pass
    model, ids = model_of(), torch.tensor([[3, 1, 4, 1, 5, 9]])
    usual = model(ids).logits
    with pytest.raises(TypeError, match="get_base_model"), recorded(torch.nn.Sequential(model)):
        pass
    with pytest.raises(TypeError, match="get_base_model"), probes.later_decay(torch.nn.Sequential(model), 0.5):
        pass
    with pytest.raises(ValueError, match="leave that first"), probes.later_decay(model, 0.5):
        with probes.later_decay(model, 0.5):
            pass
    with pytest.raises(ValueError, match="without gradient"), probes.later_decay(model, 0.5):
        model(ids)
    assert torch.equal(model(ids).logits, usual)
    hybrid = sleeping("qwen3_next", window_size=L, fast_weights=None)
    with pytest.raises(ValueError, match="inserted layers among the looped"), probes.later_decay(hybrid, 0.5):
        pass


def test_attribution_is_what_is_lost_without_a_window():
    model, examples = model_of(), rows_of([15, 14])
    found = probes.attribution(model, examples)
    # The first query of a row is at most in the third window.
    assert found.change.shape == (2, 4)
    for window in range(2):
        for row, example in enumerate(examples):
            ids = example.input_ids[: window * L] + example.input_ids[(window + 1) * L :]
            known, whole = alone(model, Example(ids, ids, [])), alone(model, example)
            right = example.input_ids[-3]
            assert_close(found.change[window, 2 * row], whole[-4, right] - known[-4, right], EXACT)
    with pytest.raises(ValueError, match="equally many windows of 4 tokens"):
        probes.attribution(model, rows_of([15, 8]))
    with pytest.raises(ValueError, match="at least one"):
        probes.attribution(model, rows_of([4]))


@pytest.mark.parametrize("examples", [[], [Example([1, 2], [IGNORE] * 2, [])], [Example([1], [1], [Query(1, 0, 1)])]])
def test_what_cannot_be_answered_is_refused(examples):
    with pytest.raises(ValueError, match="expected"):
        probes.answer(model_of(), examples)


def chains(model: SleepForCausalLM, ids: torch.Tensor) -> list[list[dict]]:
    """The matrix states before and after every pass of every sleep of some rows, from sleeps of fewer passes."""
    found = []
    for stop in range(L, ids.shape[1], L):
        before = model(ids[:, :stop], use_cache=True, logits_to_keep=1).past_key_values
        start = {key: value.recurrent for key, value in before.now.at_start.items()}
        chain = [start]
        for m in range(1, model.config.n_loops + 1):
            cache = before.clone()
            model(ids[:, stop : stop + 1], past_key_values=cache, n_loops=m)
            chain.append({key: value.recurrent for key, value in cache.now.at_start.items()})
        found.append(chain)
    return found


def test_steps_of_passes_are_those_of_the_states_themselves():
    model = model_of(fast_weights=FastWeightConfig(layers=[0, 2]), loop_range=(0, 2))
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [1, 2, 3, 4, 5, 6]]
    before = (model.watch, model.branch, model.training)
    found = probes.pass_steps(model, rows, batch_size=2)
    assert before == (model.watch, model.branch, model.training)
    # Layer 2 is not looped.
    assert found.layers == ((0, 1),) and found.sizes.shape == (3, 1, 5)
    assert sorted(zip(found.row.tolist(), found.window.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    ]
    with torch.no_grad():
        for row, ids in enumerate(rows):
            for window, chain in enumerate(chains(model, torch.tensor([ids]))):
                (place,) = ((found.row == row) & (found.window == window)).nonzero().flatten().tolist()
                for n, (had, now) in enumerate(pairwise(chain)):
                    state = now[0, 1]
                    moved = state - had[0, 1] if (0, 1) in had else state
                    expected = moved.norm() / state.norm()
                    assert_close(found.sizes[n, 0, place], expected, EXACT)
    with pytest.raises(ValueError, match="longer than a window"):
        probes.pass_steps(model, [[1, 2, 3, 4]])


def test_features_are_the_states_after_each_pass_of_the_last_sleep():
    model = model_of()
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [1, 2, 3, 4, 5]]
    found = probes.state_features(model, rows, batch_size=2)
    with torch.no_grad():
        for row, ids in enumerate(rows):
            for m, states in enumerate(chains(model, torch.tensor([ids]))[-1][1:]):
                expected = torch.cat([states[key].flatten() for key in sorted(states)])
                assert_close(found[m, row], expected.double(), EXACT)
    with pytest.raises(ValueError, match=r"got shorter ones at \[1\]"):
        probes.state_features(model, [rows[0], [1, 2]])


def test_a_recording_leaves_the_model_as_it_was_after_an_error():
    model = model_of().train()
    seen = []
    model.watch = seen.append
    with pytest.raises(RuntimeError), recorded(model):
        assert not model.training
        raise RuntimeError
    assert model.training and model.branch is None and model.watch == seen.append


@pytest.mark.parametrize("shape", [(30, 4), (6, 20)])
def test_ridge_is_least_squares_with_rows_for_the_penalty(shape):
    torch.manual_seed(0)
    x, y, penalty = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 3, dtype=torch.float64), 0.7
    weight, bias = probes.ridge(x, y, penalty)
    # The penalty as observations of 0; a column of ones for the bias, which is not penalised.
    width = shape[1]
    top = torch.cat([x, torch.ones(shape[0], 1, dtype=x.dtype)], 1)
    low = torch.cat([penalty**0.5 * torch.eye(width, dtype=x.dtype), torch.zeros(width, 1, dtype=x.dtype)], 1)
    whole = torch.linalg.lstsq(torch.cat([top, low]), torch.cat([y, torch.zeros(width, 3, dtype=x.dtype)])).solution
    assert_close(torch.cat([weight, bias[None]]), whole, EXACT)
    with pytest.raises(ValueError, match="penalty above 0"):
        probes.ridge(x, y, 0.0)


def test_a_linear_probe_finds_what_is_linear_and_nothing_else():
    torch.manual_seed(0)
    tokens = torch.randint(5, 9, (400, 2))
    noise = torch.randint(5, 9, (400, 1))
    features = torch.nn.functional.one_hot(tokens - 5).flatten(1).double() @ torch.randn(8, 12, dtype=torch.float64)
    found = probes.linear_probe(features, torch.cat([tokens, noise], 1), held_out=100, penalty=1e-6)
    assert found[:2].tolist() == [1.0, 1.0] and found[2] < 0.5
    with pytest.raises(ValueError, match="100 held out"):
        probes.linear_probe(features[:101], tokens[:101], held_out=100)


def test_recall_reads_each_window_again_from_the_last_state():
    model = model_of()
    rows = torch.randint(1, 30, (5, 3 * L), generator=torch.Generator().manual_seed(4)).tolist()
    found = probes.recall(model, rows, [1, 3], batch_size=2)
    assert found.accuracy.shape == (2, 3)
    right = torch.zeros(2, 3)
    without = torch.zeros(3)
    with torch.no_grad():
        for ids in rows:
            for age in range(3):
                window = ids[(2 - age) * L : (3 - age) * L]
                fresh = alone(model, Example(window[:-1], [], [])).argmax(-1).tolist()
                without[age] += sum(a == b for a, b in zip(fresh, window[1:], strict=True))
                # With N = 3 throughout it is one text, which reads the window once more.
                again = alone(model, Example(ids + window[:-1], [], []))[3 * L :].argmax(-1).tolist()
                right[1, age] += sum(a == b for a, b in zip(again, window[1:], strict=True))
                cache = model(torch.tensor([ids]), use_cache=True).past_key_values
                shorter = model(torch.tensor([window[:-1]]), past_key_values=cache, n_loops=1).logits[0].argmax(-1)
                right[0, age] += sum(a == b for a, b in zip(shorter.tolist(), window[1:], strict=True))
    assert torch.equal(found.accuracy, right.double() / 15) and torch.equal(found.without, without.double() / 15)
    with pytest.raises(ValueError, match="whole windows of 4 tokens"):
        probes.recall(model, [[1, 2, 3]], [1])
    with pytest.raises(ValueError, match="hard eviction"):
        probes.recall(model_of(eviction="sliding"), rows, [1])


TASK = Hops(n_nodes=6, n_queries=3, max_hops=6)


def test_hops_of_answers_are_counted_along_the_cycle():
    example = TASK.example(0, "test")
    follows = probes.successors(TASK, example)
    ended = replace(TASK, pair_ends=True)
    assert probes.successors(ended, ended.example(0, "test")) == follows
    assert len(follows) == 6 and sorted(follows) == sorted(follows.values())
    for query in example.queries:
        start, right = example.input_ids[query.start - 1], example.input_ids[query.start]
        assert probes.walk(follows, start, query.difficulty)[-1] == right
    # What would be answered by a node one, two, no hops on, and by none.
    query = example.queries[0]
    path, start = query.difficulty, example.input_ids[query.start - 1]
    way = probes.walk(follows, start, 6)
    rows = [replace(example, queries=[query])] * 4
    first = torch.tensor([way[1], way[2], start, 0])
    found = probes.hops_answered(TASK, rows, answers_of(first, path))
    assert found.hops.tolist() == [1, 2, 6, 0] and found.path.tolist() == [path] * 4
    assert found.earlier.tolist() == [path > 1, path > 2, False, False]


def answers_of(first: torch.Tensor, difficulty: int) -> probes.Answers:
    nothing = torch.zeros(len(first), dtype=torch.float64)
    return probes.Answers(
        torch.arange(len(first)), torch.full_like(first, difficulty), nothing > 0, nothing, nothing, first
    )


def test_wrong_answers_are_split_by_the_facts_on_their_way(monkeypatch):
    """What is told of single hops is said here: those from the first half of the nodes are known."""
    known = set(range(7, 10))
    single = []

    def told(model, examples, *, last_n_loops, batch_size):
        assert (model, last_n_loops) == (None, 2)
        if single:
            single.extend(examples)
            right = torch.tensor([example.input_ids[-2] in known for example in examples])
        else:
            single.append(None)
            right = torch.arange(sum(len(example.queries) for example in examples)) % 2 == 0
        nothing = torch.zeros(len(right), dtype=torch.float64)
        return probes.Answers(nothing.long(), nothing.long(), right, nothing, nothing, nothing.long())

    monkeypatch.setattr("sleepify.probes.hops.answer", told)
    examples = [TASK.example(index, "test") for index in range(40)]
    found = probes.split_wrong(None, TASK, examples, last_n_loops=2)
    asked = single[1:]
    assert len(asked) == 40 * 6
    for place, each in enumerate(asked):
        text = examples[place // 6].input_ids[:12]
        assert each.input_ids[:13] == [*text, 1] and len(each.input_ids) == 15
        assert each.input_ids[14] == dict(zip(text[::2], text[1::2], strict=True))[each.input_ids[13]]
        assert each.queries == [Query(1, 14, 15)]
    place = 0
    for example in examples:
        follows = probes.successors(TASK, example)
        for query in example.queries:
            node, there = example.input_ids[query.start - 1], True
            for _ in range(query.difficulty):
                there, node = there and node in known, follows[node]
            assert bool(found.retrieved[place]) == there
            assert bool(found.not_retrieved[place]) == (place % 2 == 1 and not there)
            assert bool(found.not_computed[place]) == (place % 2 == 1 and there)
            place += 1
    assert found.retrieved.any() and found.not_retrieved.any() and found.not_computed.any()


def test_single_hops_are_asked_of_the_same_state():
    torch.manual_seed(0)
    model = sleeping(tiny_base("qwen3", torch.float64), window_size=TASK.window_size).eval()
    examples = [TASK.example(index, "test") for index in range(3)]
    found = probes.split_wrong(model, TASK, examples, last_n_loops=2)
    assert torch.equal(found.answers.correct, probes.answer(model, examples, last_n_loops=2).correct)
    assert torch.equal(found.not_retrieved | found.not_computed, ~found.answers.correct)


def test_panels_are_drawn_side_by_side(tmp_path):
    panel = probes.Panel("title", "m", "answered", [1, 2], {"a": [0.1, 0.2], "b": [0.3, 0.1]})
    probes.plot([panel] * 4, tmp_path / "new" / "figure.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one panel"):
        probes.plot([], tmp_path / "none.png")


def test_a_page_is_written_of_a_trained_model(tmp_path):
    torch.manual_seed(0)
    base = tiny_base("qwen3", torch.float32, num_hidden_layers=2)
    model = sleeping(base, n_loops=2, window_size=16, fast_weights=FastWeightConfig(layers=[0, 1]))
    folder = tmp_path / "hops8" / "n2_seed0"
    model.save_pretrained(folder)
    noted = {"recipe": "hops", "task": {"n_queries": 5}, "tokenizer": None}
    (folder / "task.json").write_text(json.dumps(noted), encoding="utf-8")
    threads = torch.get_num_threads()
    page = tmp_path / "probes.md"
    command.main([str(folder), "--rows", "6", "--fitted", "8", "--output", str(page)])
    torch.set_num_threads(threads)
    text = page.read_text(encoding="utf-8")
    assert text.count("\n## ") == 8 and "outputs/worth/hops8/n2_seed0 --rows 6 --fitted 8" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    (folder / "task.json").write_text(json.dumps(noted | {"recipe": "depo"}), encoding="utf-8")
    with pytest.raises(ValueError, match="trained on hops, got one of depo"):
        command.main([str(folder)])
