"""Recall as the field measures it, and what a model costs."""

from crosstill.evaluate.compare import Options, measure
from crosstill.evaluate.embedding import (
    CachedSplit,
    Embedded,
    TokenRows,
    embed,
    frozen_images,
    frozen_texts,
    pool_images,
    pool_texts,
    settled_images,
    settled_texts,
    teacher_recall,
)
from crosstill.evaluate.evaluation import Evaluation, retrieval, table
from crosstill.models import open as open_model
from crosstill.teachers.base import evaluating

__all__ = [
    "CachedSplit",
    "Embedded",
    "Evaluation",
    "Options",
    "TokenRows",
    "embed",
    "evaluating",
    "frozen_images",
    "frozen_texts",
    "measure",
    "open_model",
    "pool_images",
    "pool_texts",
    "retrieval",
    "settled_images",
    "settled_texts",
    "table",
    "teacher_recall",
]
