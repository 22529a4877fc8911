"""A model card: the README.md of an export, with the front matter that the Hugging Face hub reads.

It lists what was measured and on which split, what the student learnt from, the licences of all
that, how to load it, and the command that made it. Where a licence forbids use in trade, or is not
known, the card says so before anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from crosstill.evaluate.tabular import markdown
from crosstill.export.facts import Facts, Origin, Score
from crosstill.export.licences import standing
from crosstill.preprocess import Preprocess

_TASK = {
    "transformers": "feature-extraction",
    "sentence-transformers": "sentence-similarity",
    "onnx": "feature-extraction",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LOADING = {
    "transformers": """\
Needs transformers 5, torch and Pillow; nothing of crosstill.

```python
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
texts = ["two dogs on snow", "a red car"]
with torch.inference_mode():
    image = model.get_image_features(**processor(images=photo, return_tensors="pt"))
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
    text = model.get_text_features(**tokens)
print(torch.cosine_similarity(image.pooler_output, text.pooler_output))
```

The features are not yet of unit length: compare them by cosine. `logit_scale` was not trained.""",
    "sentence-transformers": """\
Needs sentence-transformers 6 and Pillow; nothing of crosstill, and no `trust_remote_code`.

```python
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(FOLDER)
photos = model.encode([ImageOps.exif_transpose(Image.open("photo.jpg"))])
texts = model.encode(["two dogs on snow", "a red car"])
print(model.similarity(photos, texts))
```

Rows are of unit length. A list holds texts or photos (PIL images, paths, addresses), not both.""",
    "onnx": """\
Needs onnxruntime and crosstill; no torch.

```sh
crosstill index BUNDLE PHOTOS --out INDEX
crosstill search INDEX "two dogs on snow"
```

```python
from pathlib import Path
from crosstill.bundle import Bundle, Encoder

encoder = Encoder(Bundle.open(Path("BUNDLE")))
pixels = encoder.load(Path("photo.jpg").read_bytes(), "photo.jpg")
print(encoder.encode_images(pixels[None]) @ encoder.encode_texts(["two dogs on snow"]).T)
```

