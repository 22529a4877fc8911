import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from crosstill.errors import ConfigError, ModelError
from crosstill.formats import encodable
from crosstill.towers import vocabulary

CORPUS = [
    "the quick brown foxes jumped over the laziest dogs in the harbour",
    "elephants and umbrellas are seldom seen together; yet here they are, walking!",
    "a child in a yellow raincoat walks along the harbour wall at 7:45",
    "漢字 и кириллица café naïve 🎈",
] * 4
CAPTIONS = ["the quick dogs walking", "a child in the harbour", "yellow foxes, jumped!"]
ODD = [
    "elephants",
    "🎈🦒",
    "漢字 кириллица",
    "zzzyx",
    "",
    "\ud800",
    "naïve café",
    "a" * 300,
    "\t\n",
]


def _wordpiece() -> PreTrainedTokenizerFast:
    return vocabulary.train(CORPUS, 400)


def _byte_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2 and RoBERTa: bytes, a leading space, special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _word_end_bpe() -> PreTrainedTokenizerFast:
    """As CLIP: bytes, `</w>` closes a word, special tokens at the end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|end|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # CLIP's vocabulary holds each byte twice, inside and at the end of a word, and its ends.
    rules = json.loads(tokenizer.to_str())
    for token in [*(letter + "</w>" for letter in alphabet), "<|start|>", "<|end|>"]:
        rules["model"]["vocab"].setdefault(token, len(rules["model"]["vocab"]))
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|start|>", "<|end|>")])
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>",
        special_tokens=[(t, ids[t]) for t in ("<|start|>", "<|end|>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|end|>", unk_token="<|end|>"
    )


def _unigram() -> PreTrainedTokenizerFast:
    """As T5 and XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = [_wordpiece, _byte_bpe, _word_end_bpe, _unigram]
Make = Callable[[], PreTrainedTokenizerFast]


@pytest.mark.parametrize("make", KINDS)
def test_captions_keep_their_tokens_and_rows_follow(make: Make) -> None:
    full = make()
    small, rows = vocabulary.trim(full, CAPTIONS)
    assert len(small) == len(rows) == len(set(rows)) < len(full)
    assert rows == sorted(rows)
    for caption in CAPTIONS:
        before, after = full(caption)["input_ids"], small(caption)["input_ids"]
        assert [rows[i] for i in after] == before
        assert small.decode(after) == full.decode(before)


@pytest.mark.parametrize("make", KINDS)
def test_any_text_still_encodes(make: Make) -> None:
    full = make()
    small, rows = vocabulary.trim(full, CAPTIONS)
    for text in map(encodable, ODD):
        after = small(text)["input_ids"]
        assert all(0 <= i < len(rows) for i in after)
        assert (full.unk_token in small.tokenize(text)) == (full.unk_token in full.tokenize(text))


@pytest.mark.parametrize("make", KINDS)
def test_special_tokens_stay_special(make: Make) -> None:
    full = make()
    small, rows = vocabulary.trim(full, CAPTIONS)
    assert small.special_tokens_map == full.special_tokens_map
    assert [rows[i] for i in small.all_special_ids] == full.all_special_ids


@pytest.mark.parametrize("make", KINDS)
def test_it_survives_saving(make: Make, tmp_path: Path) -> None:
    small, _ = vocabulary.trim(make(), CAPTIONS)
    small.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(CAPTIONS)["input_ids"] == small(CAPTIONS)["input_ids"]


def test_a_trained_tokenizer_lowers_and_covers_its_captions() -> None:
    tokenizer = vocabulary.train(["A red cube.", "a Red ball!"], 200)
    tokens = tokenizer.tokenize("A RED cube.", add_special_tokens=True)
    assert tokens == ["[CLS]", "a", "red", "cube", ".", "[SEP]"]
    assert tokenizer("§")["input_ids"][1] == tokenizer.unk_token_id


def test_captions_are_needed() -> None:
    with pytest.raises(ConfigError, match="captions are needed"):
        vocabulary.train([], 100)
    with pytest.raises(ConfigError, match="captions are needed"):
        vocabulary.trim(_wordpiece(), [])


def test_a_kind_that_cannot_be_trimmed() -> None:
    words = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]")
    with pytest.raises(ModelError, match="WordLevel"):
        vocabulary.trim(tokenizer, ["a"])
