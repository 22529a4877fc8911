"""Fusion models of transformers, and the opening of any fusion model's folder.

ViLT         Kim et al., arXiv 2102.03334: one transformer over word and patch embeddings
BLIP         Li et al., arXiv 2201.12086: a text encoder that looks at the image in every layer
BridgeTower  Xu et al., arXiv 2206.08657: bridges from the towers' last layers into fusion
METER        a folder of ours, see `crosstill.fusion.meter`
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from crosstill import files
from crosstill.data.pairs import read_licence
from crosstill.errors import ConfigError, ModelError
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.meter import RECORD, Meter
from crosstill.images import normalise
from crosstill.progress import quiet
from crosstill.teachers.dual import TYPES, image_outputs, text_outputs, text_positions
from crosstill.towers import hub, processors
from crosstill.towers.processors import check_size
from crosstill.towers.tower_parts import additive
from crosstill.types import States

# what stands beside config and weights: the tokenizer and the image processor, as they came
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
)


class Pretrained(Matcher):
    """A fusion model of transformers.

    Args:
        folder: of config, safetensors, tokenizer and image processor.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError: the folder lacks one of those parts, or they do not fit each other.
    """

    architecture: Any  # the class of transformers

    def __init__(self, folder: Path, name: str, device: torch.device | None = None) -> None:
        super().__init__()
        config = hub.read_config(folder)
        if config.model_type != self.family:
            raise ModelError(f"{folder}: a {config.model_type} model; {self.family} is needed here")
        self.name, self.source = name, str(folder.absolute())
        # The cheap parts first, so that a folder that lacks one says so at once.
        self.tokenizer = hub.read_tokenizer(folder)
        self.preprocess = processors.read_preprocess(folder)
        self.licence = read_licence(folder)
        if hasattr(config, "vision_config"):
            check_size(folder, self.preprocess, config.vision_config.image_size)
        present = (folder / file for file in _BESIDE)
        self._beside = {path.name: path.read_bytes() for path in present if path.is_file()}
        self.model = hub.read_model(folder, config, kind=self.architecture)
        self.max_length = int(min(self.tokenizer.model_max_length, self.positions))
        self.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()

    @property
    @abstractmethod
    def positions(self) -> int:
        """The longest text that it has positions for, in tokens."""

    def save(self, folder: Path) -> None:
        """Write a folder that plain transformers loads too.

        Raises:
            InputError: the folder cannot be written to.
        """
        files.writable_folder(folder)
        beside = dict(self._beside)
        if self.licence:
            beside["README.md"] = f"---\nlicense: {self.licence}\n---\n\n# {self.name}\n".encode()
        for name, data in beside.items():
            files.write_bytes(folder / name, data)
        size = sum(value.nbytes for value in self.model.state_dict().values())
        with files.writing(folder, size), files.scratch(folder, "model") as new:
            with quiet():
                self.model.save_pretrained(new)
            # the config comes last: a folder with one is complete
            for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
                files.write_atomic(folder / path.name, path.rename)


class Vilt(Pretrained):
    """`ViltForImageAndTextRetrieval`; its towers are its embeddings, all else is fusion.

    Every patch of an image is kept, in order, whatever `max_image_length` says: transformers
    draws patches at random, in random order, and attention does not care about order.
    """

    family = "vilt"
    architecture = transformers.ViltForImageAndTextRetrieval

    def encode_images(self, pixels: Tensor) -> States:
        parts = self.model.vilt.embeddings
        patches = parts.patch_embeddings(normalise(pixels, self.preprocess))  # (B, W, h, w)
        first, grid = parts.position_embeddings.split([1, parts.patch_embeddings.num_patches], 1)
        side = self.model.config.image_size // self.model.config.patch_size
        square = grid.transpose(1, 2).unflatten(2, (side, side))
        places = functional.interpolate(
            square, size=patches.shape[2:], mode="bilinear", align_corners=True
        )
        tokens = (patches + places).flatten(2).transpose(1, 2)
        whole = torch.cat([(parts.cls_token + first).expand(len(tokens), -1, -1), tokens], dim=1)
        hidden = parts.dropout(whole) + parts.token_type_embeddings.weight[1]
        return States(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.int64))

    def encode_texts(self, tokens: States) -> States:
        parts = self.model.vilt.embeddings
        hidden = parts.text_embeddings(input_ids=tokens.hidden)
        return States(hidden + parts.token_type_embeddings.weight[0], tokens.mask)

    def score_states(self, images: States, texts: States) -> Tensor:
        vilt = self.model.vilt
        hidden = torch.cat([texts.hidden, images.hidden], dim=1)
        mask = additive(torch.cat([texts.mask, images.mask], dim=1))
        hidden = vilt.encoder(hidden, attention_mask=mask).last_hidden_state
        pooled = vilt.pooler(vilt.layernorm(hidden[:, :1]))
        return self.model.rank_output(pooled).squeeze(1)

    def towers(self) -> list[nn.Module]:
        return [self.model.vilt.embeddings]

    @property
    def depth(self) -> int:
        return len(self.model.vilt.encoder.layer)

    def keep_layers(self, layers: Sequence[int]) -> None:
        encoder = self.model.vilt.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        self.model.config.num_hidden_layers = len(layers)

    @property
    def positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @property
    def activation(self) -> str:
        return str(self.model.config.hidden_act)


class Blip(Pretrained):
    """`BlipForImageTextRetrieval` with its matching head.

    The vision model is its one tower: the text encoder is the fusion part, so of a text only the
    token ids are kept. The head has two classes; the score is the log-odds of "match", the
    difference of its logits, of which a sigmoid gives the probability. The text begins with the
    tokenizer's own first token, as transformers has it (the authors' code puts [ENC] there).
    """

    family = "blip"
    head = "itm_head"
    architecture = transformers.BlipForImageTextRetrieval

    def __init__(self, folder: Path, name: str, device: torch.device | None = None) -> None:
        super().__init__(folder, name, device)
        # of the dual heads, which are kept for saving only, no score comes
        self.model.vision_proj.requires_grad_(False)
        self.model.text_proj.requires_grad_(False)

    def encode_images(self, pixels: Tensor) -> States:
        values = normalise(pixels, self.preprocess)
        hidden = self.model.vision_model(pixel_values=values).last_hidden_state
        return States(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.int64))

    def encode_texts(self, tokens: States) -> States:
        return tokens

    def score_states(self, images: States, texts: States) -> Tensor:
        output = self.model.text_encoder(
            input_ids=texts.hidden,
            attention_mask=texts.mask,
            encoder_hidden_states=images.hidden,
            encoder_attention_mask=images.mask,
        )
        return log_odds(self.model.itm_head(output.last_hidden_state[:, 0]))

    def towers(self) -> list[nn.Module]:
        return [self.model.vision_model]

    @property
    def depth(self) -> int:
        return len(self.model.text_encoder.encoder.layer)

    def keep_layers(self, layers: Sequence[int]) -> None:
        encoder = self.model.text_encoder.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        self.model.config.text_config.num_hidden_layers = len(layers)

    @property
    def positions(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def activation(self) -> str:
        config = self.model.config
        return f"{config.vision_config.hidden_act}/{config.text_config.hidden_act}"


class BridgeTower(Pretrained):
    """`BridgeTowerForImageAndTextRetrieval` with its matching head.

    The towers do not look at each other. Fusion layer k of S reads, through its bridge, the k-th
    of the last S outputs of either tower: S stages of every token are kept, (B, L, S, W). The
    score is the log-odds of "match", of which a sigmoid gives the probability.
    """

    family = "bridgetower"
    head = "itm_score"
    architecture = transformers.BridgeTowerForImageAndTextRetrieval

    def encode_images(self, pixels: Tensor) -> States:
        values = normalise(pixels, self.preprocess)
        hidden = image_outputs(self.model.bridgetower, values, self.depth)
        return States(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.int64))

    def encode_texts(self, tokens: States) -> States:
        return States(text_outputs(self.model.bridgetower, *tokens, self.depth), tokens.mask)

    def project(self, states: States, side: str) -> States:
        core = self.model.bridgetower
        # the towers' states of a deeper model, from which this one was cut, have more stages
        hidden = states.hidden[:, :, -self.depth :]
        transform = getattr(core, f"cross_modal_{side}_transform")
        if isinstance(transform, nn.ModuleList):
            pairs = zip(transform, hidden.unbind(2), strict=True)
            hidden = torch.stack([layer(stage) for layer, stage in pairs], dim=2)
        else:
            hidden = transform(hidden)
        hidden = hidden + core.token_type_embeddings.weight[TYPES[side]]
        first = getattr(core, f"cross_modal_{side}_layernorm")(hidden[:, :, :1])
        return States(torch.cat([first, hidden[:, :, 1:]], dim=2), states.mask)

    def score_states(self, images: States, texts: States) -> Tensor:
        core, mask = self.model.bridgetower, additive(texts.mask)
        image, text = images.hidden[:, :, 0], texts.hidden[:, :, 0]
        for k in range(self.depth):
            if k:
                bridges = core.cross_modal_image_link_tower, core.cross_modal_text_link_tower
                image = bridges[0][k - 1](images.hidden[:, :, k], image, None)
                text = bridges[1][k - 1](texts.hidden[:, :, k], text, None)
            # each stream reads what the other was before this layer
            layers = core.cross_modal_image_layers[k], core.cross_modal_text_layers[k]
            image, text = (
                layers[0](image, text, encoder_attention_mask=mask)[0],
                layers[1](text, image, attention_mask=mask)[0],
            )
        return log_odds(self.model.itm_score(core.get_cls_features(text, image)))

    def towers(self) -> list[nn.Module]:
        return [self.model.bridgetower.vision_model, self.model.bridgetower.text_model]

    @property
    def depth(self) -> int:
        return len(self.model.bridgetower.cross_modal_text_layers)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Keep these with the bridges into them; the first needs none.

        n layers read the towers' last n outputs, as transformers numbers them, so that a layer
        may read a later one than it was trained on.

        Raises:
            ConfigError: layer 0, into which no bridge leads, does not come first.
        """
        if 0 in layers[1:]:
            raise ConfigError(
                f"layers = {list(layers)}: no bridge leads into layer 0 of {self.name}; put it "
                "first, or leave it out"
            )
        core = self.model.bridgetower
        for side in TYPES:
            _select(core, f"cross_modal_{side}_layers", layers)
            _select(core, f"cross_modal_{side}_transform", layers)
            _select(core, f"cross_modal_{side}_link_tower", [layer - 1 for layer in layers[1:]])
        self.model.config.num_hidden_layers = len(layers)

    @property
    def positions(self) -> int:
        return text_positions(self.model.config)

    @property
    def activation(self) -> str:
        return f"quick_gelu/{self.model.config.text_config.hidden_act}"


