"""What a computation is (a cell) and what it gives (a result): all that orchestration needs to know of science."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray


class Cell(Protocol):
    """One thing to compute: a frozen dataclass whose fields, and the data, decide the result."""

    RECIPE_VERSION: ClassVar[int]
    """Raised when the code that makes it would make another result of the same fields."""

    @property
    def name(self) -> str:
        """What a person calls it; unique in its stage."""

    @property
    def inputs(self) -> Sequence["Cell"]:
        """The cells whose results are needed; they are fields too, so that a change in them is a change in this one."""


SomeCell = TypeVar("SomeCell", bound=Cell)


@dataclass(frozen=True)
class Result:
    """What a cell gives."""

    table: pd.DataFrame
    """Tidy: a row a measurement, fixed column names."""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Weights, or what figures are drawn from."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The figures to compare runs by."""


def recipe(cell: Cell, fingerprint: str) -> dict[str, Any]:
    """All that decides a cell's result: its kind, version, fields, inputs and the data's fingerprint."""
    return {"kind": type(cell).__name__, "cell": _plain(cell), "data": fingerprint}


def recipe_key(cell: Cell, fingerprint: str) -> str:
    """A hash of the recipe: equal for equal computations, on the laptop and in the bucket alike."""
    text = json.dumps(recipe(cell, fingerprint), sort_keys=True)
    return f"{type(cell).__name__.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        version = getattr(value, "RECIPE_VERSION", None)
        return fields if version is None else {**fields, "recipe_version": version}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value
