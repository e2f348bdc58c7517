"""A model that sleeps learns two facts by TRL's SFTTrainer, as its README shows it, and is asked after loading.

The base and its tokenizer are made on the spot, so that nothing is downloaded; with a model of yours, only the lines
under "yours" change. Rows are longer than a window: the question is asleep before the answer is over.

    pip install 'sleepify[train]' trl
    python examples/trl_sft.py [FOLDER]      # seconds on a CPU
"""

from __future__ import annotations

import sys
import warnings

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config
from trl import SFTConfig, SFTTrainer

from sleepify import Session, lora_config, sleepify

FACTS = {"where is the key": "under the mat", "who has the map": "the old pilot"}
WINDOW = 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the facts a token."""
    said = " ".join([*FACTS, *FACTS.values()]).split()
    words = dict.fromkeys(["<pad>", "<s>", "</s>", "<user>", "<assistant>", *said])
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )


def base(vocab_size: int) -> PreTrainedModel:
    """A small model of random weights, the same every time."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def main(folder: str = "outputs/trl_sft") -> tuple[float, dict[str, str], int]:
    """Train, save, load onto a fresh base, ask.

    Returns:
        The loss after training, what was answered, and how many windows the longest row fills.
    """
    words = tokenizer()
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in FACTS.items()
    ]
    longest = max(len(words.apply_chat_template(row["messages"], return_dict=False)) for row in rows)
    dataset = Dataset.from_list(rows)

    # --- yours: a name in the place of base(...), your dataset, your steps
    model = sleepify(base(len(words)), n_loops=2, window_size=WINDOW)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(folder, max_steps=30, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=dataset,
        processing_class=words,
        peft_config=lora_config(model),
    )
    trainer.train()
    loss = trainer.evaluate(dataset)["eval_loss"]
    trainer.save_model(folder)
    # ---

    again = PeftModel.from_pretrained(sleepify(base(len(words)), n_loops=2, window_size=WINDOW), folder)
    session = Session(again.merge_and_unload().eval(), AutoTokenizer.from_pretrained(folder))
    answers = {question: session.fork().say(question, max_new_tokens=12, do_sample=False) for question in FACTS}
    print(f"rows of up to {longest} tokens in windows of {WINDOW}; loss {loss:.3f}")
    for question, answer in answers.items():
        print(f"{question}? {answer}")
    return loss, answers, (longest - 1) // WINDOW


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
