"""The doctor finds what is wrong with a dataset, and the command that it proposes works."""

import json
import re
import shlex
import shutil
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosstill import cache, students
from crosstill.data import scenes as scenery
from crosstill.doctor import dataset, missing
from crosstill.pixels import CLASSES
from support import small_config
from verbs import crosstill


@pytest.fixture
def home(tmp_path) -> Path:
    scenery.write(tmp_path / "photos", 20)
    (tmp_path / "photos/dataset.json").rename(tmp_path / "all.json")
    return tmp_path


def edited(home: Path, change) -> Path:
    """The listing after `change(images)`."""
    record = json.loads((home / "all.json").read_text())
    change(record["images"])
    (home / "all.json").write_text(json.dumps(record))
    return home / "all.json"


def examined(*arguments: object, code: int = 0) -> dict:
    return json.loads(crosstill("doctor", *arguments, "--json", code=code).stdout)


def found(report: dict, name: str) -> list[dict]:
    return [each for each in report["data"]["findings"] if each["finding"] == name]


def test_there_is_advice_for_every_class():
    assert set(dataset.FIXES) == set(CLASSES)


def test_a_clean_dataset_has_no_findings(home):
    report = examined(home / "all.json", "--images", home / "photos")
    assert report["data"]["findings"] == []
    assert report["data"]["classes"] == {}


def test_a_listing_among_the_photos_of_a_bare_folder_is_pointed_at(home):
    shutil.copy(home / "all.json", home / "photos")
    told = crosstill("doctor", home / "photos").stdout
    assert "1: listings beside the photos, not read, such as all.json" in told
    assert "give it as DATA, and the folder after --images" in told
    sidecar = home / "photos" / "000000.txt"
    sidecar.write_text("a red square")
    assert "listings beside" not in crosstill("doctor", home / "photos").stdout


def test_photos_without_captions_are_counted_with_the_commands_that_use_them(home, tmp_path):
    def strip(images):
        for item in images[5:]:
            item["sentences"] = []

    words = [edited(home, strip), "--images", home / "photos"]
    report = examined(*words)
    assert (report["data"]["captioned"], report["data"]["bare"]) == (5, 15)
    (finding,) = report["data"]["findings"]
    assert (finding["finding"], finding["count"]) == ("bare photos", 15)
    text = crosstill("doctor", *words).stdout
    assert re.search(r"^captioned +5 of them$", text, re.MULTILINE)
    # the first of the two commands, with a teacher that is here
    line = next(line for line in text.splitlines() if "crosstill cache" in line)
    command = shlex.split(line.partition("→ crosstill ")[2].partition(";")[0])
    (tmp_path / "lines.txt").write_text("a red heart\na green star\n")
    students.build(small_config(), dim=16, captions=["a red heart"]).save(tmp_path / "teacher")
    given = {
        "openai/clip-vit-base-patch32": tmp_path / "teacher",
        "LINES.txt": tmp_path / "lines.txt",
        "caches/mine": tmp_path / "cache",
    }
    crosstill(*(given.get(word, word) for word in command))
    made = cache.open(tmp_path / "cache")
    assert (len(made.image_ids), made.loose) == (20, 2)


def test_a_folder_of_photos_and_nothing_else(home):
    (home / "all.json").unlink()
    text = crosstill("doctor", home / "photos").stdout
    assert re.search(r"^captioned +0 of them$", text, re.MULTILINE)
    assert f"→ crosstill cache openai/clip-vit-base-patch32 {home / 'photos'} --texts LIN" in text


