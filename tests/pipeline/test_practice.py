"""The loop of rounds: killed at any point, the same command goes on to the same rounds.

No Ray: images and training are stood in for; the real ones are in tests/e2e/test_practice_runs.py.
"""

import hashlib
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.errors import UserError
from ray_synth.pipeline.dry_run import dry_run
from ray_synth.pipeline.kept import check_kept
from ray_synth.pipeline.next_round import _scenes_drawn, reads_apart
from ray_synth.pipeline.practice import Work, practise
from ray_synth.pipeline.records import StageRecords
from ray_synth.pipeline.results import saved
from ray_synth.pipeline.run import Run, begin, check_run
from ray_synth.pipeline.sets import inspect_training
from ray_synth.pipeline.steps import kept_prompts, resolve_meanings, write_plan
from ray_synth.prompting.contexts import Context
from ray_synth.prompting.plan import ClassPrompts
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.prompting.rounds import read_rounds
from ray_synth.stages import stage_inputs
from ray_synth.storage.folder import Folder
from ray_synth.training.scores import packed, unpacked

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
SETTINGS = [
    "meaning.enabled=false", "prompting.contexts_per_class=0", "generation.generator=glyphs",
    "prompting.mix={plain: 1, stylized: 1}", "prompting.multiplier=4", "data.validation=5",
    "generation.checks.policy=off", "tracking.enabled=false",
    "training.feed=stored", "training.steps=40", "prompting.practice={rounds: 4}",
]  # fmt: skip


class Killed(BaseException):
    """What a process that is killed does not live to see."""


def opened(root: Path, *settings: str) -> Run:
    config = load_config(QUICKSTART, [f"runs_dir={root}", *SETTINGS, *settings])
    run = check_run(config)
    check_kept(run)
    begin(run)
    run.records.run("data", lambda: inspect_training(run.config, run.sets, run.records, run.folder))
    run.records.run("meaning", lambda: resolve_meanings(run, None))
    run.records.run("plan", lambda: write_plan(run, None))
    return run


class Cluster:
    """Stands in for generation, training and scoring: what each leaves follows from what it is given.

    Args:
        life: how many of the loop's steps it lives; it dies before or after the one that follows.
        good: the share of images that the learner has right, by round.
    """

    def __init__(self, run: Run, life: int = 10**6, good: float = 0.5) -> None:
        self.run, self.left, self.good = run, life, good

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    @property
    def made(self) -> list[str]:
        name = "images/made.json"
        return self.run.folder.read_json(name) if self.run.folder.exists(name) else []

    def fill(self, most: int | None = None) -> None:
        """Make what is missing; `most`: no more than so many."""
        self._live()
        made = self.made
        planned = PlanFile(self.run.folder).ids_of(0, 10**6)
        missing = [i for i in planned if i not in set(made)]
        self.run.folder.write_json("images/made.json", made + missing[:most])
        self._live()

    def train(self, *, num_synthetic, stop, begin, fresh_from, segment, publish, resume) -> None:
        """Goes on from the newest checkpoint; its weights are a digest of all that it saw."""
        self._live()
        rows = [card["rows"] for card in read_rounds(self.run.folder)]
        assert num_synthetic == sum(rows)
        assert fresh_from in (sum(rows[:-1]), 0)
        if self.run.config.training.feed != "stored":
            assert set(self.made) >= set(PlanFile(self.run.folder).ids_of(0, fresh_from))
            self.fill(most=30)  # it ends before all are made
            self.fill(most=15)
            self.stream(begin, stop, segment, publish)
            return
        name = "checkpoints/newest.json"
        newest = {"step": 0, "weights": ""}
        if self.run.folder.exists(name):
            newest = self.run.folder.read_json(name)
        assert newest["step"] <= stop
        assert len(self.made) == num_synthetic, "all images of these rounds, and no others"
        for step in range(newest["step"], stop):
            seen = f"{newest['weights']}:{step}:{segment}:{self.made[step % num_synthetic]}"
            newest = {"step": step + 1, "weights": hashlib.sha256(seen.encode()).hexdigest()}
            if (step + 1) % 7 == 0:
                self.run.folder.write_json(name, newest)
        publish.write_json("models/mixed.json", newest)
        self._live()
        self.run.folder.write_json(name, newest)
        self._live()

    def stream(self, begin, stop, segment, publish) -> None:
        """As `train`, in lockstep: what is seen at a step is a function of it and its part."""
        name = "checkpoints/newest.json"
        there = self.run.folder.exists(name)
        newest = self.run.folder.read_json(name) if there else {"step": 0, "weights": ""}
        assert begin <= newest["step"] <= stop
        for step in range(newest["step"], stop):
            seen = f"{newest['weights']}:{step - begin}:{segment}"
            newest = {"step": step + 1, "weights": hashlib.sha256(seen.encode()).hexdigest()}
        publish.write_json("models/mixed.json", newest)
        self._live()
        self.run.folder.write_json(name, newest)
        self._live()

    def score(self, run, number, learner, cards) -> dict:
        self._live()
        weights = learner.read_json("models/mixed.json")["weights"]
        names = run.train.class_names
        doubts = [int(weights[2 * at : 2 * at + 2], 16) / 256 for at in range(len(names))]
        classes = [
            {"class_name": name, "images": 50, "doubt": doubt, "error": doubt,
             "confused": [[names[at - 1], doubt / 2, 1]]}
            for at, (name, doubt) in enumerate(zip(names, doubts, strict=True))
        ]  # fmt: skip
        right = [at < self.good * 9_000 for at in range(9_000)]
        self._live()
        return {
            "learner": {"main": weights},
            "real": {"classes": classes, "right": packed(right), "looked_at": 9_000},
            "synthetic": {
                name: {"plain": {"images": 9, "entropy": doubts[0]}} for name in ("kind", "style")
            }
            | {"accepted": {"kind": {"plain": [9, 9]}, "style": {}}},
        }


