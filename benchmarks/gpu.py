"""Everything that is worth measuring on one GPU, part by part in order of value: a page and a JSON file.

    python -m benchmarks.gpu [--parts train wake operations jet memory] [--output docs/results/gpu.md]

Training is the paper's figure 6: Ouro 1.4B with 6 Jet layers from random weights, T = 12,000, bfloat16, the fastest
batch from 1 to 16 for every cell. Every cell is kept as soon as it is measured (``--kept``), the page is written anew
after each, and a second run goes on where the first one stopped. What does not fit or fails is said in its cell and
takes nothing else along. ``--device cpu --tiny`` tries the same code on models a thousand times smaller.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from transformers import DynamicCache
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks import memory, operations, train, wake
from benchmarks.cells import Measured, Plan, free, said, works
from benchmarks.full_size import build
from benchmarks.models import Setting, count_flops, text, windowed_step
from benchmarks.report import RESULTS, Claim, Part, alternate, stopwatch, write_json, write_page
from sleepify import SleepCache, ops
from sleepify.graphs import Capture, cuda_graph

PARTS = ("train", "wake", "operations", "jet", "memory")


def matrix_rate(plan: Plan) -> Measured:
    """Operations per second of a large product of two matrices: what the card gives at best."""
    side = 64 if plan.tiny else 8192
    a, b = (torch.randn(side, side, device=plan.device, dtype=plan.dtype) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, 20, warmup=5, device=plan.device)["product"]
    return {"side": side, "FLOP/s": median(2 * side**3 / t for t in times)}


# --- training ---------------------------------------------------------------------------------------------------------


def tuned(plan: Plan, step: Callable[[Setting], Callable[[], None]]) -> Measured:
    """Rows per second with the fastest batch that fits, activations kept, passes recomputed, or all but projections.

    Raises:
        torch.OutOfMemoryError: if not even one row fits.
    """
    best: tuple[float, Setting] | None = None
    for checkpoint in ("none", "selective", "loop"):
        before = 0.0
        for batch_size in plan.batches:
            setting = Setting(batch_size, checkpoint)
            try:
                action = step(setting)
                action()
                rate = batch_size / stopwatch(action, plan.device)
            except torch.OutOfMemoryError:
                free(plan.device)
                break
            if best is None or rate > best[0]:
                best = rate, setting
            if rate < 1.03 * before:
                break
            before = rate
    if best is None:
        raise torch.OutOfMemoryError("not even one row fits")
    setting = best[1]
    times = alternate({"step": step(setting)}, plan.repeats, warmup=0, device=plan.device)["step"]
    seconds = median(times) / setting.batch_size
    return {"seconds per row": seconds, "batch": setting.batch_size, "checkpoint": setting.checkpoint}


def training_order(windows: Sequence[int], loops: Sequence[int]) -> list[train.Key]:
    """The cells of figure 6, the most telling first: 2K at N = 1 and 4, beside the parallel hybrid, and so on."""
    by_value = sorted(windows, key=lambda window: (abs(math.log2(window / 2048)), -window))
    keys = [("hard", by_value[0], n) for n in loops if n in (1, 4)]
    keys += [("parallel", window, 1) for window in by_value[:2]] + [("hard", by_value[1], 1)]
    every = [("hard", window, n) for n in loops for window in by_value]
    every += [(kind, window, 1) for kind in ("parallel", "sliding") for window in by_value]
    return list(dict.fromkeys([*keys, *every]))


def measure_training(plan: Plan, rate: float) -> list[Part]:
    """Figure 6, with utilisation."""
    tokens, windows = (43, (16, 32)) if plan.tiny else (12_000, (512, 1024, 2048, 4096))
    loops = (1, 2) if plan.tiny else train.LOOPS
    attention = "flash_attention_2" if plan.device == "cuda" and is_flash_attn_2_available() else "blocks"
    order = training_order(windows, loops)
    counted = plan.ouro("meta")

    @cache
    def steps() -> train.Steps:
        return train.Steps(plan.ouro(), counted, tokens, windows, loops, attention, plan.device)

    def measure(key: train.Key) -> Measured:
        return tuned(plan, partial(steps().action, key))

    found = {
        (kind, window, n): plan.cell(f"training {kind} L={window} N={n}", partial(measure, (kind, window, n)))
        for kind, window, n in order
    }
    part = Part(
        "Training",
        f"Ouro 1.4B with 6 Jet layers, random weights, T = {tokens:,}; for every cell the fastest batch of "
        f"{list(plan.batches)} rows, activations kept (none), passes recomputed (loop), or all of them but projections "
        "and attention (selective). Utilisation: matrix products (three times the forward pass, attention's "
        "causal half, recomputation not counted) per second, over the matrix rate. Over N = 1: tokens per second times "
        f"the passes that N takes, over those of N = 1. Attention of the parallel hybrid: {attention}.",
        ["L", "step", "batch", "recomputed", "tokens per second", "TFLOP/s", "utilisation", "over N = 1"],
    )
    for kind, window, n in sorted(found, key=lambda key: (key[1], key[0] != "hard", key[0], key[2])):
        cell = found[kind, window, n]
        label = f"N = {n}" if kind == "hard" else f"{kind}, N = 1" if kind == "sliding" else "parallel hybrid"
        if not works(cell):
            part.rows.append([f"{window:,}", label, said(cell), *[""] * 5])
            continue
        speed = tokens / cell["seconds per row"]
        cells = [str(cell["batch"]), cell["checkpoint"], f"{speed:,.0f}"]
        if kind == "parallel":
            part.rows.append([f"{window:,}", label, *cells, "", "", ""])
            continue
        done = count_flops(counted, tokens, window, n) / cell["seconds per row"]
        one = found["hard", window, 1]
        over = ""
        if works(one):
            factor = count_flops(counted, tokens, window, n) / count_flops(counted, tokens, window, 1)
            value = one["seconds per row"] * factor / cell["seconds per row"]
            over = f"{value:.3f}"
            if kind == "hard" and n in (2, 4):
                part.claims.append(Claim(f"tokens/s x arithmetic, N = {n} / N = 1, L = {window}", value, at_least=0.95))
        part.rows.append([f"{window:,}", label, *cells, f"{done / 1e12:,.1f}", f"{done / rate:.1%}", over])
        part.figures[f"{kind} L={window} N={n}"] = cell | {"tokens/s": speed, "FLOP/s": done}
        if kind == "hard" and n == 1 and window == windows[-2]:
            part.claims.append(Claim(f"tokens/s, N = 1, L = {window}", speed, at_least=30_000))
            part.claims.append(Claim(f"utilisation, N = 1, L = {window}", done / rate, at_least=0.50))
        if kind == "hard" and n == 1 and window == windows[-1] and works(rival := found["parallel", window, 1]):
            value = rival["seconds per row"] / cell["seconds per row"]
            part.claims.append(Claim(f"tokens/s, windowed / parallel, N = 1, L = {window}", value, at_least=0.98))
    return [part]


# --- inference --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoding(plan: Plan, way: str) -> Measured:
    """Seconds of a token at N = 1 and 6, after 1 window and many, and of the base with as many keys."""
    window, many, tokens = (4, 3, 2) if plan.tiny else (512, 128, 60)
    model, graph = plan.ouro().eval(), way == "graph"
    model.config.window_size, model.config.eviction = window, "hard"
    ids, _ = text(model, many * window + window // 2)
    sessions: dict[str, SleepCache] = {}
    for n in (1, 6):
        for windows in (1, many):
            cache = SleepCache(fixed_shapes=graph)
            model(ids[:, : windows * window + window // 2], past_key_values=cache, n_loops=n, logits_to_keep=1)
            sessions[f"N={n} after {windows}"] = cache
    base, keys = model.language_model, DynamicCache(config=model.config.text_config)
    base(ids[:, : window // 2], past_key_values=keys, logits_to_keep=1)
    token = ids[:, :1]

    def slept(name: str) -> None:
        # In a copy the keys before it would be copied too.
        session = sessions[name] if graph else sessions[name].clone()
        model(token, past_key_values=session, n_loops=int(name[2]), logits_to_keep=1)

    def unslept() -> None:
        base(token, past_key_values=keys, logits_to_keep=1)
        keys.crop(-1)

    actions: dict[str, Callable[[], None]] = {name: partial(slept, name) for name in sessions} | {"base": unslept}
    # One after the other: the one graph of all sessions would bring in another one's keys at every turn.
    turns = [{name: action} for name, action in actions.items()] if graph else [actions]
    seconds = plan.seconds / 4 / len(turns)
    # Without CUDA the function itself stands in for its graph.
    capture: Capture = cuda_graph if plan.device == "cuda" else lambda function: function
    times: dict[str, list[float]] = {}
    with model.captured(capture) if graph else nullcontext():
        for turn in turns:
            times |= alternate(turn, tokens, warmup=min(tokens, 10), device=plan.device, seconds=seconds)
    return {name: median(found) for name, found in times.items()} | {"many": many, "window": window}


def measure_inference(plan: Plan, rate: float) -> list[Part]:
    """Tokens eager and captured; sleeps; prompts; what a session weighs."""
    part = Part(
        "Decoding",
        "Milliseconds of one token, batch 1, half a window open. The base has as many keys and runs eagerly. Graph: "
        "within `model.captured()`, with keys of a fixed shape.",
        ["", "N", "after 1 window", "after many", "many / 1", "the base", "over the base"],
    )
    for way in ("eager", "graph"):
        cell = plan.cell(f"decoding {way}", partial(decoding, plan, way))
        if not works(cell):
            part.rows.append([way, said(cell), *[""] * 5])
            continue
        many, base = cell["many"], cell["base"]
        for n in (1, 6):
            first, last = cell[f"N={n} after 1"], cell[f"N={n} after {many}"]
            ratios = last / first, first / base
            cells = [f"{value * 1e3:.2f}" for value in (first, last)]
            part.rows.append([way, str(n), *cells, f"{ratios[0]:.3f}", f"{base * 1e3:.2f}", f"{ratios[1]:.3f}"])
            part.claims.append(Claim(f"token after {many} windows / 1, N = {n}, {way}", ratios[0], at_most=1.02))
        across = cell["N=6 after 1"] / cell["N=1 after 1"]
        part.claims.append(Claim(f"token, N = 6 / N = 1, {way}", across, at_most=1.02))
        if way == "eager":  # beside a graph the eager base is no match
            part.claims.append(Claim("token / the base's own, eager", cell["N=1 after 1"] / base, at_most=1.15))
        part.figures[way] = cell
    others = plan.cell("sleeps and prompts", partial(sleeps_and_prompts, plan))
    return [part, *(revived(others) if works(others) else [])]


def sleeps_and_prompts(plan: Plan) -> Measured:
    """The pause of a sleep, and a long prompt beside the base's full attention."""
    window, prompt = (4, 2) if plan.tiny else (512, 32)
    model = plan.ouro().eval()
    model.config.window_size, model.config.eviction = window, "hard"
    ids, _ = text(model, (prompt + 1) * window)
    sleeps = (1, 2) if plan.tiny else train.LOOPS
    what = wake.Inference(model, ids, window, (1,), (1,), sleeps, prompt, plan.device)
    parts = [wake.measure_sleep(what, 4 * plan.repeats, plan.seconds / 8)]
    return {"parts": [asdict(each) for each in (*parts, wake.measure_prompt(what, plan.repeats, plan.seconds / 8))]}