def test_leaks_name_both_files(home):
    photos = home / "photos"
    shutil.copy(photos / "000003.png", photos / "copy.png")
    shutil.copy(photos / "000004.png", photos / "other.png")

    def add(images):
        by_split = {item["split"]: item for item in images}
        for name, like, split in (("copy.png", 3, "test"), ("other.png", 4, None)):
            split = split or images[like]["split"]
            images.append({**by_split["train"], "filename": name, "split": split})

    listing = edited(home, add)
    report = examined(listing, "--images", photos)
    record = json.loads(listing.read_text())["images"]
    (leak,), (same,) = found(report, "leak"), found(report, "copies")
    assert leak["rows"] == [
        {
            "path": "copy.png",
            "split": "test",
            "first": "000003.png",
            "first_split": record[3]["split"],
        }
    ]
    assert (same["count"], same["rows"][0]["path"]) == (1, "other.png")
    text = crosstill("doctor", listing, "--images", photos).stdout
    assert f"test copy.png = {record[3]['split']} 000003.png" in text
    assert "note" not in text, "the same is not said twice"


def test_each_class_of_failure_is_counted_with_advice(home):
    photos = home / "photos"
    whole = (photos / "000000.png").read_bytes()
    spoilt = {"000001": b"", "000002": b"<html>", "000003": b"%PDF-1.4", "000004": whole[:200]}
    for name, content in spoilt.items():
        (photos / f"{name}.png").write_bytes(content)
    report = examined(home / "all.json", "--images", photos)
    assert report["data"]["classes"] == dict.fromkeys(
        ("empty", "not-an-image", "unsupported-format", "truncated"), 1
    )
    for each in found(report, "unreadable"):
        assert each["fix"] == dataset.FIXES[each["says"]]
        assert each["rows"][0]["class"] == each["says"]
    text = crosstill("doctor", home / "all.json", "--images", photos).stdout
    assert "000003.png: PDF is not read; convert it to JPEG or PNG (8 bytes)" in text


# --- files that are not where they are listed ---


def proposal(*arguments: object) -> list[str]:
    """The command that the doctor proposes, which the error names too."""
    done = crosstill("doctor", *arguments, code=2)
    command = re.findall(r"→ crosstill (.*)", done.stdout)[-1]
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.endswith(f"run: crosstill {command}")
    return shlex.split(command)


def test_a_wrong_folder(home):
    (home / "empty").mkdir()
    for wrong in (("--images", home / "empty"), ("--images", home / "gone"), ()):
        command = proposal(home / "all.json", *wrong)
        assert command == ["doctor", str(home / "all.json"), "--images", str(home / "photos")]
        assert "unreadable       0" in crosstill(*command).stdout


def test_a_folder_too_deep_or_not_deep_enough(home):
    def deepen(images):
        for item in images:
            item["filepath"] = "photos"

    listing = edited(home, deepen)
    command = proposal(listing, "--images", home / "photos")
    assert command[-1] == str(home)
    assert "unreadable       0" in crosstill(*command).stdout


def test_every_kind_of_wrong_path_is_named_with_its_place(home):
    photos = home / "photos"
    (photos / "more").mkdir()
    (photos / "twice").mkdir()
    (photos / "000006.png").rename(photos / "more/000006.png")
    shutil.copy(photos / "000007.png", photos / "more/000007.png")
    (photos / "000007.png").rename(photos / "twice/000007.png")

    def spoil(images):
        named = dict.fromkeys(
            (
                "000001.PNG",
                "Photos\\000002.png",
                "C:\\me\\000003.png",
                "/home/me/photos/000004.png",
                "gone.png",
                "000006.png",
                "000007.png",
            )
        )
        for item, name in zip(images[1:], named, strict=False):
            item["filename"] = name

    listing = edited(home, spoil)
    options = (listing, "--images", photos)
    kinds = {row["path"]: row["kind"] for row in examined(*options, code=2)["paths"]["missing"]}
    assert kinds == {
        "000001.PNG": "case",
        "Photos\\000002.png": "backslash",
        "C:\\me\\000003.png": "backslash",
        "/home/me/photos/000004.png": "absolute",
        "gone.png": "nowhere",
        "000006.png": "folder",
        "000007.png": "ambiguous",
    }
    text = crosstill("doctor", *options, code=2).stdout
    assert f"change the paths in {listing}" in text and "take out of it what was not found" in text
    command = proposal(*options)
    assert command == ["doctor", str(listing), "--images", str(photos), "--json"]
    lost = examined(*command[1:-1], code=2)["paths"]["missing"]
    places = {row["path"]: row["at"] and Path(row["at"]).relative_to(photos) for row in lost}

    def follow(images):
        for item in images:
            item["filename"] = str(places.get(item["filename"], item["filename"]))
        images[:] = [item for item in images if item["filename"] != "None"]

    report = examined(edited(home, follow), "--images", photos)
    assert sum(report["data"]["splits"].values()) == 18
    assert report["data"]["unreadable"] == []


