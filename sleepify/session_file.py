"""A session as one safetensors file that carries its own digest; read back, it is checked against itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleepify.errors import CheckpointError
from sleepify.files import is_sealed, read_tensors, write_sealed
from sleepify.memory import LayerKey, LayerState, Memory
from sleepify.snapshot import Snapshot

NOTES = "session"
"""What a `Session` notes beside its tensors: its conversation."""
_VERSION = 2
_MANIFEST = "sleep_cache"
_PLACES = ("conv", "recurrent")
_STATE = re.compile(r"(state|start)\.\d+\.[01]\.(conv|recurrent)")
_KV = re.compile(r"(keys|values)\.\d+")
_PER_ROW = ("open_lengths", "retained", "seen", "windows", "passes", "stale", "kv_lengths")
_COUNTS = (*_PER_ROW[:-1], "owner", "columns", "fixed_shapes")
_IDS = re.compile(r"open_ids|digest|pending\.\d+")


def write_session(path: str | os.PathLike, session: Snapshot, notes: Mapping[str, str] | None = None) -> None:
    """Write ``path`` beside and rename it; ``notes`` stay beside the tensors, covered by the digest.

    Ephemeral tokens are left out, as if they had not been read.
    """
    session = session.finished().lasting()
    tensors = {"open_ids": session.open_ids} | {f"pending.{row}": ids for row, ids in enumerate(session.pending)}
    if session.digest is not None:
        tensors["digest"] = session.digest
    for prefix, state in (("state", session.memory.state), ("start", session.at_start)):
        for (index, inserted), layer in state.items():
            parts = zip(_PLACES, layer, strict=True)
            tensors |= {f"{prefix}.{index}.{inserted}.{place}": part for place, part in parts if part is not None}
    for index, (keys, values) in session.memory.kv.items():
        tensors |= {f"keys.{index}": keys, f"values.{index}": values}
    counts = {name: getattr(session, name) for name in _COUNTS} | {"kv_lengths": session.memory.kv_lengths}
    manifest = {"version": _VERSION, "tensors": _shapes(tensors), "counts": counts}
    write_sealed(Path(path), tensors, {**(notes or {}), _MANIFEST: json.dumps(manifest, sort_keys=True)})


def read_session(path: str | os.PathLike, *, verify: bool = True) -> Snapshot:
    """Read what `write_session` wrote.

    Args:
        path: the file.
        verify: compare the digest; with False, only names, shapes and counts are compared with each other.

    Raises:
        CheckpointError: naming what is missing, altered, or does not agree; or for the file of a `Session`, which may
            hold more than its rows.
    """
    session, notes = read_with_notes(path, verify=verify)
    if NOTES in notes:
        raise CheckpointError(f"expected a SleepCache in {path}, got a Session with its text; Session.load reads it")
    return session


def read_with_notes(path: str | os.PathLike, *, verify: bool = True) -> tuple[Snapshot, dict[str, str]]:
    """The same, and the notes that were written with it."""
    tensors, metadata = read_tensors(path)
    manifest = _manifest(path, metadata)
    shapes = _shapes(tensors)
    if shapes != manifest["tensors"]:
        differing = sorted(
            name for name in shapes.keys() | manifest["tensors"] if shapes.get(name) != manifest["tensors"].get(name)
        )
        missing = [name for name in differing if name not in shapes]
        raise _wrong(
            path,
            f"its tensors are not those that its manifest lists: {differing[:4]} differ, {missing[:4]} are missing",
        )
    if verify and not is_sealed(tensors, metadata):
        raise CheckpointError(
            f"expected {path} to have the contents that were saved, found it altered or damaged; fetch it again, or "
            "read the text again (verify=False loads it as it is)"
        )
    counts = manifest["counts"]
    _check_counts(path, counts, tensors.get("open_ids"))
    session = _sorted_out(path, counts, tensors)
    _check_shapes(path, session)
    return session, {name: value for name, value in metadata.items() if name != _MANIFEST}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}


def _wrong(path: str | os.PathLike, what: str) -> CheckpointError:
    return CheckpointError(f"expected a whole session in {path}, but {what}; fetch it again, or read the text again")


def _manifest(path: str | os.PathLike, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        manifest = json.loads(metadata.get(_MANIFEST, "{}"))
        version = manifest.get("version")
    except (ValueError, AttributeError) as error:
        raise _wrong(path, f"its manifest cannot be read ({error})") from error
    if version != _VERSION:
        raise CheckpointError(f"expected a session of version {_VERSION} in {path}, got {version}; read the text again")
    if not all(isinstance(manifest.get(key), dict) for key in ("tensors", "counts")):
        raise _wrong(path, f"its manifest holds {sorted(manifest)}, not tensors and counts")
    return dict(manifest)


def _check_counts(path: str | os.PathLike, counts: dict[str, Any], open_ids: Tensor | None) -> None:
    """Counts against each other and against the ids of the open window."""
    if missing := sorted({*_PER_ROW, *_COUNTS} - counts.keys()):
        raise _wrong(path, f"its counts lack {missing}")
    if open_ids is None or open_ids.dtype != torch.long or open_ids.dim() != 2 or not open_ids.numel():
        raise _wrong(path, "it has no open_ids [B, L] of whole numbers")
    rows, window = open_ids.shape
    lists = {name: counts[name] for name in _PER_ROW}
    for name, values in (lists | {"columns": [counts["columns"]] * rows}).items():
        whole = isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values)
        if not whole or len(values) != rows:
            raise _wrong(path, f"{name} should be {rows} whole numbers from 0 and is {values}")
    for row in range(rows):
        opened, retained, seen, _, _, stale, kept = (counts[name][row] for name in _PER_ROW)
        if not (opened <= window and opened <= seen and retained + (0 if stale else opened) == kept):
            raise _wrong(
                path,
                f"row {row} cannot have seen={seen}, open_lengths={opened}, retained={retained} and kv_lengths={kept} "
                f"with windows of {window}",
            )


def _sorted_out(path: str | os.PathLike, counts: dict[str, Any], tensors: dict[str, Tensor]) -> Snapshot:
    """Every tensor where its name says."""
    states: dict[str, dict[LayerKey, LayerState]] = {"state": {}, "start": {}}
    pairs: dict[int, dict[str, Tensor]] = {}
    ids = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split(".")
        if _STATE.fullmatch(name):
            key = (int(rest[0]), int(rest[1]))
            states[kind][key] = states[kind].get(key, LayerState())._replace(**{rest[2]: tensor})
        elif _KV.fullmatch(name):
            pairs.setdefault(int(rest[0]), {})[kind] = tensor
        elif tensor.dtype == torch.long and _IDS.fullmatch(name):
            ids[name] = tensor
        else:
            raise _wrong(path, f"no session has a tensor {name} of {tensor.dtype}")
    for index, pair in pairs.items():
        if pair.keys() != {"keys", "values"}:
            raise _wrong(path, f"layer {index} has {sorted(pair)}, not keys and values")
    kv = {index: (pair["keys"], pair["values"]) for index, pair in pairs.items()}
    per_row: dict[str, Any] = {name: tuple(counts[name]) for name in _PER_ROW}
    lengths = per_row.pop("kv_lengths")
    per_row["stale"] = tuple(map(bool, per_row["stale"]))
    return Snapshot(
        owner=counts["owner"],
        memory=Memory(len(lengths), states["state"], kv, lengths),
        at_start=states["start"],
        ephemeral=((),) * len(lengths),
        open_ids=ids["open_ids"],
        pending=tuple(ids[name] for row in range(len(lengths)) if (name := f"pending.{row}") in ids),
        digest=ids.get("digest"),
        columns=counts["columns"],
        fixed_shapes=bool(counts["fixed_shapes"]),
        **per_row,
    )


def _check_shapes(path: str | os.PathLike, session: Snapshot) -> None:
    """Shapes against the counts."""
    memory = session.memory
    for tensor in (*memory.tensors(), *Memory(memory.batch_size, session.at_start).tensors()):
        if tensor.shape[0] != memory.batch_size:
            raise _wrong(path, f"a state or keys have the shape {tuple(tensor.shape)}, not {memory.batch_size} rows")
    for (index, _), layer in (*memory.state.items(), *session.at_start.items()):
        dtype = torch.float32 if layer.recurrent is None else layer.recurrent.dtype
        if torch.promote_types(dtype, torch.float32) != dtype:
            raise CheckpointError(f"expected a state of float32 or wider in {path}, got {dtype} (layer {index})")
    if any(session.windows) and memory.state.keys() != session.at_start.keys():
        raise _wrong(path, "rows have slept, and the states now and at the window's start are of different layers")
    for index, (keys, values) in memory.kv.items():
        if not (keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3]):
            raise _wrong(path, f"layer {index} has keys {tuple(keys.shape)} and values {tuple(values.shape)}")
        if keys.shape[2] != memory.columns or keys.shape[2] < max(memory.kv_lengths):
            raise _wrong(
                path,
                f"layer {index} has {keys.shape[2]} columns of keys, others {memory.columns}, rows need "
                f"{max(memory.kv_lengths)}",
            )
