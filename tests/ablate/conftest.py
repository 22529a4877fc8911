"""A cache with enough validation images to compare rows, and a student of a thousand weights."""

import json
from pathlib import Path

import pytest

from crosstill import cache, data
from crosstill.cache import Cache
from support import SmallTeacher, small_config


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Cache:
    """320 scenes: 256 to train on, 32 to validate."""
    folder = tmp_path_factory.mktemp("many")
    return cache.build(SmallTeacher(), data.open("scenes:320"), folder / "cache")


@pytest.fixture(scope="session")
def toml(tmp_path_factory) -> str:
    """The small student as a file."""
    path: Path = tmp_path_factory.mktemp("student") / "student.toml"
    described = small_config().model_dump(exclude_none=True)
    lines = [f"name = {json.dumps(described['name'])}"]
    for side in ("image", "text"):
        lines += [f"[{side}]", f"pooling = {json.dumps(described[side]['pooling'])}"]
        lines += [f"[{side}.config]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in described[side]["config"].items()]
    path.write_text("\n".join(lines))
    return str(path)
