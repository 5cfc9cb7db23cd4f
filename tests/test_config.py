"""The config: strict keys, near names, overrides, readable messages."""

from typing import get_origin

import pytest
import yaml
from pydantic import BaseModel
from samples import ROOT

from ray_synth import config as config_module
from ray_synth.config import Config, changes_result, load_config, parse_config
from ray_synth.config.lookup import section_at
from ray_synth.errors import UserError
from ray_synth.stages import stage_inputs
from ray_synth.storage.folder import Folder

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"

MINIMAL = {
    "name": "x",
    "data": {"train": {"format": "digits", "split": "train"}, "test": {"format": "digits"}},
    "training": {"steps": 10},
}


def write(tmp_path, values) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_every_shipped_config_is_valid():
    paths = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        assert isinstance(load_config(path), Config)


def test_overrides_replace_values_of_the_file(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["training.steps=20", "generation.pool.max_size=3", "seed=7"])
    assert config.training.steps == 20
    assert config.generation.pool.max_size == 3
    assert config.seed == 7


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("training.stpes=3", "steps"),
        ("generation.num_inference_step=3", "num_inference_steps"),
        ("generation.pool.maxsize=3", "max_size"),
        ("meaning.llm.modle=x", "model"),
        ("promting.multiplier=2", "prompting"),
        ("data.train.formt=digits", "format"),
        ("data.ood.other={format: digits, splitt: test}", "split"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_name(tmp_path, override, near):
    with pytest.raises(ValueError, match="unknown key") as error:
        load_config(write(tmp_path, MINIMAL), [override])
    assert f"did you mean {near!r}" in str(error.value)
    assert override.split("=")[0].split(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.real_fraction=1.5", "less than 1"),
        ("training.epochs=3", "either steps or epochs"),
        ("generation.width=63", "multiple of 8"),
        ("generation.pool.max_size=0", "greater than or equal to 1"),
        ("prompting.mix={plain: 0}", "weight above 0"),
        ("prompting.mix={plane: 1}", "contextual"),
        ("data.train={format: imagefolder}", "needs a path"),
        ("name=a b", "pattern"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(tmp_path, override, says):
    with pytest.raises(ValueError, match=says) as error:
        load_config(write(tmp_path, MINIMAL), [override])
    assert override.split("=")[0].split(".")[0] in str(error.value)


def test_several_problems_are_told_at_once():
    with pytest.raises(ValueError, match="seed") as error:
        parse_config({**MINIMAL, "seed": -1, "trainng": {}})
    assert "training" in str(error.value)


def test_a_missing_file_says_what_writes_one(tmp_path):
    with pytest.raises(ValueError, match="ray-synth init"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_batch_is_cut_by_real_fraction():
    training = parse_config({**MINIMAL, "training": {"steps": 1, "batch_size": 10}}).training
    assert (training.num_real, training.num_synth) == (5, 5)
    uneven = {"steps": 1, "batch_size": 10, "real_fraction": 0.33}
    training = parse_config({**MINIMAL, "training": uneven}).training
    assert (training.num_real, training.num_synth) == (3, 7)


def test_off_without_quotes_is_a_policy():
    config = load_config(ROOT / "jobs/configs/quickstart.yaml", ["generation.checks.policy=off"])
    assert config.generation.checks.policy == "off"


def all_settings(model: type[BaseModel] = Config, place: str = "", mark: str = ""):
    """(dotted key, field, mark) of every setting; a section's mark holds for all in it."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        own = extra.get("changes", "") if isinstance(extra, dict) else ""
        section = section_at(model, [name, "ANY"] if _is_mapping(field) else [name])
        key = f"{place}{name}" + (".ANY" if section and _is_mapping(field) else "")
        inherited = mark if mark == "how" else own
        if section:
            yield from all_settings(section, f"{key}.", inherited)
        yield key, field, inherited


def _is_mapping(field) -> bool:
    return get_origin(field.annotation) is dict


def test_every_setting_says_whether_it_changes_the_result():
    """A new setting is marked where it is defined: `result(...)` or `how(...)`, not `Field(...)`."""
    unmarked = [key for key, _, mark in all_settings() if mark not in ("result", "how")]
    assert unmarked == []


def test_no_setting_of_how_a_run_is_done_is_an_input_of_a_stage():
    inputs = stage_inputs(load_config(QUICKSTART), "g")["evaluation"]
    marks = {key: mark for key, _, mark in all_settings()}
    assert set(marks.values()) == {"result", "how"}
    for key, mark in marks.items():
        assert changes_result(key) == (mark == "result"), key
    how = {key for key, mark in marks.items() if mark == "how"}
    assert not how & set(inputs)
    assert {"training.log_every", "training.checkpoint_every", "meaning.clip.device"} <= how


def test_every_setting_that_changes_a_result_is_an_input_of_a_stage():
    """But for those of the image generator, which its fingerprint stands for."""
    practice = "prompting.practice={rounds: 2, guidance: {}, select: {}}"  # off by default
    given = [practice, "training.feed=stored"]
    inputs = stage_inputs(load_config(QUICKSTART, given), "g")["evaluation"]
    covered = ("generation.", "data.ood.ANY.")
    for key, field, mark in all_settings():
        is_leaf = section_at(Config, key.split(".")) is None
        if mark == "result" and is_leaf and not key.startswith(covered):
            assert (
                key in inputs or any(k.startswith(f"{key}.") for k in inputs) or not _default(field)
            ), key


def _default(field):
    return None if field.is_required() else field.get_default(call_default_factory=True)


def test_a_removed_setting_is_said_to_be_so_and_left_out_of_a_run_that_has_it(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(config_module.RETIRED, "training.reservoir", "memory_gb bounds it")
    folder = Folder(tmp_path)
    settings = {
        "name": "a",
        "data": {"train": {"format": "digits"}, "test": {"format": "digits"}},
        "training": {"steps": 1, "reservoir": 5},
    }
    with pytest.raises(UserError, match="training.reservoir: removed; memory_gb bounds it"):
        parse_config(settings)
    with pytest.raises(UserError, match="reservoir: removed; memory_gb"):
        parse_config(settings["training"], model=config_module.TrainingConfig)
    folder.write_yaml("config.yaml", {**settings, "versions": {"torch": "2"}})
    values = config_module.read_run_config(folder)
    assert values == {**settings, "training": {"steps": 1}}
    assert config_module.load_run_config(folder).training.steps == 1
    assert config_module.run_versions(folder) == {"torch": "2"}
    with pytest.raises(UserError, match="no run at .*none"):
        config_module.load_run_config(folder.child("none"))
