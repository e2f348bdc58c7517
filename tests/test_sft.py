"""One's own data: formats, what is refused before a model is loaded, distances, and the recipe from file to results."""

from __future__ import annotations

import json
import math
import runpy
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import small
import talking
import torch
from families import tiny_base, tokens
from tolerances import FLOAT32, assert_close
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from sleepify import SleepForCausalLM
from sleepify.training import (
    DatasetArguments,
    DatasetError,
    SleepCollator,
    SleepTrainer,
    SleepTrainingArguments,
    TextRows,
    evaluate_text,
    load_text,
)
from sleepify.training import recipe as recipes
from sleepify.training.data import SeededByLength
from sleepify.training.evaluate import perplexity
from sleepify.training.text_data import describe_windows
from sleepify.training.text_evaluate import answer_distance, bucket, distances
from sleepify.training.text_format import IGNORE, Encoder

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "recipes" / "configs" / "sft_tiny.yaml"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def nothing_is_fetched(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def tokenizer(template=None):
    made = ByT5Tokenizer(extra_ids=0)
    made.chat_template = template
    return made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, template=None, window_size=8, positions=None, **fields):
    data = DatasetArguments(dataset=str(path), **({"held_out": 0} | fields))
    return load_text(data, tokenizer(template), window_size=window_size, positions=positions)


def predicted(row):
    """The text of a row and, of that, what is predicted."""
    chosen = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE]
    assert all(label in (IGNORE, t) for t, label in zip(row["input_ids"], row["labels"], strict=True))
    return tokenizer().decode(row["input_ids"]), tokenizer().decode(chosen)


CHAT = [("user", "hello"), ("assistant", "hi"), ("user", "bye"), ("assistant", "so long")]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]
QUESTION = {"context": "A fact.", "question": "Which?", "answer": "That."}
SAID = "<user>hello\n<assistant>hi\n<user>bye\n<assistant>so long\n"


@pytest.mark.parametrize(
    ("row", "fields", "whole", "learnt"),
    [
        ({"text": "all of it"}, {}, "all of it</s>", "all of it</s>"),
        ({"body": "all of it"}, {"dataset_columns": '{"text": "body"}'}, "all of it</s>", "all of it</s>"),
        ({"prompt": "two and ", "completion": "two"}, {}, "two and two</s>", "two</s>"),
        (QUESTION, {}, "A fact.\n\nWhich?\nThat.</s>", "That.</s>"),
        (QUESTION, {"question_first": True}, "Which?\n\nA fact.\nThat.</s>", "That.</s>"),
        (QUESTION | {"text": "else"}, {"dataset_format": "text"}, "else</s>", "else</s>"),
        (QUESTION | {"body": "all"}, {"dataset_columns": {"text": "body"}}, "all</s>", "all</s>"),
        ({"messages": MESSAGES}, {}, SAID, "hi\nso long\n"),
        ({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, {}, SAID, "so long\n"),
    ],
)
def test_a_format_is_known_by_its_columns_and_learns_what_it_should(row, fields, whole, learnt, tmp_path):
    data = load(write(tmp_path / "data.jsonl", [row]), TEMPLATE, **fields)
    assert predicted(data.train[0]) == (whole, learnt)
    answer = data.train.answer(0)
    if answer:
        assert tokenizer().decode(data.train[0]["input_ids"][slice(*answer)]) + "</s>" == learnt


TOLD = "{{ bos_token }}{% if tools %}({{ tools | length }}{{ tools[0].name }}){% endif %}"


@pytest.mark.parametrize(
    ("row", "whole", "learnt"),
    [
        ({"text": "<s>ab<end>"}, "<s>ab<end>", "<s>ab<end>"),
        ({"prompt": "<s>ab", "completion": "c<end>"}, "<s>abc<end>", "c<end>"),
        ({"context": "<s>a", "question": "b", "answer": "c<end>"}, "<s>a\n\nb\nc<end>", "c<end>"),
    ],
)
def test_text_that_begins_and_ends_as_the_tokenizer_has_it_does_so_once(row, whole, learnt, tmp_path):
    data = load_text(
        DatasetArguments(write(tmp_path / "d.jsonl", [row]), held_out=0), talking.tokenizer(), window_size=8
    )
    found = data.train[0]
    chosen = [t for t, label in zip(found["input_ids"], found["labels"], strict=True) if label != IGNORE]
    assert [talking.tokenizer().decode(ids) for ids in (found["input_ids"], chosen)] == [whole, learnt]
    if span := data.train.answer(0):
        assert talking.tokenizer().decode(found["input_ids"][slice(*span)]) == "c"


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_template_is_told_of_tools(marks, as_text, tmp_path):
    said = "{% generation %}{{ m.content }}<end>{% endgeneration %}" if marks else "{{ m.content }}<end>"
    body = "{% for m in messages %}<{{ m.role }}>" + said + "{% endfor %}"
    words = talking.tokenizer(TOLD + body + "{% if add_generation_prompt %}<assistant>{% endif %}")
    tools = [{"name": "f"}, {"name": "g"}]
    rows = [{"messages": MESSAGES[:2], "tools": json.dumps(tools) if as_text else tools}]
    rows += [{"messages": MESSAGES[:2], "tools": None}]
    train = load_text(DatasetArguments(write(tmp_path / "d.jsonl", rows), held_out=0), words, window_size=8).train
    chat = "<user>hello<end><assistant>hi<end>"
    assert [words.decode(train[i]["input_ids"]) for i in range(2)] == [f"<s>(2f){chat}", f"<s>{chat}"]


def test_tools_that_are_no_json_are_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"messages": MESSAGES, "tools": "[f"}])
    with pytest.raises(DatasetError, match=r"row 0: expected tools as a list or JSON, got str '\[f'"):
        load(path, TEMPLATE)


