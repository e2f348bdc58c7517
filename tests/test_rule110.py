"""Rule 110 against the rule written out cell by cell."""

from __future__ import annotations

import doctest
from collections import Counter
from itertools import chain
from typing import Any

import pytest
from seeding import assert_seeded

import sleepify.tasks.rule110
import sleepify.tasks.split
from sleepify.tasks import IGNORE, Rule110, score
from sleepify.tasks.split import in_split

NEXT = {"111": "0", "110": "1", "101": "1", "100": "0", "011": "1", "010": "1", "001": "1", "000": "0"}


def after(string: str, steps: int) -> str:
    for _ in range(steps):
        ring = string[-1] + string + string[0]
        string = "".join(NEXT[ring[i : i + 3]] for i in range(len(string)))
    return string


def queries_task(**changes: Any) -> Rule110:
    return Rule110(**{"width": 20, "n_strings": 1, "steps": tuple(range(1, 11)), "form": "queries", **changes})


def strings_of(task: Rule110, ids: list[int]) -> list[str]:
    return ["".join(map(str, ids[i * task.width : (i + 1) * task.width])) for i in range(task.n_strings)]


@pytest.mark.parametrize(
    "task",
    [
        Rule110(),
        Rule110(width=5, n_strings=1, steps=1),
        Rule110(width=20, n_strings=3, steps=7),
        queries_task(),
        queries_task(width=7, n_strings=3, steps=(2, 30, 5)),
    ],
)
def test_answers_are_those_of_the_naive_automaton(task: Rule110) -> None:
    for index in range(40):
        example = task.example(index, "train" if index % 2 else "test")
        strings = strings_of(task, example.input_ids)
        asked = [task.steps] if isinstance(task.steps, int) else sorted(task.steps)
        assert sorted(query.difficulty for query in example.queries) == asked
        expected, labels = list(map(int, "".join(strings))), [IGNORE] * (task.n_strings * task.width)
        for query in example.queries:
            answer = [int(after(string, query.difficulty)[0]) for string in strings]
            if task.form == "queries":
                expected.append(1 + query.difficulty)
                labels.append(IGNORE)
            assert (query.start, query.stop) == (len(expected), len(expected) + task.n_strings)
            expected += answer
            labels += answer
        assert (example.input_ids, example.labels) == (expected, labels)
        assert len(expected) == task.length and max(expected) < task.vocab_size


def test_sizes_are_the_papers() -> None:
    paper, queries = Rule110(), queries_task()
    assert (paper.length, paper.window_size, paper.vocab_size) == (100, 24, 2)
    assert (queries.length, queries.window_size, queries.vocab_size) == (40, 20, 12)
    assert (paper.difficulty_name, paper.steps) == ("steps", 32)


def test_guessing_scores_what_the_paper_has_for_one_pass() -> None:
    # The paper reports about 10% for N = 1 at t = 32: what always answering 1 gives if all four answers must be right.
    task = Rule110()
    correct = 0
    for index in range(1000):
        example = task.example(index, "test")
        ((steps, right),) = score(example, [1] * task.length)
        correct += right
        assert steps == 32
    assert 70 < correct < 140


def test_one_wrong_cell_fails_its_query_only() -> None:
    example = queries_task(n_strings=2).example(0)
    predicted = list(example.input_ids)
    assert all(right for _, right in score(example, predicted))
    predicted[example.queries[3].stop - 1] ^= 1
    assert [right for _, right in score(example, predicted)] == [i != 3 for i in range(10)]


def test_times_are_asked_in_every_order_and_cells_are_fair() -> None:
    task = queries_task()
    examples = [task.example(index) for index in range(4000)]
    for place in range(10):
        counts = Counter(example.queries[place].difficulty for example in examples)
        # 400 expected of each; chi-square with 9 degrees of freedom has 99.99% below 33.7.
        assert sum((counts[t] - 400) ** 2 / 400 for t in range(1, 11)) < 33.7
    ones = sum(chain.from_iterable(example.input_ids[:20] for example in examples))
    assert abs(ones / 80_000 - 0.5) < 0.01


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    assert_seeded(Rule110)


def test_no_string_is_in_both_splits() -> None:
    seen = {
        split: {s for i in range(3000) for s in strings_of(task, task.example(i, split).input_ids)}
        for split, task in (("train", Rule110(width=8, steps=2)), ("test", queries_task(seed=9, width=8, n_strings=2)))
    }
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 2**8


@pytest.mark.parametrize("width", range(5, 13))
def test_every_width_has_strings_of_both_splits(width: int) -> None:
    share = sum(in_split(f"{string:0{width}b}", "test") for string in range(2**width)) / 2**width
    assert 1 / 16 < share < 1 / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 4}, "width: expected .* at least 5"),
        ({"width": 24.0}, "width: expected"),
        ({"n_strings": 0}, "n_strings: expected"),
        ({"seed": "0"}, "seed: expected"),
        ({"form": "long"}, "'paper' or 'queries'"),
        ({"steps": 0}, "steps: expected"),
        ({"steps": (4, 8)}, "form='queries'"),
        ({"steps": (4, 4), "form": "queries"}, "distinct"),
        ({"steps": (), "form": "queries"}, "distinct"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule110(**arguments)


def test_bad_rows_are_refused() -> None:
    task = Rule110()
    with pytest.raises(ValueError, match="index: expected 0 or more"):
        task.example(-1)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        task.example(0, "validation")  # type: ignore[arg-type]
    for ids in ([0] * 99, [2] * 100):
        with pytest.raises(ValueError, match="expected 100 ids from 0 to 1"):
            task.decode(ids)


def test_the_docstrings_tell_the_truth() -> None:
    for module in (sleepify.tasks.rule110, sleepify.tasks.split):
        failed, tried = doctest.testmod(module)
        assert tried and not failed
