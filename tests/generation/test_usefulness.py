"""Of several candidates the hardest that is right is kept, whatever batch it was in, and made again."""

import json

import numpy as np
import pytest
from learners import guiding, publish
from painting import Painter
from test_maker import config, maker
from test_regenerate import EMBEDDED, PAINTED, edit_row, run_of
from test_store import plan_rows
from tiny import embedded

from ray_synth.config import GenerationConfig, PracticeSelectConfig, QualityConfig
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.generation.cost import earlier_attempts
from ray_synth.generation.maker import attempt_seed
from ray_synth.generation.regenerate import regenerate
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import check_steering
from ray_synth.generation.usefulness import Attempt, choose
from ray_synth.generators.learner import Steering, SteeringLearner
from ray_synth.generators.registry import fingerprint
from ray_synth.storage.folder import Folder

FACTOR = 3
KEPT = ("sample_id", "attempt", "image", "accepted", "reject_reason")


def selecting(run, number=0, **learner):
    name = publish(run, number, size=16, **learner)
    return Steering(run, name, select=PracticeSelectConfig(factor=FACTOR))


def kept(rows):
    return [{name: row[name] for name in KEPT} for row in rows]


def candidate(attempt, accepted=True, reason=""):
    return {
        "sample_id": "a", "attempt": attempt, "accepted": accepted, "reject_reason": reason,
        "gpu_seconds": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([(candidate(0), 0.2), (candidate(1), 0.9), (candidate(2), 0.5)], 1),
        ([(candidate(0), 0.2), (candidate(1, False, "blank"), 0.9), (candidate(2), 0.5)], 2),
        ([(candidate(0, True, "another class"), 0.9), (candidate(1), 0.0)], 1),  # policy: flag
        ([(candidate(0, True, "another class"), 0.2), (candidate(1, True, "blank"), 0.9)], 0),
        ([(candidate(0, False, "refused"), None), (candidate(1, True, "blank"), 0.1)], 1),
        ([(candidate(0), 0.50001), (candidate(1), 0.50002)], 0),
    ],
)
def test_the_hardest_that_is_right_is_kept(candidates, best):
    tries = [Attempt([row], [], [entropy]) for row, entropy in candidates]
    chosen = choose(tries)
    assert chosen.made[0]["attempt"] == best
    assert chosen.made[0]["gpu_seconds"] == len(candidates), "all candidates are paid for"


def test_what_is_kept_is_the_hardest_candidate_and_says_so(tmp_path):
    run = Folder(tmp_path / "run")
    steering = selecting(run)
    rows = plan_rows(6)
    made = maker(tmp_path / "images", rows, config(), steering=((0, steering),))
    out = made.chunk(0, 4, []) + made.chunk(4, 6, [])
    learner = SteeringLearner(steering, "cpu")
    painter = Painter(config())
    for row in out:
        images = painter.generate(
            [{**row, "seed": attempt_seed(row["seed"], attempt)} for attempt in range(FACTOR)]
        )
        entropies = learner.entropies(images)
        best = int(np.argmax(np.round(entropies, 3)))
        assert row["attempt"] == best
        assert (np.asarray(decode_image(row["image"])) == np.asarray(images[best])).all()
        facts = json.loads(row["generator"])
        assert facts["fingerprint"] == fingerprint(config()), "what made it is what it was"
        assert facts["steering"] == {
            "learner": "practice/learner-000", "arm": "mixed", "bn": "main",
            "version": steering.version, "factor": FACTOR, "entropy": round(entropies[best], 2),
        }  # fmt: skip
    assert len({row["attempt"] for row in out}) > 1
    assert len(made.store.parts()) == 2
    assert made.store.rejected.parts() == [], "what is passed over is counted, not kept"


def test_it_is_the_same_in_any_batch_and_after_an_interruption(tmp_path):
    run = Folder(tmp_path / "run")
    rows = plan_rows(6)
    steering = selecting(run)
    first = maker(tmp_path / "a", rows, config(), steering=((0, steering),))
    whole = first.chunk(0, 6, [])
    alone = [
        maker(tmp_path / f"b{at}", rows, config(), steering=((0, steering),)).chunk(at, at + 1, [])[
            0
        ]
        for at in range(6)
    ]
    assert kept(alone) == kept(whole)
    again = maker(tmp_path / "a", rows, config(), steering=((0, steering),))
    assert kept(again.chunk(0, 6, first.store.parts())) == kept(whole)
    assert again._models.generator is None, "nothing was made again"


