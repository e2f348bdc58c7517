"""The experiments: their runs go on where they stopped, and their tables say what the files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import arms, statistic, worth, worth_page, worth_runs, worth_settings
from sleepify import SleepForCausalLM
from sleepify.tasks.gsm_infinite import solve
from sleepify.training import recipe
from sleepify.training.curve import Point
from sleepify.training.evaluate import Report, Score
from sleepify.training.settings import load_config

SMALL = {"per_device_train_batch_size": 4, "test_examples": 16, "curve_examples": 3}
SETTING = replace(
    worth_settings.SETTINGS["hops8"],
    arms=("n4", "n1", "full", "n1_compute", "sliding", "n1_2x", "all_n"),
    architecture={"intermediate_size": 96},
    base_changes={"max_steps": 2, **SMALL},
    tuned_changes={"max_steps": 2, **SMALL},
    seeds=(0,),
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    threads = torch.get_num_threads()
    monkeypatch.setitem(worth_settings.SETTINGS, "hops8", SETTING)
    monkeypatch.setattr(worth_runs, "CURVE_STEPS", 1)
    for module, name in product((worth_runs, worth_page), ("FINISHED", "MODELS")):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    yield tmp_path
    torch.set_num_threads(threads)


def test_all_arms_run_from_one_base_and_are_written_up(folder: Path) -> None:
    worth.main(["--settings", "hops8", "--docs", str(folder / "docs")])
    page = (folder / "docs" / "worth.md").read_text(encoding="utf-8")
    assert (folder / "docs" / "worth_hops8.png").read_bytes().startswith(b"\x89PNG")
    runs = {name: worth_runs.read("hops8", name, 0) for name in SETTING.arms}
    for name, run in runs.items():
        assert run is not None and f"| {arms.ARMS[name].label} |" in page
        assert run.report.difficulties == list(range(1, 9)) and len(run.report.answered[0]) == 16 * 5
        assert [point.step for point in run.curve] == list(range(1, run.steps + 1))
        assert run.cpu_seconds == run.curve[-1].cpu_seconds > 0
    assert runs["all_n"].report.settings == [(n, 16) for n in (4, 1, 2, 3, 6, 8)]
    for n in (1, 2, 3, 4, 6, 8):
        assert page.count(f"| {arms.ARMS['all_n'].label} | 1 | N = {n} |") == 1
    # A run that goes on counts what was before it.
    assert (runs["n1"].steps, runs["n1_compute"].steps) == (2, 5)
    assert runs["n1_compute"].curve[:2] == runs["n1"].curve
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / "models" / "hops8" / f"{name}_seed0")
        for name in ("base", "base_2x", *SETTING.arms)
    }
    assert [len(models[name].model.layers) for name in ("base", "base_2x", "full")] == [2, 4, 2]
    assert {models[name].config.get_text_config().intermediate_size for name in ("base_2x", "n4")} == {96}
    assert models["sliding"].config.sliding_window == 16
    assert set(models["sliding"].config.layer_types) == {"sliding_attention"}
    assert isinstance(models["n1_2x"], SleepForCausalLM) and models["n1_2x"].config.loop_range == [0, 4]
    costs = json.loads((folder / "finished" / "hops8" / "costs.json").read_text(encoding="utf-8"))
    assert costs["n4"]["cache_bytes"] == 0 and costs["full"]["state_bytes"] == 0
    assert costs["n4"]["tokens"] == costs["full"]["tokens"] == 16
    # Two layers, keys and values of two heads of 32, float32.
    assert costs["full"]["cache_bytes"] == 2 * 2 * 16 * 64 * 4
    assert 3 < costs["n4"]["operations"] / costs["n1"]["operations"] < 4
    assert costs["full"]["operations"] < costs["n1"]["operations"]

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    worth.main(["--settings", "hops8", "--docs", str(folder / "docs")])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before, "nothing is run twice"


def test_an_arm_goes_on_from_figures_whose_model_is_not_at_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worth_settings.SETTINGS, "hops8", replace(SETTING, arms=("n1", "n1_compute")))
    worth.main(["--settings", "hops8", "--docs", str(folder / "docs")])
    whole = worth_runs.read("hops8", "n1_compute", 0)
    # As in a fresh clone: the figures of the first arm are there, its weights are not.
    shutil.rmtree(folder / "models")
    worth_runs.file_of("hops8", "n1_compute", 0).unlink()
    worth.main(["--settings", "hops8", "--docs", str(folder / "docs")])
    again = worth_runs.read("hops8", "n1_compute", 0)
    assert again is not None and whole is not None
    assert (again.steps, again.report) == (whole.steps, whole.report)


def test_two_processes_never_take_the_same_run(folder: Path) -> None:
    with worth_runs.claimed(folder / "run.lock") as first, worth_runs.claimed(folder / "run.lock") as second:
        assert first and not second
    with worth_runs.claimed(folder / "run.lock") as again:
        assert again


def test_settings_name_arms_and_files_that_there_are() -> None:
    for name, setting in worth_settings.SETTINGS.items():
        assert setting.name == name and set(setting.arms) <= set(arms.ARMS)
        assert (worth_settings.CONFIGS / setting.base).is_file() and (worth_settings.CONFIGS / setting.config).is_file()
    for name, arm in arms.ARMS.items():
        assert arm.name == name and (arm.goes_on is None or arm.goes_on in arms.ARMS)


def test_statistics_by_hand() -> None:
    assert statistic.over_seeds([0.5]) == (0.5, None) and statistic.spread([0.5]) == "50.0"
    assert statistic.over_seeds([0.5, 0.75]) == (0.625, None) and statistic.spread([0.75, 0.5]) == "75.0 / 50.0"
    mean, half = statistic.over_seeds([0.5, 0.6, 0.7])
    # 4.303 * 0.1 / sqrt(3)
    assert mean == pytest.approx(0.6) and half == pytest.approx(0.24843, abs=1e-5)
    assert statistic.spread([0.5, 0.6, 0.7]) == "60.0 ± 24.8"
    # 8 against 1: 2 (C(9, 0) + C(9, 1)) / 2^9.
    assert statistic.mcnemar("1" * 10 + "0", "0" * 8 + "111") == (8, 1, pytest.approx(20 / 512))
    assert statistic.mcnemar("0101", "0101") == (0, 0, 1.0)
    with pytest.raises(ValueError, match="zip"):
        statistic.mcnemar("01", "011")


def test_seeds_that_differ_are_not_added_up() -> None:
    def runs(*answers: str) -> list[Any]:
        reports = [replace(Report("t", "d", "test", 1, []), answered=[digits]) for digits in answers]
        return [SimpleNamespace(seed=seed, report=report) for seed, report in enumerate(reports)]

    ours = runs("1" * 10, "0" * 8 + "11")
    assert worth_page.paired(ours, runs("0" * 10)) == "10 : 0, p = 0.002"
    assert worth_page.paired(ours, runs("0" * 10, "0" * 10)) == "12 : 0, p = 0.5"
    assert worth_page.paired(ours, runs("0" * 10, "1" * 10)) == "seeds differ: 10 : 0, 0 : 8, p = 0.0078"
    assert worth_page.paired(ours, runs("1" * 10, "1" * 10)) == "0 : 8, p = 1"
    assert worth_page.paired(ours, []) == ""


@pytest.fixture
def ablated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    setting = replace(SETTING, name="hops8_ablations", arms=worth_settings.SETTINGS["hops8_ablations"].arms)
    monkeypatch.setitem(worth_settings.SETTINGS, "hops8_ablations", setting)
    return folder


@pytest.mark.parametrize("name", arms.ABLATIONS)
def test_every_ablation_is_parsed_and_changes_one_thing(name: str) -> None:
    setting, arm = worth_settings.SETTINGS["hops8_ablations"], arms.ARMS[name]
    parsed = [
        recipe.parse(
            None, [str(worth_settings.CONFIGS / setting.config), *worth_runs.words_of({"model": "base", **changes})]
        )
        for changes in (arm.changes, arms.ARMS["n4"].changes)
    ]
    ours, theirs = ({**vars(each.sleep), **vars(each.model), **vars(each.task)} for each in parsed)
    trained = [each.training.train_only for each in parsed]
    changed = {field for field in ours if ours[field] != theirs[field]} | (
        {"train_only"} if len(set(trained)) > 1 else set()
    )
    assert changed == set(arm.changes) - {"n_loops"} and arm.changes["n_loops"] == 4
    assert arm.layers == 1 and arm.steps == 1.0 and arm.goes_on is None


@pytest.mark.parametrize(
    "names", [("jet", "insert_last", "frozen", "lora"), pytest.param(arms.ABLATIONS, marks=pytest.mark.slow)]
)
def test_ablations_are_trained_and_written_up(ablated: Path, names: tuple[str, ...]) -> None:
    worth.main(["--settings", "hops8_ablations", "--docs", str(ablated / "docs"), "--arms", "n4", *names])
    page = (ablated / "docs" / "worth.md").read_text(encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(ablated / "models" / "hops8_ablations" / "base_seed0")
    for name in ("n4", *names):
        run = worth_runs.read("hops8_ablations", name, 0)
        assert run is not None and run.steps == 2 and page.count(f"| {arms.ARMS[name].label} |") == 2
        folder = ablated / "models" / "hops8_ablations" / f"{name}_seed0"
        model = AutoModelForCausalLM.from_pretrained(folder / "merged" if name == "lora" else folder)
        assert isinstance(model, SleepForCausalLM) and model.config.n_loops == 4
        moved = any(
            not torch.equal(before, after)
            for before, after in zip(base.parameters(), model.language_model.parameters(), strict=True)
        )
        assert moved == (name != "frozen")
        if name in ("jet", "mamba2"):
            assert model.config.fast_weights.rule == name
        if name.startswith("insert"):
            assert len(model.fast_weights) == 1


@pytest.mark.parametrize("name", worth_settings.SETTINGS)
def test_what_is_read_before_the_question_is_whole_windows(name: str) -> None:
    setting = worth_settings.SETTINGS[name]
    window = load_config(worth_settings.CONFIGS / setting.config)["window_size"]
    window = setting.tuned_changes.get("window_size", window)
    read = worth_page.text_of(setting, arms.ARMS["n4"], 0)
    assert read and len(read) % window == 0


def test_accuracy_by_evictions_counts_every_query_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Queries of three tokens after two windows of eight: two to a window, so two windows are gone, then three.
    setting = replace(SETTING, arms=("n4", "full"), tuned_changes={**SETTING.tuned_changes, "window_size": 8})
    setting = replace(setting, changes={"n_windows": 2, "n_queries": 4})
    monkeypatch.setitem(worth_settings.SETTINGS, "hops8", setting)
    row = worth_page.task_of(setting, arms.ARMS["n4"], 0)[0].example(0, "test")
    places = [(query.start - 1) // 8 for query in row.queries]
    assert places == [2, 2, 3, 3]
    answers = {"n4": "1100" * 16, "full": "1010" * 16}
    for name, digits in answers.items():
        scores = [Score(4, 8, 1, digits.count("1"), len(digits))]
        report = Report("Hops", "hops", "test", 16, scores, [digits])
        run = worth_runs.Run("hops8", name, 0, 2, 1.0, report, [], "a machine")
        path = worth_runs.file_of("hops8", name, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(run)), encoding="utf-8")
    part = worth_page.evictions_part(setting)
    assert part is not None and part.head[2:] == ["2 evicted (32)", "3 evicted (32)"]
    assert [row[2:] for row in part.rows] == [["100.0", "0.0"], ["50.0", "50.0"]]
    monkeypatch.setitem(
        worth_settings.SETTINGS, "hops8", replace(setting, arms=("n4",), changes={"n_windows": 2, "n_queries": 2})
    )
    path = worth_runs.file_of("hops8", "n4", 0)
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["report"]["answered"] = ["10" * 16]
    path.write_text(json.dumps(fields), encoding="utf-8")
    assert worth_page.evictions_part(worth_settings.SETTINGS["hops8"]) is None


def test_only_what_training_got_to_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(SETTING, arms=("n4", "full"), asked=3, changes={"n_windows": 2, "n_queries": 2})
    monkeypatch.setitem(worth_settings.SETTINGS, "hops8", setting)
    task = worth_page.task_of(setting, arms.ARMS["n4"], 0)[0]
    asked = [query.difficulty for index in range(30) for query in task.example(index, "test").queries]
    # N = 4 is right up to 2, the other where N = 4 is not.
    digits = {"n4": "".join(str(int(k <= 2)) for k in asked), "full": "".join(str(int(k > 2)) for k in asked)}
    for name, row in digits.items():
        right = {k: sum(int(digit) for digit, each in zip(row, asked, strict=True) if each == k) for k in range(1, 9)}
        scores = [Score(4, 16, k, right[k], asked.count(k)) for k in range(1, 9)]
        report = Report("Hops", "hops", "test", 30, scores, [row])
        path = worth_runs.file_of("hops8", name, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        run = worth_runs.Run("hops8", name, 0, 2, 1.0, report, [Point(1, 1.0, [[0.5] * 8])], "a machine")
        path.write_text(json.dumps(asdict(run)), encoding="utf-8")
    part = worth_page.result_part(setting)
    assert part.head[5:8] == ["1", "2", "3"] and [row[4:8] for row in part.rows] == [
        ["2", "100.0", "100.0", "0.0"],
        ["0", "0.0", "0.0", "100.0"],
    ]
    easy = sum(asked.count(k) for k in (1, 2))
    assert part.rows[1][-1].startswith(f"{easy} : {asked.count(3)}, p ")
    evicted = worth_page.evictions_part(replace(setting, tuned_changes={"window_size": 8}))
    assert evicted is None or sum(int(head.split("(")[1][:-1]) for head in evicted.head[2:]) == easy + asked.count(3)
    assert [len(row) for row in worth_page.arms_of(setting)["n4"][0].curve[0].accuracy] == [3]


@pytest.mark.parametrize("name", ["gsm_inf_one_window", "gsm_inf_questions"])
def test_accuracy_by_chain_is_that_of_the_solved_problems(folder: Path, name: str) -> None:
    setting = worth_settings.SETTINGS[name]
    task = worth_page.task_of(setting, arms.ARMS["n4"], 0)[0]
    problems = [task.problems(index, "test") for index in range(40)]
    chains = [solve(problem.problem, problem.question).chain for asked in problems for problem in asked]
    own = [place == 0 for asked in problems for place in range(len(asked))]
    assert 1 < max(chains) and all(own) == (name == "gsm_inf_one_window")
    # Right where the chain is one sentence alone.
    digits = "".join(str(int(chain == 1)) for chain in chains)
    report = Report("GsmInfinite", "operations", "test", 40, [Score(4, 64, 2, 1, len(chains))], [digits])
    path = worth_runs.file_of(setting.name, "n4", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = worth_runs.Run(setting.name, "n4", 0, 2, 1.0, report, [], "a machine")
    path.write_text(json.dumps(asdict(run)), encoding="utf-8")
    part = worth_page.chains_part(setting)
    assert part is not None
    if all(own):
        assert part.head[2:] == [f"chain of {chain} ({chains.count(chain)})" for chain in sorted(set(chains))]
        assert part.rows[0][2:] == ["100.0"] + ["0.0"] * (len(set(chains)) - 1)
    else:
        groups = list(zip(own, chains, strict=True))
        columns = [("own", True, each) for each in sorted({chain for ours, chain in groups if ours})]
        columns += [("other", False, each) for each in sorted({chain for ours, chain in groups if not ours})]
        expected = [f"{who}, chain of {chain} ({groups.count((ours, chain))})" for who, ours, chain in columns]
        assert part.head[2:] == expected and "*Other*" in part.intro
        assert part.rows[0][2:] == ["100.0" if chain == 1 else "0.0" for _, _, chain in columns]
    assert worth_page.chains_part(SETTING) is None
