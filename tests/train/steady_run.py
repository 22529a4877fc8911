"""One short run without dropout: cache, run folder and changes.

By as many processes as torchrun starts, or as FORKS says: then they are forked, under what
torchrun would tell them, and share one process's imports. Rank 0 leaves the gradient of the first
step in gradient.safetensors.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import pyarrow
import torch
import transformers.models.bert.modeling_bert
import transformers.models.vit.modeling_vit  # noqa: F401
from safetensors.torch import save_file
from torch.distributed import TCPStore

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

    config = TrainConfig(**SETTINGS).changed(["epochs=1", "steps_per_epoch=4", *changes])
    with mock.patch.object(torch.optim.AdamW, "step", noting):
        train(small_student(cache, dropout=0.0), cache, config, out)


def forked(processes: int) -> None:
    """Return in each of so many children; the parent ends with the worst of their exit codes."""
    pyarrow.array([1])  # imports pandas, where there is one, as the models above: once for all
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    for rank in range(processes):
        if not os.fork():
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(processes)]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    if "FORKS" in os.environ:
        forked(int(os.environ["FORKS"]))
    run(Cache(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
