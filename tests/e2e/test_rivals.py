"""A tuned generator and retrieved real images, from the command line to the study that compares them."""

import json

import pytest
from small_runs import NO_LLM, SMALL, command, run

from ray_synth.data.digits import load_digits
from ray_synth.data.images import encode_array

SETTINGS = [*SMALL, *NO_LLM, "tracking.enabled=false", "studies.scale=2", "studies.seeds=[0]"]


def write_pool(folder):
    """Digits of all kinds, unlabelled; some of them are the test set's own."""
    for split, most in (("train", 600), ("test", 20)):
        pixels, labels = load_digits("digits", split)
        there = [at for at, name in enumerate(labels) if name in ("six", "seven", "one")][:most]
        for at in there:
            path = folder / f"{at % 4}" / f"{split}{at}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_array(pixels[at]))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_rivals_are_made_and_compared_as_the_page_says(tmp_path):
    tuned = run([*command("tune", tmp_path, *SETTINGS), "--steps", "4", "--batch-size", "2"])
    assert tuned.returncode == 0, tuned.stderr[-3000:]
    (lora,) = (tmp_path / "quickstart" / "tuned").iterdir()
    assert f"4 steps: {lora}" in tuned.stdout
    assert (lora / "pytorch_lora_weights.safetensors").is_file()
    again = run([*command("tune", tmp_path, *SETTINGS), "--steps", "4", "--batch-size", "2"])
    assert again.stdout == tuned.stdout, "what is there is not made again"

    pool = write_pool(tmp_path / "pool")
    found = run([*command("retrieve", tmp_path, *SETTINGS), str(pool)])
    assert found.returncode == 0, found.stderr[-3000:]
    (folder,) = (tmp_path / "quickstart" / "retrieved").iterdir()
    said = json.loads((folder / "retrieved.json").read_text())
    # 8 real images; as many as 8x gives
    assert said["classes"] == {"six": 32, "seven": 32} and said["images"] == 620
    assert said["copies"] >= 1 and said["unreadable"] == 0

    rivals = [f"studies.tuned={lora}", f"studies.retrieved={said['source']['path']}"]
    compared = run([*command("study", tmp_path, *SETTINGS, *rivals), "rivals"], timeout=1500)
    assert compared.returncode == 0, compared.stderr[-3000:]
    table = (tmp_path / "quickstart" / "studies" / "rivals" / "table.md").read_text()
    for label in ("plain prompts, fine-tuned", "diversified and fine-tuned", "retrieved real"):
        assert label in table
    page = (tmp_path / "quickstart" / "studies" / "index.html").read_text()
    assert "Diversify, fine-tune, or retrieve" in page
