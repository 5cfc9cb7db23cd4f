"""README.md and docs/: every link, path, name, setting, import and command of theirs is there.

Nothing is run here; tests/docs/test_cluster_doc.py follows docs/cluster.md in earnest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import checks
import pytest
from documents import Document, commands, documents
from samples import ROOT

Check = Callable[[Document], Iterator[str]]
CHECKS = [checks.links, checks.paths, checks.names, checks.configs, checks.command_lines]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_documents_name_nothing_that_is_not_there(check: Check, path: Path) -> None:
    assert list(check(Document.read(path))) == []


def test_every_import_and_module_of_the_documents_resolves() -> None:
    names = [name for path in documents() for name in checks.python_names(Document.read(path))]
    assert {"ray_synth.training.dual_bn.convert_dual_bn", "timm.create_model"} <= {*names}
    assert checks.unresolved(names) == []


def test_the_links_of_the_newest_changes_lead_somewhere() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.split(r"^## ", text, flags=re.M)[1]
    assert list(checks.links(Document(newest, ROOT / "CHANGELOG.md"))) == []


def test_the_rooms_are_those_of_the_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`([\w.]+)/?`\]\(", text, re.M)
    rooms = {path.parent.name for path in (ROOT / "ray_synth").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "ray_synth").glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(rooms | modules)


# The checks themselves -----------------------------------------------------------------------------

RIGHT = """
# A page