def test_names_as_other_systems_and_lists_write_them_are_found(home):
    photos = home / "photos"
    names = {
        "Café 1.PNG": "Cafe\u0301 1.png",
        "한국어.png": unicodedata.normalize("NFD", "한국어.png"),
        unicodedata.normalize("NFD", "Å.png"): "Å.png",
        "x%20y.png": "x y.png",
        "one.jpeg": "one.jpg",
        "two%20.JPG#0": "two .jpeg",
        "three.png#0": "three.png",
        "three.png#1": "three.png",
    }
    for number, at in enumerate(dict.fromkeys(names.values())):
        (photos / f"{number:06d}.png").rename(photos / at)
    rows = "".join(f"{name},caption {n}\n" for n, name in enumerate(names))
    (home / "t.csv").write_text(f"file,caption\n{rows}")
    options = (home / "t.csv", "--images", photos)
    lost = examined(*options, code=2)["paths"]["missing"]
    # those that differ in their Unicode form alone are not missing
    at_once = ["한국어.png", unicodedata.normalize("NFD", "Å.png")]
    kinds = ("unicode", "escapes", "ending", "ending", "number", "number")
    elsewhere = [(listed, at) for listed, at in names.items() if listed not in at_once]
    assert {row["path"]: (row["kind"], row["at"]) for row in lost} == {
        listed: (kind, str(photos / at))
        for (listed, at), kind in zip(elsewhere, kinds, strict=True)
    }


def test_of_several_of_one_name_the_folders_decide(home):
    photos = home / "photos"
    for split in ("train", "val"):
        (photos / "deep" / split).mkdir(parents=True)
        shutil.copy(photos / "000003.png", photos / "deep" / split)

    def spoil(images):
        images[3]["filename"] = "val/000003.png"

    lost = examined(edited(home, spoil), "--images", photos, code=2)["paths"]["missing"]
    assert [row["at"] for row in lost] == [str(photos / "deep/val/000003.png")]


def test_nothing_found_asks_for_the_folder(home):
    shutil.rmtree(home / "photos")
    done = crosstill("doctor", home / "all.json", code=2)
    assert "20 of 20 files" in done.stdout and "--images FOLDER" in done.stdout


def test_a_table_of_paths_gets_the_folder_that_works(home):
    """Parquet whose rows name their images is a listing like any other."""
    names = sorted(path.name for path in (home / "photos").glob("*.png"))[:6]
    rows = {"image": [f"photos/{name}" for name in names], "caption": ["a scene"] * 6}
    pq.write_table(pa.table(rows), home / "paths.parquet")
    done = crosstill("doctor", home / "paths.parquet", "--images", home / "photos", code=2)
    after = shlex.split(re.findall(r"→ crosstill (.*)", done.stdout)[-1])
    assert sum(examined(*after[1:])["data"]["splits"].values()) == 6


def test_a_huge_tree_is_looked_at_in_part(home, monkeypatch):
    monkeypatch.setattr(missing, "MOST", 10)
    (home / "a").mkdir()
    for number in range(30):
        (home / f"a/{number}.txt").touch()
    report = examined(home / "all.json", code=2)["paths"]
    assert (report["files"], report["complete"]) == (10, False)
    assert "no more were looked at" in crosstill("doctor", home / "all.json", code=2).stdout