def go(run: Run, cluster: Cluster) -> dict:
    """The loop of rounds, which needs no test set."""
    sealed = replace(run, sets=replace(run.sets, tests={}))
    work = Work(
        fill=cluster.fill,
        train=cluster.train,
        prompts=lambda anew: kept_prompts(run, anew),
        score=cluster.score,
    )
    return practise(sealed, work)


def files(run: Run) -> dict[str, str]:
    """Digests of all that rounds leave."""
    root = Path(run.folder.path())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("plan", "practice", "models", "images", "checkpoints")
        for path in sorted((root / folder).rglob("*.*"))
    } | {"plan.parquet": run.folder.digest("plan.parquet")}


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Run:
    """A run with its round 0; tests work on copies."""
    return opened(tmp_path_factory.mktemp("planned"))


def copied(run: Run, to: Path) -> Run:
    shutil.copytree(run.folder.path(), to)
    folder = Folder(to)
    return replace(run, folder=folder, records=StageRecords(folder, run.records.inputs))


@pytest.mark.parametrize("feed", ["stored", "lockstep"])
def test_killed_at_any_point_it_goes_on_to_the_same_rounds(feed, planned, tmp_path):
    training = planned.config.training.model_copy(update={"feed": feed})
    planned = replace(planned, config=planned.config.model_copy(update={"training": training}))
    whole = copied(planned, tmp_path / "whole")
    cluster = Cluster(whole)
    found = go(whole, cluster)
    assert found["practice"]["rounds"] == 4
    expected = files(whole)
    made = cluster.made
    assert len(made) == len(set(made)) == whole.sizes.synthetic(whole.config)
    for life in range(0, 10**6 - cluster.left, 2):
        run = copied(planned, tmp_path / f"killed-{life}")
        for left in (life, 3):  # and once more, soon after
            with suppress(Killed):
                go(run, Cluster(run, left))
        assert go(run, Cluster(run)) == found
        assert files(run) == expected, f"killed after {life} steps"


def test_rounds_go_to_what_the_learner_does_not_know(planned, tmp_path):
    run = copied(planned, tmp_path / "run")
    go(run, Cluster(run))
    cards = read_rounds(run.folder)
    assert len(set(cards[0]["by_class"].values())) == 1
    for card in cards[1:]:
        names, weakness = list(card["weakness"]), card["weakness"]
        most, least = (pick(names, key=lambda n: weakness[n]) for pick in (max, min))
        assert card["budgets"][most] > card["budgets"][least] > 0
        assert [*card["by_class"].values()] == [*card["budgets"].values()]
        assert card["steered_by"] == f"practice/learner-{card['round'] - 1:03}"
    assert {row["negative_prompt"] for row in PlanFile(run.folder).rows(0, 12)} == {""}
    last = PlanFile(run.folder).rows(sum(card["rows"] for card in cards[:3]), 10**6)
    assert {row["negative_prompt"] for row in last} > {""}


def test_scenes_that_teach_are_drawn_more_and_new_ones_as_is_usual():
    scenes = [Context(background=place) for place in ("in a pond", "on a site", "at sea")]
    crane = ClassPrompts(0, "crane", "a large bird", [(scene, "llm") for scene in scenes])
    seen = {"in a pond": {"images": 99, "entropy": 1.0}, "on a site": {"images": 99, "entropy": 0}}
    accepted = {name: [99, 99] for name in seen}
    synthetic = {"context": {"crane": seen}, "accepted": {"context": {"crane": accepted}}}
    pond, site, sea = _scenes_drawn(crane, synthetic, 0.2).context_draws
    assert 1 <= site < sea < pond == 8
    assert _scenes_drawn(crane, {"accepted": {}}, 0.2) == crane, "nothing is known of them"


