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


def load(
    source: str | Path, device: torch.device | None = None
) -> Teacher | FeaturesTeacher | Matcher:
    """Load a teacher.

    Args:
        source: a folder of a Hugging Face dual encoder or fusion model, its hub id, a fusion
            model of ours, a run that trained one, an exported bundle, or a folder of precomputed
            vectors (`filenames.txt` and a `.npy`), told apart by their contents.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError: it cannot be found, or it is not one of these.
    """
    # transformers takes seconds to import, and `crosstill --help` should not wait for it.
    from crosstill.teachers import bundle, dual, features, fusion, hugging_face

    folder = hugging_face.locate(source)
    name = hugging_face.display_name(source)
    if bundle.is_bundle(folder):
        return bundle.BundleModel(folder, name)
    if features.is_features(folder):
        return features.FeaturesTeacher(folder, name)
    best = folder / "best"
    if fusion.find(best):
        return fusion.load(best, name, device)
    if any((folder / place / "student.json").is_file() for place in ("", "best")):
        raise ModelError(
            f"{folder}: a crosstill student; open it with crosstill.evaluate.open_model"
        )
    if fusion.find(folder):
        return fusion.load(folder, name, device)
    if (folder / "checkpoints").is_dir() and (folder / "student").is_dir():
        raise ModelError(
            f"{folder}: a run that has not finished an epoch; go on with it by `crosstill train "
            "--resume`"
        )
    return fusion.load_dual(folder, name, device) or dual.DualEncoder(folder, name, device)
