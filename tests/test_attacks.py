"""Attacks against closed forms, and step for step against foolbox and torchattacks on a fixed network."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import eagerpy
import foolbox
import pytest
import torch
import torchattacks
from torch import nn
from torch.testing import assert_close

from offmanifold.attacks import (
    ATTACKS,
    CONTROLS,
    L2,
    OBJECTIVES,
    THREATS,
    Candidate,
    Linf,
    Schedule,
    as_attack,
    basic_iterative,
    fast_gradient,
    fast_gradient_walk,
    misclassify,
    momentum_iterative,
    projected_gradient,
    reach,
)
from offmanifold.attacks.threat import l2_norm
from offmanifold.finite import NonFinite
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.predictive import mean_log_probs


@dataclass(frozen=True)
class HandMade:
    """A posterior and predictive in one, whose log-probabilities are any function of the images; it records its calls."""

    function: Callable[[torch.Tensor], torch.Tensor]
    calls: list[int]

    def draw(self, num_draws: int, seed: int) -> "HandMade":
        return self

    def log_probs(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        return self.function(x)


def by_hand(function: Callable[[torch.Tensor], torch.Tensor]) -> HandMade:
    return HandMade(function, [])


@pytest.fixture(scope="module")
def three_draws(network) -> Callable[[torch.Tensor], torch.Tensor]:
    """Log-probabilities of three functions that differ."""
    shift = torch.randn(3, 1, 10, generator=torch.Generator().manual_seed(8))
    tilt = torch.rand(3, 1, 10, generator=torch.Generator().manual_seed(9)) + 0.5
    return lambda x: torch.log_softmax(network(x) * tilt + shift, dim=-1)


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """A fixed smooth network of two layers."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 12 * 12, 10)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def y(network, x) -> torch.Tensor:
    return network(x).argmax(1)


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_stays_inside_the_threat_raises_the_loss_and_repeats_itself(name, norm, network, x, y):
    threat = THREATS[norm]({"linf": 0.05, "l2": 0.8}[norm])
    loss = misclassify(PointEstimate(network), y)
    candidate = ATTACKS[name](Schedule(seed=5))(loss, x, threat)
    assert threat.contains(candidate.images, x).all()
    assert (loss(candidate.images, 0) > loss(x, 0) + 0.1).all()
    assert (candidate.zero_gradients == 0).all()
    assert torch.equal(ATTACKS[name](Schedule(seed=5))(loss, x, threat).images, candidate.images)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_targeted_attack_lowers_the_cross_entropy_of_its_target(name, network, x, y):
    target = (y + 1) % 10
    toward, away = reach(PointEstimate(network), target), misclassify(PointEstimate(network), target)
    candidate = ATTACKS[name](Schedule())(toward, x, Linf(0.05))
    assert (away(candidate.images, 0) < away(x, 0) - 0.1).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_part_of_a_batch_gives_that_part_of_the_whole(name, network, x, y):
    posterior = PointEstimate(network)
    whole = ATTACKS[name](Schedule(seed=2))(misclassify(posterior, y), x, Linf(0.1)).images
    part = ATTACKS[name](Schedule(seed=2))(misclassify(posterior, y[5:9]), x[5:9], Linf(0.1)).images
    assert_close(part, whole[5:9], atol=1e-5, rtol=0)


