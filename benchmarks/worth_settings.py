"""On which tasks sleep is compared with what else there is: the settings of `benchmarks.worth`.

All arms of a setting begin with a base that the same recipe has pretrained with full attention on the easy part of the
task, and get the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.arms import ABLATIONS

CONFIGS = Path(__file__).resolve().parent.parent / "recipes" / "configs"


@dataclass(frozen=True)
class Setting:
    """One task at one size.

    Args:
        name: of its folder.
        title: of its part of the page.
        intro: what is read, evicted and asked, in words.
        base: YAML file of the pretraining; its first layers are repeated for deeper bases.
        config: YAML file of the fine-tuning.
        changes: of the task's fields, for base and arms.
        architecture: of the base's, where it is another than the YAML file's.
        base_changes: of the pretraining alone; None takes one of ``changes`` back.
        tuned_changes: of the fine-tuning alone.
        arms: names, those to run first before the others.
        seeds: to run.
        asked: the largest difficulty that training gets to, where that is not all; only up to it is anything reported.
    """

    name: str
    title: str
    intro: str
    base: str
    config: str
    arms: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    base_changes: Mapping[str, Any] = field(default_factory=dict)
    tuned_changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    asked: float = inf


HOPS = (
    "The pairs (a, f(a)) of a random cycle through {n} nodes are read in random order and evicted; then {queries} "
    "nodes are asked for what lies k steps further, k uniform in 1 to {n}, one k more every {every} steps. The base, "
    "two layers of full attention, was pretrained on k = 1; a Gated DeltaNet layer was put after each, both are looped."
)

ENDS = " Each pair is followed by a token that ends it, so that which of two neighbours is f of the other is plain."

SIXTEEN = {"n_nodes": 16, "max_hops": 16, "n_queries": 10}
# 640 answers a step, as with the five queries of 8 nodes.
HALF_BATCH = {"per_device_train_batch_size": 64}
# With k up to 16 a token's hidden state has 15 nodes to tell; hops_base.yaml's has 64 channels and 2 heads.
WIDER = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "initializer_range": 0.1,
}

GSM = (
    "Problems of {first} to {last} operations about {names}, {tokens} of a tokenizer of words, in "
    "windows of {window}; the answer is a number, at once, without a worked solution; one count of operations more "
    "every {every} steps. The base, two layers of full attention, was pretrained on {base}; a "
    "Gated DeltaNet layer was put after each, both are looped. "
)
SMALL = {
    "first": "two",
    "last": "eight",
    "names": "two places and two things",
    "base": "two and three operations",
}
WHOLE = GSM.format(tokens="36 to 105 tokens", window="24 that are evicted", every=200, **SMALL)


def filled(
    name: str,
    what: str,
    window: int,
    lowest: int,
    then: str = "",
    changes: Mapping[str, Any] | None = None,
    operations: Sequence[int] = range(2, 9),
    base_operations: Sequence[int] = (2, 3),
    names: Mapping[str, str] = SMALL,
    base_steps: int = 600,
    level_steps: int = 200,
    steps: int = 1600,
    asked: float = inf,
    architecture: Mapping[str, Any] | None = None,
    base_changes: Mapping[str, Any] | None = None,
) -> Setting:
    """GSM-Infinite in texts that distractors fill up to a window and a little more: a row sleeps once, on most of it.

    Args:
        name: of its folder.
        what: of its title.
        window: in tokens.
        lowest: fewest tokens of a row.
        then: what follows the question, in words.
        changes: further ones of the task's fields.
        operations: counts of them, ascending.
        base_operations: those of the pretraining.
        names: the words for that, and for what the problems are about.
        base_steps: of the pretraining.
        level_steps: until one more count of operations is open.
        steps: of the fine-tuning.
        asked, architecture, base_changes: as of a setting.
    """
    tokens, lies = f"{lowest} to {lowest + 12} tokens", f"{window}: the first is evicted, the end of the text is not"
    text = GSM.format(tokens=f"{tokens} (distractors fill them up)", window=lies, every=level_steps, **names)
    return Setting(
        name,
        f"GSM-Infinite in few words, {what}",
        f"{text}The question comes last{then}.",
        "gsm_inf_base.yaml",
        "gsm_inf_small.yaml",
        ("n4", "n1", "full"),
        changes={"target_tokens": (lowest, lowest + 12), **(changes or {})},
        architecture=architecture or {},
        base_changes={"max_steps": base_steps, "operations": tuple(base_operations), **(base_changes or {})},
        # 64 rows a step.
        tuned_changes={
            "window_size": window,
            "operations": tuple(operations),
            "curriculum": 64 * level_steps,
            "max_steps": steps,
        },
        asked=asked,
    )


def one_place(name: str, what: str, then: str, **options: Any) -> Setting:
    """GSM-Infinite about one place, with everything asked that a sentence defines.

    Args:
        name, what: as of `filled`.
        then: what else is to be said, a sentence.
        options: further ones of `filled`.
    """
    asked = (
        ", and then one about each other quantity that a sentence defines, distractors too, in random order; one word "
        "tells quantities apart."
    )
    return filled(
        name,
        what,
        80,
        92,
        asked + then,
        {"n_questions": 8, "questions_about": "text", "vocabulary": "trees", "size": (1, 5)},
        operations=range(4, 10),
        base_operations=(1, 4),
        names={
            "first": "four",
            "last": "nine",
            "names": "one place and up to five things",
            "base": "four operations, and on texts of nothing but stated numbers",
        },
        **options,
    )


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            "hops8",
            "k hops along a cycle of 8 nodes",
            HOPS.format(n=8, every=250, queries="five"),
            "hops_base.yaml",
            "hops_small.yaml",
            (
                "n4",
                "n1",
                "full",
                "n1_compute",
                "reread",
                "full_2x",
                "full_4x",
                "full_long",
                "n1_slow",
                "n1_fast",
                "full_slow",
                "full_fast",
                "n4_slow",
                "n4_fast",
                "n2",
                "all_n",
                "one_n",
                "twice",
                "sliding",
                "n1_2x",
                "n1_4x",
                "n8",
            ),
        ),
        Setting(
            "hops8_ends",
            "k hops along a cycle of 8 nodes, each pair with an end",
            HOPS.format(n=8, every=250, queries="five") + ENDS,
            "hops_base.yaml",
            "hops_small.yaml",
            ("n4", "n1", "full", "reread", "n1_compute", "full_2x", "full_4x"),
            changes={"pair_ends": True},
            tuned_changes={"window_size": 24},
        ),
        Setting(
            "hops16",
            "k hops along a cycle of 16 nodes",
            HOPS.format(n=16, every=200, queries="ten") + ENDS,
            "hops_base.yaml",
            "hops_small.yaml",
            ("n4", "full", "n1", "full_2x", "full_4x", "n4_long", "n1_compute"),
            changes={**SIXTEEN, **HALF_BATCH, "pair_ends": True},
            architecture=WIDER,
            tuned_changes={"window_size": 48, "max_steps": 3600, "fast_weights_num_heads": 3, "curriculum": 64 * 200},
            seeds=(0,),
        ),
        Setting(
            "hops16_no_ends",
            "k hops along a cycle of 16 nodes, its pairs without ends",
            HOPS.format(n=16, every=250, queries="ten")
            + " Where a pair begins is told by nothing but whether its place "
            "is odd; stopped half way, when k up to 8 had been asked.",
            "hops_base.yaml",
            "hops_small.yaml",
            ("n4", "full", "n1"),
            changes={**SIXTEEN, **HALF_BATCH},
            architecture=WIDER,
            tuned_changes={"window_size": 32, "max_steps": 2000, "fast_weights_num_heads": 3, "curriculum": 64 * 250},
            seeds=(0,),
            asked=8,
        ),
        Setting(
            "hops16_narrow",
            "k hops along a cycle of 16 nodes, its pairs without ends, in the width of that of 8",
            HOPS.format(n=16, every=250, queries="ten")
            + " Stopped half way, when k up to 9 had been asked: only even k "
            "were learnt after the first.",
            "hops_base.yaml",
            "hops_small.yaml",
            ("n4", "full", "n1"),
            changes=SIXTEEN,
            tuned_changes={"window_size": 32, "max_steps": 2250},
            seeds=(0,),
            asked=9,
        ),
        Setting(
            "hops8_two_windows",
            "k hops along a cycle of 8 nodes, its pairs spread over two windows",
            HOPS.format(n=8, every=250, queries="two") + " Each window holds half of the pairs, and each is evicted.",
            "hops_base.yaml",
            "hops_small.yaml",
            ("n4", "n1", "full"),
            changes={"n_windows": 2, "n_queries": 2},
            tuned_changes={"window_size": 8},
        ),
        Setting(
            "rule110",
            "Rule 110 run ahead by t",
            "A ring of 20 cells is read and evicted; then for t = 1 to 12, in random order, its first cell after t "
            "steps is asked. The base, two layers of full attention, was pretrained on t = 1 to 4; a Gated DeltaNet "
            "layer was put after the first, both are looped.",
            "rule110_base.yaml",
            "rule110_retrofit.yaml",
            ("n4", "n1", "full", "n2", "all_n"),
            seeds=(0,),
        ),
        Setting(
            "gsm_inf",
            "GSM-Infinite in few words, the question last",
            WHOLE + "The question comes last.",
            "gsm_inf_base.yaml",
            "gsm_inf_small.yaml",
            ("n4", "n1", "full", "rag", "summary"),
            seeds=(0,),
        ),
        Setting(
            "gsm_inf_question_first",
            "GSM-Infinite in few words, the question first",
            WHOLE + "The question comes first, so that it is in the state when the text is read.",
            "gsm_inf_base.yaml",
            "gsm_inf_small.yaml",
            ("n4", "n1", "full"),
            changes={"question_first": True},
            seeds=(0,),
        ),
        filled("gsm_inf_one_window", "most of the text in one window", 48, 64),
        filled(
            "gsm_inf_questions",
            "everything asked of each text",
            64,
            76,
            ", and then one about each other quantity on the way to its answer, the hardest first",
            {"n_questions": 8},
            base_steps=1000,
            level_steps=250,
            steps=2400,
        ),
        one_place(
            "gsm_inf_one_place",
            "everything asked about one place",
            " Stopped when up to eight operations had been asked",
            base_steps=1500,
            level_steps=200,
            steps=1000,
            asked=8,
        ),
        one_place(
            "gsm_inf_near_first",
            "everything asked about one place, the first layer near-sighted",
            " The base's first layer attends to the latest 12 tokens alone, so that a question's last token sees what "
            "is asked, and its texts have no distractors",
            base_steps=600,
            level_steps=150,
            steps=1200,
            architecture={
                "use_sliding_window": True,
                "sliding_window": 12,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            base_changes={"target_tokens": None},
        ),
        Setting(
            "hops8_ablations",
            "k hops along a cycle of 8 nodes, one thing changed at a time",
            HOPS.format(n=8, every=250, queries="five")
            + " Every arm is N = 4 with one thing changed: the rule, which layers are "
            "looped, where layers are inserted, the window, what is evicted, and what of the base is trained. Stopped "
            "half way, while there is something to tell apart: k = 1 to 5 have been asked by then.",
            "hops_base.yaml",
            "hops_small.yaml",
            ("n4", *ABLATIONS),
            tuned_changes={"max_steps": 1250},
            seeds=(0,),
            asked=5,
        ),
    )
}