def test_what_stands_before_a_first_turn_of_the_assistant_is_not_learnt(tmp_path):
    rows = [{"messages": MESSAGES[1:]}]
    row = load_text(DatasetArguments(write(tmp_path / "d.jsonl", rows), held_out=0), talking.tokenizer(), window_size=8)
    row = row.train[0]
    chosen = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE]
    assert talking.tokenizer().decode(chosen) == "hi<end>so long<end>"


def test_a_marked_template_that_raises_is_one_clear_line(tmp_path):
    words = talking.tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    rows = [{"messages": [{"role": "system", "content": "be kind"}, *MESSAGES]}]
    with pytest.raises(DatasetError, match="row 0: .*TemplateError: no system; give another chat_template"):
        load_text(DatasetArguments(write(tmp_path / "d.jsonl", rows), held_out=0), words, window_size=8)


def test_a_template_that_marks_the_assistant_says_itself_what_is_learnt():
    class Marked:
        """What a tokenizer of chat models gives: ids, and which of them the assistant said."""

        is_fast, bos_token_id, eos_token_id = True, None, None
        chat_template = "{% generation %}{% endgeneration %}"

        def apply_chat_template(self, messages, return_assistant_tokens_mask, **_):
            assert return_assistant_tokens_mask
            return {"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}

    row = Encoder("messages", Marked(), {})({"messages": MESSAGES}, 0)
    assert row["labels"] == [IGNORE, 6, IGNORE, 8]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"txt": "a"}], {}, r"data.jsonl: expected columns of one of the formats .*got \['txt'\]: rename them"),
        ([{"question": "a", "answer": "b"}], {"dataset_format": "question_answer"}, "missing context; got"),
        ([{"text": "a"}], {"dataset_columns": {"text": "txt"}}, r"a column 'txt' for text.*did you mean 'text'"),
        ([{"text": "a"}], {"dataset_format": "txt"}, "dataset_format to be one of"),
        ([{"text": "fine"}, {"text": 3}], {}, "row 1: expected text to be text, got int 3"),
        ([{"text": "fine"}, {"text": None}], {}, "row 1: expected text to be text, got NoneType"),
        ([{"text": "fine"}, {"text": " \n"}], {}, r"row 1: expected text to say something, got str ' \\n'; take"),
        ([{"text": "longer than"}], {"positions": 8}, "row 0: expected at most 8 tokens.*got 12: split.*eviction=hard"),
        ([{"messages": MESSAGES}], {}, "a chat template for messages, the tokenizer has none: give chat_template"),
        (
            [{"messages": MESSAGES}],
            {"chat_template": "{{ raise_exception('alternate!') }}"},
            "TemplateError: alternate!",
        ),
        (
            [{"messages": MESSAGES}],
            {"chat_template": "{% for m in messages[-2:] %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"},
            "the chat template: expected a chat template that leaves earlier turns as they are",
        ),
        ([{"messages": MESSAGES[:1]}], {"chat_template": TEMPLATE}, "row 0: expected a message of the assistant"),
        ([{"messages": "hello"}], {"chat_template": TEMPLATE}, "row 0: expected messages as a list, got str 'hello'"),
        ([{"text": "a"}], {"held_out": 0.5}, "several rows, or a text long enough"),
        ([{"text": "a" * 99}], {"held_out": 2}, "held_out to be a share below 1 of a single text.*got 2 rows"),
        ([{"prompt": "a", "completion": "b"}], {"held_out": 2}, "several rows, or a text long enough"),
        ([{"text": "ab"}, {"text": "cd"}], {"held_out": 2}, "held_out to leave rows to train on, got 2 of 2"),
        ([{"text": "ab"}], {"streaming": True, "held_out": 0.1}, "a number of rows.*give held_out=100"),
    ],
)
def test_bad_data_is_one_clear_line(rows, fields, message, tmp_path):
    with pytest.raises(DatasetError, match=message) as caught:
        load(write(tmp_path / "data.jsonl", rows), **fields)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_no_data_is_one_clear_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{not json")
    (tmp_path / "picture.png").write_text("x")
    for name in ("none.jsonl", "empty.jsonl", "broken.jsonl", "picture.png"):
        with pytest.raises(DatasetError, match=name) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match="expected a tokenizer"):
        load_text(DatasetArguments(dataset="x"), None, window_size=8)
    with pytest.raises(DatasetError, match="expected dataset: a name on the Hub, a folder or a file"):
        load_text(DatasetArguments(), tokenizer(), window_size=8)


