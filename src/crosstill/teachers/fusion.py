"""Which folders hold a fusion model, and how each family is opened."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from crosstill import files
from crosstill.errors import CorruptError

if TYPE_CHECKING:
    import torch

    from crosstill.teachers.base import Teacher
    from crosstill.teachers.matcher import Matcher

Known = Mapping[str, tuple[str, str]]

METER = "matcher.json"
# architectures of transformers that score pairs, and the family that reads each
FAMILIES = {
    "ViltForImageAndTextRetrieval": ("vilt", "Vilt"),
    "BlipForImageTextRetrieval": ("blip", "Blip"),
    "BridgeTowerForImageAndTextRetrieval": ("bridgetower", "BridgeTower"),
}
# folders whose own dual heads embed each side alone: always, or where an encoder is asked for
DUALS = {
    "BridgeTowerForContrastiveLearning": ("bridgetower", "BridgeTowerDual"),
    "Blip2ForImageTextRetrieval": ("blip2", "Blip2Dual"),
}
FINDERS = {**DUALS, "BlipForImageTextRetrieval": ("blip", "BlipDual")}


def find(folder: Path) -> tuple[str, str] | None:
    """Module and class of the fusion model in a folder; None for any other folder."""
    if (folder / METER).is_file():
        return "meter", "Meter"
    return _listed(folder, FAMILIES)


def load_dual(
    folder: Path, name: str, device: torch.device | None = None, known: Known = DUALS
) -> Teacher | None:
    """A fusion folder's dual heads as a dual encoder; None where there are none.

    Args:
        folder: of a model of transformers.
        name: what to call it in tables.
        device: where to compute.
        known: `DUALS`, or `FINDERS` to take such heads of a model that also reads pairs.
    """
    found = _listed(folder, known)
    if found is None:
        return None
    module = import_module(f"crosstill.teachers.{found[0]}")
    opened: Teacher = getattr(module, found[1])(folder, name, device)
    return opened


def _listed(folder: Path, known: Known) -> tuple[str, str] | None:
    """The entry of the first architecture that the folder's config.json names."""
    if not (folder / "config.json").is_file():
        return None
    try:
        config = files.read_json(folder / "config.json")
    except CorruptError:
        return None  # whoever opens the folder next says what is wrong with it
    names = config.get("architectures") if isinstance(config, dict) else None
    return next((known[name] for name in names or () if name in known), None)


def load(folder: Path, name: str, device: torch.device | None = None) -> Matcher:
    """The fusion model in a folder for which `find` found a family."""
    found = find(folder)
    assert found is not None
    if name in ("best", "student"):  # as every run calls them
        name = folder.absolute().parent.name
    family = getattr(import_module(f"crosstill.teachers.{found[0]}"), found[1])
    # a folder of ours knows its name; those of runs are all called "best"
    opened = family.load(folder, device) if found[0] == "meter" else family(folder, name, device)
    model: Matcher = opened
    return model
