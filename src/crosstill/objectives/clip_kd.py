"""CLIP-KD: a weighted sum of the losses of an empirical study of CLIP distillation.

CLIP-KD, arXiv 2307.12732. Its masked feature distillation (MFD) is not among the parts here: it
reads the features of masked photos, and is a loss of its own, `masked_feature`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError, unknown
from crosstill.objectives.base import Objective
from crosstill.objectives.parts import batch_logits, contrast, divergence, logits, similarity
from crosstill.plugins import positive
from crosstill.types import Features

UNIFIED = ("task", "fd", "icl", "crd")
WEIGHTS = {"task": 1.0, "fd": 2000.0, "icl": 1.0, "crd": 1.0, "gd": 1e8, "afd": 1.0}

Part = Callable[[Features, Features, Tensor, float], Tensor]


class ClipKD(Objective):
    """Weighted sum of the chosen parts.

    Rows that show the same image are left out of each other's softmax in every part.

    Args:
        dim: embedding width D; only "afd" needs it.
        seed: of the layers of "afd".
        parts: any of "task", "fd", "icl", "crd", "gd" and "afd"; the default is what the paper
            combines.
        weights: of parts by name, where they differ from the published ones: task 1, fd 2000,
            icl 1, crd 1, gd 1e8, afd 1.
        temperature: the divisor of the student's and the teacher's cosines in all parts; in the
            paper each model has one that it learned.
    """

    def __init__(
        self,
        *,
        dim: int | None = None,
        seed: int = 0,
        parts: Sequence[str] = UNIFIED,
        weights: Mapping[str, float] | None = None,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.parts = _checked_parts(parts)
        self.weights = _checked_weights(self.parts, weights or {})
        self.temperature = temperature
        self.terms: dict[str, Part] = {"task": task, "fd": fd, "icl": icl, "crd": crd, "gd": gd}
        if "afd" in self.parts:
            if dim is None:
                raise ConfigError('the part "afd" needs the embedding width; give dim')
            self.fusion = Fusion(dim, seed)
            self.terms["afd"] = self.fusion

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        dtypes = [x.dtype for x in (*student, *teacher)]
        wide = reduce(torch.promote_types, dtypes, torch.float32)
        student = Features(*(x.to(wide) for x in student))
        teacher = Features(*(x.detach().to(wide) for x in teacher))
        values = [
            self.weights[name] * self.terms[name](student, teacher, ids, self.temperature)
            for name in self.parts
        ]
        return torch.stack(values).sum()


class Fusion(nn.Module):
    """AFD: InfoNCE between fused images and fused captions.

    A fused feature is Linear(student, teacher side by side), unit length; one layer for images
    and one for captions.

    Args:
        dim: D, of student, teacher and the fused feature.
        seed: of the layers' start, uniform within 1 / sqrt(2 D) as torch's own.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        positive(dim=dim)
        generator = torch.Generator().manual_seed(seed)
        bound = (2 * dim) ** -0.5

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.weight = draw(2, dim, 2 * dim)  # images, then captions
        self.bias = draw(2, dim)

    def forward(
        self, student: Features, teacher: Features, ids: Tensor, temperature: float
    ) -> Tensor:
        sides = zip(student, teacher, self.weight, self.bias, strict=True)
        image, text = (
            nn.functional.normalize(similarity(torch.cat([s, t], dim=1), w) + b, dim=1)
            for s, t, w, b in sides
        )
        return contrast(Features(image, text), Features(image, text), ids, temperature)


def task(student: Features, teacher: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute CLIP's own loss: mean of image-to-caption and caption-to-image cross-entropy."""
    return contrast(student, student, ids, temperature)


def fd(student: Features, teacher: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute feature distillation: mean squared difference over B and D, images plus captions."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([nn.functional.mse_loss(s, t) for s, t in pairs]).sum()


def icl(student: Features, teacher: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute interactive contrast: student images against teacher captions, and the reverse."""
    return contrast(student, teacher, ids, temperature)


def crd(student: Features, teacher: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute contrastive relational distillation: mean KL(teacher || student), both directions."""
    rows = batch_logits(student, teacher, ids, temperature)
    return divergence(rows.student, rows.teacher, rows.absent).mean()


def gd(student: Features, teacher: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute gradient distillation: mean squared difference of d task / d image, plus d text.

    Each model's gradient is that of its own `task`, both directions together. The authors' code
    compares the two directions apart, without the factor 1/2: twice as much where they agree,
    more where they do not.
    """
    own = contrastive_gradients(student, ids, temperature)
    return fd(own, contrastive_gradients(teacher, ids, temperature), ids, temperature)


def contrastive_gradients(features: Features, ids: Tensor, temperature: float) -> Features:
    """Compute the gradients of InfoNCE at image and text, themselves differentiable.

    With S = image text^T / temperature, L = (mean_i CE(row i) + mean_j CE(column j)) / 2 has
        dL/dS = (softmax_rows(S) + softmax_columns(S) - 2 I) / (2 B)
    and the chain rule gives dL/dimage = dL/dS text / temperature, and the transpose for text.
    Pairs of rows that show the same image are left out of both softmaxes, as in the loss.

    Args:
        features: (B, D) image and text.
        ids: (B,), which image each row shows.
        temperature: the divisor of the dot products.

    Returns:
        (B, D) each.
    """
    scores = logits(features.image, features.text, ids, temperature)
    identity = torch.eye(len(ids), dtype=scores.dtype, device=scores.device)
    residual = scores.softmax(1) + scores.softmax(0) - 2 * identity
    residual = residual / (2 * len(ids) * temperature)
    # similarity(a, b.T) is a @ b that autocast cannot narrow
    return Features(similarity(residual, features.text.T), similarity(residual.T, features.image.T))


def _checked_parts(parts: Sequence[str]) -> tuple[str, ...]:
    for name in parts:
        if name not in WEIGHTS:
            raise unknown("part", name, WEIGHTS)
    if not parts or len(set(parts)) < len(parts):
        what = "names one twice" if parts else "is empty"
        raise ConfigError(f"parts {what}; choose some of {', '.join(WEIGHTS)}, each once")
    return tuple(parts)


def _checked_weights(parts: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in WEIGHTS:
            raise unknown("part", name, WEIGHTS)
        if name not in parts:
            raise ConfigError(f"weights has {name!r}, which is not among the parts; add it there")
        positive(**{f"the weight of {name}": weight})
    return WEIGHTS | dict(weights)
