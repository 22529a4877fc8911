"""Relational knowledge distillation (RKD).

Park et al., arXiv 1904.05068, eq. 5-10. The student copies the shape of the teacher's point
cloud, its distances up to one scale and its angles, not the place of any point.
"""

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts import sides, total
from crosstill.types import Features, Ids


class RKD(Objective):
    """Huber loss on distances and on angles, the images' cloud plus the captions' cloud.

    Memory and time grow as B²·D for the differences and B³ for the angles. Distances and angles
    do not tell a negative from a positive, so rows of the same image stay in: two equal points
    of the student match two equal points of the teacher.

    Args:
        distance: weight of the distances; 0 leaves them out.
        angle: weight of the angles; 0 leaves them out.
    """

    pairs = False

    def __init__(self, *, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        for name, weight in {"distance": distance, "angle": angle}.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name} must be 0 or above, not {weight}")
        if distance == angle == 0:
            raise ConfigError("distance and angle are both 0; give one of them a weight")
        self.distance, self.angle = distance, angle

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        clouds = sides(student, teacher, ids)
        return total([self._compare(s, t) for s, t, *_ in clouds], student.image)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        points, targets = vectors(student), vectors(teacher)
        total = points.new_zeros(())
        if self.distance:
            total = total + self.distance * _huber(distances(points), distances(targets))
        if self.angle:
            total = total + self.angle * _huber(angles(points), angles(targets))
        return total


def _huber(student: Tensor, teacher: Tensor) -> Tensor:
    return nn.functional.smooth_l1_loss(student, teacher.to(student))


def vectors(points: Tensor) -> Tensor:
    """Subtract each point from each other, (B, D) to (B, B, D), float32 or wider.

    Differences, not the cheaper |a|² + |b|² - 2ab, which rounds the distance of two equal points
    to something above 0.
    """
    wide = points.to(torch.promote_types(points.dtype, torch.float32))
    return wide - wide[:, None]


def distances(vectors: Tensor) -> Tensor:
    """Divide the lengths of vectors (B, B, D) by the mean of those above 0: (B, B)."""
    length, zero = _lengths(vectors)
    mean = length.sum() / (~zero).sum().clamp_min(1)
    return length / mean.masked_fill(zero.all(), 1)


def angles(vectors: Tensor) -> Tensor:
    """Compute the cosine of the angle at point i between j and k: (B, B, D) to (B, B, B).

    It is 0 where two of the three points are equal and there is no angle.
    """
    length, zero = _lengths(vectors)
    unit = vectors / length.masked_fill(zero, 1)[..., None]
    with torch.autocast(vectors.device.type, enabled=False):
        return unit @ unit.mT


def _lengths(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths (B, B) and a mask of zeros, at which a square root has no gradient."""
    square = vectors.square().sum(-1)
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0), zero
