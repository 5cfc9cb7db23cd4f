"""What a user typed is what is used, or a clear word why not: in a file, and after --set."""

import pytest
import yaml

from ray_synth.config import load_config
from ray_synth.errors import UserError

MINIMAL = {
    "name": "x",
    "data": {"train": {"format": "digits", "split": "train"}, "test": {"format": "digits"}},
    "training": {"steps": 10},
}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    return tmp_path / "c.yaml"


def at(config, key):
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("key", "typed", "used"),
    [
        ("runs_dir", "/data/runs #2", "/data/runs #2"),
        ("runs_dir", '"/data/runs #2"', "/data/runs #2"),
        ("runs_dir", "/it's/here", "/it's/here"),
        ("runs_dir", "a: b", "a: b"),
        ("prompting.negative_prompt", "- blurry, & [bad] # 3", "- blurry, & [bad] # 3"),
        ("prompting.negative_prompt", "", ""),
        ("name", "2024", "2024"),
        ("name", "007", "007"),
        ("name", "no", "no"),
        ("name", "2024-01-01", "2024-01-01"),
        ("seed", "010", 10),
        ("data.class_names", "[yes, no, on]", ["yes", "no", "on"]),
        ("data.class_names", "[0, 007, 1.0, null, 1:30]", ["0", "007", "1.0", "null", "1:30"]),
        ("data.class_names", "null", None),
        ("data.train.class_map", "{0: cat, no: 1}", {"0": "cat", "no": "1"}),
        ("data.train.images_per_class", "{1: 5, off: 2}", {"1": 5, "off": 2}),
        ("generation.checks.policy", "off", "off"),
        ("tracking.enabled", "no", False),
        ("training.optimizer.kwargs", "{eps: 1e-8}", {"eps": 1e-8}),
        ("training.num_workers", "[1, 2]", (1, 2)),
    ],
)
def test_what_is_typed_is_used(path, key, typed, used):
    assert at(load_config(path, [f"{key}={typed}"]), key) == used
    if "#" not in typed and typed and ": " not in typed.strip("{}"):
        *parents, leaf = key.split(".")
        values = yaml.safe_load(path.read_text())
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = "HERE"
        path.write_text(yaml.safe_dump(values).replace("HERE", typed))
        assert at(load_config(path), key) == used


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=1:30", "seed: .*integer.*1:30"),
        ("data.class_names={a: b}", r"data\.class_names: .*names, 'imagenet', or a text file"),
        ("data.class_names=[[a]]", r"data\.class_names\.0: .*text file.*\['a'\]"),
        ("data.train.images_per_class=0", r"data\.train\.images_per_class: .*equal to 1"),
        ("data.train.images_per_class={a: 0}", r"images_per_class\.a: .*equal to 1"),
        ("data.class_names=[a #2, b]", "a comment to YAML: put the text in quotes"),
        ("data.class_names=[a, b] #2", "'#2' after the value would be lost"),
        ('runs_dir="/a" #2', "'#2' after the value would be lost"),
        ("runs_dir=/a ", "begins or ends with a space"),
        ("data.ood.in_domain={format: digits, split: test}", "cannot be called 'in_domain'"),
        ("data.ood={training: {format: digits, split: test}}", "cannot be called 'training'"),
    ],
)
def test_or_it_is_said_why_not_in_words_of_the_config(path, override, says):
    with pytest.raises(UserError, match=says) as error:
        load_config(path, [override])
    assert "list[" not in str(error.value)
    assert "constrained" not in str(error.value)


def test_a_key_that_comes_twice_is_refused(path):
    path.write_text(path.read_text() + "seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"'seed' is given twice, in lines \d+ and \d+"):
        load_config(path)


def test_a_comment_that_may_belong_to_the_value_is_told(path, caplog):
    path.write_text(path.read_text() + "runs_dir: /data/runs #2\nseed: 1  # of many\ntracking:\n")
    assert load_config(path).tracking.enabled  # an empty section has its defaults
    (line,) = [record.getMessage() for record in caplog.records]
    assert "'/data/runs', and '#2' is a comment" in line


def test_a_test_sets_name_may_hold_dots(path):
    values = {**MINIMAL, "data": {**MINIMAL["data"], "ood": {"v2.0": {"format": "uci_digits"}}}}
    path.write_text(yaml.safe_dump(values))
    assert load_config(path, ["data.ood.v2.0.split=test"]).data.ood["v2.0"].split == "test"


@pytest.mark.parametrize("text", ["", " \n", "\0\0\0", "- a", "x: &x [*x]", "a: [", "\udcff"])
def test_a_file_without_settings_is_named(path, text):
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(path)
