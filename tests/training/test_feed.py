"""Feeds: what reaches the training thread, in which order, and what happens when images are late."""

import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.data.images import encode_array
from ray_synth.training.feed import (
    CachedFeed,
    Decoder,
    LiveFeed,
    LockstepFeed,
    Prefetcher,
    StreamedFeed,
    epoch_positions,
)
from ray_synth.training.recipe import train_transform


def row(i: int, **more) -> dict:
    """A 4x4 picture of constant value i, of class i."""
    return {
        "image": encode_array(torch.full((4, 4, 3), i, dtype=torch.uint8).numpy()),
        "class_index": i,
        **more,
    }


def decoder(augment="none") -> Decoder:
    return Decoder(train_transform(4, augment))


def labels(feed, steps) -> list[int]:
    return [label for step in range(steps) for label in feed.batch(step)[1].tolist()]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 500))
def test_epochs_laid_end_to_end_use_each_item_equally(length, count, start):
    whole = epoch_positions(0, length * 3, length, seed=5)
    for epoch in range(3):
        assert sorted(whole[epoch * length : (epoch + 1) * length]) == list(range(length))
    long = epoch_positions(0, start + count, length, seed=5)
    assert epoch_positions(start, count, length, seed=5) == long[start:]


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
    assert again.batch(17)[1].tolist() == feeds[0].batch(17)[1].tolist()


@pytest.mark.parametrize("augment", ["none", {"crop_scale": [0.5, 1.0]}])
def test_images_arrive_as_uint8_of_the_model_size(augment):
    images, found = CachedFeed([row(7)], decoder(augment), batch_size=2, seed=0).batch(0)
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


def test_streamed_epochs_are_shuffled_and_complete():
    epochs = []

    def epoch(number):
        epochs.append(number)
        return (row(i) for i in range(10))

    feed = StreamedFeed(epoch, decoder(), batch_size=5, seed=0, buffer=4)
    first, second = labels(feed, 2), labels(feed, 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert epochs[:2] == [0, 1]


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
    assert feed.batch(0)[1].tolist() == [0, 1, 2, 3]
    second = feed.batch(1)[1].tolist()
    assert second[:2] == [4, 5]
    assert set(second[2:]) <= set(range(6))
    assert feed.replayed == 2
    for step in range(2, 50):  # nothing new comes, and nothing waits
        assert set(feed.batch(step)[1].tolist()) <= set(range(6))
    stream.release(3)
    wait_for(lambda: feed.arrived == 9)
    assert feed.batch(50)[1].tolist()[:3] == [6, 7, 8]
    feed.close()


def test_live_waits_for_its_warm_up_only():
    stream = Slow()
    feed = LiveFeed(stream, decoder(), batch_size=2, warmup=4, capacity=10, seed=0)
    stream.release(3)
    done = []
    thread = threading.Thread(target=lambda: done.append(feed.batch(0)), daemon=True)
    thread.start()
    thread.join(0.2)
    assert not done
    stream.release(1)
    thread.join(5)
    assert done
    feed.close()


def test_live_every_image_is_used_and_the_reservoir_is_bounded():
    feed = LiveFeed(
        (row(i) for i in range(200)), decoder(), batch_size=8, warmup=200, capacity=16, seed=0
    )
    assert set(labels(feed, 25)) == set(range(200))
    assert len(feed.used) == 16


def test_live_passes_over_rejected_images_and_tells_of_a_broken_stream():
    rows = [row(1, accepted=False), row(2, accepted=True)]
    feed = LiveFeed(rows, decoder(), batch_size=2, warmup=2, capacity=9, seed=0)
    assert set(labels(feed, 3)) == {2}

    def broken():
        yield row(1)
        raise RuntimeError("the generator is gone")

    feed = LiveFeed(broken(), decoder(), batch_size=1, warmup=5, capacity=9, seed=0)
    with pytest.raises(RuntimeError, match="generator is gone"):
        feed.batch(0)
    feed = LiveFeed([], decoder(), batch_size=1, warmup=5, capacity=9, seed=0)
    with pytest.raises(ValueError, match="no synthetic image"):
        feed.batch(0)


def test_lockstep_keeps_plan_order_and_resumes_in_it():
    rows = [row(i, accepted=i != 2) for i in range(8)]
    feed = LockstepFeed(iter(rows), decoder(), batch_size=2)
    order = labels(feed, 6)
    assert order == [0, 1, 3, 4, 5, 6, 7, 0, 1, 3, 4, 5]
    resumed = LockstepFeed(iter(rows), decoder(), batch_size=2, start_step=4)
    assert labels(resumed, 2) == order[8:]


def test_prefetching_joins_domains_in_order_and_measures_waiting():
    real = CachedFeed([row(1)], decoder(), batch_size=3, seed=0)
    synthetic = CachedFeed([row(9)], decoder(), batch_size=2, seed=0)
    feed = Prefetcher([real, synthetic], start=0)
    images, found = feed.next()
    assert found.tolist() == [1, 1, 1, 9, 9]
    assert images.shape == (5, 3, 4, 4)
    feed.close()

    class Late(CachedFeed):
        def batch(self, step):
            time.sleep(0.1)
            return super().batch(step)

    slow = Prefetcher([Late([row(1)], decoder(), batch_size=1, seed=0)], start=0)
    for _ in range(3):
        slow.next()
    assert slow.waited > 0.15
    slow.close()


def test_an_error_in_a_feed_reaches_the_training_thread():
    class Broken(CachedFeed):
        def batch(self, step):
            raise OSError("disk gone")

    feed = Prefetcher([Broken([row(1)], decoder(), batch_size=1, seed=0)], start=0)
    with pytest.raises(OSError, match="disk gone"):
        feed.next()


def test_reservoir_replays_are_spread_over_classes():
    feed = LiveFeed(
        (row(i % 4) for i in range(40)), decoder(), batch_size=40, warmup=40, capacity=99, seed=0
    )
    feed.batch(0)
    counts = Counter(labels(feed, 20))
    assert min(counts.values()) > 100
