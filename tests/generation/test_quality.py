"""Bad images are told from good ones: pixels, CLIP scores and copies, against real digits."""

import io
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ray_synth.data.digits import CLASS_NAMES, load_digits
from ray_synth.data.images import encode_image
from ray_synth.generation import quality
from ray_synth.generation.label_check import least_margin, prototypes
from ray_synth.generation.quality import Duplicate, Judge, find_duplicates, pixel_fault
from ray_synth.generation.thresholds import (
    EXACT_COPY,
    QualityReference,
    Thresholds,
    duplicate_distances,
    least_scores,
    load_reference,
    measure_reference,
    real_features,
    save_reference,
)
from ray_synth.meaning.clip import ClipModel
from ray_synth.storage.folder import Folder

TEXTS = {digit: f"the number {digit}" for digit in range(10)}


def digits(split: str, count: int) -> dict[int, list[Image.Image]]:
    """The first `count` handwritten digits of each class."""
    pixels, names = load_digits("digits", split)
    labels = np.array([CLASS_NAMES.index(name) for name in names])
    return {
        digit: [Image.fromarray(pixels[row]) for row in np.flatnonzero(labels == digit)[:count]]
        for digit in range(10)
    }


def rows_of(labels: list[int]) -> list[dict]:
    return [{"sample_id": f"s{i}", "class_index": label} for i, label in enumerate(labels)]


def flat(images: dict[int, list[Image.Image]]) -> tuple[list[dict], list[Image.Image]]:
    labels = [digit for digit, pictures in images.items() for _ in pictures]
    return rows_of(labels), [picture for pictures in images.values() for picture in pictures]


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return ClipModel("embedded")


@pytest.fixture(scope="module")
def reference(clip: ClipModel) -> QualityReference:
    return measure_reference(digits("train", 32), TEXTS, clip)


# pixels


@given(
    hnp.arrays(np.uint8, 3, elements=st.integers(1, 254)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 2**32 - 1),
)
def test_one_colour_with_a_level_of_noise_is_blank(colour, size, seed):
    noise = np.random.default_rng(seed).integers(-1, 2, (*size, 3))
    assert pixel_fault((colour + noise).astype(np.uint8)).startswith("blank: ")


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 12), st.integers(0, 12), st.just(3))))
def test_any_picture_gets_an_answer_and_turning_it_changes_nothing(pixels):
    fault = pixel_fault(pixels)
    assert fault == "" or fault.startswith(("blank: ", "saturated: "))
    assert pixel_fault(np.rot90(pixels)) == pixel_fault(pixels[:, ::-1]) == fault


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_greys_are_never_saturated(grey):
    assert not pixel_fault(np.stack([grey] * 3, axis=-1)).startswith("saturated")


def test_what_a_safety_checker_or_an_overflow_blacks_out_is_blank():
    assert pixel_fault(np.zeros((64, 64, 3), np.uint8)).startswith("blank: ")
    assert pixel_fault(np.full((64, 64, 3), 255, np.uint8)).startswith("blank: ")
    assert pixel_fault(np.zeros((0, 64, 3), np.uint8)) == "blank: no pixels"


def test_a_hot_pixel_makes_no_picture():
    pixels = np.full((64, 64, 3), 30, np.uint8)
    pixels[5, 5] = 255
    assert pixel_fault(pixels).startswith("blank: ")


@pytest.mark.parametrize(("name", "split"), [("digits", "test"), ("uci_digits", None)])
def test_every_handwritten_digit_is_a_picture(name, split):
    for pixels in load_digits(name, split)[0][::5]:
        for page in (pixels, 255 - pixels, (pixels > 127).astype(np.uint8) * 255):
            assert pixel_fault(np.stack([page] * 3, axis=-1)) == ""


def test_fog_photographs_and_flat_paint_are_pictures():
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    fog = (200 + rng.normal(0, 2, (64, 64, 1)) + np.zeros(3)).astype(np.uint8)
    assert pixel_fault(fog) == ""
    gradient = np.linspace(190, 206, 64)[:, None, None] + np.zeros((64, 64, 3))
    assert pixel_fault(gradient.astype(np.uint8)) == ""
    for photograph in load_sample_images().images:
        assert pixel_fault(photograph) == ""
    paint = np.zeros((60, 60, 3), np.uint8)
    paint[:20], paint[20:40], paint[40:] = (255, 0, 0), (255, 255, 0), (255, 128, 0)
    assert pixel_fault(paint) == "", "pure colours and one orange"
    dark_room = np.zeros((64, 64, 3), np.uint8)
    dark_room[..., 0] = np.linspace(0, 250, 64)
    assert pixel_fault(dark_room) == "", "red light only"


