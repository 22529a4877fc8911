"""A student as a folder that `SentenceTransformer(folder)` loads, for texts and for photos.

Every student fits whose preprocess an image processor of transformers can say. The folder is made
of the library's own modules: a `Router` that sends texts and photos each through a tower, a
pooling, a head and a normalisation. So the loading side needs sentence-transformers 6 and Pillow,
no crosstill, and no `trust_remote_code` (since its version 6 the library imports a module class
of anyone else's only with that flag, for local folders too).

A list to encode holds texts or photos (PIL images, paths, addresses), not both.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from crosstill import files
from crosstill.errors import ConfigError
from crosstill.export import Options, processor
from crosstill.export.card import card
from crosstill.export.facts import Facts
from crosstill.export.folder import aside
from crosstill.export.parity import Parity, measure
from crosstill.export.provenance import Provenance
from crosstill.export.writing import with_recall
from crosstill.progress import quiet
from crosstill.students.student import Student

FORM = "sentence-transformers"
_ROW, _ROWS = "sentence_embedding", "token_embeddings"  # what its modules call (B, W), (B, L, W)


def fits(student: Student) -> list[str]:
    """Why a student cannot be exported in this form; empty for one that can."""
    return [f"it takes {what}" for what in processor.hindrances(student.preprocess)]


def require(student: Student) -> None:
    """Refuse a student that does not fit, with the reasons and another form.

    Raises:
        ConfigError: it does not.
    """
    reasons = fits(student)
    if reasons:
        raise ConfigError(
            f"{student.name} is not for sentence-transformers: {'; '.join(reasons)}. "
            "Export it as onnx"
        )


def export(known: Provenance, out: Path, facts: Facts, options: Options) -> list[str]:
    """Measure a student and write it to `out` in this form: see `write`."""
    require(known.student)
    parity = write(known.student, out, card(with_recall(known, facts), FORM))
    return [str(parity)]


def write(student: Student, folder: Path, readme: str) -> Parity:
    """Export a student; the folder is there only if sentence-transformers gives the same rows.

    Args:
        student: in eval mode or not; it stays as it is.
        folder: new, empty, or an earlier export, which is replaced.
        readme: the text of its README.md, the model card.

    Raises:
        ConfigError: the student does not fit, or the library is not installed.
        ExportError: the rows differ; the message has the figures.
    """
    _library()
    require(student)
    with aside(folder, 4 * student.parameter_count()) as new:
        with quiet(), torch.random.fork_rng():
            _save(student, new)
        (new / "README.md").write_text(readme, encoding="utf-8")
        parity = check(student, new)
        parity.require()
    return parity


def check(student: Student, folder: Path) -> Parity:
    """Load a folder with sentence-transformers alone and compare its rows with the student's."""
    with quiet(), torch.random.fork_rng():
        return measure(student, _Loaded(folder), FORM)


class _Loaded:
    """The folder as anyone would load it."""

    def __init__(self, folder: Path) -> None:
        kind = _library().SentenceTransformer
        self.model = kind(str(folder), device="cpu", local_files_only=True)

    def pixels(self, photos: Sequence[Image.Image]) -> Tensor:
        return self.model.preprocess(list(photos))["pixel_values"]

    @torch.inference_mode()
    def images(self, values: Tensor) -> Tensor:
        return self.model({"pixel_values": values, "modality": "image"})[_ROW]

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.model.encode(list(texts), show_progress_bar=False))


def _library() -> Any:
    try:
        import sentence_transformers
    except ImportError:
        raise ConfigError(
            "this form needs sentence-transformers to write and check it; "
            "install crosstill with its extra: pip install 'crosstill[export]'"
        ) from None
    return sentence_transformers


def _save(student: Student, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Router

    with files.scratch(folder, "towers") as towers:
        texts = _route(student, "text", processor.tokenizer(student), towers / "text")
        photos = _route(
            student, "image", processor.image_processor(student.preprocess), towers / "image"
        )
        router = Router({"text": texts, "image": photos}, default_route="text")
    model = _library().SentenceTransformer(
        modules=[router], device="cpu", similarity_fn_name="cosine"
    )
    model.save(str(folder), create_model_card=False)
    for path in sorted(folder.glob("*_0_Transformer")):
        _leave_out_pooler(path, getattr(student, f"{path.name.split('_')[0]}_tower"))


def _route(student: Student, side: str, reader: Any, beside: Path) -> list[Any]:
    """One tower with its pooling, its head and the normalisation, as the library's modules."""
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    head: nn.Linear = getattr(student, f"{side}_head")
    pooling = getattr(student.config, side).pooling
    tower = processor.tower(getattr(student, f"{side}_tower"))
    tower.save_pretrained(beside)
    reader.save_pretrained(beside)
    gives = "pooler_output" if pooling == "pooler" else "last_hidden_state"
    one = pooling == "pooler" and (side == "text" or processor.pools_to_rows(student))
    modality = {side: {"method": "forward", "method_output_name": gives}}
    encoder = Transformer(
        str(beside), modality_config=modality, module_output_name=_ROW if one else _ROWS
    )
    # A pooler that gives maps (B, W, 1, 1) is read as one position, whose mean is itself.
    mode = "mean" if pooling == "pooler" else pooling
    dense = Dense(
        head.in_features,
        head.out_features,
        bias=head.bias is not None,
        activation_function=nn.Identity(),
        init_weight=head.weight.detach().cpu().clone(),
        init_bias=None if head.bias is None else head.bias.detach().cpu().clone(),
    )
    return [encoder, *([] if one else [Pooling(head.in_features, mode)]), dense, Normalize()]


def _leave_out_pooler(folder: Path, tower: nn.Module) -> None:
    """Keep transformers from making up, with a warning, a pooler that the student has not."""
    knows = "add_pooling_layer" in inspect.signature(type(tower).__init__).parameters
    if knows and getattr(tower, "pooler", None) is None:
        path = folder / "sentence_bert_config.json"
        record = files.read_json(path)
        files.write_json(path, {**record, "model_kwargs": {"add_pooling_layer": False}})
