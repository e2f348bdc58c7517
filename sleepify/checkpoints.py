"""Saving and loading: whole checkpoints, or inserted weights that belong to a base. No pickle, no remote code.

`SleepForCausalLM` inherits all of it. What makes files belong together is in `manifest`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from sleepify import manifest
from sleepify.card import CARD, read_results, write_card
from sleepify.config import IMPLEMENTATIONS, SleepConfig
from sleepify.errors import CheckpointError
from sleepify.files import discard, draft_of, read_tensors
from sleepify.fingerprint import check_same, check_unchanged
from sleepify.loader import write_loader
from sleepify.peft import check_complete
from sleepify.settings import SETTINGS

WEIGHTS = "fast_weights.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_PUSH = set("repo_id private token revision commit_message commit_description create_pr max_shard_size tags".split())
# Files of an earlier push that would be loaded in the place of what is pushed now.
_REPLACED = ["model*.safetensors", "model*.safetensors.index.json", "shard-*.safetensors", WEIGHTS]
# What a quantized base says of itself, by which peft, trainers and saving go.
_QUANTIZED = {"hf_quantizer", "is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method"}

Model = TypeVar("Model", bound="SleepCheckpoint")


class SleepCheckpoint(PreTrainedModel):
    """What a sleeping model is as files.

    Attributes:
        language_model: the base.
        fast_weights: the inserted layers.
    """

    language_model: PreTrainedModel
    fast_weights: nn.ModuleList

    # --- saving ----------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        fast_weights_only: bool = False,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, with a model card and a manifest of digests.

        Files are written to a draft in ``save_directory`` and renamed when all are whole. A kill between two renames
        leaves a set that `from_pretrained` refuses; the next save, or ``sleepify.manifest.finish_save``, finishes it.
        With ``distributed_checkpoint`` all processes write in place, and what was there is lost first.

        Args:
            save_directory: where to.
            is_main_process: False in all processes but the one that writes.
            state_dict: the weights, where they are not the model's own (gathered from several devices, say).
            push_to_hub: upload what was saved, too.
            fast_weights_only: save the inserted layers alone, with the name, revision and fingerprint of the base.
            distributed_checkpoint: as in transformers.
            kwargs: others of ``PreTrainedModel.save_pretrained``; ``save_original_format`` is off by default.

        Raises:
            CheckpointError: with ``fast_weights_only``, for a base that is no longer what it was.
            ValueError: for a file in the place of the directory, or weights in it that would be lost, of a base or of
                another ``variant``; with ``fast_weights_only``, for no inserted layers.
        """
        directory = Path(save_directory)
        # Names as the modules have them: trainers resume by `load_state_dict`, which knows no others.
        kwargs.setdefault("save_original_format", False)
        hub = {name: kwargs.pop(name) for name in _PUSH - {"max_shard_size"} if name in kwargs}
        if directory.is_file():
            raise ValueError(f"expected a directory to save to, got the file {directory}")
        manifest.check_room(directory, fast_weights_only, kwargs.get("variant"))
        writes = is_main_process and _rank() == 0
        if self._hf_peft_config_loaded:
            return self._save_adapter(directory, writes, state_dict, fast_weights_only, push_to_hub, kwargs)
        if distributed_checkpoint:
            if writes:
                manifest.begin_in_place(directory)
            kwargs |= {"state_dict": state_dict, "push_to_hub": push_to_hub, "distributed_checkpoint": True}
            super().save_pretrained(directory, is_main_process, **kwargs)
            if writes:
                write_loader(directory)
                manifest.write_manifest(directory)
            torch.distributed.barrier()
            return
        if not writes:
            # Where parameters are spread over processes, all take part in gathering them.
            if not fast_weights_only:
                super().save_pretrained(directory, False, state_dict, **kwargs)
            return
        if fast_weights_only:
            self._check_savable_alone()
        draft = manifest.draft_in(directory)
        try:
            if fast_weights_only:
                self._save_alone(draft, self.state_dict() if state_dict is None else state_dict)
            else:
                super().save_pretrained(draft, True, state_dict, **kwargs)
            write_loader(draft)
            if not (directory / CARD).exists():
                card = write_card(
                    SleepConfig.from_pretrained(draft), os.fspath(save_directory), read_results(directory)
                )
                (draft / CARD).write_text(card, encoding="utf-8")
            manifest.write_manifest(draft)
        except BaseException:
            discard(draft)
            raise
        manifest.place(draft, directory)
        if push_to_hub:
            shards = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.push_to_hub(hub.pop("repo_id", directory.name), fast_weights_only, **hub, **shards)

    def _save_adapter(
        self,
        directory: Path,
        writes: bool,
        state_dict: dict[str, Tensor] | None,
        fast_weights_only: bool,
        push_to_hub: bool,
        kwargs: dict[str, Any],
    ) -> None:
        """What `add_adapter` added, in peft's form; the model itself is left out, as transformers does."""
        if fast_weights_only or push_to_hub:
            raise ValueError(
                "expected an adapter to be saved as such, got fast_weights_only or push_to_hub; save it without, "
                "or wrap the model by peft.get_peft_model, whose push_to_hub uploads adapters"
            )
        draft = draft_of(directory / "adapter")
        discard(draft)
        try:
            super().save_pretrained(draft if writes else directory, writes, state_dict, **kwargs)
            if writes:
                for path in sorted(draft.iterdir()):
                    os.replace(path, directory / path.name)
        finally:
            if writes:
                discard(draft)

    def _check_savable_alone(self) -> None:
        if not len(self.fast_weights):
            raise ValueError("expected inserted layers to save alone, got a model without any; save it whole")
        check_unchanged(self.language_model, self.config.base_fingerprint)

    def _save_alone(self, draft: Path, state_dict: dict[str, Tensor]) -> None:
        own = {name: tensor.detach().cpu() for name, tensor in state_dict.items() if name.startswith("fast_weights.")}
        save_file({name: each.contiguous() for name, each in own.items()}, draft / WEIGHTS, metadata={"format": "pt"})
        config = SleepConfig.from_dict(self.config.to_dict())
        config.fast_weights_only, config.dtype = True, self.dtype
        config.architectures = [type(self).__name__]
        config.save_pretrained(draft)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(draft)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, fast_weights_only: bool = False, **kwargs: Any
    ) -> str:
        """Upload checkpoint and model card, in one commit that takes the place of weights pushed before.

        Args:
            repo_id: "user/name".
            fast_weights_only: as in `save_pretrained`.
            kwargs: those of transformers: ``commit_message``, ``commit_description``, ``private``, ``token``,
                ``revision`` (a branch, made if it is not there), ``create_pr``, ``max_shard_size``, ``tags``.
        """
        if unknown := sorted(kwargs.keys() - _PUSH):
            raise TypeError(f"unknown keywords {unknown}; known are {sorted(_PUSH)}")
        api, revision = HfApi(token=kwargs.get("token")), kwargs.get("revision")
        with tempfile.TemporaryDirectory() as folder:
            saving = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.save_pretrained(folder, fast_weights_only=fast_weights_only, **saving)
            repo = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
            if fast_weights_only and repo == self.config.base_model_name_or_path:
                raise ValueError(f"expected a repository of its own for inserted weights, got {repo}, their base's")
            if revision not in (None, "main"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            results = read_results(Path(self.name_or_path)) if self.name_or_path else {}
            config, tags = SleepConfig.from_pretrained(folder), kwargs.get("tags") or ()
            card = write_card(config, repo, results, tags=tags, online=True)
            (Path(folder) / CARD).write_text(card, encoding="utf-8")
            done = api.upload_folder(
                folder_path=folder,
                repo_id=repo,
                revision=revision,
                commit_message=kwargs.get("commit_message") or "Upload a model that sleeps",
                commit_description=kwargs.get("commit_description"),
                create_pr=kwargs.get("create_pr", False),
                delete_patterns=_REPLACED,
            )
        return str(done)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """What transformers calls for a class from a checkpoint's file; of this one it shall copy nothing."""

    # --- loading ---------------------------------------------------------------------------------------------------

    def load_adapter(  # type: ignore[override]
        self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers; an adapter without all its weights, those of inserted layers too, is an error.

        Args:
            peft_model_id: a directory, or a repository on the Hub.
            adapter_name: what to call it.
            kwargs: others of ``PreTrainedModel.load_adapter``.

        Raises:
            CheckpointError: naming the weights that are missing.
        """
        info = super().load_adapter(peft_model_id, adapter_name, **kwargs)
        held = kwargs.get("adapter_state_dict")
        if held is None:
            hub = {key: kwargs[key] for key in _HUB if key in kwargs}
            source: Any = peft_model_id
            file: Any = cached_file(source, "adapter_model.safetensors", **hub)
            held, _ = read_tensors(file)
        names = {name.removeprefix("base_model.model.") for name in held}
        check_complete(self, self.peft_config[adapter_name or "default"], names)
        if missing := set(info.missing_keys):
            # transformers 5.17 leaves out what an adapter trains whole; peft does not.
            from peft import set_peft_model_state_dict

            state = {key.removeprefix("base_model.model."): value for key, value in held.items()}
            loaded: Any = set_peft_model_state_dict(self, state, adapter_name or "default")
            info.missing_keys = missing = missing & set(loaded.missing_keys)
        if missing:
            raise CheckpointError(
                f"expected an adapter with all its weights, {len(missing)} are missing "
                f"({', '.join(sorted(missing)[:3])}...); fetch or save it again"
            )
        return info

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        verify: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; a checkpoint of inserted weights fetches its base and checks that it is the right one.

        Args:
            pretrained_model_name_or_path: a directory, or a repository on the Hub.
            args: those of ``PreTrainedModel.from_pretrained``.
            config: a `SleepConfig` in the place of the saved one. The inserted layers must be those of the weights.
            verify: read the weights through first and compare their digests with those that were saved
                (docs/performance says what it takes); with False, only names, sizes and settings are compared.
            output_loading_info: return the model and what was missing or not expected, as a pair.
            kwargs: others of ``PreTrainedModel.from_pretrained``; without a ``config`` also how to sleep from now on
                (``n_loops``, ``window_size``, ...).

        Raises:
            CheckpointError: for files that are damaged, not of one save, or do not fit their ``config.json``; for
                another base.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in _HUB if key in kwargs}
        if not isinstance(config, SleepConfig):
            changed = {setting: kwargs.pop(setting) for setting in SETTINGS if setting in kwargs}
            config = SleepConfig.from_pretrained(name if config is None else config, **hub, **changed)
        if name is not None:
            manifest.check_with(config, name, hub, verify)
        if config.fast_weights_only:
            if config.base_model_name_or_path is None:
                raise CheckpointError(
                    f"expected {name} to name its base, found none (it was built in memory); "
                    "hand the base over: sleepify(base, fast_weights=path)"
                )
            loading = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
            # transformers' Auto classes put these into the configuration.
            for kind in IMPLEMENTATIONS:
                loading.setdefault(kind, getattr(config, f"_{kind}"))
            base = AutoModelForCausalLM.from_pretrained(
                config.base_model_name_or_path, revision=config.base_model_revision or "main", **loading
            )
            model: Any = cls._join(base, config, name, hub)
            return (model, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else model
        try:
            loaded: Any = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(
                f"expected whole safetensors files in {name}, got a damaged one ({error}); fetch or save it again"
            ) from error
        model, info = loaded
        wrong = {kind: sorted(map(str, keys)) for kind in ("missing_keys", "unexpected_keys") if (keys := info[kind])}
        if wrong:
            shown = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" for kind, keys in wrong.items())
            raise CheckpointError(f"expected the weights of this architecture in {name}, got others ({shown})")
        return (model, info) if output_loading_info else model

    @classmethod
    def from_base(cls: type[Model], config: SleepConfig, base: PreTrainedModel) -> Model:
        """Put the parts together; the inserted layers go where the layers are that they follow.

        Args:
            config: how it sleeps.
            base: a model in memory; it becomes part of the sleeping one, its modules in the modes that they are in.
        """
        model = cls(config, base)
        decoder: Any = base.get_submodule(base.base_model_prefix)
        for layer, index in zip(model.fast_weights, model.config.fast_weights.layers, strict=True):
            beside = next(decoder.layers[index].parameters())
            layer.to(device=beside.device, dtype=base.dtype)
        model.generation_config = base.generation_config
        for name in _QUANTIZED & vars(base).keys():
            setattr(model, name, getattr(base, name))
        for module in set(model.modules()) - set(base.modules()):
            module.training = base.training
        return model

    @classmethod
    def attach(cls: type[Model], base: PreTrainedModel, name: str | os.PathLike, settings: dict[str, Any]) -> Model:
        """Join saved inserted weights to a base that is in memory.

        Args:
            base: the model that they were trained on.
            name: a checkpoint saved with ``fast_weights_only=True``.
            settings: fields of `SleepConfig` that shall differ from the saved ones.

        Raises:
            CheckpointError: for another base (naming both fingerprints), damaged files, or an edited ``config.json``.
        """
        config = SleepConfig.from_pretrained(name)
        manifest.check_with(config, name, {}, verify=True)
        if not config.fast_weights_only:
            raise CheckpointError(
                f"expected {name} to hold inserted weights alone, found a whole model; load it with from_pretrained"
            )
        for key, value in settings.items():
            setattr(config, key, value)
        config.validate_sleep()
        return cls._join(base, config, name, {})

    @classmethod
    def _join(
        cls: type[Model], base: PreTrainedModel, config: SleepConfig, name: str | os.PathLike, hub: dict[str, Any]
    ) -> Model:
        check_same(base, config.base_fingerprint, config.base_model_name_or_path, name)
        file: Any = cached_file(name, WEIGHTS, **hub)
        tensors, _ = read_tensors(file)
        config.text_config = base.config
        for kind in IMPLEMENTATIONS:
            setattr(config, f"_{kind}_internal", getattr(base.config, f"_{kind}"))
        config.fast_weights_only = False
        model = cls.from_base(config, base)
        # Saves of before have none, and take the base's.
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub):
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        expected = {f"fast_weights.{key}": value.shape for key, value in model.fast_weights.state_dict().items()}
        if expected != {key: value.shape for key, value in tensors.items()}:
            differing = sorted(expected.items() ^ {key: value.shape for key, value in tensors.items()}.items())
            raise CheckpointError(
                f"expected in {file} the tensors that {CONFIG_NAME} describes; these differ: {differing[:4]}"
            )
        model.fast_weights.load_state_dict({key.removeprefix("fast_weights."): value for key, value in tensors.items()})
        return model


def _rank() -> int:
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if spread else 0
