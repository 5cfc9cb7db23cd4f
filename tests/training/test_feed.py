"""Feeds: what reaches the training thread, in which order, and what happens when images are late."""

import itertools
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.data.images import encode_array
from ray_synth.training.augmentation import train_transform
from ray_synth.training.decoder import Batch, Decoder, Item
from ray_synth.training.feed import (
    CachedFeed,
    derived_seed,
    epoch_order,
)
from ray_synth.training.live_feed import LiveFeed, LockstepFeed
from ray_synth.training.prefetch import Prefetcher
from ray_synth.training.replays import replayed


def row(i: int, **more) -> dict:
    """A 4x4 picture of constant value i, of class i."""
    return {
        "image": encode_array(torch.full((4, 4, 3), i, dtype=torch.uint8).numpy()),
        "class_index": i,
        **more,
    }


def decoder(augment="none") -> Decoder:
    return Decoder(train_transform(4, augment))


def batch_of(feed, step: int) -> Batch:
    return feed.decoder.batch(feed.draw(step))


def labels(feed, steps) -> list[int]:
    return [label for step in range(steps) for label in batch_of(feed, step)[1].tolist()]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(0, 9),
    st.floats(0.01, 1),
)
def test_an_epoch_is_a_permutation_and_a_balanced_one_spreads_each_class_evenly(
    found, epoch, balance
):
    classes = np.array(found)
    assert sorted(epoch_order(classes, 5, epoch)) == list(range(len(classes)))
    drawn = np.bincount(epoch_order(classes, 5, epoch, balance), minlength=len(classes))
    assert drawn.sum() == len(classes)
    for label in set(found):
        assert np.ptp(drawn[classes == label]) <= 1


def test_balance_draws_rare_classes_as_often_as_frequent_ones():
    rows = [row(0) for _ in range(90)] + [row(1) for _ in range(10)]
    shares = []
    for balance in (0.0, 0.5, 1.0):
        feed = CachedFeed(rows, decoder(), batch_size=100, seed=0, balance=balance)
        shares.append(np.mean(labels(feed, 20)))
    assert shares[0] == pytest.approx(0.1)
    assert shares[1] == pytest.approx(0.25, abs=0.03)  # 1 : 3, the root of 10 : 90
    assert shares[2] == pytest.approx(0.5, abs=0.03)


def test_repeated_augmentation_draws_an_image_several_times_in_a_row():
    feed = CachedFeed((row(i) for i in range(8)), decoder(), batch_size=4, seed=0, repeats=2)
    drawn = labels(feed, 4)
    assert drawn[::2] == drawn[1::2]
    assert sorted(drawn) == sorted([*range(8), *range(8)])


def test_cached_ranks_share_an_epoch_and_resume_by_step_alone():
    feeds = [
        CachedFeed(
            (row(i) for i in range(12)), decoder(), batch_size=3, seed=1, rank=r, world_size=2
        )
        for r in range(2)
    ]
    assert sorted(labels(feeds[0], 2) + labels(feeds[1], 2)) == list(range(12))
    again = CachedFeed(
        (row(i) for i in range(12)), decoder(), batch_size=3, seed=1, rank=0, world_size=2
    )
    assert batch_of(again, 17)[1].tolist() == batch_of(feeds[0], 17)[1].tolist()


@pytest.mark.parametrize("augment", ["none", {"crop_scale": [0.5, 1.0]}])
def test_images_arrive_as_uint8_of_the_model_size(augment):
    batch = batch_of(CachedFeed([row(7)], decoder(augment), batch_size=2, seed=0), 0)
    images, found = batch.images, batch.labels
    assert images.shape == (2, 3, 4, 4)
    assert images.dtype == torch.uint8
    assert (images == 7).all()
    assert found.tolist() == [7, 7]


def test_a_corrupt_image_is_counted_and_named_not_fatal():
    d = decoder()
    feed = CachedFeed(
        [row(1), {"image": b"no", "class_index": 2, "image_id": "x.png"}], d, batch_size=4, seed=0
    )
    assert set(labels(feed, 3)) == {1}
    assert d.corrupt == ["x.png"]
    with pytest.raises(ValueError, match="no image to train on"):
        CachedFeed([{"image": b"", "class_index": 0}], decoder(), batch_size=1, seed=0)


