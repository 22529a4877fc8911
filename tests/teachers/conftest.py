"""Small dual encoders with random weights, each a complete Hugging Face folder."""

from pathlib import Path

import pytest

from teachers import family_models

TEXTS = family_models.TEXTS


def make_dual(family: str, folder: Path) -> Path:
    """One of the three with a tokenizer that no other model's class reads."""
    return family_models.save(family_models.SIMPLE[family], folder)


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """A folder to damage."""
    return make_dual("pair", tmp_path / "pair")
