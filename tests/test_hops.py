"""Hops against a walk along the pairs as they are written."""

from __future__ import annotations

import doctest
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
from seeding import assert_seeded

import sleepify.tasks.hops
from sleepify.tasks import IGNORE, Hops, score
from sleepify.tasks.hops import PAD
from sleepify.tasks.split import cycle_key, in_split


def read(task: Hops, ids: list[int]) -> tuple[dict[int, int], list[tuple[int, int, int, int]]]:
    """The pairs, and every query: k, start, answer, and where it begins."""
    each = 3 if task.pair_ends else 2
    size = each * task.n_nodes
    end = size * task.n_reads
    assert ids[:end] == ids[:size] * task.n_reads and end == task.text_length
    pairs = dict(zip(ids[:size:each], ids[1:size:each], strict=True))
    assert not task.pair_ends or set(ids[2:size:3]) == {PAD}
    assert len(pairs) == task.n_nodes
    queries = []
    place = end
    while place < len(ids):
        if ids[place] == PAD:
            place += 1
            continue
        queries.append((ids[place], ids[place + 1], ids[place + 2], place))
        place += 3
    return pairs, queries


def tour(pairs: dict[int, int]) -> list[int]:
    """The nodes in the order of the cycle, from the smallest, until one comes again."""
    seen = [min(pairs)]
    while pairs[seen[-1]] not in seen:
        seen.append(pairs[seen[-1]])
    return seen


@pytest.mark.parametrize(
    "task",
    [
        Hops(),
        Hops(n_nodes=16, max_hops=16),
        Hops(n_nodes=32, n_windows=4, max_hops=32),
        Hops(n_nodes=16, n_windows=2, n_queries=10),
        Hops(n_nodes=6, n_windows=3, n_queries=6),
        Hops(n_nodes=9, n_windows=3, n_queries=9, max_hops=1),
        Hops(n_nodes=12, n_queries=1, max_hops=30),
        Hops(hops=[2, 5], n_reads=3),
        Hops(n_nodes=6, n_windows=3, n_queries=6, n_reads=2),
        Hops(n_nodes=16, max_hops=16, n_queries=10, pair_ends=True),
        Hops(n_nodes=6, n_windows=3, n_queries=4, n_reads=2, pair_ends=True),
    ],
)
def test_every_query_is_answered_by_walking_the_pairs(task: Hops) -> None:
    for index in range(60):
        example = task.example(index, "train" if index % 2 else "test")
        pairs, queries = read(task, example.input_ids)
        nodes = set(range(1 + task.max_hops, 1 + task.max_hops + task.n_nodes))
        assert set(tour(pairs)) == set(pairs) == nodes, "one cycle through all nodes"
        assert len({start for _, start, _, _ in queries}) == len(queries) == task.n_queries
        labels = [IGNORE] * task.length
        for query, (k, start, answer, place) in zip(example.queries, queries, strict=True):
            node = start
            for _ in range(k):
                node = pairs[node]
            assert node == answer and k in (task.hops or range(1, task.max_hops + 1))
            assert (query.difficulty, query.start, query.stop) == (k, place + 2, place + 3)
            assert place // task.window_size == (place + 2) // task.window_size, "a query lies in two windows"
            labels[place + 2] = answer
        assert example.labels == labels and len(example.input_ids) == task.length
        assert max(example.input_ids) < task.vocab_size


def test_sizes_are_those_of_the_experiment() -> None:
    task = Hops()
    assert (task.window_size, task.vocab_size, task.difficulty_name) == (16, 17, "hops")
    # 16 tokens of pairs, five queries and one token of padding, three queries.
    assert task.length == 16 + 16 + 9
    assert [i for i, token in enumerate(task.example(0).input_ids) if token == PAD] == [31]
    spread = Hops(n_nodes=32, n_windows=4)
    assert (spread.window_size, spread.length) == (16, 64 + 16 + 9)


def test_what_is_read_again_is_the_same_text() -> None:
    once, twice = Hops(), Hops(n_reads=2)
    for index in range(20):
        a, b = once.example(index), twice.example(index)
        assert b.input_ids == a.input_ids[:16] + a.input_ids
        assert b.labels == [IGNORE] * 16 + a.labels
        assert [query.start - 16 for query in b.queries] == [query.start for query in a.queries]
    pairs, asked = once.decode(once.example(0).input_ids).split(" | ")
    assert twice.decode(twice.example(0).input_ids) == f"{pairs} {pairs} | {asked}"


