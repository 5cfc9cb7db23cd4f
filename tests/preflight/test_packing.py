"""The packing against a reference that tries every place for every unit."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.preflight.packing import Demand, Nodes, pack


def reference(demands, nodes, most_added=None):
    """(fits, an unlucky order can leave a unit without a place), by trying all places.

    Nodes are lists [free CPUs, free GPU cards]; tenths, so that sums are exact.
    """
    units = tuple(sorted((d.cpus, d.gpus) for d in demands for _ in range(d.count)))
    start = tuple(
        (round(10 * n.cpus), tuple([10] * int(n.gpus)), n.added)
        for n in nodes
        for _ in range(n.count)
    )

    def places(unit, state):
        """Every state after one unit is placed; added nodes count when they are first used."""
        cpus, gpus = round(10 * unit[0]), round(10 * unit[1])
        for at, (free, cards, added) in enumerate(state):
            if free < cpus:
                continue
            if gpus >= 10:
                full = [i for i, card in enumerate(cards) if card == 10]
                choices = [full[: gpus // 10]] if len(full) >= gpus // 10 else []
                taken = 10
            else:
                choices = [[i] for i, card in enumerate(cards) if card >= gpus] if gpus else [[]]
                taken = gpus
            for chosen in choices:
                left = tuple(sorted(c - taken * (i in chosen) for i, c in enumerate(cards)))
                yield (*state[:at], (free - cpus, left, added), *state[at + 1 :])

    def used(state):
        return sum(now != then and now[2] for now, then in zip(state, start, strict=True))

    @cache
    def fits(rest, state):
        if most_added is not None and used(state) > most_added:
            return False
        if not rest:
            return True
        return any(fits(rest[1:], after) for after in places(rest[0], state))

    @cache
    def stuck(rest, state):
        for at, unit in enumerate(rest):
            after = list(places(unit, state))
            if not after:
                return True
            if any(stuck((*rest[:at], *rest[at + 1 :]), one) for one in after):
                return True
        return False

    fitting = fits(tuple(reversed(units)), start)
    return fitting, fitting and stuck(units, start)


tenths = st.integers(0, 30).map(lambda n: n / 10)
gpu_shares = st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0, 2.0])
demand = st.builds(Demand, st.just("units"), st.integers(1, 3), tenths, gpu_shares)
node = st.builds(
    Nodes,
    st.integers(1, 2),
    st.integers(0, 40).map(lambda n: n / 10),
    st.integers(0, 2).map(float),
    added=st.booleans(),
)


@given(st.lists(demand, min_size=1, max_size=3), st.lists(node, min_size=1, max_size=2))
@settings(max_examples=400, deadline=None)
def test_the_packing_agrees_with_a_reference_that_tries_all_places(demands, nodes):
    fitting, _ = reference(demands, nodes)
    assert (pack(demands, nodes) is not None) == fitting


@given(
    st.lists(demand, min_size=1, max_size=3),
    st.lists(node, min_size=1, max_size=2),
    st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_no_more_nodes_are_added_than_may_come(demands, nodes, most):
    found = pack(demands, nodes, most)
    assert (found is not None) == reference(demands, nodes, most)[0]
    assert found is None or found.added <= most


whole_shares = st.sampled_from([0.0, 0.0, 1.0, 2.0])
whole_demand = st.builds(
    Demand, st.just("units"), st.integers(1, 2), st.integers(1, 3).map(float), whole_shares
)


@given(st.lists(whole_demand, min_size=1, max_size=3), st.lists(node, min_size=1, max_size=2))
@settings(max_examples=200, deadline=None)
def test_a_placement_is_sure_where_no_order_of_placing_gets_stuck(demands, nodes):
    found = pack(demands, nodes)
    if found is not None:
        assert found.sure == (not reference(demands, nodes)[1])


def test_large_clusters_are_packed_at_once():
    nodes = [Nodes(1, 8), Nodes(1000, 8, 1, added=True), Nodes(20, 192, 8, added=True)]
    demands = [
        Demand("workers", 128, 7, 1),
        Demand("pool", 900, 1, 0.5),
        Demand("read", 1, 1),
    ]
    found = pack(demands, nodes)
    assert found is not None
    assert found.added == 20 + 418  # 578 GPUs, 8 each on the large ones
