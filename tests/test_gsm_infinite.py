"""GSM-Infinite: problems that solve, of the official family, pure, disjoint, of the length asked for."""

from __future__ import annotations

import doctest
import importlib
import json
import pickle
import re
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from seeding import said_whatever_the_hash_seed

from sleepify.tasks.base import IGNORE, score
from sleepify.tasks.gsm_infinite import (
    PETS,
    THEMES,
    TREES,
    CachedExamples,
    GsmInfinite,
    Problem,
    Prompt,
    Theme,
    UnsolvableError,
    WordTokenizer,
    load_problems,
    read_vocabulary,
    solve,
    write_examples,
)
from sleepify.tasks.gsm_infinite.solver import questions_of, split_sentences
from sleepify.training.task_arguments import GsmInfiniteArguments

SHARED = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
OFFICIAL = SHARED / "gsm_infinite" / "official.jsonl"


@pytest.fixture(scope="module")
def official() -> list[dict[str, Any]]:
    if not OFFICIAL.is_file():
        pytest.skip("the official samples carry no licence and are not in the repository; ../shared is absent")
    return [json.loads(line) for line in OFFICIAL.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def qwen() -> Any:
    if not (SHARED / "tokenizer_qwen2").is_dir():
        pytest.skip("the Qwen2 tokenizer's files are not in the repository; ../shared is absent")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizer_qwen2")


def small(**changes: Any) -> GsmInfinite:
    """The smallest setting: a few sentences in a few words."""
    settings: dict[str, Any] = dict(
        operations=(2, 3), depth=2, vocabulary=[PETS], size=(2, 2), tokenizer=WordTokenizer([PETS])
    )
    return GsmInfinite(**{**settings, **changes})


# The solver


def test_the_solver_solves_the_official_samples_and_counts_their_operations(official: list[dict[str, Any]]) -> None:
    assert len(official) == 210
    for row in official:
        found = solve(row["problem"], row["question"])
        assert (found.answer, found.operations, found.arithmetic) == (row["answer"], row["op"], row["n_arith"])
        assert found.reverse == (row["mode"] == "forwardreverse")


A, B = "the number of cat in Ash", "the number of dog in Ash"


@pytest.mark.parametrize(
    ("problem", "question", "reason"),
    [
        ("The number of cat in Ash equals the number of hen in Elm. ", "How many cat does Ash have?", "nothing in"),
        (f"The number of cat in Ash equals {B}. The number of dog in Ash equals {A}.", f"What is {A}?", "depends on"),
        ("The number of cat in Ash equals 2. The number of cat in Ash is 3.", f"What is {A}?", "expected 'The"),
        ("The number of cat in Ash equals 2. ", "How many cats are there?", "expected 'How many"),
        (f"The number of cat in Ash equals {B}. The number of cat in Ash equals {B}.", f"What is {A}?", "twice"),
        ("The number of cat in Ash exists, and its number is greater than 0.", f"What is {A}?", "told values"),
        (
            "The number of cat in Ash exists, and its number is greater than 0. The number of dog in Ash equals 5. "
            "The total number of pets in Ash equals 4.",
            f"What is {A}?",
            "greater than 0",
        ),
        (
            "The number of cat in Ash exists, and its number is greater than 0. The number of dog in Ash equals 5. "
            "The total number of pets in Ash equals 9. The number of hen in Elm equals 1. "
            "The total number of pets in Elm equals 2.",
            f"What is {A}?",
            "contradicts",
        ),
        (
            "The number of cat in Ash exists, and its number is greater than 0. "
            f"The number of dog in Ash equals 2 times {A}. The total number of pets in Ash equals 4.",
            f"What is {A}?",
            "integer",
        ),
    ],
)
def test_the_solver_says_why_it_cannot(problem: str, question: str, reason: str) -> None:
    with pytest.raises(UnsolvableError, match=reason):
        solve(problem, question)


def test_the_solver_multiplies_counts_by_averages() -> None:
    text = (
        "The number of cat in Ash equals 3. The number of dog in Ash equals 1 plus the number of cat in Ash. "
        "The average number of toys per cat in Ash equals 2. The average number of toys per dog in Ash equals the "
        "difference between the number of dog in Ash and the number of cat in Ash."
    )
    found = solve(text, "What is the total number of pet toys in Ash?")
    assert (found.answer, found.operations, found.arithmetic) == (10, 10, 5)
    # Cats, dogs, toys per dog; the totals have no sentences of their own.
    assert found.chain == 3


def test_a_chain_counts_the_sentences_that_need_each_other() -> None:
    text = (
        "The number of cat in Ash equals 2. The number of dog in Ash equals 5. "
        "The number of dog in Birch equals 3 plus the total number of pets in Ash. The number of cat in Birch equals 1."
    )
    assert solve(text, "How many dog does Ash have?").chain == 1
    assert solve(text, "What is the total number of pets in Ash?").chain == 1
    assert solve(text, "What is the total number of pets in Birch?").chain == 2
    hidden = text.replace("cat in Ash equals 2", "cat in Ash exists, and its number is greater than 0")
    told = f"{hidden} The total number of pets in Birch equals 11."
    found = solve(told, "What is the number of cat in Ash?")
    assert (found.answer, found.reverse, found.chain) == (2, True, 2)


# The generator


def assert_steps_hold(problem: Problem) -> None:
    """Every chain "a = b + c = 1 + 2 = 3" of the solution is arithmetic that holds, with x the answer."""
    assert problem.solution.endswith(f"Answer: {problem.answer}.")
    # In forward mode x is a letter like any other.
    allowed = re.compile(r"[\d +*/()-]+" if problem.mode == "forward" else r"[\d x+*/()-]+")
    for chain in re.findall(r"[^;.]*=[^;.]*", problem.solution.replace(" and x = ", "; x = ")):
        sides = [side.split(" so ")[-1].split("Then ")[-1].strip() for side in chain.replace(",", " ").split(" = ")]
        values = {eval(side, {"x": problem.answer}) for side in sides if allowed.fullmatch(side)}
        assert len(values) == 1, chain


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_every_problem_solves_from_its_text(depth: int, mode: Any) -> None:
    for operations in range(4 - depth, 21):
        task = GsmInfinite(seed=7, operations=[operations], depth=depth, modes=[mode])
        for index in range(6 if operations <= 10 else 2):
            problem = task.problem(index)
            problem.check()
            assert (problem.operations, problem.mode) == (operations, mode)
            assert mode == "forward" or 1 <= problem.answer <= 4
            assert_steps_hold(problem)


def test_wrong_problems_do_not_pass_the_check() -> None:
    problem = small().problem(0)
    for changed in (replace(problem, answer=problem.answer + 1), replace(problem, operations=problem.operations + 1)):
        with pytest.raises(ValueError, match="solving it gives"):
            changed.check()


# Shares of binary operations and of query kinds by the published statistics: (depth, mode, operations) -> shares.
PUBLISHED = {
    (2, "forward", 2): ({0: 1.0}, {"total": 1.0}),
    (2, "forward", 3): ({0: 1.0}, {"count": 0.5, "total": 0.5}),
    (2, "forward", 4): ({0: 0.06, 1: 0.94}, {"total": 0.93, "count": 0.07}),
    (2, "forward", 5): ({1: 0.17, 2: 0.83}, {"total": 0.84, "count": 0.16}),
    (2, "forward", 6): ({0: 0.01, 1: 0.13, 2: 0.62, 3: 0.25}, {"total": 0.75, "count": 0.25}),
    (2, "forward", 8): ({1: 0.01, 2: 0.18, 3: 0.6, 4: 0.21}, {"total": 0.69, "count": 0.31}),
    (2, "reverse", 5): ({1: 0.17, 2: 0.83}, {"count": 1.0}),
    (2, "reverse", 8): ({1: 0.01, 2: 0.13, 3: 0.63, 4: 0.21}, {"count": 1.0}),
    (3, "forward", 1): ({0: 1.0}, {"average": 1.0}),
    (3, "forward", 3): ({0: 0.09, 1: 0.91}, {"average": 0.81, "count": 0.13, "total": 0.06}),
    (3, "forward", 6): ({1: 0.02, 2: 0.88, 3: 0.1}, {"total": 0.53, "average": 0.4, "count": 0.07}),
    (3, "forward", 8): ({2: 0.13, 3: 0.76, 4: 0.11}, {"average": 0.56, "total": 0.38, "count": 0.06}),
    (3, "reverse", 4): ({0: 0.01, 1: 0.99}, {"count": 0.67, "average": 0.33}),
    (3, "reverse", 8): ({2: 0.19, 3: 0.71, 4: 0.08}, {"average": 0.53, "count": 0.47}),
}


def kind_of(question: str) -> str:
    found = re.match(r"What is the (average|total)", question)
    return found[1] if found else "count"


def distance(counts: Counter[Any], shares: dict[Any, float]) -> float:
    """Total variation: 0 for the same shares, 1 for nothing in common."""
    total = sum(counts.values())
    return sum(abs(counts[key] / total - shares.get(key, 0.0)) for key in {*counts, *shares}) / 2


def assert_near_published(n: int, band: float, mean_band: float) -> None:
    distances = []
    for (depth, mode, operations), (arithmetic, kinds) in PUBLISHED.items():
        task = GsmInfinite(seed=3, operations=[operations], depth=depth, modes=[mode])  # type: ignore[list-item]
        problems = [task.problem(index) for index in range(n)]
        found = Counter(solve(p.problem, p.question).arithmetic for p in problems)
        asked = Counter(kind_of(p.question) for p in problems)
        here = [distance(found, arithmetic), distance(asked, kinds)]
        assert max(here) < band, (depth, mode, operations, here, found, asked)
        distances += here
    assert statistics.mean(distances) < mean_band, distances


def test_shares_are_near_the_published_ones() -> None:
    # A sample of 50 from the very same shares lies about 0.06 off by chance.
    assert_near_published(50, band=0.30, mean_band=0.12)


@pytest.mark.slow
def test_shares_are_near_the_published_ones_in_a_large_sample() -> None:
    assert_near_published(600, band=0.20, mean_band=0.07)


@pytest.mark.parametrize(
    ("depth", "operations", "arithmetic", "kind", "share"),
    [
        (2, 6, 2.10, "total", 0.75),
        (3, 3, 0.91, "average", 0.81),
        (3, 6, 2.08, "total", 0.53),
        (3, 8, 2.98, "total", 0.38),
    ],
)
def test_means_are_near_the_published_ones(
    depth: int, operations: int, arithmetic: float, kind: str, share: float
) -> None:
    task = GsmInfinite(seed=8, operations=[operations], depth=depth, modes=["forward"])
    problems = [task.problem(index) for index in range(500)]
    # Three standard errors, of our 500 and of the 2,000 or more that are published, and what the fit leaves.
    found = [solve(p.problem, p.question).arithmetic for p in problems]
    chance = 3 * (statistics.pvariance(found) * (1 / 500 + 1 / 2000)) ** 0.5
    assert statistics.mean(found) == pytest.approx(arithmetic, abs=chance + (0.05 if operations == 8 else 0.02))
    asked = sum(kind_of(p.question) == kind for p in problems) / len(problems)
    chance = 3 * (share * (1 - share) * (1 / 500 + 1 / 2000)) ** 0.5
    assert asked == pytest.approx(share, abs=chance + (0.10 if operations == 8 else 0.02))


def test_answers_have_the_published_range() -> None:
    reverse = Counter(GsmInfinite(seed=1, modes=["reverse"]).problem(index).answer for index in range(300))
    assert distance(reverse, {1: 0.126, 2: 0.290, 3: 0.291, 4: 0.293}) < 0.08
    forward = [GsmInfinite(seed=1, operations=[8], modes=["forward"]).problem(index).answer for index in range(150)]
    assert 0 <= min(forward) and 60 <= max(forward) <= 1000 and len(set(forward)) >= 30
    few = {GsmInfinite(operations=[2], modes=["forward"]).problem(index).answer for index in range(60)}
    assert few == {1, 2, 3, 4}


def test_sentence_forms_have_the_published_shares() -> None:
    # Medium problems without noise: the share of each right-hand side among all sentences.
    task, forms = GsmInfinite(seed=5, operations=range(2, 9), depth=2, modes=["forward", "reverse"]), Counter[str]()
    for index in range(400):
        for sentence in re.split(r"\.\s+(?=The )", task.problem(index).problem.removesuffix(".")):
            right = sentence.partition(" equals ")[2]
            found = re.fullmatch(r"(\d+)(?: (plus|times) )?(.*)", right)
            if "greater than 0" in sentence:
                forms["unknown"] += 1
            elif found and not found[3]:
                forms["literal"] += 1
            elif " and " in right:
                forms["other"] += 1
            else:
                forms[found[2] if found else "copy"] += 1
    published = {"literal": 0.44, "copy": 0.20, "times": 0.07, "plus": 0.07, "unknown": 0.08, "other": 0.14}
    assert distance(forms, published) < 0.08, forms


def test_lengths_are_those_of_the_official_samples(official: list[dict[str, Any]], qwen: Any) -> None:
    themes = read_vocabulary(official)
    for depth, band in ((2, 0.30), (3, 0.20)):
        rows = [r for r in official if r["d"] == depth and r["length"] == "zero_context"]
        task = GsmInfinite(seed=2, operations=range(4 - depth, 9), depth=depth, vocabulary=themes)
        problems = [task.problem(index).problem for index in range(150)]
        tokens = statistics.mean(len(qwen.encode(text)) for text in problems)
        assert tokens == pytest.approx(statistics.mean(r["n_tokens_problem"] for r in rows), rel=band)
        lines = statistics.mean(text.count(". The ") + 1 for text in problems)
        assert lines == pytest.approx(statistics.mean(r["problem"].count(". The ") + 1 for r in rows), rel=band)


# Pure, and disjoint by construction


SEEDED = """
from sleepify.tasks.gsm_infinite import GsmInfinite
task = GsmInfinite(seed=11)
print([task.problem(index, split).problem for split in ("train", "test") for index in (3, 0, 2)])
"""


def test_a_problem_depends_on_seed_split_and_index_alone() -> None:
    said = said_whatever_the_hash_seed(SEEDED)
    task = GsmInfinite(seed=11)
    other_order = {(split, i): task.problem(i, split).problem for i in (2, 0, 3) for split in ("test", "train")}
    assert said == str([other_order[split, i] for split in ("train", "test") for i in (3, 0, 2)])
    assert GsmInfinite(seed=12).problem(3).problem != task.problem(3).problem


def core_of(problem: Problem) -> tuple[str, ...]:
    return (problem.question, *sorted(re.split(r"\.\s+(?=The )", problem.problem.removesuffix("."))))


def test_train_and_test_share_no_problem() -> None:
    # Few words and operations, so that problems do come up again within a split, in one order of sentences or another:
    # across splits they must not.
    for settings in ({"operations": [2], "modes": ["reverse"]}, {"operations": [4], "size": (1, 2)}):
        task = small(**settings)
        train = [core_of(task.problem(i)) for i in range(500)]
        test = [core_of(task.problem(i, "test")) for i in range(100)]
        assert len(set(train)) < 480
        assert not set(train) & set(test)
    wide = GsmInfinite(seed=1)
    assert not {core_of(wide.problem(i)) for i in range(300)} & {core_of(wide.problem(i, "test")) for i in range(100)}


# Rows and lengths


def test_rows_are_supervised_on_the_answer_alone() -> None:
    words = WordTokenizer([PETS])
    for chain_of_thought in (False, True):
        for question_first in (False, True):
            task = small(chain_of_thought=chain_of_thought, question_first=question_first)
            for index in range(20):
                problem, row = task.problem(index), task.example(index)
                (query,) = row.queries
                target = problem.solution if chain_of_thought else str(problem.answer)
                assert row.input_ids[query.start :] == [*words.encode(target), words.eos_token_id]
                assert row.labels == [IGNORE] * query.start + row.input_ids[query.start :]
                assert query.stop == len(row.input_ids) - 1 and query.difficulty == problem.operations
                text = words.decode(row.input_ids)
                assert (text.index("Question :") < text.index("Problem :")) == question_first
                assert score(row, row.input_ids) == [(problem.operations, True)]
                wrong = [token + (position == query.start) for position, token in enumerate(row.input_ids)]
                assert score(row, wrong) == [(problem.operations, False)]


def test_problems_of_one_place_have_five_things_told_apart_by_one_word() -> None:
    words = WordTokenizer([TREES])
    task = GsmInfinite(
        operations=range(4, 11), depth=2, modes=["forward"], vocabulary=[TREES], size=(1, 5), question_first=False,
        n_questions=8, questions_about="text", target_tokens=(92, 104), tokenizer=words,
    )  # fmt: skip
    chains = Counter[int]()
    for index in range(100):
        asked = task.problems(index)
        own, *_ = asked
        names = {name for sentence in split_sentences(own.problem) for name in re.findall(r"of (\w+) in", sentence)}
        assert names <= {*TREES.things[0], *TREES.noise_things, TREES.things_total}
        places = {place for sentence in split_sentences(own.problem) for place in re.findall(r" in (\w+)", sentence)}
        assert len(places - set(TREES.noise_places)) == 1
        for each in asked:
            each.check()
            chains[solve(each.problem, each.question).chain] += 1
    assert chains[3] > 100 and chains[4] > 20 and chains[5] > 2


def test_the_small_setting_is_small_and_travels_to_workers() -> None:
    task = small()
    lengths = sorted(len(task.example(index).input_ids) for index in range(200))
    assert pickle.loads(pickle.dumps(task)).example(3) == task.example(3)
    assert lengths[10] >= 30 and lengths[189] <= 85 and len(WordTokenizer([PETS])) < 220


def test_qwen_rows_have_the_space_in_the_prompt(qwen: Any) -> None:
    row = GsmInfinite(tokenizer=qwen).example(4)
    (query,) = row.queries
    assert qwen.decode(row.input_ids[: query.start]).endswith("Answer: ")
    assert qwen.decode(row.input_ids[query.start : query.stop]).isdigit()
    assert row.input_ids[query.stop :] == [qwen.eos_token_id]


def crossing(text: str) -> list[int]:
    """A tokenizer whose tokens end anywhere: counts of parts do not add up to the count of the whole."""
    return [hash_of(text[start : start + 3]) for start in range(0, len(text), 3)]


def hash_of(piece: str) -> int:
    return sum(ord(character) * 1000**power for power, character in enumerate(piece))


@pytest.mark.parametrize("target", [(400, 420), (900, 1000)])
def test_the_target_is_met_as_the_tokenizer_counts(target: tuple[int, int]) -> None:
    for tokenizer in (WordTokenizer(THEMES), crossing):
        task = GsmInfinite(operations=range(1, 7), target_tokens=target, tokenizer=tokenizer)
        for index in range(12):
            assert target[0] <= len(task.example(index).input_ids) <= target[1]
            task.problem(index).check()


def test_further_questions_are_answered_from_the_same_text() -> None:
    tokenizer = WordTokenizer(THEMES)
    fields: dict[str, Any] = {"operations": range(4, 9), "question_first": False, "tokenizer": tokenizer}
    several, one = GsmInfinite(**fields, n_questions=4), GsmInfinite(**fields)
    counts = Counter[int]()
    for index in range(60):
        problem, *further = several.problems(index)
        assert problem == one.problem(index)
        asked = [problem, *further]
        counts[len(asked)] += 1
        assert len({each.question for each in asked}) == len(asked)
        assert [each.operations for each in further] == sorted((each.operations for each in further), reverse=True)
        for each in further:
            assert each.problem == problem.problem and not each.solution
            each.check()
        row, alone = several.example(index), one.example(index)
        assert row.input_ids[: len(alone.input_ids) - 1] == alone.input_ids[:-1]
        answers = [tokenizer.decode(row.input_ids[query.start : query.stop]) for query in row.queries]
        assert [answer.replace(" ", "") for answer in answers] == [str(each.answer) for each in asked]
        assert [query.difficulty for query in row.queries] == [each.operations for each in asked]
        supervised = [place for query in row.queries for place in range(query.start, query.stop)]
        assert [place for place, label in enumerate(row.labels) if label != -100] == [*supervised, len(row.labels) - 1]
    assert counts[4] > 20
    assert "n_questions=4" in repr(several) and "n_questions" not in repr(one)


def test_everything_that_a_text_defines_is_asked() -> None:
    fields: dict[str, Any] = {"operations": range(2, 7), "question_first": False, "tokenizer": WordTokenizer(THEMES)}
    fields |= {"target_tokens": (300, 330), "n_questions": 100}
    path, text = GsmInfinite(**fields), GsmInfinite(**fields, questions_about="text")
    n_falling = 0
    for index in range(40):
        own, *further = text.problems(index)
        for each in further:
            assert each.problem == own.problem
            each.check()
        defined = questions_of(own.problem)
        assert len(defined) == len({sentence.split(" equals ")[0] for sentence in sentences_with_value(own.problem)})
        on_the_way = {name.question() for name in solve(own.problem, own.question).path}
        asked = [each.question for each in (own, *further)]
        assert len(asked) == len(set(asked)) and set(asked) == {*defined, *on_the_way, own.question}
        operations = [each.operations for each in further]
        n_falling += operations == sorted(operations, reverse=True)
    assert n_falling < 10
    assert "questions_about=text" in repr(text) and "questions_about" not in repr(path)


def test_one_operation_at_depth_2_is_a_text_of_stated_numbers() -> None:
    words = WordTokenizer([TREES])
    fields: dict[str, Any] = {"depth": 2, "modes": ["forward"], "vocabulary": [TREES], "size": (1, 5)}
    problems = [GsmInfinite(**fields, operations=[1]).problem(index) for index in range(200)]
    for problem in problems:
        problem.check()
        numbers = [re.fullmatch(r"The number of \w+ in \w+ equals (\d+)", s) for s in split_sentences(problem.problem)]
        assert len(numbers) == 5 and all(numbers) and problem.operations == 1
        assert problem.is_correct(problem.solution) and problem.solution.startswith("Define ")
    assert {problem.answer for problem in problems} == set(range(1, 13))
    # With a length to fill distractors follow from the numbers, and all of it is asked.
    task = GsmInfinite(
        **fields, operations=[1], question_first=False, n_questions=8, questions_about="text", tokenizer=words,
        target_tokens=(92, 104),
    )  # fmt: skip
    chains = Counter(
        solve(each.problem, each.question).chain for index in range(50) for each in task.problems(index, "test")
    )
    assert chains[1] == 250 and chains[2] > 50 and set(chains) == {1, 2}
    # Depth 3 has a problem of one operation, as in the benchmark: nothing of our own beside it.
    mixed = GsmInfinite(operations=[1])
    assert all("average number" in mixed.problem(index).problem for index in range(20))


def sentences_with_value(problem: str) -> list[str]:
    return [sentence for sentence in split_sentences(problem) if " equals " in sentence]


@pytest.mark.parametrize("about", ["path", "text"])
def test_further_questions_of_a_split_are_none_of_another(about: Any) -> None:
    fields: dict[str, Any] = {
        "operations": [2, 4],
        "depth": 2,
        "modes": ["forward"],
        "vocabulary": [PETS],
        "size": (2, 1),
    }
    fields |= {"question_first": False, "tokenizer": WordTokenizer([PETS])}
    task = GsmInfinite(**fields, n_questions=4, questions_about=about)

    def asked(split: Any, n_rows: int) -> set[tuple[frozenset[str], str]]:
        rows = [task.problems(index, split) for index in range(n_rows)]
        return {(frozenset(split_sentences(each.problem)), each.question) for row in rows for each in row}

    train, test = asked("train", 600), asked("test", 600)
    assert len(test) > 100 and not train & test
    if about == "text":
        assert not {text for text, _ in train} & {text for text, _ in test}


def test_a_problem_that_no_sentence_fits_is_drawn_again() -> None:
    fields = {"operations": range(2, 9), "depth": 2, "modes": ["forward"], "vocabulary": [PETS], "size": (2, 2)}
    task = GsmInfinite(**fields, question_first=False, tokenizer=WordTokenizer([PETS]), target_tokens=(64, 76))
    # Number 296 has room for 12 tokens; of the few sentences that the theme can add, none is so short.
    assert 64 <= len(task.example(296).input_ids) <= 76


def test_qwen_rows_have_the_papers_lengths(qwen: Any) -> None:
    task = GsmInfinite(target_tokens=(2000, 3300), tokenizer=qwen)
    lengths = [len(task.example(index).input_ids) for index in range(25)]
    assert 2000 <= min(lengths) < 2300 and 3000 < max(lengths) <= 3300
    filled = GsmInfinite(target_tokens=3000, tokenizer=qwen)
    assert all(2930 < len(filled.example(index).input_ids) <= 3000 for index in range(5))


def test_long_problems_are_drawn_again_under_a_limit() -> None:
    words = WordTokenizer(THEMES)
    free = GsmInfinite(tokenizer=words)
    limited = GsmInfinite(tokenizer=words, max_tokens=150)
    assert max(len(free.example(index).input_ids) for index in range(40)) > 150
    assert max(len(limited.example(index).input_ids) for index in range(40)) <= 150


def test_noise_is_about_other_places_and_never_a_source() -> None:
    (theme,) = (theme for theme in THEMES if theme.name == "harbours")
    task = GsmInfinite(themes=["harbours"], target_tokens=(1500, 2000), tokenizer=WordTokenizer(THEMES))
    for index in range(10):
        sentences = re.split(r"\.\s+(?=The )", task.problem(index).problem.removesuffix("."))
        noise = [s for s in sentences if s.split(" equals ")[0].endswith(theme.noise_places)]
        assert len(noise) > 15 and len(set(s.split(" equals ")[0] for s in noise)) == len(noise)
        assert not any(character.isdigit() for s in noise for character in s)
        core = [s for s in sentences if s not in noise]
        assert core and not any(place in s for s in core for place in theme.noise_places)


# Vocabularies


def test_a_vocabulary_is_read_back_from_problems_written_in_it() -> None:
    task = GsmInfinite(target_tokens=1200, tokenizer=WordTokenizer(THEMES))
    rows = [vars_of(task.problem(index)) for index in range(250)]
    for read, theme in zip(read_vocabulary(rows), sorted(THEMES, key=lambda theme: theme.name), strict=True):
        assert {frozenset(group) for group in read.places} == {frozenset(group) for group in theme.places}
        assert {frozenset(group) for group in read.things} == {frozenset(group) for group in theme.things}
        assert (read.things_total, read.each, read.each_total) == (theme.things_total, theme.each, theme.each_total)
        assert set(read.noise_places) <= set(theme.noise_places) and set(read.noise_things) <= set(theme.noise_things)


def vars_of(problem: Problem) -> dict[str, Any]:
    modes = {"forward": "normalforward", "reverse": "forwardreverse"}
    return {
        "problem": problem.problem,
        "question": problem.question,
        "solution": problem.solution,
        "op": problem.operations,
        "template": problem.theme,
        "mode": modes[problem.mode],
    }


def test_noise_places_are_told_from_the_problems_own() -> None:
    # Cedar has a number of its own and Birch is used by another sentence; nothing needs Elm.
    problem = (
        "The number of cat in Ash equals 2. The number of cat in Cedar equals 3. The number of dog in Elm equals the "
        "total number of pets in Ash. The number of dog in Ash equals the number of cat in Birch. The number of cat in "
        "Birch equals the number of cat in Ash."
    )
    (theme,) = read_vocabulary(
        [{"problem": problem, "question": "What is the total number of pets in Ash?", "template": "t"}]
    )
    assert (theme.places, theme.noise_places) == ((("Ash", "Birch", "Cedar"),), ("Elm",))
    assert (theme.things, theme.things_total, theme.each) == ((("cat", "dog"),), "pets", None)


IN_PLACES = (
    *THEMES[2].noise_places[:10],
    *("Lost in Lanterns Film Gala", "Night in Harbour in Winter Fair", "Lanterns Film Gala of Wales"),
    *("Snow and Stars Festival", "Salt, Sun and the Sea Festival", "St. The Rock Festival"),
)
IN_THINGS = (
    *THEMES[2].noise_things[:30],
    *("film about fishing in 1930's cornwall", "film about life in spring", "play about life"),
    *("film of love, war and the rain", "song per mile film"),
)
"""Names like those of the benchmark's own distractors: with " in ", commas and "and" inside."""


def test_a_vocabulary_is_read_from_noisy_rows_with_in_inside_names() -> None:
    theme = replace(THEMES[2], noise_places=IN_PLACES, noise_things=IN_THINGS)
    task = GsmInfinite(vocabulary=[theme], target_tokens=(9000, 12000), tokenizer=lambda text: list(text.encode()))
    problems = [task.problem(index) for index in range(30)]
    for problem in problems:
        problem.check()
    (read,) = read_vocabulary(map(vars_of, problems))
    assert (read.places, read.things) == tuple(
        tuple(sorted(map(tuple, map(sorted, g)))) for g in (theme.places, theme.things)
    )
    assert (read.things_total, read.each, read.each_total) == (
        theme.things_total,
        theme.each,
        theme.each_total,
    )
    assert set(read.noise_places) == set(IN_PLACES)
    assert set(read.noise_things) == set(IN_THINGS)
    again = GsmInfinite(vocabulary=[read], target_tokens=(9000, 12000), tokenizer=lambda text: list(text.encode()))
    again.problem(0).check()


def test_few_noisy_rows_are_read_too() -> None:
    core = "The number of cat in Ash equals 2. The number of dog in Ash equals the number of cat in Ash. "
    gala, film = "Lost in Lanterns Film Gala", "film about fishing in 1930's cornwall"
    noise = (
        f"The number of {film} in {gala} equals the number of cat in Ash. The number of short play in {gala} equals "
        "the sum of the number of cat in Ash and the total number of pets in Oak Fair. "
        f"The number of {film} in Oak Fair equals the total number of pets in Ash. "
    )
    row = {"problem": core + noise, "question": "What is the total number of pets in Ash?", "template": "t"}
    (theme,) = read_vocabulary([row])
    assert (theme.places, theme.things_total) == ((("Ash",),), "pets")
    assert theme.noise_places == ("Lost in Lanterns Film Gala", "Oak Fair")
    assert theme.noise_things == ("film about fishing in 1930's cornwall", "short play")
    assert solve(str(row["problem"]), str(row["question"])).answer == 4


def test_a_vocabulary_is_read_from_rows_with_messages_only() -> None:
    rows = [vars_of(GsmInfinite(themes=["orchards"]).problem(index)) for index in range(60)]
    told = []
    for row in rows:
        text = f"Problem: {row['problem']} Question: {row['question']} Solution: "
        messages = [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": text}]
        told.append({"messages": messages, "template": row["template"]})
    assert read_vocabulary(told) == read_vocabulary(rows)
    with pytest.raises(ValueError, match=r"row 0: expected text in \['problem', 'question'\]"):
        read_vocabulary([{"messages": [{"role": "user", "content": "Hello."}], "template": "t"}])


@pytest.mark.parametrize("template", ["crazy_zootopia", "teachers_in_school", "movie_festival_awards"])
def test_official_problems_with_such_distractors_are_read(official: list[dict[str, Any]], template: str) -> None:
    rows = [row for row in official if row["template"] == template]
    (plain,) = read_vocabulary(rows)
    theme = replace(plain, noise_places=IN_PLACES, noise_things=IN_THINGS)
    task = GsmInfinite(vocabulary=[theme], target_tokens=(9000, 12000), tokenizer=lambda text: list(text.encode()))
    noisy = [vars_of(task.problem(index)) for index in range(30)]
    (read,) = read_vocabulary([*rows, *noisy])
    assert (read.places, read.things, read.things_total) == (plain.places, plain.things, plain.things_total)
    assert (read.each, read.each_total) == (plain.each, plain.each_total)
    assert set(read.noise_places) == {*plain.noise_places, *IN_PLACES}
    assert set(read.noise_things) == {*plain.noise_things, *IN_THINGS}


def test_problems_in_the_official_words(official: list[dict[str, Any]], qwen: Any) -> None:
    themes = read_vocabulary(official)
    assert [[len(group) for group in theme.places] for theme in themes] == [[5, 5]] * 3
    text = " ".join(row["problem"] + row["question"] for row in official)
    assert all(name in text for theme in themes for name in theme.names())
    ours = {name for theme in THEMES for name in theme.names()}
    (noisy,) = (theme for theme in themes if theme.noise_places)
    task = GsmInfinite(vocabulary=themes, themes=[noisy.name], target_tokens=(2000, 3300), tokenizer=qwen)
    for index in range(8):
        problem = task.problem(index)
        problem.check()
        assert not [name for name in ours if f" {name} " in problem.problem and name not in noisy.names()]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"places": ()}, "groups of places"),
        ({"things": (("cat", "cat"),)}, "distinct things"),
        ({"places": (("Ash in Elm",),)}, "cannot stand"),
        ({"noise_places": ("Ash",)}, "must not be places"),
        ({"each": None}, "both"),
        ({"each_total": "playthings"}, "tell the totals apart"),
    ],
)
def test_a_theme_that_cannot_be_read_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(PETS, **changes)


