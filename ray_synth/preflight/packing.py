"""Can groups of equal units be put on nodes, all at once? Exact; pure.

A group is some units that each need CPUs and GPUs on one node; a node is what is free on it. Ray counts
in ten-thousandths, and so does this room: nothing here is decided by a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

GRAIN = 10_000  # Ray's resolution of a CPU or a GPU
MOST_PATTERNS = 20_000  # of one node; beyond it nobody looks for an unlucky placement


@dataclass(frozen=True)
class Demand:
    """`count` units that each need `cpus`, `gpus` and `memory` on one node, at the same time.

    Attributes:
        what: the setting that asks for them.
        memory: bytes; 0 where it is not counted (Ray does not count it).
    """

    what: str
    count: int
    cpus: float
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Nodes:
    """`count` nodes with the same free resources.

    Attributes:
        cpus, gpus: free on each. A GPU is a thing of its own: half of one and half of another are
            no whole one. Of 1.5 free GPUs one is taken to be whole.
        memory: bytes; 0 where it is not known.
        accelerator: Ray's name of the GPU's type, "" where it is not known.
        added: nodes that are not there yet, but come when they are needed.
        name: for people.
    """

    count: int
    cpus: float
    gpus: float = 0.0
    memory: int = 0
    accelerator: str = ""
    added: bool = False
    name: str = ""


@dataclass(frozen=True)
class Placement:
    """Where a packing is possible: how many nodes it must add, and whether any order of placing works.

    Attributes:
        sure: no unlucky placement of the other units leaves one without a place. Ray places units
            one by one and never moves them.
    """

    added: int
    sure: bool


def pack(
    demands: Sequence[Demand], nodes: Sequence[Nodes], most_added: int | None = None
) -> Placement | None:
    """Whether all units can be on the nodes at once; None where there is no way to place them.

    Args:
        most_added: nodes in all that can be added, where that is less than the sum of their counts.
    """
    demands = [d for d in demands if d.count and (d.cpus or d.gpus or d.memory)]
    nodes = [n for n in nodes if n.count]
    if not demands:
        return Placement(0, True)
    for demand in demands:
        if demand.gpus > 1 and demand.gpus != int(demand.gpus):
            return None  # Ray takes fractions of one GPU, and whole numbers
    if _too_much_in_all(demands, nodes):
        return None
    found = _fewest_added(demands, nodes, most_added)
    if found is None:
        return None
    alone = sum(n.count for n in nodes) == 1
    stuck = not alone and any(_can_get_stuck(at, demands, nodes) for at in range(len(demands)))
    return Placement(found, not stuck)


def _too_much_in_all(demands: Sequence[Demand], nodes: Sequence[Nodes]) -> bool:
    """Whether the sums alone say no; most that does not fit ends here."""
    return any(
        sum(d.count * grains(getattr(d, name)) for d in demands)
        > sum(n.count * grains(getattr(n, name)) for n in nodes)
        for name in ("cpus", "gpus")
    )


def _fewest_added(
    demands: Sequence[Demand], nodes: Sequence[Nodes], most_added: int | None
) -> int | None:
    """Cutting stock: how many nodes take which pattern, so that every unit has a place."""
    columns = [
        (kind, pattern) for kind, node in enumerate(nodes) for pattern in patterns(demands, node)
    ]
    counts = np.array([pattern for _, pattern in columns]).T
    kinds = np.array([kind for kind, _ in columns])
    of_kind = (kinds == np.arange(len(nodes))[:, None]).astype(int)
    added = np.array([nodes[kind].added for kind in kinds], dtype=int)
    limits = [
        (counts, [d.count for d in demands], np.inf),
        (of_kind, 0, [n.count for n in nodes]),
    ]
    if most_added is not None:
        limits.append((added[None], 0, most_added))
    solution = _solve(added, limits)
    return None if solution is None else int(added @ solution)


def _can_get_stuck(at: int, demands: Sequence[Demand], nodes: Sequence[Nodes]) -> bool:
    """Whether the other units can be placed so that one unit of group `at` finds no node.

    Every node must then hold a pattern that leaves no room for it, nodes that could be added included:
    they come when a unit waits.
    """
    columns = []
    for kind, node in enumerate(nodes):
        if math.prod(_most(demand, node) + 1 for demand in demands) > MOST_PATTERNS:
            return True
        held = all_patterns(demands, node)
        blocking = [p for p in held if not _holds(_one_more(p, at), demands, node)]
        columns += [(kind, pattern) for pattern in _least(blocking)]
    if {kind for kind, _ in columns} != set(range(len(nodes))):
        return False
    counts = np.array([pattern for _, pattern in columns]).T
    kinds = np.array([kind for kind, _ in columns])
    of_kind = (kinds == np.arange(len(nodes))[:, None]).astype(int)
    sizes = [n.count for n in nodes]
    others = [d.count - (group == at) for group, d in enumerate(demands)]
    limits = [(counts, 0, others), (of_kind, sizes, sizes)]
    return _solve(np.zeros(len(columns)), limits) is not None


def _solve(cost: np.ndarray, limits: Sequence[tuple[Any, Any, Any]]) -> np.ndarray | None:
    """Whole numbers of least cost within linear limits; None where there are none."""
    from scipy.optimize import LinearConstraint, milp

    result = milp(
        cost,
        integrality=np.ones(len(cost)),
        constraints=[LinearConstraint(matrix, low, high) for matrix, low, high in limits],
    )
    if result.x is None:
        assert "infeasible" in result.message, result.message
        return None
    return np.rint(result.x).astype(int)


def patterns(demands: Sequence[Demand], node: Nodes) -> list[tuple[int, ...]]:
    """How many units of each group one node can hold: every way that lets no unit of the last-filled
    group be added (with fewer of them nothing becomes possible)."""
    most = [_most(demand, node) for demand in demands]
    last = int(np.argmax(most))
    found = []
    for given in product(*(range(0 if at == last else n + 1, -1, -1) for at, n in enumerate(most))):
        for number in range(most[last], -1, -1):
            pattern = (*given[:last], number, *given[last + 1 :])
            if _holds(pattern, demands, node):
                found.append(pattern)
                break
    return found


def all_patterns(demands: Sequence[Demand], node: Nodes) -> Iterator[tuple[int, ...]]:
    """Every number of units of each group that one node can hold, none included."""
    for pattern in product(*(range(_most(demand, node) + 1) for demand in demands)):
        if _holds(pattern, demands, node):
            yield pattern


def _least(found: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that hold no other one of them."""
    kept: list[tuple[int, ...]] = []
    for pattern in sorted(found, key=sum):
        if not any(all(a <= b for a, b in zip(k, pattern, strict=True)) for k in kept):
            kept.append(pattern)
    return kept


