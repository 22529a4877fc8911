"""Frozen big models, and vectors that one of them gave: what a student learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosstill import plugins
from crosstill.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "load"]

# The modules that open a teacher's folder, asked in this order, those of other distributions last:
# the first one that `holds` the folder loads it. Models that read pairs are an annex, so theirs is
# found by name only. A folder that none of them holds is opened as a Hugging Face dual encoder,
# which says what it lacks.
_FAMILIES = {
    "bundle": "crosstill.teachers.exported",
    "beit3": "crosstill.teachers.beit3",
    "open_clip": "crosstill.teachers.open_clip",
    "vectors": "crosstill.teachers.features",
    "fusion": "crosstill.fusion.families",
    "heads": "crosstill.teachers.dual",
}
FAMILIES = plugins.Kind(__name__, "teacher family", _FAMILIES)


def load(source: str | Path, device: torch.device | None = None) -> Any:
    """Load a frozen model: `crosstill.open_model` without students and their runs.

    Args:
        source: a folder of a Hugging Face dual encoder or fusion model, its hub id, a folder of
            BEiT-3 or METER that `crosstill inspect --out` wrote, a run that trained a fusion
            model, an exported bundle, a folder of OpenCLIP's, or a folder of precomputed vectors
            (`filenames.txt` and a `.npy`), told apart by their contents. "dual:SOURCE" takes the
            contrastive heads of a BLIP in place of what reads pairs, and "open_clip:MODEL:FILE"
            is a model of that library.
        device: where to compute; None takes a GPU when there is one.

    Returns:
        a `Teacher` where its `kind` is "encoder", a `FeaturesTeacher` where it is "vectors", a
        `crosstill.fusion.matcher.Matcher` where it is "matcher".

    Raises:
        ModelError: it cannot be found, or it is not one of these.
    """
    # transformers takes seconds to import, and `crosstill --help` should not wait for it.
    from crosstill.teachers import checkpoints, dual, open_clip
    from crosstill.towers import hub

    text = str(source)
    if text.startswith(open_clip.PREFIX):
        return open_clip.OpenClip(text, device=device)
    source = text.removeprefix(dual.PREFIX)
    checkpoints.refuse_file(Path(source))
    folder, name = hub.locate(source), hub.display_name(source)
    if text.startswith(dual.PREFIX):
        return dual.load(folder, name, device)
    families = map(FAMILIES.find, FAMILIES.in_order())
    family = next((family for family in families if family.holds(folder)), None)
    if family is not None:
        return family.load(folder, name, device)
    _refuse_ours(folder)
    return dual.DualEncoder(folder, name, device)


def _refuse_ours(folder: Path) -> None:
    """Refuse students, which `crosstill.open_model` opens, and runs that have nothing to open."""
    if any((folder / place / "student.json").is_file() for place in ("", "best")):
        raise ModelError(f"{folder}: a crosstill student; open it with crosstill.open_model")
    if (folder / "checkpoints").is_dir() and (folder / "student").is_dir():
        raise ModelError(
            f"{folder}: a run that has not finished an epoch; go on with it by `crosstill train "
            "--resume`"
        )