def test_colours_driven_out_of_the_range_are_saturated():
    """A photograph whose colours and contrast are blown up, as too much guidance does."""
    from sklearn.datasets import load_sample_image

    flower = load_sample_image("flower.jpg").astype(float)
    grey = flower.mean(axis=2, keepdims=True)
    faults = [
        pixel_fault((grey + gain * (flower - grey)).clip(0, 255).astype(np.uint8))
        for gain in (1, 1.5, 8)
    ]
    assert faults[:2] == ["", ""]
    assert faults[2].startswith("saturated: ")


# thresholds


@given(
    st.dictionaries(
        st.integers(0, 5), hnp.arrays(np.float64, st.integers(0, 8), elements=st.floats(-1, 1))
    ),
    st.floats(0, 0.2),
)
def test_a_score_is_asked_of_every_class_with_images_if_the_spread_is_known(scores, quantile):
    found = least_scores(scores, quantile)
    assert found.keys() == scores.keys()
    spread_known = any(len(own) > 1 for own in scores.values())
    for index, own in scores.items():
        assert (found[index] is not None) == (len(own) > 0 and spread_known)


def test_few_images_a_class_borrow_the_spread_of_all():
    """5 images of 200 classes: 1% of new images fail, which no quantile of 5 values could do."""
    rng = np.random.default_rng(0)
    means = rng.normal(0.2, 0.05, 200)
    seen = {c: rng.normal(means[c], 0.02, 5) for c in range(200)}
    least = least_scores(seen, 0.01)
    failed = np.mean(
        [(rng.normal(means[c], 0.02, 500) < (least[c] or 0)).mean() for c in range(200)]
    )
    assert 0.005 < failed < 0.02
    own = np.mean([(rng.normal(means[c], 0.02, 500) < seen[c].min()).mean() for c in range(200)])
    assert own > 0.1


def test_many_images_a_class_set_their_own_score():
    wide, narrow = np.linspace(-1, 1, 301), np.linspace(0.1, 0.2, 301)
    found = least_scores({0: wide, 1: narrow}, 0.01)
    assert found == {0: pytest.approx(-0.98), 1: pytest.approx(0.101)}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(st.lists(st.integers(0, 6), max_size=5), st.integers(0, 2**32 - 1), st.floats(0, 0.99))
def test_duplicate_distances_are_never_below_an_exact_copy(sizes, seed, quantile):
    rng = np.random.default_rng(seed)
    features = {c: unit(rng.normal(size=(n, 4)).round() + 0.1) for c, n in enumerate(sizes)}
    found = duplicate_distances(features, quantile)
    assert found.keys() == features.keys()
    assert all(EXACT_COPY <= distance <= 2 for distance in found.values())
    if all(n < 2 for n in sizes):
        assert set(found.values()) <= {EXACT_COPY}


def test_few_images_do_not_make_everything_a_duplicate():
    """5 of 300 classes, in a crowd of 200: the nearest of 5 are far apart, those of 200 are not."""
    rng = np.random.default_rng(0)

    def pictures(count: int) -> np.ndarray:
        return unit(np.concatenate([np.ones((count, 8)), rng.normal(0, 0.3, (count, 8))], axis=1))

    reach = duplicate_distances({c: pictures(5) for c in range(300)}, 0.05, images_per_class=200)
    shares = []
    for c in range(20):
        crowd = pictures(200)
        similar = crowd @ crowd.T - 9 * np.eye(200)
        shares.append((1 - similar.max(axis=1) < reach[c]).mean())
    assert 0.01 < np.mean(shares) < 0.15
    naive = np.median([1 - np.sort((p := pictures(5)) @ p.T)[:, -2].max() for _ in range(50)])
    assert naive > 2 * np.median(list(reach.values()))


