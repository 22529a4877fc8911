import pytest
import torch

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.types import Features


def refusal(name, **options):
    with pytest.raises(ConfigError) as caught:
        objectives.build(name, **{"dim": 4, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_are_those_of_the_files():
    assert {"contrastive", "feature", "similarity", "hard_negative", "info_nce"} <= set(
        objectives.known()
    )
    assert not {"base", "parts", "wrappers"} & set(objectives.known())


def test_every_name_builds_an_objective():
    for name in objectives.known():
        assert isinstance(objectives.build(name, dim=4, keys=torch.arange(3)), objectives.Objective)


def test_unknown_loss_names_the_likely_one():
    assert "did you mean 'contrastive'" in refusal("contrastve")


@pytest.mark.parametrize("name", ["base", "parts", "", "../errors", "wrappers", "parts.memory"])
def test_only_losses_can_be_built(name):
    assert refusal(name).startswith(f"no loss named {name!r}")


def test_unknown_option_names_loss_option_and_signature():
    message = refusal("contrastive", temprature=1.0)
    assert message.startswith("loss 'contrastive' has no option 'temprature'")
    assert "did you mean 'temperature'" in message
    assert "queue_size = 8192" in message


PLAIN = """
from crosstill.objectives.base import Objective


class Plain(Objective):
    pass
"""


def test_a_loss_without_options_says_so(tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text(PLAIN)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    assert refusal("plain", x=1) == "loss 'plain' has no option 'x'; it has none, remove it"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("contrastive", "temperature", 0.0),
        ("contrastive", "temperature", float("nan")),
        ("contrastive", "temperature", float("inf")),
        ("contrastive", "temperature", "hot"),
        ("contrastive", "queue_size", 0),
        ("contrastive", "queue_size", 1.5),
        ("contrastive", "mask_same_image", "maybe"),
        ("info_nce", "temperature", -1.0),
        ("hard_negative", "margin", -0.1),
        ("hard_negative", "margin", float("nan")),
        ("hard_negative", "negatives", "some"),
    ],
)
def test_impossible_value_names_loss_and_option(name, option, value):
    message = refusal(name, **{option: value})
    assert f"loss {name!r}" in message
    assert option in message


def test_a_missing_width_is_asked_for():
    assert refusal("contrastive", dim=None) == "loss 'contrastive' needs the option 'dim'; set it"


STRANGER = '''"""Squared distance between the embeddings."""

from __future__ import annotations

from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.types import Features


class Squared(Objective):
    """Mean squared difference, images plus captions, times a factor."""

    def __init__(self, *, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        image, text = ((s - t.detach()).square().mean() for s, t in zip(student, teacher))
        return self.factor * (image + text)
'''


def test_a_new_file_is_a_new_loss(tmp_path, monkeypatch):
    (tmp_path / "squared.py").write_text(STRANGER)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    assert "squared" in objectives.known()
    loss = objectives.build("squared", dim=2, seed=3, factor=2.0)
    ones = torch.ones(1, 2)
    value = loss(Features(ones, ones), Features(0 * ones, ones), torch.tensor([0]))
    assert value == 2
    assert "did you mean 'factor'" in refusal("squared", facto=1.0)
