"""A tokenizer whose tokens are whole words, with a chat template that marks what an assistant says."""

from __future__ import annotations

from families import VOCAB
from transformers import PreTrainedTokenizerFast

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
TEMPLATE = (
    "{% for m in messages %}{{ ' w3 ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    named.chat_template = TEMPLATE
    return named
