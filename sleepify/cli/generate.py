"""Continue a prompt, sleeping whenever a window is full.

sleepify generate outputs/my-model --prompt "Once upon a time" --max_new_tokens 200
sleepify generate outputs/my-model --prompt_file book.txt --question "Who did it?" --n_loops 6
sleepify generate outputs/rule110_tiny --ids 1 0 1 1 --max_new_tokens 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TextStreamer

from sleepify.config import SleepConfig
from sleepify.conversation import front
from sleepify.devices import device_of
from sleepify.training.evaluate_checkpoint import check_whole, tokenizer_of


def main(argv: Sequence[str]) -> int:
    """Generate, and print what is made; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        generate(arguments)
    except (ValueError, OSError) as error:
        print(f"sleepify generate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sleepify generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="name or path of a checkpoint")
    read = parser.add_argument_group("what is read")
    source = read.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text itself")
    source.add_argument("--prompt_file", type=Path, help="a file that holds it")
    source.add_argument("--ids", type=int, nargs="+", help="token ids, for a model without a tokenizer")
    read.add_argument("--question", help="asked at the end of the text")
    read.add_argument("--chat", action="store_true", help="as a user's message, in the tokenizer's chat template")
    made = parser.add_argument_group("what is made of it")
    made.add_argument("--max_new_tokens", type=int, default=128, help="at most so many tokens (default: 128)")
    made.add_argument(
        "--temperature", type=float, help="draw tokens, flatter above 1; by default, or at 0, the likeliest"
    )
    made.add_argument("--seed", type=int, default=0, help="of the draws")
    slept = parser.add_argument_group("how it sleeps (by default as the checkpoint says)")
    slept.add_argument("--n_loops", type=int, help="N, passes over a full window")
    slept.add_argument("--window_size", type=int, help="L, tokens")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", help="by default an accelerator if there is one")
    where.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; by default as saved")
    where.add_argument("--tokenizer", help="name or path; by default the model's")
    return parser


def generate(arguments: argparse.Namespace) -> None:
    """Read, write on, print.

    Raises:
        ValueError: for a text without a tokenizer, ids with what is said in text, or settings that the model cannot
            have.
    """
    if arguments.ids and (arguments.chat or arguments.question is not None):
        raise ValueError("expected --question and --chat beside a text, got --ids; write all of the prompt as ids")
    check_whole(arguments.model)
    device: Any = device_of(arguments.device)
    tokenizer = None if arguments.ids else tokenizer_of(arguments.model, arguments.tokenizer)
    ids = arguments.ids or _read(arguments, tokenizer)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.temperature is not None:
        options |= {"do_sample": arguments.temperature > 0}
        options |= {"temperature": arguments.temperature} if arguments.temperature > 0 else {}
    if isinstance(model.config, SleepConfig):
        if arguments.window_size is not None:
            model.config.window_size = arguments.window_size
        if arguments.n_loops is not None:
            options["n_loops"] = arguments.n_loops
    elif arguments.n_loops is not None or arguments.window_size is not None:
        raise ValueError(f"expected a model that sleeps for --n_loops and --window_size, got {arguments.model}")
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options["streamer"] = streamer
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([ids], device=device)
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(ids) :].tolist()
    if tokenizer is None:
        print(*made)
    elif "streamer" not in options:
        print(tokenizer.decode(made))


def _read(arguments: argparse.Namespace, tokenizer: Any) -> list[int]:
    """The prompt's ids.

    Raises:
        ValueError: without a tokenizer, a chat template that is asked for, or any token.
    """
    if tokenizer is None:
        raise ValueError(f"expected a tokenizer in {arguments.model}, found none; give --tokenizer, or --ids")
    text = arguments.prompt_file.read_text(encoding="utf-8") if arguments.prompt_file else arguments.prompt
    if arguments.question is not None:
        text = f"{text}\n\n{arguments.question}"
    if not arguments.chat:
        # What a tokenizer puts behind a text would end it.
        begin = front(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else []
        ids = [*begin, *tokenizer.encode(text, add_special_tokens=False)]
    elif getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        raise ValueError("expected a tokenizer with a chat template, got one without; leave out --chat")
    if not ids:
        raise ValueError("expected a prompt of at least one token, got none")
    return list(ids)
