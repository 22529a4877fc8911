"""The gradient of the contrastive loss, written out instead of differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from crosstill.objectives.parts.candidates import logits
from crosstill.objectives.parts.similarity import similarity
from crosstill.types import Features


def contrastive_gradients(features: Features, ids: Tensor, temperature: float) -> Features:
    """Gradients of InfoNCE with respect to image and text, themselves differentiable.

    With S = image text^T / temperature, L = (mean_i CE(row i) + mean_j CE(column j)) / 2 has
        dL/dS = (softmax_rows(S) + softmax_columns(S) - 2 I) / (2 B)
    and the chain rule gives dL/dimage = dL/dS text / temperature, and the transpose for text.
    Pairs of rows that show the same image are left out of both softmaxes, as in the loss.

    Args:
        features: (B, D) image and text.
        ids: (B,), which image each row shows.
        temperature: what the dot products are divided by.

    Returns:
        (B, D) each.
    """
    scores = logits(features.image, features.text, ids, temperature)
    identity = torch.eye(len(ids), dtype=scores.dtype, device=scores.device)
    residual = scores.softmax(1) + scores.softmax(0) - 2 * identity
    residual = residual / (2 * len(ids) * temperature)
    # similarity(a, b.T) is a @ b that autocast cannot narrow
    return Features(similarity(residual, features.text.T), similarity(residual.T, features.image.T))
