"""Fusion models that run in microseconds, and pictures that cost nothing to decode."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from crosstill import students
from crosstill.data import Pairs
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.meter import CoAttention, Meter, Parts, Shape
from crosstill.images import Preprocess, Quarantine
from crosstill.towers import vocabulary
from crosstill.types import Example, States, image_id
from support import small_config

WIDTH = 12


def pictures(images: int = 12, captions: int = 3) -> Pairs:
    """Images of one colour each, with captions of different lengths, all of them unique."""
    draw = np.random.default_rng(7)
    words = np.array(["red", "blue", "cube", "ball", "left", "of", "a", "two"])
    made, files = [], {}
    for row in range(images):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        texts = []
        for number in range(captions):
            said = " ".join(draw.choice(words, draw.integers(1, 9)))
            which = row * captions + number
            texts.append(f"{said} {'qxzjvkwpgy'[which % 10] * (1 + which // 10)}")
        files[f"{row}.png"] = file.getvalue()
        key = image_id(file.getvalue())
        made.append(Example(key, f"{row}.png", tuple(texts), "test"))
    source = {"form": "memory"}
    return Pairs("pictures", tuple(made), Quarantine(), source, lambda e: files[e.path])


class SmallJudge(Matcher):
    """Colour cells and words, a bilinear form of their means, and small perceptrons."""

    family = "small"

    def __init__(self, weights: int = 0, size: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        self.name, self.source, self.licence = "judge", None, None
        self.preprocess, self.max_length = Preprocess(size=size), 16
        captions = [text for e in pictures().examples for text in e.captions]
        self.tokenizer = vocabulary.train(captions, 120)
        with torch.random.fork_rng():
            torch.manual_seed(weights)
            self.eye = nn.Linear(3, WIDTH)
            self.ear = nn.Embedding(len(self.tokenizer), WIDTH)
            self.types = nn.Embedding(2, WIDTH)
            self.bilinear = nn.Bilinear(WIDTH, WIDTH, 1)
            self.stack = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(2))
        self.seen = self.words = self.pairs = 0  # how often each was computed
        self.eval()

    def encode_images(self, pixels):
        self.seen += len(pixels)
        cells = nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 4).flatten(2)
        tokens = self.eye(cells.transpose(1, 2))
        return States(tokens, torch.ones(tokens.shape[:2], dtype=torch.int64))

    def encode_texts(self, tokens):
        self.words += len(tokens.hidden)
        return States(self.ear(tokens.hidden), tokens.mask)

    def project(self, states, side):
        return States(states.hidden + self.types.weight[int(side == "text")], states.mask)

    def score_states(self, images, texts):
        self.pairs += len(images.hidden)
        image, text = (
            (side.hidden * side.mask[..., None]).sum(1) / side.mask.sum(1, keepdim=True)
            for side in (images, texts)
        )
        both = torch.cat([image, text], dim=1)
        for layer in self.stack:
            both = both + layer(both).relu()
        return 5 * self.bilinear(image, text)[:, 0] + both.sum(1)

    def towers(self):
        return [self.eye, self.ear]

    @property
    def depth(self):
        return len(self.stack)

    def keep_layers(self, layers):
        self.stack = nn.ModuleList(self.stack[layer] for layer in layers)

    def save(self, folder):
        raise NotImplementedError


class TableJudge(SmallJudge):
    """Gives the scores of an (I, T) table, whatever the pixels and words are."""

    def __init__(self, pairs: Pairs, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.text_rows = {text: row for row, text in enumerate(texts_of(pairs))}
        order = [pairs.read(example) for example in pairs.examples]
        self.image_rows = {self._key(data): row for row, data in enumerate(order)}

    def _key(self, data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).numpy().tobytes()

    def image_states(self, pixels):
        return self._rows([self.image_rows[image.numpy().tobytes()] for image in pixels])

    def text_states(self, texts):
        return self._rows([self.text_rows[text] for text in texts])

    def _rows(self, rows):
        return States(torch.tensor(rows)[:, None], torch.ones(len(rows), 1, dtype=torch.int64))

    def score_states(self, images, texts):
        return self.table[images.hidden[:, 0], texts.hidden[:, 0]]


def texts_of(pairs: Pairs) -> list[str]:
    return [text for example in pairs.examples for text in example.captions]


def small_meter(folder: Path, texts: list[str], layers: int = 2) -> Path:
    """METER's stack on a ViT and a BERT of one layer, written to a folder."""
    towers = students.build(small_config(dropout=0.0), dim=8, captions=texts)
    parts = Parts(
        towers.image_tower, towers.text_tower, towers.preprocess, towers.tokenizer, max_length=30
    )
    shape = Shape(layers=layers, width=16, heads=2, mlp=16, image_width=16, text_width=16)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Meter(parts, CoAttention(shape), "meter")
        for parameter in model.fusion.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save(folder)
    return folder