def revived(cell: Measured) -> list[Part]:
    """Parts as they were measured."""
    parts = [dict(each) for each in cell["parts"]]
    return [Part(**each | {"claims": [Claim(**claim) for claim in each["claims"]]}) for each in parts]


def measure_operations(plan: Plan, rate: float) -> list[Part]:
    """Single operations, and our gated delta rule against flash-linear-attention's kernel where there is one."""

    def measure() -> Measured:
        parts = operations.measure_all(plan.device, plan.dtype, 4 * plan.repeats, plan.tiny, plan.seconds / 60)
        return {"parts": [asdict(each) for each in parts]}

    cell = plan.cell("operations", measure)
    return revived(cell) if works(cell) else [Part("Operations", said(cell), ["not measured"])]


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_jet(plan: Plan, rate: float) -> list[Part]:
    """Jet-Nemotron 2B in its hardest published setting, with an optimiser, by what is recomputed."""
    tokens, window, n = (28, 16, 2) if plan.tiny else (3300, 2000, 6)
    part = Part(
        "Jet-Nemotron 2B",
        f"Random weights, N = {n}, L = {window:,}, T = {tokens:,}, batch 1, with AdamW.",
        ["checkpoint", "seconds per step", "tokens per second", "peak GiB, everything"],
    )

    def measure(checkpoint: str) -> Measured:
        model = build("jet_nemotron_2b", plan.device, plan.dtype, plan.tiny).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        setting, batch = Setting(1, checkpoint), text(model, tokens)

        def step() -> None:
            windowed_step(model, batch, window, n, setting)
            optimizer.step()

        if plan.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = alternate({"step": step}, plan.repeats, device=plan.device)["step"]
        peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else 0
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        return {"seconds": median(times), "peak": peak, "finite": float(finite)}

    for checkpoint in ("loop", "selective", "window", "none"):
        cell = plan.cell(f"jet {checkpoint}", partial(measure, checkpoint))
        if not works(cell):
            part.rows.append([checkpoint, said(cell), "", ""])
            continue
        cells = [f"{cell['seconds']:.3f}", f"{tokens / cell['seconds']:,.0f}", f"{cell['peak'] / 2**30:.1f}"]
        part.rows.append([checkpoint, *cells])
        part.figures[checkpoint] = cell
        part.claims.append(Claim(f"trains, gradients finite (1: yes), {checkpoint}", cell["finite"], at_least=1))
    return [part]


