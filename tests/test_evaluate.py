"""Exact match by difficulty, at any N and window; intervals, files and perplexity; the harness's model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_base
from tolerances import FLOAT32, assert_close
from torch import Tensor, nn

from sleepify import SleepForCausalLM, sleepify
from sleepify.tasks import Example, Query
from sleepify.training import harness
from sleepify.training.evaluate import Report, Score, evaluate, perplexity, plot, wilson

VOCAB = 97


class Ragged:
    """Rows of 9 to 20 tokens with two queries: the last token (difficulty 1) and the three before it (3)."""

    difficulty_name = "tokens"

    def example(self, index: int, split: str = "train") -> Example:
        length = 9 + (7 * index) % 12
        ids = [(3 * index + 5 * t + (t * t) % 7) % 2 + 2 for t in range(length)]
        queries = [Query(3, length - 4, length - 1), Query(1, length - 1, length)]
        return Example(ids, [-100] * (length - 4) + ids[-4:], queries)


class Oracle(nn.Module):
    """Gives the token that does come next, shifted by ``error`` where ``wrong`` says so."""

    def __init__(self, wrong: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wrong = wrong

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor, use_cache: bool
    ) -> SimpleNamespace:
        following = input_ids.roll(-1, 1)
        if self.wrong is not None:
            following = self.wrong(following)
        return SimpleNamespace(logits=nn.functional.one_hot(following % VOCAB, VOCAB)[:, logits_to_keep].float())


def test_wilson_gives_published_values() -> None:
    # Newcombe (1998), table I: 81 of 263 and 15 of 148; the ends of the range; one half.
    for counts, expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (29, 29): (0.8830, 1.0),
        (50, 100): (0.4038, 0.5962),
    }.items():
        assert wilson(*counts) == pytest.approx(expected, abs=1e-4)
    for counts in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
            wilson(*counts)


def test_scores_a_perfect_a_wrong_and_a_random_predictor() -> None:
    task = Ragged()
    perfect = evaluate(Oracle(), task, n_examples=30, batch_size=7)
    assert perfect.scores == [Score(1, None, 1, 30, 30), Score(1, None, 3, 30, 30)]
    assert (perfect.task, perfect.difficulty_name, perfect.n_examples) == ("Ragged", "tokens", 30)

    wrong = evaluate(Oracle(lambda ids: ids + 1), task, n_examples=30, batch_size=7)
    assert [score.correct for score in wrong.scores] == [0, 0]

    generator = torch.Generator().manual_seed(0)
    guess = Oracle(lambda ids: torch.randint(2, 4, ids.shape, generator=generator))
    # Fair coins: a half for one token, an eighth for all three of the other query.
    by_chance = evaluate(guess, task, n_examples=2000, batch_size=250).of(1, None)
    for difficulty, share in ((1, 1 / 2), (3, 1 / 8)):
        low, high = wilson(by_chance[difficulty].correct, 2000, z=4.0)
        assert low < share < high


@pytest.fixture(scope="module")
def model() -> SleepForCausalLM:
    base = tiny_base("jet_nemotron", dtype=torch.float32)
    return sleepify(base, n_loops=2, window_size=6, loop_range=(0, 4))


def greedy(model: SleepForCausalLM, example: Example, n_loops: int) -> list[bool]:
    """Whether greedy decoding gives each query's answer."""
    right = []
    for query in example.queries:
        prompt = torch.tensor([example.input_ids[: query.start]])
        n_new = query.stop - query.start
        output = model.generate(
            prompt, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, n_loops=n_loops, pad_token_id=0
        )
        right.append(output[0, query.start :].tolist() == example.input_ids[query.start : query.stop])
    return right


class OwnAnswers(Ragged):
    """The same rows, half of them ending in what the model itself says, so that some answers are right."""

    def __init__(self, model: SleepForCausalLM) -> None:
        self.model = model

    def example(self, index: int, split: str = "train") -> Example:
        example = super().example(index, split)
        if index % 2:
            start = len(example.input_ids) - 4
            prompt = torch.tensor([example.input_ids[:start]])
            said = self.model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
            return Example(said[0].tolist(), example.labels[:start] + said[0, start:].tolist(), example.queries)
        return example


def test_one_checkpoint_at_several_n_and_windows_is_greedy_decoding_at_each(model: SleepForCausalLM) -> None:
    examples = [OwnAnswers(model).example(index) for index in range(10)]
    task = SimpleNamespace(example=lambda index, split: examples[index])
    report = evaluate(model, task, n_examples=10, n_loops=[1, 2, 3], window_sizes=[4, 6], batch_size=4)
    assert report.settings == [(1, 4), (2, 4), (3, 4), (1, 6), (2, 6), (3, 6)]
    assert (model.config.window_size, model.config.n_loops) == (6, 2)
    for n_loops, window_size in report.settings:
        model.config.window_size = window_size
        try:
            expected = [sum(column) for column in zip(*(greedy(model, e, n_loops) for e in examples), strict=True)]
        finally:
            model.config.window_size = 6
        found = report.of(n_loops, window_size)
        assert [found[3].correct, found[1].correct] == expected
    own = report.of(2, 6)
    assert own[1].correct >= 5 and own[3].correct >= 5
    # Another N or window is another model: what it says changes.
    assert len({tuple(score.correct for score in report.of(*setting).values()) for setting in report.settings}) > 1


