"""NUTS and HMC with NumPyro's kernels, in segments that can be kept: a chain that is cut off goes on with the draws it would have had.

Hoffman & Gelman (2014); Neal (2011) for trajectories of fixed length.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from numpy.typing import NDArray

from offmanifold.inference.sampler import Chain, Config, SamplingFailed
from offmanifold.progress import Checkpoints, Memory, Progress, duration, silent

SEGMENT_SECONDS = 15.0
"""Of a segment, about: what a chain loses at most when it is killed."""
ROOM = 16_000_000
"""Numbers that the draws of a segment may have: 64 MB."""


@dataclass(frozen=True)
class Target:
    """What is sampled."""

    potential: Callable[[Array, Any], Array]
    """(position (dimension,), data) -> -log density, up to a constant."""
    data: Any
    """Arrays that the potential needs: handed to the compiled code, not compiled into it."""
    start: Callable[[Array], Array]
    """Key -> the position (dimension,) at which a chain begins."""
    weights: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda positions: positions
    """Positions (draws, dimension) -> what a person wants of them."""
    explain: Callable[[Array], str] = lambda position: "the potential or its gradient is not finite there"
    """What is wrong with a start at which the density cannot be computed."""


STATISTICS: dict[str, Callable[[Any], Any]] = {
    "leapfrog_steps": lambda state: state.num_steps,
    "acceptance": lambda state: state.accept_prob,
    "diverging": lambda state: state.diverging,
    "step_size": lambda state: state.adapt_state.step_size,
    "energy": lambda state: state.energy,
    "potential": lambda state: state.potential_energy,
}
"""Column of a chain's table -> where NumPyro's state has it. step_size: as adapted after the draw; energies in nats."""


def sample(
    target: Target,
    config: Config,
    seed: int,
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
    segment_seconds: float = SEGMENT_SECONDS,
) -> Chain:
    """One chain. After each segment, its draws and the sampler's state are kept; what the checkpoints hold already is not sampled again.

    The same seed gives the same draws on the same machine, however the chain was cut into segments.
    ``SamplingFailed`` where the density cannot be computed at the start.
    """
    checkpoints = Memory() if checkpoints is None else checkpoints
    progress(0, {}, "compiling")
    kernel = _Kernel(target, config, seed)
    segments, saved = checkpoints.read()
    if segments:
        kernel.restore(saved)
        progress(kernel.iteration, {}, f"goes on after draw {kernel.iteration} of {config.iterations}")
    count, resumed = 1, kernel.iteration
    while kernel.iteration < config.iterations:
        warming = kernel.iteration < config.warmup
        started = time.monotonic()
        segment = kernel.advance(min(count, (config.warmup if warming else config.iterations) - kernel.iteration))
        seconds = time.monotonic() - started
        checkpoints.keep(segment, kernel.state())
        segments.append(segment)
        drawn, work = len(segment["acceptance"]), _work(segment, warming)
        if kernel.iteration - drawn == resumed:  # the first of a process compiles
            progress(kernel.iteration, work, "compiled")
        else:
            figures, words = _news(config, segments, kernel.iteration, seconds)
            progress(kernel.iteration, figures | work, words)
            longest = max(config.longest, segment["leapfrog_steps"].max())  # early trajectories may be of one step
            count = max(1, round(segment_seconds * segment["leapfrog_steps"].sum() / (seconds * longest)))
    joined = {name: np.concatenate([segment[name] for segment in segments]) for name in ("draws", *STATISTICS)}
    draws = target.weights(joined.pop("draws"))
    table = pd.DataFrame({"iteration": np.arange(config.iterations), "warmup": np.arange(config.iterations) < config.warmup, **joined})
    return Chain(draws, table)


def _work(segment: dict[str, Any], warming: bool) -> dict[str, float]:
    """Of one segment; draws of the warm-up count neither as draws nor as divergences."""
    work = {"work/leapfrog_steps": float(segment["leapfrog_steps"].sum())}
    if not warming:
        work |= {"work/draws": float(len(segment["acceptance"])), "work/divergences": float(segment["diverging"].sum())}
    return work


def _news(config: Config, segments: list[dict[str, Any]], iteration: int, seconds: float) -> tuple[dict[str, float], str]:
    """The last segment's figures, and the same in words; divergences of the warm-up, then of the kept draws."""
    last, warming = segments[-1], iteration <= config.warmup
    diverging = np.concatenate([segment["diverging"] for segment in segments])
    divergences = int(diverging.sum() if warming else diverging[config.warmup :].sum())
    left = seconds / len(last["acceptance"]) * (config.iterations - iteration)
    figures = {
        "live/draws": float(max(0, iteration - config.warmup)),
        "live/leapfrog_per_second": float(last["leapfrog_steps"].sum() / seconds),
        "live/acceptance": float(last["acceptance"].mean()),
        "live/step_size": float(last["step_size"][-1]),
        "live/divergences": float(divergences),
        "live/potential": float(last["potential"][-1]),
    }
    diverged = f"{divergences} divergences{' (warm-up)' if warming else ''}"
    done = f"warm-up {iteration}/{config.warmup}" if warming else f"draw {iteration - config.warmup}/{config.draws}"
    words = (
        f"{done}, {figures['live/leapfrog_per_second']:.1f} leapfrog/s, acceptance {figures['live/acceptance']:.2f}, "
        f"step size {figures['live/step_size']:.2g}, {diverged}, about {duration(left)} left"
    )
    return figures, words