# Published rows, and rows on disk


def test_published_rows_load_from_jsonl_and_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Parquet is read with datasets (extra 'train')")
    problems = [GsmInfinite(seed=4).problem(index) for index in range(20)]
    rows = [vars_of(problem) for problem in problems]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert load_problems(lines) == problems
    assert load_problems(tmp_path / "rows.parquet") == problems


def test_rows_with_the_text_in_messages_load(tmp_path: Path) -> None:
    problem = GsmInfinite().problem(0)
    row = vars_of(problem)
    content = f"Problem: {row.pop('problem')} Question: {row.pop('question')} Solution: "
    row["messages"] = [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": content}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert load_problems(path) == [problem]


def test_official_rows_load(official: list[dict[str, Any]]) -> None:
    problems = load_problems(OFFICIAL)
    assert [(p.answer, p.operations) for p in problems] == [(row["answer"], row["op"]) for row in official]
    assert all(p.is_correct(row["solution"]) for p, row in zip(problems, official, strict=True))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    good = vars_of(GsmInfinite(modes=["forward"]).problem(0))
    path = tmp_path / "rows.jsonl"

    def write(*rows: Any) -> Path:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
        return path

    with pytest.raises(ValueError, match=r"row 2: lacks \['solution'\]"):
        load_problems(write(good, {**good, "solution": None}))
    with pytest.raises(ValueError, match=r"row 1: .* solving it gives .* invalid='drop'"):
        load_problems(write({**good, "solution": "Answer: 999."}))
    assert len(load_problems(write({**good, "solution": "Answer: 999."}, good), invalid="drop")) == 1
    with pytest.raises(ValueError, match="no row solves"):
        load_problems(write({**good, "solution": "Answer: 999."}), invalid="drop")
    with pytest.raises(ValueError, match="expected a mode"):
        load_problems(write({**good, "mode": "sideways"}))
    with pytest.raises(ValueError, match="ending in 'Answer"):
        load_problems(write({**good, "solution": "So it is."}))
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        load_problems(write(good, "{half"))
    with pytest.raises(ValueError, match="empty split"):
        load_problems(write())
    with pytest.raises(FileNotFoundError, match="expected a file"):
        load_problems(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="has no splits"):
        load_problems(write(good), split="ops_2")


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the cache is read with datasets (extra 'train')")
    task, path = small(), tmp_path / "train.arrow"
    rows = [task.example(index) for index in range(300)]
    assert write_examples(iter(rows), path) == 300
    cached = CachedExamples(path)
    assert len(cached) == 300 and [cached[index] for index in (0, 150, 299)] == [rows[0], rows[150], rows[299]]
    with pytest.raises(ValueError, match="empty split"):
        write_examples([], tmp_path / "none.arrow")
    with pytest.raises(ValueError, match="row 0: expected at most 10 tokens"):
        write_examples(iter(rows), tmp_path / "long.arrow", max_tokens=10)
    assert [file.name for file in tmp_path.iterdir()] == ["train.arrow"]
    with pytest.raises(FileNotFoundError, match="write one"):
        CachedExamples(tmp_path / "none.arrow")


# Bad input


class Lacking:
    """A tokenizer that knows some words only."""

    unk_token_id = 9

    def __init__(self, known: str) -> None:
        self.known = known

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(c) if re.match(self.known, c) else self.unk_token_id for c in text]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"operations": []}, "operation counts"),
        ({"operations": [0, 1]}, "operation counts"),
        ({"depth": 4}, "depth 2, 3"),
        ({"operations": [1], "depth": 2}, r"expected modes \['forward'\] with 1 operation at depth 2"),
        ({"modes": ["sideways"]}, "modes among"),
        ({"themes": ["pets"]}, "themes among"),
        ({"vocabulary": []}, "themes among"),
        ({"size": (0, 2)}, "size"),
        ({"target_tokens": (2000, 3000)}, "give a tokenizer"),
        ({"n_questions": 0}, "n_questions to be a whole number"),
        ({"n_questions": 2}, "question_first, .* off with several questions"),
        ({"n_questions": 2, "question_first": False, "questions_about": "all"}, "questions_about among"),
        ({"questions_about": "text"}, "n_questions above 1"),
        ({"target_tokens": (30, 20), "tokenizer": crossing}, "lowest, highest"),
        ({"target_tokens": 500, "max_tokens": 400, "tokenizer": crossing}, "above max_tokens"),
        ({"target_tokens": 500, "tokenizer": crossing, "vocabulary": [replace(PETS, noise_places=())]}, "noise names"),
        ({"tokenizer": Lacking(r"[\w: ?]")}, "no tokens for"),
        ({"tokenizer": lambda text: []}, "no tokens for"),
        ({"tokenizer": lambda text: [1] * len(text)}, "different tokens for all digits"),
        ({"tokenizer": WordTokenizer([PETS])}, "words of the tokenizer's themes"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GsmInfinite(**settings)


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ValueError, match="split among"):
        GsmInfinite().problem(0, "valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index >= 0"):
        GsmInfinite().problem(-1)
    with pytest.raises(ValueError, match="give GsmInfinite a tokenizer"):
        GsmInfinite().example(0)
    with pytest.raises(ValueError, match="an empty split.*max_tokens 12"):
        small(max_tokens=12, operations=[2]).problem(0)
    with pytest.raises(ValueError, match="noise names for 9 sentences"):
        small(target_tokens=2000).problem(0)
    with pytest.raises(ValueError, match="ask for fewer operations"):
        small(operations=[9], size=(1, 1)).problem(0)
    with pytest.raises(TypeError, match="expected a tokenizer"):
        Prompt(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected problems to read"):
        read_vocabulary([])
    with pytest.raises(ValueError, match=r"row 0: expected text in \['template'\]"):
        read_vocabulary([{"problem": "The number of cat in Ash equals 2.", "question": "How many cat does Ash have?"}])


def test_replies_are_scored_as_the_official_scorer_does() -> None:
    problem = replace(small().problem(0), answer=12)
    right = (
        *("so it is. Answer: 12.", "Answer: 12", "ANSWER: 12. Yes", "Answer: 12.0", "Answer: 12\nThat is all"),
        *("So \\boxed{12}.", "\\boxed{7}, no, \\boxed{12}", "**Answer: 12**", "**Answer:** 12.", "Solution: 12."),
        *("Final answer: Answer: 12.", "thus \\text{Answer: } 12 apples", "the answer is 12", "This is it: it is 12."),
        # Our own prompts end in "Answer:".
        *("12", " 12.", "12\n"),
    )
    assert [reply for reply in right if not problem.is_correct(reply)] == []
    wrong = (
        *("Answer: 12 animals.", "Answer: **12**", "Answer:12.", "Answer:\n12", "Answer: $12$.", "12 animals"),
        *("Answer: xxx ... Answer: 12.", "Answer: 7. Answer: 12.", "\\boxed{12}, no, \\boxed{7}", "it is 12. It is 7."),
        *("", "120", "1 2", "12.5", "-12", "twelve", "Answer: 7.", "Answer: -12."),
    )
    assert [reply for reply in wrong if problem.is_correct(reply)] == []


def test_the_examples_in_the_docstrings_run() -> None:
    for name in (
        "sleepify.tasks.gsm_infinite",
        "sleepify.tasks.gsm_infinite.names",
        "sleepify.tasks.gsm_infinite.solver",
    ):
        result = doctest.testmod(importlib.import_module(name))
        assert result.attempted and not result.failed


def test_themes_of_ones_own() -> None:
    theme = Theme("farm", (("East", "West"),), (("cow", "pig"),), "animals")
    problem = GsmInfinite(operations=[4], depth=2, vocabulary=[theme]).problem(0)
    problem.check()
    assert "animals" in problem.problem + problem.question or "cow" in problem.problem
    with pytest.raises(ValueError, match="depth 3 a theme with averages"):
        GsmInfinite(operations=[4], depth=3, vocabulary=[theme])


def test_a_task_says_what_it_is_the_same_in_every_process():
    task = GsmInfinite(operations=[2, 3], depth=2, size=(2, 2), vocabulary=[PETS], tokenizer=WordTokenizer([PETS]))
    again = GsmInfinite(operations=[2, 3], depth=2, size=(2, 2), vocabulary=[PETS], tokenizer=WordTokenizer([PETS]))
    assert repr(task) == repr(again) and "0x" not in repr(task) and task.difficulty_name == "operations"
    other = GsmInfinite(seed=1, operations=[2, 3], depth=2, size=(2, 2), vocabulary=[PETS])
    assert repr(other) != repr(task)


def test_a_small_vocabulary_is_named_or_what_was_meant_is_asked() -> None:
    words = WordTokenizer([PETS, TREES])
    for theme in (PETS, TREES):
        task = GsmInfiniteArguments(vocabulary=theme.name, operations=[4]).build(tokenizer=words)
        assert task.themes == [theme]
    with pytest.raises(ValueError, match=r"'pets' or 'trees', a file, .*'tree' \(did you mean 'trees'\?\)"):
        GsmInfiniteArguments(vocabulary="tree").build(tokenizer=words)
    with pytest.raises(FileNotFoundError):
        GsmInfiniteArguments(vocabulary="nowhere.jsonl").build(tokenizer=words)