def test_refuses_what_a_model_cannot_do(model: SleepForCausalLM) -> None:
    with pytest.raises(ValueError, match="expected window_size to be at most 128"):
        evaluate(model, Ragged(), n_examples=2, window_sizes=[6, 4096])
    assert model.config.window_size == 6
    with pytest.raises(ValueError, match="expected n_loops to be a whole number"):
        evaluate(model, Ragged(), n_examples=2, n_loops=[0])
    with pytest.raises(ValueError, match="expected a sleeping model"):
        evaluate(model.language_model, Ragged(), n_examples=2, n_loops=[1])
    assert evaluate(model.language_model, Ragged(), n_examples=2).settings == [(1, None)]


def test_report_goes_to_json_and_back_to_a_table_and_to_a_plot(tmp_path: Path) -> None:
    scores = [Score(n, 6, t, correct, 40) for n, t, correct in ((1, 1, 40), (1, 2, 10), (4, 1, 40), (4, 2, 30))]
    report = Report("Rule110", "steps", "test", 40, scores)
    assert Report.from_json(report.to_json()) == report
    written = json.loads(report.to_json())["scores"][1]
    assert written["accuracy"] == 0.25 and written["interval"] == pytest.approx(wilson(10, 40))
    assert report.table().splitlines() == [
        "| steps = | 1 | 2 |",
        "| --- | --- | --- |",
        "| N = 1, L = 6 | 100.0 (91.2-100.0) | 25.0 (14.2-40.2) |",
        "| N = 4, L = 6 | 100.0 (91.2-100.0) | 75.0 (59.8-85.8) |",
    ]
    plot(report, tmp_path / "new" / "accuracy.png")
    assert (tmp_path / "new" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood(model: SleepForCausalLM) -> None:
    ids = [(7 * t) % 90 + 3 for t in range(25)]
    for n_loops in (1, 3):
        total, count = torch.zeros(()), 0
        for piece in (ids[:11], ids[11:22], ids[22:]):
            # Token by token, each from the text before it.
            for t in range(1, len(piece)):
                with torch.no_grad():
                    logits = model(torch.tensor([piece[:t]]), n_loops=n_loops).logits[0, -1]
                total, count = total - logits.log_softmax(-1)[piece[t]], count + 1
        found = perplexity(model, ids, context=11, n_loops=n_loops)
        assert_close(torch.tensor(math.log(found)), total / count, FLOAT32)
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(model, ids[:1], context=11)


def test_harness_model_sleeps_as_told(model: SleepForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, type] = {}

    class HFLM:
        """What the harness's model of transformers gives us: it keeps the model and takes other options."""

        def __init__(self, pretrained: Any, **options: Any) -> None:
            self.model, self.options = pretrained, options

    def register_model(name: str) -> Any:
        return lambda cls: registered.setdefault(name, cls)

    contents = {
        "lm_eval": {"__spec__": SimpleNamespace()},
        "lm_eval.api": {},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    harness._register.cache_clear()
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    assert harness.register() is harness.register() is registered["sleepify"]
    harness._register.cache_clear()

    sleeping = sleepify(tiny_base("qwen3", dtype=torch.float32), n_loops=2, window_size=6)
    # As they come from the command line.
    lm = registered["sleepify"](sleeping, n_loops="3", window_size=4, eviction="sliding", batch_size=2)
    assert (lm.model.config.n_loops, lm.model.config.window_size, lm.model.config.eviction) == (3, 4, "sliding")
    assert lm.options == {"batch_size": 2}
    with pytest.raises(ValueError, match="expected a checkpoint of a sleeping model"):
        registered["sleepify"](sleeping.language_model)
    with pytest.raises(ValueError, match="expected eviction"):
        registered["sleepify"](sleeping, eviction="soft")
    for wrong in (3.5, "3.5", "many"):
        with pytest.raises(ValueError, match="expected window_size"):
            registered["sleepify"](sleeping, window_size=wrong)


def test_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sleepify\[eval\]'"):
        harness.register()


TWO_RANKS = """
import sys, torch
import torch.distributed as dist
from test_evaluate import Ragged
from families import tiny_base
from sleepify import sleepify
from sleepify.training.evaluate import evaluate
dist.init_process_group("gloo")
model = sleepify(tiny_base("jet_nemotron", dtype=torch.float32), n_loops=2, window_size=6, loop_range=(0, 4))
report = evaluate(model, Ragged(), n_examples=11, n_loops=[1, 2], window_sizes=[4, 6], batch_size=2)
open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w").write(report.to_json())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_share_the_rows_and_all_get_the_report(model: SleepForCausalLM, tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, env=environment, timeout=300)
    alone = evaluate(model, Ragged(), n_examples=11, n_loops=[1, 2], window_sizes=[4, 6], batch_size=2)
    for rank in range(2):
        assert Report.from_json((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) == alone
