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


GS_TABLE_1 = "Gal & Smith (2018), table 1"
GS_TABLE_3 = "Gal & Smith (2018), table 3"
GS_TABLE_4 = "Gal & Smith (2018), table 4"

ENSEMBLE_ROBUSTNESS: dict[tuple[str, str, float], Reported] = {
    ("dropout", "mim", 0.1): Reported(0.37, 0.02, GS_TABLE_4),
    ("dropout_ensemble", "mim", 0.1): Reported(0.26, 0.00, GS_TABLE_4),
    ("dropout", "mim", 0.175): Reported(0.91, 0.00, GS_TABLE_4),
    ("dropout_ensemble", "mim", 0.175): Reported(0.79, 0.02, GS_TABLE_4),
}
"""(model, attack, epsilon) -> success in changing the label on MNIST; 5 repetitions, 4 dropout networks an ensemble."""

HMC_ROBUSTNESS: dict[tuple[str, float], dict[str, Reported]] = {
    (model, epsilon): {name: Reported(value, std, GS_TABLE_1) for name, (value, std) in columns.items()}
    for model, epsilon, columns in (
        ("hmc", 0.1, {"wrong": (0.14, 0.03), "noise_wrong": (0.10, 0.01), "entropy": (0.47, 0.00), "noise_entropy": (0.33, 0.00)}),
        ("hmc", 0.2, {"wrong": (0.32, 0.02), "noise_wrong": (0.23, 0.01), "entropy": (0.59, 0.02), "noise_entropy": (0.53, 0.01)}),
        ("deterministic", 0.1, {"wrong": (0.52, 0.0), "noise_wrong": (0.03, 0.001), "entropy": (0.45, 0.0), "noise_entropy": (0.06, 0.0)}),
        ("deterministic", 0.2, {"wrong": (0.97, 0.0), "noise_wrong": (0.03, 0.002), "entropy": (0.03, 0.0), "noise_entropy": (0.08, 0.0)}),
    )
}
"""(model, epsilon) -> MIM, untargeted, on Manifold MNIST, one fresh draw a step: success in changing the true label by the attack and by
noise of the same size; mean predictive entropy (nats) of the images. 5 repetitions."""

GARBAGE: dict[str, Reported] = {
    "latent search": Reported(0.76, None, GS_TABLE_3),
    "fgm": Reported(0.60, None, GS_TABLE_3),
}
"""Attack -> share of garbage images that a dropout LeNet on MNIST is sure of (p > 0.9), of 15 images; untargeted FGM."""
