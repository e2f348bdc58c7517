"""The task: problems and rows by index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Literal, get_args

from sleepify.tasks.base import Example, Split, check_curriculum, open_levels, random_stream
from sleepify.tasks.gsm_infinite.graph import Core, draw_core
from sleepify.tasks.gsm_infinite.noise import noise
from sleepify.tasks.gsm_infinite.problem import Encode, Mode, Problem, Prompt, Tokenizer
from sleepify.tasks.gsm_infinite.retrieve import retrieve
from sleepify.tasks.gsm_infinite.solver import questions_of, solve, split_sentences
from sleepify.tasks.gsm_infinite.summary import summarise
from sleepify.tasks.gsm_infinite.text import Words, draw_words, sentences, solution
from sleepify.tasks.gsm_infinite.vocabulary import THEMES, Theme

_TEST_SHARE = 8
"""One problem in so many belongs to the test split."""
_DRAWS = 1000
"""Problems drawn for one index before giving up on what was asked."""

About = Literal["path", "text"]
"""What further questions are about: quantities on the way to the problem's answer, or all that sentences define."""


class GsmInfinite:
    """Problems that are pure in ``(seed, split, index)``.

    Args:
        seed: of all problems.
        operations: operation counts, drawn uniformly. 1 is of depth 3, as in the benchmark; where depth is 2 alone,
            texts of stated numbers, one of which is asked for by its name (forward only).
        depth: 2 (counts and totals, the benchmark's "medium"), 3 (also averages, "hard"), or both, drawn uniformly
            among those that can have the operations.
        modes: "forward", "reverse" or both, drawn uniformly.
        themes: names of the themes to use; all of the vocabulary by default.
        target_tokens: length of the whole row (prompt, answer and end token) in the tokenizer's tokens, reached by
            distractor sentences. A pair (lowest, highest): a length drawn uniformly from it is filled. An int: filled
            as far as whole sentences fit. None: no such sentences.
        question_first: the question before the sentences.
        chain_of_thought: the row holds the worked solution.
        vocabulary: themes to write in, own ones (``THEMES``) by default; ``read_vocabulary`` takes published ones.
        max_tokens: problems whose row would be longer are drawn again.
        tokenizer: what :class:`Prompt` takes; needed for rows, ``target_tokens`` and ``max_tokens``.
        size: most places and things of a problem. With (2, 2) and the theme ``PETS`` problems are a few sentences.
        curriculum: rows a level in training: the fewest operations alone at first, and one count more every so many
            rows. 0: all from the start.
        retrieve_tokens: the rows hold only the sentences that BM25 finds best for the question, as many as have room in
            so many tokens, in the text's order: what a system reads that searches instead of remembering. Problems
            stay whole. None: all sentences.
        summary_tokens: the rows hold only a running summary of so many tokens, made of the text's sentences before the
            question is known: what a system reads that sums up instead of remembering. None: all sentences.
        n_questions: questions in a row, at most: after the problem's own, others about quantities on the way to its
            answer, the hardest first, each to be answered from the text: more to learn from than one number a text.
            Not counted by ``target_tokens`` and ``max_tokens``.
        questions_about: what the further questions are about: "path", quantities on the way to the problem's answer, or
            "text", all that a sentence defines, distractors too, so that most of them need a fact found by its name. A
            text then belongs to one split with all its questions, and the further ones are in random order.

    Raises:
        ValueError: nothing to draw from, operations out of reach, too few names, no tokenizer where one is needed, or
            one without the tokens; several questions before a text, with worked solutions, or of a part of a text.
    """

    difficulty_name = "operations"

    def __init__(
        self,
        seed: int = 0,
        operations: Iterable[int] = range(1, 9),
        depth: int | Sequence[int] = (2, 3),
        modes: Sequence[Mode] = ("forward", "reverse"),
        themes: Sequence[str] | None = None,
        target_tokens: int | tuple[int, int] | None = None,
        question_first: bool = True,
        chain_of_thought: bool = False,
        vocabulary: Sequence[Theme] | None = None,
        max_tokens: int | None = None,
        tokenizer: Tokenizer | Encode | None = None,
        size: tuple[int, int] = (5, 5),
        curriculum: int = 0,
        retrieve_tokens: int | None = None,
        summary_tokens: int | None = None,
        n_questions: int = 1,
        questions_about: About = "path",
    ) -> None:
        check_curriculum(curriculum)
        for name, tokens in (("retrieve_tokens", retrieve_tokens), ("summary_tokens", summary_tokens)):
            if tokens is not None and not (isinstance(tokens, int) and tokens >= 1):
                raise ValueError(f"{name}: expected a whole number of tokens or None, got {tokens!r}")
        if retrieve_tokens is not None and summary_tokens is not None:
            raise ValueError("expected retrieve_tokens or summary_tokens, got both; one text is searched or summed up")
        if not (isinstance(n_questions, int) and n_questions >= 1):
            raise ValueError(f"expected n_questions to be a whole number of 1 or more, got {n_questions!r}")
        if n_questions > 1 and (question_first or chain_of_thought or retrieve_tokens or summary_tokens):
            raise ValueError(
                f"expected question_first, chain_of_thought, retrieve_tokens and summary_tokens off with several "
                f"questions, got n_questions={n_questions}: they are asked after the whole text and answered at once"
            )
        if questions_about not in get_args(About):
            raise ValueError(f"expected questions_about among {get_args(About)}, got {questions_about!r}")
        if questions_about != "path" and n_questions == 1:
            raise ValueError(
                f"expected n_questions above 1 with questions_about={questions_about!r}, got 1: no further ones"
            )
        self.n_questions, self.questions_about = n_questions, questions_about
        self.seed = seed
        self.curriculum = curriculum
        self.retrieve_tokens, self.summary_tokens = retrieve_tokens, summary_tokens
        self.operations = sorted(set(operations))
        self.depths = sorted({depth} if isinstance(depth, int) else set(depth))
        self.modes = list(modes)
        self.themes = _chosen(THEMES if vocabulary is None else vocabulary, themes)
        self.max_tokens = max_tokens
        self.size = size
        self.target = None if target_tokens is None else _target(target_tokens)
        if not self.operations or self.operations[0] < 1:
            raise ValueError(f"expected operation counts of 1 or more, got {self.operations}")
        if not self.depths or not set(self.depths) <= {2, 3}:
            raise ValueError(f"expected depth 2, 3 or both, got {depth}")
        if not self.modes or not set(self.modes) <= set(get_args(Mode)):
            raise ValueError(f"expected modes among {get_args(Mode)}, got {modes}")
        if not all(1 <= limit <= 5 for limit in size) or len(size) != 2:
            raise ValueError(f"expected a size of 1 to 5 places and things, got {size}")
        if self.operations[0] == 1 and self.depths == [2] and "reverse" in self.modes:
            raise ValueError(
                f"expected modes ['forward'] with 1 operation at depth 2, got {self.modes}: nothing is worked out "
                "there that could be turned round; add depth 3, or leave 1 out of operations"
            )
        for theme in self.themes:
            if not self._depths(theme, self.operations[0]):
                raise ValueError(
                    f"theme {theme.name!r} has no problems of {self.operations[0]} operations and depth {self.depths}: "
                    "1 operation needs depth 3, or 2 alone, and depth 3 a theme with averages"
                )
            if self.target and not (theme.noise_places and theme.noise_things):
                raise ValueError(f"target_tokens needs noise names, theme {theme.name!r} has none; choose other themes")
        if tokenizer is None and (self.target or max_tokens is not None):
            raise ValueError("target_tokens and max_tokens are counted in tokens: give a tokenizer")
        if self.target and max_tokens is not None and self.target[1] > max_tokens:
            raise ValueError(f"target_tokens {target_tokens} lies above max_tokens {max_tokens}")
        self.prompt = None if tokenizer is None else Prompt(tokenizer, question_first, chain_of_thought)
        if self.prompt:
            for theme in self.themes:
                self.prompt.check_tokens(" ".join(theme.names()))

    def __repr__(self) -> str:
        """What tells one task from another, the same in every process (a checkpoint's manifest holds it)."""
        order = None if self.prompt is None else (self.prompt.question_first, self.prompt.chain_of_thought)
        return (
            f"GsmInfinite(seed={self.seed}, operations={self.operations}, depth={self.depths}, modes={self.modes}, "
            f"themes={[theme.name for theme in self.themes]}, target_tokens={self.target}, "
            f"max_tokens={self.max_tokens}, size={self.size}, curriculum={self.curriculum}, "
            f"retrieve_tokens={self.retrieve_tokens}, summary_tokens={self.summary_tokens}, "
            f"question_first, chain_of_thought={order}"
            # Absent from checkpoints of before there was a choice.
            f"{f', n_questions={self.n_questions}' if self.n_questions > 1 else ''}"
            f"{f', questions_about={self.questions_about}' if self.questions_about != 'path' else ''})"
        )

    def _depths(self, theme: Theme, operations: int) -> list[int]:
        stated = self.depths == [2]
        return [depth for depth in self.depths if (theme.each is not None if depth == 3 else operations > 1 or stated)]

    def problem(self, index: int, split: Split = "train") -> Problem:
        """Problem number ``index`` of a split.

        Raises:
            ValueError: a negative index, an unknown split, or settings that no problem of the split meets.
        """
        return self.problems(index, split)[0]

    def problems(self, index: int, split: Split = "train") -> list[Problem]:
        """:meth:`problem`, and then the same text with each further question that its row asks; without solutions.

        Raises:
            ValueError: as :meth:`problem`.
        """
        if index < 0 or split not in get_args(Split):
            raise ValueError(f"expected index >= 0 and split among {get_args(Split)}, got {index} and {split!r}")
        rng = random_stream("gsm_infinite", self.seed, split, index)
        open_operations = open_levels(self.operations, self.curriculum, split, index)
        operations, mode, theme = rng.choice(open_operations), rng.choice(self.modes), rng.choice(self.themes)
        depth = rng.choice(self._depths(theme, operations))
        largest = (max(map(len, theme.places)), max(map(len, theme.things)))
        size = (min(self.size[0], largest[0]), min(self.size[1], largest[1]))
        for _ in range(_DRAWS):
            core = draw_core(rng, operations, depth, mode == "reverse", size)
            words = draw_words(rng, theme, core.structure.n_places, core.structure.n_things)
            lines = sentences(core, words)
            if self._split_of(lines, words.question(core.query)) != split:
                continue
            bare = Problem(
                "", words.question(core.query), solution(rng, core, words), core.answer, operations, theme.name, mode
            )
            problem = self._fit(rng, core, words, lines, bare)
            if problem is not None:
                return [problem, *self._further(problem, core, words, lines, split, index)]
        raise ValueError(
            f"an empty split: none of {_DRAWS} {mode} problems with {operations} operations belongs to {split!r} "
            f"and fits (target_tokens {self.target}, max_tokens {self.max_tokens}); widen the limits or the vocabulary"
        )

    def _further(
        self, problem: Problem, core: Core, words: Words, lines: list[str], split: Split, index: int
    ) -> list[Problem]:
        """The text's further questions, which with it belong to its split as any problem does."""
        if self.n_questions == 1:
            return []
        questions = [words.question(parameter) for parameter in core.order]
        if self.questions_about == "text":
            questions = list(dict.fromkeys([*questions, *questions_of(problem.problem)]))
        questions.remove(problem.question)
        questions = [question for question in questions if self._split_of(lines, question) == split]
        rng = random_stream("gsm_infinite questions", self.seed, split, index)
        further = []
        for question in rng.sample(questions, min(self.n_questions - 1, len(questions))):
            found = solve(problem.problem, question)
            asked = replace(problem, question=question, answer=found.answer, operations=found.operations, solution="")
            further.append(asked)
        # In one order a question's place would tell what kind of answer it has.
        return further if self.questions_about == "text" else sorted(further, key=lambda each: -each.operations)

    def _split_of(self, lines: list[str], question: str) -> Split:
        """Where a problem belongs, whatever its noise and the order of its sentences: its text where all is asked."""
        asked = [] if self.questions_about == "text" else [question]
        digest = hashlib.sha256("\n".join([*sorted(lines), *asked]).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"

    def example(self, index: int, split: Split = "train") -> Example:
        """Row number ``index`` of a split; a query's difficulty is its operation count.

        Raises:
            ValueError: as :meth:`problem`, or there is no tokenizer.
        """
        if self.prompt is None:
            raise ValueError("rows are tokens: give GsmInfinite a tokenizer")
        problem, *further = self.problems(index, split)
        if self.retrieve_tokens is not None or self.summary_tokens is not None:
            problem = replace(problem, problem=self._condensed(problem, self.prompt))
        return self.prompt.example(problem, further)

    def _condensed(self, problem: Problem, prompt: Prompt) -> str:
        """What a search finds of a problem's text, or a summary keeps."""

        def cost(sentence: str) -> int:
            return len(prompt.encode(f" {sentence}"))

        whole = [f"{sentence}." for sentence in split_sentences(problem.problem)]
        if self.retrieve_tokens is not None:
            return " ".join(retrieve(whole, problem.question, self.retrieve_tokens, cost))
        assert self.summary_tokens is not None
        return " ".join(summarise(whole, self.summary_tokens, cost))

    def _fit(self, rng: Random, core: Core, words: Words, lines: list[str], bare: Problem) -> Problem | None:
        """The problem with its noise; None if it cannot have a wanted length."""
        if self.prompt is None:
            return _shuffled(rng, bare, lines)
        plain = _shuffled(rng, bare, lines)
        if self.target is None and self.max_tokens is None:
            return plain
        low, high = self.target or (0, self.max_tokens or 0)
        length = len(self.prompt.example(plain).input_ids)
        if length > high:
            return None
        if self.target is None:
            return plain
        goal = rng.randint(max(low, length), high) if low else high
        sample = next(noise(rng, core, words, 1))
        cost = len(self.prompt.encode(f" {sample}"))
        return self._fill(rng, bare, lines, noise(rng, core, words, (goal - length) // cost), (low, goal, high), length)

    def _fill(
        self,
        rng: Random,
        bare: Problem,
        lines: list[str],
        more: Iterable[str],
        limits: tuple[int, int, int],
        length: int,
    ) -> Problem | None:
        """Add sentences up to the goal by their own token counts, then see what the whole text really counts."""
        assert self.prompt is not None
        low, goal, high = limits
        taken: list[tuple[str, int]] = []
        source = iter(more)
        # A tokenizer whose tokens do not end with sentences makes the sum differ from the count: corrected each round.
        for _ in range(8):
            misfits = 0
            for sentence in source:
                cost = len(self.prompt.encode(f" {sentence}"))
                if length + cost <= goal or length < low and length + cost <= high:
                    taken.append((sentence, cost))
                    length += cost
                elif length >= low or misfits == 50:
                    break
                else:
                    misfits += 1
            else:
                if length < low and misfits:
                    # There were sentences, none that the limits have room for: another problem may be luckier.
                    return None
                if not low or length < low:
                    raise ValueError(
                        f"theme {bare.theme!r} has noise names for {len(taken)} sentences, too few for {goal} tokens"
                    )
            problem = _shuffled(rng, bare, [*lines, *(sentence for sentence, _ in taken)])
            length = len(self.prompt.example(problem).input_ids)
            if low <= length <= high:
                return problem
            while taken and length > goal:
                length -= taken.pop()[1]
        return None


def _chosen(vocabulary: Sequence[Theme], names: Sequence[str] | None) -> list[Theme]:
    known = {theme.name: theme for theme in vocabulary}
    missing = [name for name in names or () if name not in known]
    if missing or not known or names is not None and not names:
        raise ValueError(f"expected themes among {sorted(known)}, got {names}")
    return list(vocabulary) if names is None else [known[name] for name in names]


def _target(tokens: int | tuple[int, int]) -> tuple[int, int]:
    low, high = (0, tokens) if isinstance(tokens, int) else tokens
    if not 0 <= low <= high or high < 1:
        raise ValueError(f"expected target_tokens as a positive int or (lowest, highest), got {tokens}")
    return low, high


def _shuffled(rng: Random, bare: Problem, lines: list[str]) -> Problem:
    text = " ".join(rng.sample(lines, len(lines)))
    return Problem(text, bare.question, bare.solution, bare.answer, bare.operations, bare.theme, bare.mode)
