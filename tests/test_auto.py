"""n_loops="auto": as many passes as each row's state needs, and then exactly what a sleep of so many passes leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import small
import talking
import torch
from families import VOCAB, tokens, true_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, EXACT_GRAD, assert_close

import sleepify
from sleepify import FastWeightConfig, SleepCache, SleepConfig, SleepForCausalLM, SleepifyError
from sleepify.calibration import mean_passes
from sleepify.cli import main
from sleepify.convergence import unrest

N = 8
SETTINGS = settings(max_examples=10)
EVICTION = pytest.mark.parametrize("eviction", ["hard", "sliding"])


def sleeping(*arguments, **keywords) -> SleepForCausalLM:
    """The same model each time: inserted layers draw their decay, on which the number of passes depends."""
    torch.manual_seed(1)
    return small.sleeping(*arguments, **keywords)


@pytest.fixture(autouse=True, scope="module")
def exactly() -> Iterator[None]:
    with true_float64():
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, SleepForCausalLM]:
    return {eviction: sleeping(eviction=eviction, n_loops=N).eval() for eviction in ("hard", "sliding")}


def read(model: SleepForCausalLM, rows: list[torch.Tensor], **keywords) -> SleepCache:
    """The session of rows of any length, padded on the left."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    cache = SleepCache()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, **keywords)
    return cache


def row_of(cache: SleepCache, row: int) -> SleepCache:
    return cache.split()[row]


def held(cache: SleepCache) -> list[torch.Tensor]:
    """Everything that a session of one row knows of its text."""
    states = [tensor for key in sorted(cache.memory.state) for tensor in cache.memory.state[key] if tensor is not None]
    return [*states, *(tensor for layer in sorted(cache.memory.kv) for tensor in cache.memory.kv[layer])]


def changes_of(model: SleepForCausalLM, before: SleepCache) -> list[float]:
    """By how much the size of a pass's step changes from pass to pass, in the one row of a session, from plain sleeps
    of 0, 1, 2 ... passes."""
    start, stop = model.options().loop_range

    def states(cache: SleepCache) -> torch.Tensor:
        kept = [(key, layer) for key, layer in sorted(cache.memory.state.items()) if start <= key[0] < stop]
        return torch.cat([layer.recurrent.flatten() for _, layer in kept if layer.recurrent is not None])

    left = []
    for n in range(1, model.config.n_loops + 1):
        other = before.clone()
        model.sleep(other, n_loops=n)
        left.append(states(other))
    at_start = [layer.recurrent.flatten() for key, layer in sorted(before.at_start.items()) if start <= key[0] < stop]
    chain = [torch.cat(at_start) if at_start else torch.zeros_like(left[0]), *left]
    r = [float((now - had).norm() / now.norm()) for had, now in zip(chain, chain[1:], strict=False)]
    return [abs(b - a) for a, b in zip(r, r[1:], strict=False)]


def by_definition(changes: list[float], threshold: float) -> int:
    """After how many passes a row with these changes stops."""
    n_loops = len(changes) + 1
    for n in range(3, n_loops):
        if changes[n - 2] < threshold and changes[n - 3] < threshold:
            return n
    return n_loops


# --- values -----------------------------------------------------------------------------------------------------------


@EVICTION
@pytest.mark.parametrize("rule", ["gdn", "jet", "mamba2"])
@pytest.mark.parametrize("loop_range", [(0, 4), (1, 3), (2, 4)])
def test_a_row_keeps_what_its_own_last_pass_left_bit_for_bit(eviction: str, rule: str, loop_range) -> None:
    inserted = FastWeightConfig(rule=rule, layers=[0, 2])
    model = sleeping(eviction=eviction, n_loops=N, loop_range=loop_range, fast_weights=inserted).eval()
    before = read(model, [tokens(1, length, seed=length)[0] for length in (4, 9, 3, 5)])
    stops, plain = set(), {}
    # Thresholds between the rows' own: some stop earlier than others.
    for threshold in (0.3, 0.1, 0.03, 0.01):
        model.config.auto_threshold = threshold
        after = model.sleep(before.clone(), n_loops="auto")
        stops.add(tuple(after.passes))
        for row, n in enumerate(after.passes):
            if n not in plain:
                plain[n] = model.sleep(before.clone(), n_loops=n)
            assert plain[n].passes[row] == n
            for mine, other in zip(held(row_of(after, row)), held(row_of(plain[n], row)), strict=True):
                assert torch.equal(mine, other)
    assert any(len(set(each)) > 1 for each in stops), f"rows of one batch stop apart somewhere, {stops}"


