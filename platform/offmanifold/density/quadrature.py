"""log of an integral over a plane, on a grid whose cells are halved, where they matter, until the integral is stable."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offmanifold.density.likelihood import Likelihood

PAIRS = 2**15
"""(image, cell) pairs whose decoded images are held at once: 100 MB of 28 x 28 pixels."""
ENOUGH_CELLS = 6.0
"""A result is stable only if its mass lies on as many cells (their inverse Simpson index): a midpoint rule with a cell a standard
deviation wide has 4 pi of them, and an error of e^-20."""


class Integrand(NamedTuple):
    """exp(log_prior(z) + likelihood.log_prob(x, decode(z))), of flat images x."""

    log_prior: Callable[[Tensor], Tensor]
    """(n, 2) -> (n,), float64."""
    decode: Callable[[Tensor], Tensor]
    """(n, 2) -> flat images (n, pixels)."""
    likelihood: Likelihood


class Integral(NamedTuple):
    """Of every image: (n,) tensors."""

    log_value: Tensor
    error: Tensor
    """By how much the last halving changed it, in nats."""
    stable: Tensor
    """bool: is that within the tolerance?"""
    mode: Tensor
    """(n, 2): the middle of the cell where the integrand is largest."""
    at_edge: Tensor
    """bool: does it matter at the first grid's edge, so that some of it may lie outside?"""


@dataclass(frozen=True)
class Quadrature:
    """Midpoint rule on square cells. A cell is halved both ways unless what it can hold is exp(-cutoff) of the image's peak, or less."""

    cells: int = 160
    """Along the longer side of the first grid, which all images share."""
    tolerance: float = 0.01
    """Nats by which the last halving may change the result."""
    halvings: int = 9
    """At most: nine make a cell 512 times narrower."""
    cutoff: float = 10.0
    """Nats below the peak."""

    def __post_init__(self) -> None:
        if self.cells < 8 or self.halvings < 1 or self.tolerance <= 0 or self.cutoff <= 0:
            raise ValueError(f"at least 8 cells and 1 halving, and a tolerance and cutoff above 0 are needed: not {self}")


class Grid:
    """The first grid over a box, with what does not depend on the image: decoded images and log prior in the middle of every cell."""

    def __init__(self, low: Tensor, high: Tensor, cells: int, integrand: Integrand) -> None:
        self.low, self.integrand = low.double(), integrand
        self.side = (high - low).max().item() / cells
        self.rows, self.columns = (max(2, math.ceil(length / self.side - 1e-9)) for length in (high - low).tolist())
        self.corner = torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.columns))
        middles = self.middle(self.corner, self.side)
        self.log_prior = integrand.log_prior(middles)
        self.decoded = torch.cat([integrand.decode(chunk) for chunk in middles.split(PAIRS)])

    def middle(self, corner: Tensor, side: float) -> Tensor:
        """Of cells (n, 2), counted in sides from the box's lowest corner: (n, 2)."""
        return self.low + (corner + 0.5) * side

    def values(self, x: Tensor) -> Tensor:
        """Log integrand: (n, pixels) -> (n, rows * columns), float64."""
        return self.integrand.likelihood.table(x, self.decoded) + self.log_prior

    def rise(self, values: Tensor) -> Tensor:
        """By how much the log integrand may rise from a cell's middle to its edge, to first order: (n, cells) -> (n, cells).

        Half the larger difference to a neighbour, in each direction."""
        plane = values.view(-1, self.rows, self.columns)
        rise = torch.zeros_like(plane)
        for dim in (1, 2):
            step = plane.diff(dim=dim).abs()
            first, last = step.narrow(dim, 0, 1), step.narrow(dim, step.shape[dim] - 1, 1)
            rise += torch.maximum(torch.cat([first, step], dim), torch.cat([step, last], dim))
        return rise.view_as(values) / 2

    def on_edge(self, cell: Tensor) -> Tensor:
        """Which of the cells (n,), counted row by row, touch the box's edge: bool."""
        row, column = cell // self.columns, cell % self.columns
        edge: Tensor = (row == 0) | (row == self.rows - 1) | (column == 0) | (column == self.columns - 1)
        return edge


