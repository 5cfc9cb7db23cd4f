"""The maker without Ray: chunks in, rows out, judged, retried, stored once."""

import io
import json
import threading

import numpy as np
import pyarrow as pa
import pytest
from painting import Painter
from PIL import Image
from test_store import plan_rows

from ray_synth.config import GenerationConfig, QualityConfig
from ray_synth.data.images import decode_image, encode_image
from ray_synth.errors import UserError
from ray_synth.generation.cost import earlier_attempts
from ray_synth.generation.maker import GenerationJob, ImageMaker, attempt_seed, write_references
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore
from ray_synth.generators.protocol import Failure, generate_all
from ray_synth.generators.registry import fingerprint, generator_class
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.storage.folder import Folder


def config(policy="off", **kwargs):
    return GenerationConfig(
        generator="painting:Painter",
        generator_kwargs=kwargs,
        width=16,
        height=16,
        batch_size=4,
        image_format="png",
        checks=QualityConfig(policy=policy),
    )


def maker(folder, rows, settings, **job):
    plan = PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
    return ImageMaker(GenerationJob(settings, plan, ImageStore(Folder(folder)), **job))


def test_rows_are_complete_and_stored_as_one_part(tmp_path):
    rows = plan_rows(4)
    made = maker(tmp_path, rows, config())
    out = made(pa.table({"start": [0], "stop": [4], "parts": [[]]}))
    assert out.schema == IMAGE_SCHEMA
    store = made.store
    assert store.read(store.parts()[0]).to_pylist() == out.to_pylist()
    for row, planned in zip(out.to_pylist(), rows, strict=True):
        assert planned.items() <= row.items()
        assert decode_image(row["image"]).size == (row["width"], row["height"]) == (16, 16)
        facts = json.loads(row["generator"])
        assert facts["generator"] == "painting:Painter"
        assert facts["fingerprint"] == fingerprint(config())


@pytest.mark.parametrize(("side", "kind"), [(64, "PNG"), (128, "PNG"), (136, "JPEG")])
def test_small_pictures_are_kept_as_png_and_others_as_jpeg(tmp_path, side, kind):
    settings = config().model_copy(update={"image_format": "auto", "width": side, "height": 64})
    (row,) = maker(tmp_path, plan_rows(1), settings).chunk(0, 1, [])
    with Image.open(io.BytesIO(row["image"])) as image:
        assert (image.format, image.size) == (kind, (side, 64))
    (pixels,) = Painter(settings).generate(plan_rows(1))
    gap = np.abs(np.asarray(pixels, int) - np.asarray(decode_image(row["image"]), int))
    assert gap.max() == 0 if kind == "PNG" else 0 < gap.mean() < 70


def test_quality_names_other_images_only_where_the_format_has_one():
    def digest(image_format, quality, side=64):
        changes = {"image_format": image_format, "quality": quality, "width": side}
        return fingerprint(config().model_copy(update=changes))

    assert digest("png", 92) == digest("png", 95) == digest("auto", 95)
    assert digest("auto", 92, 512) == digest("jpeg", 92, 512) != digest("jpeg", 95, 512)


def test_images_are_encoded_in_as_many_threads_as_the_actor_has_cpus(tmp_path, monkeypatch):
    together = threading.Barrier(3, timeout=30)

    def encode(image, **how):
        together.wait()  # breaks where fewer threads are at work
        return encode_image(image, **how)

    monkeypatch.setattr("ray_synth.generation.maker.encode_image", encode)
    settings = config().model_copy(update={"num_cpus": 3.0})
    rows = maker(tmp_path, plan_rows(6), settings).chunk(0, 6, [])
    painted = Painter(settings).generate(plan_rows(6))
    for row, picture in zip(rows, painted, strict=True):
        assert (np.asarray(decode_image(row["image"])) == np.asarray(picture)).all()


def test_what_is_stored_is_read_and_not_made(tmp_path):
    made = maker(tmp_path, plan_rows(6), config())
    first = made.chunk(0, 4, [])
    second = maker(tmp_path, plan_rows(6), config(fail="photo"))  # cannot make anything
    assert second.chunk(0, 4, made.store.parts()) == first
    assert second.chunk(0, 4, []) == first, "a task tried again after its part was written"


def test_a_chunk_that_is_half_stored_is_completed_in_order(tmp_path):
    made = maker(tmp_path, plan_rows(6), config())
    made.chunk(0, 2, [])
    parts = made.store.parts()
    rows = made.chunk(0, 6, parts)
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in plan_rows(6)]
    assert len(made.store.parts()) == 2


def test_one_bad_prompt_costs_only_itself(tmp_path):
    rows = maker(tmp_path, plan_rows(4), config(fail="photo of 2")).chunk(0, 4, [])
    assert [row["accepted"] for row in rows] == [True, True, False, True]
    assert rows[2]["reject_reason"] == "ValueError: this prompt cannot be painted"
    assert rows[2]["image"] == b""


