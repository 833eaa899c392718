"""What an experiment has to say when all its cells are done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure


class Metric(NamedTuple):
    """One point of a curve to compare runs by."""

    name: str
    value: float
    step: int = 0
    """Where on the curve: for epsilons, ten-thousandths of a pixel's range."""


@dataclass(frozen=True)
class Report:
    """Tables, figures and a conclusion; whoever runs the experiment prints, stores and tracks them."""

    shown: Mapping[str, pd.DataFrame]
    """Title -> a table of text, ready to print, the paper's figures beside ours."""
    notes: Sequence[str]
    """What the tables' columns mean."""
    conclusion: Sequence[str]
    """Sentences that the numbers decide."""
    tables: Mapping[str, pd.DataFrame]
    """In full, for parquet; the figures are drawn from them."""
    figures: Mapping[str, Figure]
    metrics: Sequence[Metric]
    headline: Mapping[str, float]
    """The few figures of a run that stand in a list of runs."""
    columns: Sequence[str]
    """Fields of the config (dotted) that stand beside them."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> text of other files that the run leaves."""

    def __str__(self) -> str:
        tables = [f"{title}\n\n{table.to_string(index=False)}\n" for title, table in self.shown.items()]
        return "\n".join([*tables, *self.notes, "", *self.conclusion])
