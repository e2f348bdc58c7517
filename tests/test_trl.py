"""TRL's trainers on models that sleep: each gives what the model itself gives, or refuses by name.

They run where TRL is installed, in every version of it that docs/compatibility.md names.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset, load_from_disk
from families import FAMILIES, VOCAB, tokens
from small import trainable
from tolerances import FLOAT32, assert_close
from worded import words

from sleepify import SleepCache, SleepForCausalLM, lora_config

trl = pytest.importorskip("trl", reason="TRL is not installed")

IGNORE = -100
TEXTS = [{"text": " ".join(f"w{6 + (i * 7 + j) % 80}" for j in range(12 + i))} for i in range(6)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": " ".join(f"w{6 + (i * 7 + j) % 80}" for j in range(9 + i))},
            {"role": "assistant", "content": f"w{20 + i} w{30 + i}"},
        ]
    }
    for i in range(6)
]
PAIRS = [{"prompt": f"w{20 + i} w8 w9 w10 w11", "completion": f" w{30 + i} w{40 + i}"} for i in range(6)]
TURNS = [
    {
        "prompt": [{"role": "user", "content": pair["prompt"] * 2}],
        "completion": [{"role": "assistant", "content": pair["completion"]}],
    }
    for pair in PAIRS
]
PREFERENCES = [
    {"prompt": f"w{20 + i} w8 w9 w10 w11 w12 w13 w14 w15", "chosen": f" w{30 + i} w{40 + i}", "rejected": f" w{31 + i}"}
    for i in range(6)
]
PROMPTS = [{"prompt": " ".join(f"w{20 + i + j}" for j in range(7 + i))} for i in range(6)]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": place % 2 == 0}
    for place, row in enumerate(PREFERENCES)
]
PACKED = {"packing": True, "max_length": 32}


def make(kind: str, folder: Path, rows: Any, model: Any = None, eval_rows: Any = None, **settings: Any) -> Any:
    """A trainer of TRL by its name without "Trainer": what is no field of its configuration goes to the trainer."""
    common = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "max_steps": 2, "logging_steps": 1}
    common |= {"per_device_train_batch_size": 3, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    own = {
        name: settings.pop(name)
        for name in ("peft_config", "ref_model", "reward_funcs", "compute_metrics", "processing_class")
        if name in settings
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(trl, f"{kind}Trainer")(
            model=trainable() if model is None else model,
            args=getattr(trl, f"{kind}Config")(**(common | settings)),
            train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
            **({"processing_class": words()} | own),
        )


def sft(folder: Path, rows: list, **settings: Any) -> Any:
    return make("SFT", folder, rows, **settings)


def compare_with_ours(trainer: Any) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    ours = SleepForCausalLM.forward(inner(trainer.model), **batch).loss
    assert_close(trainer.compute_loss(trainer.model, dict(batch)), ours, FLOAT32)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def inner(model: Any) -> SleepForCausalLM:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


# --- SFT


@pytest.mark.flow("SFT: every dataset format")
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "rows, settings",
    [
        (TEXTS, {}),
        (TEXTS, PACKED),
        (TEXTS, {"padding_free": True, "max_length": None}),
        (TEXTS, PACKED | {"packing_strategy": "wrapped"}),
        (TEXTS, {"gradient_checkpointing": True}),
        (MESSAGES, {}),
        (MESSAGES, {"assistant_only_loss": True}),
        (MESSAGES, {"assistant_only_loss": True} | PACKED),
        (PAIRS, {}),
        (PAIRS, PACKED),
        (TURNS, {}),
        (TURNS, PACKED),
    ],
)
def test_trls_loss_is_ours_in_every_format(tmp_path, rows, settings, adapted):
    model = trainable()
    peft_config = lora_config(model, r=2) if adapted else None
    trainer = sft(tmp_path, rows, eval_rows=rows, model=model, peft_config=peft_config, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    assert int((batch["labels"] != IGNORE).sum()) < batch["labels"].numel() or "packing" in settings
    compare_with_ours(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.flow("SFT: packing")
def test_trls_packing_gives_the_loss_of_rows_alone(tmp_path):
    whole = sft(tmp_path, TEXTS, packing=True, max_length=200, per_device_train_batch_size=1)
    apart = sft(tmp_path, TEXTS, per_device_train_batch_size=6)
    (together,) = list(whole.get_train_dataloader())
    (rows,) = list(apart.get_train_dataloader())
    assert together["input_ids"].shape[0] == 1
    loss = whole.compute_loss(whole.model, dict(together))
    assert_close(loss, apart.compute_loss(apart.model, dict(rows)), FLOAT32)


# What these bases do to their logits has four names between them.
SCALED = ["gemma2", "falcon_h1", "granitemoehybrid", "granite", "cohere"]
OTHERS = ["gemma3_text", "olmo2", "glm4", "gpt_neox", "ouro", "jet_nemotron", "nemotron_h"]


@pytest.mark.flow("SFT: bases that scale logits")
@pytest.mark.parametrize("family", SCALED)
def test_trl_does_to_the_logits_what_the_base_does(tmp_path, monkeypatch, family):
    monkeypatch.setitem(FAMILIES, "granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0})
    monkeypatch.setitem(FAMILIES, "cohere", {"logit_scale": 0.3})
    model = trainable(family, layers=None)
    plain = {name: value for name, value in (("logit_scale", 1.0), ("final_logit_softcapping", None))}
    assert any(getattr(model.config, name, value) != value for name, value in plain.items()), "nothing would be tested"
    settings = {"router_aux_loss_coef": 0.0} if "moe" in family else {}
    compare_with_ours(sft(tmp_path, TEXTS, model=model, **settings))


@pytest.mark.flow("SFT: every dataset format")
@pytest.mark.parametrize("family", OTHERS)
def test_trls_loss_is_ours_in_other_families(tmp_path, monkeypatch, family):
    monkeypatch.setitem(FAMILIES, "glm4", {})
    trainer = sft(tmp_path, TEXTS, model=trainable(family, layers=None))
    compare_with_ours(trainer)
    trainer.train()


@pytest.mark.flow("SFT: rows without a label")
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("whole_batch", [False, True], ids=["a row", "the batch"])
def test_rows_without_a_label_cost_nothing(tmp_path, whole_batch, adapted):
    rows = [{"input_ids": list(range(5, 20 + place)), "labels": [IGNORE] * (15 + place)} for place in range(3)]
    if not whole_batch:
        rows[2]["labels"] = rows[2]["input_ids"]
    model = trainable()
    before = [parameter.clone() for parameter in model.fast_weights.parameters()]
    peft_config = lora_config(model, r=2) if adapted else None
    unprepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = sft(tmp_path, rows, model=model, peft_config=peft_config, **unprepared)
    compare_with_ours(trainer)
    trainer.train()
    assert [loss > 0 for loss in losses(trainer)] == [not whole_batch] * 2
    now = (trainer.model.merge_and_unload() if adapted else model).fast_weights.parameters()
    changed = [not value.equal(old) for value, old in zip(now, before, strict=True)]
    assert not any(changed) if whole_batch else all(changed)


@pytest.mark.flow("SFT: packing")
def test_packing_takes_rows_of_any_length(tmp_path):
    """One token, a window, one more, several bins; with evaluation packed and not."""
    lengths = [1, 2, 3, 7, 8, 9, 16, 17, 31, 1, 29]
    rows = [{"text": " ".join(f"w{3 + (i * 7 + j) % 90}" for j in range(n))} for i, n in enumerate(lengths)]
    told = []
    for packed in (True, False):
        settings = {"max_length": 33, "eval_packing": packed, "per_device_eval_batch_size": 16}
        trainer = sft(tmp_path, rows, eval_rows=rows, packing=True, **settings)
        compare_with_ours(trainer)
        told.append(trainer.evaluate()["eval_loss"])
    assert_close(torch.tensor(told[0]), torch.tensor(told[1]), FLOAT32)
    trainer.train()


@pytest.mark.flow("SFT: `torch_compile`")
@pytest.mark.parametrize("settings", [{}, PACKED], ids=["padded", "packed"])
def test_a_model_that_is_compiled_whole_learns_as_it_does_otherwise(tmp_path, settings):
    torch._dynamo.reset()
    plain, compiled = (
        sft(tmp_path, TEXTS, gradient_checkpointing=False, **settings, **how)
        for how in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    for trainer in (plain, compiled):
        trainer.train()
    assert_close(torch.tensor(losses(compiled)), torch.tensor(losses(plain)), FLOAT32)
    torch._dynamo.reset()


@pytest.mark.flow("SFT: quantized base")
@pytest.mark.parametrize("as_told", [False, True], ids=["as it is", "as told"])
def test_inserted_layers_that_trl_casts_on_a_quantized_base_are_warned_of(tmp_path, as_told):
    """In bfloat16 a step of training is rounded away where a weight is not small."""
    model = trainable()
    model.is_loaded_in_4bit = True  # TRL looks at this alone, and transformers then for bitsandbytes
    trainer = sft(tmp_path, TEXTS, model=model, peft_config=lora_config(model, r=2))
    model.is_loaded_in_4bit = False
    trained = [parameter for parameter in model.fast_weights.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}
    if as_told:
        trainer.model.fast_weights.float()
    before = [parameter.clone() for parameter in trained]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert as_told != any("write trainer.model.fast_weights.float()" in str(each.message) for each in caught)
    assert as_told != any(now.equal(old) for now, old in zip(trained, before, strict=True))


@pytest.mark.flow("SFT: mixture of experts")
def test_a_routers_auxiliary_loss_is_refused_by_name(tmp_path):
    trainer = sft(tmp_path, TEXTS, model=trainable("qwen3_moe", layers=None))
    with pytest.raises(ValueError, match=r"output_router_logits.*router_aux_loss_coef=0\.0 in the trainer's arguments"):
        trainer.train()


@pytest.mark.flow("SFT: model by name, bf16")
def test_trl_loads_by_name_and_trains_in_bfloat16(tmp_path):
    trainable().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    trainer = sft(tmp_path, TEXTS, model=str(tmp_path / "model"), bf16=True)
    assert isinstance(trainer.model, SleepForCausalLM)
    trainer.train()
    assert losses(trainer)


@pytest.mark.flow("SFT: model by name, bf16")
def test_trl_loads_a_model_to_sleep_in_another_way(tmp_path):
    trainable().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    how = {"n_loops": 1, "eviction": "sliding", "dtype": "bfloat16"}
    model = sft(tmp_path, TEXTS, model=str(tmp_path / "model"), model_init_kwargs=how).model
    assert (model.config.n_loops, model.config.eviction, model.dtype) == (1, "sliding", torch.bfloat16)
    with pytest.raises(ValueError, match=r"n_loops.*got 0"):
        sft(tmp_path, TEXTS, model=str(tmp_path / "model"), model_init_kwargs={"n_loops": 0})


def test_a_session_outlives_the_special_tokens_that_a_trainer_sets(tmp_path):
    """Trainers write their tokenizer's into the model's configuration; a session that it made is still its own."""
    model, other = trainable(), words()
    before = SleepCache()
    model.eval()(tokens(1, 19), past_key_values=before)
    before.save(tmp_path / "session")
    other.pad_token = "w4"
    trainer = sft(tmp_path, TEXTS, model=model, processing_class=other)
    assert model.config.text_config.pad_token_id == 4
    trainer.save_model(tmp_path / "model")
    again = SleepForCausalLM.from_pretrained(tmp_path / "model")
    session = SleepCache.load(tmp_path / "session")
    following = tokens(1, 3, seed=1)
    assert torch.equal(
        again(following, past_key_values=session).logits, model.eval()(following, past_key_values=before).logits
    )


@pytest.mark.flow("SFT: `compute_metrics`")
def test_metrics_get_logits_where_trl_keeps_them(tmp_path):
    """TRL up to 1.8 has none in its chunked loss, for any model; its plain loss looks at those of training, too."""
    seen = []

    def metrics(made):
        seen.append(made.predictions.shape)
        return {}

    model = trainable()
    model.logits_in_training = True
    trainer = sft(tmp_path, TEXTS, model=model, eval_rows=TEXTS, loss_type="nll", compute_metrics=metrics)
    trainer.train()
    trainer.evaluate()
    assert seen == [(6, 18, VOCAB)]


@pytest.mark.flow("SFT: facts from `messages`")
def test_facts_are_learned_by_the_lines_of_trls_readme(tmp_path):
    """Rows of messages longer than a window, `peft_config=lora_config(model)`; saved, loaded onto a base, asked."""
    import trl_sft  # needs TRL as it is imported

    loss, answers, slept = trl_sft.main(str(tmp_path / "out"))
    assert slept == 2
    assert loss < 0.1
    assert answers == trl_sft.FACTS


# --- preferences, rewards, generation


def logp(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of a completion, by one call of the model on that row alone."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return scores.gather(1, ids[0, len(prompt) :, None]).sum()


@pytest.mark.flow("DPO")
@pytest.mark.parametrize("reference", ["given", "adapter off", "by name", "scored before"])
def test_dpo_compares_what_the_model_says(tmp_path, reference):
    model, settings = trainable(), {}
    if reference == "given":
        settings["ref_model"] = copy.deepcopy(model)
    elif reference == "scored before":
        settings["precompute_ref_log_probs"] = True
    elif reference == "adapter off":
        settings["peft_config"] = lora_config(model, r=2)
    else:
        model.save_pretrained(tmp_path / "model")
        words().save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    # On disk, beside which TRL 1.7 wants to keep what it has scored before.
    Dataset.from_list(PREFERENCES).save_to_disk(tmp_path / "rows")
    rows = load_from_disk(tmp_path / "rows")
    trainer = make("DPO", tmp_path, rows, model, rows, learning_rate=1e-3, max_steps=8, **settings)
    told = trainer.evaluate()
    for kind in ("chosen", "rejected"):
        rows = list(trainer.eval_dataset)
        alone = [logp(trainer.model.eval(), row["prompt_ids"], row[f"{kind}_ids"]) for row in rows]
        assert_close(torch.tensor(told[f"eval_logps/{kind}"]), torch.stack(alone).mean(), FLOAT32, kind)
    trainer.train()
    first, *_, last = losses(trainer)
    assert_close(torch.tensor(first), torch.tensor(2.0).log(), FLOAT32, "model and reference begin alike")
    assert last < 0.68 < first


@pytest.mark.flow("KTO")
def test_kto_trains(tmp_path):
    model = trainable()
    trainer = make("KTO", tmp_path, JUDGED, model, ref_model=copy.deepcopy(model))
    trainer.train()
    assert len(losses(trainer)) == 2


def first_word(completions: list[str], **_: Any) -> list[float]:
    """A reward that tells completions apart, the same ones in every process."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.flow(kind)) for kind in ("GRPO", "RLOO")])
