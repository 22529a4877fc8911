import torch

from crosstill import objectives
from crosstill.types import Features

E1, E2 = torch.eye(4, dtype=torch.float64)[:2]


def test_two_axes_in_four_dimensions():
    # |e1 - e2| sums to 2 over 4 numbers: 0.5 for images; captions agree
    loss = objectives.build("feature")
    value = loss(Features(E1[None], E1[None]), Features(E2[None], E1[None]), torch.tensor([0]))
    torch.testing.assert_close(value, torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_mean_over_rows_and_sum_of_modalities():
    student = torch.tensor([[3.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)  # differ by 2, 1, 0, 1
    loss = objectives.build("feature")
    value = loss(Features(student, student), Features(teacher, teacher), torch.arange(2))
    torch.testing.assert_close(value, torch.tensor(2.0, dtype=torch.float64), rtol=0, atol=1e-9)
