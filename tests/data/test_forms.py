"""One contract for all forms: the same scenes, written each way, are the same dataset."""

from __future__ import annotations

import csv
import functools
import io
import json
import pickle
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosstill import data
from crosstill.data import scenes
from crosstill.errors import DataError
from crosstill.types import image_id
from verbs import crosstill

COUNT = 20
HEADER = ["filepath", "caption", "split"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    scenes.write(root / "karpathy", COUNT, seed=5)
    return root


def items(written: Path) -> list[dict]:
    return json.loads((written / "karpathy/dataset.json").read_text())["images"]


def rows(written: Path) -> list[list[str]]:
    return [
        [item["filename"], sentence["raw"], item["split"]]
        for item in items(written)
        for sentence in item["sentences"]
    ]


def table(path: Path, rows: list[list[str]], header: list[str], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


Form = tuple[str, dict[str, Path]]


def form(source: str | Path, **options: Path) -> Form:
    """What is given to `data.open`, and to the command line."""
    return str(source), options


def scenes_form(written: Path) -> Form:
    return form(f"scenes:{COUNT}:5")


def karpathy_form(written: Path) -> Form:
    return form(written / "karpathy/dataset.json")


def coco_form(written: Path) -> Form:
    coco = [
        {**item, "filepath": "karpathy", "split": item["split"].replace("train", "restval")}
        for item in items(written)
    ]
    (written / "coco.json").write_text(json.dumps({"images": coco}))
    return form(written / "coco.json")


def csv_form(written: Path) -> Form:
    return form(table(written / "t.csv", rows(written), HEADER), images=written / "karpathy")


def tsv_form(written: Path) -> Form:
    path = table(written / "t.tsv", rows(written), HEADER, "\t")
    return form(path, images=str(written / "karpathy"))


def named_form(written: Path) -> Form:
    named = [
        ["" if number % 5 else file, text, split, file]
        for number, (file, text, split) in enumerate(rows(written))
    ]
    path = table(written / "n.csv", named, [*HEADER, "image_id"])
    return form(path, images=written / "karpathy")


def folder_form(written: Path) -> Form:
    for item in items(written):
        folder = written / "folder" / item["split"]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(written / "karpathy" / item["filename"], folder)
        text = "\n".join(sentence["raw"] for sentence in item["sentences"])
        (folder / item["filename"]).with_suffix(".txt").write_text(text + "\n\n")
    return form(written / "folder")


def photo(written: Path, item: dict) -> bytes:
    return (written / "karpathy" / item["filename"]).read_bytes()


def texts(item: dict) -> list[str]:
    return [sentence["raw"] for sentence in item["sentences"]]


def by_split(written: Path) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for item in items(written):
        groups.setdefault(item["split"], []).append(item)
    return groups


def coco_captions(written: Path) -> Path:
    """COCO's own layout: photos in train2014 and val2014, which keeps Karpathy's test images."""
    home = written / "coco"
    (home / "annotations").mkdir(parents=True, exist_ok=True)
    for year in ("train2014", "val2014"):
        (home / year).mkdir(exist_ok=True)
        mine = [
            i for i in enumerate(items(written)) if (i[1]["split"] == "train") == (year[0] == "t")
        ]
        images, annotations = [], []
        for number, item in mine:
            name = f"COCO_{year}_{number:012d}.png"
            (home / year / name).write_bytes(photo(written, item))
            images.append({"id": number, "file_name": name, "height": 96})
            annotations += [
                {"image_id": number, "id": number * 10 + k, "caption": text}
                for k, text in enumerate(texts(item))
            ]
        path = home / f"annotations/captions_{year}.json"
        random.Random(0).shuffle(images)
        path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return home


def coco_captions_form(written: Path) -> Form:
    home = coco_captions(written)
    split = [
        {"filename": "other name.jpg", "cocoid": number, "split": item["split"]}
        for number, item in enumerate(items(written))
    ]
    (home / "dataset_coco.json").write_text(json.dumps({"images": split}))
    return form(home / "annotations", splits=home / "dataset_coco.json")


def coco_files_form(written: Path) -> Form:
    home = coco_captions(written)
    split = [
        {"filename": path.name, "split": items(written)[int(path.stem[-12:])]["split"]}
        for path in home.glob("*2014/*.png")
    ]
    (home / "dataset.json").write_text(json.dumps({"images": split}))
    both = f"{home}/annotations/captions_train2014.json,{home}/annotations/captions_val2014.json"
    return form(both, images=home, splits=home / "dataset.json")


def beit3(written: Path, folder: str, segment) -> Path:
    (written / folder).mkdir(exist_ok=True)
    shutil.copytree(written / "karpathy", written / folder / "photos", dirs_exist_ok=True)
    for split, group in by_split(written).items():
        lines = [
            {
                "image_path": f"photos/{item['filename']}",
                "text_segment": segment(text),
                "image_id": n,
            }
            for n, item in enumerate(group)
            for text in texts(item)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (written / folder / f"scenes_retrieval.{split}.jsonl").write_text(text)
    return written / folder


def beit3_pieces_form(written: Path) -> Form:
    # pieces that end anywhere, as SentencePiece's do
    folder = beit3(written, "pieces", lambda text: re.findall(r"\S{1,3}", marked(text)))
    return form(f"{folder}/scenes_retrieval.{{train,val,test}}.jsonl")


def beit3_ids_form(written: Path) -> Form:
    tokenizer = spm(written, [text for item in items(written) for text in texts(item)])
    # as XLMRobertaTokenizer numbers them: <s> <pad> </s> <unk>, then the model's third piece
    folder = beit3(written, "ids", lambda text: [number + 1 for number in tokenizer.encode(text)])
    shutil.copy(written / "beit3.spm", folder)
    return form(folder)


def marked(text: str) -> str:
    return "\u2581" + text.replace(" ", "\u2581")


def spm(folder: Path, captions: list[str]):
    import sentencepiece

    with (folder / "beit3.spm").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=file,
            vocab_size=90,
            character_coverage=1.0,
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "beit3.spm"))


def jsonl_form(written: Path) -> Form:
    lines = [
        {"file": item["filename"], "captions": texts(item), "split": item["split"]}
        for item in items(written)
    ]
    path = written / "pairs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    return form(path, images=written / "karpathy")


def jsonl_rows_form(written: Path) -> Form:
    lines = [
        {"filepath": "" if n % 5 else name, "text": text, "split": split, "image_id": n // 5}
        for n, (name, text, split) in enumerate(rows(written))
    ]
    path = written / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return form(path, images=written / "karpathy")


def cells(written: Path, group: list[dict]) -> list[dict]:
    return [
        {
            "image": {"bytes": photo(written, item), "path": item["filename"]},
            "captions": texts(item),
        }
        for item in group
    ]


def parquet_form(written: Path, compression: str = "snappy") -> Form:
    """Split by the files' names, as on the hub."""
    folder = written / f"parquet-{compression}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, group in by_split(written).items():
        name = {"val": "validation"}.get(split, split)
        halves = (group[: len(group) // 2], group[len(group) // 2 :])
        for number, half in enumerate(halves):
            pq.write_table(
                pa.Table.from_pylist(cells(written, half)),
                folder / f"data/{name}-{number:05d}-of-00002.parquet",
                row_group_size=3,
                compression=compression,
            )
    return form(folder)


def parquet_plain_form(written: Path) -> Form:
    return parquet_form(written, "none")


def parquet_rows_form(written: Path) -> Form:
    """A caption a row, image bytes repeated, the split in a column, no file names."""
    table = [
        {"image": photo(written, item), "text": text, "split": item["split"], "other": 1.5}
        for item in items(written)
        for text in texts(item)
    ]
    pq.write_table(pa.Table.from_pylist(table), written / "rows.parquet", row_group_size=7)
    return form(written / "rows.parquet")


def tar_form(written: Path) -> Form:
    """As the webdataset library writes it."""
    import webdataset

    folder = written / "shards"
    for split, group in by_split(written).items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            with webdataset.TarWriter(str(folder / split / f"{number:06d}.tar")) as writer:
                for item in group[number::2]:
                    text = "\n".join(texts(item))
                    key = item["filename"].removesuffix(".png")
                    writer.write({"__key__": key, "png": photo(written, item), "txt": text})
    return form(folder)


def tar_json_form(written: Path) -> Form:
    """As img2dataset writes it: the caption twice, in a text and in a JSON."""
    folder = written / "json-shards"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as archive:
            for item in items(written)[number * 5 : number * 5 + 5]:
                told = {"captions": texts(item), "split": item["split"], "width": 96}
                stem = "deep/er/" + item["filename"].removesuffix(".png")
                member(archive, stem + ".json", json.dumps(told).encode())
                member(archive, stem + ".PNG", photo(written, item))
                member(archive, stem + ".txt", texts(item)[0].encode())
                member(archive, stem + ".cls", b"3")
    return form(f"{folder}/{{000000..000003}}.tar")


def member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def hub_dataset(written: Path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    )
    return datasets.DatasetDict(
        {
            {"val": "validation"}.get(split, split): datasets.Dataset.from_list(
                cells(written, group), features=features
            )
            for split, group in by_split(written).items()
        }
    )


def saved_form(written: Path) -> Form:
    hub_dataset(written).save_to_disk(written / "saved")
    return form(written / "saved")


def hub_parquet_form(written: Path) -> Form:
    (written / "hub").mkdir(exist_ok=True)
    for split, part in hub_dataset(written).items():
        part.to_parquet(written / f"hub/{split}-00000-of-00001.parquet")
    return form(f"{written}/hub/*.parquet")


def hub_id_form(written: Path) -> Form:
    """The library's own Arrow files; `no_network` puts this folder in place of the network."""
    hub_dataset(written).save_to_disk(written / "hub-cache")
    return form("hf:someone/scenes")


def image_folder_form(written: Path, suffix: str = "csv") -> Form:
    folder = written / f"imagefolder-{suffix}"
    for split, group in by_split(written).items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for item in group:
            shutil.copy(written / "karpathy" / item["filename"], folder / split)
        if suffix == "csv":
            lines = [[item["filename"], text] for item in group for text in texts(item)]
            table(folder / split / "metadata.csv", lines, ["file_name", "text"])
        else:
            told = [{"file_name": i["filename"], "captions": texts(i)} for i in group]
            text = "".join(json.dumps(line) + "\n" for line in told)
            (folder / split / "metadata.jsonl").write_text(text)
    return form(folder)


def image_folder_jsonl_form(written: Path) -> Form:
    return image_folder_form(written, "jsonl")


FORMS = {
    name.removesuffix("_form"): function
    for name, function in list(globals().items())
    if name.endswith("_form")
}
REBUILT = "captions rebuilt from tokens, which keep no double spaces: 100"
NOTES = {
    "beit3_pieces": (REBUILT,),
    "beit3_ids": (REBUILT,),
    "tar_json": ("members that are neither images nor captions, not read: 20",),
}


@pytest.fixture(scope="module", autouse=True)
def no_network(written: Path):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        home = written / "hub-cache"
        patch.setattr(datasets, "load_dataset", lambda *_: datasets.load_from_disk(home))
        yield


@pytest.fixture(scope="module")
def forms(written: Path) -> Callable[[str], Form]:
    return functools.cache(lambda name: FORMS[name](written))


@pytest.fixture(scope="module")
def opened(forms) -> Callable[[str], data.Pairs]:
    def opened(name: str) -> data.Pairs:
        source, options = forms(name)
        return data.open(source, **options)

    return functools.cache(opened)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_dataset(form, opened):
    pairs, model = opened(form), opened("scenes")
    told = {e.image_id: (e.captions, e.split) for e in pairs.examples}
    assert told == {e.image_id: (e.captions, e.split) for e in model.examples}
    assert len(pairs) == COUNT
    assert pairs.digest() == model.digest()
    assert pairs.splits == {"train": 16, "val": 2, "test": 2}
    assert (pairs.quarantine.rows, pairs.notes) == ([], NOTES.get(form, ()))
    assert pairs.copies == ()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_bytes_of_its_ids(form, opened):
    pairs = opened(form)
    again = data.reader(json.loads(json.dumps(pairs.source)))
    again = pickle.loads(pickle.dumps(again))
    examples = list(pairs.examples) * 5
    random.Random(0).shuffle(examples)
    with ThreadPoolExecutor(4) as pool:
        for example, content in zip(examples, pool.map(again, examples), strict=True):
            assert image_id(content) == example.image_id
            assert content == pairs.read(example)


@pytest.mark.parametrize("start", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_every_form_is_read_by_other_processes(start, opened):
    pairs = {form: opened(form) for form in FORMS}
    for one in pairs.values():
        one.read(one.examples[0])  # what is kept between reads is kept before a fork
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        for form, one in pairs.items():
            example = one.examples[-1]
            assert pool.submit(one.read, example).result() == one.read(example), form


@pytest.mark.parametrize("name", FORMS)
def test_the_doctor_looks_at_every_form(name, forms):
    source, options = forms(name)
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    found = json.loads(crosstill("doctor", source, *given, "--json").stdout)["data"]
    assert (found["splits"], found["captions"]) == ({"train": 16, "val": 2, "test": 2}, 100)
    assert found["unreadable"] == []


def test_only_two_forms_are_not_slices_or_files(opened):
    """Bytes that are not compressed are read at their offset, whatever holds them."""
    by_row = {form for form in FORMS if re.search(r"@\d+\.\d+/", opened(form).examples[0].path)}
    assert by_row == {"parquet", "parquet_rows"}
    in_slices = {form for form in FORMS if re.search(r"@\d+\+\d+/", opened(form).examples[0].path)}
    assert in_slices == {"parquet_plain", "tar", "tar_json", "saved", "hub_parquet", "hub_id"}


def bare(written: Path, name: str) -> Form:
    """The same photos in a form of theirs, of which each third has its captions and no other."""
    home = written / f"bare-{name}"
    shutil.copytree(written / "karpathy", home, ignore=shutil.ignore_patterns("*.json"))
    told = [(i["filename"], texts(i) if n % 3 == 0 else []) for n, i in enumerate(items(written))]
    if name == "karpathy":
        images = [{"filename": f, "sentences": [{"raw": t} for t in c]} for f, c in told]
        del images[1]["sentences"]
        (home / "list.json").write_text(json.dumps({"images": images}))
    elif name == "coco":
        images = [{"id": n, "file_name": f} for n, (f, _) in enumerate(told)]
        notes = [{"image_id": n, "caption": t} for n, (_, c) in enumerate(told) for t in c]
        (home / "list.json").write_text(json.dumps({"images": images, "annotations": notes}))
    elif name == "csv":
        lines = [[file, text] for file, captions in told for text in captions or [" "]]
        table(home / "list.csv", lines, ["filepath", "caption"])
    elif name == "jsonl":
        lines = [
            {"file": f, "captions": c or (None if n % 2 else [])} for n, (f, c) in enumerate(told)
        ]
        (home / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif name == "folder":
        for file, captions in told:
            if captions:
                (home / file).with_suffix(".txt").write_text("\n".join(captions))
        return form(home)
    elif name == "parquet":
        lines = [{"image": (home / f).read_bytes(), "captions": c} for f, c in told]
        pq.write_table(pa.Table.from_pylist(lines), home / "list.parquet")
    else:
        with tarfile.open(home / "list.tar", "w") as archive:
            for file, captions in told:
                member(archive, file, (home / file).read_bytes())
                if captions:
                    member(archive, file.replace(".png", ".txt"), "\n".join(captions).encode())
    return form(next(home.glob("list.*")))


@pytest.mark.parametrize("name", ["karpathy", "coco", "csv", "jsonl", "folder", "parquet", "tar"])
def test_photos_without_captions_are_the_same_dataset_in_every_form(name, written):
    source, _ = bare(written, name)
    pairs = data.open(source)
    assert {e.image_id: e.captions for e in pairs.examples} == {
        image_id(photo(written, item)): tuple(texts(item)) if number % 3 == 0 else ()
        for number, item in enumerate(items(written))
    }
    assert "photos without captions: 13" in pairs.notes and not pairs.quarantine.rows
    assert len(pairs.captioned()) == 7


@pytest.mark.parametrize("form", ["karpathy", "folder", "tar", "parquet"])
def test_a_split_is_a_dataset(form, opened):
    val = opened(form).split("val")
    assert val.splits == {"val": 2}
    assert {e.split for e in val.examples} == {"val"}
    with pytest.raises(DataError, match=r"split 'train' has no images; there are val \(2\)"):
        val.split("train")


def test_digest_knows_content_not_order_or_names(written, tmp_path):
    lines = rows(written)
    one = data.open(table(tmp_path / "a.csv", lines, HEADER), images=written / "karpathy")
    random.Random(1).shuffle(lines)
    other = data.open(table(tmp_path / "b.csv", lines, HEADER), images=written / "karpathy")
    assert one.digest() == other.digest()
    lines[0][1] += " indeed"
    third = data.open(table(tmp_path / "c.csv", lines, HEADER), images=written / "karpathy")
    assert third.digest() != one.digest()


def test_unknown_source_record_is_refused():
    with pytest.raises(DataError, match="form 'tape'"):
        data.reader({"form": "tape"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere.json", "no such file"),
        (lambda p: (p / "a.pdf", (p / "a.pdf").touch())[0], "not a dataset"),
        (lambda p: p, "no images in it"),
    ],
)
def test_what_is_no_dataset_says_so(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        data.open(make(tmp_path))


def test_missing_image_folder_is_named(written, tmp_path):
    with pytest.raises(DataError, match="no such folder of images"):
        data.open(written / "karpathy/dataset.json", images=tmp_path / "gone")


def test_real_dataset(shared: Path, tmp_path):
    file = shared / "flickr8k/dataset_flickr8k.json"
    value = json.loads(file.read_text())
    chosen = [item for item in value["images"] if item["imgid"] % 50 == 0]
    (tmp_path / "part.json").write_text(json.dumps({"dataset": "flickr8k", "images": chosen}))
    pairs = data.open(tmp_path / "part.json", images=shared / "flickr8k/images")
    assert pairs.name == "flickr8k"
    assert len(pairs) == len(chosen)
    assert {len(example.captions) for example in pairs.examples} == {5}