class Slow:
    """A stream that gives rows when told to."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.count = 0

    def __iter__(self):
        while True:
            self.gate.acquire()
            yield row(self.count % 256)
            self.count += 1

    def release(self, count: int) -> None:
        for _ in range(count):
            self.gate.release()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 5 s"
        time.sleep(0.005)


def test_live_uses_fresh_images_first_then_replays_without_waiting():
    stream = Slow()
    feed = LiveFeed(stream, decoder(), batch_size=4, warmup=4, capacity=100, seed=0)
    stream.release(6)
    wait_for(lambda: feed.arrived == 6)
    assert batch_of(feed, 0)[1].tolist() == [0, 1, 2, 3]
    second = batch_of(feed, 1)[1].tolist()
    assert second[:2] == [4, 5]
    assert set(second[2:]) <= set(range(6))
    assert feed.replayed == 2
    for step in range(2, 50):  # nothing new comes, and nothing waits
        assert set(batch_of(feed, step)[1].tolist()) <= set(range(6))
    stream.release(3)
    wait_for(lambda: feed.arrived == 9)
    assert batch_of(feed, 50)[1].tolist()[:3] == [6, 7, 8]
    feed.close()


def test_live_waits_for_its_warm_up_only():
    stream = Slow()
    feed = LiveFeed(stream, decoder(), batch_size=2, warmup=4, capacity=10, seed=0)
    stream.release(3)
    done = []
    thread = threading.Thread(target=lambda: done.append(batch_of(feed, 0)), daemon=True)
    thread.start()
    thread.join(0.2)
    assert not done
    stream.release(1)
    thread.join(5)
    assert done
    feed.close()


def test_live_every_image_is_used_and_the_reservoir_is_bounded():
    feed = LiveFeed(
        (row(i) for i in range(200)), decoder(), batch_size=8, warmup=8, capacity=16, seed=0
    )
    found, most, step = set(), 0, 0
    while not feed.ended or feed.fresh:
        found |= set(batch_of(feed, step).labels.tolist())
        most, step = max(most, len(feed.images)), step + 1
        time.sleep(0.002)
    assert found == set(range(200))
    assert most == 16


def test_live_lets_its_stream_go_on_to_the_end_when_training_is_done():
    stream = Slow()
    rows = islice(stream, 20)
    feed = LiveFeed(rows, decoder(), batch_size=2, warmup=2, capacity=4, seed=0)
    stream.release(6)  # memory is full of unused images: the stream is held back
    wait_for(lambda: feed.arrived == 4)
    assert batch_of(feed, 0)[1].tolist() == [0, 1]
    assert feed.first_after is not None and feed.first_after < 5
    assert not feed.finish(0.05)  # what is left of it is not there yet
    stream.release(100)
    assert feed.finish()
    assert stream.count == 19  # the last is never asked to go on
    assert len(feed.images) <= 4
    feed.close()


def test_an_error_of_the_stream_after_training_is_none_of_the_feed():
    trained = threading.Event()

    def broken():
        yield from (row(i) for i in range(4))
        assert trained.wait(60)
        raise OSError("the disk is gone")

    feed = LiveFeed(broken(), decoder(), batch_size=2, warmup=2, capacity=3, seed=0)
    batch_of(feed, 0)
    trained.set()
    assert feed.finish(5)
    feed.close()


def test_live_spills_to_a_file_what_memory_does_not_hold():
    images = [row(i) for i in range(100)]
    feed = LiveFeed(
        images, decoder(), batch_size=10, warmup=100, capacity=100, seed=0, memory_bytes=20 * 48
    )
    for step in range(30):
        batch = batch_of(feed, step)
        for image, label in zip(batch.images, batch.labels, strict=True):
            assert (image == label.item()).all()
    assert feed.images.held_bytes == 20 * 48
    assert feed.images.spilled == 80
    feed.close()


class Names:
    """A decoder that keeps the bytes."""

    def keep(self, row):
        return Item(row["image"], row["class_index"], row["sample_id"])


def rows_of(count: int, size: int = 50) -> list[dict]:
    return [
        {"sample_id": f"id {i}", "image": i.to_bytes(size), "class_index": i % 100}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """A store of 60,000 images, packed but for its end, and its plan."""
    from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore, pack_name
    from ray_synth.prompting.plan_file import PlanTable
    from ray_synth.storage.folder import Folder

    store = ImageStore(Folder(tmp_path_factory.mktemp("images")))
    table = pa.Table.from_pylist(
        [{**r, "accepted": True} for r in rows_of(60_000)], schema=IMAGE_SCHEMA
    )
    ids = table["sample_id"].to_pylist()
    for at in range(0, 59_000, 1_000):
        groups = (table.slice(at + start, 250) for start in range(0, 1_000, 250))
        store.write_pack(pack_name(ids[at : at + 1_000], at), groups)
    for at in range(59_000, 60_000, 20):
        store.write(table.slice(at, 20).to_pylist())
    return store, PlanTable(table.select(["sample_id"]))


def test_live_draws_from_all_that_was_made_after_the_end_of_the_stream(growing):
    """60,000 images and room for 2,000: nearly all are drawn again, none is forgotten."""
    feed = LiveFeed(
        rows_of(60_000), Names(), batch_size=128, warmup=256, capacity=2_000, seed=0,
        replays=replayed(*growing, 60_000, 1),
    )  # fmt: skip
    step, most = 0, 0
    while not feed.ended:
        feed.draw(step)
        most, step = max(most, len(feed.images)), step + 1
    counts: Counter[str] = Counter()
    first = 0
    for more in range(1_000):
        deadline = time.monotonic() + 30
        while len(feed.again) < 128 and time.monotonic() < deadline:  # a busy machine is no bug
            time.sleep(0.0005)
        items = feed.draw(step + more).items
        assert all(f"id {int.from_bytes(item.form)}" == item.name for item in items)
        counts.update(item.name for item in items)
        most = max(most, len(feed.images))
        if more == 60_000 // 128:
            first = len(counts)
    feed.close()
    assert len(counts) > 59_400, "in 128,000 draws"
    # A pass that had begun before the end is finished, and another follows: of these about 3/4 are
    # distinct at the least (half of a pass, then half of the next), few less by what memory gave.
    assert first > 40_000, "in the first 60,000"
    assert most <= 2_000


def test_live_never_waits_for_a_store_that_does_not_answer():
    asked = threading.Event()

    def silent():
        asked.set()
        time.sleep(3600)
        yield

    feed = LiveFeed(
        rows_of(500), Names(), batch_size=10, warmup=10, capacity=100, seed=0, replays=silent()
    )
    started = time.monotonic()
    names: set[str] = set()
    while not feed.ended or feed.fresh:
        names |= {item.name for item in feed.draw(0).items}
    assert len(names) == 500
    assert asked.wait(10)
    labels_drawn(feed, 300)
    assert time.monotonic() - started < 30
    feed.close()


def test_live_begins_with_what_earlier_rounds_left_and_takes_fresh_images_first():
    go_on = threading.Event()

    def late():
        assert go_on.wait(30)
        yield from rows_of(1_100)[1_000:]

    feed = LiveFeed(
        late(), Names(), batch_size=10, warmup=50, capacity=200, seed=0,
        replays=itertools.cycle(rows_of(1_000)), earlier=True,
    )  # fmt: skip
    early = {item.name for step in range(40) for item in feed.draw(step).items}
    assert early <= {f"id {i}" for i in range(1_000)}
    go_on.set()
    wait_for(lambda: feed.ended)
    names = [item.name for step in range(40, 50) for item in feed.draw(step).items]
    assert sorted(names) == sorted(f"id {i}" for i in range(1_000, 1_100))
    later = {item.name for step in range(50, 60) for item in feed.draw(step).items}
    assert later & {f"id {i}" for i in range(1_000)}, "earlier ones come again"
    feed.close()


def test_live_trains_on_earlier_rounds_where_nothing_of_this_one_is_accepted():
    stream = [{**row, "accepted": False} for row in rows_of(20)]
    feed = LiveFeed(
        stream, Names(), batch_size=10, warmup=50, seed=0,
        replays=itertools.cycle(rows_of(100)), earlier=True,
    )  # fmt: skip
    wait_for(lambda: feed.ended)
    names: set[str] = set()

    def most_of_them() -> bool:  # what was drawn comes again where the store is late
        names.update(item.name for item in feed.draw(0).items)
        return len(names) > 90

    wait_for(most_of_them)
    feed.close()


def test_live_holds_no_more_bytes_than_it_may_and_waits_for_no_room_of_its_own():
    images = rows_of(3_000, size=1_000)
    feed = LiveFeed(
        images, Names(), batch_size=8, warmup=500, seed=0, memory_bytes=100_000,
        replays=iter(images * 3),
    )  # fmt: skip
    names = set()
    while not feed.ended or feed.fresh:
        names |= {item.name for item in feed.draw(0).items}
        assert feed.images.held_bytes <= 101_000
    assert len(names) == 3_000
    feed.close()


def test_live_reads_nothing_again_while_all_images_are_held():
    def refused():
        raise AssertionError("nothing needs to be read")
        yield

    images = rows_of(200)
    feed = LiveFeed(
        images, Names(), batch_size=10, warmup=10, capacity=500, seed=0, replays=refused()
    )
    while not feed.ended or feed.fresh:
        feed.draw(0)
    drawn = Counter(item.name for step in range(150) for item in feed.draw(step).items)
    assert len(drawn) == 200, "and none is left out"
    feed.close()


def labels_drawn(feed, steps) -> list[int]:
    return [item.label for step in range(steps) for item in feed.draw(step).items]


def test_live_tells_of_an_error_of_the_store():
    def broken():
        raise OSError("the bucket is gone")
        yield

    feed = LiveFeed(
        rows_of(400), Names(), batch_size=10, warmup=10, capacity=50, seed=0, replays=broken()
    )
    with pytest.raises(OSError, match="bucket is gone"):
        labels_drawn(feed, 10_000)
    feed.close()


def test_replays_give_each_image_once_a_pass_while_small_parts_are_packed(tmp_path):
    from test_packs import pack, plan_of
    from test_store import made, plan_rows

    from ray_synth.generation.store import ImageStore
    from ray_synth.storage.folder import Folder

    store, rows = ImageStore(Folder(tmp_path)), plan_rows(400)
    images = made(rows)
    for at in range(0, 400, 5):
        images[at]["accepted"] = False
    store.write(made([{**rows[0], "sample_id": "of another plan"}]))
    for at in range(0, 200, 2):
        store.write(images[at : at + 2])
    stream = replayed(store, plan_of(rows), 390, seed=0, list_again_s=0)
    seen = [next(stream)["sample_id"] for _ in range(60)]
    pack(plan_of(rows), store, 2, rows=64)
    for at in range(200, 400, 2):
        store.write(images[at : at + 2])
    seen += [next(stream)["sample_id"] for _ in range(312 - 60)]
    wanted = {row["sample_id"] for at, row in enumerate(rows[:390]) if at % 5}
    assert len(wanted) == 312
    assert set(seen) == wanted, "once each, what came meanwhile included"
    assert {next(stream)["sample_id"] for _ in range(312)} == wanted


def test_live_passes_over_rejected_images_and_tells_of_a_broken_stream():
    rows = [row(1, accepted=False), row(2, accepted=True)]
    feed = LiveFeed(rows, decoder(), batch_size=2, warmup=2, capacity=9, seed=0)
    assert set(labels(feed, 3)) == {2}

    def broken():
        yield row(1)
        raise RuntimeError("the generator is gone")

    feed = LiveFeed(broken(), decoder(), batch_size=1, warmup=5, capacity=9, seed=0)
    with pytest.raises(RuntimeError, match="generator is gone"):
        batch_of(feed, 0)
    feed = LiveFeed([], decoder(), batch_size=1, warmup=5, capacity=9, seed=0)
    with pytest.raises(ValueError, match="no synthetic image"):
        batch_of(feed, 0)


def test_lockstep_keeps_plan_order_and_resumes_in_it():
    rows = [row(i, accepted=i != 2) for i in range(8)]
    feed = LockstepFeed(iter(rows), decoder(), batch_size=2, seed=0)
    order = labels(feed, 6)
    assert order == [0, 1, 3, 4, 5, 6, 7, 0, 1, 3, 4, 5]
    resumed = LockstepFeed(iter(rows), decoder(), batch_size=2, seed=0, start_step=4)
    assert labels(resumed, 2) == order[8:]


def test_prefetching_joins_domains_in_order_and_measures_waiting():
    real = CachedFeed([row(1)], decoder(), batch_size=3, seed=0)
    synthetic = CachedFeed([row(9)], decoder(), batch_size=2, seed=0)
    feed = Prefetcher([real, synthetic], decoder(), start=0)
    batch = feed.next()
    assert batch.labels.tolist() == [1, 1, 1, 9, 9]
    assert batch.images.shape == (5, 3, 4, 4)
    feed.close()

    class Late(CachedFeed):
        def draw(self, step):
            time.sleep(0.1)
            return super().draw(step)

    slow = Prefetcher([Late([row(1)], decoder(), batch_size=1, seed=0)], decoder(), start=0)
    for _ in range(3):
        slow.next()
    assert slow.waited > 0.15
    slow.close()


def test_an_error_in_a_feed_reaches_the_training_thread():
    class Broken(CachedFeed):
        def draw(self, step):
            raise OSError("disk gone")

    feed = Prefetcher([Broken([row(1)], decoder(), batch_size=1, seed=0)], decoder(), start=0)
    with pytest.raises(OSError, match="disk gone"):
        feed.next()


def test_reservoir_replays_are_spread_over_classes():
    feed = LiveFeed(
        (row(max(0, i - 36)) for i in range(40)),
        decoder(),
        batch_size=40,
        warmup=40,
        capacity=99,
        seed=0,
    )
    batch_of(feed, 0)
    counts = Counter(labels(feed, 20))  # 37 images of class 0, one of each other
    assert min(counts.values()) > 150


CROPS = {"crop_scale": [0.3, 1.0], "flip": 0.5}


def noisy(i: int) -> dict:
    pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    return {"image": encode_array(pixels), "class_index": i, "sample_id": f"s{i}"}


def test_random_crops_are_a_function_of_seed_and_step_in_any_number_of_processes():
    def batches(workers: int) -> list[torch.Tensor]:
        d = Decoder(train_transform(16, CROPS), workers=workers)
        feed = CachedFeed((noisy(i) for i in range(6)), d, batch_size=4, seed=3)
        return [batch.images for batch in d.batches(iter([[feed.draw(5)], [feed.draw(6)]]))]

    alone, again, pooled = batches(0), batches(0), batches(2)
    assert not torch.equal(alone[0], alone[1])
    for one, two, three in zip(alone, again, pooled, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_corrupt_image_in_mid_epoch_is_set_aside_and_another_takes_its_place():
    d = Decoder(train_transform(16, CROPS))
    bad = {"image": b"broken", "class_index": 5, "sample_id": "bad"}
    feed = CachedFeed([noisy(1), noisy(2), bad], d, batch_size=3, seed=0)
    for step in range(5):
        batch = batch_of(feed, step)
        assert set(batch.labels.tolist()) <= {1, 2}
        assert "bad" not in batch.names
    assert d.corrupt == ["bad"]
    with pytest.raises(ValueError, match="no image of a whole batch could be decoded"):
        batch_of(CachedFeed([bad], d, batch_size=2, seed=0), 0)


def test_a_label_out_of_range_is_an_error_that_names_the_image():
    d = Decoder(train_transform(4, "none"), num_classes=3)
    with pytest.raises(ValueError, match="x.png has label 3, out of range"):
        CachedFeed([row(1), row(3, image_id="x.png")], d, batch_size=1, seed=0)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_derived_seeds_fit_and_repeat(numbers):
    assert 0 <= derived_seed(*numbers) < 2**63
    assert derived_seed(*numbers) == derived_seed(*numbers)
    assert derived_seed(*numbers) != derived_seed(*numbers, 1)
