"""The feed of a finished store: every image once an epoch, in an order that a seed names."""

import numpy as np
import pyarrow as pa
import pytest
from test_packs import pack, plan_of
from test_store import made, plan_rows

from ray_synth.generation.chunks import holdings
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stored import StoredRows
from ray_synth.storage.folder import Folder
from ray_synth.training.decoder import Item
from ray_synth.training.stored_feed import StoredFeed

REFUSED = {7, 100, 101, 299}
ROWS = 300


class Names:
    """A decoder that keeps the bytes."""

    def keep(self, row):
        return Item(row["image"], row["class_index"], row["sample_id"])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ImageStore:
    images = made(plan_rows(ROWS))
    for at, row in enumerate(images):
        row["accepted"] = at not in REFUSED
    store = ImageStore(Folder(tmp_path_factory.mktemp("store")))
    for at in range(0, ROWS, 4):
        store.write(images[at : at + 4])
    assert pack(plan_of(plan_rows(ROWS)), store, 4, rows=64, group=8) == 4
    return store


def rows_of(store, count=ROWS, batch=4) -> StoredRows:
    return StoredRows.of(holdings(plan_of(plan_rows(ROWS)), store, batch), store, count, 8)


def drawn(feed, steps) -> list[list[str]]:
    return [[item.name for item in feed.draw(step).items] for step in steps]


def feed_of(rows, **more) -> StoredFeed:
    return StoredFeed(rows, Names(), **{"batch_size": 10, "seed": 3, **more})


def test_an_epoch_has_every_accepted_image_once_and_the_next_another_order(store):
    wanted = [row["sample_id"] for at, row in enumerate(plan_rows(ROWS)) if at not in REFUSED]
    names = [n for batch in drawn(feed_of(rows_of(store)), range(60)) for n in batch]
    first, second = names[: len(wanted)], names[len(wanted) : 2 * len(wanted)]
    assert sorted(first) == sorted(second) == wanted
    assert first != second
    # Shuffled well: neighbours are seldom neighbours in the plan.
    places = np.array([int(name) for name in first])
    assert (np.abs(np.diff(places)) == 1).mean() < 0.05
    assert drawn(feed_of(rows_of(store)), range(60)) != drawn(
        feed_of(rows_of(store), seed=4), range(60)
    )


def test_ranks_share_an_epoch(store):
    rows = rows_of(store)
    feeds = [feed_of(rows, rank=rank, world_size=3, batch_size=1) for rank in range(3)]
    epoch = [
        name
        for feed in feeds
        for (name,) in drawn(feed, range(int(feed.counts[feed.blocks(0)].sum())))
    ]
    assert len(epoch) == len(set(epoch)) == ROWS - len(REFUSED)


def test_a_feed_resumes_at_any_step_without_reading_what_was_passed(store, monkeypatch):
    rows = rows_of(store, batch=4)
    whole = drawn(feed_of(rows, world_size=2), range(100))
    read = []
    reading = StoredRows.read
    monkeypatch.setattr(StoredRows, "read", lambda self, *a: read.append(a[0]) or reading(self, *a))
    for start in (1, 13, 14, 47, 99):
        feed = feed_of(rows, world_size=2, start_step=start)
        assert drawn(feed, range(start, 100)) == whole[start:]
    read.clear()
    drawn(feed_of(rows, world_size=2, start_step=97), range(97, 100))
    assert len(read) <= 3 * 16, "two windows and the one that is read ahead"


def test_the_order_does_not_depend_on_which_files_hold_the_rows(store, tmp_path):
    """Packed or not, made with whatever batch size: a seed names the batches."""
    small = ImageStore(Folder(tmp_path))
    table = pa.concat_tables([t for _, t in store.every(None)]).sort_by("sample_id")
    for at in range(0, ROWS, 7):
        small.write(table.slice(at, 7).to_pylist())
    steps = range(40)
    assert drawn(feed_of(rows_of(small, batch=7)), steps) == drawn(feed_of(rows_of(store)), steps)


def test_only_the_first_rows_of_the_plan_are_drawn(store):
    names = {n for batch in drawn(feed_of(rows_of(store, 130)), range(40)) for n in batch}
    assert names == {r["sample_id"] for at, r in enumerate(plan_rows(130)) if at not in REFUSED}


def test_nothing_accepted_is_told(tmp_path):
    store = ImageStore(Folder(tmp_path))
    store.write([{**row, "accepted": False} for row in made(plan_rows(4))])
    rows = StoredRows.of(holdings(plan_of(plan_rows(4)), store, 4), store, 4, 8)
    with pytest.raises(ValueError, match="no synthetic image was accepted"):
        feed_of(rows).draw(0)