def test_fast_gradient_on_a_linear_model_costs_epsilon_times_the_dual_norm():
    w = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    middle = torch.full((3, 1, 8, 8), 0.5)

    def loss(x: torch.Tensor, step: int) -> torch.Tensor:
        return -(x * w).flatten(1).sum(1)

    for threat, dual in ((Linf(0.1), w.abs().sum()), (L2(0.1), w.norm())):
        moved = fast_gradient()(loss, middle, threat).images
        assert_close(loss(moved, 0) - loss(middle, 0), (0.1 * dual).expand(3))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_momentum_iterative_is_torchattacks_step_for_step(steps, network, x, y):
    ours = momentum_iterative(steps=steps, step_size=0.06)(misclassify(PointEstimate(network), y), x, Linf(max(0.06, 0.3 * steps / 10)))
    theirs = torchattacks.MIFGSM(network, eps=max(0.06, 0.3 * steps / 10), alpha=0.06, steps=steps, decay=1.0)(x, y)
    assert_close(ours.images, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_basic_iterative_is_foolbox_step_for_step(steps, network, x, y):
    ours = basic_iterative(steps=steps, step_size=0.03)(misclassify(PointEstimate(network), y), x, Linf(0.03 * max(1, steps / 2)))
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=0.03, steps=steps, random_start=False)
    theirs = attack.run(model, x, y, epsilon=0.03 * max(1, steps / 2))
    assert_close(ours.images, theirs, atol=1e-6, rtol=0)


def test_fast_gradient_is_foolbox_in_both_norms(network, x, y):
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    for threat, attack in ((Linf(0.1), foolbox.attacks.LinfFastGradientAttack()), (L2(0.7), foolbox.attacks.L2FastGradientAttack())):
        ours = fast_gradient()(misclassify(PointEstimate(network), y), x, threat).images
        assert_close(ours, attack.run(model, x, y, epsilon=threat.epsilon), atol=1e-5, rtol=0)


