"""What is installed, which code runs on this machine, and what slows it down."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable, Sequence

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sleepify.hosts import FAMILIES, Host
from sleepify.ops import describe
from sleepify.version import __version__

OPTIONAL = ("flash-linear-attention", "causal-conv1d", "flash-attn")
INSTALL = 'pip install "sleepify[gpu]"'


def main(argv: Sequence[str]) -> int:
    """Print the report; the exit code."""
    argparse.ArgumentParser(prog="sleepify doctor", description=__doc__).parse_args(argv)
    print("\n".join(doctor()))
    return 0


def doctor() -> list[str]:
    """The report, line by line."""
    on_cuda = torch.cuda.is_available()
    operations = _operations("cuda" if on_cuda else "cpu")
    problems = _problems(on_cuda, operations)
    return [
        *_table("versions", _versions()),
        "",
        *_table("device", [_device(on_cuda)]),
        "",
        *_table("operations on this device", operations.items()),
        "",
        "slow or broken here" if problems else "nothing slow or broken here",
        *(f"  - {problem}" for problem in problems),
        "",
        *_table("families of base models with tests (others are checked when they are given sleep)", _families()),
    ]


def _versions() -> list[tuple[str, str]]:
    packages = ("torch", "transformers", *OPTIONAL)
    installed = [(package, installed_version(package) or "not installed") for package in packages]
    return [("sleepify", __version__), ("python", platform.python_version()), *installed]


def installed_version(package: str) -> str | None:
    """The version of a distribution, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(on_cuda: bool) -> tuple[str, str]:
    if on_cuda:
        return "cuda", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return "cpu", f"threads: {torch.get_num_threads()}"


def _operations(device: str) -> dict[str, str]:
    """What `describe` says of this device, by operation."""
    suffix = f" on {device}"
    return {name.removesuffix(suffix): how for name, how in describe().items() if name.endswith(suffix)}


def _problems(on_cuda: bool, operations: dict[str, str]) -> list[str]:
    """What takes a slow path or fails here, and what to do about it."""
    if on_cuda:
        problems = []
        for name, how in operations.items():
            if "not installed" in how:
                problems.append(f"{name} runs in plain PyTorch: {INSTALL}")
            elif "does not load" in how:
                problems.append(f"{name} runs in plain PyTorch, its kernel does not load: reinstall it for this torch")
        if installed_version("flash-linear-attention") is None:
            problems.append(f"recurrent layers of transformers' hybrids run in plain PyTorch too: {INSTALL}")
        return problems
    if torch.version.cuda is not None:
        reason = f"this torch is built for CUDA {torch.version.cuda} but sees no GPU: see that nvidia-smi lists one"
    else:
        reason = "this torch is built without CUDA: with a GPU, install a torch that is built for it"
    problems = [f"everything runs on the CPU, which is enough for tests and small models; {reason}"]
    if installed_version("flash-linear-attention") and importlib.util.find_spec("triton") is not None:
        problems.append(
            "flash-linear-attention is installed, and recurrent layers of transformers' hybrids call it on the CPU "
            "too, where Triton fails: pip uninstall flash-linear-attention fla-core"
        )
    return problems


def _families() -> list[tuple[str, str]]:
    def driver(family: str, host: type[Host]) -> str:
        if family not in CONFIG_MAPPING:
            return "this transformers does not know it"
        return "generic driver" if host is Host else f"its own driver, {host.__name__}"

    return [(family, driver(family, host)) for family, host in FAMILIES.items()]


def _table(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
