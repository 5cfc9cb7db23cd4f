"""The report is made from a small run directory that the real store and Folder wrote."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from ray_synth.data.images import encode_image
from ray_synth.evaluation.accuracy import interval
from ray_synth.generation.acceptance import NEEDED, Acceptance, least_accepted
from ray_synth.generation.store import ImageStore
from ray_synth.generators.licences import DISCLAIMER, LICENCES, licence_of
from ray_synth.prompting.plan_file import PLAN_SCHEMA
from ray_synth.report.page import (
    meanings,
    stage_times,
    write_report,
)
from ray_synth.report.plots import accuracy_plot, loss_plot, smooth, thin
from ray_synth.report.sheet import (
    choose_examples,
    choose_refused,
    contact_sheet,
    sheet_of,
    sheet_size,
    write_contact_sheet,
)
from ray_synth.report.table import comparison_rows, comparison_table, gain, signed
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact

EVIL = "<script>alert(1)</script>"
CLASSES = ("zero", "one", EVIL)
SECTIONS = ("headline", "comparison", "images", "meanings", "curves", "time", "aside", "run")


def result(right: int, images: int = 1000) -> dict:
    return {
        "top1": 100 * right / images,
        "top1_interval": interval(right, images),
        "top5": 100.0,
        "top5_interval": interval(images, images),
        "images": images,
        "by_class": dict.fromkeys(CLASSES, 100 * right / images),
    }


def metrics() -> dict:
    return {
        "run": "small",
        "num_real": 60,
        "num_synthetic": 360,
        "real_only": {"in_domain": result(900), "ood": {"uci_digits": result(150)}},
        "mixed": {
            "main": {"in_domain": result(912), "ood": {"uci_digits": result(280)}},
            "aux": {"in_domain": result(800), "ood": {"uci_digits": result(460)}},
        },
        "images_per_second": {"generation": 12.5},
        "stall_fraction": 0.125,
        "seconds": {
            "meaning": 12.0,
            "training": 95.0,
            "training_real_only": 30.0,
            "training_mixed": 65.0,
            "total": 140.0,
        },
        "left_out": ["data.test: 2 images are left out"],
        "corrupt": {"train": [{"image_id": "bad.jpg", "error": "truncated"}], "test": ["t9.png"]},
        "rejected": 4,
        "contexts": {"llm": 200, "pool": 100},
    }


def picture(index: int) -> Image.Image:
    image = Image.new("RGB", (32, 32), (40 * index % 256, 90, 160))
    ImageDraw.Draw(image).ellipse((6, 6, 26, 26), fill=(250, 200 - index, 40))
    return image


def image_rows(count: int = 3) -> list[dict]:
    rows = []
    for index, name in enumerate(CLASSES):
        for kind in ("plain", "contextual", "stylized"):
            for turn in range(count):
                rows.append(
                    {
                        "sample_id": f"{index}{kind[0]}{turn}",
                        "class_index": index,
                        "class_name": name,
                        "meaning": f"the digit {index}",
                        "kind": kind,
                        "style": "ukiyo-e" if kind == "stylized" else "",
                        "prompt": f'a {kind} picture of "{name}", number {turn}',
                        "negative_prompt": "",
                        "context_source": "llm",
                        "seed": turn,
                        "image": encode_image(
                            picture(turn), image_format="webp" if turn % 2 else "png"
                        ),
                        "width": 32,
                        "height": 32,
                        "clip_score": None if turn else 0.25,
                        "accepted": True,
                        "reject_reason": "",
                        "generator": "{}",
                        "gpu_seconds": 0.1,
                    }
                )
    return rows


def curve(synth: bool) -> list[dict]:
    points = []
    for step in range(10, 410, 10):
        point = {"step": step, "loss_real": 20 / step, "train_top1_real": 1 - 5 / step}
        extra = {"loss_synth": 30 / step, "train_top1_synth": 1 - 8 / step}
        points.append({**point, "loss": 50 / step, **(extra if synth else {})})
    return points


@pytest.fixture
def run(tmp_path) -> Folder:
    folder = Folder(tmp_path / "small")
    folder.write_yaml(
        "config.yaml",
        {
            "name": "small",
            "seed": 0,
            "training": {"model": "resnet18", "dual_bn": True},
            "tracking": {"uri": "https://me:secret@mlflow.example"},
            "versions": {"torch": "2.14.1"},
        },
    )
    folder.write_json(
        "meanings.json",
        [
            {
                "class_name": name,
                "choice": f"the digit {index}",
                "margin": 0.0123,
                "num_images": 5,
                "llm": "embedded",
                "clip": "embedded",
                "candidates": [
                    {"meaning": name, "score": 0.2, "source": "name"},
                    {"meaning": f"the digit {index}", "score": 0.2123, "source": "llm"},
                ],
            }
            for index, name in enumerate(CLASSES)
        ],
    )
    rows = image_rows()
    ImageStore(folder.child("images")).write(rows[:10])
    ImageStore(folder.child("images")).write(rows[10:])
    for arm in ("real_only", "mixed"):
        folder.write_json(
            f"models/{arm}.json",
            {
                "arm": arm,
                "curve": curve(arm == "mixed"),
                "stall_fraction": 0.125,
                "seconds": 65.0,
                "real_images_seen": 12800,
                "steps": 400,
                "corrupt": [],
            },
        )
    folder.write_json("metrics.json", metrics())
    return folder


class Page(HTMLParser):
    """What a browser would make of it: tags, ids, loaded addresses, images, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.loads += [values[key] for key in ("src", "href", "srcset", "data") if key in values]
        if tag == "img":
            self.images.append(values)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(folder: Folder) -> Page:
    page = Page(folder.read_bytes("report/index.html").decode())
    page.text = " ".join(page.text.split())
    assert page.open == []
    return page


