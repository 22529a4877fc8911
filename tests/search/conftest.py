"""A real bundle and a real index, made once for all processes of a test run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crosstill import export, files
from crosstill.data import scenes
from crosstill.search.bundle import Bundle
from crosstill.search.encoder import Encoder
from support import small_student


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process that asks for it fills; read it, never write to it."""
    root = tmp_path_factory.getbasetemp()
    # processes that share a test run have base folders side by side
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    place, done = root / name, root / f"{name}.done"
    with files.locked(root, wait=True, name=f"{name}.lock"):
        if not done.exists():
            make(place)
            done.touch()
    return place


@pytest.fixture(scope="session")
def bundle_folder(cached, scenes, tmp_path_factory) -> Path:
    """A small student, not trained, as a bundle with calibration."""

    def make(place: Path) -> None:
        export.onnx(small_student(cached), place, pairs=scenes.split("val"), split="val")

    return once(tmp_path_factory, "bundle", make)


@pytest.fixture(scope="session")
def bundle(bundle_folder) -> Bundle:
    return Bundle.open(bundle_folder)


@pytest.fixture(scope="session")
def encoder(bundle) -> Encoder:
    return Encoder(bundle)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of forty rendered scenes, 64 x 64; read it, never write to it."""
    return once(tmp_path_factory, "photos", lambda place: _only_photos(place, 40))


def _only_photos(place: Path, count: int) -> None:
    scenes.write(place, count, seed=1).unlink()


@pytest.fixture(scope="session")
def index_folder(bundle_folder, photos, tmp_path_factory) -> Path:
    """The forty scenes, indexed; read it, never write to it."""
    from crosstill.search import building

    return once(
        tmp_path_factory, "index", lambda place: building.build(bundle_folder, photos, place)
    )
