"""The recipe of the embedded models: its drawings, and a smoke run of all its stages."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from jobs.embedded_models import captions, noise
from jobs.embedded_models.__main__ import main, run_stage
from jobs.embedded_models.clock import learning_rate
from jobs.embedded_models.pack import stored
from jobs.embedded_models.photographs import Photographs, write_photographs
from jobs.embedded_models.render import plan_jobs
from jobs.embedded_models.settings import Settings, stable_seed
from jobs.embedded_models.wordnet import Noun, build_lexicon, read_lexicon, read_synset
from ray_synth.embedded import clip_folder, sd_folder

pytest.importorskip("cv2")

from jobs.embedded_models.digits import digit_picture
from jobs.embedded_models.filters import FILTERS
from jobs.embedded_models.natural import natural_picture
from jobs.embedded_models.surfaces import SURFACES

CAT = Noun(("cat", "true cat"), "feline mammal with soft fur", ("feline", "carnivore", "animal"))
# Two classes and what they are kinds of, in the format of WordNet's data.noun.
DATABASE = """\
  1 This software and database is being provided to you, the LICENSEE
00000001 03 n 01 entity 0 000 | that which exists
00000002 05 n 02 animal 0 animate_being 0 001 @ 00000001 n 0000 | a living organism
00000003 05 n 02 cat 0 true_cat 0 002 @ 00000002 n 0000 ~ 00000004 n 0000 | feline; "a cat purrs"
00000004 13 n 01 pizza 0 001 @i 00000001 n 0000 | Italian open pie
"""


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """Six photographs of nothing: smooth random colours, of 64x64 pixels."""
    import io

    rng, files = np.random.default_rng(0), []
    for _ in range(6):
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture(scope="module")
def fonts() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf"
    return sorted(folder.glob("DejaVuSans*.ttf"))[:3]


def _is_picture(picture: np.ndarray) -> bool:
    return picture.shape == (64, 64, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_changes_a_picture_and_keeps_its_shape(name: str) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    before = picture.copy()
    filtered = FILTERS[name](picture, random.Random(2))
    assert _is_picture(filtered)
    assert not np.array_equal(filtered, before)
    assert np.array_equal(picture, before), "the input was written to"


def test_filters_and_captions_know_the_same_styles() -> None:
    assert set(FILTERS) == set(captions.STYLES)
    assert len(FILTERS) == 16


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_shows_every_digit(
    surface: str, jpegs: list[bytes], fonts: list[Path]
) -> None:
    photographs = [(jpeg, CAT) for jpeg in jpegs]
    for digit in range(10):
        rng = random.Random(digit)
        picture, caption = digit_picture(digit, fonts, photographs, rng, surface=surface)
        assert _is_picture(picture)
        assert picture.std() > 1, "nothing is drawn"
        assert caption


def test_a_seed_makes_the_same_picture_and_caption(jpegs: list[bytes], fonts: list[Path]) -> None:
    def draw(seed: int) -> tuple[np.ndarray, str]:
        np.random.seed(None)  # nothing may depend on numpy's global state
        rng = random.Random(seed)
        return digit_picture(7, fonts, [(jpeg, CAT) for jpeg in jpegs], rng, restyle=True)

    for seed in range(12):
        (first, caption), (again, same) = draw(seed), draw(seed)
        assert np.array_equal(first, again)
        assert caption == same


def test_natural_pictures_are_pictures_with_captions(jpegs: list[bytes]) -> None:
    rng = random.Random(0)
    for jpeg in jpegs:
        for restyle in (False, True):
            picture, caption = natural_picture(jpeg, CAT, rng, restyle=restyle)
            assert _is_picture(picture)
            assert any(word in caption for word in (*CAT.lemmas, *CAT.hypernyms, CAT.gloss))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), digit=st.integers(0, 9))
def test_digit_captions_name_the_digit(seed: int, digit: int) -> None:
    rng = random.Random(seed)
    style = rng.choice([None, *captions.STYLES])
    thing = captions.digit_phrase(digit, rng)
    caption = captions.caption(thing, ["on paper", ""], rng, style=style)
    named = (captions.DIGITS[digit], str(digit), captions.digit_gloss(digit))
    assert any(name in caption for name in named)
    assert ", ," not in caption
    assert not caption.endswith(", ")


def test_light_and_colours_are_named_as_seen() -> None:
    assert captions.light_of((10, 10, 10)) == "dark"
    assert captions.light_of((220, 220, 215)) == "bright"
    assert captions.light_of((200, 150, 80)) == "warm"
    assert captions.light_of((80, 110, 160)) == "cool"
    assert captions.light_of((120, 120, 120)) == "plain"
    assert captions.nearest_colour((250, 250, 250)) == "white"


def test_wordnet_lines_give_names_gloss_and_parents() -> None:
    offset, cat = read_synset(DATABASE.splitlines()[3])
    assert offset == "00000003"
    assert (cat.lemmas, cat.gloss, cat.parents) == (("cat", "true cat"), "feline", ("00000002",))


def test_packed_photographs_come_back_in_order(tmp_path: Path, jpegs: list[bytes]) -> None:
    write_photographs(tmp_path / "photographs-000.npz", [(jpegs[0], 3), (jpegs[1], 1)])
    write_photographs(tmp_path / "photographs-001.npz", [(jpegs[2], 2)])
    photographs = Photographs(tmp_path)
    assert [photographs[index] for index in range(3)] == [
        (jpegs[0], 3),
        (jpegs[1], 1),
        (jpegs[2], 2),
    ]
    with pytest.raises(IndexError):
        photographs[3]


@given(totals=st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)), size=st.integers(1, 20))
def test_jobs_cover_every_picture_once(totals: dict[str, int], size: int) -> None:
    jobs = plan_jobs(totals, size)
    made = [(job.kind, index) for job in jobs for index in range(job.first, job.first + job.count)]
    assert sorted(made) == sorted((kind, n) for kind in totals for n in range(totals[kind]))
    assert all(0 < job.count <= size for job in jobs)


def test_seeds_are_the_same_in_every_process() -> None:
    code = "from jobs.embedded_models.settings import stable_seed; print(stable_seed('digit', 40))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == stable_seed("digit", 40) != stable_seed("digit", 60)


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(fraction / 100, peak=1.0) for fraction in range(101)]
    assert rates[0] == 0
    assert max(rates) <= 1.01
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_velocity_gives_back_the_clean_latents_and_the_noise(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, added = torch.randn(2, 4, 4, 2, 2, generator=generator)
    steps = torch.randint(0, noise.TIME_STEPS, (4,), generator=generator)
    shares = noise.signal_shares()
    noisy = noise.add_noise(clean, added, shares, steps)
    v = noise.velocity(clean, added, shares, steps)
    found = noise.clean_and_noise(noisy, v, shares, steps)
    torch.testing.assert_close(found, (clean, added), atol=1e-5, rtol=1e-4)


def test_the_schedule_is_that_of_the_packaged_scheduler() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler.from_pretrained(sd_folder() / "scheduler")
    torch.testing.assert_close(scheduler.alphas_cumprod, noise.signal_shares())
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(19))
    x, v, steps = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([19])
    signal, _ = noise.amplitudes(noise.signal_shares(), steps)
    made = noise.consistency_output(x, v, noise.signal_shares(), steps)
    torch.testing.assert_close(made, skip + out * signal, check_dtype=False)


def test_a_diverged_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="diverged"):
        stored(torch.full((64, 64), 500.0))
    with pytest.raises(ValueError, match="diverged"):
        stored(torch.full((64, 64), torch.nan))


def test_a_missing_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--work", str(tmp_path / "work"), "--data", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["wordnet", *folders])
    assert "data.noun is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="run the stage 'wordnet' first"):
        run_stage("text", Settings(tmp_path / "work", tmp_path))
    with pytest.raises(ValueError, match="No stage 'dye'"):
        run_stage("dye", Settings(tmp_path / "work", tmp_path))


def test_without_opencv_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['cv2'] = None; import jobs.embedded_models.digits"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "pip install 'ray-synth[recipe]'" in done.stderr


def _make_teacher(folder: Path) -> None:
    """A random BERT of one layer, with the width of MiniLM."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += ["##" + letter for letter in letters]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, jpegs: list[bytes], fonts: list[Path]) -> Path:
    """Tiny stand-ins for everything that the recipe needs downloaded."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "wordnet").mkdir()
    (folder / "wordnet" / "data.noun").write_text(DATABASE)
    root = folder / "tiny-imagenet-200"
    for number, class_id in enumerate(("n00000003", "n00000004")):
        images = root / "train" / class_id / "images"
        images.mkdir(parents=True)
        for index, jpeg in enumerate(jpegs[number::2]):
            (images / f"{class_id}_{index}.JPEG").write_bytes(jpeg)
    (root / "wnids.txt").write_text("n00000003\nn00000004\n")
    (folder / "fonts").mkdir()
    for font in fonts:
        shutil.copy(font, folder / "fonts")
    _make_teacher(folder / "minilm")
    return folder


def _layout(folder: Path) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Dtype and shape of every weight of every safetensors file below a folder."""
    layout = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            layout[str(path.relative_to(folder))] = {
                name: (
                    weights.get_slice(name).get_dtype(),
                    tuple(weights.get_slice(name).get_shape()),
                )
                for name in weights.keys()  # noqa: SIM118 - not a dict
            }
    return layout


