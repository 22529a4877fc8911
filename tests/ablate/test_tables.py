import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel, ViTConfig, ViTModel

from crosstill import balance, objectives, recipes, students
from crosstill.ablate import tables
from crosstill.errors import ConfigError
from crosstill.train import TrainConfig


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_has_distinct_rows_and_its_reference(name):
    what = tables.design(name)
    names = [row.name for row in what.rows]
    assert len(set(names)) == len(names) > 1
    assert what.reference in names
    settings = [
        (recipes.config(row.recipe, row.changes).model_dump_json(exclude={"recipe"}), row.student)
        for row in what.rows
    ]
    assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_reference_is_the_recipe_as_it_is(name):
    what = tables.design(name)
    (row,) = [row for row in what.rows if row.name == what.reference]
    own = recipes.RECIPES[row.recipe]()
    assert row.recipe == {"table2": "recommended", "dcd": "dcd"}.get(name, "dsmd")
    settings = recipes.config(row.recipe, row.changes)
    assert spelt_out(settings) == spelt_out(own)


def spelt_out(settings: TrainConfig) -> dict:
    losses = {name: objectives.spelt_out(name, o) for name, o in settings.losses.items()}
    rule = balance.spelt_out(settings.balance["name"], settings.balance)
    return {**settings.model_dump(), "losses": losses, "balance": rule}


def test_table9_varies_the_margin_whatever_the_recipe_has():
    margins = [
        recipes.config(row.recipe, row.changes).losses["hard_negative"]["margin"]
        for row in tables.table9().rows
    ]
    assert margins == [0.0, 0.05, 0.2, 0.5, 1.0]


def test_towers_of_two_families_are_of_one_size():
    """The sizes of the pretrained towers, built without weights."""
    with torch.device("meta"):
        sizes = {
            "google/vit-base-patch16-224-in21k": ViTModel(ViTConfig(), add_pooling_layer=False),
            "facebook/convnext-base-224-22k": ConvNextModel(
                ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024])
            ),
        }
    one, other = tables.towers().rows[:2]
    counts = []
    for row in (one, other):
        described = students.load_config(row.student)
        assert described.text.source == "google-bert/bert-base-uncased"
        counts.append(sum(p.numel() for p in sizes[described.image.source].parameters()))
    assert counts[1] / counts[0] == pytest.approx(1, abs=0.03)


def test_table4_is_every_combination():
    rows = tables.table4().rows
    chosen = [frozenset(recipes.config(row.recipe, row.changes).losses) for row in rows]
    assert len(set(chosen)) == 15
    assert all(c <= set(tables.LOSSES.values()) for c in chosen)
    assert {row.name: row.paper for row in rows}["CD + SD + HND"] == 492.9


def test_recipes_differ_in_what_the_method_is_and_in_nothing_else():
    base = recipes.dsmd().model_dump()
    for name, recipe in recipes.RECIPES.items():
        values = recipe().model_dump()
        assert values["recipe"] == name
        if name.endswith("_released") or name in ("flickr30k", "coco", "recommended"):
            continue  # whole settings
        own = {"recipe", "losses", "balance"}
        assert {k: v for k, v in values.items() if k not in own} == {
            k: v for k, v in base.items() if k not in own
        }


def test_unknown_table_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no table named 'table44'; did you mean 'table4'\?"):
        tables.design("table44")
