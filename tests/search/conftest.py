"""Photos and their index, made once for all processes of a test run."""

from pathlib import Path

import pytest

from crosstill.data import scenes
from support import once


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of forty rendered scenes, 64 x 64; read it, never write to it."""
    return once(tmp_path_factory, "photos", lambda place: _only_photos(place, 40))


def _only_photos(place: Path, count: int) -> None:
    scenes.write(place, count, seed=1).unlink()


@pytest.fixture(scope="session")
def index_folder(bundle_folder, photos, tmp_path_factory) -> Path:
    """The forty scenes, indexed; read it, never write to it."""
    from crosstill.search import index_builder

    return once(
        tmp_path_factory, "index", lambda place: index_builder.build(bundle_folder, photos, place)
    )
