"""One training step: encode, lose, balance, go back, update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from crosstill.balance import Balancer
from crosstill.errors import ConfigError, NonFiniteError
from crosstill.objectives import Input, Objective
from crosstill.students.student import Student, Tokens
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.inside import Inside, blank, patch_size
from crosstill.train.stream import Batch
from crosstill.types import Features


@dataclass(frozen=True)
class Outcome:
    """What one step's losses and weights were; scalars, detached."""

    losses: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    total: Tensor


class Step:
    """Everything that one step touches."""

    def __init__(
        self,
        student: Student,
        losses: nn.ModuleDict,
        balance: Balancer,
        optimizer: Optimizer,
        config: TrainConfig,
        group: Group,
    ) -> None:
        check_precision(config, group.device)
        self.losses, self.balance, self.optimizer = losses, balance, optimizer
        self._config, self._group = config, group
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self._wrapped = group.wrap(student)
        self._encode = torch.compile(self._wrapped) if config.compile else self._wrapped
        self._student = student
        self.inside: Inside | None = None

    def __call__(self, batch: Any, lr: float) -> Outcome:
        """Take one step.

        Raises:
            NonFiniteError: a loss is NaN or infinite; nothing has been updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        outcome = self._learn(batch)
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        for options in self.optimizer.param_groups:
            options["lr"] = lr
        self.optimizer.step()
        self._note(batch)
        return outcome

    def _note(self, batch: Any) -> None:
        """What losses keep of a batch after its step."""
        for loss in self._objectives().values():
            loss.update(batch.teacher, batch.ids)

    def _learn(self, batch: Any) -> Outcome:
        """Forward and backward."""
        size = self._config.chunk_size
        chunked = size is not None and size < len(batch.image_of)
        return self._in_chunks(batch, size or 0) if chunked else self._whole(batch)

    def _whole(self, batch: Batch) -> Outcome:
        if self.inside is not None:
            self.inside.listen()
        outcome, total = self._lose(self._features(batch, slice(None)), batch)
        total.backward()
        return outcome

    def _in_chunks(self, batch: Batch, size: int) -> Outcome:
        """The whole batch's gradient in the memory of one chunk (GradCache, arXiv 2101.06983).

        Embed all chunks without a graph, take the loss's gradient at the embeddings, then embed
        each chunk again under the same random state and carry its slice of that gradient back.
        """
        starts = range(0, len(batch.image_of), size)
        chunks = [slice(start, start + size) for start in starts]
        states, parts = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_dropout_state(self._group.device))
                parts.append(self._features(batch, chunk))
        leaf = Features(*(torch.cat(side).requires_grad_() for side in zip(*parts, strict=True)))
        outcome, total = self._lose(leaf, batch)
        total.backward()
        for chunk, state in zip(chunks, states, strict=True):
            _restore_dropout(state, self._group.device)
            with self._synchronised(chunk is chunks[-1]):
                again = self._features(batch, chunk)
                gradients = [side.grad[chunk] for side in leaf if side.grad is not None]
                torch.autograd.backward(_reached(again, leaf), gradients)
        return outcome

    def _features(self, batch: Batch, rows: slice) -> Features:
        """Student features of some rows of the share; each distinct image passes once."""
        distinct, image_of = torch.unique(batch.image_of[rows], return_inverse=True)
        texts = batch.texts
        part = Tokens(*(t[rows] for t in texts)) if isinstance(texts, Tokens) else texts[rows]
        with self._autocast():
            features = self._encode(batch.images[distinct], part, self._config.normalise)
        return Features(features.image[image_of].float(), features.text.float())

    def _inputs(self, batch: Batch, features: Features) -> dict[Input, tuple[Any, Any]]:
        """Make the input of student and teacher once for each that some loss declares."""
        layers = self.inside.take(batch.picked, batch.views) if self.inside is not None else None
        inputs: dict[Input, tuple[Any, Any]] = {}
        for reads in dict.fromkeys(loss.reads for loss in self._objectives().values()):
            if reads.kind == "hidden" and layers is not None:
                inputs[reads] = layers
            elif reads.kind == "masked":
                image = self._masked_images(batch, reads.ratio)
                inputs[reads] = Features(image, features.text), batch.teacher
            else:
                inputs[reads] = features, batch.teacher
        return inputs

    def _masked_images(self, batch: Batch, ratio: float) -> Tensor:
        """Embed the batch's photos with a share of their patches blanked: (B, D)."""
        student = self._student
        photos = blank(batch.images, patch_size(student) or 1, ratio, student.preprocess.mean)
        with self._autocast():
            return student.encode_image(photos).float()[batch.image_of]

    def _lose(self, share: Features, batch: Batch) -> tuple[Outcome, Tensor]:
        features = self._group.gather(share)
        inputs = self._inputs(batch, features)
        losses = {
            name: loss(*inputs[loss.reads], batch.ids) for name, loss in self._objectives().items()
        }
        return self._weigh(losses, features)

    def _weigh(
        self, losses: Mapping[str, Tensor], features: Features | None
    ) -> tuple[Outcome, Tensor]:
        """The weighted sum of the losses, with gradient, and all of it to look at."""
        if self.balance.needs_gradients and features is not None:
            self.balance.watch({name: _norm(loss, features) for name, loss in losses.items()})
        weights = self.balance.weights({name: loss.detach() for name, loss in losses.items()})
        shares = {name: loss.share for name, loss in self._objectives().items()}
        weights = {name: shares[name] * weight for name, weight in weights.items()}
        total = sum((weights[name] * losses[name] for name in losses), self.balance.penalty())
        _check_finite({**losses, "total": total})
        detached = {name: loss.detach() for name, loss in losses.items()}
        weighed = {name: weight.detach() for name, weight in weights.items()}
        return Outcome(detached, weighed, total.detach()), total

    def _objectives(self) -> dict[str, Objective]:
        return dict(self.losses.items())  # type: ignore[arg-type]

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self._config.precision == "bf16"
        return torch.autocast(self._group.device.type, torch.bfloat16, enabled=enabled)

    def _synchronised(self, now: bool) -> AbstractContextManager[Any]:
        """Gradients of a step's chunks travel between processes once, with the last chunk."""
        return nullcontext() if now or self._group.world == 1 else self._wrapped.no_sync()  # type: ignore[operator]


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse bf16 where it would be emulated and a hundred times slower than fp32."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("amx_tile", False)
    if config.precision == "bf16" and not fast:
        raise ConfigError("precision = bf16: this processor has no AMX; use precision=fp32")


def _norm(loss: Tensor, features: Features) -> Tensor:
    """The norm of a loss's gradient at the features that reach the towers."""
    wanted = [side for side in features if side.requires_grad]
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    return torch.stack([g.double().norm() for g in found if g is not None]).norm()


def _reached(features: Features, leaf: Features) -> list[Tensor]:
    """The sides that some loss looked at."""
    return [side for side, like in zip(features, leaf, strict=True) if like.grad is not None]


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not math.isfinite(value.item()):
            what = "the total loss" if name == "total" else f"loss {name!r}"
            raise NonFiniteError(f"{what} became {value.item()}")


def _dropout_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_dropout(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
