"""What a newcomer types to hold the recipe against its rivals: tune, and retrieve."""

import json
import shlex

import pyarrow.parquet as pq
import pytest
from adapters import save_ip_adapter
from small_runs import NO_LLM, QUICKSTART, SMALL, command, line, run, sets

from ray_synth.data.digits import load_digits
from ray_synth.data.images import encode_array
from ray_synth.embedded import sd_folder

FEW = ["tuning.steps=6", "tuning.batch_size=4", "tuning.checkpoint_every=2"]
# A set that cannot be opened: whoever looks for it fails.
NOWHERE = "{format: imagefolder, path: /nowhere/at/all}"


def pool_of(folder):
    """Pictures of three digits, as they come."""
    folder.mkdir()
    pixels, names = load_digits("digits", "train")
    for at, (name, picture) in enumerate(zip(names, pixels, strict=True)):
        if name in ("five", "six", "seven") and at % 10 == 0:
            (folder / f"{at}.png").write_bytes(encode_array(picture))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_generator_is_tuned_on_training_images_alone_and_generates(tmp_path):
    small = [*SMALL, *NO_LLM, "tracking.enabled=false", *FEW]
    blind = [f"data.test={NOWHERE}", f"data.ood={{other: {NOWHERE}}}"]
    done = run([*command("tune", tmp_path, *small, *blind), "--json"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["images"]["per_class"] == {"seven": 4, "six": 4}
    assert found["folder"] == str(tmp_path / "quickstart" / "tuned")
    again = run(command("tune", tmp_path, *small, *blind))
    assert again.returncode == 0 and "done before" in again.stderr, again.stderr[-3000:]
    other = run(command("tune", tmp_path, *small, *blind, "tuning.rank=3"))
    assert other.returncode != 0 and "holds a tuning of other images" in other.stderr
    made = run(command(
        "generate", tmp_path, *small, "name=with", f"generation.adapters=[{found['folder']}]"
    ))  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    (row,) = (
        pq.read_table(next((tmp_path / "with" / "images").glob("part-*"))).slice(0, 1).to_pylist()
    )
    (adapter,) = json.loads(row["generator"])["adapters"]
    assert adapter["path"] == found["folder"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_images_of_a_pool_are_retrieved_imported_and_trained_on(tmp_path):
    pool = pool_of(tmp_path / "pool")
    small = [*SMALL, *NO_LLM, "tracking.enabled=false"]
    blind = [f"data.test={NOWHERE}", f"data.ood={{other: {NOWHERE}}}"]
    config = ["--config", str(QUICKSTART), *sets(f"runs_dir={tmp_path / 'runs'}", *small)]
    words = ["retrieve", str(pool), *config, "--per-class", "8"]
    done = run(line(*words, *sets(*blind), "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["retrieved"] == {"seven": 8, "six": 8}
    again = run(line(*words, *sets(*blind)))
    assert again.returncode == 0 and "done before" in again.stderr, again.stderr[-3000:]
    leaky = run(line(*words, *sets(f"data.test={{format: imagefolder, path: {pool}}}")))
    assert leaky.returncode != 0 and "lie in one another" in leaky.stderr
    kept = ["--format", "webdataset", "--set", "name=real"]
    imported = run(line("import", found["folder"], *config, *kept))
    assert imported.returncode == 0, imported.stderr[-3000:]
    rows = pq.read_table(next((tmp_path / "runs" / "real" / "images").glob("part-*"))).to_pylist()
    assert {row["class_name"] for row in rows} == {"six", "seven"}
    said = " ".join(imported.stdout.split()).partition("train on them: ray-synth ")[2]
    trained = run(line(*shlex.split(said)))
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "16 synthetic images" in trained.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_study_of_rivals_has_all_four_on_the_same_footing(tmp_path):
    pool = pool_of(tmp_path / "pool")
    settings = [
        *SMALL, "meaning.enabled=false", "prompting.mix={plain: 1}", "tracking.enabled=false",
        "training.steps=6", "data.validation=4", "studies.scale=2", f"studies.pool={pool}",
        "tuning.steps=2",
    ]  # fmt: skip
    words = [*command("study", tmp_path / "runs", *settings), "rivals", "--seeds", "0"]
    done = run(words, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    studies = tmp_path / "runs" / "quickstart" / "studies"
    found = json.loads((studies / "rivals" / "study.json").read_text())
    assert [trial["arm"] for trial in found["trials"]] == [
        "real_only",
        "whole",
        "tuned",
        "retrieved",
    ]
    cards = [
        json.loads((studies / "arms" / "models" / f"{trial['digest']}.json").read_text())
        for trial in found["trials"]
    ]
    assert [card["num_synthetic"] for card in cards] == [0, 16, 16, 16]
    (tuned,) = (studies / "rivals").glob("tuned-*/card.json")
    record = json.loads(tuned.read_text())
    assert record["images"]["per_class"] == {"seven": 4, "six": 4}
    for text in ("generator tuned", "retrieved real images"):
        assert text in (studies / "rivals" / "table.md").read_text()
    models = {path: path.stat().st_mtime_ns for path in (studies / "arms" / "models").glob("*")}
    again = run(words, timeout=1500)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in models} == models


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_ip_adapter_guides_a_run_and_an_image_is_made_again_alone(tmp_path):
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd_folder())
    adapter = save_ip_adapter(pipeline, tmp_path / "ip")
    given = f"[{{path: {adapter}, kind: ip_adapter, weight: 0.5}}]"
    settings = [
        *SMALL, *NO_LLM, "generation.reference={}", f"generation.adapters={given}",
        "prompting.multiplier=2",
    ]  # fmt: skip
    made = run(command("generate", tmp_path / "runs", *settings))
    assert made.returncode == 0, made.stderr[-3000:]
    folder = tmp_path / "runs" / "quickstart"
    rows = pq.read_table(next((folder / "images").glob("part-*"))).to_pylist()
    assert all(row["reference"] for row in rows)
    where = ["--run", str(folder), "--out", str(tmp_path / "again.png")]
    again = run(line("regenerate", rows[0]["sample_id"], *where, "--json"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout)["identical"]
