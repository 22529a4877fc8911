"""What all tests share."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch

from crosstill import data, export, recipes
from crosstill.bundle import Bundle, Encoder
from crosstill.cache import Cache, build
from crosstill.data import Pairs
from crosstill.students.student import Student
from crosstill.train import TrainConfig
from support import FAST, SETTINGS, SmallTeacher, once, small_student

# a shell ignores Ctrl-C for what it starts with `&`, and children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# on a busy machine no example is too slow
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and models, where there is one."""
    default = Path(__file__).parent.parent.parent / "shared"
    folder = Path(os.environ.get("CROSSTILL_SHARED", default))
    if not (folder / "flickr8k").is_dir():
        pytest.skip("the real photos and models are not here (set CROSSTILL_SHARED)")
    return folder


@pytest.fixture(scope="session")
def scenes() -> Pairs:
    """Sixty rendered scenes: 48 to train on, 6 and 6."""
    pairs = data.open("scenes:60")
    held = {example.path: pairs.read(example) for example in pairs.examples}
    # rendering them for each test would take longer than most tests
    return replace(pairs, read=lambda example: held[example.path])


@pytest.fixture
def teacher() -> SmallTeacher:
    return SmallTeacher()


@pytest.fixture(scope="session")
def cached(scenes: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The scenes under the small teacher; read it, never write to it."""
    return build(SmallTeacher(), scenes, tmp_path_factory.mktemp("cache") / "scenes")


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Cache:
    """320 scenes: 256 to train on, 32 to validate."""
    folder = tmp_path_factory.mktemp("many")
    return build(SmallTeacher(), data.open("scenes:320"), folder / "cache")


@pytest.fixture
def settings() -> TrainConfig:
    return TrainConfig(**SETTINGS)


@pytest.fixture
def student(cached: Cache) -> Student:
    return small_student(cached)


@pytest.fixture(scope="session")
def bundle_folder(cached, scenes, tmp_path_factory) -> Path:
    """A small student, not trained, as a bundle with calibration."""

    def make(place: Path) -> None:
        export.onnx(small_student(cached), place, pairs=scenes.split("val"), split="val")

    return once(tmp_path_factory, "bundle", make)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A short run, finished, beside its cache; read it, never write to it."""

    def make(place: Path) -> None:
        cached = build(
            SmallTeacher(), data.open("scenes:60", licence="cc-by-nc-4.0"), place / "cache"
        )
        recipes.distill(small_student(cached), cached, "clip_kd", out=place / "run", changes=FAST)

    return once(tmp_path_factory, "finished", make) / "run"


@pytest.fixture(scope="session")
def run_bundle(run_folder, tmp_path_factory) -> Path:
    """The best of that run as a bundle."""
    return once(tmp_path_factory, "run-bundle", lambda place: export.onnx(run_folder, place))


@pytest.fixture(scope="session")
def bundle(bundle_folder) -> Bundle:
    return Bundle.open(bundle_folder)


@pytest.fixture(scope="session")
def encoder(bundle) -> Encoder:
    return Encoder(bundle)
