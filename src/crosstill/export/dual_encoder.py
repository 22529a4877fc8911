"""A student as a folder that plain transformers loads: `VisionTextDualEncoderModel`.

That class pools each tower by its own pooler and projects without a bias, so only some students
fit; `fits` says why not. The loading side needs transformers 5, torch and Pillow, and nothing of
crosstill:

    AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from crosstill.errors import ConfigError
from crosstill.export import Options, processor
from crosstill.export.card import card
from crosstill.export.facts import Facts
from crosstill.export.folder import aside
from crosstill.export.parity import Parity, measure
from crosstill.export.provenance import Provenance
from crosstill.export.writing import with_recall
from crosstill.progress import quiet
from crosstill.students.student import Student
from crosstill.towers import narrow
from crosstill.towers.build import describe, restore

FORM = "transformers"
_HEADS = {"image_head": "visual_projection", "text_head": "text_projection"}
_TOWERS = {"image_tower": "vision_model", "text_tower": "text_model"}


def fits(student: Student) -> list[str]:
    """Why a student is no `VisionTextDualEncoderModel`; empty for one that is."""
    sides = {"image": student.config.image, "text": student.config.text}
    reasons = [
        f'its {side} tower is pooled by "{tower.pooling}", not by its pooler'
        for side, tower in sides.items()
        if tower.pooling != "pooler"
    ]
    if student.config.bias:
        reasons.append("its heads have a bias")
    if student.config.image.pooling == "pooler" and not processor.pools_to_rows(student):
        kind = describe(student.image_tower.config)["model_type"]
        reasons.append(f"the pooler of a {kind} gives maps (B, W, 1, 1), not rows")
    for side in sides:
        width = getattr(student, f"{side}_head").in_features
        told = getattr(getattr(student, f"{side}_tower").config, "hidden_size", width)
        if told != width:
            reasons.append(f"its {side} tower gives rows of {width} and says hidden_size={told}")
    reasons += _unread(student.text_tower)
    return reasons + [f"it takes {what}" for what in processor.hindrances(student.preprocess)]


def require(student: Student) -> None:
    """Refuse a student that does not fit, with the reasons and another form.

    Raises:
        ConfigError: it does not.
    """
    reasons = fits(student)
    if reasons:
        raise ConfigError(
            f"{student.name} is no VisionTextDualEncoderModel: {'; '.join(reasons)}. "
            "Export it as sentence-transformers or as onnx"
        )


def export(known: Provenance, out: Path, facts: Facts, options: Options) -> list[str]:
    """Measure a student and write it to `out` in this form: see `write`."""
    require(known.student)
    parity = write(known.student, out, card(with_recall(known, facts), FORM))
    return [str(parity)]


def write(student: Student, folder: Path, readme: str) -> Parity:
    """Export a student; the folder is there only if plain transformers gives the same rows.

    Args:
        student: in eval mode or not; it stays as it is.
        folder: new, empty, or an earlier export, which is replaced.
        readme: the text of its README.md, the model card.

    Raises:
        ConfigError: the student does not fit; the message says why, and which form to use.
        ExportError: the rows differ; the message has the figures.
    """
    require(student)
    with aside(folder, 4 * student.parameter_count()) as new:
        _save(student, new)
        (new / "README.md").write_text(readme, encoding="utf-8")
        parity = check(student, new)
        parity.require()
    return parity


def check(student: Student, folder: Path) -> Parity:
    """Load a folder with transformers alone and compare its rows with the student's."""
    with quiet(), torch.random.fork_rng():
        return measure(student, _Loaded(folder), FORM)


class _Loaded:
    """The folder as anyone would load it."""

    def __init__(self, folder: Path) -> None:
        self.model = VisionTextDualEncoderModel.from_pretrained(folder, local_files_only=True)
        self.model.eval()
        self.processor = VisionTextDualEncoderProcessor.from_pretrained(
            folder, local_files_only=True
        )

    def pixels(self, photos: Sequence[Image.Image]) -> Tensor:
        return self.processor(images=list(photos), return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def images(self, values: Tensor) -> Tensor:
        return functional.normalize(self.model.get_image_features(values).pooler_output, dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.processor(
            text=list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)


def _save(student: Student, folder: Path) -> None:
    vision, text = (restore(describe(getattr(student, name).config)) for name in _TOWERS)
    vision.hidden_size = student.image_head.in_features  # a CNN's configuration has none
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=student.dim
    )
    with torch.random.fork_rng(), quiet():
        model = VisionTextDualEncoderModel(config)
        model.load_state_dict({**_weights(student), "logit_scale": model.logit_scale.detach()})
        model.eval().save_pretrained(folder)
        VisionTextDualEncoderProcessor(
            processor.image_processor(student.preprocess), processor.tokenizer(student)
        ).save_pretrained(folder)


def _weights(student: Student) -> dict[str, Tensor]:
    """The student's weights under the names that the class gives them."""
    return {
        f"{theirs}.{name}": value
        for ours, theirs in {**_TOWERS, **_HEADS}.items()
        for name, value in narrow.whole(getattr(student, ours)).state_dict().items()
    }


def _unread(tower: Any) -> list[str]:
    """The class always passes these two, if only as None; some towers do not take them."""
    known = inspect.signature(tower.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return []
    missing = [name for name in ("position_ids", "token_type_ids") if name not in known]
    return [f"its text tower does not take {' and '.join(missing)}"] if missing else []
