"""One training step on candidate lists, of a dual encoder or of a fusion model."""

from __future__ import annotations

import torch
from torch import Tensor

from crosstill.fusion.matcher import PAIRS, Matcher
from crosstill.train.lists import Asked, ListBatch
from crosstill.train.step import Outcome, Step
from crosstill.types import Features, Lists, States


class ListStep(Step):
    """As `Step`, for losses that rank: only the listed pairs are in the student's graph.

    Attributes:
        judge: a fusion teacher that scores the lists as they come, if any; it shares the
            student's towers.
        hardest: negatives that go on to the student from what the judge has scored.
    """

    judge: Matcher | None = None
    hardest: int = 0

    def _learn(self, batch: ListBatch) -> Outcome:
        with self._autocast():
            said = self._rank_by_pairs(batch) if self._is_fusion else self._rank_by_cosines(batch)
        losses = {
            name: loss.rank(said) if loss.lists else loss(said.features, NOTHING, said.ids)
            for name, loss in self._objectives().items()
        }
        outcome, total = self._weigh(losses, said.features)
        total.backward()
        return outcome

    def _note(self, batch: ListBatch) -> None:
        """No loss that keeps teacher rows can read a score cache."""

    @property
    def _is_fusion(self) -> bool:
        return isinstance(self._student, Matcher)

    def _rank_by_cosines(self, batch: ListBatch) -> Lists:
        """A dual encoder's cosines of every list."""
        rows = self._encode(batch.images, batch.texts, self._config.normalise)
        image, text = rows.image.float(), rows.text.float()
        own = Features(image[batch.pairs[0]], text[batch.pairs[1]])
        asked = {"image": (own.image, text), "text": (own.text, image)}
        student = {
            way: torch.einsum("bd,bnd->bn", asked[way][0], asked[way][1][found.partners])
            for way, found in batch.lists.items()
        }
        return _lists(student, batch.lists, batch.ids, own)

    def _rank_by_pairs(self, batch: ListBatch) -> Lists:
        """A fusion model's scores of every listed pair, each pair once."""
        model: Matcher = self._student  # type: ignore[assignment]
        towers = see(model, batch)
        lists = batch.lists
        if self.judge is not None:
            lists = {way: self._judged(way, lists, batch, towers) for way in lists}
        sides = _entered(model, *towers)
        student = self._scored(sides, lists, batch)
        return _lists(student, lists, batch.ids, None)

    def _scored(
        self, sides: tuple[States, States], lists: dict[str, Asked], batch: ListBatch
    ) -> dict[str, Tensor]:
        pairs = [_pairs(way, found.partners, batch) for way, found in lists.items()]
        distinct, inverse = torch.unique(torch.cat(pairs), dim=0, return_inverse=True)
        model: Matcher = self._student  # type: ignore[assignment]
        scores = model.score_states(sides[0].take(distinct[:, 0]), sides[1].take(distinct[:, 1]))
        parts = scores.float()[inverse].split([len(part) for part in pairs])
        return {
            way: part.view(found.partners.shape)
            for (way, found), part in zip(lists.items(), parts, strict=True)
        }

    def _judged(
        self, way: str, lists: dict[str, Asked], batch: ListBatch, towers: tuple[States, States]
    ) -> Asked:
        """A list with the judge's scores, cut to the true partner and the hardest."""
        found = lists[way]
        assert self.judge is not None
        with torch.no_grad():
            sides = _entered(self.judge, *towers)
            chunks = _pairs(way, found.partners, batch).split(PAIRS)
            scores = torch.cat(
                [
                    self.judge.score_states(
                        *(s.take(c) for s, c in zip(sides, chunk.T, strict=True))
                    )
                    for chunk in chunks
                ]
            ).view(found.partners.shape)
        false = scores[:, 1:].masked_fill(~found.valid[:, 1:], -torch.inf)
        order = false.argsort(dim=1, descending=True)[:, : self.hardest] + 1
        order = torch.cat([torch.zeros_like(order[:, :1]), order], dim=1)
        return Asked(
            found.partners.gather(1, order),
            found.valid.gather(1, order),
            scores.gather(1, order),
        )


NOTHING = Features(torch.empty(0), torch.empty(0))


def see(model: Matcher, batch: ListBatch) -> tuple[States, States]:
    """The towers' states of a batch: kept ones as they are, else the towers run."""
    if isinstance(batch.images, States):
        return batch.images, batch.texts
    return model.encode_mixed(list(batch.images)), model.encode_texts(batch.texts)


def _entered(model: Matcher, image: States, text: States) -> tuple[States, States]:
    return model.project(image, "image"), model.project(text, "text")


def _pairs(way: str, partners: Tensor, batch: ListBatch) -> Tensor:
    """Rows of images and of texts for every entry of a (B, N) list: (B N, 2)."""
    own = batch.pairs[0 if way == "image" else 1][:, None].expand_as(partners)
    both = (own, partners) if way == "image" else (partners, own)
    return torch.stack([side.flatten() for side in both], dim=1)


def _lists(
    student: dict[str, Tensor], lists: dict[str, Asked], ids: Tensor, own: Features | None
) -> Lists:
    told = {way: found.teacher for way, found in lists.items() if found.teacher is not None}
    return Lists(student, told, {way: found.valid for way, found in lists.items()}, ids, own)
