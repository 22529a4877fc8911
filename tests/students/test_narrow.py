from pathlib import Path

import families
import pytest
import torch
from families import IMAGE, TEXT
from transformers import AutoModel

from crosstill import export, students
from crosstill.errors import ConfigError
from crosstill.students.student import Student
from crosstill.students.student_config import StudentConfig
from crosstill.towers import tower_parts
from support import matrix

CAPTIONS = families.CAPTIONS


def student(text: Path, rank: int | None, **changes: object) -> Student:
    told = {"source": str(text), "vocabulary": "trim", "narrow": rank, **changes}
    config = {"name": "narrow", "image": {"config": IMAGE[0].config}, "text": told}
    return students.build(StudentConfig.model_validate(config), 16, CAPTIONS).eval()


@pytest.fixture(scope="module", params=matrix(TEXT, TEXT[:2]), ids=[family.type for family in TEXT])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_text(request.param, tmp_path_factory.mktemp("text"))


def table(model: Student) -> torch.Tensor:
    held = model.text_tower.get_input_embeddings()
    return held.table() if isinstance(held, tower_parts.Factored) else held.weight.detach()


def test_the_full_width_changes_nothing(folder: Path) -> None:
    whole = student(folder, None)
    width = table(whole).shape[1]
    again = student(folder, width)
    rows = [model.embed_texts(CAPTIONS[:20]) for model in (whole, again)]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-5)


def test_the_error_is_what_was_left_out(folder: Path) -> None:
    """Eckart and Young: no product of that size is nearer."""
    before = table(student(folder, None)).double()
    values = torch.linalg.svdvals(before)
    for rank in (2, 5, 11):
        after = table(student(folder, rank)).double()
        assert torch.linalg.matrix_rank(after, rtol=1e-4) == rank
        error = (after - before).norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_it_is_smaller_learns_and_is_kept(folder: Path, tmp_path: Path) -> None:
    whole, small = student(folder, None), student(folder, 4)
    rows, width = table(whole).shape
    before, after = (model.parameters_by_part() for model in (whole, small))
    assert before["text embeddings"] == rows * width
    assert after["text embeddings"] == 4 * (rows + width)
    gone = before["text embeddings"] - after["text embeddings"]
    assert before["text tower"] - after["text tower"] == gone == before["total"] - after["total"]
    small.encode_text(small.pad(small.tokenize(CAPTIONS[:9])))[:, 0].sum().backward()
    held = small.text_tower.get_input_embeddings()
    assert all(part.grad is not None and part.grad.any() for part in held.parameters())
    small.save(tmp_path)
    again = students.load(tmp_path)
    assert again.identity() == small.identity()
    assert torch.equal(again.embed_texts(CAPTIONS), small.embed_texts(CAPTIONS))
    assert again.parameters_by_part() == after


@pytest.mark.parametrize(
    "form", matrix(["sentence-transformers", "transformers"], ["transformers"])
)
def test_other_libraries_get_the_tables_multiplied(form: str, tmp_path: Path) -> None:
    text = families.save_text(TEXT[0], tmp_path / "text", AutoModel)
    small = student(text, 4, pooling="pooler")
    export.run(small, form, tmp_path / "out")
    assert isinstance(small.text_tower.get_input_embeddings(), tower_parts.Factored)


@pytest.mark.slow
def test_the_bundle_has_thin_tables(tmp_path: Path) -> None:
    import onnx

    small = student(families.save_text(TEXT[0], tmp_path / "text"), 4)
    export.onnx(small, tmp_path / "out")
    held = onnx.load(tmp_path / "out" / "text.onnx").graph.initializer
    shapes = {tuple(part.dims) for part in held}
    assert (len(small.tokenizer), 4) in shapes and (len(small.tokenizer), 32) not in shapes


def test_a_table_from_scratch_too() -> None:
    told = {"image": {"config": IMAGE[0].config}, "text": {"config": TEXT[0].config, "narrow": 3}}
    made = students.build(StudentConfig.model_validate(told), 16, CAPTIONS)
    assert made.text_tower.get_input_embeddings().narrow.weight.shape[1] == 3
    assert made.embed_texts(CAPTIONS[:2]).isfinite().all()


def test_more_than_there_is_to_keep(tmp_path: Path) -> None:
    text = families.save_text(TEXT[0], tmp_path / "text")
    with pytest.raises(ConfigError, match=r"narrow = 33: the token table is \d+ x 32"):
        student(text, 33)