def measure_memory(plan: Plan, rate: float) -> list[Part]:
    """Peak of a step of Ouro by T, N and what is recomputed."""
    window, counts, loops = (20, (1, 2), (1, 2)) if plan.tiny else (1024, (2, 4, 8), (1, 4))
    part = Part(
        "Peak of a step",
        f"Ouro 1.4B with 6 Jet layers, windows of {window:,}, batch 1; GiB beyond weights, gradients included.",
        ["checkpoint", "N", *(f"T = {n} windows" for n in counts)],
    )
    model = cache(plan.ouro)

    def measure(checkpoint: str, n: int, count: int) -> Measured:
        batch = text(model(), count * window + window // 2)
        model().zero_grad(set_to_none=True)
        step = partial(windowed_step, model(), batch, window, n, Setting(1, checkpoint))
        return {"peak": memory.peak_bytes(step, plan.device)}

    for n in loops:
        for checkpoint in ("window", "loop", "selective", "none"):
            row = []
            for count in counts:
                name = f"memory {checkpoint} N={n} windows={count}"
                cell = plan.cell(name, partial(measure, checkpoint, n, count))
                row.append(f"{cell['peak'] / 2**30:.2f}" if works(cell) else said(cell))
                if works(cell):
                    part.figures[name] = cell["peak"]
            part.rows.append([f'"{checkpoint}"', str(n), *row])
    for n in loops:
        peaks = [part.figures.get(f"memory window N={n} windows={count}") for count in counts]
        for (one, other), (few, many) in zip(pairwise(peaks), pairwise(counts), strict=True):
            if one is not None and other is not None:
                what = f'peak, checkpoint="window", N = {n}, {many} windows / {few}'
                part.claims.append(Claim(what, other / one, at_most=1.10))
    return [part]


# The names of a part's cells begin so.
SECTIONS: dict[str, tuple[str, Callable[[Plan, float], list[Part]]]] = {
    "train": ("training", measure_training),
    "wake": ("decoding", measure_inference),
    "operations": ("operations", measure_operations),
    "jet": ("jet", measure_jet),
    "memory": ("memory", measure_memory),
}


def main(argv: list[str] | None = None) -> list[Part]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="to measure; of others the page has what is kept"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per cell")
    parser.add_argument("--seconds", type=float, default=480, help="after which a part begins no further cell")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="batch sizes to choose from")
    parser.add_argument("--output", type=Path, help="the page, with the JSON file beside; docs/results/gpu.md on a GPU")
    parser.add_argument(
        "--kept", type=Path, help="cells measured so far, beside the page by default; delete to begin anew"
    )
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
    kept = arguments.kept or output.with_suffix(".cells.json")
    plan = Plan(arguments.device, arguments.tiny, arguments.repeats, arguments.seconds, arguments.batches, kept)
    if kept.exists():
        plan.cells = json.loads(kept.read_text(encoding="utf-8"))

    kernels = "; ".join(f"{op}: {implementation}" for op, implementation in ops.describe().items() if "cuda" in op)
    what_it_is = "" if plan.device == "cuda" else "**A trial of the script on a CPU: its figures mean nothing.** "
    intro = f"{what_it_is}Kernels: {kernels}."
    parts: dict[str, list[Part]] = {}

    def write() -> None:
        """The page with what there is, so that what a later part breaks does not take it along."""
        every = [part for name in ("rate", *PARTS) for part in parts.get(name, [])]
        write_page(output, title="On a GPU", command="python -m benchmarks.gpu", intro=intro, parts=every)
        write_json(output.with_suffix(".json"), every)

    plan.deadline = time.perf_counter() + plan.seconds
    found = plan.cell("matrix rate", partial(matrix_rate, plan))
    rate = found["FLOP/s"] if works(found) else float("nan")
    parts["rate"] = [Part("Matrix rate", "Product of two square matrices.", ["dtype", "side", "TFLOP/s"])]
    if works(found):
        name = str(plan.dtype).removeprefix("torch.")
        parts["rate"][0].rows.append([name, f"{found['side']:,}", f"{rate / 1e12:,.1f}"])
        parts["rate"][0].figures["FLOP/s"] = rate
    # What was measured before goes onto the page as it is.
    for name in [name for name in PARTS if name not in arguments.parts] + list(arguments.parts):
        cells, measure = SECTIONS[name]
        if name in arguments.parts:
            print(f"{name} ...", flush=True)
            plan.deadline = time.perf_counter() + plan.seconds
        elif any(cell.startswith(cells) for cell in plan.cells):
            plan.deadline = 0.0
        else:
            continue
        parts[name] = measure(plan, rate)
        free(plan.device)
        write()
    print(output.read_text(encoding="utf-8"))
    return [part for name in ("rate", *PARTS) for part in parts.get(name, [])]


if __name__ == "__main__":
    main()
