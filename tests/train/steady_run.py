"""One short run without dropout, by as many processes as torchrun starts: cache, run folder.

Rank 0 leaves the gradient of the first step in gradient.safetensors.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent))

from crosstill.cache import Cache  # noqa: E402
from crosstill.train import TrainConfig, train  # noqa: E402
from support import SETTINGS, small_student  # noqa: E402


def run(cache: Cache, out: Path, changes: list[str]) -> None:
    """Train, keeping the first gradient; alone, or as one of torchrun's processes."""
    step = torch.optim.AdamW.step

    def noting(self, *args):
        path = out / "gradient.safetensors"
        if os.environ.get("RANK", "0") == "0" and not path.exists():
            learnt = self.param_groups[0]["params"]
            save_file({str(i): p.grad.clone().contiguous() for i, p in enumerate(learnt)}, path)
        return step(self, *args)

    config = TrainConfig(**SETTINGS).changed(["epochs=1", *changes])
    with mock.patch.object(torch.optim.AdamW, "step", noting):
        train(small_student(cache, dropout=0.0), cache, config, out)


if __name__ == "__main__":
    run(Cache(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
