"""When training saves before a node goes."""

import math

from hypothesis import given
from hypothesis import strategies as st

from ray_synth.cluster.preemption import LAST_S, SaveTimes


@given(
    notice_s=st.floats(LAST_S, 600),
    look_s=st.floats(0.1, 5),
    goes=st.floats(0, 1),
)
def test_less_is_lost_than_was_left_and_saves_are_few(notice_s, look_s, goes):
    """A node may go at any moment of its notice; looks are `look_s` apart."""
    times, saves, now, gone = SaveTimes(), [], 0.0, goes * notice_s
    while now <= gone:
        if times.due("notice", notice_s - now):
            saves.append(now)
        now += look_s
    assert saves[0] == 0, "at once"
    left = notice_s - saves[-1]
    assert gone - saves[-1] <= left
    if left > LAST_S:
        assert gone - saves[-1] <= left / 2 + look_s
    assert len(saves) <= 2 + math.log2(notice_s / LAST_S)


def test_another_node_s_notice_is_saved_for_anew():
    times = SaveTimes()
    assert times.due("one", 60)
    assert not times.due("one", 50)
    assert times.due("two", 50)
    assert not times.due("two", 26)
    assert times.due("two", 25)
