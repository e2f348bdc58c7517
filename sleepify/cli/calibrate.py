"""Find the threshold of n_loops="auto" on a text, for a mean number of passes per sleep.

sleepify calibrate outputs/my-model --text_file held_out.txt --mean_n_loops 3.5
sleepify calibrate outputs/my-model --text_file held_out.txt --mean_n_loops 3.5 --save
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME

from sleepify.calibration import calibrate
from sleepify.devices import device_of
from sleepify.files import written_beside
from sleepify.modeling import SleepForCausalLM
from sleepify.training.evaluate_checkpoint import check_sleeps, tokenizer_of


def main(argv: Sequence[str]) -> int:
    """Calibrate, and print the threshold; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        print(f"{run(arguments):.6g}")
    except (ValueError, OSError) as error:
        print(f"sleepify calibrate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleepify calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="name or path of a checkpoint that sleeps")
    parser.add_argument("--text_file", type=Path, required=True, help="held-out text")
    parser.add_argument("--mean_n_loops", type=float, required=True, help="passes per sleep, from 3 to the model's N")
    parser.add_argument("--context", type=int, help="tokens per piece of the text (default: 8 windows)")
    parser.add_argument("--save", action="store_true", help="write it into the checkpoint's config.json")
    parser.add_argument("--batch_size", type=int, default=8, help="pieces that are read at a time (default: 8)")
    parser.add_argument("--tokenizer", help="name or path; by default the model's")
    parser.add_argument("--device", help="by default an accelerator if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; by default as saved")
    return parser


def run(arguments: argparse.Namespace) -> float:
    """The threshold.

    Raises:
        ValueError: for a model without a tokenizer, a text shorter than a window, a mean that cannot be, or a model
            to save to that is no folder.
    """
    config_file = Path(arguments.model) / CONFIG_NAME
    if arguments.save and not config_file.is_file():
        raise ValueError(f"expected the folder of a checkpoint to save to, found no {config_file}; leave out --save")
    check_sleeps(arguments.model)
    tokenizer = tokenizer_of(arguments.model, arguments.tokenizer)
    if tokenizer is None:
        raise ValueError(f"expected a tokenizer in {arguments.model}, found none; give --tokenizer")
    device = device_of(arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    model: Any = SleepForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device)
    window = model.options().window_size
    context = 8 * window if arguments.context is None else arguments.context
    if context <= window:
        raise ValueError(f"expected a context longer than the window of {window} tokens, got {context}")
    ids = tokenizer.encode(arguments.text_file.read_text(encoding="utf-8"), add_special_tokens=False)
    pieces = [ids[begin : begin + context] for begin in range(0, len(ids), context)]
    rows = [piece for piece in pieces if len(piece) > window]
    if not rows:
        raise ValueError(f"expected a text longer than a window of {window} tokens, got {len(ids)} tokens")
    threshold = calibrate(model, rows, mean_n_loops=arguments.mean_n_loops, batch_size=arguments.batch_size)
    if arguments.save:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        with written_beside(config_file) as draft:
            draft.write_text(json.dumps(settings | {"auto_threshold": threshold}, indent=2, sort_keys=True) + "\n",
                             encoding="utf-8")  # fmt: skip
    return threshold
