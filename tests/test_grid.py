"""Grids of cells, and what a larger one adds to a smaller."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest

from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.experiments.tasks import Evaluate, Fit
from offmanifold.grid import listed, product
from offmanifold.result import recipe_key


@dataclass(frozen=True)
class Point:
    a: int
    b: str
    c: float = 0.0


def test_a_product_is_every_combination_the_last_axis_fastest():
    cells = product(Point, {"a": range(2), "b": ("x", "y")}, c=0.5)
    assert cells == [Point(0, "x", 0.5), Point(0, "y", 0.5), Point(1, "x", 0.5), Point(1, "y", 0.5)]


def test_a_list_is_its_points_in_their_order():
    assert listed(Point, [{"a": 3, "b": "x"}, {"a": 1, "b": "y", "c": 2.0}]) == [Point(3, "x"), Point(1, "y", 2.0)]


def test_an_axis_without_values_is_named():
    with pytest.raises(ValueError, match="axis 'b' of the grid has no values"):
        product(Point, {"a": range(2), "b": ()})


def test_one_more_member_is_one_more_network_of_each_kind_and_attacks_of_the_ensembles_alone():
    def keys(config):
        cells = [*experiment.members(config), *experiment.attacked(config)]
        return {recipe_key(cell, "data"): cell for cell in cells}

    small = experiment.Config(members=2, epsilons=(0.1, 0.2))
    before, after = keys(small), keys(replace(small, members=3))
    added = [cell for key, cell in after.items() if key not in before]
    assert Counter(type(cell).__name__ for cell in added) == {"Fit": 2, "Evaluate": 4}
    assert {cell.index for cell in added if isinstance(cell, Fit)} == {2}
    assert {cell.model for cell in added if isinstance(cell, Evaluate)} == {"dropout_ensemble", "deterministic_ensemble"}
    assert set(experiment.members(small)) <= set(experiment.members(replace(small, members=3)))
