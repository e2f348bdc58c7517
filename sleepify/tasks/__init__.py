"""Synthetic tasks that show what sleep is for: examples that are pure in ``(seed, split, index)``, and their scorer."""

from sleepify.tasks.base import IGNORE, Example, Query, Split, score
from sleepify.tasks.depo import Depo
from sleepify.tasks.gsm_infinite import GsmInfinite
from sleepify.tasks.hops import Hops
from sleepify.tasks.rule110 import Rule110

__all__ = ["IGNORE", "Depo", "Example", "GsmInfinite", "Hops", "Query", "Rule110", "Split", "score"]
