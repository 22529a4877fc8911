"""The forms "transformers" and "sentence-transformers": folders that other libraries load.

A `VisionTextDualEncoderModel` pools each tower by its own pooler and projects without a bias, so
only some students fit; `fits` says why not. The loading side needs transformers 5, torch and
Pillow, and nothing of crosstill:

    AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

A `SentenceTransformer(folder)` fits every student whose preprocess an image processor of
transformers can express. The folder is made of the library's own modules: a `Router` that sends
texts and photos each through a tower, a pooling, a head and a normalisation. So the loading side
needs sentence-transformers 6 and Pillow, no crosstill, and no `trust_remote_code` (since its
version 6 the library imports a module class of anyone else's only with that flag, for local folders
too). A list to encode holds texts or photos (PIL images, paths, addresses), not both.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from crosstill import files
from crosstill.errors import ConfigError
from crosstill.export.base import Form, Options
from crosstill.export.card import Facts
from crosstill.export.gates import Parity, ReferenceModel, measure_parity
from crosstill.export.provenance import Provenance
from crosstill.pixels import Preprocess
from crosstill.progress import quiet
from crosstill.students.student import Student
from crosstill.towers import tower_parts
from crosstill.towers.tower_parts import describe, restore

_HEADS = {"image_head": "visual_projection", "text_head": "text_projection"}
_TOWERS = {"image_tower": "vision_model", "text_tower": "text_model"}
_ROW, _ROWS = "sentence_embedding", "token_embeddings"  # sentence-transformers: (B, W), (B, L, W)
_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


class LibraryFolder(Form):
    """A form whose folder another library loads; its rows are compared with the student's.

    Attributes:
        refusal: opens the reasons why a student does not fit, after its name.
        advice: ends them.
    """

    refusal: ClassVar[str]
    advice: ClassVar[str]

    def fits(self, student: Student) -> list[str]:
        """Return why a student cannot be exported in this form; nothing for one that can."""
        raise NotImplementedError

    def load(self, folder: Path) -> ReferenceModel:
        """Load a folder with the library alone."""
        raise NotImplementedError

    def save(self, student: Student, folder: Path) -> None:
        """Write a student that fits to an empty folder."""
        raise NotImplementedError

    def require(self, source: Provenance, options: Options) -> None:
        if reasons := self.fits(source.student):
            raise ConfigError(
                f"{source.student.name} is {self.refusal}: {'; '.join(reasons)}. {self.advice}"
            )

    def write(
        self, source: Provenance, folder: Path, facts: Facts, options: Options
    ) -> tuple[Facts, list[str]]:
        with quiet(), torch.random.fork_rng():
            self.save(source.student, folder)
        parity = self.check(source.student, folder)
        parity.require()
        return source.measured(facts), [str(parity)]

    def check(self, student: Student, folder: Path) -> Parity:
        """Load a folder with the library alone and compare its rows with the student's."""
        with quiet(), torch.random.fork_rng():
            return measure_parity(student, self.load(folder), self.name)


class TransformersFolder(LibraryFolder):
    """A folder that plain transformers loads."""

    name = "transformers"
    refusal = "no VisionTextDualEncoderModel"
    advice = "Export it as sentence-transformers or as onnx"
    loading = """\
Needs transformers 5, torch and Pillow; nothing of crosstill.

```python
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
texts = ["two dogs on snow", "a red car"]
with torch.inference_mode():
    image = model.get_image_features(**processor(images=photo, return_tensors="pt"))
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
    text = model.get_text_features(**tokens)
print(torch.cosine_similarity(image.pooler_output, text.pooler_output))
```

The features are not yet of unit length: compare them by cosine. `logit_scale` was not trained."""

    def fits(self, student: Student) -> list[str]:
        sides = {"image": student.config.image, "text": student.config.text}
        reasons = [
            f'its {side} tower is pooled by "{tower.pooling}", not by its pooler'
            for side, tower in sides.items()
            if tower.pooling != "pooler"
        ]
        if student.config.bias:
            reasons.append("its heads have a bias")
        if student.config.image.pooling == "pooler" and not pools_to_rows(student):
            kind = describe(student.image_tower.config)["model_type"]
            reasons.append(f"the pooler of a {kind} gives maps (B, W, 1, 1), not rows")
        for side in sides:
            width = getattr(student, f"{side}_head").in_features
            size = getattr(getattr(student, f"{side}_tower").config, "hidden_size", width)
            if size != width:
                reasons.append(
                    f"its {side} tower gives rows of {width} and says hidden_size={size}"
                )
        reasons += _unread(student.text_tower)
        return reasons + [f"it takes {what}" for what in hindrances(student.preprocess)]

    def load(self, folder: Path) -> ReferenceModel:
        return _DualEncoder(folder)

    def save(self, student: Student, folder: Path) -> None:
        vision, text = (restore(describe(getattr(student, name).config)) for name in _TOWERS)
        vision.hidden_size = student.image_head.in_features  # a CNN's configuration has none
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision, text, projection_dim=student.dim
        )
        model = transformers.VisionTextDualEncoderModel(config)
        model.load_state_dict({**_weights(student), "logit_scale": model.logit_scale.detach()})
        model.eval().save_pretrained(folder)
        transformers.VisionTextDualEncoderProcessor(
            image_processor(student.preprocess), fast_tokenizer(student)
        ).save_pretrained(folder)


