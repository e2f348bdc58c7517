"""Jet-Nemotron 2B and Ouro 1.4B at full size, from random weights: a forward, a sleep and a backward pass.

    python -m benchmarks.full_size [--models ouro_1.4b jet_nemotron_2b] [--tokens 4000] [--window_size 2000]

On one GPU; prints time and peak memory of each part, and which kernels ran. ``--device cpu --tiny`` runs the same code
on models a thousand times smaller.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.report import machine
from sleepify import SleepForCausalLM, ops, sleepify

# As published (config.json of jet-ai/Jet-Nemotron-2B and ByteDance/Ouro-1.4B).
PUBLISHED: dict[str, dict[str, Any]] = {
    "jet_nemotron_2b": {
        "model_type": "jet_nemotron",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "layer_types": [{14: "attn", 19: "attn", 20: "swa", 21: "swa"}.get(i, "jet") for i in range(28)],
        "efficient_attention_config": {
            "swa": {"window_size": 1152},
            "jet": {
                "mode": "chunk",
                "num_heads": 12,
                "head_dim": 96,
                "expand_v": 2.6666666667,
                "conv_size": 4,
                "dconv_generator_reduction": 8,
                "norm_eps": "1e-5",
            },
        },
    },
    "ouro_1.4b": {
        "model_type": "ouro",
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 65536,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "total_ut_steps": 4,
    },
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}


def build(name: str, device: str, dtype: torch.dtype, tiny: bool = False, **sleep: Any) -> SleepForCausalLM:
    """A published architecture with random weights, made to sleep.

    Args:
        name: one of `PUBLISHED`.
        device: "cuda", "cpu" or "meta".
        dtype: of the weights.
        tiny: four layers, one of each kind at least, and narrow.
        sleep: settings of `sleepify`.
    """
    fields = dict(PUBLISHED[name])
    if tiny:
        fields |= TINY | {"head_dim": 16, "num_key_value_heads": 4 if name.startswith("ouro") else 2}
        if "efficient_attention_config" in fields:
            jet = fields["efficient_attention_config"]["jet"] | {"num_heads": 2, "head_dim": 12, "expand_v": 2}
            fields["efficient_attention_config"] = {"swa": {"window_size": 1152}, "jet": jet}
            fields["layer_types"] = ["jet", "attn", "jet", "swa"]
            fields.pop("head_dim")
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    with torch.device(device):
        return sleepify(AutoModelForCausalLM.from_config(config, dtype=dtype), **sleep)


def run(name: str, arguments: argparse.Namespace) -> None:
    """Print what each part takes."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sleep = {"window_size": arguments.window_size, "checkpoint": arguments.checkpoint}
    if arguments.n_loops:
        sleep["n_loops"] = arguments.n_loops
    else:
        sleep["n_loops"] = 6 if name.startswith("jet") else 4
    model = build(name, arguments.device, dtype, arguments.tiny, **sleep).train()
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{name}: {n_parameters:,} parameters, N = {model.config.n_loops}, L = {model.config.window_size}")
    ids = torch.randint(0, model.config.text_config.vocab_size, (arguments.batch_size, arguments.tokens), device=device)
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]

    def forward() -> None:
        with torch.no_grad():
            model(ids, logits_to_keep=1, use_cache=True)

    def sleep_once() -> None:
        with torch.no_grad():
            cache = model(ids[:, : arguments.window_size], logits_to_keep=1, use_cache=True).past_key_values
            model.sleep(cache)

    def backward() -> None:
        model.zero_grad()
        model(ids, labels=labels).loss.backward()

    for part, function in (("forward", forward), ("a window and its sleep", sleep_once), ("training step", backward)):
        seconds, peak = _measure(function, device)
        memory = f", peak {peak / 2**30:.1f} GiB" if peak else ""
        print(f"  {part}: {seconds:.2f} s, {arguments.batch_size * arguments.tokens / seconds:,.0f} tokens/s{memory}")
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    print("  gradients finite" if not bad else f"  NOT FINITE: {bad[:5]}")


def _measure(function: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Seconds of the second call (the first compiles kernels), and peak bytes on a GPU."""
    function()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() if cuda else 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(PUBLISHED), default=sorted(PUBLISHED))
    parser.add_argument("--tokens", type=int, default=4000, help="T")
    parser.add_argument("--window_size", type=int, default=2000, help="L")
    parser.add_argument("--n_loops", type=int, help="N; by default 6 for Jet-Nemotron and 4 for Ouro")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--checkpoint", choices=["none", "window", "loop", "selective"], default="loop")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="narrow models, to try the script")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device found; --device cpu --tiny tries the script without one")
    print(machine())
    for op, implementation in ops.describe().items():
        print(f"  {op}: {implementation}")
    for name in arguments.models:
        run(name, arguments)


if __name__ == "__main__":
    main()
