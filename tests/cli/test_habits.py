"""What a shell's user expects of any command: completion, JSON, exit codes, dry runs, width, colours.

Verbs run on a directory that a real run left (tests/pipeline/runs_0_1.tar.xz).
"""

import ast
import io
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import tarfile
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest
import yaml
from samples import ROOT, encoded
from typer.testing import CliRunner

from ray_synth.cli import submission
from ray_synth.cli.command import app, main
from ray_synth.cli.exit_codes import EXIT_CODES
from ray_synth.config import load_run_config
from ray_synth.monitoring import logs
from ray_synth.monitoring.terminal import broken
from ray_synth.storage.folder import Folder

QUICKSTART = str(ROOT / "jobs/configs/quickstart.yaml")
IMAGENET = str(ROOT / "jobs/configs/imagenet_resnet50.yaml")
SIZES = ["--images", "1281167", "--classes", "1000"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(ROOT / "tests/pipeline/runs_0_1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "finished"


@pytest.fixture
def config(finished, tmp_path) -> str:
    """The config of the finished run, as a file."""
    values = load_run_config(Folder(finished)).model_dump(mode="json")
    path = tmp_path / "finished.yaml"
    path.write_text(yaml.safe_dump({**values, "runs_dir": str(finished.parent)}))
    return str(path)


def call(capsys, *line: str, code: int = 0) -> str:
    """What a verb prints in a pipe."""
    with pytest.raises(SystemExit) as ended:
        main([*line])
    said = capsys.readouterr()
    assert (ended.value.code or 0) == code, said.err
    return said.out


def in_terminal(*line: str, columns: int = 80, **env: str) -> tuple[str, int]:
    """What the command says in a terminal of so many columns, and its exit code."""
    main_end, end = pty.openpty()
    ioctl(end, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    running = subprocess.Popen(
        [sys.executable, "-m", "ray_synth.cli", *line],
        stdin=end, stdout=end, stderr=end, env={**known, "TERM": "xterm-256color", **env},
    )  # fmt: skip
    os.close(end)
    said = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        said += part
    os.close(main_end)
    return said.decode().replace("\r", ""), running.wait(timeout=60)


def tree(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# JSON ----------------------------------------------------------------------------------------------


def test_verbs_print_one_json_document(finished, config, tmp_path, capsys):
    run = ["--run", str(finished)]
    status = json.loads(call(capsys, "status", str(finished), "--json"))
    assert status["verdict"] == "done"
    metrics = json.loads(call(capsys, "report", "--config", config, "--json"))
    assert metrics["num_synthetic"] == 32 and metrics["mixed"]["main"]["in_domain"]["images"] == 40
    to = str(tmp_path / "data")
    exported = json.loads(call(capsys, "export", to, *run, "--json"))
    assert exported["exported"] == 32 and len(exported["classes"]) == 2
    found = json.loads(
        call(capsys, "estimate", "-c", IMAGENET, *SIZES, "--gpu", "H100", "--studies", "--json")
    )
    assert found["gpu_hours"] == pytest.approx(sum(part["gpu_hours"] for part in found["parts"]))
    assert {"ablation", "scaling"} <= {study["name"] for study in found["studies"]}
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            (tmp_path / "photos" / split / name / "a.png").write_bytes(encoded(0))
    out = str(tmp_path / "my.yaml")
    begun = json.loads(
        call(capsys, "init", "--images", str(tmp_path / "photos"), "--out", out, "--json")
    )
    assert (begun["counts"], begun["config"]) == ({"cat": 1, "dog": 1}, out)


def test_every_verb_that_prints_figures_has_json():
    printing = {command.name or command.callback.__name__ for command in app.registered_commands}
    # These print no figures: a picture, a config's answer, jobs' logs, and where things went.
    others = {"show", "import", "submit", "follow", "stop", "push"}
    for name in sorted(printing - others):
        # Wide, so that no option's name is broken.
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert "--json" in shown, name


# Dry runs ------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_is_done_and_what_would_be_made_and_writes_nothing(
    finished, config, tmp_path, capsys
):
    before = tree(finished.parent)
    line = ["run", "--config", config]
    found = json.loads(call(capsys, *line, "--dry-run", "--json"))
    assert [step["done"] for step in found["steps"]] == [True] * 7 + [False]
    again = call(capsys, *line, "--dry-run", "--force-stage", "training", "--until", "training")
    words = {row.split()[0]: row.split()[1] for row in again.splitlines()[1:7]}
    assert words == dict.fromkeys(("data", "meaning", "plan", "quality", "generation"), "done") | {
        "training": "to"
    }
    assert "real_only 30 steps, mixed 30 steps" in again
    assert "nothing was started or written" in again
    new = ["run", "--config", QUICKSTART, "--set", f"runs_dir={tmp_path}/new", "--dry-run"]
    said = call(capsys, *new)
    assert "1,200 prompts, scenes for 10 classes" in said
    assert "not known without a probe" in said
    assert not (tmp_path / "new").exists()
    assert tree(finished.parent) == before


def test_a_dry_run_refuses_what_a_run_would(finished, capsys):
    sets = ["--set", f"runs_dir={finished.parent}", "--set", "name=finished"]
    line = ["run", "--config", QUICKSTART, *sets, "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert "holds a finished data stage with other settings" in capsys.readouterr().err


def test_a_submission_that_is_tried_says_its_upload_and_its_plan_and_asks_no_cluster(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # nobody is there
    sets = ["--set", f"runs_dir={tmp_path}/new"]
    said = call(capsys, "submit", "--no-code", "--dry-run", "plan", "-c", QUICKSTART, *sets)
    assert "uploads config/quickstart.yaml" in said
    assert "would run: python -m ray_synth.cli plan --config config/quickstart.yaml" in said
    assert "plan        to do   1,200 prompts" in said and "generation" not in said
    assert list(tmp_path.iterdir()) == []
    assert set(submission.PLANNED) < set(submission.VERBS)


# Exit codes, completion, quiet and verbose ---------------------------------------------------------


def test_the_exit_codes_of_the_page_are_those_of_the_code():
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.M)
    assert {int(code): said for code, said in rows} == EXIT_CODES
    for path in (ROOT / "ray_synth/cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Exit", "sys.exit"):
                assert not any(isinstance(word, ast.Constant) for word in node.args), path


@pytest.mark.parametrize(
    ("typed", "found"),
    [("ray-synth reg", {"regenerate"}), ("ray-synth run --force-stage tra", {"training"}),
     ("ray-synth export a --layout web", {"webdataset"}), ("ray-synth train --dry", set())],
)  # fmt: skip
def test_a_shell_completes_verbs_options_and_stages(typed, found, monkeypatch, capsys):
    monkeypatch.setenv("_RAY_SYNTH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit):
        app(prog_name="ray-synth")
    assert set(capsys.readouterr().out.split()) == found


def test_the_script_for_a_shell_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        app(["--show-completion", "bash"], prog_name="ray-synth")
    if ended.value.code:  # typer asks which shell it is in, where it can tell
        pytest.skip("no shell is above this process")
    assert "complete_bash" in capsys.readouterr().out


def test_quiet_and_verbose_say_less_and_more(capsys):
    root, said = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(said)
    root.addHandler(handler)
    try:
        for options, heard in (
            (["--quiet"], ["warn"]),
            ([], ["info", "warn"]),
            (["-v"], ["debug", "info", "warn"]),
        ):
            call(capsys, "status", "runs/none", *options, code=2)
            for name in ("debug", "info", "warning"):
                getattr(logs.log, name)(name.removesuffix("ing"))
            assert [line.split()[1] for line in said.getvalue().splitlines()] == heard
            said.truncate(said.seek(0))
    finally:
        root.removeHandler(handler)
        logs.set_volume()
    call(capsys, "status", "--quiet", "--verbose", code=2)


# Terminals -----------------------------------------------------------------------------------------


def test_lines_are_broken_between_words_under_their_last_column():
    text = "training mixed      8   534   2.8  8 workers that take 399 images each\n/a/long/path/of/one"
    assert broken(text, 50) == [
        "training mixed      8   534   2.8  8 workers that",
        "  take 399 images each",
        "/a/long/path/of/one",
    ]
    assert broken("plan        to do   1,200 prompts and scenes for 10 classes", 40) == [
        "plan        to do   1,200 prompts and",
        "                    scenes for 10",
        "                    classes",
    ]


def test_a_terminal_of_80_columns_holds_every_line(finished):
    said, code = in_terminal("status", str(finished))
    assert code == 0 and "\x1b[" in said
    assert max(len(line) for line in ESCAPE.sub("", said).split("\n")) <= 80
    said, code = in_terminal("run", "--set", "a=b", "--config", QUICKSTART, NO_COLOR="1")
    assert code == 2 and "unknown key" in said
    assert "\x1b[3" not in said and "\x1b[9" not in said, "no colour"
    assert max(len(line) for line in said.split("\n")) <= 80
