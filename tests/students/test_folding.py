"""Frozen batch norms inside the convolutions before them: the same rows and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import IMAGE, TEXT, Family, save_image, save_text
from torch import Tensor, nn

from crosstill import students
from crosstill.students.student import Student
from crosstill.students.student_config import ImageTowerConfig, StudentConfig, TextTowerConfig
from crosstill.towers.folding import fold_norms

NORMED = [f for f in IMAGE if f.type in ("resnet", "regnet", "mobilenet_v2", "efficientnet")]


def build(family: Family, folder: Path) -> Student:
    config = StudentConfig(
        name="folded",
        image=ImageTowerConfig(source=str(save_image(family, folder / "image"))),
        text=TextTowerConfig(source=str(save_text(TEXT[0], folder / "text"))),
    )
    return students.build(config, 16, ["a red cube", "a blue ring"])


def gradients(student: Student, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    student.zero_grad()
    rows = student.pool_image(pixels)
    (rows * torch.linspace(-1, 1, rows.shape[1])).sum().backward()
    tower = student.image_tower.named_parameters()
    return rows.detach(), {name: p.grad for name, p in tower if p.grad is not None}


@pytest.mark.parametrize("family", NORMED, ids=lambda family: family.type)
def test_rows_and_gradients_are_those_of_the_norms_themselves(
    family: Family, tmp_path: Path
) -> None:
    folded = build(family, tmp_path).double()  # float32 may fall on the other side of a ReLU
    plain = copy.deepcopy(folded)
    for module in plain.modules():
        vars(module).pop("forward", None)
    pixels = torch.rand(4, 3, *folded.preprocess.size, dtype=torch.float64)
    rows, grads = gradients(folded, pixels)
    plain_rows, plain_grads = gradients(plain, pixels)
    torch.testing.assert_close(rows, plain_rows)
    assert not torch.equal(rows, plain_rows)  # something is folded
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(folded.pool_image(pixels), plain.pool_image(pixels))
    assert folded.state_dict().keys() == plain.state_dict().keys()


class Shortcut(nn.Module):
    """A convolution whose output a norm reads, and in one of two forms a sum as well."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.shares = shares

    def forward(self, values: Tensor) -> Tensor:
        maps = self.conv(values)
        return self.norm(maps) + maps if self.shares else self.norm(maps)


@pytest.mark.parametrize(("shares", "pairs"), [(False, 1), (True, 0)])
def test_a_convolution_that_something_else_reads_is_left_alone(shares: bool, pairs: int) -> None:
    tower = Shortcut(shares).eval()
    values = torch.rand(2, 3, 8, 8)
    before = tower(values).detach()
    assert fold_norms(tower, lambda: tower(values)) == pairs
    torch.testing.assert_close(tower(values), before)


def test_a_norm_that_learns_its_statistics_is_left_alone() -> None:
    tower = Shortcut(shares=False).eval()
    values = torch.rand(2, 3, 8, 8)
    fold_norms(tower, lambda: tower(values))
    learning = copy.deepcopy(tower).train()
    plain = Shortcut(shares=False).train()
    plain.load_state_dict(learning.state_dict())
    assert torch.equal(learning(values), plain(values))
    assert torch.equal(learning.norm.running_mean, plain.norm.running_mean)