@EVICTION
@pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "ouro", "mamba_host"])
def test_a_row_stops_where_the_definition_says(eviction: str, family: str) -> None:
    base = {"mamba_host": "falcon_h1"}.get(family, family)
    inserted = FastWeightConfig(layers=[0, 2]) if family in ("qwen3", "ouro") else None
    model = sleeping(base, eviction=eviction, n_loops=N, fast_weights=inserted).eval()
    before = read(model, [tokens(1, 8)[0]])
    found, changes = set(), changes_of(model, before)
    for threshold in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-9):
        model.config.auto_threshold = threshold
        after = model.sleep(before.clone(), n_loops="auto")
        assert after.passes == [by_definition(changes, threshold)]
        found.add(after.passes[0])
    assert 3 in found and N in found, "both ends are reached"


@SETTINGS
@given(
    eviction=st.sampled_from(["hard", "sliding"]),
    lengths=st.lists(st.integers(1, 17), min_size=2, max_size=4),
    threshold=st.sampled_from([0.5, 0.2, 0.07, 0.02]),
    window_size=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_a_row_in_a_batch_equals_the_row_alone(models, eviction, lengths, threshold, window_size, seed) -> None:
    model = models[eviction]
    model.config.auto_threshold, model.config.window_size = threshold, window_size
    rows = [tokens(1, length, seed=seed + place)[0] for place, length in enumerate(lengths)]
    together = read(model, rows, n_loops="auto")
    together = model.sleep(together, n_loops="auto")
    for row, ids in enumerate(rows):
        alone = model.sleep(read(model, [ids], n_loops="auto"), n_loops="auto")
        one = row_of(together, row)
        assert one.passes == alone.passes and max(one.passes) <= N
        assert one.windows == alone.windows
        for mine, other in zip(held(one), held(alone), strict=True):
            assert_close(mine, other, EXACT)


@EVICTION
def test_however_the_text_arrives(models, eviction: str) -> None:
    model = models[eviction]
    model.config.auto_threshold, model.config.window_size = 0.05, 5
    ids = tokens(2, 18)
    whole = read(model, list(ids), n_loops="auto")
    pieces = SleepCache()
    with torch.no_grad():
        for piece in ids.split([1, 6, 3, 8], dim=1):
            model(piece, past_key_values=pieces, n_loops="auto")
    assert pieces.passes == whole.passes
    for row in (0, 1):
        for mine, other in zip(held(row_of(pieces, row)), held(row_of(whole, row)), strict=True):
            assert_close(mine, other, EXACT)


def test_generation_takes_it(models) -> None:
    model = models["hard"]
    model.config.auto_threshold, model.config.window_size = 0.3, 5
    cache, ids = SleepCache(), tokens(1, 7)
    made = model.generate(
        ids, past_key_values=cache, n_loops="auto", max_new_tokens=9, do_sample=False, eos_token_id=VOCAB
    )
    step_by_step, row = SleepCache(), ids
    with torch.no_grad():
        for _ in range(9):
            new = row[:, step_by_step.get_seq_length() :]
            scores = model(new, past_key_values=step_by_step, n_loops="auto").logits
            row = torch.cat([row, scores[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, row) and cache.passes == step_by_step.passes
    assert cache.passes != [N]


def test_a_window_that_was_read_awake_takes_the_same_course(models) -> None:
    """There the wake pass is the first of the sleep."""
    model = models["hard"]
    model.config.auto_threshold, model.config.window_size = 0.05, 5
    ids = tokens(2, 13)
    with torch.no_grad():
        shared = model(ids, labels=ids, use_cache=True, n_loops="auto")
        model.config.checkpoint = "window"
        apart = model(ids, labels=ids, use_cache=True, n_loops="auto")
        model.config.checkpoint = "none"
    assert shared.past_key_values.passes == apart.past_key_values.passes
    assert_close(shared.loss, apart.loss, EXACT)


@pytest.mark.parametrize("checkpoint", ["none", "window", "loop"])
def test_gradient_is_that_of_the_passes_made(checkpoint: str) -> None:
    model = sleeping(n_loops=N, checkpoint=checkpoint, auto_threshold=0.2).eval()
    ids = tokens(1, 8)
    cache = read(model, [ids[0]], n_loops="auto")
    (made,) = cache.passes
    assert 3 < made < N

    def gradients(n_loops) -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, n_loops=n_loops, use_cache=False).loss.backward()
        return [weight.grad.clone() for weight in model.fast_weights.parameters() if weight.grad is not None]

    for mine, plain in zip(gradients("auto"), gradients(made), strict=True):
        assert_close(mine, plain, EXACT_GRAD)


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_read(models, monkeypatch) -> None:
    model = sleeping(n_loops=N).eval()
    ids, cache = tokens(1, 8), SleepCache()
    with pytest.raises(
        ValueError, match=r"threshold for n_loops=\"auto\", got auto_threshold=None: sleepify.calibrate"
    ):
        model(ids, n_loops="auto", past_key_values=cache)
    model.config.auto_threshold = 0.1
    with pytest.raises(ValueError, match="whole number of at least 1, or \"auto\", got 'automatic'"):
        model(ids, n_loops="automatic", past_key_values=cache)
    with pytest.raises(ValueError, match="a number for n_loops with `awake`"):
        model(ids, n_loops="auto", awake=torch.zeros_like(ids, dtype=torch.bool), past_key_values=cache)
    model.config.backprop_loops = 2
    with pytest.raises(ValueError, match="without backprop_loops, got backprop_loops=2"):
        model(ids, n_loops="auto", past_key_values=cache)
    with torch.no_grad():
        model(ids, n_loops="auto")
    model.config.backprop_loops = None
    model.train()
    with pytest.raises(ValueError, match="a number for n_loops in training"):
        model(ids, n_loops="auto", past_key_values=cache)
    model.eval()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model.blocks.layers[0]._is_fsdp_managed_module = True
    with torch.no_grad(), pytest.raises(SleepifyError, match="a number for n_loops under FSDP"):
        model(ids, n_loops="auto", past_key_values=cache)
    assert cache.now is None


@pytest.mark.parametrize("wrong", [0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_a_threshold_is_a_number_above_0(wrong) -> None:
    with pytest.raises(ValueError, match="expected auto_threshold to be a number above 0"):
        SleepConfig(auto_threshold=wrong)


def test_the_threshold_is_saved(tmp_path) -> None:
    sleeping(auto_threshold=0.125).save_pretrained(tmp_path)
    assert SleepForCausalLM.from_pretrained(tmp_path).config.auto_threshold == 0.125


# --- calibration ------------------------------------------------------------------------------------------------------


@EVICTION
def test_calibration_gives_the_nearest_mean(models, eviction: str) -> None:
    """On rows of one window the passes recorded are those that are made."""
    model = models[eviction]
    model.config.window_size = 5
    rows = [tokens(1, 6, seed=seed)[0] for seed in range(12)]

    def mean_at(threshold: float) -> float:
        model.config.auto_threshold = threshold
        passes = read(model, rows, n_loops="auto").passes
        return sum(passes) / len(passes)

    others = [mean_at(float(other)) for other in torch.logspace(-4, 1, 60)]
    for mean in (3, 3.7, 5, 6.5, 8):
        found = mean_at(sleepify.calibrate(model, rows, mean_n_loops=mean, batch_size=5))
        assert abs(found - mean) <= min(abs(other - mean) for other in others) + 1e-9
        assert found == mean or mean not in (3, N)


def test_calibration_counts_sleeps_of_long_rows(models) -> None:
    model = models["hard"]
    model.config.window_size = 5
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (23, 6, 14)]
    seen = []

    def passes(each, memory) -> None:
        seen.append(len(each.rows))

    model.watch = passes
    model.train()
    one, two = (sleepify.calibrate(model, rows, mean_n_loops=4.5, batch_size=size) for size in (1, 3))
    assert model.watch is passes and model.branch is None and model.training and not seen
    model.watch = None
    model.eval()
    assert abs(one - two) <= 1e-9 * one


def test_the_mean_falls_as_the_threshold_rises() -> None:
    steps = [[1.0, 0.4, 0.25, 0.2, 0.19], [1.0, 0.9, 0.5, 0.45, 0.44], [1.0, 0.1, 0.05, 0.04, 0.04]]
    assert unrest(steps[0]) == pytest.approx(0.05)
    means = [mean_passes(steps, threshold, 6) for threshold in (1e-6, 0.02, 0.06, 0.2, 0.45, 0.7, 1.0)]
    assert means == sorted(means, reverse=True) and means[0] == 6 and means[-1] == 3


def test_calibration_refuses_what_cannot_be(models) -> None:
    model = models["hard"]
    model.config.window_size = 5
    rows = [tokens(1, 9)[0]]
    with pytest.raises(ValueError, match="mean_n_loops from 3 to the model's N = 8, got 2"):
        sleepify.calibrate(model, rows, mean_n_loops=2)
    with pytest.raises(ValueError, match="got 9"):
        sleepify.calibrate(model, rows, mean_n_loops=9)
    with pytest.raises(ValueError, match="texts longer than a window of 5 tokens, got 5"):
        sleepify.calibrate(model, [rows[0][:5]], mean_n_loops=4)
    with pytest.raises(ValueError, match="rows of ids, each of one dimension"):
        sleepify.calibrate(model, [tokens(2, 9)], mean_n_loops=4)
    with pytest.raises(ValueError, match="N = 4 or more, got N = 3"):
        sleepify.calibrate(sleeping(n_loops=3), rows, mean_n_loops=3)
    with pytest.raises(TypeError, match="a model that sleeps"):
        sleepify.calibrate(model.language_model, rows, mean_n_loops=4)


def test_the_command_prints_and_saves(tmp_path, capsys) -> None:
    model = talking.talker(n_loops=6, dtype=torch.float32)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    model.save_pretrained(folder)
    talking.tokenizer().save_pretrained(folder)
    text.write_text("a cab had a bed, dad fed a hag. bad egg! " * 12, encoding="utf-8")
    before = (folder / "config.json").read_text(encoding="utf-8")
    words = ["calibrate", str(folder), "--text_file", str(text), "--mean_n_loops", "4", "--device", "cpu"]
    assert main(words) == 0
    threshold = float(capsys.readouterr().out.splitlines()[-1])
    assert (folder / "config.json").read_text(encoding="utf-8") == before
    assert main([*words, "--save"]) == 0
    changed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert changed.pop("auto_threshold") == pytest.approx(threshold, rel=1e-5)
    assert changed == {name: value for name, value in json.loads(before).items() if name != "auto_threshold"}
    again = SleepForCausalLM.from_pretrained(folder).eval()
    cache = SleepCache()
    with torch.no_grad():
        again(torch.full((1, 13), VOCAB - 1), past_key_values=cache, n_loops="auto")
    assert 3 <= cache.passes[0] <= 6
    assert not [path for path in folder.iterdir() if "draft" in path.name]


def test_the_command_says_what_is_wrong(tmp_path, capsys) -> None:
    model = talking.talker(n_loops=6, dtype=torch.float32)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    model.save_pretrained(folder)
    talking.tokenizer().save_pretrained(folder)
    text.write_text("short", encoding="utf-8")
    for words, message in (
        ([str(folder), "--mean_n_loops", "4"], "a text longer than a window of 12 tokens, got 5"),
        ([str(folder), "--mean_n_loops", "4", "--context", "12"], "a context longer than the window"),
        ([str(tmp_path / "none"), "--mean_n_loops", "4", "--save"], "expected the folder of a checkpoint to save to"),
    ):
        assert main(["calibrate", *words, "--text_file", str(text)]) == 2
        assert message in capsys.readouterr().err
