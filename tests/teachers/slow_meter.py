"""METER's forward pass, one pair at a time, in plain loops over released parameter names.

Written from the facts of the released checkpoints alone; shares no code with crosstill or
transformers, so that the two can be compared.
"""

import math

import torch
from torch import Tensor

HEAD = 64
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class SlowMeter:
    """Everything in float64.

    `layers` are the co-attention layers to run; `prefix` is "stu_" for DCD's student.
    """

    def __init__(self, state: dict[str, Tensor], layers: list[int], prefix: str = "") -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.layers, self.prefix = layers, prefix

    def score(self, pixels: Tensor, ids: list[int], mask: list[int]) -> float:
        """One uint8 (3, S, S) image with one padded text."""
        text = self.linear("cross_modal_text_transform", self.read(ids, mask))
        image = self.linear("cross_modal_image_transform", self.look(pixels))
        types = self.state["token_type_embeddings.weight"]
        text, image = text + types[0], image + types[1]
        image_mask = [1] * len(image)
        for layer in self.layers:
            before = text, image
            names = [f"{self.prefix}cross_modal_{side}_layers.{layer}." for side in SIDES]
            text = self.cross(names[0], before[0], mask, before[1], image_mask)
            image = self.cross(names[1], before[1], image_mask, before[0], mask)
        pooled = [
            torch.tanh(self.linear(f"{self.prefix}cross_modal_{side}_pooler.dense", tokens[:1]))
            for side, tokens in zip(SIDES, (text, image), strict=True)
        ]
        return float(self.linear(f"{self.prefix}rank_output", torch.cat(pooled, dim=1)))

    def look(self, pixels: Tensor) -> Tensor:
        """Normalised, cut into patches, through CLIP's blocks: (1 + patches, W)."""
        name = "vit_model.visual."
        kernel = self.state[f"{name}conv1.weight"]
        side = kernel.shape[-1]
        rows = [self.state[f"{name}class_embedding"]]
        colours = torch.stack([(pixels[c].double() / 255 - MEAN[c]) / STD[c] for c in range(3)])
        for top in range(0, pixels.shape[1], side):
            for left in range(0, pixels.shape[2], side):
                patch = colours[:, top : top + side, left : left + side]
                rows.append(torch.stack([(patch * one).sum() for one in kernel]))
        x = torch.stack(rows) + self.state[f"{name}positional_embedding"]
        x = self.norm(f"{name}ln_pre", x, 1e-5)
        for layer in range(self.count(f"{name}transformer.resblocks.")):
            block = f"{name}transformer.resblocks.{layer}."
            seen = self.norm(f"{block}ln_1", x, 1e-5)
            weights = self.state[f"{block}attn.in_proj_weight"].chunk(3)
            biases = self.state[f"{block}attn.in_proj_bias"].chunk(3)
            q, k, v = (seen @ w.T + b for w, b in zip(weights, biases, strict=True))
            x = x + self.linear(f"{block}attn.out_proj", attend(q, k, v, [1] * len(x)))
            hidden = self.linear(f"{block}mlp.c_fc", self.norm(f"{block}ln_2", x, 1e-5))
            x = x + self.linear(f"{block}mlp.c_proj", hidden / (1 + torch.exp(-1.702 * hidden)))
        return self.norm(f"{name}ln_post", x, 1e-5)

    def read(self, ids: list[int], mask: list[int]) -> Tensor:
        """RoBERTa: (L, W)."""
        name = "text_transformer.embeddings."
        words = self.state[f"{name}word_embeddings.weight"]
        places = self.state[f"{name}position_embeddings.weight"]
        kind = self.state[f"{name}token_type_embeddings.weight"][0]
        rows, count = [], 0
        for token in ids:
            count += token != 1
            rows.append(words[token] + places[1 if token == 1 else 1 + count] + kind)
        x = self.norm(f"{name}LayerNorm", torch.stack(rows), 1e-5)
        for layer in range(self.count("text_transformer.encoder.layer.")):
            block = f"text_transformer.encoder.layer.{layer}."
            x = self.look_at(f"{block}attention.", x, x, mask, 1e-5)
            x = self.perceptron(block, x, 1e-5)
        return x

    def cross(
        self, name: str, own: Tensor, own_mask: list[int], other: Tensor, other_mask: list[int]
    ) -> Tensor:
        x = self.look_at(f"{name}attention.", own, own, own_mask, 1e-12)
        x = self.look_at(f"{name}crossattention.", x, other, other_mask, 1e-12)
        return self.perceptron(name, x, 1e-12)

    def look_at(self, name: str, own: Tensor, other: Tensor, mask: list[int], eps: float) -> Tensor:
        q = self.linear(f"{name}self.query", own)
        k, v = (self.linear(f"{name}self.{part}", other) for part in ("key", "value"))
        seen = self.linear(f"{name}output.dense", attend(q, k, v, mask))
        return self.norm(f"{name}output.LayerNorm", seen + own, eps)

    def perceptron(self, name: str, x: Tensor, eps: float) -> Tensor:
        hidden = self.linear(f"{name}intermediate.dense", x)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return self.norm(
            f"{name}output.LayerNorm", self.linear(f"{name}output.dense", hidden) + x, eps
        )

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        rows = []
        for row in x:
            middle = row.sum() / len(row)
            spread = ((row - middle) ** 2).sum() / len(row)
            rows.append((row - middle) / torch.sqrt(spread + eps))
        return torch.stack(rows) * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def count(self, prefix: str) -> int:
        return len({n[len(prefix) :].split(".")[0] for n in self.state if n.startswith(prefix)})


SIDES = ("text", "image")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: list[int]) -> Tensor:
    """One head and one query after the other, with an explicit softmax."""
    out = torch.zeros_like(q)
    for start in range(0, q.shape[1], HEAD):
        head = slice(start, start + HEAD)
        for row in range(len(q)):
            scores = [
                float(q[row, head] @ k[column, head]) / math.sqrt(HEAD) - 10_000 * (1 - seen)
                for column, seen in enumerate(mask)
            ]
            top = max(scores)
            parts = [math.exp(score - top) for score in scores]
            for column, part in enumerate(parts):
                out[row, head] += part / sum(parts) * v[column, head]
    return out
