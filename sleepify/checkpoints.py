"""Saving and loading: whole checkpoints, or inserted weights that belong to a base. No pickle, no remote code.

Files are written beside and renamed, so that a full disk or a kill leaves what was there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from sleepify.card import write_card
from sleepify.config import SleepConfig
from sleepify.errors import CheckpointError

if TYPE_CHECKING:
    from sleepify.modeling import SleepForCausalLM

WEIGHTS = "fast_weights.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_SAMPLES = 64


def fingerprint(model: PreTrainedModel) -> str | None:
    """What tells one base from another: sha256 over names, shapes and a sample of every parameter.

    Values are compared in bfloat16, so that a base loaded in float32 and in bfloat16 is the same base. None where
    weights cannot be seen (on the meta device, or partitioned by ZeRO-3).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta" or hasattr(parameter, "ds_id"):
            return None
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


# --- saving ---


def save(
    model: SleepForCausalLM,
    inherited: Callable[..., None],
    directory: str | os.PathLike,
    *args: Any,
    fast_weights_only: bool = False,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """See `SleepForCausalLM.save_pretrained`."""
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"expected a directory to save to, got the file {directory}")
    if not kwargs.get("is_main_process", True) or kwargs.get("distributed_checkpoint"):
        # Other ranks write nothing, or all of them write one file together.
        inherited(directory, *args, **kwargs)
        return
    if fast_weights_only:
        _check_savable_alone(model)
    with _beside(directory) as draft:
        if fast_weights_only:
            _save_alone(model, draft, kwargs.get("state_dict"))
        else:
            inherited(draft, *args, **kwargs)
        if not (directory / "README.md").exists():
            (draft / "README.md").write_text(write_card(SleepConfig.from_pretrained(draft)), encoding="utf-8")
    if push_to_hub:
        push(model, kwargs.get("repo_id", directory.name), fast_weights_only=fast_weights_only)


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """A draft folder next to ``directory``, whose files take their places there when all are written."""
    directory.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.resolve().parent))
    try:
        yield draft
        written = {path.name for path in draft.iterdir()}
        # config.json last: it is what says that the rest is there.
        for name in sorted(written, key=lambda name: (name == "config.json", name)):
            os.replace(draft / name, directory / name)
        for old in directory.glob("*.safetensors*"):
            if old.name not in written and old.name.startswith(("model", "fast_weights")):
                old.unlink()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_savable_alone(model: SleepForCausalLM) -> None:
    if not len(model.fast_weights):
        raise ValueError("expected inserted layers to save alone, got a model without any; save it whole")
    now, then = fingerprint(model.language_model), model.config.base_fingerprint
    if now != then:
        raise CheckpointError(
            f"expected the base to be as it was when sleep was added (fingerprint {then}), got {now}: it was trained "
            "or resized since; save the whole model, without fast_weights_only"
        )


def _save_alone(model: SleepForCausalLM, draft: Path, state_dict: dict[str, Tensor] | None) -> None:
    whole = model.state_dict() if state_dict is None else state_dict
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in whole.items() if name.startswith("fast_weights.")
    }
    save_file(tensors, draft / WEIGHTS, metadata={"format": "pt", "sha256": _digest(tensors)})
    config = SleepConfig.from_dict(model.config.to_dict())
    config.fast_weights_only, config.dtype = True, model.dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(draft)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def push(model: SleepForCausalLM, repo_id: str, *, fast_weights_only: bool = False, **kwargs: Any) -> str:
    """See `SleepForCausalLM.push_to_hub`."""
    known = {"private", "token", "revision", "commit_message", "create_pr", "max_shard_size"}
    if unknown := sorted(kwargs.keys() - known):
        raise TypeError(f"unknown keywords {unknown}; known are {sorted(known)}")
    api = HfApi(token=kwargs.get("token"))
    with tempfile.TemporaryDirectory() as folder:
        saving = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
        model.save_pretrained(folder, fast_weights_only=fast_weights_only, **saving)
        card = write_card(SleepConfig.from_pretrained(folder), online=True)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        repo = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
        done = api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            revision=kwargs.get("revision"),
            commit_message=kwargs.get("commit_message", "Upload a model that sleeps"),
            create_pr=kwargs.get("create_pr", False),
        )
    return str(done)


