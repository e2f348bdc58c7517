"""The benchmark scripts: each runs in its smallest form, and compares what it says. No time is asserted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tolerances import EXACT, EXACT_GRAD, HEAD_SHARE, assert_close

from benchmarks import (
    cells,
    compiled,
    full_size,
    gpu,
    memory,
    models,
    operations,
    pauses,
    report,
    sessions,
    train,
    wake,
)
from sleepify import SleepForCausalLM

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = {"wake": wake, "train": train, "memory": memory, "operations": operations, "compiled": compiled} | {
    "sessions": sessions,
    "pauses": pauses,
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ON_CPU)
def test_every_script_runs_and_writes_its_page(name, tmp_path, capsys, monkeypatch):
    # Compiling takes as long as all else here; what it gives and shares is tested with the model itself.
    asked = []
    monkeypatch.setattr(SleepForCausalLM, "compile", lambda self, **keywords: asked.append(keywords))
    monkeypatch.setattr(compiled, "n_graphs", lambda: 7)
    check_page(name, tmp_path, capsys)
    assert asked == ([{"backend": "eager"}] * 2 if name == "compiled" else [])


@pytest.mark.slow
def test_the_page_about_compiling_compiles(tmp_path, capsys):
    check_page("compiled", tmp_path, capsys)


def check_page(name, tmp_path, capsys):
    page = tmp_path / f"{name}.md"
    repeats = [] if name == "memory" else ["--repeats", "1"]
    parts = ON_CPU[name].main(["--tiny", "--output", str(page), *repeats])
    written = page.read_text(encoding="utf-8")
    assert f"python -m benchmarks.{name}" in written and torch.__version__ in written
    assert any(part.claims for part in parts)
    for part in parts:
        assert f"## {part.title}" in written and part.figures
        assert part.rows and {len(row) for row in part.rows} == {len(part.head)}
    assert capsys.readouterr().out.strip().endswith(written.strip())


def test_make_bench_runs_every_cpu_script():
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    listed = re.search(r"\$\(or \$\(ARGS\),(.*?)\)", recipe)[1].split()
    assert listed == list(ON_CPU)


def test_the_gpu_script_runs_without_a_gpu_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    # The published models but for their depth.
    for name, depth in (("ouro_1.4b", 4), ("jet_nemotron_2b", 6)):
        fields = full_size.PUBLISHED[name]
        types = {"layer_types": fields["layer_types"][12 : 12 + depth]} if "layer_types" in fields else {}
        monkeypatch.setitem(full_size.PUBLISHED, name, fields | {"num_hidden_layers": depth} | types)
    page = tmp_path / "gpu.md"
    given = ["--device", "cpu", "--tiny", "--output", str(page), "--repeats", "1", "--batches", "1"]

    with monkeypatch.context() as patch:
        real = gpu.tuned

        def failing(plan, step):
            kind, window, _ = step.args[0]
            if (kind, window) == ("hard", 16):
                raise torch.OutOfMemoryError("too large")
            if kind == "sliding":
                raise RuntimeError("broken")
            return real(plan, step)

        patch.setattr(gpu, "tuned", failing)
        gpu.main([*given, "--parts", "train"])
    assert "its figures mean nothing" in page.read_text(encoding="utf-8")
    written = page.read_text(encoding="utf-8")
    assert written.count("out of memory") == 2 and written.count("RuntimeError: broken") == 2
    assert "utilisation, N = 1, L = 16" not in written and "windowed / parallel, N = 1, L = 32" in written

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "tuned", None)  # what was measured is not measured again
        gpu.main([*given, "--parts", "jet"])
    figures = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert {"Matrix rate", "Training", "Jet-Nemotron 2B"} < set(figures)
    assert page.read_text(encoding="utf-8").count("out of memory") == 2


def test_a_cell_that_fails_takes_no_other_along(tmp_path, capsys):
    kept = tmp_path / "cells.json"
    plan = cells.Plan("cpu", True, 1, 60, (1,), kept, deadline=float("inf"))

    def fail():
        raise torch.OutOfMemoryError("1 GiB")

    assert plan.cell("a", fail) == {"failed": "out of memory"}
    assert plan.cell("b", lambda: {"seconds": 1.5}) == {"seconds": 1.5}
    assert json.loads(kept.read_text(encoding="utf-8")) == {"a": {"failed": "out of memory"}, "b": {"seconds": 1.5}}
    plan.deadline = 0.0
    assert plan.cell("b", fail) == {"seconds": 1.5} and plan.cell("c", fail) is None
    assert not cells.works(plan.cell("c", fail)) and cells.said(None) == "no time"


def test_cells_come_in_order_of_value():
    order = gpu.training_order((512, 1024, 2048, 4096), (1, 2, 4, 6))
    assert order[:4] == [("hard", 2048, 1), ("hard", 2048, 4), ("parallel", 2048, 1), ("parallel", 4096, 1)]
    assert len(order) == len(set(order)) == 4 * (4 + 2)


def test_a_trial_never_replaces_the_page_of_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny"])
    assert "--output is needed" in capsys.readouterr().err


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "window"), [(37, 8), (24, 8), (9, 16)])
def test_attention_in_blocks_is_sliding_attention(tokens, window):
    """The parallel hybrid by blocks, against transformers' own mask over the whole text; the gradients too."""
    model = models.small_ouro(tiny=True).double()
    batch = models.text(model, tokens, batch_size=2)
    losses, gradients = [], []
    for attention in ("blocks", "sdpa"):
        model.zero_grad(set_to_none=True)
        with models.attending(model, attention, window):
            loss = models.parallel_loss(model, batch, window)
            loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(losses[0], losses[1], EXACT)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], EXACT_GRAD, name)
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("recompute", [False, True])
def test_the_parallel_hybrid_is_the_model_where_nothing_is_evicted(recompute):
    model = models.small_ouro(tiny=True, window_size=64).double()
    ids, labels = models.text(model, 40)
    with models.attending(model, "blocks", 64):
        parallel = models.parallel_loss(model, (ids, labels), 64, recompute)
    # labels belong to the tokens that they name; the model predicts each from the token before
    assert_close(parallel, model(ids, labels=labels).loss, EXACT)


