"""What a full-size model asks of a card, counted where there is none: operations, kernels, bytes, syncs, peak memory.

    python -m benchmarks.counts [--models ouro_1.4b jet_nemotron_2b] [--output docs/results/counts.md]

Ouro 1.4B with six Jet layers and Jet-Nemotron 2B at full size, on fake CUDA tensors (benchmarks/on_paper.py): a prompt,
a sleep, decoded tokens, a step of training forward and backward, the optimiser. Anything that would need a value from
the card raises; the syncs that there are, are listed with their places. About five minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import PUBLISHED, build
from benchmarks.on_paper import Count, Paper, card, in_process
from benchmarks.report import RESULTS, Part, write_page
from sleepify import SleepForCausalLM
from sleepify.training import SleepTrainingArguments
from sleepify.training.optim import build_optimizer

LOOPS = {"ouro_1.4b": 4, "jet_nemotron_2b": 6}
"""N, as in the recipes of these models."""
PARTS = ("read", "sleep", "decode", "step", "train", "optimise")
WINDOW = 2000
REST = 100
"""Tokens after the last full window of a training step; the last 8 have labels."""


@dataclass
class Bench:
    """One model on one card, both on paper."""

    paper: Paper
    model: SleepForCausalLM
    window: int

    @classmethod
    def open(cls, paper: Paper, name: str, tiny: bool) -> Bench:
        """A published model, in bfloat16."""
        window = 16 if tiny else WINDOW
        model = build(name, "meta", torch.bfloat16, tiny, window_size=window, n_loops=LOOPS[name])
        model = model.to_empty(device="cuda")
        model.language_model.tie_weights()
        model.generation_config.eos_token_id = None
        return cls(paper, model, window)

    def ids(self, tokens: int) -> torch.Tensor:
        return self.paper.give(torch.arange(1, tokens + 1)[None] % 500)

    def counted(self, action: Any) -> Count:
        """What an action adds."""
        gc.collect()
        self.paper.count = count = Count()
        action()
        return count

    def read(self, windows: int, n_loops: int) -> Count:
        """A prompt of so many windows and one token, of which the last is predicted."""
        ids = self.ids(windows * self.window + 1)
        with torch.no_grad():
            return self.counted(lambda: self.model.eval()(ids, logits_to_keep=1, use_cache=True, n_loops=n_loops))

    def sleep(self, n_loops: int) -> Count:
        """`model.sleep` on a full window."""
        with torch.no_grad():
            cache = self.model.eval()(self.ids(self.window), logits_to_keep=1, use_cache=True).past_key_values
            return self.counted(lambda: self.model.sleep(cache, n_loops=n_loops))

    def decode(self, tokens: int) -> Count:
        """``generate`` of so many tokens after a prompt of half a window."""
        ids = self.ids(self.window // 2)
        mask = torch.ones(ids.shape, dtype=torch.long)
        arguments = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return self.counted(lambda: self.model.eval().generate(ids, attention_mask=self.paper.give(mask), **arguments))

    def train(self, windows: int, n_loops: int, checkpoint: str) -> Count:
        """Forward and backward of windows that are slept on and a rest with labels."""
        self.model.train().config.checkpoint = checkpoint
        self.model.zero_grad()
        tokens = windows * self.window + min(REST, self.window - 1)
        ids, labels = self.ids(tokens), torch.full((1, tokens), -100)
        labels[:, -8:] = 1
        labels = self.paper.give(labels)
        recompute = self.model.gradient_checkpointing_disable
        if checkpoint != "none":
            recompute = self.model.gradient_checkpointing_enable
        recompute()
        return self.counted(lambda: self.model(ids, labels=labels, n_loops=n_loops).loss.backward())

    def optimise(self, directory: Path) -> Count:
        """The optimiser's second step, on the gradients that there are."""
        arguments = SleepTrainingArguments(output_dir=str(directory), use_cpu=True, max_grad_norm=0.0)
        optimizer = build_optimizer(self.model, arguments)
        optimizer.step()
        return self.counted(optimizer.step)


