"""ImageNet's numbers, on labels alone: work per row is constant, and batches hold what chance gives."""

import numpy as np
import pyarrow as pa
import pytest

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import ROWS_PER_TASK, Index, drop, hold_out, select, tasks
from ray_synth.data.sources import FILES_PER_SHARD, Shard
from ray_synth.training.feed import IndexedImages, ShuffledFeed, epoch_order

CLASSES, ROWS, RANKS, BATCH = 1000, 1_281_167, 8, 128
STEPS_PER_EPOCH = ROWS // (RANKS * BATCH)


class Counted(np.ndarray):
    """An array that counts the elements of what is computed with it."""

    elements = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(value) if isinstance(value, Counted) else value for value in inputs]
        found = getattr(ufunc, method)(*plain, **options)
        Counted.elements += np.size(found)
        return found.view(Counted) if isinstance(found, np.ndarray) else found

    def __iter__(self):
        Counted.elements += self.size
        return super().__iter__()

    def tolist(self):
        Counted.elements += self.size
        return super().tolist()


@pytest.fixture(scope="module")
def index() -> Index:
    """As an image folder of ImageNet's size is listed: sorted by class."""
    source = SourceConfig(format="imagefolder", path="/imagenet")
    starts = range(0, ROWS, FILES_PER_SHARD)
    label = np.arange(ROWS) * CLASSES // ROWS
    shards = []
    for start in starts:
        labels = label[start : start + FILES_PER_SHARD].tolist()
        names = [f"n{c:08d}/n{c:08d}_{start + at}.JPEG" for at, c in enumerate(labels)]
        files = pa.record_batch(
            [pa.array(names), pa.array(list(map(str, labels)))], ["name", "label"]
        )
        shards.append(Shard(source, "/imagenet", 0, len(labels), files))
    return Index(
        tuple(map(str, range(CLASSES))),
        tuple(shards),
        (np.arange(ROWS) // FILES_PER_SHARD).view(Counted),
        (np.arange(ROWS) % FILES_PER_SHARD).view(Counted),
        label.view(Counted),
    )


def work(of) -> tuple[object, float]:
    """What a function gives, and the elements it computed per row."""
    Counted.elements = 0
    found = of()
    return found, Counted.elements / ROWS


def test_tasks_are_cut_in_linear_work(index):
    units, per_row = work(lambda: tasks(index))
    assert per_row < 20
    assert sum(len(unit["rows"]) for unit in units) == ROWS
    assert max(len(unit["rows"]) for unit in units) <= ROWS_PER_TASK
    assert [unit["position"] for unit in units] == list(range(len(index.shards)))
    assert units[-1]["labels"] == [CLASSES - 1] * len(units[-1]["rows"])


def test_images_are_selected_held_out_and_dropped_in_linear_work(index):
    few, per_row = work(lambda: select(index, 13, seed=0))
    assert per_row < 20
    assert set(few.counts().values()) == {13}
    (rest, held), per_row = work(lambda: hold_out(index, 50))
    assert per_row < 20
    assert set(held.counts().values()) == {50}
    assert len(rest) + len(held) == ROWS
    assert not set(zip(rest.shard[:2000], rest.row[:2000], strict=True)) & set(
        zip(held.shard.tolist(), held.row.tolist(), strict=True)
    )
    bad = [{"image_id": index.shards[at].image_id(7)} for at in range(1000)]
    left, per_row = work(lambda: drop(index, bad))
    assert per_row < 20
    assert len(left) == ROWS - 1000
    assert not ((left.row == 7) & (left.shard < 1000)).any()


def test_a_balanced_epoch_is_ordered_in_linear_work(index):
    order, per_row = work(lambda: epoch_order(index.label, 0, 0, 1.0))
    assert per_row < 20
    assert len(order) == ROWS
    assert np.bincount(np.asarray(index.label)[order]).std() < 60  # about 36


def drawn(index: Index, steps: range, **options) -> list[np.ndarray]:
    """The labels of the global batches of some steps, from feeds that were just opened."""
    feeds = [
        ShuffledFeed(
            IndexedImages(index), batch_size=BATCH, seed=3, rank=r, world_size=RANKS, **options
        )
        for r in range(RANKS)
    ]
    return [np.array([i.label for f in feeds for i in f.draw(step).items]) for step in steps]


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_a_batch_holds_as_many_classes_as_uniform_draws_at_any_step(index, balance):
    """At first, in mid-epoch and in a later epoch; each time as after a restart."""
    expected = CLASSES * (1 - (1 - 1 / CLASSES) ** (RANKS * BATCH))
    middle = STEPS_PER_EPOCH // 2
    for first in (0, middle, 3 * STEPS_PER_EPOCH + middle):
        batches = drawn(index, range(first, first + 12), balance=balance)
        assert {len(batch) for batch in batches} == {RANKS * BATCH}
        classes = np.mean([len(np.unique(batch)) for batch in batches])
        assert classes == pytest.approx(expected, rel=0.02)
        alone = np.mean([len(np.unique(batch[:BATCH])) for batch in batches])
        assert alone == pytest.approx(CLASSES * (1 - (1 - 1 / CLASSES) ** BATCH), rel=0.02)


def test_a_resumed_feed_goes_on_where_the_first_was_and_an_epoch_has_each_image_once(index):
    feeds = [
        ShuffledFeed(IndexedImages(index), batch_size=BATCH, seed=3, rank=r, world_size=RANKS)
        for r in range(RANKS)
    ]
    seen = np.array([feed.places(step) for step in range(STEPS_PER_EPOCH) for feed in feeds])
    assert len(np.unique(seen)) == seen.size == STEPS_PER_EPOCH * RANKS * BATCH
    again = ShuffledFeed(IndexedImages(index), batch_size=BATCH, seed=3, rank=5, world_size=RANKS)
    assert again.places(777) == feeds[5].places(777)
    assert again.draw(777) == feeds[5].draw(777)


def test_repeats_of_an_image_go_to_different_ranks(index):
    feeds = [
        ShuffledFeed(
            IndexedImages(index), batch_size=BATCH, seed=3, rank=r, world_size=RANKS, repeats=3
        )
        for r in range(RANKS)
    ]
    batches = [feed.places(5) for feed in feeds]
    assert all(len(set(batch)) == BATCH for batch in batches)  # none twice on one rank
    _, counts = np.unique(np.concatenate(batches), return_counts=True)
    assert set(counts.tolist()) <= {1, 2, 3}  # cut at the ends of the global batch alone
    assert (counts == 3).sum() >= RANKS * BATCH // 3 - 1
    assert len({feed.draw(5).seed for feed in feeds}) == RANKS
