"""Which files of a checkpoint belong together: a manifest with their digests and the settings they were trained with.

Saving puts the manifest in its place first and the weights last, so that between any two renames what lies in the
directory is the old set, or is told from the new one by its digests. A draft stays until all of it is in place, so that
a save that was cut short can be finished.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from sleepify.config import SleepConfig, essential
from sleepify.errors import CheckpointError
from sleepify.files import digests_of, discard, written_beside

MANIFEST = "sleep_manifest.json"
_VERSION = 1
_DRAFT = ".draft"
# What transformers, its distributed checkpoints and we write and load: whole or in parts, with an index, of a variant.
_WEIGHTS = re.compile(
    r"(model|fast_weights|shard-[\w-]+)(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?\.safetensors"
    r"(\.index(\.(?P<of>[^.]+))?\.json)?"
)
# Fields of config.json that belong to the weights. The others say how the model sleeps, and may be edited.
_TRAINED_WITH = (
    "model_type", "text_config", "fast_weights", "fast_weights_only", "base_fingerprint", "tie_word_embeddings",
)  # fmt: skip


def is_weights(name: str) -> bool:
    """Whether a file of this name may be taken for the weights of a checkpoint.

    Only these have digests. The loader file is no matter of trust in them: who lets it run has run it before.
    """
    return _WEIGHTS.fullmatch(name) is not None


# --- saving ---


def check_room(directory: Path, alone: bool, variant: str | None) -> None:
    """See that a save to ``directory`` takes the place of nothing but an earlier save of the same kind.

    Args:
        directory: where to.
        alone: whether it is of inserted weights, which need their base elsewhere.
        variant: as in ``save_pretrained``.

    Raises:
        ValueError: for weights of a base, or of another variant, that would be lost.
    """
    if not directory.is_dir():
        return
    found = {path.name: match for path in directory.iterdir() if (match := _WEIGHTS.fullmatch(path.name))}
    whole = sorted(name for name in found if not name.startswith("fast_weights"))
    if alone and whole and not (directory / MANIFEST).is_file():
        raise ValueError(
            f"expected a directory of its own for inserted weights, got {directory} with {whole} in it, which would be "
            "lost; save to another, or the whole model"
        )
    if others := sorted(name for name, match in found.items() if (match["variant"] or match["of"]) != variant):
        raise ValueError(
            f"expected a directory without weights of another variant, got {directory} with {others} in it; save "
            f"variant={variant!r} to another, or take them away: files that were not saved together do not load"
        )


def draft_in(directory: Path) -> Path:
    """A new draft folder for a save to ``directory``, inside of it: surely on the same disk.

    What an earlier save, cut short, left to be put in place is put there first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    finish_save(directory)
    draft = directory / _DRAFT
    draft.mkdir()
    return draft


def finish_save(directory: str | os.PathLike) -> bool:
    """Finish a save that was cut short while its files took their places.

    Args:
        directory: of the checkpoint.

    Returns:
        Whether there was one. If not, what was left of a save that had not written all its files is removed.
    """
    directory = Path(directory)
    draft = directory / _DRAFT
    if (draft / MANIFEST).is_file():
        place(draft, directory)
        return True
    discard(draft)
    return False


def write_manifest(folder: Path) -> None:
    """Describe the weights in ``folder`` and the configuration beside them."""
    paths = sorted(path for path in folder.iterdir() if is_weights(path.name))
    described = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests_of(paths), strict=True)
    }
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    _write(folder, {"version": _VERSION, "files": described, "config": config})


def begin_in_place(directory: Path) -> None:
    """Say that a set is being written in ``directory`` itself; nothing loads until `write_manifest` says what it is."""
    directory.mkdir(parents=True, exist_ok=True)
    discard(directory / _DRAFT)
    _write(directory, {"version": _VERSION, "files": None, "config": None})
    for path in directory.iterdir():
        if is_weights(path.name):
            path.unlink()


