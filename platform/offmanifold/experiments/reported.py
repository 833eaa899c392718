"""What the papers report, with its source: it stands beside our figures in every table and plot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


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
GS_TABLE_2 = "Gal & Smith (2018), table 2"
GS_TABLE_3 = "Gal & Smith (2018), table 3"
GS_TABLE_4 = "Gal & Smith (2018), table 4"
SG_TABLE_1 = "Smith & Gal (2018), table 1"

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

ENSEMBLE_DETECTION: dict[tuple[str, str], Reported] = {
    ("single", "all"): Reported(0.63, None, GS_TABLE_2),
    ("single", "successful"): Reported(0.61, None, GS_TABLE_2),
    ("ensemble", "all"): Reported(0.77, None, GS_TABLE_2),
    ("ensemble", "successful"): Reported(0.74, None, GS_TABLE_2),
}
"""(model, images that count) -> AUC of mutual information as a detector of attacked images. VGG13 with Concrete dropout on cats and dogs,
one model and an ensemble of five; epsilon 0.2 in L-infinity, by MIM (the table's caption) or by FGM (the text)."""

_SG_1 = {
    # (attack, epsilon): deterministic: entropy, entropy (S), success; MC: entropy, MI, entropy (S), MI (S), success
    ("bim", 5.0): ((0.322, 0.293, 0.757), (0.0712, 0.728, 0.0617, 0.733, 0.900)),
    ("fgm", 5.0): ((0.439, 0.490, 0.517), (0.426, 0.557, 0.465, 0.497, 0.563)),
    ("mim", 5.0): ((0.347, 0.319, 0.743), (0.0476, 0.657, 0.0410, 0.669, 0.917)),
    ("bim", 10.0): ((0.302, 0.285, 0.753), (0.0686, 0.708, 0.0719, 0.723, 0.917)),
    ("fgm", 10.0): ((0.502, 0.550, 0.487), (0.480, 0.529, 0.514, 0.491, 0.547)),
    ("mim", 10.0): ((0.350, 0.319, 0.763), (0.0527, 0.661, 0.0442, 0.665, 0.907)),
}
_SG_1_COLUMNS = {
    "deterministic": (("predictive_entropy", "all"), ("predictive_entropy", "successful"), ("success", "all")),
    "mc": (
        ("predictive_entropy", "all"),
        ("mutual_information", "all"),
        ("predictive_entropy", "successful"),
        ("mutual_information", "successful"),
        ("success", "all"),
    ),
}
DetectionReports: TypeAlias = Mapping[tuple[str, str, float, str, str], Reported]
DETECTION: DetectionReports = {
    (model, attack, epsilon, *column): Reported(value, None, SG_TABLE_1)
    for (attack, epsilon), of_models in _SG_1.items()
    for model, values in zip(_SG_1_COLUMNS, of_models, strict=True)
    for column, value in zip(_SG_1_COLUMNS[model], values, strict=True)
}
"""(model, attack, epsilon of 255, measure, images that count) -> AUC as a detector of attacked images; measure "success": share of changed
labels. A pretrained ResNet with a dropout head on cats and dogs, 20 draws."""
