"""What the papers report, with its source: it stands beside our figures in every table and plot."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A figure of a paper."""

    value: float
    std: float | None
    """Standard deviation over the paper's repetitions, where it gives one."""
    source: str

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.std is None else f"{self.value:.2f} ± {self.std:.2f}"


GS_TABLE_4 = "Gal & Smith (2018), table 4"

ENSEMBLE_ROBUSTNESS: dict[tuple[str, str, float], Reported] = {
    ("dropout", "mim", 0.1): Reported(0.37, 0.02, GS_TABLE_4),
    ("dropout_ensemble", "mim", 0.1): Reported(0.26, 0.00, GS_TABLE_4),
    ("dropout", "mim", 0.175): Reported(0.91, 0.00, GS_TABLE_4),
    ("dropout_ensemble", "mim", 0.175): Reported(0.79, 0.02, GS_TABLE_4),
}
"""(model, attack, epsilon) -> success in changing the label on MNIST; 5 repetitions, 4 dropout networks an ensemble."""
