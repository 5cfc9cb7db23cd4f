"""Where gains stop, from made-up results over scales."""

from ray_synth.studies.arm import Arm
from ray_synth.studies.design import Study
from ray_synth.studies.results import result_rows
from ray_synth.studies.saturation import saturation_tables

SCALES = (1.0, 6.0, 12.0, 24.0)


def table(*top1_by_seed, scales=SCALES):
    """The one line of a study whose arm at each scale has these values, one list per seed."""
    arms = tuple(Arm(f"dual_{x:g}x", f"{x:g}x", x, line="dual BN", x=x) for x in scales)
    found = {
        (arm.name, seed): {"main": {"in_domain": {"top1": values[at]}}}
        for at, arm in enumerate(arms)
        for seed, values in enumerate(top1_by_seed)
    }
    rows = result_rows(Study("s", "t", "q", arms), found)
    found_tables = saturation_tables(rows)
    return found_tables[0].rows[0] if found_tables else None


def test_it_stops_where_no_larger_scale_gains_for_sure():
    line = table([80.0, 90.0, 90.2, 89.9], [70.0, 80.0, 79.8, 80.1], [75.0, 85.1, 85.2, 85.0])
    assert line[3:5] == ("12x", "6x")
    assert line[5].startswith("12x to 24x: -0.1")


def test_it_has_not_stopped_where_the_last_step_gains_for_sure():
    line = table([80.0, 85.0, 90.0, 95.0], [70.0, 75.1, 80.0, 85.0], [75.0, 80.0, 85.1, 90.0])
    assert line[3:5] == ("24x", "24x")
    assert line[6].startswith("6x to 24x: +10.0")


def test_noise_is_no_gain():
    line = table([80.0, 95.0, 80.0, 90.0], [80.0, 78.0, 95.0, 79.0])
    assert line[4] == "1x"


def test_one_seed_can_be_sure_of_nothing_and_one_scale_is_no_line():
    assert table([80.0, 85.0, 90.0, 95.0])[3:5] == ("24x", "1x")
    assert table([80.0], scales=(1.0,)) is None