def test_a_generator_that_fails_on_every_row_stops_the_run(tmp_path):
    made = maker(tmp_path, plan_rows(4), config(fail="photo"))
    with pytest.raises(RuntimeError, match=r"fails on all of 4 rows: ValueError: this prompt"):
        made.chunk(0, 4, [])
    assert made.store.parts() == []
    made = maker(tmp_path, plan_rows(4), config())

    def refused(rows):
        raise UserError("no endpoint at http://localhost:9")

    made._load()
    made._models.generator.generate = refused
    with pytest.raises(UserError, match="^no endpoint at http://localhost:9$"):
        made.chunk(0, 4, [])


@pytest.mark.parametrize(
    ("policy", "accepted", "reason"),
    [("off", True, ""), ("flag", True, "blank"), ("reject", False, "blank")],
)
def test_policies_of_quality(tmp_path, policy, accepted, reason):
    rows = maker(tmp_path, plan_rows(4), config(policy, blank="photo of 1")).chunk(0, 4, [])
    assert rows[1]["accepted"] is accepted
    assert rows[1]["reject_reason"].startswith(reason)
    assert rows[1]["image"], "a rejected image is kept"
    assert all(row["accepted"] and not row["reject_reason"] for row in rows if row != rows[1])


def test_retry_takes_new_seeds_and_keeps_what_it_rejected(tmp_path):
    rows = plan_rows(4)
    never, once = rows[1], rows[2]
    blank = [attempt_seed(never["seed"], attempt) for attempt in range(3)] + [once["seed"]]
    made = maker(tmp_path, rows, config("retry", blank_seeds=blank))
    out = made.chunk(0, 4, [])
    assert [(row["attempt"], row["accepted"]) for row in out] == [
        (0, True),
        (2, False),
        (1, True),
        (0, True),
    ]
    assert [row["seed"] for row in out] == [row["seed"] for row in rows], "the plan's own seeds"
    kept = [row for name in made.store.rejected.parts() for row in _read(made, name)]
    assert sorted((row["sample_id"], row["attempt"]) for row in kept) == [
        (never["sample_id"], 0),
        (never["sample_id"], 1),
        (once["sample_id"], 0),
    ]
    assert len(made.store.parts()) == 1, "rejected attempts are no parts of the store"
    repeated = Painter(made.job.config).generate([{**once, "seed": attempt_seed(once["seed"], 1)}])
    assert (np.asarray(repeated[0]) == np.asarray(decode_image(out[2]["image"]))).all()


def test_rows_that_fail_alike_in_every_attempt_are_all_kept(tmp_path):
    rows = plan_rows(4)
    blank = [attempt_seed(row["seed"], attempt) for row in rows[:2] for attempt in range(3)]
    made = maker(tmp_path, rows, config("retry", blank_seeds=blank))
    made.chunk(0, 4, [])
    kept = [row for name in made.store.rejected.parts() for row in _read(made, name)]
    ids = [row["sample_id"] for row in rows[:2]]
    assert sorted((row["sample_id"], row["attempt"]) for row in kept) == [
        (sample_id, attempt) for sample_id in ids for attempt in (0, 1)
    ]
    assert len(earlier_attempts(made.store)) == 4, "each attempt is paid for"


def test_rows_that_raise_are_not_tried_again_and_end_nothing(tmp_path):
    """Two of them: another attempt would see no other rows, as if the generator were broken."""
    rows = plan_rows(4)
    for row in rows[1:3]:
        row["prompt"] = "cursed"
    made = maker(tmp_path, rows, config("retry", fail="cursed"))
    assert [row["accepted"] for row in made.chunk(0, 4, [])] == [True, False, False, True]
    assert made.store.rejected.parts() == []


class Refusing(Painter):
    """Says why it makes no image, with a colon, as an exception's text has it."""

    def generate(self, rows):
        return [Failure("policy: not this one") for _ in rows]


def test_a_batch_of_refusals_is_no_broken_generator(tmp_path):
    settings = config().model_copy(update={"generator": "test_maker:Refusing"})
    rows = maker(tmp_path, plan_rows(2), settings).chunk(0, 2, [])
    assert [row["reject_reason"] for row in rows] == ["policy: not this one"] * 2


def _read(made, name):
    return made.store.rejected.read(name).to_pylist()


def test_rows_with_a_reference_get_its_image(tmp_path):
    from samples import encoded

    run = Folder(tmp_path / "run")
    write_references(run, {"cat/1": encoded(3), "cat/2": encoded(4)})
    rows = [{**row, "reference": f"cat/{1 + i % 2}"} for i, row in enumerate(plan_rows(4))]
    settings = config().model_copy(update={"reference": object()})
    made = maker(tmp_path / "images", rows, settings, run=run).chunk(0, 4, [])
    images = [row["image"] for row in made]
    assert images[0] == images[2] != images[1] == images[3]


def test_plug_ins_are_found_by_module_and_by_entry_point():
    assert generator_class("painting:Painter") is Painter
    biggan = generator_class("biggan")
    assert biggan.__name__ == "BigGanGenerator"


def test_halving_asks_no_more_than_it_must():
    class Counting(Painter):
        calls = 0

        def generate(self, rows):
            Counting.calls += 1
            return super().generate(rows)

    made = generate_all(Counting(config(fail="photo of 5")), plan_rows(8))
    assert [image is None for image, _ in made].index(True) == 5
    assert Counting.calls == 7  # 1 + 2 per halving