def test_completions_are_generated_and_scored_as_the_model_scores_them(tmp_path, kind, adapted):
    model = trainable()
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = {"num_generations": 3, "max_completion_length": 12, "reward_funcs": first_word, "learning_rate": 1e-2}
    if adapted:
        settings["peft_config"] = lora_config(model, r=2)
    elif kind == "RLOO":
        settings["beta"] = 0.0
    trainer = make(kind, tmp_path, PROMPTS, model, **settings)
    # Prompts padded on the left, completions on the right, as TRL hands them over.
    prompts, ends = [tokens(1, n, seed=n)[0] for n in (9, 4)], [tokens(1, n, seed=n)[0] for n in (6, 11)]
    ids = torch.zeros(2, 20, dtype=torch.long)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        ids[row, 9 - len(prompt) : 9], ids[row, 9 : 9 + len(end)] = prompt, end
    mask = (ids != 0).long()
    with torch.no_grad():
        told = trainer._get_per_token_logps_and_entropies(trainer.model.eval(), ids, mask, 11)[0]
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        alone = logp(trainer.model, prompt.tolist(), end.tolist())
        assert_close(told[row, : len(end)].sum(), alone, FLOAT32, f"row {row}")
    trainer.train()
    assert len(losses(trainer)) == 2
    changed = [name for name, value in model.named_parameters() if name in before and not value.equal(before[name])]
    assert changed or adapted
    merged = trainer.model.merge_and_unload() if adapted else trainer.model
    assert any(not value.equal(before[name]) for name, value in merged.named_parameters() if name in before)


@pytest.mark.flow("reward modelling")
def test_reward_models_are_refused_by_name(tmp_path):
    trainable().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no head that scores texts; train the reward model from the base"):
        make("Reward", tmp_path, PREFERENCES, str(tmp_path / "model"))
