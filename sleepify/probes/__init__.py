"""Probes: what sleep does inside a trained model, on rows of a task or any ids.

- `pass_steps`: how far each pass moves the state of each layer;
- `answer_by_pass`: accuracy and entropy of the answers from S_1 ... S_N;
- `state_features` and `linear_probe`: what can be read off the state linearly; `recall`: what the model itself recalls;
- `interference`: what further windows do to what was read before; `later_decay`: the same, with less decay per pass;
- `hops_answered` and `split_wrong`: wrong answers that lack a fact, and those that were not computed;
- `attribution`: what each window adds to an answer.

Nothing of a model stays changed. `plot` draws lines side by side.
"""

from sleepify.probes.answers import (
    Answers,
    Attribution,
    Interference,
    answer,
    answer_by_pass,
    attribution,
    interference,
    spliced,
)
from sleepify.probes.decay import later_decay
from sleepify.probes.hops import HopsAnswered, WrongAnswers, hops_answered, split_wrong, successors, walk
from sleepify.probes.plots import Panel, plot
from sleepify.probes.states import PassSteps, Recall, linear_probe, pass_steps, recall, ridge, state_features

__all__ = [
    "Answers",
    "Attribution",
    "HopsAnswered",
    "Interference",
    "Panel",
    "PassSteps",
    "Recall",
    "WrongAnswers",
    "answer",
    "answer_by_pass",
    "attribution",
    "hops_answered",
    "interference",
    "later_decay",
    "linear_probe",
    "pass_steps",
    "plot",
    "recall",
    "ridge",
    "spliced",
    "split_wrong",
    "state_features",
    "successors",
    "walk",
]
