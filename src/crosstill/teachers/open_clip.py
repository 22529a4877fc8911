"""OpenCLIP's models through its own library: those with no transformers form (MobileCLIP, CoCa).

https://github.com/mlfoundations/open_clip. The library is the extra `open-clip`. Checkpoints that
lie on the hub as CLIP of transformers too need it not: `dual` opens those.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosstill import extras, files
from crosstill.data.pairs import read_licence
from crosstill.errors import ModelError
from crosstill.formats import encodable
from crosstill.images import Preprocess, normalise
from crosstill.progress import quiet
from crosstill.teachers import dual
from crosstill.teachers.base import TwoTowers
from crosstill.towers import hub

PREFIX = "open_clip:"
CONFIG = "open_clip_config.json"
_FILTERS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}


class _Entry(NamedTuple):
    """A model of the library: its name there, its weights, and how they want their images."""

    model: str
    name: str
    weights: Path
    preprocess: dict[str, Any]
    licence: str | None


def holds(source: str | Path) -> bool:
    """Tell whether it is `open_clip:MODEL:WEIGHTS`, or a folder in OpenCLIP's form alone."""
    folder = Path(source)
    own = (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    return own or str(source).startswith(PREFIX)


class OpenClip(TwoTowers):
    """A model of OpenCLIP with its own tokenizer; see `Teacher` for what it offers.

    Of images whose longer side is an odd number of pixels too long, the library cuts a centre
    that may lie one pixel beside ours.

    Args:
        source: `open_clip:MODEL:WEIGHTS` with a name of the library's weights or a safetensors
            file, or a folder with `open_clip_config.json` and safetensors.
        name: what to call it in tables; None takes the source's own.
        device: where to compute; None takes a GPU when there is one.

    Attributes:
        logit_scale, logit_bias: as of `DualEncoder`.

    Raises:
        ConfigError: the library is not installed.
        ModelError: no such model or weights, pickled ones, or images wanted in a way that
            `Preprocess` cannot say.
    """

    def __init__(
        self, source: str | Path, name: str | None = None, device: torch.device | None = None
    ) -> None:
        library = _library()
        with quiet(logging.ERROR), hub.reading(str(source), "OpenCLIP model"):
            entry = _find(library, str(source))
            model = library.create_model(
                entry.model,
                load_weights=False,
                pretrained_text=False,
                force_preprocess_cfg=entry.preprocess,
            )
            library.load_checkpoint(model, str(entry.weights), strict=True)
            self.tokenizer = library.get_tokenizer(entry.model)
            self._config = library.get_model_config(entry.model)
        self.source = (
            str(source) if str(source).startswith(PREFIX) else str(Path(source).absolute())
        )
        self.name, self.licence = name or entry.name, entry.licence
        self.preprocess = _preprocess(library.get_model_preprocess_cfg(model), str(source))
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.logit_scale, self.logit_bias = dual.logits(self.model, str(source))
        self._weights = entry.weights
        black = torch.zeros(1, 3, *self.preprocess.size, dtype=torch.uint8)
        with hub.reading(str(source), "OpenCLIP model"):
            self.dim = self.embed_texts(["a"]).shape[1]
            self.embed_images(black)

    def _identify(self) -> dict[str, str]:
        return {
            "weights": files.digest_file(self._weights),
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json(_rules(self.tokenizer)),
            # the same weights run under several configs, which differ in more than that
            "activation": files.digest_json(self._config),
            "family": "open_clip",
        }

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the model can read."""
        inner, limit = getattr(self.tokenizer, "tokenizer", None), self.tokenizer.context_length
        plain = [encodable(text) for text in texts]
        if inner is None:  # what it encodes has no first and last token yet
            return sum(len(self.tokenizer.encode(text)) + 2 > limit for text in plain)
        return sum(len(inner(text, verbose=False)["input_ids"]) > limit for text in plain)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.model.encode_image(normalise(pixels, self.preprocess))
        return rows

    def _encode_texts(self, texts: list[str]) -> Tensor:
        ids = self.tokenizer([encodable(text) for text in texts])
        rows: Tensor = self.model.encode_text(ids.to(self.device))
        return rows


def load(folder: Path, name: str | None, device: torch.device | None = None) -> OpenClip:
    """Load a folder in OpenCLIP's form."""
    return OpenClip(folder, name, device)


def _library() -> Any:
    try:
        return import_module("open_clip")
    except ImportError as error:
        raise extras.missing("an OpenCLIP model", "open-clip", str(error.name)) from None


def _find(library: Any, source: str) -> _Entry:
    if not source.startswith(PREFIX):
        folder = Path(source)
        weights = hub.weight_files(folder)
        if len(weights) != 1:
            raise ModelError(
                f"{folder}: {len(weights)} .safetensors beside {CONFIG}, one is needed; pickled "
                "weights are never read"
            )
        name, licence = hub.display_name(folder), read_licence(folder)
        return _Entry(f"local-dir:{folder}", name, weights[0], {}, licence)
    model, _, wanted = source.removeprefix(PREFIX).partition(":")
    if model not in library.list_models():
        raise ModelError(f"{source}: OpenCLIP has no model {model!r}; see open_clip.list_models()")
    path, preprocess = Path(wanted), {}
    if not path.is_file():
        preprocess = library.get_pretrained_cfg(model, wanted)
        _check_tag(library, source, model, preprocess)
        path = Path(library.download_pretrained(preprocess))
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{source}: its weights are {path.name}, and pickled ones are never read; give a "
            ".safetensors file, or the checkpoint's id on the Hugging Face hub"
        )
    name = path.stem if path == Path(wanted) else wanted
    return _Entry(model, f"{model}-{name}", path, preprocess, None)


