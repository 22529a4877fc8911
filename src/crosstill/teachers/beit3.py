"""BEiT-3 as a teacher: a dual encoder read from a folder that `crosstill inspect --out` wrote.

beit3.json           format, name, sizes; seals itself and holds the SHA-256 of the others
model.safetensors    the weights in float32, under their released names
beit3.spm            the tokenizer
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosstill import artefacts, files
from crosstill.data.pairs import read_licence
from crosstill.errors import CorruptError
from crosstill.images import Preprocess, normalise
from crosstill.teachers.base import TwoTowers, tensors_digest
from crosstill.teachers.beit3_network import Network, Shape
from crosstill.teachers.beit3_tokenizer import Tokenizer
from crosstill.towers.saved import WEIGHTS, Saved

RECORD, PIECES = "beit3.json", "beit3.spm"
LENGTH = 64  # ids of a caption in the released retrieval settings
_FORMAT = 1


class Beit3(TwoTowers):
    """A frozen BEiT-3; see `Teacher` for what it offers.

    Args:
        network: the model, in float32.
        pieces: the bytes of its SentencePiece model.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.
        origin: where the pieces came from, for messages.

    Raises:
        ConfigError: sentencepiece is not installed.
        ModelError: the pieces are no SentencePiece model, or another model's.
    """

    family = "beit3"

    def __init__(
        self,
        network: Network,
        pieces: bytes,
        name: str,
        device: torch.device | None = None,
        origin: str = PIECES,
    ) -> None:
        shape = network.shape
        self.name, self.dim = name, shape.width
        self.source: str | None = None
        self.licence: str | None = None
        self.max_length = min(LENGTH, shape.places - 2)
        self.tokenizer = Tokenizer(pieces, origin, shape.words, self.max_length)
        self.preprocess = Preprocess(size=(shape.image_size, shape.image_size))
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.requires_grad_(False).to(self.device).eval()

    def _identify(self) -> dict[str, str]:
        pieces = hashlib.sha256(self.tokenizer.data).hexdigest()
        return {
            "weights": tensors_digest(self.network.state_dict()),
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json({"pieces": pieces, "length": self.max_length}),
            "activation": "gelu",
            "family": self.family,
        }

    def parameter_count(self) -> int:
        return self.network.parameters_by_part()["total"]

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model can read."""
        return self.tokenizer.count_truncated(texts)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.network.embed_image(normalise(pixels, self.preprocess))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        ids, mask = self.tokenizer(texts)
        return self.network.embed_text(ids.to(self.device), mask.to(self.device))

    def save(self, folder: Path) -> None:
        """Write the folder; its record comes last: a folder with one is complete.

        Raises:
            InputError: the folder cannot be written to.
        """
        files.writable_folder(folder)
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        size = sum(value.nbytes for value in state.values())
        files.write_atomic(folder / WEIGHTS, lambda path: save_file(state, path), size)
        files.write_bytes(folder / PIECES, self.tokenizer.data)
        record = {
            "format": _FORMAT,
            "name": self.name,
            "shape": self.network.shape.to_json(),
            "files": artefacts.digests(folder, [WEIGHTS, PIECES]),
        }
        files.write_json(folder / RECORD, files.sealed(record))


def holds(folder: Path) -> bool:
    """Whether a folder is one that `Beit3.save` wrote."""
    return (folder / RECORD).is_file()


def load(folder: Path, name: str = "", device: torch.device | None = None) -> Beit3:
    """Read what `Beit3.save` wrote; the licence is that of a README.md beside it.

    Args:
        folder: one that `holds` a BEiT-3.
        name: not used: the folder knows the model's own.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        CorruptError: one of its files was damaged; it is named.
    """
    record = artefacts.read(folder / RECORD, Saved, {_FORMAT}).model_dump()
    artefacts.check_files(folder, {WEIGHTS: "", PIECES: "", **record["files"]})
    with torch.device("meta"):
        network = Network(Shape(**record["shape"]))
    try:
        network.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (SafetensorError, RuntimeError) as error:
        line = " ".join(str(error).split())[:160]
        raise CorruptError(f"{folder / WEIGHTS}: not the weights of this model ({line})") from None
    pieces = (folder / PIECES).read_bytes()
    model = Beit3(network, pieces, record["name"], device, str(folder / PIECES))
    model.source, model.licence = str(folder.absolute()), read_licence(folder)
    return model