def test_what_no_candidate_of_passes_is_tried_with_further_seeds(tmp_path):
    run = Folder(tmp_path / "run")
    rows = plan_rows(3)
    blank = [attempt_seed(rows[1]["seed"], attempt) for attempt in range(FACTOR)]
    blank += [attempt_seed(rows[2]["seed"], attempt) for attempt in range(FACTOR + 2)]
    settings = config("retry", blank_seeds=blank)
    made = maker(tmp_path / "images", rows, settings, steering=((0, selecting(run)),))
    out = made.chunk(0, 3, [])
    assert [row["accepted"] for row in out] == [True, True, False]
    assert out[0]["attempt"] < FACTOR
    assert [row["attempt"] for row in out[1:]] == [FACTOR, FACTOR + 1]
    assert len(earlier_attempts(made.store)) == 3


def test_rows_that_raise_end_nothing(tmp_path):
    rows = plan_rows(4)
    rows[2]["prompt"] = "cursed"
    made = maker(
        tmp_path / "images",
        rows,
        config(fail="cursed"),
        steering=((0, selecting(Folder(tmp_path))),),
    )
    assert [row["accepted"] for row in made.chunk(0, 4, [])] == [True, True, False, True]


def test_a_chosen_image_is_made_again_without_the_learner(tmp_path):
    steering = selecting(Folder(tmp_path / "run"))
    rows = plan_rows(4)
    run = run_of(tmp_path, PAINTED, rows, checks={"policy": "off"}, steering=((0, steering),))
    for name in ("mixed.json", "mixed.main.safetensors"):
        run.child(f"{steering.learner}/models").delete(name)
    for row in rows:
        assert regenerate(run, row["sample_id"]).identical


def test_a_guided_and_chosen_image_is_made_again_alone_while_its_learner_is_there(tmp_path):
    home = Folder(tmp_path / "run")
    guided = guiding(home, size=32)
    both = Steering(home, guided.learner, guided.guidance, PracticeSelectConfig(factor=2))
    plain = {**EMBEDDED, "checks": {"policy": "off"}}
    run = run_of(tmp_path, plain, plan_rows(5), steering=((0, both),))
    store = ImageStore(run.child("images"))
    rows = [row for name in store.parts() for row in store.read(name).to_pylist()]
    assert {json.loads(row["generator"])["fingerprint"] for row in rows} == {
        both.fingerprint(fingerprint(GenerationConfig(**EMBEDDED)))
    }
    chosen = next(row for row in rows if row["attempt"] == 1)
    found = regenerate(run, chosen["sample_id"])
    assert found.identical, found.describe()
    publish(home, size=32, sure=1.0)
    with pytest.raises(UserError, match="other weights"):
        regenerate(run, chosen["sample_id"])
    run.child(f"{guided.learner}/models").delete("mixed.json")
    with pytest.raises(UserError, match="no learner in"):
        regenerate(run, chosen["sample_id"])


def test_a_row_that_says_a_plug_in_was_guided_is_refused(tmp_path):
    run = run_of(tmp_path, PAINTED, plan_rows(2), checks={"policy": "off"})
    guided = guiding(run)
    store = ImageStore(run.child("images"))
    facts = json.loads(store.read(store.parts()[0])["generator"][0].as_py())
    said = json.dumps({**facts, "steering": guided.facts()})
    with pytest.raises(UserError, match="is for diffusers pipelines"):
        regenerate(run, edit_row(run, generator=said))


def test_what_a_learner_cannot_steer_is_refused_before_anything_is_made(tmp_path):
    run = Folder(tmp_path / "run")
    rows = plan_rows(2)

    def job(settings, steering):
        return maker(
            tmp_path / "images", rows, settings, steering=((0, steering),) if steering else ()
        ).job

    checked = config().model_copy(update={"checks": QualityConfig(policy="reject")})
    check_steering(job(config(), None))
    check_steering(job(checked, selecting(run)))
    with pytest.raises(UserError, match="only the label check says what is right"):
        check_steering(job(config(), selecting(run)))
    with pytest.raises(UserError, match="is for diffusers pipelines"):
        check_steering(job(checked, guiding(run)))
    with pytest.raises(UserError, match="no learner in"):
        check_steering(job(checked, Steering(run, "practice/learner-009")))


def test_rows_of_one_chunk_are_each_steered_by_the_learner_of_their_own(tmp_path):
    """A batch may hold the end of one round and the start of the next."""
    home = Folder(tmp_path / "run")
    first, second = guiding(home, 1), guiding(home, 2)
    later = Steering(home, second.learner, second.guidance, PracticeSelectConfig(factor=2))
    rows = plan_rows(6)
    settings = embedded()
    steered = ((2, first), (4, later))
    mixed = maker(tmp_path / "mixed", rows, settings, steering=steered).chunk(0, 6, [])
    for at, steering in enumerate([None, None, first, first, later, later]):
        alone = maker(
            tmp_path / f"alone{at}", rows, settings, steering=((0, steering),) if steering else ()
        )
        (row,) = alone.chunk(at, at + 1, [])
        assert kept([row]) == kept([mixed[at]])
        assert row["generator"] == mixed[at]["generator"]
        learner = json.loads(row["generator"]).get("steering", {}).get("learner")
        assert learner == (steering.learner if steering else None)
