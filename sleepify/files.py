"""Files that are whole or not there: written beside and renamed, with digests, read with clear errors."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleepify.errors import CheckpointError

_PIECE = 1 << 20
_READERS = 4
_SEAL = "sha256"


# --- writing ---


def draft_of(path: Path) -> Path:
    """Where ``path`` is written before it takes its place: always the same, so that what a kill left is found."""
    return path.with_name(f".{path.name}.draft")


def discard(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there; several processes may do so at once."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """The name of a draft to write, a file of the same ending, which takes the place of ``path`` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# --- digests ---


def digests_of(paths: Sequence[Path]) -> list[str]:
    """sha256 of files of any size: some at a time, in pieces of a mebibyte."""
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(_digest_of_file, paths))


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    piece = bytearray(_PIECE)
    with open(path, "rb", buffering=0) as opened:
        while count := opened.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


def _digest_of_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- tensors ---


def write_sealed(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file that carries the digest of all that is in it.

    Args:
        path: the file, which is replaced as a whole.
        tensors: of any device; brought to the CPU.
        metadata: kept with them, and covered by the digest.
    """
    # A clone, because safetensors refuses tensors that share memory.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with written_beside(path) as draft:
        save_file(whole, draft, metadata=metadata | {_SEAL: _digest_of_tensors(whole, metadata)})


def is_sealed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    """Whether tensors and metadata are what `write_sealed` wrote."""
    rest = {name: value for name, value in metadata.items() if name != _SEAL}
    return metadata.get(_SEAL) == _digest_of_tensors(tensors, rest)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if it is cut short, or no such file at all.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"expected a whole safetensors file {path}, got a damaged one ({error}); fetch or save it again"
        ) from error
