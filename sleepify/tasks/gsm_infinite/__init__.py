"""GSM-Infinite (arXiv:2502.05252, its "realistic" problems): arithmetic spread over a long text.

    >>> from sleepify.tasks.gsm_infinite import PETS, GsmInfinite
    >>> task = GsmInfinite(operations=[4], depth=2, modes=["forward"], vocabulary=[PETS], size=(2, 2))
    >>> problem = task.problem(3)
    >>> print(problem.problem[:71])
    The number of dog in Ash equals 4. The number of cat in Cedar equals 1.
    >>> print(problem.question, problem.answer)
    What is the total number of pets in Cedar? 4

The answer follows from a few of the sentences; the others are distractors, as many as a target number of tokens takes
(``target_tokens=(2000, 3300)`` with the tokenizer of your model). A place's total is the sum of everything that the
text ever says is there; with averages, the sum of each count times its average. Difficulty is the number of
operations: parameters on the way to the answer plus binary operations between them. In reverse mode one of the values
is hidden, a total told, and the hidden value asked for.

Rows read ``Question: ... Problem: ... Answer: 5``, supervised on the answer alone (see :class:`Prompt`). Problems are
pure in (seed, split, index), each is of exactly one split by a hash of its sentences and question, and each solves
from its text alone (:func:`solve`). Themes and names are our own; :func:`read_vocabulary` takes the benchmark's from
its published rows, and :func:`load_problems` reads these themselves. :func:`write_examples` caches rows to Arrow.
"""

from sleepify.tasks.gsm_infinite.dataset import CachedExamples, load_problems, read_rows, write_examples
from sleepify.tasks.gsm_infinite.problem import Mode, Problem, Prompt
from sleepify.tasks.gsm_infinite.solver import Solution, UnsolvableError, solve
from sleepify.tasks.gsm_infinite.task import GsmInfinite
from sleepify.tasks.gsm_infinite.vocabulary import PETS, THEMES, TREES, Theme, read_vocabulary
from sleepify.tasks.gsm_infinite.words import WordTokenizer

__all__ = [
    "PETS",
    "THEMES",
    "TREES",
    "CachedExamples",
    "GsmInfinite",
    "Mode",
    "Problem",
    "Prompt",
    "Solution",
    "Theme",
    "UnsolvableError",
    "WordTokenizer",
    "load_problems",
    "read_rows",
    "read_vocabulary",
    "solve",
    "write_examples",
]
