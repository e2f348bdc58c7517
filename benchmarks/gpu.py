"""Everything that is worth measuring on one GPU, in one command and under ten minutes: a page and a JSON file.

    python -m benchmarks.gpu [--parts train jet memory wake operations] [--output docs/results/gpu.md]

Training is the paper's figure 6: Ouro 1.4B with 6 Jet layers from random weights, T = 12,000, bfloat16. Then
Jet-Nemotron 2B at N = 6, memory, inference and single operations. ``--device cpu --tiny`` tries the same code without
a GPU, on models a thousand times smaller, and writes where ``--output`` says.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks import memory, operations, train, wake
from benchmarks.full_size import build
from benchmarks.models import Setting, count_flops, text, wake_up, windowed_step
from benchmarks.report import RESULTS, Claim, Part, Spread, alternate, stopwatch, write_json, write_page
from sleepify import SleepForCausalLM, ops

PARTS = ("train", "jet", "memory", "wake", "operations")


@dataclass(frozen=True)
class Plan:
    """Sizes of everything."""

    device: str
    tiny: bool
    repeats: int
    seconds: float
    batches: Sequence[int]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def ouro(self, device: str | None = None) -> SleepForCausalLM:
        """Ouro 1.4B with its six Jet layers; one step of its own recurrence, as it runs when it sleeps."""
        model = build("ouro_1.4b", device or self.device, self.dtype, self.tiny)
        model.config.text_config.total_ut_steps = 1
        return wake_up(model).train()


def matrix_rate(plan: Plan) -> tuple[float, Part]:
    """Operations per second of a large product of two matrices: what the card gives at best."""
    side = 64 if plan.tiny else 8192
    a, b = (torch.randn(side, side, device=plan.device, dtype=plan.dtype) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, 20, warmup=5, device=plan.device)["product"]
    rates = Spread.of([2 * side**3 / t for t in times])
    part = Part("Matrix rate", f"Product of two {side} x {side} matrices.", ["dtype", "TFLOP/s"])
    part.rows.append([str(plan.dtype).removeprefix("torch."), rates.text(1e-12)])
    part.figures["FLOP/s"] = rates
    return rates.median, part


def tune(step: Callable[[Setting], Callable[[], None]], plan: Plan) -> Setting:
    """The batch with the most rows per second, passes recomputed; a larger one must be 3% better.

    Raises:
        torch.OutOfMemoryError: if not even the smallest fits.
    """
    best, best_rate = None, 0.0
    for batch_size in plan.batches:
        setting = Setting(batch_size, "loop")
        try:
            action = step(setting)
            action()
            rate = batch_size / stopwatch(action, plan.device)
        except torch.OutOfMemoryError:
            if best is None:
                raise
            break
        if rate < 1.03 * best_rate:
            break
        best, best_rate = setting, rate
    assert best is not None
    return best


def measure_training(plan: Plan, rate: float) -> list[Part]:
    """Figure 6, with utilisation."""
    tokens, windows = (43, (32,)) if plan.tiny else (12_000, (512, 1024, 2048, 4096))
    n_loops = (1, 2) if plan.tiny else train.LOOPS
    attention = "flash_attention_2" if plan.device == "cuda" and is_flash_attn_2_available() else "blocks"
    counted = plan.ouro("meta")
    steps = train.Steps(plan.ouro(), counted, tokens, windows, n_loops, attention, plan.device)
    settings: dict[train.Key, Setting] = {}
    for window in windows:
        for kind in ("hard", "sliding", "parallel"):
            tuned = tune(partial(steps.action, (kind, window, 1)), plan)
            settings |= {(kind, window, n): tuned for n in (n_loops if kind == "hard" else (1,))}
    times = train.measure(steps, plan.repeats, settings, plan.seconds)
    batches = sorted({setting.batch_size for setting in settings.values()})
    intro = (
        f"Ouro 1.4B with 6 Jet layers, random weights, T = {tokens:,}; passes recomputed in the backward pass, in the "
        f"parallel hybrid layers; batches of {batches} rows, the faster at N = 1. Attention of the parallel hybrid: "
        f"{attention}."
    )
    relative = train.tabulate(steps, times, "Training", intro)
    used = utilisation(steps, times, rate)
    for window in windows:
        for n in n_loops[1:3]:
            value = 1 / train.over_ideal(steps, times, window, n).median
            what = f"tokens/s x ideal, N = {n} / N = 1, L = {window}"
            relative.claims.append(Claim(what, value, at_least=0.95))
    value = 1 / train.over_parallel(steps, times, windows[-1], 1).median
    relative.claims.append(Claim(f"tokens/s, windowed / parallel, N = 1, L = {windows[-1]}", value, at_least=0.95))

    plain = train.Steps(steps.model, counted, tokens, windows, (1,), attention, plan.device)
    times = train.measure(plain, plan.repeats, None, plan.seconds / 4)
    intro = f"As above, T = {tokens:,}, batch 1, all activations kept."
    return [relative, used, train.tabulate(plain, times, "Training, nothing recomputed", intro)]


def utilisation(steps: train.Steps, times: dict[train.Key, list[float]], rate: float) -> Part:
    """Tokens per second, and operations of the model (recomputation does not count) over the matrix rate."""
    part = Part(
        "Throughput and utilisation",
        "Utilisation: operations of the model's matrix products (three times the forward pass, of attention the causal "
        "half, recomputation not counted) per second, over the matrix rate above.",
        ["L", "N", "tokens per second", "TFLOP/s", "utilisation"],
    )
    middle = steps.windows[-2:][0]
    for window in steps.windows:
        for n in steps.n_loops:
            seconds = times["hard", window, n]
            work = count_flops(steps.counted, steps.tokens, window, n)
            tokens, done = (Spread.of([amount / t for t in seconds]) for amount in (steps.tokens, work))
            share = done.median / rate
            cells = [tokens.text(digits=0), done.text(1e-12, 1), f"{share:.1%}"]
            part.rows.append([f"{window:,}", str(n), *cells])
            part.figures[f"L={window} N={n}"] = {"tokens/s": tokens, "FLOP/s": done, "utilisation": share}
            if window == middle:
                part.claims.append(Claim(f"utilisation, N = {n}, L = {window}", share, at_least=0.40))
    return part


def measure_jet(plan: Plan) -> Part:
    """Jet-Nemotron 2B in its hardest published setting, with an optimiser."""
    tokens, window = (28, 16) if plan.tiny else (3300, 2000)
    n_loops = 2 if plan.tiny else 6
    model = build("jet_nemotron_2b", plan.device, plan.dtype, plan.tiny).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    setting, batch = Setting(1, "loop"), text(model, tokens)

    def step() -> None:
        windowed_step(model, batch, window, n_loops, setting)
        optimizer.step()

    seconds = Spread.of(alternate({"step": step}, min(5, plan.repeats), device=plan.device)["step"])
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    part = Part(
        "Jet-Nemotron 2B",
        f"Random weights, N = {n_loops}, L = {window:,}, T = {tokens:,}, batch 1, passes recomputed, with AdamW.",
        ["seconds per step", "tokens per second", "peak GiB, everything"],
    )
    peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else 0
    part.rows.append([seconds.text(), f"{tokens / seconds.median:,.0f}", f"{peak / 2**30:.1f}"])
    part.figures = {"seconds": seconds, "peak bytes": peak}
    part.claims.append(Claim("Jet-Nemotron 2B at N = 6 trains, gradients finite (1: yes)", float(finite), at_least=1))
    return part


def measure_memory(plan: Plan) -> list[Part]:
    """Peak of a step of Ouro."""
    window, counts = (20, (1, 2)) if plan.tiny else (1024, (2, 4, 8))
    loops = (1, 2) if plan.tiny else (1, 4)
    return [memory.measure(plan.ouro(), window, counts, loops, 1, plan.device)]


def measure_inference(plan: Plan) -> list[Part]:
    """Tokens, sleeps, prompts."""
    window, n_windows, n_loops = (4, (1, 2), (1, 2)) if plan.tiny else (512, (1, 8, 32, 128), (1, 2, 6))
    model = plan.ouro().eval()
    model.config.window_size, model.config.eviction = window, "hard"
    ids, _ = text(model, (max(n_windows) + 1) * window)
    sleeps = (1, 2) if plan.tiny else train.LOOPS
    what = wake.Inference(model, ids, window, n_windows, n_loops, sleeps, min(32, max(n_windows)), plan.device)
    tokens = 2 if plan.tiny else 60
    parts = wake.measure_tokens(what, tokens, plan.seconds / 3)
    parts.append(wake.measure_sleep(what, 4 * plan.repeats, plan.seconds / 8))
    return [*parts, wake.measure_prompt(what, plan.repeats, plan.seconds / 8)]


def measure_operations(plan: Plan) -> list[Part]:
    """Single operations, and our gated delta rule against flash-linear-attention's kernel where there is one."""
    return operations.measure_all(plan.device, plan.dtype, 4 * plan.repeats, plan.tiny, plan.seconds / 60)