def test_lexicon_is_read_back_as_it_was_built(tmp_path: Path, data: Path) -> None:
    lexicon = read_lexicon(build_lexicon(Settings(tmp_path, data)))
    assert len(lexicon.corpus) == 4
    assert lexicon.classes[0] == Noun(("cat", "true cat"), "feline", ("animal", "entity"))
    assert lexicon.classes[1].hypernyms == ("entity",)


@pytest.mark.slow
def test_smoke_run_of_all_stages_packs_models_like_the_packaged_ones(
    tmp_path: Path, data: Path
) -> None:
    from diffusers import AutoPipelineForText2Image

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a batch gains little from a second
    try:
        folders = ["--work", str(tmp_path), "--data", str(data)]
        main(["all", *folders, "--smoke", "--workers", "1"])
        packed = tmp_path / "weights"
        assert _layout(packed / "sd") == _layout(sd_folder())
        assert _layout(packed / "clip") == _layout(clip_folder())
        for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
            ours, shipped = (
                json.loads((folder / name).read_text()) for folder in (packed / "sd", sd_folder())
            )
            assert {**ours, "_diffusers_version": ""} == {**shipped, "_diffusers_version": ""}
        for name in ("vocab.json", "merges.txt", "open_clip_config.json"):
            assert (packed / "clip" / name).read_text() == (clip_folder() / name).read_text()
        pipeline = AutoPipelineForText2Image.from_pretrained(packed / "sd", dtype=torch.float32)
        image = pipeline("a two", num_inference_steps=4, guidance_scale=1.0, width=64, height=64)
        assert image.images[0].size == (64, 64)
    finally:
        torch.set_num_threads(threads)