class _Kernel:
    """NumPyro's kernel with its state: the functions of ``numpyro.infer.NUTS``, which would compile a potential's data into the code."""

    def __init__(self, target: Target, config: Config, seed: int) -> None:
        from numpyro.infer.hmc import hmc
        from numpyro.infer.hmc_util import build_adaptation_schedule

        self.config = config
        begin, self.step = hmc(potential_fn_gen=lambda data: lambda z: target.potential(z, data), algo=config.kernel.upper())
        self.data = jax.device_put(target.data)
        start, key = jax.random.split(jax.random.PRNGKey(seed))
        position = target.start(start)
        self.current = _strong(
            begin(
                position,
                config.warmup,
                step_size=config.initial_step_size,
                adapt_mass_matrix=False,
                target_accept_prob=config.target_acceptance,
                trajectory_length=config.trajectory_length,
                max_tree_depth=config.max_tree_depth,
                model_args=(self.data,),
                rng_key=key,
            )
        )
        if not (jnp.isfinite(self.current.potential_energy) and jnp.isfinite(self.current.z_grad).all()):
            raise SamplingFailed(target.explain(position))
        # NumPyro would begin the step size anew before the last part of the warm-up, for a mass matrix that is not adapted here
        last_window = jnp.full_like(self.current.adapt_state.window_idx, len(build_adaptation_schedule(config.warmup)) - 1)
        self.current = self.current._replace(adapt_state=self.current.adapt_state._replace(window_idx=last_window))
        self.room = max(1, min(256, ROOM // len(position)))
        self.run = jax.jit(self._run)

    @property
    def iteration(self) -> int:
        """Draws so far."""
        return int(self.current.i)

    def advance(self, count: int) -> dict[str, NDArray[Any]]:
        """So many draws more, or as many as there is room for: positions of those after the warm-up, and every statistic of each."""
        count, first = min(count, self.room), self.iteration
        self.current, positions, statistics = jax.block_until_ready(self.run(self.current, self.data, count))
        kept = {name: np.asarray(values[:count]) for name, values in statistics.items()}
        return {"draws": np.asarray(positions[max(0, min(count, self.config.warmup - first)) : count]), **kept}

    def state(self) -> dict[str, NDArray[Any]]:
        """All that the next draw depends on."""
        return {f"{index:02d}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(self.current))}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Goes on from a state."""
        leaves = [jnp.asarray(state[name]) for name in sorted(state)]
        self.current = jax.tree_util.tree_unflatten(jax.tree.structure(self.current), leaves)

    def _run(self, state: Any, data: Any, count: Array) -> Any:
        """``count`` draws in one compiled loop, whatever the count: (state, positions (room, dimension), statistics (room,))."""

        def draw(index: Array, carry: Any) -> Any:
            state, positions, statistics = carry
            state = self.step(state, model_args=(data,))
            statistics = {name: values.at[index].set(STATISTICS[name](state)) for name, values in statistics.items()}
            return state, positions.at[index].set(state.z), statistics

        statistics = {name: jnp.zeros(self.room, jnp.asarray(value(state)).dtype) for name, value in STATISTICS.items()}
        return jax.lax.fori_loop(0, count, draw, (state, jnp.zeros((self.room, len(state.z)), state.z.dtype), statistics))


def _strong(state: Any) -> Any:
    """Without JAX's weak types: a state that comes from a loop or a file has none, and would be compiled for anew."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
