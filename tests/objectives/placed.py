"""A batch of numbers placed by hand, for references that loop over them."""

import torch

from crosstill.types import Features

IDS = [4, 7, 4, 9]
IMAGE_S = [[0.6, 0.8], [1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]
TEXT_S = [[0.8, 0.6], [0.28, 0.96], [-0.6, 0.8], [0.0, 1.0]]
IMAGE_T = [[0.8, -0.6], [0.0, 1.0], [0.8, -0.6], [-0.28, 0.96]]
TEXT_T = [[1.0, 0.0], [0.6, 0.8], [0.96, -0.28], [-0.8, 0.6]]


def features(image: list[list[float]], text: list[list[float]]) -> Features:
    return Features(*(torch.tensor(x, dtype=torch.float64) for x in (image, text)))
