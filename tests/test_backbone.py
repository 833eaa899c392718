"""Frozen networks: features that know their weights' place, heads on top of them, and one run of the network for all draws."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet50

from offmanifold.attacks import ATTACKS, Linf, Schedule, misclassify
from offmanifold.inference import sgd, transfer
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import backbone
from offmanifold.models.backbone import BACKBONES, EDGES, BackboneError
from offmanifold.predictive import mean_log_probs
from offmanifold.randomness import seeded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lite() -> dict[str, np.ndarray]:
    """Weights of an untrained EfficientNet-lite0, batch norm with statistics of its own, as a checkpoint has them."""
    with seeded(3, CPU):
        state = BACKBONES["efficientnet_lite0"].build().state_dict()
        for name, value in state.items():
            if name.endswith("running_mean"):
                value.normal_()
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
    return {name: value.numpy() for name, value in state.items()}


@pytest.fixture(scope="module")
def edges() -> dict[str, np.ndarray]:
    return backbone.read_weights(EDGES, "", "nowhere")


def network(arrays: dict, name: str = EDGES, classes: int = 2) -> nn.Sequential:
    frozen = backbone.build(name, arrays)
    width = frozen(torch.rand(1, 3, 64, 64)).shape[1]
    return transfer.on_top(frozen, transfer.build(transfer.Config(), width, classes, seed=1))


# features


@pytest.mark.parametrize("name", ["efficientnet_lite0", EDGES])
def test_a_network_is_frozen_whatever_it_is_told_and_an_image_never_sees_its_batch(name, lite, edges, pictures):
    frozen = backbone.build(name, lite if name != EDGES else edges)
    frozen.train()
    assert not any(module.training for module in frozen.modules())
    assert not any(weight.requires_grad for weight in frozen.parameters())
    together = frozen(pictures)
    assert_close(together[[2]], frozen(pictures[[2]]), rtol=1e-4, atol=1e-4)
    assert_close(frozen(pictures.flip(0)).flip(0), together, rtol=1e-4, atol=1e-4)


def test_images_are_normalised_inside_as_the_weights_expect(lite, pictures):
    import timm

    plain = timm.create_model("efficientnet_lite0", bn_eps=1e-3, num_classes=0).eval()
    plain.load_state_dict({name: torch.from_numpy(value) for name, value in lite.items()})
    with torch.no_grad():
        wanted = plain((pictures * 255 - 127) / 128)
        assert_close(backbone.build("efficientnet_lite0", lite)(pictures), wanted, rtol=1e-4, atol=1e-4)


def test_resnet50_is_torchvisions_without_its_classes(tmp_path, pictures):
    with seeded(1, CPU):
        whole = resnet50().eval()
    torch.save(whole.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    arrays = backbone.read_weights("resnet50", str(tmp_path / "resnet50-0676ba61.pth"), tmp_path)
    assert not any(name.startswith("fc.") for name in arrays)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbone.IMAGENET)
    with torch.no_grad():
        features = backbone.build("resnet50", arrays)(pictures[:2])
        assert features.shape == (2, 2048)
        assert_close(whole.fc(features), whole((pictures[:2] - mean) / std), rtol=1e-3, atol=1e-3)


def test_any_model_of_timm_can_be_named(tmp_path):
    known = backbone.architecture("timm:mobilenetv3_small_050")
    assert (known.classifier, known.file) == ("classifier", "mobilenetv3_small_050.safetensors")
    assert known.mean == backbone.IMAGENET[0]
    assert known.url.endswith("/resolve/main/model.safetensors")
    save_file({**known.build().state_dict(), "classifier.weight": torch.zeros(1000, 8)}, tmp_path / "w.safetensors")
    arrays = backbone.read_weights("timm:mobilenetv3_small_050", str(tmp_path / "w.safetensors"), tmp_path)
    assert backbone.build("timm:mobilenetv3_small_050", arrays)(torch.rand(1, 3, 64, 64)).ndim == 2


def test_the_fingerprint_is_of_every_weight(edges):
    other = {name: value.copy() for name, value in edges.items()}
    assert backbone.fingerprint(other) == backbone.fingerprint(edges)
    next(iter(other.values())).flat[5] += 1e-6
    assert backbone.fingerprint(other) != backbone.fingerprint(edges)


def test_building_a_network_draws_no_random_number_of_others(edges):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    backbone.build(EDGES, edges)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: None, "there is no such file"),
        (lambda file: file.write_bytes(b"not weights"), "cannot be read"),
        (lambda file: save_file({"conv_stem.weight": torch.zeros(2)}, file), r"are not those of efficientnet_lite0 \(missing: blocks.0.0"),
        (lambda file: save_file(resnet50().state_dict(), file), r"missing: .* and \d+ more; unknown: conv1.weight"),
    ],
    ids=["missing", "no weights", "few", "of another architecture"],
)
def test_weights_that_are_not_the_networks_are_refused(write, words, tmp_path):
    file = tmp_path / "weights.safetensors"
    write(file)
    with pytest.raises(BackboneError, match=words):
        backbone.read_weights("efficientnet_lite0", str(file), tmp_path)


def test_a_weight_of_another_shape_is_named(lite, tmp_path):
    state = {name: torch.from_numpy(value) for name, value in lite.items()}
    save_file({**state, "conv_stem.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"of another shape: conv_stem.weight is \(8, 3, 3, 3\), not \(32, 3, 3, 3\)"):
        backbone.read_weights("efficientnet_lite0", str(tmp_path / "w.safetensors"), tmp_path)


def test_a_pickle_of_other_things_than_tensors_is_not_opened(tmp_path):
    torch.save({"run": partial(print, "me")}, tmp_path / "w.pth")
    (tmp_path / "w.txt").write_text("text")
    for name in ("w.pth", "w.txt"):
        with pytest.raises(BackboneError, match="cannot be read as tensors, with nothing else in it"):
            backbone.read_weights("resnet50", str(tmp_path / name), tmp_path)


def test_weights_that_cannot_be_had_say_where_they_belong(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    words = (
        r"are not in \S+/weights/resnet50-0676ba61.pth and could not be downloaded \(Network is unreachable\). Download https://\S+ and put"
    )
    with pytest.raises(BackboneError, match=words):
        backbone.read_weights("resnet50", "", tmp_path)
    with pytest.raises(
        BackboneError, match=r"are not in \S+/efficientnet_lite0.safetensors: put them there, or name their file with --weights"
    ):
        backbone.read_weights("efficientnet_lite0", "", tmp_path)


def test_what_is_downloaded_is_checked_and_kept(lite, tmp_path, monkeypatch):
    asked = []

    def download(url, file, hash_prefix, progress):
        asked.append((url, hash_prefix))
        save_file({name: torch.from_numpy(value) for name, value in lite.items()}, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setitem(BACKBONES, "lite", replace(BACKBONES["efficientnet_lite0"], url="https://host/lite", sha256="0123"))
    arrays = [backbone.read_weights("lite", "", tmp_path) for _ in range(2)]
    assert asked == [("https://host/lite", "0123")]  # the second is found
    assert (tmp_path / "weights" / "efficientnet_lite0.safetensors").exists()
    assert backbone.fingerprint(arrays[0]) == backbone.fingerprint(arrays[1])
    assert BACKBONES["resnet50"].sha256 in BACKBONES["resnet50"].file
    assert not backbone.architecture("timm:resnet18").sha256


def test_older_files_without_batch_norms_counters_are_read(lite, tmp_path, pictures):
    state = {name: torch.from_numpy(value) for name, value in lite.items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    arrays = backbone.read_weights("efficientnet_lite0", str(tmp_path / "w.safetensors"), tmp_path)
    with torch.no_grad():
        assert_close(backbone.build("efficientnet_lite0", arrays)(pictures), backbone.build("efficientnet_lite0", lite)(pictures))


def test_an_unknown_network_is_refused():
    with pytest.raises(
        ValueError, match="'resnet51' is unknown; there are: resnet50, efficientnet_lite0, vgg13, vgg13_bn, oriented_edges,"
    ):
        backbone.architecture("resnet51")
    with pytest.raises(ValueError, match="timm has no model 'nothing'"):
        backbone.architecture("timm:nothing")


# heads


def test_a_head_learns_what_a_logistic_regression_learns():
    """On features that a line tells apart in one direction; the other 19 are noise."""
    draws = np.random.default_rng(0)
    features = draws.normal(size=(600, 20)).astype(np.float32)
    labels = (features[:, 0] + 0.3 * draws.normal(size=600) > 0).astype(np.int64)
    parts = [transfer.Features(torch.from_numpy(features[rows]), torch.from_numpy(labels[rows])) for rows in (slice(400), slice(400, 600))]
    training = sgd.Config(epochs=60, patience=60, train_batch_size=32, learning_rate=1e-2)
    head = transfer.fit((parts[0], parts[1]), transfer.Config(0.5, training), 2, seed=0)
    from sklearn.linear_model import LogisticRegression

    theirs = LogisticRegression().fit(features[:400], labels[:400]).score(features[400:], labels[400:])
    with torch.no_grad():
        ours = (head(parts[1].images).argmax(dim=1) == parts[1].targets).float().mean().item()
    assert ours > theirs - 0.03 > 0.8
    difference = (head[1].weight[1] - head[1].weight[0]).detach().abs()
    assert difference.argmax() == 0


def test_deterministic_and_monte_carlo_are_the_same_weights_and_differ_in_dropout_alone(edges, pictures):
    whole = network(edges)
    point, mc = PointEstimate(whole).draw(20, 0), McDropout(whole).draw(2000, 0)
    (masks,) = mc.at(pictures).draws.values()
    assert masks[:, 0].shape == (2000, whole[2].in_features)
    assert (masks == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        assert_close(point.log_probs(pictures)[0], torch.log_softmax(whole(pictures), dim=1))
        masked = torch.stack([torch.log_softmax(whole[2](whole[0](pictures) * mask), dim=1) for mask in masks[:5]])
        assert_close(mc.log_probs(pictures)[:5], masked)
        logits = (whole[0](pictures) * masks.mean(dim=0)) @ whole[2].weight.T + whole[2].bias
        spread = (whole[0](pictures) @ whole[2].weight.T).std().item()
        assert_close(logits, whole(pictures), rtol=0, atol=0.2 * spread + 0.05)  # inverted dropout: the mean is the network without


def test_the_network_runs_once_for_all_draws(edges, pictures):
    whole, calls = network(edges), []
    whole[0].register_forward_hook(lambda module, given, made: calls.append(len(made)))
    posterior = McDropout(whole)  # its module is a copy, which has the hook, too
    posterior.draw(20, 0).log_probs(pictures)
    assert calls[-1:] == [len(pictures)]  # before it, the first time, a few images: to see what the module is, and what it takes
    assert max(calls[:-1]) <= 8
    loss = misclassify(posterior, torch.zeros(6, dtype=torch.int64), draws=20)
    calls.clear()
    ATTACKS["bim"](Schedule(steps=3))(loss, pictures, Linf(5 / 255))
    assert calls == [len(pictures)] * 3


def test_an_attack_goes_through_the_whole_network(edges, pictures):
    whole = network(edges)
    point = PointEstimate(whole)
    labels = point.draw(1, 0).log_probs(pictures)[0].argmax(dim=1)
    attacked = ATTACKS["bim"](Schedule())(misclassify(point, labels), pictures, Linf(5 / 255)).images
    before, after = (mean_log_probs(point.draw(1, 0).log_probs(x))[torch.arange(6), labels] for x in (pictures, attacked))
    assert (after < before).all()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_head_without_dropout_is_refused(rate):
    with pytest.raises(ValueError, match=r"dropout must be in \(0, 1\)"):
        transfer.Config(rate)


def test_the_real_weights_see_cats_and_dogs(mnist_root):
    """ImageNet's own classes of the real weights: cats are in 281 to 285, dogs in 151 to 268."""
    file = mnist_root / "weights" / "efficientnet_lite0.safetensors"
    pets = mnist_root / "asirra" / "PetImages"
    if not file.exists() or not pets.is_dir():
        pytest.skip(f"no weights or no cats and dogs under {mnist_root}")
    from safetensors.torch import load_file

    from offmanifold.data.decode import decode

    state = load_file(file)
    frozen = backbone.build("efficientnet_lite0", backbone.read_weights("efficientnet_lite0", "", mnist_root))
    hits = {}
    for name, classes in (("Cat", range(281, 286)), ("Dog", range(151, 269))):
        files = sorted((pets / name).iterdir())[:25]
        images = np.stack([decode(path.read_bytes(), path.name, 224).pixels for path in files])
        with torch.no_grad():
            logits = frozen(torch.from_numpy(images).float() / 255) @ state["classifier.weight"].T + state["classifier.bias"]
        hits[name] = np.isin(logits.argmax(dim=1).numpy(), list(classes)).mean()
    assert hits["Cat"] > 0.7
    assert hits["Dog"] > 0.85