def integrate(x: Tensor, grid: Grid, rule: Quadrature) -> Integral:
    """The integral for each of some flat images (n, pixels)."""
    values = grid.values(x)
    best, first = values.max(dim=1)
    matters = values + grid.rise(values) >= best[:, None] - rule.cutoff
    log_area = 2 * math.log(grid.side)
    log_value = torch.logsumexp(values, dim=1) + log_area
    settled = torch.logsumexp(values.masked_fill(matters, -torch.inf), dim=1) + log_area  # cells that are never halved again
    image, cell = matters.nonzero(as_tuple=True)
    parent = values[image, cell]
    at_edge = torch.zeros(len(x), dtype=torch.bool).index_fill_(0, image[grid.on_edge(cell)], True)
    corner, mode = grid.corner[cell], grid.middle(grid.corner[first], grid.side)
    error, stable = torch.full_like(log_value, torch.inf), torch.zeros_like(at_edge)
    children = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    side = grid.side
    for _ in range(rule.halvings):
        side, log_area = side / 2, log_area - math.log(4)
        image, corner = image.repeat_interleave(4), (2 * corner[:, None] + children).flatten(0, 1)
        parent = parent.repeat_interleave(4)  # what the integrand is at this cell's inner corner
        value = _at_cells(x, image, corner, side, grid)
        mass, peak = _sums(value, image, len(x))
        latest = torch.logaddexp(settled, mass + log_area)
        active = ~stable & (peak > -torch.inf)  # of the others no cell was halved
        error = torch.where(active, (latest - log_value).abs(), error)
        log_value = torch.where(active, latest, log_value)
        higher = (value == peak[image]) & (peak >= best)[image]
        mode[image[higher]] = grid.middle(corner[higher], side)
        best = torch.maximum(best, peak)
        spread = 2 * mass - _sums(2 * value, image, len(x))[0]
        stable = stable | (active & (error <= rule.tolerance) & (spread.exp() >= ENOUGH_CELLS))
        of_four = value.view(-1, 2, 2)
        rise = sum(of_four.diff(dim=dim).abs().amax(dim=(1, 2)) for dim in (1, 2))
        highest = torch.maximum(value + torch.as_tensor(rise).repeat_interleave(4) / 2, parent)
        matters_still = highest >= best[image] - rule.cutoff
        settled = torch.logaddexp(settled, _sums(value[~matters_still], image[~matters_still], len(x))[0] + log_area)
        goes_on = matters_still & ~stable[image]
        image, corner, parent = image[goes_on], corner[goes_on], value[goes_on]
        if not len(image):
            break
    return Integral(log_value, error, stable, mode, at_edge)


def _at_cells(x: Tensor, image: Tensor, corner: Tensor, side: float, grid: Grid) -> Tensor:
    """Log integrand of image ``image[k]`` in the middle of cell ``corner[k]``: (pairs,), float64. What images share is decoded once."""
    key = corner[:, 0] * (1 << 31) + corner[:, 1]
    unique, which = torch.unique(key, return_inverse=True)
    z = grid.middle(torch.stack([unique >> 31, unique & ((1 << 31) - 1)], dim=1), side)
    value = grid.integrand.log_prior(z)[which]
    for rows in torch.argsort(which, stable=True).split(PAIRS):
        first, last = which[rows[0]], which[rows[-1]]
        decoded = grid.integrand.decode(z[first : last + 1])
        value[rows] += grid.integrand.likelihood.log_prob(x[image[rows]], decoded[which[rows] - first])
    return value


def _sums(value: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """log sum exp and maximum of each group's values: (pairs,) -> (groups,) twice; -inf of an empty group."""
    peak = value.new_full((groups,), -torch.inf).scatter_reduce_(0, group, value, "amax")
    total = value.new_zeros(groups).index_add_(0, group, (value - peak[group]).exp())
    return total.log() + peak.clamp_min(torch.finfo(value.dtype).min), peak
