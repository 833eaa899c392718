"""Posteriors on disk: what comes back is what was saved, and what is damaged or of another architecture is refused in one line."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import offmanifold as om
from offmanifold import models
from offmanifold.data import DataError
from offmanifold.faults import ModelError


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def own(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3)).eval()


def draws(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [own(seed).state_dict() for seed in range(count)]


POSTERIORS = {
    "point": lambda: om.point(own()),
    "mc_dropout": lambda: om.mc_dropout(own()),
    "ensemble": lambda: om.ensemble([own(0), own(1), own(2)]),
    "dropout ensemble": lambda: om.ensemble([om.mc_dropout(own(0)), om.mc_dropout(own(1))]),
    "weight_samples": lambda: om.weight_samples(own(), draws(), chains=2),
    "half of a dropout network": lambda: om.mc_dropout(own()).split(3)[0],
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_user_s_own_module_comes_back_with_an_untrained_one(name, x, storage):
    posterior = POSTERIORS[name]()
    om.save(posterior, storage.where("posterior"))
    untrained = own(99)
    before = {key: value.clone() for key, value in untrained.state_dict().items()}
    loaded = om.load(storage.where("posterior"), module=untrained)
    assert_close(loaded.draw(4, 1).log_probs(x), posterior.draw(4, 1).log_probs(x))
    assert all(torch.equal(value, before[key]) for key, value in untrained.state_dict().items())
    assert loaded.num_draws == posterior.num_draws


def test_members_of_different_architectures_are_given_as_a_list(x, tmp_path):
    posterior = om.ensemble([own(0), own(1, width=9)])
    om.save(posterior, tmp_path)
    loaded = om.load(tmp_path, module=[own(5), own(6, width=9)])
    assert_close(loaded.draw(2, 0).log_probs(x), posterior.draw(2, 0).log_probs(x))
    with pytest.raises(ModelError, match=r"Sequential is of another architecture than the saved Sequential \(of another shape: 1.bias is"):
        om.load(tmp_path, module=[own(5), own(6)])
    with pytest.raises(ModelError, match=r"give load an untrained one as module=..., or a list of them, one for each member"):
        om.load(tmp_path, module=[own(5)])
    with pytest.raises(ModelError, match="which is none of this package's networks"):
        om.load(tmp_path)


@pytest.mark.parametrize("architecture", models.MODELS)
def test_networks_of_this_package_are_built_again_from_the_file(architecture, tmp_path):
    module = models.build(models.Config(architecture), (3, 32, 32), 4, seed=0).eval()
    posterior = om.mc_dropout(module)
    om.save(posterior, tmp_path)
    x = torch.rand(3, 3, 32, 32)
    assert_close(om.load(tmp_path).draw(3, 0).log_probs(x), posterior.draw(3, 0).log_probs(x))


def test_files_are_safetensors_and_json_with_a_hash_and_nothing_half_written(tmp_path):
    om.save(POSTERIORS["weight_samples"](), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["posterior.json", "posterior.safetensors"]
    about = json.loads((tmp_path / "posterior.json").read_text())
    assert about["format"] == 1
    assert len(about["sha256"]) == 64
    assert about["posterior"]["kind"] == "WeightSamples"


def test_a_damaged_file_is_refused(tmp_path):
    om.save(POSTERIORS["mc_dropout"](), tmp_path)
    tensors, about = tmp_path / "posterior.safetensors", tmp_path / "posterior.json"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(DataError, match=r"posterior.safetensors or posterior.json is not what was written: the hash differs"):
        om.load(tmp_path, own())
    about.write_text("{")
    with pytest.raises(DataError, match=r"posterior.json is not what om.save writes"):
        om.load(tmp_path, own())
    about.write_text(json.dumps({"format": 99, "offmanifold": "9.0", "sha256": "", "posterior": {}}))
    with pytest.raises(DataError, match=r"later version|hash differs"):
        om.load(tmp_path, own())
    with pytest.raises(DataError, match="nowhere holds no posterior that can be read"):
        om.load(tmp_path / "nowhere")


def test_a_posterior_of_somebody_else_is_refused_before_anything_is_written(tmp_path):
    class Mine:
        num_draws = 1

    with pytest.raises(ModelError, match="Mine cannot be saved: it is no posterior of this package"):
        om.save(Mine(), tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("states", "chains", "words"),
    [
        (
            [own(0, width=7).state_dict()],
            1,
            r"draw 0 is of another network than Sequential \(of another shape: 1.bias is \(7,\), not \(6,\)",
        ),
        ([{"9.weight": torch.zeros(2)}], 1, "draw 0 is of another network .*unknown: 9.weight"),
        (draws(3), 2, r"3 draws cannot be divided evenly among 2 chain\(s\)"),
        ([], 1, "0 draws cannot be divided"),
        ([draws(1)[0], {"1.weight": torch.zeros(6, 64)}], 1, "draw 1 has other names than draw 0: 1.bias, 4.bias, 4.weight"),
        ([{"4.bias": torch.tensor([0.0, torch.nan, 0.0])}], 1, "the draws of '4.bias' are not finite"),
    ],
)
def test_stored_draws_that_do_not_fit_are_refused(states, chains, words):
    with pytest.raises(ModelError, match=words) as error:
        om.weight_samples(own(), states, chains)
    assert "\n" not in str(error.value)


def test_draws_are_arrays_or_tensors_of_all_weights_or_some(x):
    module, states = own(), draws()
    arrays = [{name: value.numpy().astype(np.float64) for name, value in state.items()} for state in states]
    whole = om.weight_samples(module, states, chains=2)
    assert_close(om.weight_samples(module, arrays, chains=2).draw(4, 0).log_probs(x), whole.draw(4, 0).log_probs(x))
    wanted = torch.stack([torch.log_softmax(own(seed)(x), -1) for seed in range(4)])
    assert_close(whole.draw(4, 0).log_probs(x), wanted)
    head = om.weight_samples(module, [{name: state[name] for name in ("4.weight", "4.bias")} for state in states])
    assert head.draw(4, 0).log_probs(x).shape == (4, 5, 3)
    attacked, evaluating = whole.split(0)
    assert attacked.num_draws == evaluating.num_draws == 2


def test_double_precision_is_kept(x, tmp_path):
    for module in (own().double(), models.build(models.Config("resnet-8"), (1, 8, 8), 3, seed=0).double().eval()):
        posterior = om.mc_dropout(module)
        om.save(posterior, tmp_path)
        loaded = om.load(tmp_path, own() if models.origin(module) is None else None)
        assert_close(loaded.draw(3, 0).log_probs(x.double()), posterior.draw(3, 0).log_probs(x.double()), atol=0, rtol=0)


def test_an_edited_description_and_modules_too_many_are_refused(tmp_path):
    om.save(POSTERIORS["mc_dropout"](), tmp_path)
    with pytest.raises(ModelError, match="2 modules were given, more than the saved posterior has"):
        om.load(tmp_path, [own(), own()])
    about = tmp_path / "posterior.json"
    entry = json.loads(about.read_text())
    entry["posterior"]["fields"]["stream"] = {"value": 7}
    about.write_text(json.dumps(entry))
    with pytest.raises(DataError, match="the hash differs"):
        om.load(tmp_path, own())


def test_a_module_with_other_dropout_rates_and_a_class_are_refused(tmp_path):
    om.save(POSTERIORS["mc_dropout"](), tmp_path)
    other = own()
    other[3].p = 0.9
    with pytest.raises(ModelError, match=r"the dropout rates of Sequential are \{'3': 0.9\}, those of the saved posterior \{'3': 0.5\}"):
        om.load(tmp_path, other)
    with pytest.raises(TypeError, match="module must be a torch module or a list of them, not <class"):
        om.load(tmp_path, nn.Sequential)
