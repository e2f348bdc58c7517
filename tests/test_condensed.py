"""A task read through a search or a summary: both by hand, and rows that hold what they leave."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sleepify.tasks.gsm_infinite import PETS, GsmInfinite, WordTokenizer
from sleepify.tasks.gsm_infinite.retrieve import retrieve, scores
from sleepify.tasks.gsm_infinite.solver import split_sentences
from sleepify.tasks.gsm_infinite.summary import summarise

SENTENCES = ["The cat in Ash equals 1.", "The dog in Birch equals the cat in Ash.", "The hen in Cedar equals 3."]


def test_scores_are_bm25_by_hand() -> None:
    lengths, mean = [6, 9, 6], 7.0
    # "dog" is in one sentence of three, "birch" too; "how" and "many" in none.
    idf = math.log(1 + 2.5 / 1.5)
    one = idf * 2.5 / (1 + 1.5 * (0.25 + 0.75 * lengths[1] / mean))
    assert scores(SENTENCES, "How many dog Birch?") == pytest.approx([0.0, 2 * one, 0.0])
    # "the" is in all, twice in the second: it counts little, and for the shorter ones alike.
    common = scores(SENTENCES, "the")
    assert common[0] == common[2] == pytest.approx(math.log(1 + 0.5 / 3.5) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 6 / mean)))
    assert 0 < common[0] < common[1] < one


def test_the_best_that_have_room_stand_in_their_order() -> None:
    def cost(sentence: str) -> int:
        return len(sentence.split())

    question = "How many dog in Birch and cat?"
    assert retrieve(SENTENCES, question, 9, cost) == SENTENCES[1:2]
    assert retrieve(SENTENCES, question, 15, cost) == SENTENCES[:2]
    assert retrieve(SENTENCES, question, 1000, cost) == SENTENCES
    # The best has no room: nothing that scores less takes its place.
    assert retrieve(SENTENCES, question, 8, cost) == []


def test_a_running_summary_by_hand() -> None:
    def cost(sentence: str) -> int:
        return len(sentence.split())

    text = ["The cat ran.", "A dog sat.", "The cat sat.", "The cat slept."]
    # Mean counts when the room is full: 2+2+1 over 3 words, 1+1+2, 2+2+2; then 3+3+1 for the first of two alike.
    assert summarise(text[:3], 6, cost) == [text[0], text[2]]
    assert summarise(text, 6, cost) == [text[2], text[3]]
    assert summarise(text, 100, cost) == text
    assert summarise(text, 2, cost) == []


@pytest.mark.parametrize("option", ["retrieve_tokens", "summary_tokens"])
def test_rows_hold_what_is_left_and_their_problem_stays_whole(option: str) -> None:
    tokenizer = WordTokenizer([PETS])
    settings: dict[str, Any] = {"operations": [4, 6], "depth": 2, "vocabulary": [PETS], "tokenizer": tokenizer}
    plain, task = GsmInfinite(**settings), GsmInfinite(**settings, **{option: 40})
    assert repr(plain) != repr(task)
    for index in range(20):
        problem = task.problem(index)
        assert problem == plain.problem(index)
        problem.check()
        row, whole = task.example(index), plain.example(index)
        text = tokenizer.decode(row.input_ids)
        inside = text.partition("Problem : ")[2].partition(" Answer :")[0]
        joined = inside.replace(" .", ".").replace(" ,", ",")
        kept = [sentence for sentence in split_sentences(problem.problem) if sentence in joined]
        assert len(tokenizer.encode(inside)) <= 40 and kept
        assert row.input_ids[row.queries[0].start :] == whole.input_ids[whole.queries[0].start :]
        assert len(row.input_ids) <= len(whole.input_ids)
    with pytest.raises(ValueError, match=f"{option}: expected a whole number"):
        GsmInfinite(**settings, **{option: 0})
    with pytest.raises(ValueError, match="retrieve_tokens or summary_tokens, got both"):
        GsmInfinite(**settings, retrieve_tokens=9, summary_tokens=9)
