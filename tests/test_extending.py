"""A new attack, measure and inference method: each a patch of at most two files, and each appears in the main job's tables and figure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = 'Method(shaken.fit, shaken.Shaken, shaken.Config, "shaken", "#123456", "#654321")'
PATCHES = {
    "attack": {
        "attacks/corner.py": '''"""One jump into the corner of the ball that random signs name, by the loss alone."""

from offmanifold.attacks.gradient import Attack, Candidate
from offmanifold.image_noise import signs


def corner(seed: int) -> Attack:
    """Jump by epsilon along random signs."""
    return lambda loss, x, threat: Candidate(threat.project(x + threat.epsilon * signs(x, seed), x))
''',
        "attacks/__init__.py": [
            ("import re\n", "import re\n\nfrom offmanifold.attacks.corner import corner\n"),
            ('    "fgm":', '    "corner": lambda schedule: corner(schedule.seed),\n    "fgm":'),
        ],
    },
    "measure": {
        "uncertainty.py": [
            (
                "MEASURES: dict[str, Measure] = {\n",
                'def largest_doubt(log_probs: Tensor) -> Tensor:\n    """1 - max_c E_w p_c: (draws, batch, classes) -> (batch,)."""\n'
                "    return 1.0 - mean_log_probs(log_probs.double()).exp().amax(dim=-1)\n\n\n"
                'MEASURES: dict[str, Measure] = {\n    "largest_doubt": largest_doubt,\n',
            )
        ],
    },
    "method": {
        "inference/shaken.py": '''"""A network whose last bias is shaken: a draw adds Gaussian noise to it."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from offmanifold import models
from offmanifold.inference import deterministic, sgd
from offmanifold.predictive import ModulePredictive
from offmanifold.randomness import derive, generator


@dataclass(frozen=True)
class Config:
    """A network, how it is trained, and how much it is shaken."""

    network: models.Config = field(default_factory=models.Config)
    training: sgd.Config = field(default_factory=sgd.Config)
    scale: float = 1.0


@dataclass(frozen=True)
class Shaken:
    """Gaussian noise on the last bias."""

    module: nn.Module
    scale: float
    stream: int = 0

    @property
    def num_draws(self):
        return None

    def draw(self, num_draws, seed):
        name, bias = list(self.module.named_parameters())[-1]
        noise = torch.stack([torch.randn(bias.shape, generator=generator(self.stream, seed, draw)) for draw in range(num_draws)])
        return ModulePredictive(self.module, {name: bias.detach() + self.scale * noise.to(bias)})

    def split(self, seed):
        return tuple(replace(self, stream=derive(self.stream, seed, side)) for side in ("attacked", "evaluating"))


def fit(data, config, seed, device, progress):
    point = deterministic.fit(data, deterministic.Config(config.network, config.training), seed, device, progress)
    return Shaken(point.module.eval().requires_grad_(False), config.scale)
''',
        "inference/__init__.py": [
            ("from offmanifold.inference import concrete_dropout,", "from offmanifold.inference import shaken, concrete_dropout,"),
            ('    "swag": Method(', f'    "shaken": {ROW},\n    "swag": Method('),
        ],
    },
}
"""What is added -> file of the package -> its text, or (old, new) of each change."""

RUN = """
import sys
sys.path.insert(0, {tests!r})
from local import Local
from offmanifold import data
from offmanifold.experiments import ensemble_robustness as experiment, tasks
from offmanifold.experiments.ensemble_robustness import Config, Images
from offmanifold.inference import sgd
import offmanifold

assert offmanifold.__file__.startswith({root!r}), offmanifold.__file__
config = Config(
    images=Images(train_images=200, validation_images=50, test_images=10), training=sgd.Config(epochs=2),
    models=("deterministic", "shaken", "shaken_ensemble"), members=2, attacks=("corner", "fgm"), epsilons=(0.1,),
)
local = Local(data.load("digits"))
local.sweep("train", tasks.fit, experiment.members(config))
report = experiment.summarise(config, local.source, local.sweep("attack", tasks.evaluate, experiment.attacked(config)))
rows = report.tables["rows"]
assert set(rows["attack"]) == {{"corner", "fgm"}} and set(rows["model"]) == set(config.models), rows
assert rows["largest_doubt"].between(0, 1).all() and rows["zero_gradients"][rows["attack"] == "corner"].isna().all()
assert "shaken ensemble" in str(report) and "corner" in str(report)
legend = {{text.get_text() for text in report.figures["success_against_epsilon"].legends[0].get_texts()}}
assert {{"shaken", "shaken ensemble"}} < legend, legend
print("all three are there")
"""


@pytest.mark.parametrize("what", PATCHES)
def test_a_patch_touches_at_most_two_files_of_the_package(what):
    assert len(PATCHES[what]) <= 2


def test_one_of_each_appears_in_the_main_job_s_tables_and_figure(tmp_path):
    package = tmp_path / "offmanifold"
    shutil.copytree(ROOT / "platform" / "offmanifold", package, ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES.values():
        for name, change in patch.items():
            if isinstance(change, str):
                (package / name).write_text(change)
                continue
            text = (package / name).read_text()
            for old, new in change:
                assert text.count(old) == 1, (name, old)
                text = text.replace(old, new)
            (package / name).write_text(text)
    code = RUN.format(tests=str(ROOT / "tests"), root=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all three are there" in done.stdout