def test_the_rule_ends_rounds_and_training_goes_on_to_its_end(tmp_path):
    settings = "prompting.practice={rounds: 6, stop: 1.0}", "prompting.multiplier=12"
    run = opened(tmp_path, *settings)
    found = go(run, Cluster(run))
    assert found["practice"]["rounds"] == 3, "two comparisons without a gain"
    assert found["practice"]["ended"]
    planned = run.sizes.synthetic(run.config)
    assert found["practice"]["images"] + found["practice"]["images_saved"] == planned
    assert run.folder.read_json("checkpoints/newest.json")["step"] == 40
    assert len(PlanFile(run.folder)) == found["practice"]["images"]
    assert go(opened(tmp_path, *settings), Cluster(run, 0)) == found, "nothing is left to do"


def test_a_plan_that_is_written_anew_forgets_its_rounds(tmp_path):
    run = opened(tmp_path)
    go(run, Cluster(run))
    again = check_run(run.config, "plan")
    begin(again, "plan")
    again.records.run("plan", lambda: write_plan(again, None))
    assert len(read_rounds(again.folder)) == 1
    assert len(PlanFile(again.folder)) == read_rounds(again.folder)[0]["rows"]


def test_a_round_that_was_edited_is_refused(tmp_path):
    run = opened(tmp_path)
    go(run, Cluster(run))
    run.folder.write_table(
        "plan/round-002.parquet", run.folder.read_table("plan/round-001.parquet")
    )
    with pytest.raises(UserError, match=r"round-002\.parquet is damaged"):
        opened(tmp_path)


def test_without_practice_the_inputs_of_stages_are_what_they_were():
    config = load_config(QUICKSTART)
    for inputs in stage_inputs(config, "g").values():
        assert not [key for key in inputs if "practice" in key]
    practising = load_config(QUICKSTART, SETTINGS)
    assert stage_inputs(practising, "g")["plan"]["prompting.practice.rounds"] == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["take_over={run: elsewhere}"], "take_over keeps an earlier plan's images"),
        (["prompting.fill_to=even"], "prompting has practice and fill_to"),
        (["prompting.class_multipliers={one: 3}"], "prompting has practice and class_multipliers"),
        (["prompting.practice={rounds: 3, stop: 1}"], "give at least 4, or leave stop out"),
        (["prompting.practice={rounds: 4, stop: 1}", "data.validation=null"], "holds none out"),
        (["prompting.multiplier=0.5"], "fewer than the 10 classes"),
        (["training.steps=3"], "3 optimizer steps cannot be cut into 4 parts"),
    ],
)
def test_what_cannot_be_done_in_rounds_is_refused_before_anything_is_spent(
    settings, says, tmp_path
):
    with pytest.raises(UserError, match=says):
        check_run(load_config(QUICKSTART, [f"runs_dir={tmp_path / 'runs'}", *SETTINGS, *settings]))
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_how_the_plan_and_the_training_are_cut(tmp_path):
    config = load_config(QUICKSTART, [f"runs_dir={tmp_path}", *SETTINGS])
    plan = next(step for step in dry_run(config).steps if step.stage == "plan")
    assert "200 prompts, in 4 rounds of 50, 50, 50, 50" in plan.makes
    assert "asked after steps 10, 20, 30" in plan.makes


def test_a_negative_prompt_that_nobody_reads_is_not_written():
    guided = ["generation.generator=diffusers", "generation.guidance_scale=4"]
    for settings, reads in (
        (guided, True),
        (["generation.generator=diffusers"], False),  # the quickstart's has no guidance
        (["generation.generator=diffusers", "prompting.practice={rounds: 2, apart: words}"], True),
        ([*guided, "prompting.practice={rounds: 2, apart: null}"], False),
        ([], True),
    ):
        assert reads_apart(load_config(QUICKSTART, [*SETTINGS, *settings])) == reads, settings


def test_what_was_saved_is_reckoned_by_what_the_others_took():
    practice = {"images": 300, "images_saved": 100}
    assert saved(practice, {"gpu_hours": 6.0, "cpu_hours": 12.0, "cost": 0.0}) == {
        "gpu_hours_saved": 2.0, "cpu_hours_saved": 4.0, "cost_saved": 0.0,
    }  # fmt: skip


def test_hits_are_kept_by_bits():
    right = [True, False, True] * 11
    assert unpacked(packed(right), 33).tolist() == right