def _check_tag(library: Any, source: str, model: str, tag: dict[str, Any]) -> None:
    if not tag:
        known = ", ".join(library.list_pretrained_tags_by_model(model)) or "none"
        raise ModelError(f"{source}: no such file and no such weights of {model}; known: {known}")
    # the library only warns of this, and the rows are wrong
    trained, has = (bool(of.get("quick_gelu")) for of in (tag, library.get_model_config(model)))
    if trained != has:
        other = f"{model}-quickgelu" if trained else model.removesuffix("-quickgelu")
        raise ModelError(f"{source}: these weights have another activation; name {other!r} instead")


def _preprocess(record: dict[str, Any], source: str) -> Preprocess:
    """Translate the library's `preprocess_cfg`."""
    size = record["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, kind = record["resize_mode"], record["interpolation"]
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise ModelError(
            f"{source}: it wants images {height} x {width} by resize_mode={mode!r}, which "
            "crosstill cannot do; embed your images with OpenCLIP and give the vectors as a "
            "features folder"
        )
    resize = {"resize": "squash"} if mode == "squash" else {"resize": "crop", "shorter": height}
    filters = {"interpolation": _FILTERS[kind]}
    colour = {key: list(record[key]) for key in ("mean", "std")}
    return Preprocess.from_json({"size": [height, width], **resize, **filters, **colour})


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Return the rules of a tokenizer of the library."""
    steps = {name: getattr(tokenizer, name, None) for name in ("clean_fn", "reduction_fn")}
    named = {name: getattr(step, "__name__", None) for name, step in steps.items()}
    kept = {**named, "class": type(tokenizer).__name__, "length": tokenizer.context_length}
    if not hasattr(tokenizer, "tokenizer"):
        merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
        return {**kept, "words": tokenizer.encoder, "merges": merges}
    ways = {way: getattr(tokenizer, way, None) for way in ("tokenizer_mode", "strip_sep_token")}
    return {**kept, **ways, "inner": dual.tokenizer_rules(tokenizer.tokenizer)}