def test_ends_of_pairs_change_nothing_else() -> None:
    plain, ended = Hops(), Hops(pair_ends=True)
    assert (ended.window_size, ended.length, ended.vocab_size) == (24, 48, 17)
    for index in range(20):
        a, b = plain.example(index), ended.example(index)
        assert read(plain, a.input_ids)[0] == read(ended, b.input_ids)[0]
        assert [query[:3] for query in read(plain, a.input_ids)[1]] == [
            query[:3] for query in read(ended, b.input_ids)[1]
        ]
        assert plain.decode(a.input_ids) == ended.decode(b.input_ids)
    # A checkpoint of before there was a choice is one without ends.
    assert repr(plain) == (
        "Hops(seed=0, n_nodes=8, n_queries=8, max_hops=8, hops=None, n_reads=1, n_windows=1, curriculum=0)"
    )
    assert repr(ended) == repr(plain).replace("curriculum", "pair_ends=True, curriculum")


def test_a_model_may_begin_with_some_of_the_hops() -> None:
    assert Hops(hops=[1]).vocab_size == Hops().vocab_size
    asked = {query.difficulty for i in range(40) for query in Hops(hops=[2, 5], curriculum=20).example(i).queries}
    assert asked == {2, 5}
    assert {query.difficulty for query in Hops(hops=[2, 5], curriculum=20).example(19).queries} == {2}


def test_hops_starts_and_orders_are_fair() -> None:
    task = Hops()
    examples = [task.example(index) for index in range(4000)]
    hops = Counter(query.difficulty for example in examples for query in example.queries)
    # 4,000 expected of each; chi-square with 7 degrees of freedom has 99.99% below 29.9.
    assert sum((hops[k] - 4000) ** 2 / 4000 for k in range(1, 9)) < 29.9
    for place in (0, 1, 14, 17, 39):
        nodes = Counter(example.input_ids[place] for example in examples)
        assert sum((nodes[node] - 500) ** 2 / 500 for node in range(9, 17)) < 29.9


def test_a_wrong_answer_fails_its_query_only() -> None:
    example = Hops().example(5)
    predicted = list(example.input_ids)
    predicted[example.queries[2].start] += 1
    assert [right for _, right in score(example, predicted)] == [i != 2 for i in range(8)]


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    assert_seeded(Hops)


def test_no_cycle_is_in_both_splits() -> None:
    train, test = Hops(n_nodes=6, n_queries=2), Hops(seed=9, n_nodes=6, n_windows=3, n_queries=2)
    seen = {
        split: {tuple(tour(read(task, task.example(i, split).input_ids)[0])) for i in range(1500)}
        for split, task in (("train", train), ("test", test))
    }
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 120


@pytest.mark.parametrize("n", [6, 7, 8])
def test_every_size_has_cycles_of_both_splits(n: int) -> None:
    cycles = [(0, *rest) for rest in permutations(range(1, n))]
    share = sum(in_split(cycle_key(cycle), "test") for cycle in cycles) / len(cycles)
    assert 1 / 32 < share < 1 / 4
    assert cycle_key([3, 0, 2, 1]) == cycle_key([2, 1, 3, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_nodes": 5}, "n_nodes: expected .* at least 6"),
        ({"n_nodes": 8.0}, "n_nodes: expected"),
        ({"n_queries": 0}, "n_queries: expected"),
        ({"n_queries": 9}, "at most one a node"),
        ({"max_hops": 0}, "max_hops: expected"),
        ({"seed": "0"}, "seed: expected"),
        ({"n_windows": 0}, "n_windows: expected"),
        ({"n_windows": 3}, "n_windows: expected windows of two whole pairs"),
        ({"n_windows": 8}, "n_windows: expected windows of two whole pairs"),
        ({"curriculum": -1}, "curriculum: expected"),
        ({"pair_ends": 1}, "pair_ends: expected True or False"),
        ({"n_reads": 0}, "n_reads: expected"),
        ({"hops": []}, "hops: expected at least one k"),
        ({"hops": [0, 1]}, "hops: expected some of 1 to 8, ascending"),
        ({"hops": [9]}, "hops: expected some of 1 to 8, ascending"),
        ({"hops": [3, 1]}, "hops: expected some of 1 to 8, ascending"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hops(**arguments)


def test_bad_rows_are_refused() -> None:
    task = Hops()
    with pytest.raises(ValueError, match="index: expected 0 or more"):
        task.example(-1)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        task.example(0, "validation")  # type: ignore[arg-type]
    for ids in ([9] * 40, [17] * 41):
        with pytest.raises(ValueError, match="expected 41 ids from 0 to 16"):
            task.decode(ids)


def test_the_docstring_tells_the_truth() -> None:
    failed, tried = doctest.testmod(sleepify.tasks.hops)
    assert tried and not failed
