"""Acceptance by scene, and contexts and styles that fail for sure are drawn less."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from ray_synth.errors import UserError
from ray_synth.generation.acceptance import NEEDED, SCENES, Acceptance, least_accepted, wilson
from ray_synth.generation.draws import DRAWS, PASSES, EarlierRun, draws, draws_of, prior
from ray_synth.meaning.answers import FIELDS
from ray_synth.prompting.contexts import Context, contextual_prompt
from ray_synth.prompting.plan import ClassPrompts, make_plan
from ray_synth.prompting.styles import Style
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.folder import Folder

NIGHT = Context("by a tree", "in a forest", "at night", "from above")
DUSK = Context("by a tree", "on a road", "at dawn, dusk", "from above")
DAY = Context("on a rock", "in a field", "in daylight", "close-up")
NOON = Context("on a rock", "on a road", "at noon", "close-up")
CONTEXTS = [NIGHT, DUSK, DAY, NOON]
CLASSES = ("owl", "cat")
LIMIT = {"count_tokens": lambda text: len(text.split()), "max_tokens": 64}


def row(name: str, prompt: str, passed: bool, *, kind="contextual", style="", attempt=0) -> dict:
    reason = "" if passed else "another class: nearer to 'dog'"
    values = (kind, style, name, prompt, attempt, reason)
    return dict(zip(NEEDED, values, strict=True))


def image_rows() -> list[dict]:
    """20 images of each context and class: at night 2 pass of them, else 16; and of two styles."""
    rows = []
    for name in CLASSES:
        for context in CONTEXTS:
            prompt = contextual_prompt(name, "", context, **LIMIT)
            good = 2 if context is NIGHT else 16
            rows += [row(name, prompt, number < good) for number in range(20)]
        for style, good in (("oil", 9), ("pixels", 1)):
            rows += [
                row(name, f"{style} of a {name}", n < good, kind="stylized", style=style)
                for n in range(10)
            ]
    return rows


@pytest.fixture
def earlier(tmp_path) -> Folder:
    """A run of which the checks have looked at `image_rows`."""
    run = Folder(tmp_path / "earlier")
    items = [
        {"context": {field: getattr(context, field) for field in FIELDS}, "source": "llm"}
        for context in CONTEXTS
    ]
    classes = {name: {"contexts": items, "raw": [], "refused": 0} for name in CLASSES}
    run.write_json("contexts.json", {"digest": "d", "classes": classes})
    counts = Acceptance()
    rows = image_rows()
    for start in range(0, len(rows), 32):  # as parts of a store come
        counts.add(pa.Table.from_pylist(rows[start : start + 32]))
    counts.save(run)
    return run


def test_scenes_are_counted_by_class_and_by_phrase(earlier):
    found = earlier.child("quality").read_json("acceptance.json")
    assert found["kind"] == {"contextual": [100, 160], "stylized": [20, 40]}
    assert found["lighting"]["at night"] == [4, 40]
    assert found["lighting"]["at dawn, dusk"] == [32, 40]  # a phrase with a comma is one
    assert found["camera_angle"] == {"from above": [36, 80], "close-up": [64, 80]}
    assert next(iter(found["lighting"])) == "at night"
    scenes = earlier.child("quality").read_table(SCENES).to_pylist()
    assert len(scenes) == len(CLASSES) * len(CONTEXTS)
    assert sum(scene["made"] for scene in scenes) == 160
    ((text, passed, made, low, high), *_) = found["scenes"]["owl"]["worst"]
    assert (text, passed, made) == ("by a tree, in a forest, at night, from above", 2, 20)
    assert 0 < low < 0.1 < high < 0.35
    best = [scene for scene, *_ in found["scenes"]["owl"]["best"]]
    assert text not in best


def test_a_prompt_that_was_cut_counts_for_what_it_says():
    counts = Acceptance()
    cut = contextual_prompt("owl", "", NIGHT, **{**LIMIT, "max_tokens": 13})
    assert "from above" not in cut
    counts.add(pa.Table.from_pylist([row("owl", cut, True), row("owl", "a photo of it", False)]))
    contexts = {"owl": {"contexts": [{"context": vars(NIGHT)}, {"context": vars(DUSK)}]}}
    scenes = {tuple(scene.values()) for scene in counts.scenes(contexts).to_pylist()}
    assert ("owl", "by a tree", "in a forest", "at night", "", 1, 1) in scenes
    assert ("owl", "", "", "", "", 0, 1) in scenes


def test_each_attempt_counts():
    counts = Acceptance()
    rows = [row("owl", "p", True, attempt=2), row("owl", "p", False, attempt=2)]
    counts.add(pa.Table.from_pylist([*rows, row("owl", "p", True)]))
    assert counts.as_dict()["class_name"]["owl"] == [2, 7]


def test_intervals_are_wilsons_and_few_images_say_little():
    for passed, made in ((0, 1), (1, 1), (3, 7), (90, 100)):
        known = binomtest(passed, made).proportion_ci(method="wilson")
        assert wilson(passed, made) == pytest.approx((known.low, known.high))
    assert wilson(0, 0) == (0, 1)
    found = {"style": {"none of one": [0, 1], "one of twenty": [1, 20], "all": [20, 20]}}
    assert [name for name, *_ in least_accepted(found, "style", 2)] == [
        "one of twenty", "none of one",
    ]  # fmt: skip


def test_few_images_say_little_and_chance_says_nothing():
    passed, made = np.array([0, 0, 2, 16, 0]), np.array([0, 1, 20, 20, 400])
    assert draws(passed, made, 0.8, 4.0).tolist() == [PASSES, 6, 2, PASSES, 1]
    assert draws(passed, made, 0.8, math.inf).tolist() == [PASSES] * 5
    assert draws([0], [50], 0.0, 4.0).tolist() == [PASSES]  # nothing passes: none is worse
    rng = np.random.default_rng(0)
    made = np.full(20_000, 10)
    for true in (2.0, 20.0):  # the strength of the prior that the shares come from is found again
        shares = rng.beta(0.4 * true, 0.6 * true, size=20_000)
        assert prior(rng.binomial(10, shares), made, 0.4) == pytest.approx(true, rel=0.25)
    alike = prior(rng.binomial(10, 0.4, size=20_000), made, 0.4)
    assert alike > 100
    assert draws([0], [10], 0.4, alike).tolist()[0] >= PASSES - 1


def test_an_earlier_run_says_how_often_contexts_and_styles_are_drawn(earlier):
    run = EarlierRun(earlier)
    night, dusk, day, noon = run.context_draws("owl", CONTEXTS)
    assert night < PASSES / 2
    assert day == noon == PASSES
    assert PASSES / 2 < dusk <= PASSES
    elsewhere = Context("in a hat", "on a bench", "at night", "tilted")
    # of a class that it did not have, a phrase that failed elsewhere is known, and others are not
    assert run.context_draws("dog", [elsewhere, DAY])[0] < PASSES / 2
    assert run.context_draws("dog", [elsewhere, DAY])[1] == PASSES
    oil, pixels, new = run.style_draws(["oil", "pixels", "new"])
    assert pixels < oil == new == PASSES


def planned(classes, styles, style_draws=(), num_images=1600) -> pa.Table:
    return make_plan(
        classes, num_images=num_images, mix={"contextual": 1, "stylized": 1}, styles=styles,
        negative_prompt="", fingerprint="g", seed=0, style_draws=style_draws,
        **LIMIT,
    )  # fmt: skip


def test_what_failed_is_drawn_less_and_the_same_plan_comes_again(earlier, tmp_path):
    contexts = [(context, "llm") for context in CONTEXTS]
    classes = [ClassPrompts(i, name, name, contexts) for i, name in enumerate(CLASSES)]
    styles = [Style(name, f"{name} of {{subject}}") for name in ("oil", "pixels")]
    folder = Folder(tmp_path / "run")
    drawn, of_styles = draws_of(str(earlier.uri), classes, styles, folder)
    kept = folder.read_json(DRAWS)
    assert kept["styles"] == dict(zip(("oil", "pixels"), of_styles, strict=True))
    assert kept["contexts"]["owl"] == drawn[0].context_draws
    plan = planned(drawn, styles, of_styles)
    by_style = Counter(plan["style"].to_pylist())
    assert by_style["pixels"] / by_style["oil"] == pytest.approx(of_styles[1] / PASSES, rel=0.05)
    at_night = Counter("at night" in p for p in plan["prompt"].to_pylist())[True]
    share = sum(c.context_draws[0] for c in drawn) / sum(sum(c.context_draws) for c in drawn)
    assert at_night / 1600 == pytest.approx(share, rel=0.1)
    first = planned(drawn, styles, of_styles, num_images=200)
    assert first.equals(plan.slice(0, 200))  # any prefix, as without draws
    # what all do equally often is what no draws are
    even = [
        ClassPrompts(c.class_index, c.class_name, c.meaning, contexts, context_draws=[3] * 4)
        for c in classes
    ]
    assert planned(even, styles, [5, 5]).equals(planned(classes, styles))


def test_items_of_a_pass_come_as_evenly_as_their_draws_say():
    from ray_synth.prompting.plan import _Cycles, _deck

    counts = [8, 4, 1, 8]
    cycles = _Cycles([_deck(counts)], [(0, 0)], 1)
    turns = [cycles.at(np.array([0]), np.array([turn])) for turn in range(210)]
    drawn = np.concatenate(turns)
    assert np.bincount(drawn).tolist() == [80, 40, 10, 80]
    for start in range(0, 210, 21):  # in a deck no item of the most is more than a pass behind
        early = np.bincount(drawn[start : start + 11], minlength=4)
        assert abs(early[0] - early[3]) <= 1


def test_a_run_whose_images_were_not_checked_is_refused(earlier, tmp_path):
    with pytest.raises(UserError, match=r"has no quality/acceptance\.json; name a run"):
        EarlierRun(Folder(tmp_path / "nowhere"))
    earlier.child("quality").write_json("acceptance.json", {"style": {"oil": ["1", 2]}})
    with pytest.raises(DamagedFile, match="style 'oil' has no two numbers"):
        EarlierRun(earlier)
    earlier.child("quality").write_json("acceptance.json", {"style": {}})
    earlier.child("quality").write_table(SCENES, pa.table({"class_name": ["owl"]}))
    with pytest.raises(DamagedFile, match="other columns"):
        EarlierRun(earlier)