class SentenceTransformersFolder(LibraryFolder):
    """A folder that sentence-transformers loads."""

    name = "sentence-transformers"
    task = "sentence-similarity"
    needs = ("sentence_transformers",)
    refusal = "not for sentence-transformers"
    advice = "Export it as onnx"
    loading = """\
Needs sentence-transformers 6 and Pillow; nothing of crosstill, and no `trust_remote_code`.

```python
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(FOLDER)
photos = model.encode([ImageOps.exif_transpose(Image.open("photo.jpg"))])
texts = model.encode(["two dogs on snow", "a red car"])
print(model.similarity(photos, texts))
```

Rows are of unit length. A list holds texts or photos (PIL images, paths, addresses), not both."""

    def fits(self, student: Student) -> list[str]:
        return [f"it takes {what}" for what in hindrances(student.preprocess)]

    def load(self, folder: Path) -> ReferenceModel:
        return _SentenceModel(folder)

    def save(self, student: Student, folder: Path) -> None:
        from sentence_transformers.sentence_transformer.modules import Router

        with files.scratch(folder, "towers") as towers:
            texts = _route(student, "text", fast_tokenizer(student), towers / "text")
            photos = _route(student, "image", image_processor(student.preprocess), towers / "image")
            router = Router({"text": texts, "image": photos}, default_route="text")
        model = import_module("sentence_transformers").SentenceTransformer(
            modules=[router], device="cpu", similarity_fn_name="cosine"
        )
        model.save(str(folder), create_model_card=False)
        for path in sorted(folder.glob("*_0_Transformer")):
            _leave_out_pooler(path, getattr(student, f"{path.name.split('_')[0]}_tower"))


class _DualEncoder:
    """The folder, as transformers loads it."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.VisionTextDualEncoderModel.from_pretrained(
            folder, local_files_only=True
        )
        self.model.eval()
        self.processor = transformers.VisionTextDualEncoderProcessor.from_pretrained(
            folder, local_files_only=True
        )

    def pixels(self, photos: Sequence[Image.Image]) -> Tensor:
        return self.processor(images=list(photos), return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def images(self, values: Tensor) -> Tensor:
        return functional.normalize(self.model.get_image_features(values).pooler_output, dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.processor(
            text=list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)


class _SentenceModel:
    """The folder, as sentence-transformers loads it."""

    def __init__(self, folder: Path) -> None:
        kind = import_module("sentence_transformers").SentenceTransformer
        self.model = kind(str(folder), device="cpu", local_files_only=True)

    def pixels(self, photos: Sequence[Image.Image]) -> Tensor:
        return self.model.preprocess(list(photos))["pixel_values"]

    @torch.inference_mode()
    def images(self, values: Tensor) -> Tensor:
        return self.model({"pixel_values": values, "modality": "image"})[_ROW]

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.model.encode(list(texts), show_progress_bar=False))


def _weights(student: Student) -> dict[str, Tensor]:
    """Return the student's weights under the class's own names."""
    return {
        f"{library_name}.{name}": value
        for part, library_name in {**_TOWERS, **_HEADS}.items()
        for name, value in tower_parts.with_whole_table(getattr(student, part)).state_dict().items()
    }


def _unread(tower: Any) -> list[str]:
    """Name the inputs that the class always passes, if only as None, and the tower lacks."""
    known = inspect.signature(tower.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return []
    missing = [name for name in ("position_ids", "token_type_ids") if name not in known]
    return [f"its text tower does not take {' and '.join(missing)}"] if missing else []


def _route(student: Student, side: str, reader: Any, beside: Path) -> list[Any]:
    """Build the library's modules of one tower: encoder, pooling, head and normalisation."""
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    head: nn.Linear = getattr(student, f"{side}_head")
    pooling = getattr(student.config, side).pooling
    tower = plain_tower(getattr(student, f"{side}_tower"))
    tower.save_pretrained(beside)
    reader.save_pretrained(beside)
    gives = "pooler_output" if pooling == "pooler" else "last_hidden_state"
    one = pooling == "pooler" and (side == "text" or pools_to_rows(student))
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


def hindrances(preprocess: Preprocess) -> list[str]:
    """Return why neither of transformers' two plain image processors can do this preprocess."""
    if preprocess.resize == "fit":
        return ['photos that keep their shape (preprocess "fit")']
    if preprocess.longer is not None or preprocess.multiple != 1:
        return ["photos whose longer side is bounded or rounded (preprocess longer, multiple)"]
    return []


def image_processor(preprocess: Preprocess) -> Any:
    """Build ViT's image processor for "squash", CLIP's for "crop"; for others see `hindrances`.

    It is saved under the name that transformers resolves with torchvision or without.
    """
    height, width = preprocess.size
    size = {"height": height, "width": width}
    common: dict[str, Any] = {
        "resample": _FILTERS[preprocess.interpolation],
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }
    if preprocess.resize == "squash":
        return transformers.ViTImageProcessorPil(size=size, **common)
    shorter = preprocess.shorter or max(preprocess.size)
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": shorter}, crop_size=size, **common
    )


def fast_tokenizer(student: Student) -> transformers.PreTrainedTokenizerFast:
    """Build the student's tokenizer, which truncates at its `max_length` when asked to."""
    tokenizer = student.tokenizer
    names = dict(tokenizer.special_tokens_map)
    # What fills a text up is masked, so any token will do where none was meant for it.
    names.setdefault("pad_token", tokenizer.eos_token or tokenizer.unk_token)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        model_max_length=student.config.max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **names,
    )


def plain_tower(module: nn.Module) -> Any:
    """Copy a tower for another library, since saving one writes into its configuration."""
    copy = tower_parts.with_whole_table(module)
    return copy.to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()


def pools_to_rows(student: Student) -> bool:
    """Tell whether the image tower's pooler gives rows (B, W), not maps (B, W, 1, 1) of a CNN."""
    black = torch.zeros(1, 3, *student.preprocess.size)
    with torch.inference_mode():
        return plain_tower(student.image_tower)(pixel_values=black).pooler_output.ndim == 2
