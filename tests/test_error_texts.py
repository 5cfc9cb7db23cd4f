"""What users are told: nearest names, long lists cut short, durations; and the package's face."""

import subprocess
import sys

import pytest

import ray_synth
from ray_synth.errors import did_you_mean, duration, shortened


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"), (9.96, "10 s"), (12.4, "12 s"), (59.7, "60 s"), (150, "2 min"),
        (185, "3 min"), (3600, "1 h"), (7500, "2 h 5 min"), (7800, "2 h 10 min"),
        (3e5, "3 d 11 h"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_nearest_name_is_given_or_else_the_known_ones():
    assert did_you_mean("crnae", ["crane", "cat"]) == "did you mean 'crane'?"
    assert did_you_mean("bats", ["bath", "cats"], most=2) == "did you mean 'cats' or 'bath'?"
    assert did_you_mean("xyz", ["crane", "cat"], known_as="classes") == "classes: cat, crane"
    assert did_you_mean("xyz", range(32)).endswith("7 and 2 more")


def test_long_lists_are_cut_and_counted():
    assert shortened(["a", "b"], 2) == "a, b"
    assert shortened(["a", "b", "c"], 1, what="classes") == "a and 2 more classes"
    assert shortened(["a (1, 2)", "b", "c"], 2, joint="; ") == "a (1, 2); b and 1 more"


def test_the_package_is_light_and_its_public_names_are_there():
    heavy = ("ray", "torch", "pydantic", "pyarrow", "numpy")
    code = f"import sys, ray_synth; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name in ray_synth.__all__:
        assert getattr(ray_synth, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        ray_synth.no_such_name  # noqa: B018