def test_copies_among_the_real_images_do_not_make_a_distance():
    rows = unit(np.random.default_rng(0).normal(size=(10, 8)))
    twice = {0: np.concatenate([rows, rows[:1]]), 1: np.concatenate([rows[:1]] * 3)}
    found = duplicate_distances(twice, 0.5, images_per_class=11)
    assert found[0] > 0.01
    assert duplicate_distances({1: twice[1]}, 0.5) == {1: EXACT_COPY}


def test_a_class_of_one_image_takes_the_pool_for_its_distance():
    rng = np.random.default_rng(0)
    features = {0: unit(rng.normal(size=(20, 8))), 1: unit(rng.normal(size=(1, 8)))}
    found = duplicate_distances(features, 0.5, images_per_class=20)
    assert found[1] == found[0] > 0.05


def test_thresholds_and_reference_come_back_as_they_were(tmp_path, clip):
    pictures = digits("train", 4) | {3: [], 4: [digits("train", 1)[4][0]]}
    reference = measure_reference(pictures, TEXTS, clip, clip_quantile=0.02)
    thresholds = reference.thresholds
    assert thresholds.least_score[3] is None
    assert thresholds.clip_model == "embedded"
    assert Thresholds.from_json(json.loads(json.dumps(thresholds.to_json()))) == thresholds
    folder = Folder(tmp_path)
    save_reference(folder, reference)
    again = load_reference(folder)
    assert again.thresholds == thresholds
    for written, read in (
        (reference.text_features, again.text_features),
        (reference.real_features, again.real_features),
    ):
        assert written.keys() == read.keys()
        assert all(np.array_equal(written[index], read[index]) for index in written)
        assert all(written[index].dtype == read[index].dtype for index in written)


def test_encoded_real_images_count_as_decoded_ones(clip):
    pictures = digits("train", 3)
    encoded = {digit: [encode_image(one) for one in some] for digit, some in pictures.items()}
    of_bytes, of_pictures = (measure_reference(x, TEXTS, clip) for x in (encoded, pictures))
    assert of_bytes.thresholds == of_pictures.thresholds


def test_wrong_real_images_are_named(clip):
    with pytest.raises(ValueError, match=r"class indices \[11\]"):
        measure_reference({11: []}, TEXTS, clip)
    with pytest.raises(ValueError, match="real image 1 of class index 7"):
        real_features({7: [digits("train", 1)[7][0], b"GIF89a"]}, clip)


# the judge


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("per_class", [5, 32])
def test_real_digits_that_it_never_saw_pass(clip, per_class, labels):
    reference = measure_reference(digits("train", per_class), TEXTS, clip)
    rows, pictures = flat(digits("test", 50))
    verdicts = Judge(reference, clip, labels=labels).judge(rows, pictures)
    passed = np.mean([verdict.reason == "" for verdict in verdicts])
    assert passed >= (0.85 if labels else 0.95), "the label check gives up one in ten"


def test_most_digits_of_another_class_fail_their_score(reference, clip):
    """At the 1% threshold some pass: over draws of the real images 65% to 93% were caught."""
    images = digits("test", 30)
    rows, pictures = flat({digit: images[(digit + 3) % 10] for digit in range(10)})
    verdicts = Judge(reference, clip, labels=False).judge(rows, pictures)
    caught = np.mean([verdict.reason.startswith("clip score ") for verdict in verdicts])
    assert caught >= 0.7
    verdicts = Judge(reference, clip).judge(rows, pictures)
    shown = [verdict.reason.startswith("another class: nearer to ") for verdict in verdicts]
    assert np.mean(shown) >= 0.85, "they are told for what they are"
    assert np.mean([verdict.reason != "" for verdict in verdicts]) >= 0.95


def test_noise_and_blank_images_fail(reference, clip):
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(10)]
    pictures = [*noise, Image.new("RGB", (64, 64)), Image.new("L", (28, 28), 255)]
    verdicts = Judge(reference, clip).judge(rows_of([*range(10), 0, 1]), pictures)
    assert sum(verdict.reason.startswith("clip score ") for verdict in verdicts[:10]) >= 8
    assert all(verdict.reason.startswith("blank: ") for verdict in verdicts[10:])
    assert all(verdict.clip_score is not None for verdict in verdicts), "failed, but scored"


