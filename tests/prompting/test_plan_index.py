"""Positions by id: right for every id, whatever it looks like, and whoever its neighbours are."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from ray_synth.prompting.plan_index import PlanIndex, id_keys

DIGESTS = st.integers(0, 10**9).map(lambda i: hashlib.sha256(b"%d" % i).hexdigest()[:24])
IDS = st.lists(st.one_of(DIGESTS, st.text(max_size=24)), unique=True, max_size=30)


@given(IDS, IDS, st.integers(1, 7))
def test_rows_are_found_by_id_and_others_are_not(ids, others, step):
    index = PlanIndex(ids[at : at + step] for at in range(0, len(ids), step))
    places = {sample_id: at for at, sample_id in enumerate(ids)}
    asked = [*others, *reversed(ids)]
    assert index.positions(asked).tolist() == [places.get(sample_id, -1) for sample_id in asked]


@given(IDS)
def test_the_key_of_an_id_is_its_own(ids):
    assert id_keys(ids).tolist() == [int(id_keys([one])[0]) for one in ids]