def log_odds(logits: Tensor) -> Tensor:
    """Return the one logit of class 1 that softmax over two classes amounts to: (P, 2) → (P,)."""
    return logits[:, 1] - logits[:, 0]


def _select(core: Any, name: str, rows: Sequence[int]) -> None:
    """Keep some of a list of modules; what is no list is shared by all layers and stays."""
    modules = getattr(core, name)
    if isinstance(modules, nn.ModuleList):
        setattr(core, name, nn.ModuleList(modules[row] for row in rows))


FAMILIES: dict[str, type[Pretrained]] = {
    "ViltForImageAndTextRetrieval": Vilt,
    "BlipForImageTextRetrieval": Blip,
    "BridgeTowerForImageAndTextRetrieval": BridgeTower,
}


def find(folder: Path) -> type[Matcher] | None:
    """Return the class of the fusion model in a folder; None for any other folder."""
    if (folder / RECORD).is_file():
        return Meter
    return next((FAMILIES[name] for name in hub.architectures(folder) if name in FAMILIES), None)


def holds(folder: Path) -> bool:
    """Tell whether a folder holds a fusion model, or a run that trained one."""
    return find(folder) is not None or find(folder / "best") is not None


def load(folder: Path, name: str, device: torch.device | None = None) -> Matcher:
    """Load the fusion model of a folder, or the best one of a run.

    Args:
        folder: one that `holds` a fusion model.
        name: what to call it in tables; a folder of ours knows its own.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError, CorruptError: it does not load.
    """
    if find(folder / "best"):
        folder, name = folder / "best", folder.absolute().name
    elif name in ("best", "student"):  # as every run calls them
        name = folder.absolute().parent.name
    if (folder / RECORD).is_file():
        return Meter.load(folder, device)
    family = next(FAMILIES[known] for known in hub.architectures(folder) if known in FAMILIES)
    return family(folder, name, device)
