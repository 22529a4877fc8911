"""Write model cards: the README.md of an export, with front matter for the Hugging Face hub.

It lists what was measured and on which split, what the student learnt from, the licences of all
that, how to load it, and the command that made it. Where a licence forbids use in trade, or is not
known, the card says so before anything else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from crosstill.export.base import Form
from crosstill.formats import markdown
from crosstill.pixels import Preprocess

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Standing = Literal["free", "bound", "unknown"]

_BOUND = re.compile(
    r"\bnc\b|non-? ?commercial|no(t for)? commercial|research|academic|educational|personal use"
    r"|evaluation only|apple-amlr|deepfloyd-if"
)
# "for research and commercial use" names research, and binds nobody to it.
_BOTH = re.compile(r"\b(research|academic|educational|personal)( use)?( and|,? or|,) commercial")
_FREE = re.compile(
    r"(apache|mit\b|bsd|isc\b|zlib|[al]?gpl|mpl|epl|eupl|afl|artistic|bsl-1|boost|unlicense|wtfpl"
    r"|cc-?0|cc-by(-sa)?(-\d|$)|https?://creativecommons\.org/(licenses/by(-sa)?/|publicdomain)"
    r"|public domain|pddl|odc-by|odbl|cdla|c-uda|ecl|osl|etalab|ms-pl|ncsa|ofl|postgresql|lppl"
    r"|apple-ascl|openmdw|openrail|bigscience|bigcode|creativeml)"
)


@dataclass(frozen=True)
class Origin:
    """One origin of a student: its teacher, its data, or one of its towers.

    Attributes:
        name: of the origin.
        licence: from its own card, or as given; None where it is not known.
        source: a hub id or an address; never a path of this machine.
    """

    name: str
    licence: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Score:
    """One model's figures on one split, in percent: recall, or agreement with its teacher.

    Attributes:
        model: such as "student" or "teacher".
        split: such as "test".
        images, captions: how many there are in it.
        figures: as `crosstill.evaluate.recall.Ranking` has them, the chosen one last.
        heads: their headings.
    """

    model: str
    split: str
    images: int
    captions: int
    figures: tuple[float, ...]
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Rounding:
    """The cost of 8 bits: a figure on a split, before and after, and its name."""

    split: str
    before: float
    after: float
    name: str = "RSUM"

    @property
    def loss(self) -> float:
        """Return the loss in percent of the figure before; below zero where it grew."""
        return 100 * (self.before - self.after) / self.before if self.before else 0.0


@dataclass(frozen=True)
class Facts:
    """The facts that a card states of a student.

    Attributes:
        name: of the student.
        parameters: how many each part has, "total" among them.
        dim: D, the width of the joint space.
        max_length: tokens of a text, special ones included.
        preprocess: how it wants its images.
        scores: recall or agreement, a row each.
        teacher: None for a student that learnt from captions alone.
        data: what it was trained on.
        towers: its pretrained towers, by "image" and "text"; none that began at random.
        command: the line that made it.
        version: of crosstill.
        fingerprint: SHA-256 of weights, preprocess, tokenizer and activation.
        rounding: the cost of int8, for an int8 export.
    """

    name: str
    parameters: Mapping[str, int]
    dim: int
    max_length: int
    preprocess: Preprocess
    data: Origin
    teacher: Origin | None = None
    towers: Mapping[str, Origin] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    command: str = ""
    version: str = ""
    fingerprint: str = ""
    rounding: Rounding | None = None


def card(facts: Facts, form: Form) -> str:
    """Return the text of a README.md.

    Args:
        facts: of the student and what it came from.
        form: of the export.
    """
    name = _line(facts.name)
    taught = f", distilled from {_line(facts.teacher.name)}" if facts.teacher else ""
    parts = [
        _front_matter(facts, form),
        f"# {name}",
        f"A dual encoder for image-text retrieval{taught}: photos and texts become unit rows of "
        f"one space of {facts.dim} dimensions, where a photo and its caption lie close.",
        *_warnings(facts),
        "## Recall" if _is_recall(facts) else "## Agreement with the teacher",
        _recall(facts),
        "## How to load it",
        form.loading,
        "## What it came from",
        _origins(facts),
        "## What it is made of",
        _made_of(facts),
        "## How it was made",
        f"By crosstill {_line(facts.version)}:",
        f"    {_line(facts.command, cell=False)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts, form: Form) -> str:
    origins = [*facts.towers.values(), *([facts.teacher] if facts.teacher else [])]
    # A set has no order of its own, and equal facts give equal bytes.
    bases = list(dict.fromkeys(o.source for o in origins if _is_hub_id(o.source)))
    tags = ["crosstill", "image-text-retrieval", "knowledge-distillation", "dual-encoder"]
    lines = [
        *_licence(facts),
        f"library_name: {form.name}",
        f"pipeline_tag: {form.task}",
        *_listed("tags", [*tags, form.name]),
        *_listed("base_model", [str(base) for base in bases]),
    ]
    return "\n".join(["---", *lines, "---"])


def _licence(facts: Facts) -> list[str]:
    """Write the licence: one where all agree on a free one, else a reference to the card."""
    licences = {origin.licence for _, origin in _all_origins(facts)}
    one = licences.pop() if len(licences) == 1 else None
    if one and standing(one) == "free":
        return [f"license: {json.dumps(one) if re.search(r'[^a-z0-9.-]', one) else one}"]
    bound = any(standing(origin.licence) == "bound" for _, origin in _all_origins(facts))
    name = "non-commercial-see-the-card" if bound else "see-the-card"
    return ["license: other", f"license_name: {name}", "license_link: README.md"]


def _warnings(facts: Facts) -> list[str]:
    """Write a paragraph on origins whose licence binds, and one on those of unknown licence."""
    notices: dict[str, list[str]] = {"bound": [], "unknown": []}
    for role, origin in _all_origins(facts):
        state = standing(origin.licence)
        if state != "free":
            terms = f": {_line(origin.licence)}" if origin.licence else ", which names none"
            notices[state].append(f"{role} ({_line(origin.name)}{terms})")
    texts = {
        "bound": "**Not for commercial use.** The licence of {} forbids it, or allows research "
        "only; what was learnt from it may be bound by the same terms.",
        "unknown": "**A licence is not known.** Read or ask for that of {} before you publish or "
        "sell anything that uses this model.",
    }
    return [
        "> " + texts[state].format(" and of ".join(names))
        for state, names in notices.items()
        if names
    ]


def _is_recall(facts: Facts) -> bool:
    return not facts.scores or facts.scores[0].heads[-1] == "RSUM"


def _recall(facts: Facts) -> str:
    parts = []
    if facts.scores:
        heads = ["model", "split", *facts.scores[0].heads]
        parts.append(markdown(heads, [_cells(score) for score in facts.scores]))
        if not _is_recall(facts):
            parts.append(
                "No photo of the split has captions of its own, so this is no recall. Overlap: how "
                "many of the teacher's ten best results are among the student's ten, in percent; "
                "own: how often the student's row finds the teacher's of the same photo or text."
            )
        sizes = dict.fromkeys((s.split, s.images, s.captions) for s in facts.scores)
        parts += [f"Split {_line(s)}: {i:,} images, {c:,} captions." for s, i, c in sizes]
    else:
        parts.append("Not measured.")
    if facts.rounding:
        lost = facts.rounding
        parts.append(
            f"This export is int8. Its {lost.name} on {_line(lost.split)} is {lost.after:.2f}, and "
            f"was {lost.before:.2f} in float32: a {'loss' if lost.loss >= 0 else 'gain'} of "
            f"{abs(lost.loss):.2f} %."
        )
    return "\n\n".join(parts)


def _cells(score: Score) -> list[str]:
    numbers = [f"{value:.2f}" for value in score.figures]
    return [_line(score.model), _line(score.split), *numbers]


def _origins(facts: Facts) -> str:
    return "\n".join(
        f"- {role[0].upper()}{role[1:]}: {_link(origin)}, licence: "
        f"{_line(origin.licence or 'not known')}"
        for role, origin in _all_origins(facts)
    )


def _made_of(facts: Facts) -> str:
    counts = [[_line(part), f"{count:,}"] for part, count in facts.parameters.items()]
    lines = [
        f"- Photos: {_photos(facts.preprocess)}.",
        f"- Texts: up to {facts.max_length} tokens, special ones included; the rest is cut off.",
        f"- Fingerprint (weights, preprocess, tokenizer, activation): `{_line(facts.fingerprint)}`",
    ]
    return markdown(["part", "parameters"], counts) + "\n\n" + "\n".join(lines)


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


def _line(text: str | None, cell: bool = True) -> str:
    """Put a text on one line; in a table or a paragraph, escape Markdown and HTML too."""
    text = " ".join((text or "").split())
    return re.sub(r"([|*_`<\[\]])", r"\\\1", text) if cell else text


def standing(licence: str | None) -> Standing:
    """Classify a licence by its text, as model cards and people write it.

    Of several in one text ("apache-2.0 and cc-by-nc-4.0") the strictest counts.

    Returns:
        "bound" where it forbids use in trade, or allows research alone; "free" where it is known
        by name not to; else "unknown", as "other" is: somebody has to read it.
    """
    text = " ".join((licence or "").lower().replace("_", "-").split())
    if _BOUND.search(_BOTH.sub("", text)):
        return "bound"
    parts = [_one_spelling(part) for part in re.split(r" and | & |[;+]", text)]
    return "free" if all(_FREE.match(part) for part in parts) else "unknown"


def _one_spelling(text: str) -> str:
    """Spell Creative Commons BY-SA 4.0 and CC BY-SA 4.0 as cc-by-sa-4.0."""
    text = text.strip(" .'\"").removeprefix("the ").replace("creative commons", "cc")
    text = text.replace("attribution", "by").replace("sharealike", "sa")
    return re.sub(r"[\s-]+", "-", text) if text.startswith("cc") else text
