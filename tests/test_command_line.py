"""A config as a command line: presets, every field, one line for what is wrong."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.orchestration.command_line import parse

PRESETS = experiment.PRESETS


def test_without_a_preset_it_is_the_first_and_every_field_can_be_set():
    arguments = [
        "--epsilons",
        "0.1",
        "0.2",
        "--attacks",
        "fgm",
        "--gpus-per-trial",
        "0.5",
        "--epochs",
        "3",
        "--custom-resources",
        "big",
        "1",
    ]
    config, execution, preset = parse("doc", PRESETS, arguments)
    assert config == replace(PRESETS["quick"], epsilons=(0.1, 0.2), attacks=("fgm",), training=replace(PRESETS["quick"].training, epochs=3))
    assert execution.trial == {"CPU": 1, "GPU": 0.5, "big": 1}
    assert preset == "quick"
    assert parse("doc", PRESETS, ["laptop"])[0] == PRESETS["laptop"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["laptp"], "error: preset 'laptp' is unknown; there are: quick, laptop, paper (did you mean laptop?)"),
        (["--epsilons", "2"], "error: epsilon 2 is outside (0, 1]"),
        (["--members", "0"], "members must be at least 1, not 0"),
        (["--dataset", "cifar"], "dataset 'cifar' is unknown; there are: digits, mnist"),
        (["--attacks", "nought"], "attack 'nought' is unknown; there are: fgm, bim, pgd, mim"),
        (["--architecture", "resnet"], "invalid choice 'resnet' for argument '--architecture'. Expected one of ('lenet-20-50-500',"),
        (["--membrs", "3"], "Unrecognized options: --membrs, 3"),
        (["--members", "many"], "Error parsing --members: invalid literal for int()"),
        (["--step-size", "0.2", "--epsilons", "0.1"], "10 steps of 0.2 do not fit epsilon 0.1"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--tracking-patience", "-1"], "tracking_patience must be at least 0 minutes, not -1"),
        (["--gpus-per-trial", "1.5"], "gpus_per_trial must be a share of one GPU or whole GPUs, not 1.5"),
        (["--gpus-per-trial", "2", "--processes-per-trial", "3"], "with GPUs one for each: not 3 with gpus_per_trial 2"),
        (["--name", "../x"], "name '../x' must be of letters, digits"),
    ],
)
def test_a_bad_command_line_ends_with_code_2_and_one_line_that_says_what_is_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("doc", PRESETS, arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_help_names_every_field_its_unit_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("The question.", PRESETS, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("The question.", "Presets: quick, laptop, paper", "--epsilons", "in [0, 1] units", "--cpus-per-trial", "--judge-draws"):
        assert words in text


@pytest.mark.parametrize("job", sorted((Path(__file__).parents[1] / "jobs").glob("*.py")), ids=lambda job: job.stem)
def test_no_two_fields_of_a_job_have_one_name(job):
    presets = runpy.run_path(str(job), run_name="looked at")["experiment"].PRESETS
    for preset, config in presets.items():
        field, value = ("seed", 7) if hasattr(config, "seed") else ("shard_files", 7)
        assert parse("doc", presets, [preset, f"--{field.replace('_', '-')}", "7"])[0] == replace(config, **{field: value})
