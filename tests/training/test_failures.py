"""Training is given up after failures in a row, and only then."""

import pytest
from digits import train_digits
from ray.exceptions import ActorDiedError

from ray_synth.cli.explanation import explain
from ray_synth.errors import UserError
from ray_synth.storage.folder import Folder
from ray_synth.training.failures import ConsecutiveFailures

BUG = {1: ValueError("a bug")}


class Announced(ActorDiedError):
    preempted = True


def test_a_new_checkpoint_forgives_what_failed_before():
    watch = ConsecutiveFailures(2)
    for _ in range(3):
        watch.after_exception(None, BUG)
        watch.after_exception(None, BUG)
        watch.after_report(None, [], checkpoint=object())
    watch.after_exception(None, BUG)
    watch.after_exception(None, BUG)
    watch.after_report(None, [], checkpoint=None)
    with pytest.raises(RuntimeError, match=r"failed 3 times without a new .* worker 1.* a bug"):
        watch.after_exception(None, BUG)


def test_announced_losses_of_nodes_are_no_failures():
    watch = ConsecutiveFailures(0)
    for _ in range(5):
        watch.after_exception(None, {0: Announced(), 1: ConnectionError("gloo")})
    never = ConsecutiveFailures(-1)
    for _ in range(50):
        never.after_exception(None, BUG)


def test_a_users_mistake_is_not_tried_again():
    wrapped = RuntimeError("in Ray Data")
    wrapped.__cause__ = UserError("no such folder: /pictures")
    for error in (UserError("no such folder: /pictures"), wrapped):
        with pytest.raises(UserError, match="^no such folder: /pictures$"):
            ConsecutiveFailures(-1).after_exception(None, {0: RuntimeError("gloo"), 1: error})


class Bug:
    """In the place of a progress board: raises at a step."""

    def __init__(self, step: int, kind: type[Exception] = ValueError) -> None:
        self.step, self.kind, self.put = step, kind, self

    def remote(self, name: str, step: int) -> None:
        if step == self.step:
            raise self.kind(f"a bug at step {step}")


@pytest.mark.slow
def test_a_bug_that_comes_back_ends_training_and_says_what_it_was(local_ray, tmp_path):
    from ray.train import TrainingFailedError

    settings = {"feed": "stored", "checkpoint_every": 2, "max_failures": 1}
    with pytest.raises(TrainingFailedError, match=r"failed 2 times .* a bug at step 5"):
        train_digits(Folder(tmp_path), board=Bug(5), **settings)
    card = train_digits(Folder(tmp_path), **settings)
    assert [point["step"] for point in card["curve"]] == list(range(1, 9))
    with pytest.raises(TrainingFailedError) as ended:
        train_digits(Folder(tmp_path / "other"), board=Bug(5, UserError), **settings)
    assert explain(ended.value) == "a bug at step 5"
