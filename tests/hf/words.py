"""A tokenizer for the tiny models: word `w<id>` is the token `id`."""

from families import BOS, FIRST_TOKEN, PAD, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 2  # the special token that ends a text
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces; pads on the left."""
    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": END} | {f"w{id_}": id_ for id_ in range(FIRST_TOKEN, VOCAB)}
    vocab["abcdef"] = VOCAB  # transformers asks for this word where stop strings are given; no model says it
    words = Tokenizer(models.WordLevel(vocab, unk_token=f"w{VOCAB - 1}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", chat_template=TEMPLATE, **special)


def text(tokens: list[int]) -> str:
    """The words of some tokens."""
    return " ".join(f"w{token}" for token in tokens)
