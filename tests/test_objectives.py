"""Losses beside cross entropy: each against its formula, written out over one row at a time."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import peft
import pytest
import small
import torch
from families import tiny_base, tokens, true_float64
from tolerances import EXACT, EXACT_GRAD, assert_close
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening
from transformers.integrations import deepspeed

from sleepify import FastWeightConfig, SleepCache
from sleepify.hosts.families import FAMILIES
from sleepify.tasks import Rule110
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments, TaskDataset
from sleepify.training.objective_arguments import ObjectiveArguments
from sleepify.training.objectives import IGNORE, Objectives
from sleepify.training.teacher import Teacher, own_teacher

WINDOW, LOOPS = 4, 3


@pytest.fixture(autouse=True, scope="module")
def exactly():
    with true_float64():
        yield


def sleeping(eviction="hard", **keywords):
    return small.sleeping(eviction=eviction, **({"window_size": WINDOW, "n_loops": LOOPS} | keywords)).train()


def batch():
    """Rows of 11, 14 and 3 tokens, padded left: asleep twice, three times and never; labels here and there."""
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row, length in enumerate((11, 14, 3)):
        ids[row, : 14 - length], mask[row, : 14 - length] = 0, 0
    labels[0, 12:], labels[1, 5], labels[1, 12:], labels[2, 13] = ids[0, 12:], ids[1, 5], ids[1, 12:], ids[2, 13]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(inputs):
    """Ids and labels of each row by itself, and where the tokens after its last sleep begin."""
    for ids, mask, labels in zip(*(inputs[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        ids, labels = ids[mask == 1], labels[mask == 1]
        last = int((labels != IGNORE).nonzero().max())
        yield ids, labels, (last - 1) // WINDOW * WINDOW


def loss_of(model, inputs, done=0.0, step=0, **weights):
    """Our loss and its gradients."""
    objectives = Objectives(ObjectiveArguments(**weights), model)
    inputs = objectives.prepare(inputs)
    counts = objectives.count([inputs])
    with objectives.on(counts, inputs.get("supervised"), step, done):
        loss = model(**{name: value for name, value in inputs.items() if name != "supervised"}).loss
    assert model.branch is None and model.watch is None
    return loss, gradients(model, loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, model):
    (loss, found), wanted = actual, gradients(model, expected)
    assert_close(loss, expected, EXACT)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, EXACT_GRAD, name)


def woken_after(model, ids, start, m):
    """Logits of the tokens from ``start`` on, where the sleep before them took m passes and every other took N."""
    if start == 0:
        return model(ids[None]).logits[0]
    cache = SleepCache()
    model(ids[None, :start], past_key_values=cache)
    model.sleep(cache, n_loops=m)
    return model(ids[None, start:], past_key_values=cache).logits[0]


def summed(logits, labels):
    targets = torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
    return cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), targets != IGNORE


def passes_by_hand(model, inputs):
    """(CE of everything, [CE_m for each m], [KL(p_N || p_m)]), summed, and the number of labels."""
    whole, after = 0.0, [0.0] * (LOOPS - 1)
    apart = [0.0] * (LOOPS - 1)
    for ids, labels, start in rows(inputs):
        whole = whole + summed(model(ids[None]).logits[0], labels)[0]
        if not start:
            continue
        last = woken_after(model, ids, start, LOOPS)
        for m in range(1, LOOPS):
            logits = woken_after(model, ids, start, m)
            total, asked = summed(logits, labels[start:])
            p, q = log_softmax(last[asked].detach(), -1), log_softmax(logits[asked], -1)
            after[m - 1] = after[m - 1] + total
            apart[m - 1] = apart[m - 1] + (p.exp() * (p - q)).sum()
    return whole, after, apart, int((inputs["labels"] != IGNORE).sum())


@pytest.mark.parametrize("checkpoint", ["none", "window", "loop"])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_loss_after_every_pass_is_its_formula(eviction, checkpoint):
    model = sleeping(eviction, loop_range=(1, 3))
    whole, after, _, n_labels = passes_by_hand(model, batch())
    model.config.checkpoint = checkpoint
    actual = loss_of(model, batch(), pass_loss="all", pass_loss_weight=0.7)
    model.config.checkpoint = "none"
    assert_same(actual, (whole + 0.7 * sum(after) / len(after)) / n_labels, model)


def test_a_loss_after_every_pass_of_a_base_that_closes_its_passes():
    options = {"eviction": "sliding", "loop_range": (0, 3)}
    model = small.sleeping("ouro", window_size=WINDOW, n_loops=LOOPS, **options).train()
    whole, after, _, n_labels = passes_by_hand(model, batch())
    assert_same(loss_of(model, batch(), pass_loss="all"), (whole + sum(after) / len(after)) / n_labels, model)


@pytest.mark.parametrize("done", [0.0, 0.25])
def test_the_loss_after_one_drawn_pass_is_its_formula(done):
    model = sleeping()
    whole, after, apart, n_labels = passes_by_hand(model, batch())
    drawn = set()
    for step in (3, 4):
        m = Random(f"0/{step}/pass").randint(1, LOOPS - 1)
        drawn.add(m)
        expected = whole + 0.5 * ((1 - done) * after[m - 1] + done * apart[m - 1])
        assert_same(loss_of(model, batch(), done, step, pass_loss="one"), expected / n_labels, model)
        whole, after, apart, n_labels = passes_by_hand(model, batch())
    assert drawn == {1, 2}


def divergence(teacher, student, temperature):
    p, q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    return temperature**2 * (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("at", ["labels", "later", "all"])
@pytest.mark.parametrize("checkpoint", ["none", "window"])
def test_distillation_is_its_formula(at, checkpoint):
    model = sleeping(checkpoint=checkpoint)
    model.freeze_base()
    total, whole, n_places, n_labels = 0.0, 0.0, 0, 0
    for ids, labels, _ in rows(batch()):
        student = model(ids[None]).logits[0]
        with torch.no_grad():
            teacher = model.language_model(ids[None]).logits[0]
        own, asked = summed(student, labels)
        place = torch.arange(len(ids))
        if at != "labels":
            asked = (place < len(ids) - 1) & (place >= (WINDOW if at == "later" else 0))
        whole, n_labels = whole + own, n_labels + int((labels[1:] != IGNORE).sum())
        total, n_places = total + divergence(teacher[asked], student[asked], 2.0), n_places + int(asked.sum())
    actual = loss_of(model, batch(), distill=0.6, distill_at=at, distill_temperature=2.0)
    assert_same(actual, whole / n_labels + 0.6 * total / n_places, model)


def test_distillation_needs_no_labels_and_makes_logits_in_pieces(monkeypatch):
    model = sleeping()
    model.freeze_base()
    whole = loss_of(model, batch(), distill=1.0, distill_at="all", cross_entropy=0.0)
    monkeypatch.setattr("sleepify.training.objectives.PIECE", 3)
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape[0]))
    inputs = batch()
    del inputs["labels"]
    in_pieces = loss_of(model, inputs, distill=1.0, distill_at="all", cross_entropy=0.0)
    hook.remove()
    assert max(seen) <= 3 and len(seen) > 10
    assert_close(in_pieces[0], whole[0], EXACT)
    for name, gradient in whole[1].items():
        assert_close(in_pieces[1][name], gradient, EXACT_GRAD, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_base_teaches_is_what_it_says_itself(family):
    base = tiny_base(family)
    ids = tokens(2, 9)
    teacher = Teacher(base)
    with torch.no_grad():
        for row, length in enumerate((9, 6)):
            alone = base(ids[row : row + 1, :length], use_cache=False).logits[0]
            told = teacher.logits(teacher.read(ids, (9, 6)))[row, :length]
            assert_close(told, alone, EXACT)


def test_adapters_are_off_while_the_base_teaches_and_on_again_after():
    model = sleeping(fast_weights=FastWeightConfig(layers=[1]))
    ids = tokens(1, 9)
    before = model.language_model(ids).logits
    targets = ["q_proj", "v_proj", "lm_head"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, exclude_modules="fast_weights.*"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    after = model.language_model(ids).logits
    assert (after - before).abs().max() > 0.1
    teacher = own_teacher(model)
    assert_close(teacher.logits(teacher.read(ids, (9,))), before, EXACT)
    assert_close(model.language_model(ids).logits, after, EXACT)
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert model.training and model.language_model.training


def test_who_cannot_teach_is_refused(tmp_path):
    model = sleeping()
    with pytest.raises(ValueError, match=r"stays as it is.*train_only='fast_weights', LoRA, or distill_teacher"):
        Objectives(ObjectiveArguments(distill=1.0), model)
    tiny_base("qwen3", vocab_size=50).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary of 97, got .*other of 50"):
        Objectives(ObjectiveArguments(distill=1.0, distill_teacher=str(tmp_path / "other")), model)
    model.save_pretrained(tmp_path / "sleeps")
    with pytest.raises(ValueError, match="got .*sleeps, which sleeps"):
        Objectives(ObjectiveArguments(distill=1.0, distill_teacher=str(tmp_path / "sleeps")), model)
    tiny_base("llama").save_pretrained(tmp_path / "llama")
    loss, _ = loss_of(model, batch(), distill=1.0, distill_teacher=str(tmp_path / "llama"))
    assert loss > loss_of(model, batch())[0]


@pytest.mark.parametrize("checkpoint", ["none", "window", "loop"])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_reconstruction_is_its_formula(eviction, checkpoint):
    model = sleeping(eviction, window_size=6)
    span, total, count = 3, 0.0, 0
    ids, labels = tokens(1, 16), torch.full((1, 16), IGNORE)
    labels[:, 14:] = ids[:, 14:]
    for number in range(2):
        first = Random(f"0/5/reconstruct/{number}").randint(0, 6 - 1 - span)
        cache = SleepCache()
        model(ids[:, : 6 * (number + 1)], past_key_values=cache)
        model.sleep(cache)
        begin = 6 * number + first
        window = ids[:, begin : begin + span + 1]
        if eviction == "sliding":
            # Positions are relative, so that those of the text continue what was read; the keys are taken away.
            cache.now = cache.now.__class__(**{**vars(cache.now), "memory": without_keys(cache.now.memory)})
            cache.now = cache.now.__class__(**{**vars(cache.now), "retained": (0,)})
        logits = model(window[:, :-1], past_key_values=cache).logits[0]
        total = total + cross_entropy(logits, window[0, 1:], reduction="sum")
        count += span
    own = cross_entropy(model(ids).logits[0, 13:15], ids[0, 14:])
    model.config.checkpoint = checkpoint
    inputs = {"input_ids": ids, "labels": labels}
    actual = loss_of(model, inputs, step=5, reconstruct=0.4, reconstruct_share=0.5)
    model.config.checkpoint = "none"
    assert_same(actual, own + 0.4 * total / count, model)


def test_windows_of_one_token_have_nothing_to_reconstruct():
    model = sleeping(window_size=1)
    assert_same(loss_of(model, batch(), reconstruct=1.0), model(**batch()).loss, model)


@pytest.mark.parametrize("loss", [{"reconstruct": 1.0}, {"pass_loss": "all"}, {"pass_loss": "one"}])
def test_ephemeral_tokens_beside_losses_that_go_by_windows_are_refused(loss):
    model, inputs = sleeping(), batch()
    inputs["ephemeral"] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    with pytest.raises(ValueError, match="expected no ephemeral tokens with distill, reconstruct or pass_loss"):
        loss_of(model, inputs, **loss)


def without_keys(memory):
    return type(memory)(memory.batch_size, memory.state)


# --- the trainer


TASK = Rule110(width=8, n_strings=2, steps=2)


def trained(directory, model=None, criterion=None, rows=4, data=None, collator=None, **changes):
    settings = {"max_steps": 2, "per_device_train_batch_size": rows, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "output_dir": str(directory), "train_only": "fast_weights"}
    trainer = SleepTrainer(
        small.trainable(n_loops=3) if model is None else model,
        SleepTrainingArguments(**(settings | changes)),
        criterion=criterion,
        train_dataset=data or TaskDataset(TASK),
        data_collator=collator or SleepCollator(0),
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


EVERYTHING = {"distill": 0.5, "distill_at": "later", "reconstruct": 0.3, "pass_loss": "all", "pass_loss_weight": 0.5}


def test_losses_are_the_same_however_a_step_is_cut(tmp_path):
    whole = trained(tmp_path, **EVERYTHING)
    cut = trained(tmp_path, rows=2, gradient_accumulation_steps=2, **EVERYTHING)
    assert whole == pytest.approx(cut, abs=1e-5) and whole[0] > trained(tmp_path)[0] + 0.1


PACKED = [{"distill": 1.0, "distill_at": at} for at in ("labels", "later", "all")]


@pytest.mark.parametrize("losses", [*PACKED, {"reconstruct": 1.0}, {"pass_loss": "all"}, EVERYTHING])
def test_packed_rows_have_the_losses_of_the_texts_that_they_are(losses, tmp_path):
    texts = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in (20, 7, 30)]
    found = []
    for collator in (SleepCollator(0), DataCollatorWithFlattening()):
        data = [row | {"labels": row["input_ids"]} for row in texts] if not found else texts
        changes = {"max_steps": 1, "train_sampling_strategy": "sequential", "collator": collator}
        found += trained(tmp_path, data=data, **changes, **losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("losses", [{"distill": 1.0}, {"reconstruct": 1.0}, {"pass_loss": "all"}, EVERYTHING])
def test_evaluation_tells_the_cross_entropy_whatever_is_trained_on(losses, tmp_path):
    model, found = small.trainable(n_loops=3), []
    for given in ({}, losses):
        trainer = SleepTrainer(
            model,
            SleepTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, train_only="fast_weights", **given),
            eval_dataset=TaskDataset(TASK, "test", n_examples=3),
            data_collator=SleepCollator(0),
        )
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == found[1]


def test_a_loss_of_ones_own_takes_the_place_of_cross_entropy(tmp_path):
    def doubled(logits, targets):
        return 2 * cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    assert trained(tmp_path, criterion=doubled, max_steps=1) == pytest.approx(
        [2 * loss for loss in trained(tmp_path, max_steps=1)], abs=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill": -1.0}, "distill to be a weight of 0 or more, got -1.0"),
        ({"distill_at": "later"}, "distill, a weight, with distill_teacher or distill_at"),
        ({"distill": 1.0, "distill_at": "late"}, "distill_at to be one of labels, later, all, got 'late'"),
        ({"pass_loss": "some"}, "pass_loss to be one of none, all, one, got 'some'"),
        ({"reconstruct_share": 0.0}, "reconstruct_share above 0 and up to 1"),
        ({"cross_entropy": 0.0}, "something to train on"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SleepTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)


@pytest.mark.parametrize("fields", [{"distill": 1.0}, {"reconstruct": 1.0}, {"pass_loss": "all"}, {}])
def test_a_loss_that_compute_loss_func_would_put_out_of_force_is_refused(fields, tmp_path):
    asked = next(iter(fields), "criterion")
    with pytest.raises(ValueError, match=f"expected either compute_loss_func or .*{asked}.*, got both"):
        SleepTrainer(
            small.trainable(),
            SleepTrainingArguments(str(tmp_path), use_cpu=True, train_only="fast_weights", **fields),
            criterion=None if fields else cross_entropy,
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
            train_dataset=TaskDataset(TASK),
            data_collator=SleepCollator(0),
        )


def test_a_base_that_does_not_sleep_has_no_other_losses(tmp_path):
    with pytest.raises(ValueError, match="a model that sleeps for pass_loss, got Qwen3ForCausalLM"):
        trained(tmp_path, tiny_base("qwen3", torch.float32), train_only=None, pass_loss="all")


def test_a_teacher_by_name_is_whole_under_zero3(tmp_path, monkeypatch):
    """transformers partitions whatever is loaded there; nothing would gather the weights of a second model."""
    tiny_base("llama").save_pretrained(tmp_path)
    student = sleeping()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: SimpleNamespace(is_zero3=lambda: True))
    seen, load = [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    Teacher.load(str(tmp_path), student)
    assert seen == [False] and deepspeed.is_deepspeed_zero3_enabled()


def labelled_in(*lengths):
    """Rows of 12 tokens, of which the last so many are labelled."""
    ids = [tokens(1, 12, seed=seed)[0].tolist() for seed in range(len(lengths))]
    return [
        {"input_ids": row, "labels": [IGNORE] * (12 - n) + row[12 - n :]} for row, n in zip(ids, lengths, strict=True)
    ]


@pytest.mark.parametrize(
    "losses",
    [
        {},
        {"pass_loss": "one"},
        {"distill": 1.0, "cross_entropy": 0.0},
        {"reconstruct": 1.0, "cross_entropy": 0.0},
        {"pass_loss": "all", "cross_entropy": 0.0},
    ],
    ids=str,
)
def test_a_batch_in_which_nothing_is_predicted_changes_nothing(losses, tmp_path):
    """With a frozen base nothing of it would be in any graph. Of a whole step without labels the loss is 0."""
    small_steps = {"rows": 1, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", **losses}

    def found(*lengths):
        return trained(tmp_path, data=labelled_in(*lengths), **small_steps)

    with_holes = found(3, 0, 0, 0)
    assert with_holes[1] == 0.0 and with_holes[0] > 0.1
    assert with_holes[:1] == pytest.approx(found(3, 0, 4, 4)[:1], abs=1e-6)


def test_rows_too_short_to_sleep_have_no_loss_of_sleep(tmp_path):
    losses = {"reconstruct": 1.0, "cross_entropy": 0.0}
    short = [{"input_ids": row["input_ids"][:6], "labels": row["input_ids"][:6]} for row in labelled_in(0, 0)]
    assert trained(tmp_path, data=short, rows=1, **losses) == [0.0, 0.0]
