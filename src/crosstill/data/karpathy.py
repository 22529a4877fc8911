"""JSON listings: Karpathy's, in which Flickr8k, Flickr30k and COCO are handed around, and COCO's.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
CVPR 2015. Read are `images[].filename`, `filepath` (COCO's subfolder), `split` and
`sentences[].raw`; COCO's split "restval" counts as train. Such a file may also give the splits of
another listing (`apply_splits`).

Chen et al., "Microsoft COCO Captions", arXiv 1504.00325: captions_train2014.json and its like.
Read are `images[].id`, `file_name` and `annotations[].image_id`, `caption`; the file's name says
the split and the folder of its images.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from crosstill import formats
from crosstill.data.collection import Entry, Folder, Listing
from crosstill.data.fileset import FileSet
from crosstill.data.pairs import read_text, split_name
from crosstill.errors import DataError


def read(fileset: FileSet, images: Path | None) -> Listing:
    """Read JSON files whose images lie under `images`, or else beside them.

    Raises:
        DataError: bad JSON, or another layout; the message names the entry.
    """
    entries, names = [], []
    root = images or fileset.base
    if images is None and root.name == "annotations":
        root = root.parent  # as COCO's archives unpack
    for file in fileset.names:
        path = fileset.base / file
        content = parse(path)
        items = content.get("images") if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise DataError(
                f"{path}: no list named 'images'; give a file in Karpathy's or COCO's layout"
            )
        if "annotations" in content:
            entries += list(_coco(content, fileset, file, root))
            continue
        names.append(content.get("dataset"))
        for number, item in enumerate(items):
            entries.append(_karpathy(item, f"images[{number}]", fileset, file))
    name = names[0] if len(fileset.names) == 1 and names else None
    name = name if isinstance(name, str) else fileset.name
    return Listing(name, fileset.origin, Folder(root), entries)


def parse(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: it is not JSON; the message names the line.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: bad JSON ({error.msg}); mend or download it again"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: bad JSON (nested too deep); download it again") from None


def _karpathy(item: Any, place: str, fileset: FileSet, file: str) -> Entry:
    where = f"{fileset.base / file}, {place}"
    name = _text(item, "filename", where)
    folder = _text(item, "filepath", where) if "filepath" in item else ""
    split = _text(item, "split", where) if "split" in item else ""
    sentences = item.get("sentences", [])
    if not isinstance(sentences, list):
        raise DataError(f"{where}: 'sentences' is no list; see Karpathy's layout")
    captions = [
        _text(sentence, "raw", f"{where}.sentences[{k}]") for k, sentence in enumerate(sentences)
    ]
    return Entry(
        fileset.where(file, place),
        f"{folder}/{name}" if folder else name,
        captions,
        split_name(split, where) if split else None,
    )


def _coco(content: dict[str, Any], fileset: FileSet, file: str, root: Path) -> Iterator[Entry]:
    path, split = fileset.base / file, fileset.split(file)
    folder = Path(file).stem.rpartition("_")[2]  # captions_train2014.json: train2014
    folder = f"{folder}/" if (root / folder).is_dir() else ""
    captions: dict[Any, list[str]] = {}
    for number, item in enumerate(content["images"]):
        captions[_number(item, "id", f"{path}, images[{number}]")] = []
    annotations = content["annotations"]
    if not isinstance(annotations, list):
        raise DataError(f"{path}: 'annotations' is no list; see COCO's layout")
    for number, item in enumerate(annotations):
        where = f"{path}, annotations[{number}]"
        image = _number(item, "image_id", where)
        if image not in captions:
            raise DataError(f"{where}: image_id {image} is not among 'images'; download it again")
        captions[image].append(_text(item, "caption", where))
    for number, item in enumerate(content["images"]):
        place = f"images[{number}]"
        name = folder + _text(item, "file_name", f"{path}, {place}")
        yield Entry(fileset.where(file, place), name, captions[item["id"]], split)


def _number(item: Any, key: str, where: str) -> int:
    number = item.get(key) if isinstance(item, dict) else None
    if type(number) is not int:
        raise DataError(f"{where}: no number under {key!r}; see COCO's layout")
    return number


def _text(item: Any, key: str, where: str) -> str:
    text = item.get(key) if isinstance(item, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: no text under {key!r}; see Karpathy's or COCO's layout")
    return text


def apply_splits(listing: Listing, path: Path) -> Listing:
    """Give every image the split that the file at `path` says, and leave out the others.

    Images are matched by file name and, where the file has COCO's ids, by the number at the end
    of the name: COCO_val2014_000000000042.jpg and 000000000042.jpg are one.

    Raises:
        DataError: no file in Karpathy's layout, or it names none of the images.
    """
    splits, count = _splits(path)
    entries, matched = [], set()
    for entry in listing.entries:
        name = formats.name_key(PurePath(entry.path).name)
        digits = re.search(r"(\d{12})\.\w+$", name)
        keys: tuple[str | int, ...] = (name, int(digits[1])) if digits else (name,)
        key = next((key for key in keys if key in splits), None)
        if key is not None:
            number, split = splits[key]
            matched.add(number)
            entries.append(entry._replace(split=split))
    if not entries:
        raise DataError(
            f"{path}: it names none of the {len(listing.entries)} images of {listing.origin}, "
            f"such as {listing.entries[0].path if listing.entries else ''}; give its own --splits"
        )
    counts = {
        f"images that {path.name} does not name, left out": len(listing.entries) - len(entries),
        f"images of {path.name} that are not in the dataset": count - len(matched),
    }
    notes = tuple(f"{text}: {count}" for text, count in counts.items() if count)
    return listing._replace(entries=entries, notes=listing.notes + notes)


def _splits(path: Path) -> tuple[dict[str | int, tuple[int, str]], int]:
    """Read (number of the image, split) by file name and by COCO's id; and count the images."""
    content = parse(path)
    items = content.get("images") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list named 'images'; --splits is a file in Karpathy's layout")
    splits: dict[str | int, tuple[int, str]] = {}
    for number, item in enumerate(items):
        where = f"{path}, images[{number}]"
        row: dict[str, Any] = item if isinstance(item, dict) else {}
        name, split = row.get("filename"), row.get("split")
        if not isinstance(name, str) or not isinstance(split, str):
            raise DataError(f"{where}: no text under 'filename' or 'split'; see Karpathy's layout")
        numbered = number, split_name(split, where)
        splits[formats.name_key(name)] = numbered
        if type(row.get("cocoid")) is int:
            splits[row["cocoid"]] = numbered
    return splits, len({number for number, _ in splits.values()})
