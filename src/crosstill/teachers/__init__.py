"""Frozen big models, and vectors that one of them gave: what a student learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crosstill.errors import ModelError

if TYPE_CHECKING:
    import torch

    from crosstill.teachers.base import Teacher
    from crosstill.teachers.features import FeaturesTeacher
    from crosstill.teachers.matcher import Matcher

__all__ = ["load"]

DUAL = "dual:"  # in front of a source: its contrastive heads, not what reads pairs


def load(
    source: str | Path, device: torch.device | None = None
) -> Teacher | FeaturesTeacher | Matcher:
    """Load a teacher.

    Args:
        source: a folder of a Hugging Face dual encoder or fusion model, its hub id, a folder of
            BEiT-3 or METER that `crosstill inspect --out` wrote, a run that trained a fusion
            model, an exported bundle, a folder of OpenCLIP's, or a folder of precomputed vectors
            (`filenames.txt` and a `.npy`), told apart by their contents. "dual:SOURCE" takes the
            contrastive heads of a BLIP in place of what reads pairs, and "open_clip:MODEL:FILE"
            is a model of that library.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError: it cannot be found, or it is not one of these.
    """
    # transformers takes seconds to import, and `crosstill --help` should not wait for it.
    from crosstill.teachers import checkpoints, open_clip
    from crosstill.towers import hub

    text = str(source)
    if text.startswith(open_clip.PREFIX):
        return open_clip.OpenClip(text, device=device)
    source = text.removeprefix(DUAL)
    checkpoints.refuse_file(Path(source))
    folder = hub.locate(source)
    name = hub.display_name(source)
    if text.startswith(DUAL):
        return _dual_heads(folder, name, device)
    return _by_contents(folder, name, device)


def _by_contents(
    folder: Path, name: str, device: torch.device | None
) -> Teacher | FeaturesTeacher | Matcher:
    from crosstill.teachers import beit3, bundle, dual, features, fusion, open_clip

    if bundle.is_bundle(folder):
        return bundle.BundleModel(folder, name)
    if beit3.is_beit3(folder):
        return beit3.load(folder, device)
    if open_clip.is_open_clip(folder):
        return open_clip.OpenClip(folder, name, device)
    if features.is_features(folder):
        return features.FeaturesTeacher(folder, name)
    if fusion.find(folder / "best"):
        return fusion.load(folder / "best", name, device)
    _refuse_ours(folder)
    if fusion.find(folder):
        return fusion.load(folder, name, device)
    return fusion.load_dual(folder, name, device) or dual.DualEncoder(folder, name, device)


def _dual_heads(folder: Path, name: str, device: torch.device | None) -> Teacher:
    from crosstill.teachers import fusion

    found = fusion.load_dual(folder, name, device, fusion.FINDERS)
    if found is None:
        raise ModelError(
            f"{folder}: no model that reads pairs and has contrastive heads too; leave out {DUAL}"
        )
    return found


def _refuse_ours(folder: Path) -> None:
    """Students are no teachers until they are opened as models, and unfinished runs are nothing."""
    if any((folder / place / "student.json").is_file() for place in ("", "best")):
        raise ModelError(
            f"{folder}: a crosstill student; open it with crosstill.evaluate.open_model"
        )
    if (folder / "checkpoints").is_dir() and (folder / "student").is_dir():
        raise ModelError(
            f"{folder}: a run that has not finished an epoch; go on with it by `crosstill train "
            "--resume`"
        )
