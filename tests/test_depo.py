"""Depo against a reader that knows the format only from its description and walks the edges one by one."""

from __future__ import annotations

import doctest
import json
import re
from collections import Counter
from itertools import groupby, permutations
from pathlib import Path
from typing import Any

import pytest
from seeding import assert_seeded

import sleepify.tasks.depo
from sleepify.tasks import IGNORE, Depo, Hops, Rule110, score
from sleepify.tasks.depo import PAD
from sleepify.tasks.split import in_split

ROOT = Path(__file__).parent.parent
OFFICIAL = [json.loads(line) for line in open(ROOT / "tests/fixtures/depo/official.jsonl")]
ORIGINAL: dict[str, Any] = {"names": "words", "arrows": False, "official_ids": True, "context_length": 0}
DEPO1: dict[str, Any] = {"n_nodes": 225, "max_hops": 8, "mini_vocab": 50, "min_name": 1, "max_name": 2, **ORIGINAL}

Word = tuple[int, ...]


def words_in(ids: list[int], task: Depo) -> list[Word]:
    """Cut a run of name tokens (counted from 1) into names: every token is one, or a large token ends one."""
    found: list[Word] = []
    word: Word = ()
    for token in ids:
        word += (token,)
        if task.names == "single" or token > task.mini_vocab:
            found.append(word)
            word = ()
    assert word == ()
    return found


