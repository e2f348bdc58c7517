"""What is compared with sleep: the arms of `benchmarks.worth`, one definition for all of them.

An arm is what it changes in the YAML file of its setting (`benchmarks.worth_settings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to answer, over all seeds.

    Args:
        name: of its files.
        label: of its row in the table.
        changes: fields of the recipe.
        layers: of its base, as a multiple of the setting's.
        steps: training, as a multiple of the setting's.
        goes_on: another arm, whose finished run it continues where its model is at hand: rows and rates are the same up
            to there.
        drawn: whether it is in the figure, or in the table alone.
    """

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 1
    steps: float = 1.0
    goes_on: str | None = None
    drawn: bool = True


PLAIN = {"sleep": False}
# One checkpoint for every N: tested with its own first, then with others.
ANY_N = {"n_loops": 4, "test_n_loops": (4, 1, 2, 3, 6, 8)}
# Of the hop tasks; those of their YAML file are between the two.
SLOW, FAST = ({"muon_learning_rate": 0.01 * factor, "adamw_learning_rate": 0.002 * factor} for factor in (0.5, 2.0))
# N = 4 takes 2.4 times the processor time of N = 1 in these settings: a step has a wake pass too.
COMPUTE = 2.4

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("n4", "sleep, N = 4", {"n_loops": 4}),
        Arm("n1", "sleep, N = 1", {"n_loops": 1}),
        Arm("n2", "sleep, N = 2", {"n_loops": 2}),
        Arm("n8", "sleep, N = 8", {"n_loops": 8}),
        Arm("n4_long", "sleep, N = 4, 2 x the steps", {"n_loops": 4}, steps=2.0, goes_on="n4"),
        Arm("n1_compute", "sleep, N = 1, compute of N = 4", {"n_loops": 1}, steps=COMPUTE, goes_on="n1"),
        Arm("full", "full attention, whole cache", PLAIN),
        Arm("full_long", "full attention, whole cache, 4 x the steps", PLAIN, steps=4.0, goes_on="full"),
        Arm("full_2x", "full attention, 2 x the layers", PLAIN, layers=2),
        Arm("full_4x", "full attention, 4 x the layers", PLAIN, layers=4),
        Arm("n1_2x", "sleep, N = 1, 2 x the layers", {"n_loops": 1}, layers=2),
        Arm("n1_4x", "sleep, N = 1, 4 x the layers", {"n_loops": 1}, layers=4),
        Arm("reread", "read 4 times, N = 1", {"n_loops": 1, "n_reads": 4}),
        Arm("twice", "read twice, N = 1", {"n_loops": 1, "n_reads": 2}),
        Arm("all_n", "a loss after every pass of N = 4", {**ANY_N, "pass_loss": "all"}),
        Arm("one_n", "a loss after one pass, distilled from N = 4", {**ANY_N, "pass_loss": "one"}),
        Arm("n4_slow", "sleep, N = 4, half the learning rates", {"n_loops": 4, **SLOW}, drawn=False),
        Arm("n4_fast", "sleep, N = 4, twice the learning rates", {"n_loops": 4, **FAST}, drawn=False),
        Arm("n1_slow", "sleep, N = 1, half the learning rates", {"n_loops": 1, **SLOW}, drawn=False),
        Arm("n1_fast", "sleep, N = 1, twice the learning rates", {"n_loops": 1, **FAST}, drawn=False),
        Arm("full_slow", "full attention, whole cache, half the learning rates", {**PLAIN, **SLOW}, drawn=False),
        Arm("full_fast", "full attention, whole cache, twice the learning rates", {**PLAIN, **FAST}, drawn=False),
        Arm("sliding", "sliding window alone", {**PLAIN, "model_config": "sliding"}),
        # As many tokens as a window of `gsm_inf` has.
        Arm("rag", "full attention on what BM25 finds, 24 tokens", {**PLAIN, "retrieve_tokens": 24}),
        Arm("summary", "full attention on a running summary, 24 tokens", {**PLAIN, "summary_tokens": 24}),
        # Ablations of n4, each in one thing.
        Arm("jet", "N = 4, rule jet", {"n_loops": 4, "fast_weights_rule": "jet"}),
        Arm("mamba2", "N = 4, rule mamba2", {"n_loops": 4, "fast_weights_rule": "mamba2"}),
        Arm("loop_first", "N = 4, first layer looped", {"n_loops": 4, "loop_range": (0, 1)}),
        Arm("loop_last", "N = 4, last layer looped", {"n_loops": 4, "loop_range": (1, 2)}),
        Arm("insert_first", "N = 4, inserted after the first layer alone", {"n_loops": 4, "fast_weights_layers": (0,)}),
        Arm("insert_last", "N = 4, inserted after the last layer alone", {"n_loops": 4, "fast_weights_layers": (1,)}),
        # No query may lie in two windows, so the task is told of the window too; the queries stay the same.
        Arm(
            "half_window",
            "N = 4, windows half as long, pairs in two of them",
            {"n_loops": 4, "window_size": 8, "n_windows": 2},
        ),
        Arm("keep_keys", "N = 4, sliding eviction", {"n_loops": 4, "eviction": "sliding"}),
        Arm("frozen", "N = 4, base frozen", {"n_loops": 4, "train_only": "fast_weights"}),
        Arm("lora", "N = 4, base frozen, LoRA of rank 8", {"n_loops": 4, "lora_r": 8}),
    )
}

ABLATIONS = (
    *("jet", "mamba2", "loop_first", "loop_last", "insert_first", "insert_last", "half_window", "keep_keys"),
    *("frozen", "lora"),
)
