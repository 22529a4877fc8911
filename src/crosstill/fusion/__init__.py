"""Models that read an image and a text together, from their families to re-ranking.

    matcher         the base of all of them: what is computed of each side alone, and of pairs
    families        ViLT, BLIP and BridgeTower of transformers; opening of any fusion model's folder
    meter           METER-shaped models, their networks and their released files
    students        fusion models to train
    candidates      the pairs to score: all true ones, and false ones that a finder chooses
    scores          caches of scores of chosen pairs
    list_task       the Task of a score cache; lists are its batches and its validation, states
                    the towers' outputs
    measure         scores and seconds of a split, and re-ranking of a dual encoder's finds

The distiller does not import this package. What it needs is found by name: the families in
`crosstill.teachers.FAMILIES`, the measure in `crosstill.evaluate.compare.MEASURES`, score caches
in `crosstill.artefacts.CACHES`, the Task in `ScoreCache.task`, and METER's released files in
`teachers.checkpoints`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstill.fusion.matcher import Matcher
    from crosstill.fusion.measure import Reranked, Scored, rerank, score_matrix
    from crosstill.fusion.scores import ScoreCache, build_scores
    from crosstill.fusion.students import build

__all__ = [
    "Matcher",
    "Reranked",
    "ScoreCache",
    "Scored",
    "build",
    "build_scores",
    "rerank",
    "score_matrix",
]

_PLACES = {
    "Matcher": "matcher",
    "Reranked": "measure",
    "ScoreCache": "scores",
    "Scored": "measure",
    "build": "students",
    "build_scores": "scores",
    "rerank": "measure",
    "score_matrix": "measure",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
