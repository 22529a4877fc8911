"""Parts of other distributions: docs/extending.md is true, and faults are one clear line."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from crosstill import balance, data, export, objectives
from crosstill import teachers as families
from crosstill.data import scenes
from crosstill.errors import ConfigError, DataError
from crosstill.search import vector_index
from crosstill.types import Example, image_id
from support import small_student
from teachers import fusion_models
from teachers.family_models import SIMPLE, save
from verbs import TOML, crosstill, refusal

PAGE = Path(__file__).parent.parent / "docs/extending.md"
CODE = dict(re.findall(r"`(\w+/\w+\.py)`[^`]*?:?\n\n```python\n(.*?)```", PAGE.read_text(), re.S))
GROUPS = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.S)[1])["project"][
    "entry-points"
]
KINDS = [
    objectives.LOSSES,
    balance.BALANCERS,
    families.FAMILIES,
    data.FORMATS,
    data.SOURCES,
    export.FORMS,
    vector_index.INDEXES,
]


def install(folder: Path, groups: dict[str, dict[str, str]], name: str = "mine") -> Path:
    """Make a distribution that declares these entry points, as an installer leaves it."""
    record = folder / f"{name}-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
    ]
    (record / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The page's distribution, nothing of it edited."""
    folder = install(tmp_path_factory.mktemp("site"), GROUPS)
    (folder / "mine").mkdir()
    for name, text in CODE.items():
        if name.startswith("mine/"):
            (folder / name).write_text(text)
    return folder