def test_the_later_of_two_likes_in_a_batch_is_the_duplicate(reference, clip):
    images = digits("test", 2)
    first, second = images[4]
    pictures = [first, second, images[5][0], first.resize((64, 64)), first]
    verdicts = Judge(reference, clip).judge(rows_of([4, 4, 5, 5, 4]), pictures)
    assert [verdict.reason for verdict in verdicts[:3]] == ["", "", ""]
    assert "near-duplicate" not in verdicts[3].reason, "it is of another class"
    assert verdicts[4].reason == "near-duplicate of s0 (distance 0.0000)"


def test_a_failed_image_has_no_duplicates(reference, clip):
    blank = Image.new("RGB", (28, 28))
    verdicts = Judge(reference, clip, pixels=False).judge(rows_of([2, 2]), [blank, blank])
    faults = ("clip score ", "another class: ")
    assert all(verdict.reason.startswith(faults) for verdict in verdicts)


def test_a_copy_of_a_real_image_is_named(reference, clip):
    real = digits("train", 3)[6][2]
    copy = Image.open(io.BytesIO(encode_image(real)))
    (verdict,) = Judge(reference, clip).judge(rows_of([6]), [copy])
    assert verdict.reason == "copy of a real training image (distance 0.0000)"


def test_broken_images_do_not_touch_the_others(reference, clip):
    good = digits("test", 1)
    torn = Image.open(io.BytesIO(encode_image(good[1][0])[:-60]))
    empty = Image.new("RGB", (0, 5))
    judge = Judge(reference, clip)
    verdicts = judge.judge(rows_of([0, 1, 2, 3, 4]), [good[0][0], torn, None, empty, good[4][0]])
    reasons = [verdict.reason for verdict in verdicts]
    assert reasons[0] == reasons[4] == ""
    assert reasons[1].startswith("unreadable: OSError")
    assert reasons[2:4] == ["no image", "blank: no pixels"]
    assert [verdict.embedding is None for verdict in verdicts] == [False, True, True, True, False]
    assert judge.judge(rows_of([0]), [None])[0].reason == "no image"
    assert judge.judge([], []) == []


def test_a_batch_is_judged_the_same_by_another_process_of_the_run(tmp_path, reference, clip):
    save_reference(Folder(tmp_path), reference)
    rows, pictures = flat(digits("test", 3))
    one, warm = Judge(reference, clip), Judge(load_reference(Folder(tmp_path)), clip)
    warm.judge(*flat(digits("test", 2)))
    for a, b in zip(one.judge(rows, pictures), warm.judge(rows, pictures), strict=True):
        assert (a.clip_score, a.reason) == (b.clip_score, b.reason)
        assert a.embedding is not None
        assert b.embedding is not None
        assert a.embedding.dtype == np.float16
        assert a.embedding.tobytes() == b.embedding.tobytes()


def test_without_clip_only_pixels_are_judged(reference):
    pictures = [digits("test", 1)[0][0], Image.new("RGB", (9, 9), "red"), None]
    for judge in (Judge(), Judge(reference)):
        verdicts = judge.judge(rows_of([0, 0, 0]), pictures)
        assert [verdict.reason[:5] for verdict in verdicts] == ["", "blank", "no im"]
        assert all(v.clip_score is None and v.embedding is None for v in verdicts)
    assert Judge(pixels=False).judge(rows_of([0]), pictures[1:2])[0].reason == ""


def test_a_class_that_the_reference_lacks_is_embedded_and_passes(reference, clip):
    (verdict,) = Judge(reference, clip).judge(rows_of([77]), [digits("test", 1)[0][0]])
    assert (verdict.clip_score, verdict.reason) == (None, "")
    assert verdict.embedding is not None


def test_clip_asks_for_a_reference_of_its_own(reference, clip):
    with pytest.raises(ValueError, match="only against a reference"):
        Judge(None, clip)
    other = Thresholds.from_json(reference.thresholds.to_json() | {"clip_model": "ViT-B-32"})
    with pytest.raises(ValueError, match="'ViT-B-32', not 'embedded'"):
        Judge(QualityReference(other, {}, {}), clip)


# duplicates over a store


def at_distance(reach: float) -> Thresholds:
    none = dict.fromkeys(range(3))
    return Thresholds({}, none, dict.fromkeys(range(3), reach), {}, "none", 0.01, 0.01)