def _one_more(pattern: tuple[int, ...], at: int) -> tuple[int, ...]:
    return tuple(n + (group == at) for group, n in enumerate(pattern))


def _most(demand: Demand, node: Nodes) -> int:
    """Units of one group alone that a node holds, at most all of them."""
    most = demand.count
    for need, free in (
        (grains(demand.cpus), grains(node.cpus)),
        (grains(demand.gpus), grains(node.gpus)),
        (demand.memory if node.memory else 0, node.memory),
    ):
        most = min(most, free // need) if need else most
    return most


def _holds(pattern: tuple[int, ...], demands: Sequence[Demand], node: Nodes) -> bool:
    """Whether one node holds these numbers of units."""
    units = list(zip(pattern, demands, strict=True))
    if sum(n * grains(d.cpus) for n, d in units) > grains(node.cpus):
        return False
    if node.memory and sum(n * d.memory for n, d in units) > node.memory:
        return False
    whole = sum(n * int(d.gpus) for n, d in units if d.gpus >= 1)
    cards = int(node.gpus)
    if whole > cards:
        return False
    shared = tuple(sorted(((grains(d.gpus), n) for n, d in units if n and 0 < d.gpus < 1)))
    rest = grains(node.gpus) - cards * GRAIN
    return _share(shared, (GRAIN,) * (cards - whole) + ((rest,) if rest else ()))


@lru_cache(maxsize=65_536)
def _share(units: tuple[tuple[int, int], ...], cards: tuple[int, ...]) -> bool:
    """Whether fractions of GPUs, (size, number) each, fit on cards with so much free each."""
    if not units:
        return True
    if sum(size * number for size, number in units) > sum(cards):
        return False
    if len(units) == 1:
        size, number = units[0]
        return sum(card // size for card in cards) >= number
    *smaller, (size, number) = units  # the largest first, on each card that differs
    left = (*smaller, (size, number - 1)) if number > 1 else tuple(smaller)
    for card in sorted({card for card in cards if card >= size}):
        at = cards.index(card)
        if _share(left, tuple(sorted((*cards[:at], *cards[at + 1 :], card - size)))):
            return True
    return False


def grains(amount: float) -> int:
    """CPUs or GPUs in Ray's resolution; what a node has is never more than it says."""
    return math.floor(amount * GRAIN + 0.5)