def test_files_folders_and_streams_give_the_same_rows(tmp_path):
    import datasets

    rows = [{"text": "ab" * n} for n in range(1, 8)]
    path = write(tmp_path / "data.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", rows)
    (tmp_path / "data.txt").write_text("\n".join(row["text"] for row in rows))
    wanted = [load(path).train[i]["input_ids"] for i in range(7)]
    for other, fields in (
        (tmp_path / "data.parquet", {}),
        (tmp_path / "folder", {}),
        (tmp_path / "data.txt", {"text_rows": "line"}),
    ):
        found = load(other, **fields).train
        assert [found[i]["input_ids"] for i in range(len(found))] == wanted
    streamed = load(path, streaming=True, held_out=2)
    assert [streamed.held_out[i]["input_ids"] for i in range(2)] == wanted[:2]
    # Without end, and sorted by length.
    assert [row["input_ids"] for row in islice(streamed.train, 8)] == [*wanted[2:], *wanted[2:5]]
    part = load(path, dataset_split="train[2:5]").train
    assert [part[i]["input_ids"] for i in range(len(part))] == wanted[2:5]
    # A text is one row, whatever its length; only its end can be held out.
    whole = load(tmp_path / "data.txt", held_out=0.25)
    assert len(whole.train) == len(whole.held_out) == 1
    assert (
        whole.train[0]["input_ids"] + whole.held_out[0]["input_ids"]
        == load(tmp_path / "data.txt").train[0]["input_ids"]
    )
    assert len(whole.held_out[0]["input_ids"]) == round(0.25 * whole.windows["max"] * 8)