def brute_force(ids, classes, embeddings, reach) -> list[Duplicate]:
    wide = unit(embeddings.astype(np.float64))
    kept: list[int] = []
    found: list[Duplicate] = []
    for row in range(len(ids)):
        near = [
            (max(0.0, round(1 - float(wide[row] @ wide[of]), 6)), of)
            for of in kept
            if classes[of] == classes[row]
        ]
        assume(all(abs(distance - reach) > 2e-6 for distance, _ in near))
        best = min((pair for pair in near if pair[0] < reach), default=None)
        if best is None:
            kept.append(row)
        else:
            found.append(Duplicate(ids[row], ids[best[1]], best[0]))
    return found


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.floats(1e-4, 0.5), st.integers(0, 2**32 - 1))
def test_duplicates_are_those_of_brute_force_whatever_the_block(count, block, reach, seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, 5))
    embeddings = centres[rng.integers(0, 6, count)] + rng.choice([0, 0.02, 0.3]) * rng.normal(
        size=(count, 5)
    )
    embeddings = unit(embeddings).astype(np.float16)
    classes = rng.integers(0, 3, count)
    ids = [f"s{i}" for i in range(count)]
    expected = brute_force(ids, classes, embeddings, reach)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "BLOCK", block)
        found = find_duplicates(ids, classes, embeddings, at_distance(reach))
    assert [(d.sample_id, d.of) for d in found] == [(d.sample_id, d.of) for d in expected]
    assert [d.distance for d in found] == pytest.approx([d.distance for d in expected], abs=2e-6)


def test_a_chain_of_likes_loses_every_second_one():
    angles = np.arange(4) * 0.1
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = find_duplicates(list("abcd"), [0] * 4, chain, at_distance(0.01))
    assert [(d.sample_id, d.of) for d in found] == [("b", "a"), ("d", "c")]


def test_a_class_without_a_distance_gives_up_exact_copies_only():
    rows = unit(np.array([[1, 0], [1, 0.05], [1, 0]], np.float32))
    found = find_duplicates(list("abc"), [9, 9, 9], rows, at_distance(0.5))
    assert found == [Duplicate("c", "a", 0.0)]


# labels


def test_a_class_without_images_is_its_text_and_one_class_has_no_rival():
    texts = {0: np.eye(4)[0], 5: np.eye(4)[1], 7: np.eye(4)[2]}
    real = {0: np.eye(4)[[0, 3]], 5: np.zeros((0, 4)), 7: np.eye(4)[[2]]}
    found = prototypes(texts, real)
    assert found.classes.tolist() == [0, 5, 7]
    assert np.allclose(np.linalg.norm(found.rows, axis=1), 1)
    margin, rival = found.margin(5, np.eye(4)[1])
    assert margin > 0
    assert rival in (0, 7)
    assert found.margin(6, np.eye(4)[1]) is None
    assert prototypes({3: np.eye(4)[0]}, {}).margin(3, np.eye(4)[0]) is None
    assert least_margin({3: np.eye(4)[0]}, {3: np.eye(4)[:1]}, 0.1) is None
    assert least_margin(texts, {}, 0.1) is None
    assert least_margin(texts, real, 0.5) <= 0


def test_a_style_that_lowers_every_similarity_changes_no_label(reference):
    found = prototypes(reference.text_features, reference.real_features)
    rng = np.random.default_rng(0)
    style = rng.normal(size=found.rows.shape[1])
    style -= found.rows.T @ np.linalg.lstsq(found.rows.T, style, rcond=None)[0]
    for digit, rows in reference.real_features.items():
        plain, rival = found.margin(digit, rows[0])
        styled, same = found.margin(digit, rows[0] + style)
        assert same == rival
        assert abs(styled - plain) < 1e-4


def test_the_label_check_finds_more_of_what_an_eye_finds_than_thresholds_do():
    """300 generated digits labelled by eye, about as many failed by either check."""
    from jobs.label_check import measure

    found = {row["check"]: row for row in measure() if row["kind"] == "all"}
    thresholds, labels, both = (found[n] for n in ("thresholds", "label check", "both"))
    assert labels["failed"] < thresholds["failed"] + 0.03
    assert labels["precision"] > thresholds["precision"] + 0.02
    assert labels["recall"] > thresholds["recall"] + 0.02
    assert found["none"]["right_of_passed"] + 0.1 < labels["right_of_passed"]
    assert labels["right_of_passed"] < both["right_of_passed"]
