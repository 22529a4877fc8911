import pytest

from crosstill import recipes
from crosstill.ablate import tables
from crosstill.errors import ConfigError


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
    own = recipes.dcd() if what.lists else recipes.dsmd()
    assert recipes.config(row.recipe, row.changes) == own


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
        own = {"recipe", "losses", "balance"}
        assert {k: v for k, v in values.items() if k not in own} == {
            k: v for k, v in base.items() if k not in own
        }


def test_unknown_table_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no table named 'table44'; did you mean 'table4'\?"):
        tables.design("table44")
