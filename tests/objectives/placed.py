"""A batch of numbers placed by hand, for references that loop over them; a count of operations."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosstill.types import Features

IDS = [4, 7, 4, 9]
IMAGE_S = [[0.6, 0.8], [1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]
TEXT_S = [[0.8, 0.6], [0.28, 0.96], [-0.6, 0.8], [0.0, 1.0]]
IMAGE_T = [[0.8, -0.6], [0.0, 1.0], [0.8, -0.6], [-0.28, 0.96]]
TEXT_T = [[1.0, 0.0], [0.6, 0.8], [0.96, -0.28], [-0.8, 0.6]]


def features(image: list[list[float]], text: list[list[float]]) -> Features:
    return Features(*(torch.tensor(x, dtype=torch.float64) for x in (image, text)))


class Operations(TorchDispatchMode):
    """Count the operations of a block, and the elements of their largest result."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.count += 1
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return result
