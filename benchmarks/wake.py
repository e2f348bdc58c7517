"""What a wake token costs and what a session weighs, against loops and text consumed (contract 9 and 10).

    python -m benchmarks.wake [--repeats 400] [--output docs/results/wake.md]

All settings are timed in turn within one run, a single token each time, so that whatever else the machine does hits
them alike; figures are medians and ratios of medians. The base decodes the same text with its growing cache beside.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from benchmarks.report import machine, write_table
from sleepify import SleepCache, sleepify

WINDOW = 64
LOOPS = (1, 2, 6)
WINDOWS = (1, 8, 64)


def small_base() -> Qwen3ForCausalLM:
    """A Qwen3 of 8 layers and 256 channels: large enough that arithmetic, not Python, is most of a token."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW * (max(WINDOWS) + 2),
    )
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def measure(repeats: int) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the two tables: latency, and bytes."""
    base = small_base()
    model = sleepify(base, window_size=WINDOW).eval()
    for layer in model.fast_weights:
        torch.nn.init.normal_(layer.o_proj.weight, std=0.02)
    longest = WINDOW * max(WINDOWS) + WINDOW // 2
    text = torch.randint(0, 4096, (1, longest + 1), generator=torch.Generator().manual_seed(1))

    sessions: dict[tuple[int, int], SleepCache] = {}
    for n_loops in LOOPS:
        for windows in WINDOWS:
            cache = SleepCache()
            model(text[:, : windows * WINDOW + WINDOW // 2], past_key_values=cache, n_loops=n_loops, logits_to_keep=1)
            sessions[n_loops, windows] = cache
    grown = {}
    for windows in WINDOWS:
        grown[windows] = DynamicCache(config=base.config)
        base(text[:, : windows * WINDOW + WINDOW // 2], past_key_values=grown[windows], logits_to_keep=1)

    times: dict[object, list[float]] = {}
    token = text[:, :1]
    for repeat in range(repeats + 20):
        for key, cache in sessions.items():
            session = cache.clone()
            begin = time.perf_counter()
            model(token, past_key_values=session, n_loops=key[0], logits_to_keep=1)
            if repeat >= 20:
                times.setdefault(key, []).append(time.perf_counter() - begin)
        for windows, cache in grown.items():
            begin = time.perf_counter()
            base(token, past_key_values=cache, logits_to_keep=1)
            if repeat >= 20:
                times.setdefault(("base", windows), []).append(time.perf_counter() - begin)
            cache.crop(-1)

    reference = median(times[1, 1])
    latency = []
    for label, key in [*((f"N = {n}", n) for n in LOOPS), ("base, all keys kept", "base")]:
        row = [label]
        for windows in WINDOWS:
            sample = times[key, windows]
            low, _, high = quantiles(sample, n=4)
            row.append(
                f"{median(sample) * 1e3:.2f} ms ({low * 1e3:.2f}-{high * 1e3:.2f}), x{median(sample) / reference:.3f}"
            )
        latency.append(row)

    memory = []
    fresh = SleepCache()
    model(text[:, :1], past_key_values=fresh)
    for windows in (0, *WINDOWS):
        cache = sessions[LOOPS[-1], windows] if windows else fresh
        kept = grown[windows].layers if windows else []
        base_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)
        memory.append(
            [str(windows), f"{cache.state_bytes:,}", f"{cache.kv_bytes:,}", f"{base_bytes:,}" if windows else "-"]
        )
    return latency, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400, help="timed tokens per setting")
    parser.add_argument("--output", type=Path, default=Path("docs/results/wake.md"), help="where the table goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    latency, memory = measure(arguments.repeats)
    after = [f"after {windows} windows" if windows > 1 else "after 1 window" for windows in WINDOWS]
    write_table(
        arguments.output,
        title="A wake token, and what a session weighs",
        command="make bench",
        intro=f"{machine()}. Qwen3 of 8 layers, 256 channels, 2 inserted Gated DeltaNet layers, window {WINDOW} "
        "tokens, hard eviction, half a window open, batch 1, one thread, float32; "
        f"{arguments.repeats} tokens per setting, in turn in one run. Median (quartiles), and ratio to N = 1 after 1 "
        "window. Sleep itself is not in these figures: it happens once per window, before the token that follows.",
        tables=[
            (["one wake token", *after], latency),
            (["windows read", "state, bytes", "keys and values, bytes", "base's keys and values, bytes"], memory),
        ],
    )
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
