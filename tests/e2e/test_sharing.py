"""What a newcomer types after a run: predict, export, predict again, push, and load from the hub."""

import json
import os
import subprocess
import sys

import pytest
from hubs import TOKEN, fake_hub
from small_runs import NO_LLM, ROOT, SMALL, command, line, run

from ray_synth.data.digits import load_digits
from ray_synth.data.images import encode_array

FROM_THE_HUB = """
import json, sys
import timm, torch
from PIL import Image

model = timm.create_model("hf-hub:me/digits", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
for path in sys.argv[1:]:
    with torch.inference_mode():
        p = model(prepare(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
    print(json.dumps([model.pretrained_cfg["label_names"][p.argmax()], p.max().item()]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_a_run_made_is_used_elsewhere(tmp_path):
    done = run(command("run", tmp_path, *SMALL, *NO_LLM, "tracking.enabled=false"), timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = str(tmp_path / "quickstart")
    pixels, names = load_digits("digits", "test")
    pictures = []
    for name in ("six", "seven"):
        at = [i for i, found in enumerate(names) if found == name][:5]
        for i in at:
            pictures.append(tmp_path / f"{name}-{i}.png")
            pictures[-1].write_bytes(encode_array(pixels[i]))
    paths = [str(path) for path in pictures]

    def said(*words: str) -> list[dict]:
        found = run(line(*words))
        assert found.returncode == 0, found.stderr[-3000:]
        return [json.loads(text) for text in found.stdout.splitlines()]

    answers = said("predict", folder, *paths, "--json")
    assert [row["image"] for row in answers] == paths
    for form in ("onnx", "timm", "torch"):
        found = run(line("export", str(tmp_path / form), "--run", folder, "--model", form))
        assert found.returncode == 0, found.stderr[-3000:]
        assert "checked on 64 test images: logits differ by" in found.stdout
    for form in ("onnx", "timm"):
        for row, other in zip(
            answers, said("predict", str(tmp_path / form), *paths, "--json"), strict=True
        ):
            assert other["class_name"] == row["class_name"]
            assert other["probability"] == pytest.approx(row["probability"], abs=1e-5)

    with fake_hub() as hub:
        env = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        hub.large = 10_000
        for words in (["--dry-run"], []):
            push = subprocess.run(
                line("push", folder, "me/digits", *words),
                cwd=ROOT, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert push.returncode == 0, push.stderr[-3000:]
            assert bool(hub.repositories) == (not words)
        assert {repository.access for repository in hub.repositories.values()} == {"private"}
        loaded = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, *paths],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    for row, text in zip(answers, loaded.stdout.splitlines(), strict=True):
        name, probability = json.loads(text)
        assert name == row["class_name"]
        assert probability == pytest.approx(row["probability"], abs=0.02), (
            "PIL resizes, torch there"
        )
