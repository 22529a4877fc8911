"""Flow of solution procedure (FSP).

Yim et al., "A Gift from Knowledge Distillation", CVPR 2017, eq. 1-2. The flow between
two stages of a network is the Gram matrix of their features; the student copies the teacher's.
"""

import torch
from torch import Tensor, nn

from crosstill.errors import MismatchError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts import similarity
from crosstill.types import Features, Ids


class FSP(Objective):
    """Mean squared error between the cross-modal Gram matrices of student and teacher.

    A cached teacher shows its outputs only. The two stages are then its image output and its text
    output, the channels are the batch's rows, and the Gram matrix is the (B, B) of all cosines
    between images and captions. Its entries say how much two rows agree, not which is right, so
    rows of the same image stay in. `gram` makes the Gram matrix of
    two stages of a model whose layers are at hand, and `flow` compares two Gram matrices.
    """

    pairs = False
    across = True

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        if not (len(student.image) and len(student.text)):
            return student.image.new_zeros(())
        return flow(similarity(*student), similarity(*teacher))


def gram(first: Tensor, second: Tensor) -> Tensor:
    """Compute eq. 1: the Gram matrix of the channels of two stages, a mean over space.

    Args:
        first: (B, C1, H, W).
        second: (B, C2, H, W).

    Returns:
        (B, C1, C2), float32 or wider.

    Raises:
        MismatchError: the maps differ in B, H or W.
    """
    if first[:, 0].shape != second[:, 0].shape:
        raise MismatchError(
            f"maps of shape {tuple(first.shape)} and {tuple(second.shape)} have no Gram matrix: "
            "pool one of them so that batch, height and width are equal"
        )
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        product = first.to(wide).flatten(2) @ second.to(wide).flatten(2).mT
    return product / first[0, 0].numel()


def flow(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute eq. 2 for one pair of stages: mean squared difference of two Gram matrices.

    Raises:
        MismatchError: they differ in shape, as those of layers with other channel counts do.
    """
    if student.shape != teacher.shape:
        raise MismatchError(
            f"the student's Gram matrix is {tuple(student.shape)} and the teacher's is "
            f"{tuple(teacher.shape)}; choose layers with the same numbers of channels"
        )
    return nn.functional.mse_loss(student, teacher.detach().to(student))
