"""What every form of export shares: its protocol, options and result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypedDict

from crosstill.errors import ConfigError

if TYPE_CHECKING:
    from crosstill.data import Pairs
    from crosstill.export.card import Facts
    from crosstill.export.provenance import Provenance

MAX_LOSS = 0.01  # of the RSUM, that 8 bits may cost


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        folder: where it is.
        lines: what its gates measured, and what could not be.
    """

    folder: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        int8: of "onnx": 8-bit matrix products and embeddings.
        max_loss: the share of the validation RSUM that 8 bits may cost.
        pairs, split: photos and captions to measure on, and their name; None takes those of the
            student's run.
        teacher_licence, data_licence: for the card, where their own cards do not say.
        command: for the card.
    """

    int8: bool = False
    max_loss: float = MAX_LOSS
    pairs: Pairs | None = None
    split: str = "val"
    teacher_licence: str | None = None
    data_licence: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"--max-loss {self.max_loss}: a share of the RSUM, from 0 to 1")


class FolderOptions(TypedDict, total=False):
    """The fields of `Options` that count for every form, as keyword arguments."""

    pairs: Pairs | None
    split: str
    teacher_licence: str | None
    data_licence: str | None
    command: str


class BundleOptions(FolderOptions, total=False):
    """All fields of `Options`, as keyword arguments."""

    int8: bool
    max_loss: float


class Form:
    """A form of export, found by its name in `crosstill.export.FORMS`.

    Attributes:
        name: what users call it; the card gives it as the library's name.
        task: of the card: a pipeline tag of the Hugging Face hub.
        loading: of the card: how to load such an export, as Markdown.
        int8: whether it has an 8-bit form.
        needs: modules of the extra `export` that it writes and checks with.
    """

    name: ClassVar[str]
    task: ClassVar[str] = "feature-extraction"
    loading: ClassVar[str]
    int8: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def require(self, source: Provenance, options: Options) -> None:
        """Refuse what cannot be exported in this form, before anything is written.

        Raises:
            ConfigError: the student does not fit, or a library is missing.
        """

    def write(
        self, source: Provenance, folder: Path, facts: Facts, options: Options
    ) -> tuple[Facts, list[str]]:
        """Write a student to an empty folder and pass the gates of the form.

        Args:
            source: the student and what measures it.
            folder: to write to; it is moved to its place afterwards, with a card.
            facts: for the card.
            options: how to export.

        Returns:
            The facts with what was measured here, and a line for each gate with its figures.

        Raises:
            ExportError: a gate was not passed; its figures are in the message.
        """
        raise NotImplementedError
