"""What transformers' callers hand down and look for: keywords, packed rows, a backbone, predictions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import VOCAB, tiny_base, tokens, true_float64
from small import sleeping, trainable
from tolerances import EXACT, EXACT_GRAD, FLOAT32, assert_close
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from sleepify import SleepCache, SleepConfig, SleepForCausalLM, SleepifyError
from sleepify.training import SleepCollator, SleepTrainer, SleepTrainingArguments, rounds

IGNORE = -100


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, such as transformers can look for stop strings in."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2} | alphabet, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# --- keywords


@pytest.mark.flow("keywords that mean nothing new")
@pytest.mark.parametrize(
    "told",
    [
        {"position_ids": torch.arange(12)[None]},
        {"position_ids": torch.arange(12).expand(2, -1)},
        {"cache_position": torch.arange(12)},
        {"token_type_ids": torch.zeros(2, 12, dtype=torch.long)},
        {"use_cache": False, "return_dict": True},
        {"seq_idx": torch.zeros(2, 12, dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 12, 24]), "cu_seq_lens_k": torch.tensor([0, 12, 24]), "max_length_q": 12},
    ],
    ids=lambda told: ",".join(told),
)
def test_keywords_that_mean_nothing_new_are_taken(told):
    model, ids = sleeping(), tokens(2, 12)
    assert torch.equal(model(ids, **told).logits, model(ids).logits)
    logits, *_ = model(ids, **{**told, "return_dict": False})
    assert torch.equal(logits, model(ids).logits)


def test_positions_count_real_tokens_only():
    model, ids = sleeping(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as transformers makes them
    assert torch.equal(model(ids, mask, position_ids=positions).logits, model(ids, mask).logits)


@pytest.mark.flow("keywords that mean something else")
@pytest.mark.parametrize(
    "told, message",
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6, 7]])}, r"position_ids.*\[2, 4, 5\] in row 0.*gap"),
        ({"position_ids": torch.arange(1, 8)[None]}, "position_ids.*count up by one from 0"),
        ({"position_ids": torch.zeros(3, 1, 7, dtype=torch.long)}, r"position_ids.*\(3, 1, 7\)"),
        ({"position_ids": torch.arange(7.0)[None]}, "position_ids of whole numbers"),
        ({"cache_position": torch.arange(3, 10)}, "cache_position 0 to 6"),
        ({"token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}, "token_type_ids of 0 only"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q to ascend from 0 to 7"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 4, 7])}, "cu_seq_lens_q to ascend"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 7]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])},
            r"seq_idx and cu_seq_lens_q.*same tokens, got \[0, 3\] and \[0, 4\]",
        ),
        ({"output_attentions": True}, "output_attentions to be off"),
    ],
)
def test_keywords_that_mean_something_else_are_refused_by_name(told, message):
    with pytest.raises(ValueError, match=message):
        sleeping()(tokens(1, 7), **told)


def test_unknown_keywords_are_an_error_and_known_ones_are_in_the_signature():
    model = sleeping()
    with pytest.raises(TypeError, match="position_idx"):
        model(tokens(1, 7), position_idx=torch.arange(7)[None])
    with pytest.raises(TypeError, match="position_idx"):
        model.base_model(tokens(1, 7), position_idx=torch.arange(7)[None])
    with pytest.raises(TypeError, match="expected position_ids to be a tensor, got list"):
        model(tokens(1, 7), position_ids=[[0, 1]])


def test_positions_go_on_where_a_session_stopped():
    model, ids, cache = sleeping(), tokens(1, 12), SleepCache()
    whole = model(ids).logits
    model(ids[:, :7], past_key_values=cache, position_ids=torch.arange(7)[None], cache_position=torch.arange(7))
    now = {"position_ids": torch.arange(7, 10)[None], "cache_position": torch.arange(7, 10)}
    assert_close(model(ids[:, 7:10], past_key_values=cache, **now).logits, whole[:, 7:10], EXACT)
    with pytest.raises(ValueError, match=r"count up by one from 10 \(what its session has read\)"):
        model(ids[:, 10:], past_key_values=cache, position_ids=torch.arange(2)[None])
    with pytest.raises(ValueError, match="one text per row with a cache, got packed rows"):
        model(ids[:, 10:], past_key_values=cache, position_ids=torch.tensor([[10, 0]]))
    assert cache.seen == [10]


@pytest.mark.flow("keywords that mean nothing new")
def test_generation_takes_what_tokenizers_and_pipelines_hand_down():
    model, ids = sleeping(), tokens(2, 9)
    told = {"token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(9)[None]}
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **plain, **told), model.generate(ids, **plain))
    with pytest.raises(ValueError, match="position_ids.*gap"):
        model.generate(ids, **plain, position_ids=torch.arange(1, 10)[None])
    with pytest.raises(ValueError, match="token_type_ids of 0 only"):
        model.generate(ids, **plain, token_type_ids=torch.ones_like(ids))


@pytest.mark.flow("stop strings, `pipeline`")
def test_generation_stops_at_strings_also_in_a_pipeline():
    tokenizer = letters()
    model = sleeping(tiny_base("qwen3", vocab_size=300))
    model.generation_config.eos_token_id = None
    prompt = tokenizer("facts about sleep", return_tensors="pt")
    free = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    candidates = [(i, tokenizer.decode([t])) for i, t in enumerate(free.tolist())]
    place, text = next((i, text) for i, text in candidates if text.isascii() and text.strip())
    ended = model.generate(**prompt, max_new_tokens=12, do_sample=False, stop_strings=[text], tokenizer=tokenizer)
    assert ended.shape[1] == prompt["input_ids"].shape[1] + place + 1
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "facts about sleep", max_new_tokens=12, do_sample=False, stop_sequence=text, return_full_text=False
    )
    assert made[0]["generated_text"].endswith(text)


# --- packed rows

LENGTHS = (7, 3, 11, 1, 5)


def packed(lengths=LENGTHS, seed=0):
    """Texts one after the other in a row, and labels of some of their tokens, with one at a text's beginning."""
    ids = tokens(1, sum(lengths), seed=seed)
    labels = torch.where(tokens(1, sum(lengths), seed=seed + 1) % 3 > 0, ids, IGNORE)
    labels[0, lengths[0]] = ids[0, lengths[0]]
    return ids, labels


