"""The cells of a sweep: every combination of some fields' values, or a list of them."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

SomeCell = TypeVar("SomeCell")


def product(make: Callable[..., SomeCell], axes: Mapping[str, Iterable[Any]], **common: Any) -> list[SomeCell]:
    """A cell for every combination of the axes' values, the last fastest: ``product(Attacked, {"epsilon": (0.1, 0.2)}, attack="mim")``.

    ``ValueError`` for an axis without values: there would be no cell at all.
    """
    values = {name: list(axis) for name, axis in axes.items()}
    if empty := [name for name, axis in values.items() if not axis]:
        raise ValueError(f"axis {empty[0]!r} of the grid has no values")
    return listed(make, (dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())), **common)


def listed(make: Callable[..., SomeCell], points: Iterable[Mapping[str, Any]], **common: Any) -> list[SomeCell]:
    """A cell for every point, in their order: ``listed(Attacked, [{"attack": "fgm", "epsilon": 0.2}, ...], seed=0)``."""
    return [make(**common, **point) for point in points]