def test_ideal_by_hand():
    assert models.ideal(1500, 512, 1, 1.0) == pytest.approx(1500 / 512)
    assert models.ideal(1500, 512, 4, 1.0) == pytest.approx(2 * 4 + 476 / 512)
    assert models.ideal(1500, 512, 4, 0.5) == pytest.approx(2 * 2.5 + 476 / 512)
    with pytest.raises(ValueError, match="last full window"):
        models.ideal(2 * 64 + models.SUPERVISED, 64, 4, 1.0)


@pytest.mark.parametrize(("loop_range", "looped"), [((0, 4), 1.0), ((1, 3), 0.5)])
def test_arithmetic_is_ideal(loop_range, looped):
    """Counted products of the layers are what the formula says; the head, which is not looped, is a little more."""
    with torch.device("meta"):
        model = models.small_ouro(tiny=True, loop_range=loop_range)
    window, rest = 32, 32 - 1
    tokens = 3 * window + rest
    count = {n: models.count_flops(model, tokens, window, n) for n in (1, 4)}
    assert count[4] == 3 * models._count_forward(model, tokens, window, 4)
    expected = models.ideal(tokens, window, 4, looped) / models.ideal(tokens, window, 1, looped)
    assert count[4] / count[1] == pytest.approx(expected, rel=HEAD_SHARE)
    assert models.looped_share(model) == looped


# --- counting and timing ----------------------------------------------------------------------------------------------


def test_live_bytes_are_counted_once_and_given_back():
    with memory.LiveBytes() as counter:
        a = torch.ones(1000)
        view = a[10:]
        assert counter.live == 4000
        b = torch.zeros(500) + 1
        assert counter.live == 6000 and counter.peak == 8000  # the zeros were there, too
        del a
        assert counter.live == 6000  # the view keeps it
        del view, b
        assert counter.live == 0
    assert counter.peak == 8000


def test_memory_counts_what_only_the_collector_would_free():
    def leave_a_ring() -> None:
        ring: list = [torch.ones(1000)]
        ring.append(ring)

    def step() -> None:
        for _ in range(3):
            leave_a_ring()
            assert len([[] for _ in range(10_000)]) == 10_000  # enough for the collector to run, if it may

    assert memory.peak_bytes(step, "cpu") == 12000


def test_actions_take_turns():
    calls: list[str] = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = report.alternate(actions, 9, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    # Nobody always follows the same other.
    assert len(set(rounds)) > 3
    assert {name: len(values) for name, values in times.items()} == {"a": 9, "b": 9, "c": 9}


def test_ratios_are_taken_within_rounds():
    found = report.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 2.0]}, "a", "b", over=2.0)
    assert found == report.Spread(1.0, 1.0, 1.25)


def test_claims():
    assert report.Claim("", 1.1, at_most=1.1).holds and not report.Claim("", 1.11, at_most=1.1).holds
    assert report.Claim("", 0.95, at_least=0.95).holds and not report.Claim("", float("nan"), at_least=0.95).holds
    assert report.Claim("x", 2.0, at_most=1.0).row() == ["x", "at most 1", "2.000", "**no**"]