def marks(lengths=LENGTHS):
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return {
        "positions": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "numbers": {"seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()},
        "boundaries": {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
    }


@pytest.mark.flow("packed rows")
@pytest.mark.parametrize("how", ["positions", "numbers", "boundaries"])
@pytest.mark.parametrize(
    "family, keywords",
    [
        ("qwen3", {}),
        ("qwen3", {"eviction": "sliding"}),
        ("qwen3", {"backprop_windows": 1, "checkpoint": "window"}),
        ("gemma2", {}),
        ("qwen3_next", {}),
        ("jet_nemotron", {}),
        ("ouro", {}),
    ],
)
def test_packed_rows_are_the_texts_alone_in_values_and_gradients(family, keywords, how):
    with true_float64():
        # Softmax of attention (gemma2) and of experts (qwen3_next) is in float32 in any case.
        tolerances = (FLOAT32, FLOAT32) if family in ("gemma2", "qwen3_next") else (EXACT, EXACT_GRAD)
        check_packed(sleeping(family, **keywords).train(), marks()[how], *tolerances)


def check_packed(model, told, exact, exact_grad):
    ids, labels = packed()
    total, logits, hidden = 0.0, [], []
    for text, wanted in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        if (wanted[:, 1:] != IGNORE).any():
            total = total + model(text, labels=wanted, num_items_in_batch=5).loss
        logits.append(model(text).logits)
        hidden.append(model.base_model(text).last_hidden_state)
    alone = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    loss = model(ids, labels=labels, num_items_in_batch=5, **told).loss
    together = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert_close(loss, total, exact, "loss")
    assert_close(model(ids, **told).logits, torch.cat(logits, 1), exact, "logits")
    assert_close(model.base_model(ids, **told).last_hidden_state, torch.cat(hidden, 1), exact, "hidden states")
    for actual, expected in zip(together, alone, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close(actual, expected, exact_grad, "gradient")


def test_packed_rows_of_several_rows_beside_padding():
    model, ids = sleeping(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    positions = torch.tensor([[*range(8), *range(4)], [*range(3), *range(7), 0, 0]])
    logits = model(ids, mask, position_ids=positions).logits
    expected = torch.zeros_like(logits)
    for row, start, stop in ((0, 0, 8), (0, 8, 12), (1, 0, 3), (1, 3, 10)):
        expected[row, start:stop] = model(ids[row : row + 1, start:stop]).logits[0]
    assert_close(logits, expected, EXACT)
    last = model(ids, mask, position_ids=positions, logits_to_keep=torch.tensor([9, 1])).logits
    assert_close(last, expected[:, [9, 1]], EXACT)


@pytest.mark.flow("packed rows with a session")
def test_packed_rows_keep_no_session():
    model, (ids, _) = sleeping(), packed()
    told = marks()["positions"]
    assert model(ids, **told).past_key_values is None
    with pytest.raises(ValueError, match="one text per row with a cache, got packed rows"):
        model(ids, **told, use_cache=True)
    with pytest.raises(ValueError, match="one text per row with a cache, got packed rows"):
        model(ids, **told, past_key_values=SleepCache())


@pytest.mark.flow("packed rows")
def test_a_flattening_collator_gives_the_loss_of_padded_rows():
    model = sleeping().train()
    rows = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in (9, 4, 13)]
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = ids.masked_fill(ids == 0, IGNORE)
    padded = model(ids, (ids != 0).long(), labels=labels)
    assert_close(model(**flat).loss, padded.loss, EXACT)


# --- the backbone


@pytest.mark.flow("`model.base_model`")
def test_the_backbone_gives_what_the_head_reads():
    model, ids = sleeping("gemma2"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model.base_model(ids, attention_mask=mask)
    assert out.last_hidden_state.shape == (2, 12, 32)
    assert not out.last_hidden_state[0, :3].any()
    cap = model.config.final_logit_softcapping
    scores = torch.tanh(model.get_output_embeddings()(out.last_hidden_state) / cap) * cap
    assert_close(scores, model(ids, mask).logits, EXACT)
    some = model.base_model(ids, attention_mask=mask, logits_to_keep=4).last_hidden_state
    assert_close(some, out.last_hidden_state[:, -4:], EXACT)


@pytest.mark.flow("`model.base_model`")
def test_the_backbone_keeps_a_session():
    model, ids, cache = sleeping(), tokens(1, 12), SleepCache()
    model.base_model(ids[:, :8], past_key_values=cache)
    assert cache.seen == [8]
    assert_close(model(ids[:, 8:], past_key_values=cache).logits, model(ids).logits[:, 8:], EXACT)
    assert model.base_model(ids, use_cache=False).past_key_values is None


def test_the_backbone_is_no_part_of_the_model(tmp_path):
    model = sleeping()
    names, base_supports = set(model.state_dict()), model.language_model.supports_tp_plan
    assert set(model.base_model.state_dict()) == names
    assert model.get_decoder() is model.language_model
    assert set(copy.deepcopy(model).state_dict()) == names
    model.save_pretrained(tmp_path)
    again = SleepForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.float()(tokens(1, 9)).logits, model.float()(tokens(1, 9)).logits)
    assert again.supports_tp_plan == base_supports


@pytest.mark.flow("reward models, `num_labels=1`")
def test_what_loads_by_name_finds_a_map_and_what_scores_texts_is_refused():
    config = SleepConfig()
    assert config.auto_map == {}
    with pytest.raises(ValueError, match="num_labels=1.*no head that scores"):
        config.num_labels = 1
    assert not hasattr(config, "logit_scale")


@pytest.mark.flow("FSDP2, ZeRO-3 with another trainer")
@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_sharded_layers_are_not_called_where_ranks_might_wait_for_each_other(monkeypatch, kind):
    model, ids = trainable(), tokens(1, 20)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    model.train()(ids, labels=ids)
    layer = model.blocks.layers[0]
    if kind == "fsdp":
        layer._is_fsdp_managed_module = True
    else:
        next(layer.parameters()).ds_id = 0
    for call in (lambda: model(ids, labels=ids), lambda: model.base_model(ids), lambda: model.eval()(ids, labels=ids)):
        with pytest.raises(SleepifyError, match="SleepTrainer"):
            call()
    model(ids, labels=ids, awake=torch.zeros_like(ids, dtype=torch.bool))
    with torch.no_grad():
        model(ids)
        # By which other trainers evaluate.
        with pytest.raises(SleepifyError, match="SleepTrainer"):
            model.base_model(ids)


# --- logits in evaluation


def rows_of(*lengths):
    return [{"input_ids": (row := tokens(1, n, seed=n)[0].tolist()), "labels": [IGNORE, *row[1:]]} for n in lengths]


def trainers(tmp_path, **keywords):
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "per_device_eval_batch_size": 2}
    common |= {"disable_tqdm": True, "save_strategy": "no"}
    made = {"train_dataset": rows_of(9), "data_collator": SleepCollator(0, "right"), **keywords}
    yield Trainer(trainable(), TrainingArguments(**common), **made)
    yield SleepTrainer(trainable(), SleepTrainingArguments(**common), **made)


@pytest.mark.flow("`Trainer`: metrics, `predict`")
def test_predictions_are_the_logits_of_all_columns_aligned_with_the_labels(tmp_path):
    rows = rows_of(12, 20, 17)
    for trainer in trainers(tmp_path):
        out = trainer.predict(rows)
        assert out.predictions.shape == (3, 20, VOCAB) and out.label_ids.shape == (3, 20)
        for row, logits, labels in zip(rows, out.predictions, out.label_ids, strict=True):
            length = len(row["input_ids"])
            expected = trainer.model(torch.tensor([row["input_ids"]])).logits[0]
            assert_close(torch.from_numpy(logits[:length]), expected.detach(), FLOAT32)
            assert labels[:length].tolist() == row["labels"]


@pytest.mark.flow("`Trainer`: metrics, `predict`")
def test_metrics_see_what_is_made_of_the_logits_batch_by_batch(tmp_path):
    widest, seen = [], []

    def choose(logits, labels):
        widest.append(tuple(logits.shape))
        return logits.argmax(-1)

    def accuracy(made):
        seen.append(made)
        right = made.predictions[:, :-1] == made.label_ids[:, 1:]
        return {"accuracy": float(right[made.label_ids[:, 1:] != IGNORE].mean())}

    for trainer in trainers(tmp_path, compute_metrics=accuracy, preprocess_logits_for_metrics=choose):
        assert 0 <= trainer.evaluate(rows_of(12, 20, 17))["eval_accuracy"] <= 1
        assert seen.pop().predictions.shape == (3, 20)
    assert all(shape[2] == VOCAB and shape[0] <= 2 for shape in widest)


def test_logits_are_made_only_where_somebody_looks_at_them(tmp_path):
    plain, ours = trainers(tmp_path)
    made = []
    for trainer in (plain, ours):
        trainer.model.register_forward_hook(lambda module, given, out: made.append(out.logits is not None))
        loss = trainer.evaluate(rows_of(12, 20))["eval_loss"]
        assert loss > 0
    assert made == [True, False]
    model, ids = trainable().train(), tokens(1, 12)
    assert model(ids, labels=ids).logits is None
    assert model.eval()(ids, labels=ids).logits.shape == (1, 12, VOCAB)


def test_ranks_that_want_logits_call_the_same_layers(monkeypatch):
    """Also with rows of different length; what was added or moved is taken back."""
    collator = SleepCollator(0)
    batches = [collator(rows_of(*lengths)) for lengths in ((30, 3), (9, 18), (44, 26))]
    calls = []
    for batch in batches:
        real = batch["attention_mask"].sort(dim=1, descending=True).values.bool().numpy()
        calls.append(rounds.Calls.of(np.zeros_like(real), real, 8, every=True))
    n_rounds = max(len(one.awake) for one in calls)
    together = torch.stack([torch.from_numpy(one.signature(n_rounds)).to(torch.int32) for one in calls]).amax(0)
    monkeypatch.setattr(
        rounds.dist,
        "all_reduce",
        lambda t, op: t.copy_(torch.tensor([n_rounds, 0]) if t.dtype == torch.long else together),
    )
    model, orders = trainable(dtype=torch.float64), set()
    for batch in batches:
        order = []
        handles = [
            layer.register_forward_pre_hook(lambda *_, i=place, seen=order: seen.append(i))
            for place, layer in enumerate([*model.language_model.model.layers, *model.fast_weights])
        ]
        logits = model(**rounds.equalise(batch, 8, apart=False, every=True)).logits
        for handle in handles:
            handle.remove()
        orders.add(str(order))
        restored = rounds.restore(logits, batch["attention_mask"], batch["input_ids"].shape)
        assert_close(restored, model(batch["input_ids"], batch["attention_mask"]).logits, EXACT)
    assert len(orders) == 1
    with pytest.raises(ValueError, match="one text per row where layers are sharded.*position_ids"):
        rounds.equalise(batches[0] | {"position_ids": torch.arange(30)[None]}, 8, apart=False)


@pytest.mark.parametrize("family", ["sleepify", "ouro", "jet_nemotron"])
def test_labels_are_smoothed_at_the_tokens_before_them(family, tmp_path):
    model = trainable() if family == "sleepify" else tiny_base(family, torch.float32)
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(**common, label_smoothing_factor=0.1)
    trainer = Trainer(model, args, train_dataset=rows_of(9), data_collator=SleepCollator(0, "right"))
    batch = SleepCollator(0, "right")(rows_of(12, 20))
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    assert_close(trainer.compute_loss(model, dict(batch)), expected, FLOAT32)
