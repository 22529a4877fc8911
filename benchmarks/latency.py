"""BEiT-3 against the `paper` student: milliseconds for an image and for a caption at 224 pixels.

Both have random weights, since speed does not depend on what they learnt, and get their inputs
ready: normalised pixels, token ids. On a CPU the teacher is base alone, and the times are CPU time
of one thread; on a GPU base, large and giant are in bfloat16, and the times are of the clock.

    python -m benchmarks.latency [--device cuda] [--batch 1 64]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from benchmarks.timing import medians
from crosstill.teachers.beit3 import SIZES, Network

TOKENS = 16  # of a caption
WIDTH = 768  # of the student's heads: as wide as the base teacher's
REPETITIONS = {"cpu": {1: 5}, "cuda": {1: 50}}  # of other batches 2 and 20


class PaperStudent(nn.Module):
    """The towers, pooling and biased heads of the preset `paper`, from their configurations."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = ViTModel(ViTConfig(), add_pooling_layer=False)
        self.text_tower = BertModel(BertConfig())
        self.image_head, self.text_head = nn.Linear(768, WIDTH), nn.Linear(768, WIDTH)

    def embed_image(self, values: Tensor) -> Tensor:
        """Normalised (B, 3, 224, 224) → (B, WIDTH), from the first token."""
        return self.image_head(self.image_tower(pixel_values=values).last_hidden_state[:, 0])

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask (B, L) → (B, WIDTH), from the pooler."""
        output = self.text_tower(input_ids=ids, attention_mask=mask)
        return self.text_head(output.pooler_output)


def models(device: torch.device) -> dict[str, Any]:
    """The student and the teachers that the device can time."""
    on_gpu = device.type == "cuda"
    kind = torch.bfloat16 if on_gpu else torch.float32
    makers: dict[str, Callable[[], nn.Module]] = {"student": PaperStudent}
    for size in ("base", "large", "giant") if on_gpu else ("base",):
        makers[f"BEiT-3 {size}"] = partial(Network, SIZES[size])
    made = {}
    for name, make in makers.items():
        with device:  # random numbers for two billion weights are quicker drawn there
            model = make()
        made[name] = model.to(device, kind).eval().requires_grad_(False)
    return made


def works(made: Mapping[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
    """What is timed: each model's image and caption side, (name, side) by a space."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    values = torch.randn(batch, 3, 224, 224, device=device, dtype=kind)
    ids = torch.randint(4, 30_000, (batch, TOKENS), device=device)
    mask = torch.ones_like(ids)
    found: dict[str, Callable[[], Tensor]] = {}
    for name, model in made.items():
        found[f"{name} image"] = partial(model.embed_image, values)
        found[f"{name} caption"] = partial(model.embed_text, ids, mask)
    return found


def clock_medians(works: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """As `timing.medians`, by the clock: a GPU's work is done when it is waited for."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions + 3):  # three rounds choose kernels and fill the allocator
        for name, work in works.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: median(seconds[3:]) for name, seconds in times.items()}


@torch.inference_mode()
def measure(device: torch.device, batches: list[int]) -> list[tuple[int, str, dict[str, float]]]:
    """Batch, model and its milliseconds an item: of an image, a caption and both."""
    made = models(device)
    rows = []
    for batch in batches:
        repetitions = REPETITIONS[device.type].get(batch, 20 if device.type == "cuda" else 2)
        timed = clock_medians if device.type == "cuda" else medians
        found = timed(works(made, batch, device), repetitions)
        for name in made:
            cost = {side: 1000 * found[f"{name} {side}"] / batch for side in ("image", "caption")}
            rows.append((batch, name, {**cost, "both": sum(cost.values())}))
    return rows


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(torch.device(given.device), given.batch)
    students = {batch: cost for batch, name, cost in rows if name == "student"}
    print("| batch | model | image, ms | caption, ms | both, ms | over the student |")
    print("|---|---|---|---|---|---|")
    for batch, name, cost in rows:
        cells = " | ".join(f"{cost[side]:.2f}" for side in ("image", "caption", "both"))
        ratio = cost["both"] / students[batch]["both"]
        print(f"| {batch} | {name} | {cells} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
