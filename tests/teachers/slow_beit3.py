"""BEiT-3's forward pass for retrieval, one image or text at a time, in plain loops.

Written from the facts of the released checkpoints alone; shares no code with crosstill, so that
the two can be compared.
"""

import math

import torch
from torch import Tensor


class SlowBeit3:
    """Everything in float64, under the released parameter names."""

    def __init__(self, state: dict[str, Tensor], heads: int) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.heads = heads

    def image(self, pixels: Tensor) -> Tensor:
        """uint8 (3, S, S) → a row of length 1."""
        kernel = self.state["beit3.vision_embed.proj.weight"]
        bias = self.state["beit3.vision_embed.proj.bias"]
        side = kernel.shape[-1]
        rows = [self.state["beit3.vision_embed.cls_token"][0, 0]]
        colours = (pixels.double() / 255 - 0.5) / 0.5
        for top in range(0, pixels.shape[1], side):
            for left in range(0, pixels.shape[2], side):
                patch = colours[:, top : top + side, left : left + side]
                rows.append(
                    torch.stack([(patch * k).sum() + b for k, b in zip(kernel, bias, strict=True)])
                )
        return self.encode(rows, [0] * len(rows), "A", "vision_head")

    def text(self, ids: list[int], padding: list[int]) -> Tensor:
        """Ids, and 1 where one is padding, → a row of length 1."""
        words = self.state["beit3.text_embed.weight"]
        return self.encode([words[one] for one in ids], padding, "B", "language_head")

    def encode(self, rows: list[Tensor], padding: list[int], way: str, head: str) -> Tensor:
        places = self.state[f"beit3.encoder.embed_positions.{way}.weight"]
        x = torch.stack(
            [
                (row + places[2 + i]) * (1 - empty)
                for i, (row, empty) in enumerate(zip(rows, padding, strict=True))
            ]
        )
        layers = {name.split(".")[3] for name in self.state if ".layers." in name}
        for layer in range(len(layers)):
            name = f"beit3.encoder.layers.{layer}."
            seen = self.norm(f"{name}self_attn_layer_norm.{way}", x)
            x = x + self.attend(f"{name}self_attn.", way, seen, padding)
            hidden = self.linear(
                f"{name}ffn.{way}.fc1", self.norm(f"{name}final_layer_norm.{way}", x)
            )
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            hidden = self.norm(f"{name}ffn.{way}.ffn_layernorm", hidden)
            x = x + self.linear(f"{name}ffn.{way}.fc2", hidden)
        first = self.norm(f"beit3.encoder.layer_norm.{way}", x)[0]
        row = self.state[f"{head}.weight"] @ first
        return row / math.sqrt(float((row**2).sum()))

    def attend(self, name: str, way: str, x: Tensor, padding: list[int]) -> Tensor:
        """One head and one query after the other, with an explicit softmax."""
        q, k, v = (self.linear(f"{name}{part}_proj.{way}", x) for part in "qkv")
        out = torch.zeros_like(q)
        width = q.shape[1] // self.heads
        for start in range(0, q.shape[1], width):
            head = slice(start, start + width)
            for row in range(len(q)):
                parts = [
                    0.0 if empty else math.exp(float(q[row, head] @ key) / math.sqrt(width))
                    for key, empty in zip(k[:, head], padding, strict=True)
                ]
                for column, part in enumerate(parts):
                    out[row, head] += part / sum(parts) * v[column, head]
        return self.linear(f"{name}out_proj.{way}", self.norm(f"{name}inner_attn_ln.{way}", out))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            middle = row.sum() / len(row)
            spread = ((row - middle) ** 2).sum() / len(row)
            rows.append((row - middle) / torch.sqrt(spread + 1e-5))
        return torch.stack(rows) * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]