def measure(paper: Paper, name: str, tiny: bool, parts: Sequence[str]) -> dict[str, Count]:
    """By what is done; of tokens and windows what each further one adds."""
    bench, most = Bench.open(paper, name, tiny), LOOPS[name]
    counts: dict[str, Count] = {}
    if "read" in parts:
        counts["window of a prompt, N = 1"] = bench.read(2, 1) - bench.read(1, 1)
    if "sleep" in parts:
        counts[f"sleep, N = {most}"] = bench.sleep(most)
    if "decode" in parts:
        few, many = (bench.decode(n) for n in (3, 7))
        counts["decoded token"] = (many - few).over(4)
    if "step" in parts:
        counts['training step, one window and a rest, N = 1, "none"'] = bench.train(1, 1, "none")
    if "train" in parts:
        # Two passes show what a further one costs.
        for checkpoint in ("none", "selective", "loop", "window"):
            counts[f'training step, one window and a rest, N = 2, "{checkpoint}"'] = bench.train(1, 2, checkpoint)
        one = counts['training step, one window and a rest, N = 2, "loop"']
        counts['further window of it, N = 2, "loop"'] = bench.train(2, 2, "loop") - one
    if "optimise" in parts:
        bench.train(1, 1, "none")
        with tempfile.TemporaryDirectory() as directory:
            counts["optimiser's step, Muon"] = bench.optimise(Path(directory))
    return counts


def tabulate(name: str, counts: dict[str, Count]) -> Part:
    """One row per thing that is done."""
    head = ["what", "operations", "kernels", "GB moved", "TFLOP", "syncs", "peak GiB"]
    part = Part(name, "", head)
    places: dict[str, None] = {}
    for what, count in counts.items():
        peak = f"{count.peak / 2**30:.1f}" if count.peak else ""
        cells = [
            f"{count.operations:,}",
            f"{count.launches:,}",
            f"{count.moved / 1e9:,.1f}",
            f"{count.flops / 1e12:,.2f}",
        ]
        part.rows.append([what, *cells, f"{count.n_syncs:g}", peak])
        part.figures[what] = {"operations": count.operations, "launches": count.launches, "moved": count.moved} | {
            "flops": count.flops,
            "copies": dict(count.copies),
            "syncs": dict(count.syncs),
            "peak": count.peak,
        }
        places |= dict.fromkeys(count.syncs)
    where = ", ".join(f"`{place}`" for place in places)
    part.intro = f"Syncs: {where}." if places else "No syncs."
    return part


INTRO = """Full size, bfloat16, batch 1, L = 2,000, on fake CUDA tensors: nothing ran on a card. *Operations*: calls of
ATen and of our own operations, views included. *Kernels*: one for each that writes, as many for our Triton kernels as
they launch; an estimate. *GB moved*: what these kernels read and write. *TFLOP*: of matrix products and attention
(attention in full, its causal half is half of it), without those inside our own kernels. *Syncs*: places where the
host waits for the card. *Peak*: bytes alive beyond weights and, in training, with their gradients. A further pass
costs in training what the second does, and recomputing windows as a whole saves from the second window on. Attention
is PyTorch's (flash without a mask, memory-efficient with one); the rule and Jet's convolution are our Triton
kernels."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=sorted(PUBLISHED))
    parser.add_argument("--output", type=Path, default=RESULTS / "counts.md", help="where the page goes")
    parser.add_argument("--json", action="store_true", help="print the figures and write no page")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="narrow models")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts = []
    for name in arguments.models:
        with card() as paper:
            parts.append(tabulate(name, measure(paper, name, arguments.tiny, arguments.parts)))
    if arguments.json:
        print(json.dumps({part.title: part.figures for part in parts}))
        return 0
    write_page(
        arguments.output,
        title="Counted",
        command="python -m benchmarks.counts",
        intro=" ".join(INTRO.split()),
        parts=parts,
    )
    print(arguments.output.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(in_process("benchmarks.counts", sys.argv[1:], main))
