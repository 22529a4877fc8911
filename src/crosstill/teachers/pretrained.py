"""What the fusion models of transformers share: they are read from a folder, and written to one."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstill import files
from crosstill.data.pairs import read_licence
from crosstill.errors import ModelError
from crosstill.progress import quiet
from crosstill.teachers.matcher import Matcher
from crosstill.towers import hub, processors
from crosstill.towers.processors import check_size

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

    kind: Any  # the class of transformers

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
        self.model = hub.read_model(folder, config, kind=self.kind)
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


def log_odds(logits: Tensor) -> Tensor:
    """The one logit that softmax over two classes amounts to: (P, 2) → (P,), for class 1."""
    return logits[:, 1] - logits[:, 0]
