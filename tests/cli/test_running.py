"""Verbs that do the work: which stage each stops after."""

import pytest
from samples import ROOT

import ray_synth
from ray_synth.cli.command import app, main
from ray_synth.cli.running import SHORTER
from ray_synth.stages import STAGES

QUICKSTART = str(ROOT / "jobs" / "configs" / "quickstart.yaml")


@pytest.mark.parametrize("option", ["--until", "--force-stage"])
def test_an_unknown_stage_ends_the_command_before_anything_is_begun(option, tmp_path, capsys):
    line = ["run", "--config", QUICKSTART, "--set", f"runs_dir={tmp_path / 'runs'}"]
    with pytest.raises(SystemExit) as ended:
        main([*line, option, "trainig"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "unknown stage 'trainig'; did you mean 'training'?" in said
    assert list(tmp_path.iterdir()) == []


def test_each_shorter_verb_stops_after_a_stage_that_there_is():
    assert {stage for stage, _ in SHORTER.values()} <= set(STAGES)
    assert {function for _, function in SHORTER.values()} <= set(ray_synth.__all__)
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {"run", "evaluate", "report", *SHORTER} <= names
