"""What lies beside a model that a training saves and pushes: its card, and the files without which it cannot be loaded.

transformers' Trainer writes a card of its own over the model's, and uploads of a checkpoint only the files that it
knows by name.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from transformers import Trainer

from sleepify.card import CARD, read_results, renewed, write_card
from sleepify.config import SleepConfig
from sleepify.files import written_beside
from sleepify.loader import LOADER
from sleepify.manifest import MANIFEST
from sleepify.modeling import SleepForCausalLM


class SleepPushes(Trainer):
    """A Trainer whose model keeps its own card, and whose pushes can be loaded, those on the way too."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of a model that sleeps, with the repository's name and what ``results.json`` says; of any other
        model (an adapter, a plain one) the Trainer's.

        Args:
            args, kwargs: those of ``Trainer.create_model_card``. ``language``, ``license``, ``tags`` and ``dataset`` go
                into the header, the others say what the card tells anyway.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, SleepForCausalLM):
            super().create_model_card(*args, **kwargs)
            return
        if not self.is_world_process_zero():
            return
        told = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        folder, tags = Path(str(self.args.output_dir)), told.get("tags") or ()
        text = write_card(
            cast(SleepConfig, model.config),
            self.hub_model_id or str(folder),
            read_results(folder),
            tags=[tags] if isinstance(tags, str) else tags,
            online=self.hub_model_id is not None,
        )
        card = ModelCard(text)
        for name, ours in (("language", "language"), ("license", "license"), ("dataset", "datasets")):
            if told.get(name) is not None:
                setattr(card.data, ours, told[name])
        with written_beside(folder / CARD) as draft:
            draft.write_text(str(card), encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a draft is not pushed, `push_checkpoint` pushes what has become of it."""

    def name_card(self, draft: Path, folder: Path) -> None:
        """Have the card of a checkpoint tell the place where it will lie, not that of the draft."""
        with renewed(draft, str(draft), str(folder)):
            pass

    def push_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint as the Trainer does, with the files that it leaves out."""
        if self.is_world_process_zero():
            there = [name for name in (LOADER, MANIFEST) if (folder / name).exists()]
            for name in there:
                shutil.copy(folder / name, Path(str(self.args.output_dir)) / name)
            if there:
                self.create_model_card()
        super()._push_from_checkpoint(str(folder))
