"""A student of a thousand weights, as a file."""

import json
from pathlib import Path

import pytest

from support import small_config


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