def main(argv: list[str] | None = None) -> list[Part]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of training steps, at most")
    parser.add_argument("--seconds", type=float, default=150, help="of rounds of training steps; others in proportion")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="batch sizes to choose from")
    parser.add_argument("--output", type=Path, help="the page, with the JSON file beside; docs/results/gpu.md on a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="narrow models, to try the script")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device found; --device cpu --tiny --output PAGE tries the script without one")
    if arguments.output is None and (arguments.tiny or arguments.device == "cpu"):
        parser.error("--output is needed here: only a whole run on a GPU may replace docs/results/gpu.md")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    output = arguments.output or RESULTS / "gpu.md"
    plan = Plan(arguments.device, arguments.tiny, arguments.repeats, arguments.seconds, arguments.batches)

    rate, part = matrix_rate(plan)
    parts = [part]
    sections: dict[str, Callable[[], list[Part]]] = {
        "train": lambda: measure_training(plan, rate),
        "jet": lambda: [measure_jet(plan)],
        "memory": lambda: measure_memory(plan),
        "wake": lambda: measure_inference(plan),
        "operations": lambda: measure_operations(plan),
    }
    kernels = "; ".join(f"{op}: {implementation}" for op, implementation in ops.describe().items() if "cuda" in op)
    what_it_is = "" if plan.device == "cuda" else "**A trial of the script on a CPU: its figures mean nothing.** "
    intro = f"{what_it_is}{' '.join(train.INTRO.split())} Kernels: {kernels}."
    for name in arguments.parts:
        print(f"{name} ...", flush=True)
        parts += sections[name]()
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        # Written after every part, so that what a later one breaks does not take it along.
        write_page(output, title="On a GPU", command="python -m benchmarks.gpu", intro=intro, parts=parts)
        write_json(output.with_suffix(".json"), parts)
    print(output.read_text(encoding="utf-8"))
    return parts


if __name__ == "__main__":
    main()
