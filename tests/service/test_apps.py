"""Whose an app of a pipeline is, by its name; the real Serve is in tests/cluster/test_preflight.py."""

import pytest

from ray_synth.service.apps import APP_NAME, is_ours

OTHERS = {"02000000", "03000000"}  # drivers that live, without this one


@pytest.mark.parametrize(
    ("app", "others", "ours"),
    [
        (f"{APP_NAME}-quickstart-01000000", OTHERS, True),  # this driver's, or a dead one's
        (f"{APP_NAME}-quickstart-02000000", OTHERS, False),  # a run of the same name
        (f"{APP_NAME}-my-run-02000000-03000000", OTHERS, False),
        (f"{APP_NAME}-my-run-02000000-04000000", OTHERS, True),
        ("somebodys", set(), False),
        ("somebodys-01000000", OTHERS, False),
        (APP_NAME, OTHERS, False),  # of an older version, perhaps at work
        (APP_NAME, set(), True),
    ],
)
def test_an_app_is_ones_own_or_was_left_behind_or_is_somebody_elses(app, others, ours):
    assert is_ours(app, others) is ours