def test_the_basic_iterative_method_in_l2_and_targeted_is_foolbox(network, x, y):
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    target = (y + 3) % 10
    ours = basic_iterative(steps=6, step_size=0.3)(reach(PointEstimate(network), target), x, L2(1.0)).images
    attack = foolbox.attacks.L2BasicIterativeAttack(abs_stepsize=0.3, steps=6, random_start=False)
    theirs = attack.run(model, x, foolbox.criteria.TargetedMisclassification(eagerpy.astensor(target).raw), epsilon=1.0)
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_targeted_momentum_iterative_is_torchattacks_step_for_step(steps, network, x, y):
    target = (y + 1) % 10
    ours = momentum_iterative(steps=steps, step_size=0.06)(reach(PointEstimate(network), target), x, Linf(max(0.06, 0.3 * steps / 10)))
    attack = torchattacks.MIFGSM(network, eps=max(0.06, 0.3 * steps / 10), alpha=0.06, steps=steps, decay=1.0)
    attack.set_mode_targeted_by_function(target_map_function=lambda images, labels: target)
    assert_close(ours.images, attack(x, y), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_projected_gradient_is_foolbox_from_the_same_start(steps, network, x, y):
    threat = Linf(0.03 * max(1, steps / 2))
    flat = projected_gradient(steps=1, step_size=threat.epsilon, seed=7)(lambda images, step: (images * 0).flatten(1).sum(1), x, threat)
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=0.03, steps=steps)
    attack.get_random_start = lambda x0, epsilon: eagerpy.astensor(flat.images)  # a flat loss leaves the start where it is
    theirs = attack.run(foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu"), x, y, epsilon=threat.epsilon)
    ours = projected_gradient(steps=steps, step_size=0.03, seed=7)(misclassify(PointEstimate(network), y), x, threat)
    assert_close(ours.images, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["bim", "mim"])
def test_iterative_attacks_on_a_linear_model_reach_the_ball_s_edge_along_the_dual_direction(name):
    """The gradient is w at every step, so momentum changes nothing, in both norms."""
    w = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    middle = torch.full((3, 1, 8, 8), 0.5)
    for threat, edge in ((Linf(0.1), 0.1 * w.sign()), (L2(0.1), 0.1 * w / w.norm())):
        candidate = ATTACKS[name](Schedule(steps=10, step_size=0.02))(lambda x, step: (x * w).flatten(1).sum(1), middle, threat)
        assert_close(candidate.images - middle, edge.expand(3, -1, -1, -1), atol=1e-6, rtol=0)
        assert (candidate.steps, candidate.step_size) == (10, 0.02)


def test_a_walk_of_fast_gradient_steps_ends_where_the_basic_iterative_method_does(network, x, y):
    loss = misclassify(PointEstimate(network), y)
    images, zero = fast_gradient_walk(loss, x, Linf(0.08), steps=4, step_size=0.02)
    assert images.shape == (5, *x.shape)
    assert torch.equal(images[0], x)
    assert torch.equal(images[-1], basic_iterative(4, 0.02)(loss, x, Linf(0.08)).images)
    assert zero.shape == (4, len(x))
    assert not zero.any()
    w = torch.linspace(-1, 1, 784).view(1, 28, 28)
    straight, _ = fast_gradient_walk(lambda at, step: (at * w).flatten(1).sum(dim=1), x / 2 + 0.25, Linf(0.1), steps=5, step_size=0.02)
    gained = (straight * w).flatten(2).sum(dim=2).diff(dim=0)
    assert_close(gained, torch.full((5, len(x)), 0.02 * w.abs().sum().item()), rtol=1e-3, atol=0)


def test_projected_gradient_starts_at_random_in_the_ball_and_differs_between_images(x):
    def flat(images: torch.Tensor, step: int) -> torch.Tensor:
        return (images * 0).flatten(1).sum(1)

    candidate = projected_gradient(steps=4, step_size=0.1, seed=1)(flat, torch.full_like(x, 0.5) + 1e-3 * x, Linf(0.2))
    moved = candidate.images - (torch.full_like(x, 0.5) + 1e-3 * x)
    assert moved.std() == pytest.approx(0.2 / 3**0.5, rel=0.02)
    assert not torch.equal(moved[0], moved[1])


def test_a_flat_loss_moves_nothing_gives_no_nan_and_its_zero_gradients_are_counted(x):
    def flat(images: torch.Tensor, step: int) -> torch.Tensor:
        return torch.where(torch.arange(len(images)) < 4, 0.0, 1.0) * images.flatten(1).sum(1)

    for threat in (Linf(0.1), L2(0.1)):
        candidate = momentum_iterative(steps=3, step_size=0.05)(flat, x, threat)
        assert torch.equal(candidate.images[:4], x[:4])
        assert not candidate.images.isnan().any()
        assert candidate.zero_gradients.tolist() == [3] * 4 + [0] * 12


def test_half_precision_is_refused(network, x, y):
    with pytest.raises(TypeError, match="float32 or wider"):
        fast_gradient()(misclassify(PointEstimate(network), y), x.half(), Linf(0.1))


@pytest.mark.parametrize(("steps", "step_size"), [(10, 0.005), (10, 0.2)])
def test_steps_that_cannot_reach_the_ball_or_overshoot_it_are_refused(steps, step_size, network, x, y):
    with pytest.raises(ValueError, match=r"must be in \[0.01, 0.1\]"):
        basic_iterative(steps, step_size)(misclassify(PointEstimate(network), y), x, Linf(0.1))


def test_objectives_by_hand():
    p = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.8, 0.1]]])
    label = torch.tensor([0])
    logs = p.log()
    values = {name: objective(logs, label).item() for name, objective in OBJECTIVES.items()}
    geometric = (p[0] * p[1]).sqrt().squeeze(0)
    assert values["mixture"] == pytest.approx(-torch.tensor(0.3).log().item())
    assert values["expected"] == pytest.approx(-(logs[0, 0, 0] + logs[1, 0, 0]).item() / 2)
    assert values["mean_logit"] == pytest.approx(-(geometric[0] / geometric.sum()).log().item())
    assert values["margin"] == pytest.approx((torch.tensor(0.55) / 0.3).log().item())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_one_draw_are_its_cross_entropy_the_margin_apart_and_are_blind_to_a_shift_of_logits(name):
    logits = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    log_probs = torch.log_softmax(logits, -1)
    label = torch.arange(6) % 4
    if name != "margin":
        assert_close(OBJECTIVES[name](log_probs, label), nn.functional.cross_entropy(logits[0], label, reduction="none"))
    shifted = torch.log_softmax(logits + 100, -1)
    assert_close(OBJECTIVES[name](shifted, label), OBJECTIVES[name](log_probs, label), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_keep_their_gradient_where_probabilities_saturate(name):
    logits = torch.tensor([[[60.0, 0.0, -3.0]]]).repeat(3, 1, 1).requires_grad_()
    OBJECTIVES[name](torch.log_softmax(logits, -1), torch.tensor([0])).sum().backward()
    assert logits.grad.abs().max() > 1e-27


def test_fresh_draws_differ_between_steps_fixed_draws_do_not(posteriors, images, labels):
    fresh = misclassify(posteriors["dropout"], labels, draws=3, seed=1)
    fixed = misclassify(posteriors["dropout"], labels, draws=3, seed=1, fresh=False)
    assert not torch.equal(fresh(images, 0), fresh(images, 1))
    assert torch.equal(fresh(images, 1), fresh(images, 1))
    assert torch.equal(fixed(images, 0), fixed(images, 1))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_stays_in_bounds_repeats_itself_and_knows_images_by_their_content(name, x):
    threat = Linf(0.1)
    attacked = threat.project(x + 0.1, x)
    noised = CONTROLS[name](x, attacked, threat, 4)
    assert noised.min() >= 0
    assert noised.max() <= 1
    assert_close(CONTROLS[name](x[3:5], attacked[3:5], threat, 4), noised[3:5])
    assert not torch.equal(CONTROLS[name](x, attacked, threat, 5), noised)
    if name != "gaussian":
        assert threat.contains(noised, x).all()


def test_random_sign_has_the_full_step_s_norm_and_zero_mean():
    grey = torch.full((4, 1, 50, 50), 0.5) + torch.linspace(0, 0.01, 4).view(-1, 1, 1, 1)
    moved = CONTROLS["random_sign"](grey, grey, Linf(0.1), 0) - grey
    assert_close(moved.abs(), torch.full_like(moved, 0.1))
    assert moved.mean().abs() < 4 * 0.1 / 100
    in_l2 = CONTROLS["random_sign"](grey, grey, L2(2.0), 0) - grey
    assert_close(in_l2.flatten(1).norm(dim=1), torch.full((4,), 2.0))


def test_gaussian_noise_has_the_attack_s_l2_norm_after_clipping(x):
    black_and_white = x.round()
    attacked = Linf(0.1).project(black_and_white + 0.1 * torch.randn_like(x).sign(), black_and_white)
    noised = CONTROLS["gaussian"](black_and_white, attacked, Linf(0.1), 0)
    assert_close((noised - black_and_white).flatten(1).norm(dim=1), (attacked - black_and_white).flatten(1).norm(dim=1), rtol=1e-4, atol=0)


def test_uniform_noise_fills_the_ball():
    grey = torch.full((1, 1, 100, 100), 0.5)
    moved = CONTROLS["uniform"](grey, grey, Linf(0.2), 0) - grey
    assert moved.std() == pytest.approx(0.2 / 3**0.5, rel=0.02)
    assert THREATS["l2"](3.0).distance(CONTROLS["uniform"](grey, grey, L2(3.0), 0) - grey).item() <= 3.0 + 1e-5


@pytest.mark.parametrize("norm", THREATS)
def test_projection_is_idempotent_and_contains_tells_inside_from_outside(norm, x):
    threat = THREATS[norm](0.3)
    projected = threat.project(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), x)
    assert threat.contains(projected, x).all()
    assert_close(threat.project(projected, x), projected, atol=1e-6, rtol=0)
    assert not threat.contains(x + 1.0, x).any()
    assert not threat.contains(x * torch.nan, x).any()
    assert not THREATS[norm](100.0).contains(x + 1.0, x).any()  # inside the ball, outside the bounds


