"""The page of what works with which versions is what runs of the tests recorded, and has no row that fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compatibility, flows

TESTS = Path(__file__).resolve().parent


def test_the_page_is_made_of_the_records():
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.render(compatibility.read_records())


def test_no_row_fails():
    records = compatibility.read_records()
    assert {"newest", "oldest"} <= records.keys()
    for name, record in records.items():
        assert not [flow for flow, outcome in record["flows"].items() if outcome["failed"]], name
        assert record["flows"].keys() <= flows.FLOWS.keys(), f"{name} knows flows that there are no more"


def test_every_row_has_a_test():
    others = [path for path in TESTS.glob("*.py") if path != Path(__file__)]
    text = "".join(path.read_text(encoding="utf-8") for path in others)
    assert [name for name in flows.FLOWS if f'"{name}"' not in text] == []


def test_a_run_is_recorded_and_what_it_left_out_stays(tmp_path, monkeypatch):
    path = tmp_path / "here.json"

    def record(**outcomes):
        recorder = flows.Recorder(path)
        for name, outcome in outcomes.items():
            recorder.outcomes[name] |= {outcome: 1}
        recorder.pytest_sessionfinish()

    record(DPO="passed", KTO="skipped")
    record(GRPO="failed")
    (found,) = compatibility.read_records(tmp_path).values()
    assert found["flows"].keys() == {"DPO", "GRPO"} and "torch" in found["versions"]
    page = compatibility.render({"here": found})
    for row in ("| DPO | by name", "| KTO | with `ref_model` | - |"):
        assert row in page
    assert page.count("**fails**") == 1
    # Other versions begin anew.
    monkeypatch.setattr(flows, "version", lambda package: "9.9")
    record(KTO="passed")
    assert compatibility.read_records(tmp_path)["here"]["flows"].keys() == {"KTO"}


def test_a_flow_that_there_is_not_is_an_error():
    item = SimpleNamespace(nodeid="here", iter_markers=lambda _: [pytest.mark.flow("none such").mark])
    with pytest.raises(KeyError, match="none such"):
        flows.flows_of(item)