def place(draft: Path, directory: Path) -> None:
    """Move a whole draft, with its manifest, to where it belongs. May be repeated after it was cut short."""
    with written_beside(directory / MANIFEST) as copy:
        copy.write_bytes((draft / MANIFEST).read_bytes())
    listed = json.loads((draft / MANIFEST).read_text(encoding="utf-8"))["files"]
    names = [path.name for path in draft.iterdir() if path.name != MANIFEST]
    for name in sorted(names, key=lambda name: (name in listed, name)):
        os.replace(draft / name, directory / name)
    for path in directory.iterdir():
        if is_weights(path.name) and path.name not in listed:
            path.unlink()
    discard(draft)


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    with written_beside(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- loading ---


def check(name: str | os.PathLike, hub: dict[str, Any] | None = None, *, digests: bool = True) -> SleepConfig | None:
    """Check that the files of a checkpoint are those that were saved together.

    Args:
        name: a directory, or a repository on the Hub.
        hub: ``revision``, ``subfolder``, ``token``... as for ``from_pretrained``.
        digests: read the weights through and compare their digests; otherwise only names and sizes are compared.

    Returns:
        The configuration that was saved, or None for a checkpoint without a manifest, of which nothing is known.

    Raises:
        CheckpointError: naming the file or the setting that differs, and what to do.
    """
    hub = hub or {}
    found = cached_file(name, MANIFEST, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        return None
    manifest = _read(Path(found))
    directory = Path(name) / hub.get("subfolder", "")
    mend = _how_to_mend(directory)
    files = manifest["files"]
    if files is None:
        raise CheckpointError(f"expected a finished save in {name}, found one that was cut short; {mend}")
    if directory.is_dir() and (
        others := sorted(path.name for path in directory.iterdir() if is_weights(path.name) and path.name not in files)
    ):
        raise CheckpointError(
            f"expected in {name} the weights {sorted(files)} that were saved together, found {others} beside them, "
            f"which could be loaded in their place; {mend}, or take them away"
        )
    _compare_settings(name, hub, manifest["config"], mend)
    paths = [_of_the_right_size(name, file, described["bytes"], hub, mend) for file, described in files.items()]
    for (file, described), digest in zip(files.items(), digests_of(paths) if digests else (), strict=digests):
        if digest != described["sha256"]:
            raise CheckpointError(
                f"expected {file} in {name} to have the sha256 {described['sha256'][:12]}... as when it was saved, "
                f"got {digest[:12]}...: it was altered, is damaged, or of another save; {mend} "
                "(verify=False loads it as it is)"
            )
    return _from_json(manifest["config"])


def check_with(config: SleepConfig, name: str | os.PathLike, hub: dict[str, Any], verify: bool) -> None:
    """Check the files, and that ``config``, wherever it comes from, has the inserted layers that were trained."""
    saved = check(name, hub, digests=verify)
    if saved is None:
        warnings.warn(
            f"{name} has no {MANIFEST}: it was saved before there were any, or not all of it was fetched. "
            "Damage to it would not be noticed; save it again to have it checked",
            stacklevel=3,
        )
    elif config.fast_weights != saved.fast_weights:
        raise CheckpointError(
            f"expected the inserted layers that {name} was trained with, {saved.fast_weights}, got "
            f"{config.fast_weights}; change only how it sleeps (n_loops, window_size, eviction...)"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files, config = (manifest[key] for key in ("version", "files", "config"))
        good = files is None or (
            isinstance(config, dict) and all({"bytes", "sha256"} <= described.keys() for described in files.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"expected a readable manifest {path}, got {error!r}; fetch or save it again") from error
    if version != _VERSION or not good:
        raise CheckpointError(
            f"expected a manifest of version {_VERSION} in {path}, got version {version!r} with {sorted(manifest)}; "
            "install the sleepify that wrote it, or fetch or save it again"
        )
    return dict(manifest)


def _how_to_mend(directory: Path) -> str:
    if (directory / _DRAFT / MANIFEST).is_file():
        return (
            "wait for the save that is under way, or if it was cut short finish it with "
            f"sleepify.manifest.finish_save({str(directory)!r})"
        )
    return "fetch or save it again"


def _of_the_right_size(name: str | os.PathLike, file: str, expected: int, hub: dict[str, Any], mend: str) -> Path:
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        raise CheckpointError(f"expected {file} in {name}, as its {MANIFEST} says, found no such file; {mend}")
    size = os.path.getsize(found)
    if size != expected:
        raise CheckpointError(
            f"expected {file} in {name} to have {expected:,} bytes as when it was saved, got {size:,}: it is damaged, "
            f"or of another save; {mend}"
        )
    return Path(found)


def _compare_settings(name: str | os.PathLike, hub: dict[str, Any], saved: dict[str, Any], mend: str) -> None:
    """config.json may be edited, but not in what the weights were trained with, and nothing may be lost from it."""
    found = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        raise CheckpointError(f"expected {CONFIG_NAME} in {name}, found no such file; {mend}")
    try:
        present = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"expected a readable {CONFIG_NAME} in {name}, got {error!r}; {mend}") from error
    differing = [f"{key} (it was {value!r}) is gone" for key, value in saved.items() if key not in present]
    then, now = _trained_with(saved), _trained_with(present)
    for key in _TRAINED_WITH:
        differing += _differences(key, then.get(key), now.get(key))
    if differing:
        raise CheckpointError(
            f"expected {CONFIG_NAME} in {name} to fit the weights beside it, got changes: {', '.join(differing[:4])}; "
            f"take them back (n_loops, window_size, eviction and the like may be edited), or {mend}"
        )


def _from_json(config: dict[str, Any]) -> SleepConfig:
    """A configuration out of its JSON, in which transformers writes infinity (a limit of some bases) as a dict."""
    return SleepConfig.from_dict(SleepConfig._decode_special_floats(deepcopy(config)))


def _trained_with(config: dict[str, Any]) -> dict[str, Any]:
    """As this version reads them, so that a default that it writes out is no change."""
    read = _from_json(config).to_dict()
    kept = {key: read.get(key) for key in _TRAINED_WITH} | {"model_type": config.get("model_type")}
    kept["text_config"] = essential(kept["text_config"] or {})
    # Through JSON, where tuples are lists.
    return dict(json.loads(json.dumps(kept, default=str)))


def _differences(key: str, then: Any, now: Any) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        names = sorted(then.keys() | now.keys())
        return [line for name in names for line in _differences(f"{key}.{name}", then.get(name), now.get(name))]
    return [] if then == now else [f"{key} was {then!r} when it was saved and is {now!r}"]