@pytest.fixture
def installed(site, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    return site


def album(folder: Path) -> str:
    """Rendered photos listed in the page's data format, and a name for the listings."""
    images = json.loads(scenes.write(folder, 60).read_text())["images"]
    for split in ("train", "val", "test"):
        lines = [
            f"{image['filename']} | {sentence['raw']}\n"
            for image in images
            if image["split"] == split
            for sentence in image["sentences"]
        ]
        (folder / f"{split}.pairs").write_text("".join(lines))
    return f"{folder}/{{train,val,test}}.pairs"


def prompted(folder: Path) -> Path:
    """A dual encoder with the page's prompt."""
    save(SIMPLE["pair"], folder)
    (folder / "prompt.txt").write_text("a photo of\n")
    return folder


def test_the_page_has_a_part_of_each_kind_in_thirty_lines():
    assert {f"mine/{name}.py" for name in re.findall(r'"mine\.(\w+)', PAGE.read_text())} == {
        name for name in CODE if name.startswith("mine/")
    }
    for name, text in CODE.items():
        assert len(text.splitlines()) < 30, name
    assert set(GROUPS) == {kind.group for kind in KINDS} - {data.SOURCES.group}
    for kind in KINDS:
        assert f"| `{kind.group}` |" in PAGE.read_text()


def test_the_loss_is_found_and_its_test_passes(installed):
    assert "huber" in objectives.known()
    scope: dict = {}
    exec(CODE["tests/test_huber.py"], scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def in_processes(site: Path, *arguments: object) -> None:
    """Run a verb in a process of its own."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "crosstill", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def here(site: Path, *arguments: object) -> None:
    """Run a verb in this process."""
    crosstill(*arguments)


@pytest.mark.parametrize("how", [here, pytest.param(in_processes, marks=pytest.mark.slow)])
def test_another_distribution_works_from_the_command_line(installed, tmp_path, how):
    """Its teacher and its data format fill a cache, its loss and its balancer train on that."""
    (tmp_path / "small.toml").write_text(TOML)
    run = partial(how, installed)
    teacher, cache = prompted(tmp_path / "teacher"), tmp_path / "cache"
    run("cache", teacher, album(tmp_path / "photos"), "--out", cache)
    header = json.loads((cache / "cache.json").read_text())
    assert header["teacher"]["identity"]["family"] == "prompted"
    settings = ["losses=huber+feature", "losses.huber.delta=0.1", "balance=even", "epochs=1"]
    options = [word for setting in settings for word in ("--set", setting)]
    student, out = tmp_path / "small.toml", tmp_path / "run"
    run("train", cache, "--student", student, "--out", out, *options, "--set", "log_every=1")
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    steps = [event for event in events if "losses" in event]
    assert steps
    for step in steps:
        losses, weights = step["losses"], step["weights"]
        assert set(losses) == {"huber", "feature"}
        parts = [losses[name] * weights[name] for name in losses]
        assert parts == pytest.approx([sum(losses.values()) / 2] * 2, rel=1e-4)


def test_a_fusion_family_opens_as_a_model_that_reads_pairs(installed, tmp_path):
    fusion_models.save("blip", tmp_path / "blip")
    shutil.copytree(tmp_path / "blip", tmp_path / "matching")
    config = json.loads((tmp_path / "blip/config.json").read_text())
    config["architectures"] = ["MatchingForImageTextRetrieval"]
    (tmp_path / "matching/config.json").write_text(json.dumps(config))
    known, model = (families.load(tmp_path / name) for name in ("blip", "matching"))
    assert model.kind == "matcher"
    assert type(model).__module__ == "mine.matching"
    assert model.identity()["weights"] == known.identity()["weights"]


def test_a_line_that_is_no_pair_is_refused_by_its_place(installed, tmp_path):
    (tmp_path / "album.pairs").write_text("a.png a dog\n")
    line = refusal("cache", "none", tmp_path / "album.pairs", "--out", tmp_path / "cache")
    assert line.endswith("album.pairs, line 1: no ' | ' in it; write FILE | CAPTION")


def test_other_endings_are_refused_with_all_that_are_known(installed, tmp_path):
    (tmp_path / "album.xyz").write_text("")
    line = refusal("cache", "none", tmp_path / "album.xyz", "--out", tmp_path / "cache")
    assert ".tar.zst, .pairs file, a folder, or scenes" in line


REVERSED = """
def reader(record):
    return lambda example: record["bytes"].encode()[::-1]
"""


def test_images_of_another_distributions_source_are_read_again_from_its_record(
    tmp_path, monkeypatch
):
    install(tmp_path, {"crosstill.data.sources": {"reversed": "turned:reader"}}, "other")
    (tmp_path / "turned.py").write_text(REVERSED)
    monkeypatch.syspath_prepend(str(tmp_path))
    example = Example(image_id(b"abc"), "a.png", (), "train")
    assert data.reader({"form": "reversed", "bytes": "cba"})(example) == b"abc"
    with pytest.raises(DataError, match="form 'other' cannot be read; upgrade crosstill"):
        data.reader({"form": "other"})


def test_an_export_form_writes_and_is_named_in_refusals(installed, cached, tmp_path):
    student = small_student(cached)
    exported = export.run(student, "weights", tmp_path / "out")
    assert exported.lines[-1] == f"{student.parameter_count():,} parameters"
    assert load_file(tmp_path / "out/model.safetensors")
    with pytest.raises(ConfigError, match="did you mean 'weights'.*Known: onnx, sentence"):
        export.run(student, "weigths", tmp_path / "other")


def test_a_vector_index_serves_a_searched_index(installed, bundle_folder, tmp_path):
    scenes.write(tmp_path / "photos", 20)
    place = f"shared://{tmp_path}/vectors"
    words = ("index", bundle_folder, tmp_path / "photos", "--out", tmp_path / "index")
    crosstill(*words, "--milvus", place)
    assert list((tmp_path / "vectors").glob("*/*.faiss"))
    gone = min((tmp_path / "photos").glob("*.png"))
    gone.unlink()
    crosstill(*words)
    words = ("search", tmp_path / "index", "a red circle", "--top", 30, "--json")
    hits = crosstill(*words).stdout
    assert hits.count(".png") >= 19 and gone.name not in hits
    crosstill("index", "verify", tmp_path / "index")


def test_an_address_of_no_known_index_is_no_milvus(bundle_folder, tmp_path):
    words = ("index", bundle_folder, tmp_path, "--out", tmp_path / "index")
    assert "no Milvus; give http" in refusal(*words, "--milvus", "shared:///vectors")


def test_a_mistyped_name_of_another_distribution_is_recognised(installed):
    with pytest.raises(ConfigError, match=r"no loss named 'hubre'; did you mean 'huber'\?"):
        objectives.build("hubre")


BROKEN = {
    "absent": ("gone.away", "gone.away of other cannot be imported: No module named 'gone'"),
    "raises": ("raising", "raising of other cannot be imported: half written"),
    "lacks": ("empty:Loss", "empty:Loss of other cannot be imported: .*no attribute 'Loss'"),
    "empty": ("empty", "empty defines 0 subclasses of crosstill.objectives.base.Objective"),
    "double": ("double", "double defines 2 subclasses"),
    "function": ("empty:function", "function defines 0 subclasses"),
    "number": ("empty:NUMBER", "5 defines 0 subclasses"),
    "a.dot": ("double:One", "its name has a dot"),
}
DOUBLE = """
from crosstill.objectives import Objective
class One(Objective): pass
class Two(Objective): pass
"""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_one_clear_line(tmp_path, monkeypatch, name):
    points = {name: target for name, (target, _) in BROKEN.items()}
    install(tmp_path, {"crosstill.objectives": points}, "other")
    (tmp_path / "raising.py").write_text("raise RuntimeError('half written')\n")
    (tmp_path / "empty.py").write_text("NUMBER = 5\ndef function(): pass\n")
    (tmp_path / "double.py").write_text(DOUBLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"loss '{name}'.*{BROKEN[name][1]}") as caught:
        objectives.build(name)
    assert "\n" not in str(caught.value)
    for module in ("raising", "empty", "double"):
        sys.modules.pop(module, None)


def test_of_two_that_offer_a_name_neither_is_taken(tmp_path, monkeypatch):
    for name in ("first", "second"):
        install(tmp_path, {"crosstill.balance": {"even": "nowhere"}}, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="balancer 'even' is offered by first and second; unin"):
        balance.build("even", ["a"])


def test_our_own_names_cannot_be_taken_over(tmp_path, monkeypatch):
    install(tmp_path, {"crosstill.objectives": {"feature": "nowhere"}}, "other")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(objectives.build("feature")).__module__ == "crosstill.objectives.feature"
    assert objectives.known().count("feature") == 1


def test_names_cost_no_import(tmp_path):
    """Listing names imports no part, no torch and no optional library."""
    program = """
import sys
from crosstill.export import FORMS
print("pydantic" in sys.modules, FORMS.names())
from crosstill.search.vector_index import INDEXES
print(INDEXES.names())
print(sorted({"torch", "transformers", "faiss", "pymilvus"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "False ['onnx', 'sentence-transformers', 'transformers']",
        "['memory', 'milvus']",
        "[]",
    ]
