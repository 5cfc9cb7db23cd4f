"""Rows, tables and plots out of made-up results."""

import pytest

from ray_synth.studies import plots
from ray_synth.studies.arm import REAL_ONLY, Arm
from ray_synth.studies.design import Study
from ray_synth.studies.results import Table, accuracy_table, as_table, choice, result_rows

ARMS = (
    Arm(REAL_ONLY, "real only"),
    Arm("whole", "the whole", 6.0),
    Arm("less", "less | of it", 6.0, {}, "whole"),
)
STUDY = Study("s", "A study", "Why?", ARMS, bns=("main", "average"), selects=True)


def results(**top1):
    return {
        bn: {"in_domain": {"top1": value}, "far": {"top1": value / 2}} for bn, value in top1.items()
    }


FOUND = {
    (REAL_ONLY, 0): results(main=80.0),
    (REAL_ONLY, 1): results(main=84.0),
    ("whole", 0): results(main=90.0, aux=70.0, average=88.0),
    ("whole", 1): results(main=92.0, aux=71.0, average=90.0),
    ("less", 0): results(main=89.0),
    ("less", 1): results(main=90.0),
}


def test_gains_and_changes_are_paired_by_seed():
    rows = {(r.arm.name, r.bn, r.test_set): r for r in result_rows(STUDY, FOUND)}
    assert ("whole", "aux", "in_domain") not in rows  # not a BN of this study
    whole = rows["whole", "main", "in_domain"]
    assert whole.gain.mean == pytest.approx(9.0) and whole.top1.mean == pytest.approx(91.0)
    assert rows["less", "main", "in_domain"].change.mean == pytest.approx(-1.5)
    assert rows["less", "main", "in_domain"].gain.mean == pytest.approx(7.5)
    assert rows["whole", "average", "far"].gain.mean == pytest.approx(44.5 - 41.0)
    assert rows[REAL_ONLY, "main", "in_domain"].gain is None
    assert whole.change.p <= whole.q


def test_changes_compare_the_same_bn_where_both_have_it():
    found = {key: dict(value) for key, value in FOUND.items()}
    found["less", 0] |= results(average=85.0)
    found["less", 1] |= results(average=86.0)
    rows = {(r.arm.name, r.bn): r for r in result_rows(STUDY, found) if r.test_set == "in_domain"}
    assert rows["less", "average"].change.mean == pytest.approx(-3.5)
    assert rows["less", "main"].change.mean == pytest.approx(-1.5)
    assert rows["whole", "average"].change.mean == pytest.approx(7.0), "real only has one BN"


def test_gains_have_their_q_where_nothing_else_is_compared():
    arms = tuple(Arm(arm.name, arm.label, arm.scale) for arm in ARMS)
    study = Study("s", "A study", "Why?", arms)
    rows = result_rows(study, FOUND)
    table = accuracy_table(study, rows)
    assert table.head[2:5] == ("in domain, top-1", "gain over real only", "q")
    shown = table.rows[1][4]
    assert float(shown) == pytest.approx(rows[2].q, abs=0.005)
    assert "corrected" in table.note and "changed against" not in table.head


def test_rows_are_told_in_the_order_of_the_arms_in_domain_first():
    order = [(r.arm.name, r.bn, r.test_set) for r in result_rows(STUDY, FOUND)]
    assert order[:3] == [
        (REAL_ONLY, "main", "in_domain"),
        (REAL_ONLY, "main", "far"),
        ("whole", "main", "in_domain"),
    ]


def test_the_table_has_all_and_cannot_be_broken_by_a_label():
    table = accuracy_table(STUDY, result_rows(STUDY, FOUND))
    lines = table.markdown().splitlines()
    assert "less \\| of it" in lines[5]
    assert {line.replace("\\|", "").count("|") for line in lines[:6]} == {len(table.head) + 1}
    assert table.rows[1][2] == "91.0 ± 12.7"
    assert "changed against" in table.head and table.rows[3][-1] == "the whole"


def test_the_parquet_has_a_line_a_seed():
    table = as_table(result_rows(STUDY, FOUND))
    assert table.num_rows == 2 * 2 * 4  # seeds, test sets, arms and BNs
    assert set(table["seed"].to_pylist()) == {0, 1}


def test_the_choice_is_by_the_validation_images():
    found = {
        key: {"main": {"validation": {"top1": r["main"]["in_domain"]["top1"]}}}
        for key, r in FOUND.items()
    }
    chosen = choice(STUDY, found)
    assert chosen.rows[0][0] == "the whole" and "the whole" in chosen.note
    assert choice(Study("s", "", "", ARMS), found) is None


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("plot", ["bars", "lines"])
def test_both_kinds_of_plot_are_drawn(plot, kind):
    arms = tuple(
        Arm(a.name, a.label, a.scale, {}, a.against, "line", a.scale or None) for a in ARMS
    )
    study = Study("s", "t", "q", arms, plot=plot)
    figure = plots.draw(study, result_rows(study, FOUND))
    assert len(figure.axes) == 2
    data = plots.save(figure, kind)
    assert data.startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_one_seed_gives_a_table_without_intervals():
    found = {key: value for key, value in FOUND.items() if key[1] == 0}
    table = accuracy_table(STUDY, result_rows(STUDY, found))
    assert "±" not in table.markdown() and "no interval" in table.note
    assert isinstance(table, Table)
    plots.draw(STUDY, result_rows(STUDY, found))