Rows are of unit length.""",
}


def card(facts: Facts, form: str) -> str:
    """The text of a README.md.

    Args:
        facts: of the student and what it came from.
        form: "transformers", "sentence-transformers" or "onnx".
    """
    name = _line(facts.name)
    taught = f", distilled from {_line(facts.teacher.name)}" if facts.teacher else ""
    parts = [
        _front_matter(facts, form),
        f"# {name}",
        f"A dual encoder for image-text retrieval{taught}: photos and texts become unit rows of "
        f"one space of {facts.dim} dimensions, where a photo and its caption lie close.",
        *_warnings(facts),
        "## Recall",
        _recall(facts),
        "## How to load it",
        _LOADING[form],
        "## What it came from",
        _origins(facts),
        "## What it is made of",
        _made_of(facts),
        "## How it was made",
        f"By crosstill {_line(facts.version)}:",
        f"    {_line(facts.command, cell=False)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts, form: str) -> str:
    origins = [*facts.towers.values(), *([facts.teacher] if facts.teacher else [])]
    # A set has no order of its own, and equal facts give equal bytes.
    bases = list(dict.fromkeys(o.source for o in origins if _is_hub_id(o.source)))
    tags = ["crosstill", "image-text-retrieval", "knowledge-distillation", "dual-encoder", form]
    lines = [
        *_licence(facts),
        f"library_name: {form}",
        f"pipeline_tag: {_TASK[form]}",
        *_listed("tags", tags),
        *_listed("base_model", [str(base) for base in bases]),
    ]
    return "\n".join(["---", *lines, "---"])


def _licence(facts: Facts) -> list[str]:
    """One licence where all agree on a free one; else the table below has to be read."""
    licences = {origin.licence for _, origin in _all_origins(facts)}
    one = licences.pop() if len(licences) == 1 else None
    if one and standing(one) == "free":
        return [f"license: {json.dumps(one) if re.search(r'[^a-z0-9.-]', one) else one}"]
    bound = any(standing(origin.licence) == "bound" for _, origin in _all_origins(facts))
    name = "non-commercial-see-the-card" if bound else "see-the-card"
    return ["license: other", f"license_name: {name}", "license_link: README.md"]


def _warnings(facts: Facts) -> list[str]:
    """A paragraph of those that are bound, and one of those of which nothing is known."""
    found: dict[str, list[str]] = {"bound": [], "unknown": []}
    for role, origin in _all_origins(facts):
        state = standing(origin.licence)
        if state != "free":
            told = f": {_line(origin.licence)}" if origin.licence else ", which names none"
            found[state].append(f"{role} ({_line(origin.name)}{told})")
    texts = {
        "bound": "**Not for commercial use.** The licence of {} forbids it, or allows research "
        "only; what was learnt from it may be bound by the same terms.",
        "unknown": "**A licence is not known.** Read or ask for that of {} before you publish or "
        "sell anything that uses this model.",
    }
    return ["> " + texts[state].format(_and(who)) for state, who in found.items() if who]


def _recall(facts: Facts) -> str:
    parts = []
    if facts.scores:
        heads = ["model", "split", "image→text R@1", "R@5", "R@10", "text→image R@1", "R@5"]
        parts.append(markdown([*heads, "R@10", "RSUM"], [_cells(s) for s in facts.scores]))
        sizes = dict.fromkeys((s.split, s.images, s.captions) for s in facts.scores)
        parts += [f"Split {_line(s)}: {i:,} images, {c:,} captions." for s, i, c in sizes]
    else:
        parts.append("Not measured.")
    if facts.rounding:
        lost = facts.rounding
        parts.append(
            f"This export is int8. Its RSUM on {_line(lost.split)} is {lost.after:.2f}, and was "
            f"{lost.before:.2f} in float32: a {'loss' if lost.loss >= 0 else 'gain'} of "
            f"{abs(lost.loss):.2f} %."
        )
    return "\n\n".join(parts)


def _cells(score: Score) -> list[str]:
    numbers = [f"{value:.2f}" for value in (*score.i2t, *score.t2i, score.rsum)]
    return [_line(score.model), _line(score.split), *numbers]


def _origins(facts: Facts) -> str:
    return "\n".join(
        f"- {role[0].upper()}{role[1:]}: {_link(origin)}, licence: "
        f"{_line(origin.licence or 'not known')}"
        for role, origin in _all_origins(facts)
    )


def _made_of(facts: Facts) -> str:
    counts = [[_line(part), f"{count:,}"] for part, count in facts.parameters.items()]
    told = [
        f"- Photos: {_photos(facts.preprocess)}.",
        f"- Texts: up to {facts.max_length} tokens, special ones included; the rest is cut off.",
        f"- Fingerprint (weights, preprocess, tokenizer, activation): `{_line(facts.fingerprint)}`",
    ]
    return markdown(["part", "parameters"], counts) + "\n\n" + "\n".join(told)


def _photos(preprocess: Preprocess) -> str:
    height, width = preprocess.size
    side = preprocess.shorter or max(preprocess.size)
    how = {
        "squash": f"squashed to {width} x {height} pixels",
        "crop": f"shorter side to {side} pixels, then {width} x {height} from the centre",
        "fit": f"shorter side to {side} pixels, nothing cut",
    }[preprocess.resize]
    mean, std = (", ".join(f"{v:g}" for v in row) for row in (preprocess.mean, preprocess.std))
    return f"upright RGB, {how} ({preprocess.interpolation}), mean {mean}, std {std}"


def _all_origins(facts: Facts) -> list[tuple[str, Origin]]:
    taught = [("the teacher", facts.teacher)] if facts.teacher else []
    towers = [(f"the {side} tower", origin) for side, origin in facts.towers.items()]
    return [*taught, ("the data", facts.data), *towers]


def _link(origin: Origin) -> str:
    name, source = _line(origin.name), origin.source or ""
    if _is_hub_id(source):
        return f"[{name}](https://huggingface.co/{source})"
    return f"[{name}]({source})" if re.fullmatch(r"https?://[^\s()<>|]+", source) else name


def _is_hub_id(source: str | None) -> bool:
    return bool(_HUB_ID.fullmatch(source or ""))


def _listed(key: str, values: Sequence[str]) -> list[str]:
    return [f"{key}:", *(f"- {value}" for value in values)] if values else []


def _and(words: Sequence[str]) -> str:
    return " and of ".join(words)


def _line(text: str | None, cell: bool = True) -> str:
    """On one line; in a table or a paragraph also without what Markdown and HTML would read."""
    text = " ".join((text or "").split())
    return re.sub(r"([|*_`<\[\]])", r"\\\1", text) if cell else text