[loop.py](ray_synth/training/loop.py), [up](#a-page), [`loop.py`](ray_synth/training/loop.py),
[λ](docs/studies.md#λ-and-the-mix-of-a-batch), ![](docs/images/status.png), `docs/clusters/*.yaml`,
`test_no_secret_is_written_down`, `training.lambda_synth`, `data.*.path`, `data.ood.mine.path`,
`generation.pool: {min_size: 1, max_size: 8}`, `--no-follow`, `RAY_SYNTH_LOG_FORMAT`,
`ray-synth regenerate`, `ray-synth submit VERB ...`, `run --estimate`, `make test test-slow`,
`pytest -m slow -k secret tests/docs`, `training.augment.policy`, `cluster.yaml`

```bash
export A=b  # a comment
A=b ray-synth run --config my.yaml \\
    --set 'training.recipe=finetune' | grep a && make bench
job() {
    ray-synth submit "$@" run --set name=a
}
job --no-follow
ray job submit --address http://a:8265 -- ray-synth study all > out.txt 2>&1 &
python -m jobs.embedded_models all --work a --data b
python jobs/bench.py generation --parts
docker run image ray-synth run --config my.yaml
pip install -c constraints.txt 'ray-synth[biggan]'
ray-synth --log-format json run ...
```

```yaml
meaning:
  llm: {model: embedded}
  llm: {backend: openai, model: a, base_url: "http://b"}
```

```yaml
setup_commands: ["cd a && pip install '.[aws]'"]
```
"""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_right_document_passes(check: Check) -> None:
    assert list(check(Document(RIGHT))) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (checks.links, "[loop](ray_synth/training/lop.py)"),
        (checks.links, "![](docs/images/none.png)"),
        (checks.links, "[a](docs/studies.md#no-such-heading)"),
        (checks.links, "[a](#b)\n\n# A"),
        (checks.links, "[feed.py](ray_synth/training/loop.py)"),
        (checks.links, "[`generators/feed.py`](ray_synth/training/loop.py)"),
        (checks.paths, "`ray_synth/training/lop.py`"),
        (checks.paths, "```bash\npython jobs/nothing.py\n```"),
        (checks.paths, "```bash\nprometheus --config.file=docs/none.yml\n```"),
        (checks.paths, "`tests/docs/test_nothing.py::test_a`"),
        (checks.paths, "`cluster.yml`"),
        (checks.paths, "`training.py` and `docs/gone.md`"),
        (checks.names, "`test_that_nobody_wrote`"),
        (checks.names, "`training.lambda_sinth`"),
        (checks.names, "`data.train.paths`"),
        (checks.names, "`studies.corruption.kind`"),
        (checks.names, "`generation.pool: {min: 1}`"),
        (checks.names, "`training.feed: sored`"),
        (checks.names, "`training.feed=sored`"),
        (checks.names, "`dual_bnn: true`"),
        (checks.names, "`worker_count_of_old`"),
        (checks.names, "`--no-folow`"),
        (checks.names, "in prose: RAY_SYNTH_NO_SUCH_THING"),
        (checks.configs, "```\nmake run\n```"),
        (checks.configs, "```yaml\ntraining: {lambda: 1}\n```"),
        (checks.configs, "```yaml\ntrainig: {steps: 1}\n```"),
        (checks.configs, "```yaml\nmeaning:\n  llm: {modl: a}\n  llm: {model: a}\n```"),
        (checks.configs, "```yaml\nsetup_commnds: []\n```"),
        (checks.configs, "```yaml\na: [\n```"),
        (checks.configs, '```json\n{"a": 1,}\n```'),
        (checks.configs, "```python\nwith a\n```"),
        (checks.command_lines, "```bash\nray-snyth run\n```"),
        (checks.command_lines, "```bash\nray-synth rnu\n```"),
        (checks.command_lines, "```bash\nray-synth run --confg my.yaml\n```"),
        (checks.command_lines, "```bash\nA=b ray-synth run | ray-synth study\n```"),
        (checks.command_lines, "```bash\nray-synth serve chek a.yaml\n```"),
        (checks.command_lines, "```bash\nray-synth submit --id a run --confg my.yaml\n```"),
        (checks.command_lines, "```bash\nray-synth run --set training.stps=1\n```"),
        (checks.command_lines, "```bash\nray-synth submit run \\\n  --set training.stps=1\n```"),
        (checks.command_lines, "```bash\njob() {\n  ray-synth run $@\n}\njob --no-way\n```"),
        (checks.command_lines, "`ray-synth show --clas crane`"),
        (checks.command_lines, "`ray-synth status --watch`"),
        (checks.command_lines, "`run --estimat`"),
        (checks.command_lines, "```bash\nray start --heed\n```"),
        (checks.command_lines, "`ray job sumbit`"),
        (checks.command_lines, "```bash\nray job submit -- ray-synth rnu\n```"),
        (checks.command_lines, "`serve depoy a.yaml`"),
        (checks.command_lines, "`make tset`"),
        (checks.command_lines, "`make constraints UPGARDE=a`"),
        (checks.command_lines, "`python jobs/bench.py generatoin`"),
        (checks.command_lines, "`python jobs/bench.py generation --prts`"),
        (checks.command_lines, "`python -m jobs.embeded_models all`"),
        (checks.command_lines, "`python -m jobs.embedded_models all --minuts 3`"),
        (checks.command_lines, "`pytest -m slwo tests`"),
        (checks.command_lines, "`pytest -k nothing_has_this_name`"),
        (checks.command_lines, "`python -m pytest tests/docs/test_docs.py::test_none`"),
        (checks.command_lines, "```bash\npip install 'ray-synth[bigan]'\n```"),
        (checks.command_lines, "```bash\npip install -c constraint.txt a\n```"),
        (checks.command_lines, "`docker build --build-arg DEVCE=cpu .`"),
        (checks.command_lines, "```bash\ndocker run a ray-synth rnu\n```"),
        (checks.command_lines, "```yaml\nsetup_commands: [cd a && ray-synth rnu]\n```"),
        (checks.command_lines, "```yaml\n- nohup ray-synth rnu > log 2>&1 &\n```"),
    ],
)  # fmt: skip
def test_one_mistake_is_found(check: Check, text: str) -> None:
    assert len(list(check(Document(text)))) == 1


def test_names_that_do_not_resolve_are_found() -> None:
    text = (
        "`json.gone` `from json import laods` `ray_synth.erors` `ray_synth.errors.UserError()`\n"
        "```python\nimport jsn\nfrom json import loads as a, load\n"
        "json.dmps(a)\njson = {}\n```\n```python\npathlib.Paths\na = 1\na.b\n```"
    )
    names = list(checks.python_names(Document(text)))
    missing = [line.partition(":")[0] for line in checks.unresolved(names)]
    assert missing == ["jsn", "json.laods", "pathlib.Paths", "ray_synth.erors"]


def test_commands_are_read_as_a_shell_reads_them() -> None:
    text = 'while ! A=b make "a b"; do x 2>&1 >> f; done # c\nnohup y \\\n  z &'
    assert list(commands(text)) == [["make", "a b"], ["x"], ["y", "z"]]
