"""What a training saves and pushes beside the weights: cards that are the model's, and files by which it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from small import trainable
from transformers import AutoModelForCausalLM
from transformers import trainer as hf_trainer

from sleepify import card as cards
from sleepify.tasks import Rule110
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments, TaskDataset
from sleepify.training.fitting import write_notes

RESULTS = {"perplexity": 3.5, "exact_match": {"accuracy": 0.25}}


def build(folder: Path, **fields: object) -> SleepTrainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "train_only": "fast_weights", "save_strategy": "no"}
    settings |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    task = TaskDataset(Rule110(width=8, n_strings=2, steps=2))
    arguments = SleepTrainingArguments(**(settings | fields))
    return SleepTrainer(trainable(), arguments, train_dataset=task, data_collator=SleepCollator(0))


class Hub:
    """What is uploaded, in the place of the Hub: each time a folder of its own."""

    def __init__(self, place: Path) -> None:
        self.place, self.uploads = place, 0

    def create_repo(self, repo_id: str, **_: object) -> object:
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path: str, run_as_future: bool, **_: object) -> object:
        self.uploads += 1
        pattern = shutil.ignore_patterns("_*", "checkpoint-*")
        shutil.copytree(folder_path, self.place / str(self.uploads), ignore=pattern)
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()


def test_every_push_of_a_training_can_be_loaded_and_has_the_models_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, out = Hub(tmp_path / "hub"), tmp_path / "out"
    monkeypatch.setattr(hf_trainer, "hf_api", lambda *_, **__: hub)
    # Of a run before; its manifest fits no weights of this one.
    build(out).save_model()
    trainer = build(
        out, save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="me/asleep", hub_always_push=True
    )
    trainer.train()
    write_notes(trainer, None, False, {"results.json": RESULTS})
    assert hub.uploads == 3
    for number in range(1, 4):
        AutoModelForCausalLM.from_pretrained(hub.place / str(number))
        card = ModelCard.load(hub.place / str(number) / "README.md")
        assert "from_pretrained('me/asleep')" in card.content and card.data.library_name == "sleepify"
        assert (hub.place / str(number) / "modeling_sleepify.py").exists()
    assert [each.metric_value for each in card.data.eval_results] == [3.5, 0.25]
    # A checkpoint is loaded from where it lies, not from where it was drafted.
    for number in (1, 2):
        assert (
            f"from_pretrained('{out / f'checkpoint-{number}'}')" in (out / f"checkpoint-{number}/README.md").read_text()
        )


def test_the_card_beside_a_model_tells_results_and_stays_if_somebody_wrote_it(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.save_model()
    # As a trainer does, after the model.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for results in (RESULTS, RESULTS | {"perplexity": 2.0}):
        write_notes(trainer, None, False, {"results.json": results})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.eval_results[0].metric_value == results["perplexity"]
        assert "AutoTokenizer.from_pretrained" in card.content
        assert json.loads((tmp_path / "results.json").read_text()) == results
    (tmp_path / "README.md").write_text("---\nlibrary_name: sleepify\n---\nmine")
    write_notes(trainer, None, False, {"results.json": RESULTS})
    assert (tmp_path / "README.md").read_text().endswith("mine")


def test_what_a_user_tells_the_trainers_card_is_in_the_header(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.create_model_card(language="en", license="mit", tags="mine", dataset="someone/notes", model_name="other")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.language, data.license, data.datasets) == ("en", "mit", "someone/notes")
    assert {"sleepify", "mine"} <= set(data.tags) and data.pipeline_tag == "text-generation"


def test_a_base_that_the_hub_does_not_know_is_no_reason_not_to_push(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def model_info(self, *_: object, **__: object) -> None:
            raise RepositoryNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            )

    monkeypatch.setattr(cards, "HfApi", Api)
    config = trainable().config
    config.base_model_name_or_path = "someone/private"
    assert ModelCard(cards.write_card(config, "me/asleep", online=True)).data.base_model == "someone/private"
