"""Tokenizers for small students: a large one trimmed, or a new one trained.

Trimming keeps the special tokens, every token of a single character, and those that the training
captions use; so any text still encodes, and the captions encode to the very same tokens.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from crosstill.errors import ConfigError, ModelError
from crosstill.formats import encodable

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # what SentencePiece falls back to
_BATCH = 4096
_REMEDY = "make the cache with --texts LINES.txt"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train(captions: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer of about `size` tokens on captions.

    It holds every character, whole and as a continuation, and the most frequent words; the
    tokenizers library's own trainer would number its tokens differently in every process.

    Raises:
        ConfigError: there are no captions to learn from.
    """
    if not captions:
        raise ConfigError(
            f"a text tower without a source learns its tokens: captions are needed; {_REMEDY}, or "
            "give the tower a source"
        )
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        text = normalizer.normalize_str(encodable(caption))
        words.update(word for word, _ in splitter.pre_tokenize_str(text))
    characters = sorted({character for word in words for character in word})
    pieces = [*_SPECIAL, *characters, *(f"##{character}" for character in characters)]
    frequent = sorted(words, key=lambda word: (-words[word], word))
    pieces += [word for word in frequent if len(word) > 1][: max(0, size - len(pieces))]
    ids = {piece: row for row, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{n}_token": token for n, token in zip(names, _SPECIAL, strict=True)}
    return plain(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def plain(tokenizer: Any, backend: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Free a tokenizer of its model's own class, which would rebuild it on loading."""
    backend = backend or Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="right",
        **tokenizer.special_tokens_map,
    )


def trim(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Keep what the captions use and what any other text may fall back to.

    Returns:
        the small tokenizer, and for each of its ids the id that the token had before.

    Raises:
        ConfigError: there are no captions.
        ModelError: the tokenizer is of no known kind, or a caption would encode differently.
    """
    if not captions:
        raise ConfigError(
            'vocabulary = "trim" keeps the tokens of captions: captions are needed; '
            f'{_REMEDY}, or set vocabulary = "full"'
        )
    full = tokenizer.backend_tokenizer
    names = {row: token for token, row in full.get_vocab().items()}
    rules = json.loads(full.to_str())
    used: set[int] = set()
    before = array("q")  # a hash of each caption's ids: of millions they would fill the memory
    for ids in _encode(full, captions):
        used.update(ids)
        before.append(hash(ids))
    kept = {names[row] for row in used} | set(tokenizer.all_special_tokens)
    kept |= {t["content"] for t in rules["added_tokens"] if t["special"]}
    small = Tokenizer.from_str(json.dumps(_restrict(rules, kept)))
    # By its id in the new one, each kept token's id in the old one.
    rows = [
        full.token_to_id(token) for token, _ in sorted(small.get_vocab().items(), key=itemgetter(1))
    ]
    after = (hash(tuple(rows[row] for row in ids)) for ids in _encode(small, captions))
    if any(a != b for a, b in zip(before, after, strict=True)):
        raise ModelError(
            f"trimming this {rules['model']['type']} tokenizer would change how captions are "
            'read; set vocabulary = "full"'
        )
    return plain(tokenizer, small), rows


def _encode(tokenizer: Tokenizer, captions: Sequence[str]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(captions), _BATCH):
        texts = [encodable(text) for text in captions[start : start + _BATCH]]
        yield from (tuple(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))


def _restrict(rules: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """Keep only some tokens of a tokenizer's JSON, numbered anew in their old order."""
    restrict = {"WordPiece": _wordpiece, "BPE": _bpe, "Unigram": _unigram}
    kind = rules["model"].get("type")
    if kind not in restrict:
        raise ModelError(f'no way to trim a {kind} tokenizer; set vocabulary = "full"')
    model = restrict[kind](rules["model"], kept)
    words = model["vocab"] if kind != "Unigram" else [token for token, _ in model["vocab"]]
    ids = {token: row for row, token in enumerate(words)}
    added = []
    for token in sorted(rules["added_tokens"], key=lambda t: t["id"]):
        if token["content"] in kept:
            row = ids.setdefault(token["content"], len(ids))
            added.append({**token, "id": row})
    processor = _renumber(rules.get("post_processor"), ids)
    return {**rules, "model": model, "added_tokens": added, "post_processor": processor}


def _wordpiece(model: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    prefix = model.get("continuing_subword_prefix", "##")
    kept = kept | {t for t in model["vocab"] if len(t.removeprefix(prefix)) == 1}
    return {**model, "vocab": _renumbered(model["vocab"], kept | {model["unk_token"]})}


def _unigram(model: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """The lowest score stays too: it sets what an unknown character costs."""
    rows = model["vocab"]
    lowest = min(score for _, score in rows)
    unknown = None if model["unk_id"] is None else rows[model["unk_id"]][0]
    vocab = [
        [token, score]
        for token, score in rows
        if token in kept or token == unknown or _is_atom(token) or score == lowest
    ]
    place = next((i for i, (token, _) in enumerate(vocab) if token == unknown), None)
    return {**model, "vocab": vocab, "unk_id": place}


def _bpe(model: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """Keep, for each kept token, the merges that build it from characters."""
    suffix = model.get("end_of_word_suffix") or ""
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    atoms = {
        t for t in model["vocab"] if _is_atom(t.removeprefix(prefix).removesuffix(suffix) or t)
    }
    used: set[tuple[str, str]] = set()
    for token in kept & model["vocab"].keys():
        used |= set(_merges(_symbols(token, prefix, suffix), ranks, prefix))
    parts = {part for pair in used for part in (*pair, _join(pair, prefix))}
    kept = kept | atoms | parts | {model.get("unk_token") or ""}
    merges = [list(pair) for pair in pairs if pair in used]
    return {**model, "vocab": _renumbered(model["vocab"], kept), "merges": merges}


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    """List the symbols of a token's characters before any merge."""
    ends = bool(suffix) and token.endswith(suffix)
    body = token.removesuffix(suffix) if ends else token
    symbols = list(body.removeprefix(prefix))
    starts = bool(prefix) and body.startswith(prefix)
    symbols = [s if i == 0 and not starts else prefix + s for i, s in enumerate(symbols)]
    return [*symbols[:-1], symbols[-1] + suffix] if ends and symbols else symbols


def _merges(
    symbols: list[str], ranks: dict[tuple[str, str], int], prefix: str
) -> Iterator[tuple[str, str]]:
    """List the merges that BPE applies to a word, the lowest rank and the leftmost first."""
    while True:
        known = [p for p in pairwise(symbols) if p in ranks]
        if not known:
            return
        pair = min(known, key=ranks.__getitem__)
        yield pair
        at = next(i for i in range(len(symbols)) if tuple(symbols[i : i + 2]) == pair)
        symbols = [*symbols[:at], _join(pair, prefix), *symbols[at + 2 :]]


def _join(pair: tuple[str, ...], prefix: str) -> str:
    return pair[0] + pair[1].removeprefix(prefix)


def _is_atom(token: str) -> bool:
    return len(token) == 1 or bool(_BYTE.fullmatch(token))


def _renumbered(vocab: dict[str, int], kept: set[str]) -> dict[str, int]:
    rows = sorted((row, token) for token, row in vocab.items() if token in kept)
    return {token: new for new, (_, token) in enumerate(rows)}


def _renumber(processor: Any, ids: dict[str, int]) -> Any:
    """Replace token ids, wherever a post-processor names a token: ["[SEP]", 102], or by lists."""
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and type(processor[1]) is int:
            return [processor[0], ids[processor[0]]]
        return [_renumber(part, ids) for part in processor]
    if not isinstance(processor, dict):
        return processor
    if "ids" in processor and "tokens" in processor:
        return {**processor, "ids": [ids[token] for token in processor["tokens"]]}
    return {key: _renumber(part, ids) for key, part in processor.items()}
