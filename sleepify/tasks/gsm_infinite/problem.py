"""A problem in words, and the row of tokens it becomes."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from sleepify.tasks.base import IGNORE, Example, Query
from sleepify.tasks.gsm_infinite.solver import solve

Mode = Literal["forward", "reverse"]
PUBLISHED_MODES: dict[str, Mode] = {"normalforward": "forward", "forwardreverse": "reverse"}
"""The benchmark's names of the modes."""

_MARKERS = (
    ("answer: ", ".", "first"),
    ("solution: ", ".", "first"),
    ("oxed{", "}", "last"),
    ("**answer:** ", ".", "first"),
    ("**answer: ", "**", "first"),
    ("final answer: answer: ", ".", "first"),
    ("\nanswer: ", ".", "first"),
    ("\\text{answer: } ", "", "first"),
    ("is ", ".", "last"),
    ("answer: ", "\n", "first"),
)
"""What the benchmark's scorer takes for an answer, in the order tried: from a mark ("" : the digits) to another."""
_INTEGER = re.compile(r"\s*([+-]?\d+)\s*")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Args:
        problem: the sentences.
        question: what is asked.
        solution: worked steps, ending in "Answer: <integer>.".
        answer: the integer.
        operations: parameters on the path plus binary operations between them.
        theme: name of the theme.
        mode: "forward" (all values follow from given ones) or "reverse" (one is found from a told total).
    """

    problem: str
    question: str
    solution: str
    answer: int
    operations: int
    theme: str
    mode: Mode

    def is_correct(self, reply: str) -> bool:
        """Score a generated reply as the benchmark does; a number and nothing else is an answer here too.

        The benchmark takes the first bare integer of a list of forms, such as "Answer: 12.", "\\boxed{12}" and "the
        answer is 12"; "Answer: 12 animals." is none. Our own prompts end in "Answer:", so a reply to them is a number.
        """
        return read_answer(reply) == self.answer

    def check(self) -> None:
        """Solve from the text.

        Raises:
            ValueError: the text does not determine an answer, or another one, or counts other operations.
        """
        found = solve(self.problem, self.question)
        if (found.answer, found.operations) != (self.answer, self.operations):
            raise ValueError(
                f"expected the text to give {self.answer} in {self.operations} operations, "
                f"solving it gives {found.answer} in {found.operations}"
            )


def read_answer(reply: str) -> int | None:
    """The integer that the benchmark's scorer reads from a reply, None if it reads none."""
    text = reply.lower()
    if alone := _INTEGER.fullmatch(text.strip().removesuffix(".")):
        return int(alone[1])
    for start, end, which in _MARKERS:
        _, found, after = text.partition(start) if which == "first" else text.rpartition(start)
        if not found:
            continue
        piece = after.partition(end)[0] if end else after[: len(after) - len(after.lstrip(string.digits))]
        if bare := _INTEGER.fullmatch(piece):
            return int(bare[1])
    return None


@runtime_checkable
class Tokenizer(Protocol):
    """What we need of a tokenizer: those of transformers, and :class:`WordTokenizer`, have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


Encode = Callable[[str], list[int]]


class Prompt:
    """How a problem becomes text and tokens.

    With the question first the text is ``Question: <question> Problem: <sentences> Answer: <answer>``, else
    ``Problem: <sentences> Question: <question> Answer: <answer>``; with chain of thought the last part is
    ``Solution: <solution>``, which itself ends in "Answer: <answer>.". Then the end token, if there is one.
    Labels are on the tokens of the answer (or solution) and the end token alone.

    Args:
        tokenizer: an object with ``encode(text, add_special_tokens=False)`` (its ``eos_token_id``, if any, is the end
            token) or a callable from text to token ids (no end token).
        question_first: the question before the sentences.
        chain_of_thought: train on the solution too.

    Raises:
        TypeError: ``tokenizer`` is neither.
        ValueError: the tokenizer lacks the tokens: it gives nothing or its unknown token for the text's words, or one
            and the same for different digits.
    """

    def __init__(
        self, tokenizer: Tokenizer | Encode, question_first: bool = True, chain_of_thought: bool = False
    ) -> None:
        if not isinstance(tokenizer, Tokenizer) and not callable(tokenizer):
            raise TypeError(f"expected a tokenizer or a callable from text to token ids, got {tokenizer!r}")
        self.tokenizer = tokenizer
        self.end: int | None = getattr(tokenizer, "eos_token_id", None)
        self.unknown: int | None = getattr(tokenizer, "unk_token_id", None)
        self.question_first = question_first
        self.chain_of_thought = chain_of_thought
        self.check_tokens("Question: How many? What is the? Problem: Answer: Solution: 0 1 2 3 4 5 6 7 8 9.")
        digits = [tuple(self.encode(digit)) for digit in "0123456789"]
        if len(set(digits)) != 10:
            raise ValueError(f"expected a tokenizer with different tokens for all digits, got {digits}")
        # The space before the answer belongs to the prompt where the tokenizer allows it, so that nothing trivial is
        # supervised; where a token holds space and digit together, to the answer.
        start = f"{self._last_word}: "
        targets = ("Define", "One") if chain_of_thought else ("7", "12")
        self._gap = all(self.encode(start + target) == self.encode(start) + self.encode(target) for target in targets)

    def encode(self, text: str) -> list[int]:
        """Token ids, no special tokens among them."""
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer(text)

    @property
    def _last_word(self) -> str:
        return "Solution" if self.chain_of_thought else "Answer"

    def check_tokens(self, text: str) -> None:
        """See that a tokenizer can write a text.

        Raises:
            ValueError: it cannot.
        """
        tokens = self.encode(text)
        # An end-of-text token that doubles as unknown token is no sign of anything (GPT-2 and its like are complete).
        if not tokens or self.unknown is not None and self.unknown != self.end and self.unknown in tokens:
            raise ValueError(
                f"the tokenizer has no tokens for {text[:60]!r}: expected known tokens, got "
                f"{tokens[:20]}; use one that knows all words and digits"
            )

    def text(self, problem: Problem, again: bool = False) -> tuple[str, str]:
        """What is read and what is to be written, to be joined as they are; ``again``: of a text that has been read."""
        question, sentences = f"Question: {problem.question}", f"Problem: {problem.problem}"
        context = f"{question} {sentences}" if self.question_first else f"{sentences} {question}"
        context = f" {question}" if again else context
        target = problem.solution if self.chain_of_thought else str(problem.answer)
        gap = (" ", "") if self._gap else ("", " ")
        return f"{context} {self._last_word}:{gap[0]}", f"{gap[1]}{target}"

    def example(self, problem: Problem, further: Sequence[Problem] = ()) -> Example:
        """The row of a problem, and of further questions about its text: a query each, of what is to be written
        (without the end token)."""
        input_ids: list[int] = []
        labels: list[int] = []
        queries = []
        for asked in (problem, *further):
            prompt, answer = (self.encode(part) for part in self.text(asked, again=asked is not problem))
            start = len(input_ids) + len(prompt)
            input_ids += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
            queries.append(Query(asked.operations, start, len(input_ids)))
        end = [] if self.end is None else [self.end]
        return Example(input_ids + end, labels + end, queries)