def test_bounds_may_differ_between_channels():
    low, high = torch.tensor([-1.0, -2.0]).view(2, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)
    projected = Linf(10.0, bounds=(low, high)).project(torch.full((1, 2, 3, 3), 5.0), torch.zeros(1, 2, 3, 3))
    assert projected[0, :, 0, 0].tolist() == [1.0, 2.0]


def test_the_mixture_attack_fools_the_mean_of_a_dropout_posterior(posteriors, images):
    posterior = posteriors["dropout"]
    label = mean_log_probs(posterior.draw(20, 0).log_probs(images)).argmax(-1)
    found = momentum_iterative()(misclassify(posterior, label, draws=5), images, Linf(0.3)).images
    after = mean_log_probs(posterior.draw(20, 99).log_probs(found)).argmax(-1)
    assert (after != label).float().mean() > 0.8


BAD = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf}


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_gradient_that_is_not_finite_is_an_error_and_no_robustness(name, bad, norm, x):
    factor = torch.ones(len(x))
    factor[[5, 9]] = bad
    expected = "the gradient of the loss at step 0 is NaN or infinite at 2 of 16 images of the batch, first at image 5"
    with pytest.raises(NonFinite, match=expected):
        ATTACKS[name](Schedule())(lambda images, step: images.flatten(1).sum(1) * factor, x, THREATS[norm](0.1))


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("norm", THREATS)
def test_a_threat_refuses_directions_and_candidates_that_are_not_finite(norm, bad, x):
    threat = THREATS[norm](0.1)
    broken = x.clone()
    broken[7, 0, 3, 3] = bad
    for step in (lambda: threat.steepest(broken), lambda: threat.project(broken, x), lambda: threat.project(x, broken)):
        with pytest.raises(NonFinite, match="1 of 16 images of the batch, first at image 7"):
            step()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_objective_refuses_log_probabilities_that_are_nan_or_plus_infinity(bad, name, three_draws, x, y):
    log_probs = three_draws(x)
    log_probs[1, 4, (y[4] + 1) % 10] = bad
    with pytest.raises(NonFinite, match=r"a log-probability is NaN or \+inf at 1 of 16 images of the batch, first at image 4"):
        OBJECTIVES[name](log_probs, y)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_class_of_probability_zero_changes_no_objective_and_no_gradient(name, three_draws, x, y):
    def eleven(images: torch.Tensor) -> torch.Tensor:
        logits = three_draws(images)
        return torch.log_softmax(torch.cat([logits, torch.full((3, len(images), 1), -torch.inf)], dim=-1), dim=-1)

    gradients, values = [], []
    for function in (three_draws, eleven):
        images = x.clone().requires_grad_()
        value = OBJECTIVES[name](function(images), y)
        gradients.append(torch.autograd.grad(value.sum(), images)[0])
        values.append(value.detach())
    assert gradients[0].isfinite().all()
    assert gradients[0].abs().max() > 0
    assert_close(values[1], values[0])
    assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    losses = [misclassify(by_hand(function), y, OBJECTIVES[name]) for function in (three_draws, eleven)]
    ten, with_eleventh = (momentum_iterative()(loss, x, Linf(0.1)).images for loss in losses)
    assert ((ten - x).abs() > 0.05).float().mean() > 0.5
    assert ((with_eleventh - ten).abs() > 1e-5).float().mean() < 1e-3  # a gradient of almost 0 may round to the other sign


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_label_of_probability_zero_gives_no_nan_gradient(name, three_draws, x):
    leaf = x.clone().requires_grad_()
    log_probs = torch.cat([three_draws(leaf), torch.full((3, len(x), 1), -torch.inf)], dim=-1)
    value = OBJECTIVES[name](log_probs, torch.full((len(x),), 10))
    assert (value == torch.inf).all()
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_works_without_grad_and_on_images_that_require_it_and_returns_no_graph(name, norm, network, x, y):
    threat = THREATS[norm](0.1)
    attack = ATTACKS[name](Schedule(seed=1))
    expected = attack(misclassify(PointEstimate(network), y), x, threat)
    with torch.no_grad():
        without_grad = attack(misclassify(PointEstimate(network), y), x, threat)
        assert not torch.is_grad_enabled()
    leaf = x.clone().requires_grad_()
    for candidate in (expected, without_grad, attack(misclassify(PointEstimate(network), y), leaf, threat)):
        assert torch.equal(candidate.images, expected.images)
        assert not candidate.images.requires_grad
        assert not candidate.zero_gradients.requires_grad
    assert leaf.grad is None
    walk, zero = fast_gradient_walk(misclassify(PointEstimate(network), y), leaf, Linf(0.1), 2, 0.05)
    assert not walk.requires_grad
    assert not zero.requires_grad


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_returns_no_graph_and_allows_an_empty_batch(name, x):
    threat = Linf(0.1)
    leaf, attacked = x.clone().requires_grad_(), threat.project(x + 0.1, x).requires_grad_()
    noised = CONTROLS[name](leaf, attacked, threat, 0)
    assert not noised.requires_grad
    assert torch.equal(noised, CONTROLS[name](x, attacked.detach(), threat, 0))
    for norm in THREATS.values():
        assert CONTROLS[name](x[:0], x[:0], norm(0.1), 0).shape == x[:0].shape


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_mean_the_same(dtype, objective, network, x, y):
    for make in (misclassify, reach):
        value = make(PointEstimate(network), y.to(dtype), objective)(x, 0)
        assert torch.equal(value, make(PointEstimate(network), y, objective)(x, 0))
    log_probs = torch.log_softmax(network(x), -1).unsqueeze(0)
    assert torch.equal(objective(log_probs, y.to(dtype)), objective(log_probs, y))


