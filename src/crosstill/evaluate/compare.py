"""A model beside those it should be compared with: its teacher, and itself before training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from crosstill import students
from crosstill.cache import Cache, Split
from crosstill.data import Pairs
from crosstill.errors import CrosstillError, InputError
from crosstill.evaluate import efficiency as cost
from crosstill.evaluate import protocols
from crosstill.evaluate.encode import Embedded, embed
from crosstill.evaluate.models import open_encoder
from crosstill.evaluate.recall import DEPTHS
from crosstill.evaluate.report import Evaluation, judge, table
from crosstill.files import read_json


@dataclass
class Comparison:
    """The model's row first, then the rows that stand beside it."""

    model: Evaluation
    others: dict[str, Evaluation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The model's numbers at the top level, each other row under its role."""
        return {
            **self.model.to_json(),
            **{role: row.to_json() for role, row in self.others.items()},
        }

    def table(self) -> str:
        """Teacher, then the model, then the untrained student."""
        rows = [self.others.get("teacher"), self.model, self.others.get("untrained")]
        return table([row for row in rows if row is not None])


def run(
    source: str,
    pairs: Pairs,
    protocol: str = "full",
    efficiency: bool = False,
    strict: bool = False,
) -> Comparison:
    """Evaluate a model; a run is shown beside its teacher's cached rows and its untrained self.

    Raises:
        InputError: a model or image that cannot be read, an unknown protocol.
    """
    model = open_encoder(source)
    rows = embed(model, pairs, strict)
    found = Comparison(replace(judge(model, rows, protocol), name=_label(source)))
    if rows.quarantine.rows:
        found.notes += [f"left out: {bad['path']}: {bad['reason']}" for bad in rows.quarantine.rows]
        found.notes.append(f"unreadable images left out: {len(rows.quarantine)}")
    if len(rows.image) <= DEPTHS[-1]:
        found.notes.append(
            f"only {len(rows.image)} images: recall at {DEPTHS[-1]} is 100 for any model"
        )
    if found.model.recall.warning:
        found.notes.append(found.model.recall.warning)
    if (Path(source) / "config.json").is_file() and (Path(source) / "student").is_dir():
        _add_run(found, Path(source), rows, pairs, protocol)
    if efficiency:
        _add_cost(found, source)
    return found


def _label(source: str) -> str:
    return f"student ({Path(source).name})" if Path(source, "best").is_dir() else source


def _add_run(found: Comparison, folder: Path, rows: Embedded, pairs: Pairs, protocol: str) -> None:
    """The rows of a run that need no more than the run itself."""
    untrained = students.load(folder / "student")
    before = judge(untrained, embed(untrained, pairs), protocol)
    found.others["untrained"] = replace(before, name="student, untrained")
    record = read_json(folder / "config.json")
    if not record["teacher"]["modalities"]:
        return  # a run without a teacher
    try:
        found.others["teacher"] = _teacher(record, rows, protocol)
    except CrosstillError as error:
        found.notes.append(f"no teacher's row: {error}")


def _teacher(record: dict[str, Any], rows: Embedded, protocol: str) -> Evaluation:
    """The teacher's recall on the same images, from the cache that the run learnt from."""
    cache = Cache(record["cache"]["folder"])
    split = next((s for s in map(cache.split, set(cache.splits)) if _same(cache, s, rows)), None)
    if split is None:
        raise InputError(f"{cache.folder} does not hold exactly these images and captions")
    # the cache orders images by id; a protocol with folds needs the dataset's order
    place = {key: position for position, key in enumerate(rows.image_ids)}
    position = torch.tensor([place[cache.image_ids[row]] for row in split.images])
    image = cache.image_features(split.images[position.argsort().numpy()])
    owner = position[torch.from_numpy(split.owner)]
    recall = protocols.run(protocol, image, cache.text_features(split.captions), owner)
    name = Path(str(cache.teacher["name"])).name
    return Evaluation(f"teacher ({name})", recall, cache.teacher["parameters"])


def _same(cache: Cache, split: Split, rows: Embedded) -> bool:
    ids = {cache.image_ids[row] for row in split.images}
    return ids == set(rows.image_ids) and len(split.captions) == len(rows.owner)


def _add_cost(found: Comparison, source: str) -> None:
    """Latency of the model and, when it can still be opened, of its teacher, in turn."""
    models: dict[str, Any] = {"model": open_encoder(source)}
    if "teacher" in found.others:
        record = read_json(Path(source) / "config.json")
        try:
            models["teacher"] = open_encoder(record["teacher"]["source"])
        except CrosstillError as error:
            found.notes.append(f"the teacher's latency was not measured: {error}")
    measured = cost.measure(models)
    found.model = replace(found.model, efficiency=measured["model"])
    if "teacher" in measured:
        found.others["teacher"] = replace(found.others["teacher"], efficiency=measured["teacher"])