def read(ids: list[int], task: Depo) -> tuple[list[tuple[Word, Word]], list[tuple[int, Word, Word]]]:
    """Edges and queries (k, start, answer) of a row."""
    base, hop, question = (0, 9000, 9500) if task.official_ids else (6 + task.max_hops, 6, 1)
    text = [token for token in ids if token != PAD]
    if task.names == "words":
        assert text.pop(0) == (9999 if task.official_ids else 2)
    hops = set(range(hop + 1, hop + task.max_hops + 1))
    starts = [i for i, token in enumerate(text) if token in hops]
    edge_part = text[: starts[0]]
    if task.arrows:
        punctuation = [token for token in edge_part if token in (3, 4)]
        assert punctuation == [3, 4] * (len(punctuation) // 2)
        runs = [list(run) for is_name, run in groupby(edge_part, lambda token: token not in (3, 4)) if is_name]
        names = [word for run in runs for word in words_in([token - base for token in run], task)]
        assert len(names) == len(runs)
    else:
        names = words_in([token - base for token in edge_part], task)
    edges = list(zip(names[::2], names[1::2], strict=True))
    queries = []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        k, body = text[start] - hop, text[start + 1 : end]
        if task.arrows:
            assert body[:2] == [5, 6]
            body = body[2:]
        cut = body.index(question)
        (source,) = words_in([token - base for token in body[:cut]], task)
        (answer,) = words_in([token - base for token in body[cut + 1 :]], task)
        queries.append((k, source, answer))
    return edges, queries


def walk(edges: list[tuple[Word, Word]], start: Word, hops: int) -> Word:
    follow = dict(edges)
    for _ in range(hops):
        start = follow[start]
    return start


def tour(edges: list[tuple[Word, Word]]) -> list[Word]:
    """The names in the order of the cycle, from the smallest."""
    first = min(edges)[0]
    return [walk(edges, first, i) for i in range(len(edges))]


@pytest.mark.parametrize(
    "task",
    [
        Depo(),
        Depo(mode="qa"),
        Depo(n_nodes=12, max_hops=32, mode="qa", arrows=False),
        Depo(arrows=False, context_length=300),
        Depo(n_nodes=20, names="words"),
        Depo(n_nodes=20, names="words", arrows=False, mode="qa"),
        Depo(**ORIGINAL),
        Depo(mode="qa", **ORIGINAL),
        Depo(**DEPO1),
    ],
)
def test_every_query_is_answered_by_walking_the_edges(task: Depo) -> None:
    for index in range(60):
        example = task.example(index, "train" if index % 2 else "test")
        edges, queries = read(example.input_ids, task)
        names = [source for source, _ in edges]
        assert len(set(names)) == len(names) <= task.n_nodes
        assert len(names) == task.n_nodes or task.mode == "train"
        assert sorted(tour(edges)) == sorted(names), "one cycle through all nodes"
        assert len({start for _, start, _ in queries}) == len(queries) == min(task.n_queries, len(names))
        assert all(walk(edges, start, k) == answer for k, start, answer in queries)

        labels = [IGNORE] * len(example.input_ids)
        for query, (k, _, answer) in zip(example.queries, queries, strict=True):
            marker = query.start - 1
            assert query.difficulty == k and query.stop - query.start == len(answer)
            assert example.input_ids[marker] == (9500 if task.official_ids else 1)
            first = marker if task.names == "words" else query.start
            labels[first : query.stop] = example.input_ids[first : query.stop]
        assert example.labels == labels
        assert len(example.input_ids) <= task.length and max(example.input_ids) < task.vocab_size


@pytest.mark.parametrize("sample", OFFICIAL, ids=lambda sample: f"{sample['mode']}-{sample['n']}")
def test_official_samples_are_written_token_for_token(sample: dict[str, Any]) -> None:
    task = Depo(n_nodes=sample["N"], max_hops=sample["K"], n_queries=sample["M"], mode=sample["mode"], **ORIGINAL)
    edges, queries = read(sample["text"], task)
    assert [[k, list(start), list(answer)] for k, start, answer in queries] == sample["queries"]
    assert len(edges) == sample["n"]
    assert all(walk(edges, start, k) == answer for k, start, answer in queries)

    cycle = tour(edges)
    example = task.encode(
        cycle, [cycle.index(source) for source, _ in edges], [(k, cycle.index(start)) for k, start, _ in queries]
    )
    assert example.input_ids == sample["text"]
    assert [label != IGNORE for label in example.labels] == [bool(label) for label in sample["label"]]
    assert all(label in (token, IGNORE) for label, token in zip(example.labels, example.input_ids, strict=True))


def test_sizes_are_the_papers() -> None:
    task = Depo()
    assert (task.length, task.window_size, task.vocab_size, task.difficulty_name) == (360, 75, 98, "hops")
    for index in range(200):
        ids = task.example(index).input_ids
        n = len(read(ids, task)[0])
        left, right = 300 - 4 * n, 6 * max(0, 10 - n)
        assert len(ids) == 360
        assert [i for i, token in enumerate(ids) if token == PAD] == [*range(left), *range(360 - right, 360)]
    halved = Depo(arrows=False, context_length=300)
    assert (halved.length, halved.window_size) == (340, 75)
    assert Depo(names="words", arrows=False).vocab_size == 7 + 16 + 6


def test_unpadded_lengths_are_the_originals() -> None:
    # The means of the official generator, over 400 samples: 485 and 1044 tokens, 63.9 and 70.2 of them labelled.
    for mode, tokens, within, labelled in (("train", 485, 45, 63.9), ("qa", 1044, 4, 70.2)):
        task = Depo(mode=mode, **ORIGINAL)  # type: ignore[arg-type]
        examples = [task.example(index) for index in range(400)]
        assert abs(sum(len(example.input_ids) for example in examples) / 400 - tokens) < within
        counts = [sum(label != IGNORE for label in example.labels) for example in examples]
        assert abs(sum(counts) / 400 - labelled) < 2.5
        assert PAD not in examples[0].input_ids
    edges = read(examples[0].input_ids, task)[0]
    assert Counter(len(source) for source, _ in edges).keys() == {5, 6, 7}


def chi_square(counts: Counter[int], weights: dict[int, float]) -> float:
    """Pearson's statistic over its degrees of freedom; around 1 if ``counts`` follow ``weights``."""
    assert counts.keys() <= weights.keys()
    scale = sum(counts.values()) / sum(weights.values())
    return sum((counts[x] - w * scale) ** 2 / (w * scale) for x, w in weights.items()) / (len(weights) - 1)


def test_sizes_and_hops_are_drawn_as_described() -> None:
    task = Depo()
    examples = [task.example(index) for index in range(6000)]
    sizes = Counter((300 - example.input_ids[:300].count(PAD)) // 4 for example in examples)
    # 73 values, 36 expected of the rarest: below 1.6 with probability over 99.9%; a uniform draw gives 30.
    assert chi_square(sizes, {n: 1 / (n + 75**0.5) for n in range(3, 76)}) < 1.6
    assert abs(sum(sizes[n] for n in range(3, 11)) / 6000 - 0.267) < 0.02
    hops = Counter(query.difficulty for example in examples for query in example.queries)
    assert chi_square(hops, dict.fromkeys(range(1, 17), 1)) < 2.6
    starts = Counter(example.input_ids[303] for example in examples)
    assert chi_square(starts, dict.fromkeys(range(23, 98), 1)) < 1.6


@pytest.mark.parametrize(
    ("max_hops", "asked"),
    [(16, {1, 2, 4, 8, 16}), (8, {1, 2, 4, 8}), (32, {1, 2, 4, 8, 16, 24, 32}), (6, {1, 2, 4, 6})],
)
def test_qa_asks_powers_of_two_on_full_cycles(max_hops: int, asked: set[int]) -> None:
    task = Depo(mode="qa", max_hops=max_hops, n_nodes=30)
    examples = [task.example(index, "test") for index in range(300)]
    assert all(PAD not in example.input_ids for example in examples)
    hops = Counter(query.difficulty for example in examples for query in example.queries)
    assert chi_square(hops, dict.fromkeys(asked, 1)) < 5


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    assert_seeded(Depo, names="words", n_nodes=20)


def test_no_cycle_is_in_both_splits() -> None:
    train, test = Depo(n_nodes=6), Depo(seed=9, n_nodes=6, max_hops=4, arrows=False, context_length=40)
    seen = {
        split: {tuple(tour(read(task.example(i, split).input_ids, task)[0])) for i in range(3000)}
        for split, task in (("train", train), ("test", test))
    }
    assert not seen["train"] & seen["test"]
    # 40 cycles of 3 nodes, 90 of 4, 144 of 5, 120 of 6.
    assert len(seen["train"] | seen["test"]) == 394


def test_every_size_has_cycles_of_both_splits() -> None:
    # More names only add cycles, and larger cycles are more still.
    for n in (3, 4, 5, 6, 7):
        nodes = range(max(n, 6))
        cycles = {p for p in permutations(nodes, n) if p[0] == min(p)}
        share = sum(in_split("-".join(map(str, cycle)), "test") for cycle in cycles) / len(cycles)
        assert 1 / 32 < share < 1 / 4


def test_own_questions_can_be_asked() -> None:
    task = Depo(n_nodes=6, n_queries=2)
    example = task.encode([[2], [1], [6], [4]], [3, 0, 1, 2], [(2, 0), (3, 1)])
    assert task.decode(example.input_ids) == ("n4->n2, n2->n1, n1->n6, n6->n4, +2 hops from n2? n6 +3 hops from n1? n2")
    assert score(example, example.input_ids) == [(2, True), (3, True)]
    predicted = list(example.input_ids)
    predicted[example.queries[1].start] += 1
    assert score(example, predicted) == [(2, True), (3, False)]
    with pytest.raises(ValueError, match="up to 6 nodes and 2 queries, got 7"):
        task.encode([[1]] * 7, range(7), [])
    with pytest.raises(ValueError, match="1 to 16 hops"):
        task.encode([[1], [2]], [0, 1], [(17, 0)])
    words = Depo(names="words", arrows=False, n_nodes=6)
    row = words.encode([[1, 1, 2, 3, 4], [3, 1, 2, 2, 6]], [1, 0], [(1, 0)])
    assert words.decode(row.input_ids) == "<s> 3.1.2.2.6 1.1.2.3.4 1.1.2.3.4 3.1.2.2.6 +1 1.1.2.3.4? 3.1.2.2.6"
    with pytest.raises(ValueError, match=r"ids that this task writes, got \[3, 99\]"):
        words.decode([3, 99])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_nodes": 5}, "n_nodes: expected .* at least 6"),
        ({"n_queries": 0}, "n_queries: expected"),
        ({"max_hops": 1.5}, "max_hops: expected"),
        ({"seed": "0"}, "seed: expected"),
        ({"mode": "test"}, "'train' or 'qa'"),
        ({"names": "long"}, "'single' or 'words'"),
        ({"mini_vocab": 50}, "only names='words'"),
        ({"names": "words", "max_name": 4}, "max_name: expected .* at least 5"),
        ({"names": "words", "min_name": 1, "max_name": 2}, "only 12 names"),
        ({"official_ids": True}, "official_ids"),
        ({**ORIGINAL, "max_hops": 500}, "max_hops below 500"),
        ({"context_length": 299}, "None, 0 or at least 300"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Depo(**arguments)
    with pytest.raises(ValueError, match="index: expected 0 or more"):
        Depo().example(-1)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        Depo().example(0, "validation")  # type: ignore[arg-type]


def test_the_docstring_and_the_page_tell_the_truth() -> None:
    failed, tried = doctest.testmod(sleepify.tasks.depo)
    assert tried and not failed
    page = (ROOT / "docs/tasks.md").read_text()
    for section in ("Tasks", "Rule 110", "Depo", "Hops", "GSM-Infinite"):
        (text,) = re.findall(rf"^##? {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        names: dict[str, Any] = {}
        for block in blocks:
            exec(block, names)
    for task in (Depo, Hops, Rule110):
        for argument in task.__dataclass_fields__:
            assert f"`{argument}`" in page