def test_held_out_rows_are_not_trained_on_and_similar_lengths_come_together(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": f"{n:03d}" + "x" * (n % 10) * 5} for n in range(400)])
    data = load(path, held_out=0.2)
    train, test = ({predicted(rows[i])[0] for i in range(len(rows))} for rows in (data.train, data.held_out))
    assert len(test) == 80 and len(train | test) == 400
    spread = [max(group) - min(group) for group in grouped(data.train, 4)]
    assert sum(spread) / len(spread) < 5


def order(rows, size, seed=0, epoch=None):
    settings = {"train_batch_size": size, "gradient_accumulation_steps": 1, "length_column_name": "length"}
    return list(SeededByLength(rows, SimpleNamespace(**settings, seed=seed, data_seed=None), lambda: epoch))


def grouped(rows, size):
    lengths = [rows.lengths[i] for i in order(rows, size)]
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


@pytest.mark.parametrize("kind", ["ours", "datasets", "list"])
def test_an_epoch_has_its_own_order_which_a_resumed_run_finds_again(tmp_path, kind):
    rows = load(write(tmp_path / "data.jsonl", [{"text": "AB" * (n % 5 + 2)} for n in range(12)])).train
    if kind != "ours":
        rows = [rows[index] for index in range(12)]
    if kind == "datasets":
        rows = datasets.Dataset.from_list(rows)

    def trainer(steps, **settings):
        settings |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        return SleepTrainer(
            small.trainable(layers=1, window_size=4),
            SleepTrainingArguments(
                str(tmp_path / "run"),
                max_steps=steps,
                lr_scheduler_type="constant",
                train_sampling_strategy="group_by_length",
                use_cpu=True,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=rows,
            data_collator=SleepCollator(0),
        )

    def told(run):
        return [line["loss"] for line in run.state.log_history if "loss" in line]

    first = trainer(10)
    first.train()
    orders = [order(rows, 2, epoch=epoch) for epoch in (None, 1.0, 0.5)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert order(rows, 2, seed=1) != orders[2]
    with pytest.raises(ValueError, match="'input_ids' key"):
        order([{"text": "A"}], 2)
    # Within the second epoch of six steps.
    second = trainer(10)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert told(second) == told(first)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_have_no_part_of_a_stream_end(workers, tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": "ab" * n} for n in range(1, 8)])
    stream = load(path, streaming=True, held_out=2).train
    batches = DataLoader(stream, batch_size=2, collate_fn=list, num_workers=workers, timeout=60)
    found = [row["input_ids"] for batch in islice(batches, 4) for row in batch]
    assert found == [row["input_ids"] for row in islice(stream, 8)]


def test_several_workers_do_not_hold_rows_out_of_a_stream_of_several_files(tmp_path):
    (tmp_path / "many").mkdir()
    for name in "ab":
        write(tmp_path / "many" / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(3)])
    stream = load(tmp_path / "many", streaming=True, held_out=2).train
    with pytest.raises(ValueError, match="dataloader_num_workers of at most 1 for a stream of 2 files .*2 rows, got 2"):
        next(iter(DataLoader(stream, batch_size=1, collate_fn=list, num_workers=2, timeout=60)))
    found = list(islice(DataLoader(stream, batch_size=1, collate_fn=list, num_workers=1, timeout=60), 4))
    assert sorted(predicted(row)[0] for (row,) in found) == ["a2</s>", "b0</s>", "b1</s>", "b2</s>"]
    arguments = ["--dataset", str(tmp_path / "many"), "--streaming", "--dataloader_num_workers", "2"]
    with pytest.raises(ValueError, match="dataloader_num_workers of at most 1"):
        run(tmp_path, *arguments, "--held_out", "2")


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_lines_of_a_text_file_are_no_rows(streaming, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.txt").write_text("one\n\ntwo\n \n\n\nthree\n")
    for path in (tmp_path / "folder", tmp_path / "folder" / "data.txt"):
        train = load(path, text_rows="line", streaming=streaming).train
        found = islice(iter(train), 3) if streaming else [train[i] for i in range(len(train))]
        assert sorted(predicted(row)[0] for row in found) == ["one</s>", "three</s>", "two</s>"]


def test_rows_that_never_sleep_are_warned_about_before_training(tmp_path, caplog):
    path = write(tmp_path / "data.jsonl", [{"text": "a" * 9}, {"text": "a" * 29}])
    assert (
        load(path).windows
        == describe_windows([10, 30], 8)
        == {"rows": 2, "min": 1.25, "median": 2.5, "mean": 2.5, "max": 3.75, "share_that_sleeps": 1.0}
    )
    assert "2 rows of text: 1.2 to 3.8 windows of 8 tokens (median 2.5), 100% of them sleep" in caplog.text
    assert "no row fills" not in caplog.text
    assert load(path, window_size=30).windows["share_that_sleeps"] == 0
    assert "no row fills a window" in caplog.text


def test_distances_are_those_of_a_search():
    ids = tokens(1, 60)[0].remainder(4).tolist()
    for window in (5, 8):
        found = distances(ids, window)
        for column in range(1, len(ids)):
            pair, reading = ids[column - 1 : column + 1], column - 1
            before = [i for i in range(1, column) if ids[i - 1 : i + 1] == pair]
            expected = None
            if before:
                end = (before[-1] // window + 1) * window
                expected = 0 if reading < end else reading - end + 1
            assert found[column] == expected, column
    assert answer_distance([1, 2, 3, 9, 9, 9, 9, 2, 3], 7, 9, 4) == 3
    assert answer_distance([1, 2, 3, 9, 2, 3], 4, 6, 4) == 0
    assert answer_distance([1, 2, 3, 9, 2, 4], 4, 6, 4) is None
    assert [bucket(d, 8) for d in (None, 0, 1, 8, 9, 16, 17, 32, 33)] == [
        "new",
        "0",
        "1-8",
        "1-8",
        "9-16",
        "9-16",
        "17-32",
        "17-32",
        "33-64",
    ]


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_distance_0_is_what_attention_reaches(eviction):
    window, reading = 8, 17
    model = small.trainable(dtype=torch.float64, eviction=eviction, window_size=window, n_loops=1, layers=1).eval()
    for layer in model.fast_weights:
        torch.nn.init.zeros_(layer.o_proj.weight)
    for last in range(1, reading):
        ids = tokens(1, reading + 2, seed=4)[0] % 30
        ids[last - 1 : last + 1] = ids[reading : reading + 2] = torch.tensor([40, 41])
        other = ids.clone()
        other[last] = 42
        with torch.no_grad():
            now, then = (model(each[None], use_cache=False).logits[0, reading] for each in (ids, other))
        distance = distances(ids.tolist(), window, eviction == "sliding")[reading + 1]
        if last < reading - 1:  # else the pairs overlap
            assert (distance == 0) == (not torch.equal(now, then)), last


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_distances_are_those_of_the_models_eviction(eviction):
    rows = held_out()
    found = evaluate_text(small.trainable(eviction=eviction), rows, window_size=8)["perplexity_by_distance"]
    wanted: dict[str, int] = {}
    for i in range(3):
        ids, labels = (rows[i][name] for name in ("input_ids", "labels"))
        told = distances(ids, 8, eviction == "sliding")
        for distance in (told[column] for column, label in enumerate(labels) if label != IGNORE):
            wanted[bucket(distance, 8)] = wanted.get(bucket(distance, 8), 0) + 1
    assert {name: each["tokens"] for name, each in found.items()} == wanted


class Listed:
    """Columns of rows, as a dataset gives them."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def held_out(answered=True):
    rows = []
    for n, length in enumerate((21, 30, 13)):
        ids = tokens(1, length, seed=n)[0].remainder(7).add(3).tolist()
        labels = [IGNORE] * (length - 4) + ids[-4:] if answered else ids
        rows.append(
            {"input_ids": ids, "labels": labels, "length": length, "answer": [length - 4, length - 2] * answered}
        )
    return TextRows(Listed(rows))


@pytest.mark.parametrize("count", [0, -3])
def test_no_rows_are_no_perplexity(count):
    with pytest.raises(ValueError, match=f"expected n_examples to be a whole number of at least 1, got {count}"):
        evaluate_text(small.trainable(), held_out(), window_size=8, n_examples=count)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    model = small.trainable()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert evaluate_text(model, held_out(), window_size=8)["perplexity"] == math.inf
    assert perplexity(model, held_out()[0]["input_ids"], context=16) == math.inf


@pytest.mark.parametrize("kind", ["sleeping", "plain"])
def test_perplexity_by_distance_is_that_of_the_logits(kind, monkeypatch):
    monkeypatch.setattr("sleepify.training.text_evaluate.PIECE", 4)
    model = small.trainable() if kind == "sleeping" else tiny_base("qwen3", torch.float32)
    rows = held_out(answered=False)
    results = evaluate_text(model, rows, window_size=8, batch_size=2)
    sums: dict[str, list[float]] = {}
    for i in range(3):
        ids = rows[i]["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        costs = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()
        for distance, cost in zip(distances(ids, 8)[1:], costs, strict=True):
            sums.setdefault(bucket(distance, 8), []).append(cost)
    assert results["perplexity_by_distance"].keys() == sums.keys() and len(sums) >= 3
    for name, costs in sums.items():
        found = results["perplexity_by_distance"][name]
        assert found["tokens"] == len(costs)
        assert_close(torch.tensor(math.log(found["perplexity"])), torch.tensor(sum(costs) / len(costs)), FLOAT32)
    everything = [cost for costs in sums.values() for cost in costs]
    assert results["perplexity"] == pytest.approx(math.exp(sum(everything) / len(everything)), rel=1e-5)
    assert "exact_match" not in results and not model.training


def test_an_answer_is_right_if_all_its_tokens_are_the_first_choice():
    model, rows = small.trainable(), held_out()
    for i in range(2):
        # Two of the three answers become what the model would say.
        row = rows.rows[i]
        start, stop = row["answer"]
        for column in range(start, stop):
            with torch.no_grad():
                row["input_ids"][column] = int(model(torch.tensor([row["input_ids"][:column]])).logits[0, -1].argmax())
            row["labels"][column] = row["input_ids"][column]
    right = evaluate_text(model, rows, window_size=8, batch_size=3)["exact_match"]
    assert right["correct"] == 2 and right["total"] == 3 and right["accuracy"] == pytest.approx(2 / 3)
    rows.rows[0]["input_ids"][rows.answer(0)[0]] += 1
    assert evaluate_text(model, rows, window_size=8)["exact_match"]["correct"] < 2


# --- the recipe


def run(tmp_path, *overrides):
    return recipes.run(None, [str(TINY), "--output_dir", str(tmp_path / "out"), "--disable_tqdm", *overrides])


def test_the_tiny_recipe_trains_saves_and_tells_what_came_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(tmp_path, "--distill", "0.5", "--distill_teacher", str(save_bytes_base(tmp_path / "teacher")))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == result.results
    assert written["perplexity"] > 1 and set(written["by_n_loops"]) == {"1", "2"}
    assert written["exact_match"]["total"] == written["held_out_rows"] == 4
    assert written["windows_per_row"]["rows"] == 20 and written["windows_per_row"]["min"] > 2
    assert any(name not in ("0", "new") for name in written["exact_match_by_distance"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, SleepForCausalLM) and model.config.window_size == 64
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.encode("text") == tokenizer().encode("text")
    data = load_text(DatasetArguments(str(TINY.with_suffix(".jsonl")), held_out=4), loaded, window_size=64)
    again = evaluate_text(model, data.held_out, window_size=64, batch_size=8)
    assert again["perplexity"] == pytest.approx(written["perplexity"], rel=1e-4)


def save_bytes_base(folder):
    tiny_base("qwen3", torch.float32, vocab_size=259).save_pretrained(folder)
    return folder


def test_a_stream_and_a_plain_base_are_trained_by_the_same_recipe(tmp_path):
    streamed = run(tmp_path, "--streaming", "--test_n_loops", "2").results
    assert streamed["train_rows"] is None and streamed["train_steps"] == 2
    with pytest.raises(ValueError, match="max_steps with streaming"):
        run(tmp_path, "--streaming", "--max_steps", "-1")
    config = tmp_path / "plain.yaml"
    config.write_text(f"extends: {TINY}\nsleep: false\ntest_n_loops: null\noutput_dir: {tmp_path / 'plain'}\n")
    plain = recipes.run(None, [str(config)]).results
    assert plain["perplexity"] > 1 and "by_n_loops" not in plain


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(("--sleep", "false"), "expected a sleeping model"), (("--test_n_loops", "2", "0"), "n_loops")],
)
def test_what_cannot_be_tested_is_refused_before_the_training(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *wrong)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_rows_longer_than_the_positions_are_refused_where_positions_run_on(tmp_path):
    lines = [f"extends: {TINY}", "architecture: {max_position_embeddings: 128}", f"output_dir: {tmp_path}"]
    config = tmp_path / "short.yaml"
    config.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=r"row 0: expected at most 128 tokens, .* got 15\d.*eviction=hard"):
        recipes.run("sft", [str(config), "--eviction", "sliding"])


def test_the_script_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    bad = write(tmp_path / "bad.jsonl", [{"txt": "a"}])
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sft.py", str(TINY), "--dataset", bad, "--output_dir", str(out)])
    with pytest.raises(SystemExit, match=r"^error: .*bad.jsonl: expected columns of one of the formats"):
        runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")
    assert not out.exists()
