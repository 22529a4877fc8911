from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from crosstill import teachers
from crosstill.errors import ModelError
from crosstill.teachers.base import Teacher
from crosstill.teachers.features import FeaturesTeacher

ROWS = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]], dtype=np.float16)
NAMES = ["a.jpg", "sub/b.jpg", "c.jpg"]


def _write(folder: Path, rows: np.ndarray = ROWS, names: list[str] = NAMES) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "vectors.npy", rows)
    (folder / "filenames.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _write(tmp_path / "vectors")


def _load(folder: Path) -> FeaturesTeacher:
    teacher = teachers.load(folder)
    assert isinstance(teacher, FeaturesTeacher)
    return teacher


def test_rows_are_found_by_path_then_by_name(folder: Path) -> None:
    rows, missing = _load(folder).lookup_images(["sub/b.jpg", "elsewhere/a.jpg", "no.jpg"])
    torch.testing.assert_close(rows, torch.tensor([[0.0, 1.0], [0.6, 0.8]]))
    assert missing == ["no.jpg"]


def test_a_name_in_two_folders_decides_nothing(tmp_path: Path) -> None:
    teacher = _load(_write(tmp_path / "v", names=["x/a.jpg", "y/a.jpg", "c.jpg"]))
    assert teacher.lookup_images(["a.jpg"])[1] == ["a.jpg"]
    assert teacher.lookup_images(["y/a.jpg"])[0].tolist() == [[0.0, 1.0]]


def test_it_looks_up_and_embeds_nothing(folder: Path) -> None:
    teacher = _load(folder)
    assert not isinstance(teacher, Teacher)
    assert (teacher.dim, teacher.modalities, teacher.preprocess) == (2, {"image"}, None)
    assert teacher.kind == "vectors"
    with pytest.raises(ModelError, match="image vectors only"):
        teacher.lookup_texts(["a"])


def test_texts(folder: Path) -> None:
    np.save(folder / "text_vectors.npy", ROWS[:2])
    (folder / "captions.txt").write_text("a cube\na ball\n")
    teacher = _load(folder)
    assert teacher.modalities == {"image", "text"}
    rows, missing = teacher.lookup_texts(["a ball", "a cone"])
    assert (rows.tolist(), missing) == ([[0.0, 1.0]], ["a cone"])


def test_safetensors(tmp_path: Path) -> None:
    folder = _write(tmp_path / "v")
    (folder / "vectors.npy").unlink()
    save_file({"image": ROWS, "text": ROWS}, folder / "vectors.safetensors")
    (folder / "captions.txt").write_text("a\nb\nb\n")
    teacher = _load(folder)
    torch.testing.assert_close(teacher.lookup_images(["a.jpg"])[0], torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(teacher.lookup_texts(["b"])[0], torch.tensor([[0.0, 1.0]]))


def test_identity_follows_vectors_and_names(folder: Path, tmp_path: Path) -> None:
    first = _load(folder).identity()
    assert _load(folder).identity() == first
    assert _load(_write(tmp_path / "w")).identity() == first
    assert _load(_write(tmp_path / "x", rows=ROWS + 1)).identity() != first
    assert _load(_write(tmp_path / "y", names=["c.jpg", "b.jpg", "a.jpg"])).identity() != first


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (np.full((3, 2), np.nan, np.float32), NAMES, "vector 1 .* NaN"),
        (ROWS * [[1.0], [0.0], [1.0]], NAMES, "vector 2 .* zero"),
        (ROWS[:2], NAMES, r"shape \(2, 2\)"),
        (ROWS[0], NAMES, "no image vectors|shape"),
        (ROWS.astype(np.int64), NAMES, "int64"),
        (ROWS, ["a.jpg", "b.jpg", "a.jpg"], "line 3 repeats line 1"),
    ],
)
def test_what_cannot_be_right(
    tmp_path: Path, rows: np.ndarray, names: list[str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        teachers.load(_write(tmp_path / "v", rows, names))


def test_files_that_are_missing_or_no_arrays(folder: Path) -> None:
    (folder / "vectors.npy").write_bytes(b"\x80\x04no array")
    with pytest.raises(ModelError, match=r"vectors\.npy: not a readable array"):
        teachers.load(folder)
    (folder / "vectors.npy").unlink()
    with pytest.raises(ModelError, match="no image vectors"):
        teachers.load(folder)
    np.save(folder / "vectors.npy", ROWS)
    (folder / "filenames.txt").unlink()
    with pytest.raises(ModelError, match=r"filenames\.txt: missing"):
        teachers.load(folder)


def test_real_clip_vectors(shared: Path) -> None:
    teacher = _load(shared / "clip-vitb32-features")
    assert (teacher.dim, len(teacher.filenames)) == (512, 1000)
    rows, missing = teacher.lookup_images(teacher.filenames[:5])
    assert not missing
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5))
