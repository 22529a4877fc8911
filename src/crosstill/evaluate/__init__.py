"""Recall as the field measures it, and what a model costs."""

from crosstill.evaluate.encode import (
    CachedSplit,
    Embedded,
    embed,
    evaluating,
    frozen_images,
    frozen_texts,
    pool_images,
    pool_texts,
    teacher_recall,
)
from crosstill.evaluate.models import open_encoder, open_model
from crosstill.evaluate.report import Evaluation, retrieval, table

__all__ = [
    "CachedSplit",
    "Embedded",
    "Evaluation",
    "embed",
    "evaluating",
    "frozen_images",
    "frozen_texts",
    "open_encoder",
    "open_model",
    "pool_images",
    "pool_texts",
    "retrieval",
    "table",
    "teacher_recall",
]