def test_page_has_every_section_and_says_what_was_gained(run):
    assert write_report(run) == run.uri + "/report/index.html"
    page = read_page(run)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(set(page.ids)) == len(page.ids)
    for text in (
        "+1.2",
        "90.0% real only (matched baseline) → 91.2% with synthetic",
        "no clear change",
        "+13.0",
    ):
        assert text in page.text
    for text in (
        "auxiliary BN",
        "bad.jpg: truncated",
        "data.test: 2 images are left out",
        "t9.png",
        "12.5%",
        "2 min",
        "2.14.1",
    ):
        assert text in page.text
    assert run.names() == ["config.yaml", "meanings.json", "metrics.json"]
    assert run.child("report").names() == ["index.html"]


def test_page_loads_nothing_from_outside(run):
    write_report(run)
    page = read_page(run)
    assert page.loads
    assert all(address.startswith("data:image/") for address in page.loads)
    assert not {"script", "link", "iframe", "base", "object"} & set(page.tags)
    assert "url(" not in run.read_bytes("report/index.html").decode()


def test_page_images_decode_and_carry_alt_text_and_prompt(run):
    write_report(run)
    photos = [i for i in read_page(run).images if not i["src"].startswith("data:image/svg")]
    assert len(photos) == 27
    for image in photos:
        assert image["alt"]
        assert image["title"].startswith("a ")
        data = base64.b64decode(image["src"].partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (32, 32)


def test_class_names_and_prompts_are_escaped(run):
    write_report(run)
    html = run.read_bytes("report/index.html").decode()
    assert EVIL not in html
    assert EVIL in read_page(run).text


def test_the_page_says_what_was_taken_over_and_what_licences_say(run):
    write_report(run)
    assert not {"taken-over", "licences"} & set(read_page(run).ids)
    taken = {"taken": 1200, "made": 100}
    metrics = {**run.read_json("metrics.json"), "taken_over": {
        "run": "runs/<b>old", "meanings": {"taken": 12, "made": 1}, "contexts": {}, "images": taken,
    }}  # fmt: skip
    run.write_json("metrics.json", metrics)
    found = [licence_of("generator", "black-forest-labs/FLUX.1-dev", ask=False)]
    run.write_json(LICENCES, [licence.as_dict() for licence in found])
    write_report(run)
    assert b"runs/&lt;b&gt;old" in run.read_bytes("report/index.html")
    text = read_page(run).text
    assert {"taken-over", "licences"} <= set(read_page(run).ids)
    assert "1,200 kept, 100 made" in text
    assert "outputs may not be used to train, fine-tune or distill a competing model" in text
    assert DISCLAIMER in text


def test_secrets_in_addresses_stay_out(run):
    write_report(run)
    html = run.read_bytes("report/index.html").decode()
    assert "secret" not in html
    assert "mlflow.example" in html
    assert redact("s3://bucket/a@b") == "s3://bucket/a@b"


def test_page_without_baseline_claims_no_gain(run):
    found = metrics()
    del found["real_only"]
    run.write_json("metrics.json", found)
    run.delete("models/real_only.json")
    write_report(run)
    page = read_page(run)
    assert "cannot say what the synthetic images gained" in page.text
    assert "no clear change" not in page.text
    assert "91.2" in page.text


def test_the_page_names_the_baseline_and_what_its_recipe_has_to_reach(run):
    found = metrics()
    found["recipe"] = found.pop("real_only")
    run.write_json("metrics.json", found)
    run.write_json("models/recipe.json", run.read_json("models/real_only.json"))
    run.write_json("meanings.json", [{"class_name": str(i), "choice": "x"} for i in range(1000)])
    config = {"name": "small", "training": {"recipe": "resnet50_a2", "model": "resnet50"}}
    run.write_yaml("config.yaml", config)
    found["recipe"]["in_domain"]["top1"] = 75.0
    run.write_json("metrics.json", found)
    write_report(run)
    text = read_page(run).text
    assert "75.0% the published recipe (baseline: recipe) → 91.2% with synthetic" in text
    assert "its own batch, rates and epochs" in text
    assert "report 79.8% top-1 in domain on real images alone (arXiv 2110.00476)" in text
    assert "The baseline of this run has 75.0%: a gain over it is not yet a gain" in text
    assert "Published recipe: steps" in text


def test_frequent_and_rare_classes_are_shown_apart(run):
    found = metrics()
    shots = {"many": {"top1": 63.12}, "few": {"top1": 12.9}}
    found["mixed"]["main"]["in_domain"]["shots"] = shots
    run.write_json("metrics.json", found)
    write_report(run)
    assert "many 63.1, few 12.9" in read_page(run).text


def test_gains_over_both_baselines_are_told_apart(run):
    found = metrics()
    found["recipe"] = {"in_domain": result(905), "ood": {}}
    over = {"top1": 0.7, "interval": [-1.0, 2.0], "verdict": "unclear", "over": "recipe"}
    found["mixed"]["main"]["in_domain"]["gain_over_recipe"] = over
    rows = comparison_rows(found)
    assert [row["label"] for row in rows][:2] == ["Real only", "Published recipe"]
    assert rows[1]["gains"] == {}
    assert rows[2]["gains"]["in_domain"]["top1"] == pytest.approx(1.2)
    assert rows[2]["more_gains"] == {"in_domain": over}
    run.write_json("metrics.json", found)
    write_report(run)
    assert "over the published recipe +0.7" in read_page(run).text


def test_page_without_auxiliary_bn_does_not_name_it(run):
    found = metrics()
    del found["mixed"]["aux"]
    run.write_json("metrics.json", found)
    write_report(run)
    page = read_page(run)
    assert "uxiliary" not in page.text
    assert "+1.2" in page.text


def test_page_of_an_unfinished_run_shows_what_there_is(tmp_path):
    folder = Folder(tmp_path / "young")
    folder.write_yaml("config.yaml", {"name": "young", "seed": 3})
    folder.write_json("meanings.json", [{"class_name": "zero", "choice": "zero"}])
    write_report(folder)
    page = read_page(folder)
    assert [name for name in page.ids if name in SECTIONS] == ["headline", "meanings", "run"]
    assert "not been evaluated yet" in page.text


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        write_report(Folder(tmp_path / "nothing"))


def test_page_of_the_same_run_is_the_same(run):
    write_report(run)
    first = run.read_bytes("report/index.html")
    write_report(run)
    assert run.read_bytes("report/index.html") == first


def test_examples_do_not_depend_on_how_parts_were_cut(run, tmp_path):
    other = Folder(tmp_path / "other")
    for row in reversed(image_rows()):
        ImageStore(other.child("images")).write([row])
    ids = [[row["sample_id"] for row in choose_examples(f, per_class=6)] for f in (run, other)]
    assert ids[0] == ids[1]
    assert ids[0][:6] == ["0p0", "0p1", "0c0", "0c1", "0s0", "0s1"]


def test_rejected_images_are_no_examples(tmp_path):
    folder = Folder(tmp_path)
    rows = image_rows(2)
    for row in rows[::2]:
        row |= {"accepted": False, "image": b"", "reject_reason": "flagged"}
    ImageStore(folder.child("images")).write(rows)
    assert {row["sample_id"][-1] for row in choose_examples(folder)} == {"1"}


def test_many_classes_are_sampled_evenly(tmp_path):
    folder = Folder(tmp_path)
    template = image_rows(1)[0]
    rows = [
        {**template, "class_index": index, "class_name": str(index), "sample_id": f"{index:03}"}
        for index in range(40)
    ]
    ImageStore(folder.child("images")).write(rows)
    chosen = [row["class_index"] for row in choose_examples(folder, max_classes=4)]
    assert chosen == [0, 10, 20, 30]


@pytest.mark.parametrize(("columns", "cell"), [(3, 64), (2, 40)])
def test_contact_sheet_has_a_row_a_class_and_a_block_a_kind(columns, cell):
    rows = image_rows(3)
    sheet = contact_sheet(rows, columns=columns, cell=cell)
    assert sheet.mode == "RGB"
    assert sheet.size == sheet_size(3, 3, columns=columns, cell=cell)
    two_kinds = [row for row in rows if row["kind"] != "plain"]
    assert contact_sheet(two_kinds, columns=columns, cell=cell).width < sheet.width
    # The middle of the last class's last image is the fill of the disc.
    last = sheet.getpixel((sheet.width - cell // 2, sheet.height - cell // 2))
    assert last == pytest.approx((250, 201 - columns, 40), abs=12)


def test_contact_sheet_survives_broken_and_missing_images():
    row = image_rows(1)[0]
    sheet = contact_sheet([{**row, "image": b"broken"}], columns=1)
    assert sheet.size == sheet_size(1, 1, columns=1)
    assert contact_sheet([], columns=4).width > 60


def test_written_contact_sheet_is_a_png(run):
    address = write_contact_sheet(run)
    assert address == run.uri + "/report/contact_sheet.png"
    with Image.open(io.BytesIO(run.read_bytes("report/contact_sheet.png"))) as image:
        assert image.format == "PNG"
        assert image.size == sheet_size(3, 3, columns=4)


def test_rows_compare_each_model_with_real_only():
    rows = comparison_rows(metrics())
    assert [row["label"] for row in rows] == [
        "Real only",
        "Real + synthetic, main BN",
        "Real + synthetic, auxiliary BN",
    ]
    assert rows[0]["gains"] == {}
    assert list(rows[1]["results"]) == ["in_domain", "uci_digits"]
    assert rows[1]["gains"]["in_domain"]["top1"] == pytest.approx(1.2)
    assert rows[2]["gains"]["in_domain"]["verdict"] == "loss"
    assert rows[2]["gains"]["uci_digits"]["verdict"] == "gain"
    assert comparison_rows({}) == []


def test_gain_interval_is_newcombes():
    # Newcombe 1998, table II, case (a): 56/70 against 48/80 gives 0.0524 to 0.3339.
    found = gain(result(56, 70), result(48, 80))
    assert found["top1"] == pytest.approx(20.0)
    assert found["interval"] == pytest.approx([5.24, 33.39], abs=0.01)
    assert gain(result(5), result(5))["verdict"] == "unclear"


def test_terminal_table_prints_the_same_numbers():
    from rich.console import Console

    found = metrics()
    found["mixed"]["main"]["ood"]["[red]sketch"] = result(500)
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(comparison_table(found))
    text = console.export_text()
    assert "[red]sketch (OOD)" in text
    assert re.search(r"Real only .*90\.0 \[88\.0, 91\.7\]", text)
    assert "+1.2 [−1.4, +3.8]" in text


def test_signs_read_well():
    assert [signed(v) for v in (1.25, -0.44, 0.04, -0.04)] == ["+1.2", "−0.4", "0.0", "0.0"]


def test_parts_of_a_stage_stand_under_it():
    seconds = {"training_mixed": 6.0, "training": 8.0, "evaluation": 2.0, "total": 99.0}
    rows = stage_times(seconds)
    assert [(row["label"], row["part"]) for row in rows] == [
        ("training", False),
        ("mixed", True),
        ("evaluation", False),
    ]
    assert [row["share"] for row in rows] == [100, 75, 25]


def test_many_meanings_put_the_narrowest_margin_first():
    entries = [{"class_name": str(i), "choice": str(i), "margin": 1 - i / 100} for i in range(30)]
    assert meanings(entries)[0]["class_name"] == "29"
    assert meanings(entries[:5])[0]["class_name"] == "0"


def test_plots_need_a_curve_and_take_gaps():
    assert loss_plot({}) is None
    assert loss_plot({"mixed": []}) is None
    curves = {"mixed": [{"step": 10, "loss": float("nan"), "loss_real": float("nan")}]}
    assert loss_plot(curves).startswith("data:image/svg+xml;base64,")
    assert accuracy_plot(curves) is None
    assert accuracy_plot({"real_only": curve(False)}) != accuracy_plot(
        {"real_only": curve(False)}, dark=True
    )


def test_long_curves_are_averaged_down_and_keep_their_mean():
    values = [float(v) for v in range(9600)]
    assert len(thin(values)) == 240
    assert thin(values).mean() == pytest.approx(4799.5)
    assert list(smooth(thin([2.0] * 9), 4)) == pytest.approx([2.0] * 9)


@pytest.fixture
def judged(run) -> Folder:
    """The run with a plan, and one more image of the first class, which was rejected."""
    reason = "clip score 0.151 is below 0.183, the least of the real images"
    bad = {**image_rows()[0], "sample_id": "bad", "accepted": False, "reject_reason": reason}
    ImageStore(run.child("images")).write([bad])
    plan = [{name: row.get(name) for name in PLAN_SCHEMA.names} for row in [*image_rows(), bad]]
    run.write_table("plan.parquet", pa.Table.from_pylist(plan, schema=PLAN_SCHEMA))
    return run


def reddish(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a part of a sheet have the colour of captions."""
    pixels = np.asarray(sheet.crop(box)).astype(int)
    return int(((pixels[..., 0] - pixels[..., 2] > 90) & (pixels[..., 1] < 90)).sum())


def test_a_sheet_of_a_slice_has_what_was_asked_for(judged):
    whole = sheet_of(judged, rejected=False, columns=3, cell=64)
    assert whole.size == sheet_size(3, 3, columns=3)
    one = sheet_of(judged, class_names=["one"], kinds=["plain", "stylized"], columns=3, cell=64)
    assert one.size == sheet_size(1, 2, columns=3)
    styled = sheet_of(judged, style="ukiyo-e", columns=3, cell=64)
    assert styled.size == sheet_size(3, 1, columns=3)
    named = sheet_of(judged, sample_ids=["0p2"], columns=1, cell=64)
    # The disc of turn 2, in its colours.
    assert named.getpixel((named.width - 32, named.height - 32)) == pytest.approx((250, 198, 40))
    few = sheet_of(judged, limit=1, columns=1, cell=64)
    assert few.size == sheet_size(1, 1, columns=1), "the first of the plan"


def test_a_sheet_says_under_a_picture_why_it_was_rejected(judged):
    good = sheet_of(judged, class_names=["zero"], kinds=["plain"], rejected=False, columns=4)
    bad = sheet_of(judged, rejected=True, columns=4)
    under = bad.height - good.height
    assert under > 0
    strip = (120, bad.height - under, 120 + 96, bad.height)
    assert reddish(bad, strip) > 30
    assert reddish(bad, (216, 0, *bad.size)) == 0, "nothing beside it"
    both = sheet_of(judged, class_names=["zero"], kinds=["plain"], columns=4)
    assert both.size == sheet_size(1, 1, columns=4, cell=96, under=under)


def test_a_class_with_many_images_goes_on_in_the_next_line(judged):
    sheet = sheet_of(judged, rejected=False, kinds=["plain"], columns=2, cell=64)
    assert sheet.size == sheet_size(6, 1, columns=2)
    second = sheet.crop((0, sheet.height - 64, 100, sheet.height))
    assert second.getcolors() == [(6400, (255, 255, 255))], "the name stands once"


def test_a_sheet_of_nothing_says_what_there_is(judged, tmp_path):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"class_names": ["tow"]}, "there are <script>.*one, zero"),
        ({"kinds": ["stylised"]}, "did you mean 'stylized'"),
        ({"style": "cubism"}, "there are ukiyo-e"),
        ({"sample_ids": ["nope"]}, "no image has sample id 'nope'"),
        ({"class_names": ["one"], "rejected": True}, "there are 9 one; .*9 accepted"),
        ({"columns": 0}, "1 or more"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            sheet_of(judged, **arguments)
    with pytest.raises(ValueError, match=r"no plan\.parquet"):
        sheet_of(Folder(tmp_path / "nowhere"))


def test_generation_facts_leave_out_what_is_not_known():
    from ray_synth.report.page import generation_facts

    assert generation_facts({}) == []
    facts = {"gpu_hours": 1.5, "cpu_hours": 3.0, "cost": 2.0, "flagged": 1234, "retried": 0}
    shown = dict(generation_facts({"generation": facts, "images_per_second": {"generation": 7}}))
    assert shown == {
        "Images per second": "7.0",
        "GPU-hours": "1.50",
        "Cost": "2.00",
        "Images flagged": "1,234",
    }


def test_what_the_checks_found_is_shown_with_pictures_and_reasons(judged):
    counts = Acceptance()
    for _, table in ImageStore(judged.child("images")).every(NEEDED):
        counts.add(table)
    counts.save(judged)
    found = counts.as_dict()
    assert sum(made for _, made in found["class_name"].values()) == sum(
        made for _, made in found["kind"].values()
    )
    assert found["kind"]["plain"] == [9, 10]
    write_report(judged)
    page = read_page(judged)
    assert "checks" in page.ids
    (bad,) = choose_refused(judged)
    assert bad["sample_id"] == "bad"
    shown = [image for image in page.images if image["alt"].endswith("that did not pass")]
    assert len(shown) == 1
    assert f"{bad['class_name']}: {bad['reject_reason']}" in page.text


def test_the_least_accepted_come_first():
    found = {"style": {"a": [9, 10], "b": [1, 10], "c": [5, 10]}}
    assert least_accepted(found, "style", 2) == [("b", 1, 10), ("c", 5, 10)]
    assert least_accepted({}, "style", 2) == []


def test_a_preview_says_what_the_whole_would_take(judged):
    judged.delete("metrics.json")
    found = {"images": 12, "passed": 9, "planned": 1200, "seconds_per_image": 0.5, "hours": 0.17,
             "gpu_hours": 0.0, "cpu_hours": 0.17, "cost": 0.0}  # fmt: skip
    judged.write_json("preview.json", found)
    write_report(judged)
    page = read_page(judged)
    assert "preview" in page.ids and "headline" not in page.ids
    assert "first 12 of 1,200 planned images, of which 9 passed" in page.text
    assert "CPU-hours of generation" in page.text
    judged.write_json("metrics.json", metrics())
    write_report(judged)
    assert "preview" not in read_page(judged).ids
