"""The curriculum of every task: in training, one more level of difficulty every so many rows."""

from __future__ import annotations

from typing import Any

import pytest

from sleepify.tasks import IGNORE, Depo, GsmInfinite, Hops, Rule110
from sleepify.tasks.base import Split, open_levels
from sleepify.tasks.gsm_infinite import PETS, WordTokenizer
from sleepify.training.task_arguments import RECIPES

STEPS = (1, 2, 4, 7)
TASKS: dict[str, tuple[type[Any], dict[str, Any], list[int]]] = {
    "rule110": (Rule110, {"width": 20, "n_strings": 2, "steps": STEPS[::-1], "form": "queries"}, list(STEPS)),
    "depo": (Depo, {"n_nodes": 12, "max_hops": 5, "n_queries": 8}, [1, 2, 3, 4, 5]),
    "depo-qa": (Depo, {"n_nodes": 12, "max_hops": 6, "n_queries": 8, "mode": "qa"}, [1, 2, 4, 6]),
    "hops": (Hops, {"max_hops": 4}, [1, 2, 3, 4]),
    "gsm_infinite": (
        GsmInfinite,
        {
            "operations": [5, 2, 3],
            "depth": 2,
            "vocabulary": [PETS],
            "size": (2, 2),
            "tokenizer": WordTokenizer([PETS]),
        },
        [2, 3, 5],
    ),
}
ROWS = 40


def difficulties(task: Any, rows: range, split: Split = "train") -> set[int]:
    return {query.difficulty for index in rows for query in task.example(index, split).queries}


@pytest.mark.parametrize("name", TASKS)
def test_a_level_opens_every_so_many_rows(name: str) -> None:
    make, settings, levels = TASKS[name]
    task = make(**settings, curriculum=ROWS)
    for number in range(len(levels)):
        rows = range(number * ROWS, (number + 1) * ROWS)
        assert difficulties(task, rows) == set(levels[: number + 1])
    assert difficulties(task, range(10**6, 10**6 + ROWS)) == set(levels)


@pytest.mark.parametrize("name", TASKS)
def test_the_test_and_a_task_without_curriculum_have_all_levels(name: str) -> None:
    make, settings, levels = TASKS[name]
    task, plain = make(**settings, curriculum=ROWS), make(**settings)
    assert difficulties(task, range(ROWS), "test") == difficulties(plain, range(ROWS)) == set(levels)
    assert [task.example(index, "test") for index in range(10)] == [plain.example(index, "test") for index in range(10)]
    late = range(10**6, 10**6 + 10)
    assert [task.example(index) for index in late] == [plain.example(index) for index in late]


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_the_same_whatever_was_drawn_before(name: str) -> None:
    make, settings, _ = TASKS[name]
    forwards = [make(**settings, curriculum=3).example(index) for index in range(12)]
    backwards = make(**settings, curriculum=3)
    assert forwards == [backwards.example(index) for index in reversed(range(12))][::-1]


def test_rows_of_rule_110_stay_equally_long_and_teach_what_is_open_alone() -> None:
    make, settings, _ = TASKS["rule110"]
    task, plain = make(**settings, curriculum=ROWS), make(**settings)
    for index in range(2 * ROWS):
        row, whole = task.example(index), plain.example(index)
        assert row.input_ids == whole.input_ids
        spans = [range(query.start, query.stop) for query in row.queries]
        assert {place for span in spans for place in span} == {i for i, y in enumerate(row.labels) if y != IGNORE}
        assert row.queries == [query for query in whole.queries if query.difficulty <= STEPS[index // ROWS]]


def test_levels_open_in_order() -> None:
    levels = "abc"
    opened = ["".join(open_levels(levels, 2, "train", index)) for index in range(8)]
    assert opened == ["a", "a", "ab", "ab", "abc", "abc", "abc", "abc"]
    assert open_levels(levels, 0, "train", 0) == open_levels(levels, 2, "test", 0) == "abc"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("curriculum", [-1, 2.5, None, "40"])
def test_what_is_no_number_of_rows_is_refused(name: str, curriculum: Any) -> None:
    make, settings, _ = TASKS[name]
    with pytest.raises(ValueError, match="curriculum: expected a whole number of rows"):
        make(**settings, curriculum=curriculum)


def test_one_number_of_steps_has_no_curriculum() -> None:
    with pytest.raises(ValueError, match="curriculum: form='paper'"):
        Rule110(curriculum=100)


def test_tasks_say_their_curriculum() -> None:
    for make, settings, _ in TASKS.values():
        assert "curriculum=7" in repr(make(**settings, curriculum=7))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_it(name: str) -> None:
    own: dict[str, Any] = {"rule110": {"form": "queries", "steps": [1, 2]}, "gsm_inf": {"vocabulary": "pets"}}
    task: Any = RECIPES[name](curriculum=7, **own.get(name, {})).build(tokenizer=WordTokenizer([PETS]))
    assert task.curriculum == 7
