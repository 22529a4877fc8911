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
from crosstill.evaluate.fusion import Scored, score_matrix
from crosstill.evaluate.models import open_encoder, open_live, open_matcher, open_model
from crosstill.evaluate.report import Evaluation, retrieval, table
from crosstill.evaluate.rerank import Reranked, rerank

__all__ = [
    "CachedSplit",
    "Embedded",
    "Evaluation",
    "Reranked",
    "Scored",
    "embed",
    "evaluating",
    "frozen_images",
    "frozen_texts",
    "open_encoder",
    "open_live",
    "open_matcher",
    "open_model",
    "pool_images",
    "pool_texts",
    "rerank",
    "retrieval",
    "score_matrix",
    "table",
    "teacher_recall",
]
