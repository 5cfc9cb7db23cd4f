"""What the user says of class names: in the config, in YAML, in CSV; and what of it is refused."""

import logging

import pytest
from samples import ROOT

from ray_synth.config import ClassInfo, load_config
from ray_synth.data.class_info import read_class_info
from ray_synth.errors import UserError
from ray_synth.preflight.refusals import check_class_info

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
NAMES = ("crane", "kite", "no")
CRANE = ClassInfo(synonyms=["wading bird", "grus"], parent="bird")
YAML = "crane: {synonyms: [wading bird, grus], parent: bird}\nno: {parent: yes}\n"
CSV = "name,synonyms,parent\ncrane,wading bird; grus,bird\nno,,yes\n"


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.csv", CSV), ("A.CSV", CSV)])
def test_a_file_says_what_the_config_would(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    given = {"crane": CRANE, "no": ClassInfo(parent="yes")}
    assert read_class_info(str(tmp_path / name), NAMES) == given == read_class_info(given, NAMES)
    assert read_class_info(None, NAMES) == {}


def test_names_that_are_no_class_are_told_unless_none_is_one(caplog):
    with caplog.at_level(logging.WARNING, "ray_synth"):
        assert read_class_info({"crane": CRANE, "kites": CRANE}, NAMES) == {"crane": CRANE}
    assert "names kites, which is no class; did you mean 'kite'?" in caplog.text
    with pytest.raises(UserError, match="names kites, which is no class"):
        read_class_info({"kites": CRANE}, NAMES)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "crane: {synonym: [x]}", "crane.synonym"),
        ("a.yaml", "crane: bird", "crane"),
        ("a.yaml", "- crane", "synonyms"),
        ("a.csv", "class,synonyms\ncrane,x\n", "name, synonyms, parent"),
        ("a.csv", "name,synonyms\ncrane,x\ncrane,y\n", "line 3: 'crane' comes twice"),
        ("a.csv", "name,synonyms\n,x\n", "line 2: there is no name"),
        ("none.yaml", None, "no such file"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_class_info(str(tmp_path / name), NAMES)


def test_what_cannot_go_in_a_prompt_is_refused_before_anything_is_spent():
    given = "data.class_info={six: {synonyms: ['half a dozen, or so']}}"
    with pytest.raises(UserError, match="class_info of 'six'.*cannot go in a prompt"):
        check_class_info(load_config(QUICKSTART, [given]), ["six"])
    config = load_config(QUICKSTART, ["data.class_info={six: {synonyms: [], parent: number}}"])
    check_class_info(config, ["six"])
    with pytest.raises(UserError, match=r"data.class_info.six.parents: unknown key"):
        load_config(QUICKSTART, ["data.class_info={six: {parents: number}}"])