# --- loading ---


def load(
    cls: type[SleepForCausalLM],
    inherited: Callable[..., Any],
    name: Any,
    *args: Any,
    config: SleepConfig | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """See `SleepForCausalLM.from_pretrained`."""
    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    if not isinstance(config, SleepConfig):
        config = SleepConfig.from_pretrained(name if config is None else config, **hub)
    if config.fast_weights_only:
        if config.base_model_name_or_path is None:
            raise CheckpointError(
                f"expected {name} to name its base, found none (it was built in memory); "
                "hand the base over: sleepify(base, fast_weights=path)"
            )
        loading = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        base = AutoModelForCausalLM.from_pretrained(
            config.base_model_name_or_path, revision=config.base_model_revision or "main", **loading
        )
        model = _join(base, config, name, hub)
        return (model, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else model
    try:
        model, info = inherited(name, *args, config=config, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(
            f"expected whole safetensors files in {name}, got a damaged one ({error}); fetch or save it again"
        ) from error
    wrong = {kind: sorted(map(str, keys)) for kind in ("missing_keys", "unexpected_keys") if (keys := info[kind])}
    if wrong:
        shown = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" for kind, keys in wrong.items())
        raise CheckpointError(f"expected the weights of this architecture in {name}, got others ({shown})")
    return (model, info) if output_loading_info else model


def attach(base: PreTrainedModel, name: str | os.PathLike, settings: dict[str, Any]) -> SleepForCausalLM:
    """Join saved inserted weights to a base that is in memory.

    Args:
        base: the model that they were trained on.
        name: a checkpoint saved with ``fast_weights_only=True``.
        settings: fields of `SleepConfig` that shall differ from the saved ones.

    Raises:
        CheckpointError: for another base (naming both fingerprints) or a damaged file.
    """
    config = SleepConfig.from_pretrained(name)
    if not config.fast_weights_only:
        raise CheckpointError(
            f"expected {name} to hold inserted weights alone, found a whole model; load it with from_pretrained"
        )
    for key, value in settings.items():
        setattr(config, key, value)
    config.validate_sleep()
    return _join(base, config, name, {})


def _join(base: PreTrainedModel, config: SleepConfig, name: Any, hub: dict[str, Any]) -> SleepForCausalLM:
    from sleepify.retrofit import build

    found = fingerprint(base)
    if found is not None and found != config.base_fingerprint:
        raise CheckpointError(
            f"expected the base with fingerprint {config.base_fingerprint} "
            f"({config.base_model_name_or_path or 'built in memory'}), got one with {found}; load the base that "
            f"{name} was trained on"
        )
    file = cached_file(name, WEIGHTS, **hub)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            stated = (opened.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise CheckpointError(f"expected a whole file {file}, got a damaged one ({error}); fetch it again") from error
    if stated != _digest(tensors):
        raise CheckpointError(f"expected {file} to have the contents that were saved, found it altered; fetch it again")
    config.text_config = base.config
    config.fast_weights_only = False
    model = build(config, base)
    expected = {f"fast_weights.{key}": value.shape for key, value in model.fast_weights.state_dict().items()}
    if expected != {key: value.shape for key, value in tensors.items()}:
        differing = sorted(expected.items() ^ {key: value.shape for key, value in tensors.items()}.items())
        raise CheckpointError(
            f"expected in {file} the tensors that config.json describes; these differ: {differing[:4]}"
        )
    model.fast_weights.load_state_dict({key.removeprefix("fast_weights."): value for key, value in tensors.items()})
    return model