@pytest.mark.parametrize("make", [misclassify, reach])
def test_labels_that_are_not_integers_are_refused(make, network, y):
    for labels in (y.float(), y.double() + 0.5, y.bool()):
        with pytest.raises(ValueError, match=r"labels must be integers, not torch\.\w+: convert them with labels\.long\(\)"):
            make(PointEstimate(network), labels)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("label", [10, -1])
def test_labels_outside_the_classes_are_refused(label, objective, network, x, y):
    labels = y.clone()
    labels[6] = label
    with pytest.raises(ValueError, match=rf"label {label} of image 6 is not in 0\.\.9: the model has 10 classes"):
        fast_gradient()(misclassify(PointEstimate(network), labels, objective), x, Linf(0.1))
    with pytest.raises(ValueError, match=r"do not fit: their shapes are \(1, 16, 10\) and \(15,\)"):
        fast_gradient()(misclassify(PointEstimate(network), y[1:], objective), x, Linf(0.1))


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_an_empty_batch_returns_one_and_does_not_call_the_model(name, norm, three_draws, x, y):
    posterior = by_hand(three_draws)
    candidate = ATTACKS[name](Schedule(steps=3))(misclassify(posterior, y[:0]), x[:0], THREATS[norm](0.1))
    assert candidate.images.shape == x[:0].shape
    assert candidate.zero_gradients.shape == (0,)
    walk, zero = fast_gradient_walk(misclassify(posterior, y[:0]), x[:0], THREATS[norm](0.1), 3, 0.05)
    assert (walk.shape, zero.shape) == ((4, 0, 1, 28, 28), (3, 0))
    assert posterior.calls == []
    for objective in OBJECTIVES.values():
        assert objective(three_draws(x)[:, :0], y[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_refuses_images_that_are_not_float32_or_wider(name, dtype, network, x, y):
    with pytest.raises(TypeError, match=r"images must be (float32 or wider|floating point), not torch\.\w+"):
        ATTACKS[name](Schedule())(misclassify(PointEstimate(network), y), x.to(dtype), Linf(0.1))


def test_an_l2_step_has_norm_one_however_small_or_large_the_gradient(x):
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for scale in (1e-36, 1e-25, 1.0, 1e25):
        step = L2(0.1).steepest(direction * scale)
        assert_close(l2_norm(step), torch.ones(len(x)))
        assert_close(step, direction / l2_norm(direction).view(-1, 1, 1, 1), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("norm", THREATS)
def test_perturbations_are_drawn_uniformly_from_the_ball_and_keyed_by_the_image(norm):
    images = torch.rand(20_000, 1, 2, 1, generator=torch.Generator().manual_seed(3))
    threat = THREATS[norm](0.5)
    drawn = threat.sample(images, 4)
    assert torch.equal(threat.sample(images[7:9], 4), drawn[7:9])
    assert not torch.equal(threat.sample(images, 5), drawn)
    distance = threat.distance(drawn)
    assert distance.max() <= 0.5 + 1e-6
    for radius in (0.1, 0.25, 0.4):  # of two pixels: the share within a radius is the ratio of areas
        assert (distance < radius).float().mean().item() == pytest.approx((radius / 0.5) ** 2, abs=0.015)
    assert drawn.mean(dim=0).abs().max() < 0.01
    assert torch.corrcoef(drawn.flatten(1).T)[0, 1].abs() < 0.03


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.5, 0.9])
def test_gaussian_noise_has_the_attack_s_norm_even_where_most_pixels_are_clipped(epsilon, x):
    for images in (x, x.round(), x.double()):
        attacked = CONTROLS["random_sign"](images, images, Linf(epsilon), 9)
        wanted = l2_norm(attacked - images)
        largest = l2_norm(CONTROLS["gaussian"](images, images + 1e3, Linf(epsilon), 0) - images)  # every pixel is clipped
        noised = CONTROLS["gaussian"](images, attacked, Linf(epsilon), 0)
        assert_close(l2_norm(noised - images), torch.minimum(wanted, largest), rtol=1e-4, atol=1e-6)
        assert noised.dtype == images.dtype


def test_gaussian_noise_as_large_as_a_perturbation_that_is_nan_is_an_error(x):
    with pytest.raises(NonFinite, match="the norm of the attack's perturbation is NaN or infinite at 16 of 16 images"):
        CONTROLS["gaussian"](x, x * math.nan, Linf(0.1), 0)


def test_images_alone_are_a_whole_candidate(x):
    candidate = Candidate(x)
    assert candidate.images is x
    assert (candidate.zero_gradients, candidate.steps, candidate.step_size) == (None, None, None)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_found_by_its_name(name, network, x, y):
    schedule, loss = Schedule(steps=3, seed=6), misclassify(PointEstimate(network), y)
    found, attack = as_attack(name, schedule)
    assert found == name
    assert torch.equal(attack(loss, x, Linf(0.1)).images, ATTACKS[name](schedule)(loss, x, Linf(0.1)).images)


def test_a_callable_is_an_attack_with_the_name_of_its_function_or_class():
    def brighten(loss, images, threat) -> Candidate:
        return Candidate(threat.project(images + 1, images))

    class Darken:
        def __call__(self, loss, images, threat) -> Candidate:
            return Candidate(threat.project(images - 1, images))

    odd = Darken()
    odd.__name__ = "my attack/v1: 2"
    attacks = {"brighten": brighten, "Darken": Darken(), "lambda": lambda loss, images, threat: Candidate(images), "my_attack_v1_2": odd}
    for name, attack in {**attacks, "partial": functools.partial(brighten)}.items():
        assert as_attack(attack, Schedule()) == (name, attack)


def test_an_unknown_attack_is_refused():
    with pytest.raises(ValueError, match=f"attack 'cw' is unknown; there are: {', '.join(ATTACKS)}"):
        as_attack("cw", Schedule())
    with pytest.raises(TypeError, match="not 3"):
        as_attack(3, Schedule())
