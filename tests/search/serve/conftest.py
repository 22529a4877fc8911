"""The command that ships, on the index of forty scenes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from crosstill.search.searcher import Searcher
from serving import Server, serving


@pytest.fixture(scope="session")
def searcher(index_folder) -> Iterator[Searcher]:
    opened = Searcher.open(index_folder)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def server(index_folder, tmp_path_factory) -> Iterator[Server]:
    with serving(index_folder, tmp_path_factory.mktemp("serve")) as running:
        yield running


@pytest.fixture(scope="session")
def photo(photos) -> bytes:
    """A photo of the index."""
    return _first(photos).read_bytes()


@pytest.fixture(scope="session")
def photo_id(searcher) -> str:
    """The id of the photo that answers "a red circle" best."""
    return searcher.find(searcher.encode_texts(["a red circle"]), 1)[0][0].id


def _first(folder: Path) -> Path:
    return min(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
