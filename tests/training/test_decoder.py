"""Decoding in processes: what they are sent, what comes back, and what becomes of bad images."""

import os
import pickle
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from samples import encoded

from ray_synth.config import SourceConfig, TrainingConfig
from ray_synth.data.dataset import load_index
from ray_synth.data.places import Place
from ray_synth.errors import UserError
from ray_synth.training.augmentation import train_transform
from ray_synth.training.decoder import Decoder, Draw, Item, _task
from ray_synth.training.feed import IndexedImages, ShuffledFeed
from ray_synth.training.prefetch import Prefetcher
from ray_synth.training.shared_memory import with_room

CROPS = {"crop_scale": [0.3, 1.0], "auto_augment": "rand-m9-mstd0.5-inc1"}


class Elsewhere:
    """Encoded bytes that no one may read in the process that made this."""

    def __init__(self, seed: int) -> None:
        self.seed, self.pid = seed, os.getpid()

    def read(self) -> bytes:
        assert os.getpid() != self.pid, "read by the process that trains"
        return encoded(self.seed)


def decoder(workers: int = 0, size: int = 16) -> Decoder:
    return Decoder(train_transform(size, CROPS), workers=workers)


def mixed_draws(folder: Path) -> list[list[Draw]]:
    """Batches of two domains: places and bytes; bytes, pixels and a corrupt image."""
    source = SourceConfig(format="imagefolder", path=str(folder))
    real = ShuffledFeed(IndexedImages(load_index(source)), batch_size=4, seed=1)
    draws = []
    for step in range(4):
        first = real.draw(step)
        first.items[step] = Item(encoded(50 + step), 7, "held")
        synthetic = [Item(encoded(60 + step), 8, f"s{step}"), Item(b"broken", 9, "bad")]
        synthetic.append(Item(torch.full((3, 16, 16), step, dtype=torch.uint8), 6, "pixels"))
        draws.append([first, Draw(synthetic, 99 + step)])
    return draws


def test_processes_give_the_batches_that_this_thread_would(image_folder):
    draws = mixed_draws(image_folder)
    one, here = decoder(workers=2), decoder()
    draws = 3 * draws  # memory is used again
    for batch, some in zip(one.batches(iter(draws)), draws, strict=True):
        alone = here.batch(*some)
        assert torch.equal(batch.images, alone.images)
        assert batch.names == alone.names
        assert batch.labels.tolist() == alone.labels.tolist()
    assert one.corrupt == here.corrupt == ["bad"]


def test_another_image_of_the_same_domain_takes_the_place_of_a_corrupt_one(image_folder):
    batch = decoder().batch(*mixed_draws(image_folder)[2])
    assert batch.names[4:] == ["s2", "pixels", "pixels"]
    assert batch.labels[4:].tolist() == [8, 6, 6]
    assert (batch.images[5:] == 2).all()
    bad = Draw([Item(b"", 0, "a"), Item(b"no", 0, "b")], 0)
    good = Draw([Item(encoded(1), 0, "c")], 0)
    with pytest.raises(
        ValueError, match="no image of a whole batch could be decoded, the last one: b"
    ):
        decoder().batch(good, bad)


def test_reading_and_decoding_are_done_elsewhere_and_leave_the_random_state_alone():
    draws = [[Draw([Item(Elsewhere(n), n, str(n)) for n in range(4)], step)] for step in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = [*decoder(workers=1).batches(iter(draws))]
    assert torch.equal(torch.rand(3), expected)
    assert [batch.labels.tolist() for batch in found] == [[0, 1, 2, 3]] * 3


def test_an_image_that_is_elsewhere_is_sent_as_its_place():
    path = "n00000001/n00000001_0000001.JPEG"
    items = [Item(Place("s3://bucket/imagenet/train", f"{path}{n}"), 1, "x") for n in range(256)]
    sent = pickle.dumps(_task([Draw(items, 0)], 0))
    assert len(sent) < 100 * len(items)


def test_a_file_that_is_gone_is_an_error_that_names_it(tmp_path):
    place = Place(str(tmp_path), str(tmp_path / "gone.jpg"))
    draws = iter([[Draw([Item(place, 0, "x")], 0)]])
    with pytest.raises(UserError, match=r"no image .*: x \(no such file .*gone\.jpg\)"):
        list(decoder(workers=1).batches(draws))


class Endless:
    """A feed of one encoded image."""

    def draw(self, step: int) -> Draw:
        return Draw([Item(encoded(1), 0, "x")] * 2, step)

    def close(self) -> None:
        pass


def decoding_processes() -> list[psutil.Process]:
    """Those that the server of a DataLoader forked; a Ray of another test is not among them."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    found = [p for server in servers for p in server.children()]
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 30 s"
        time.sleep(0.05)


def test_processes_end_with_the_prefetcher_and_a_lost_one_is_an_error():
    until(lambda: not decoding_processes())
    prefetcher = Prefetcher([Endless()], decoder(workers=2), start=0)
    assert prefetcher.next().images.shape == (2, 3, 16, 16)
    assert len(decoding_processes()) == 2
    prefetcher.close()
    until(lambda: not decoding_processes())
    prefetcher = Prefetcher([Endless()], decoder(workers=1), start=0)
    prefetcher.next()
    decoding_processes()[0].kill()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        deque(iter(prefetcher.next, None), maxlen=0)


def test_images_that_are_pixels_already_start_no_process():
    plain = Decoder(train_transform(16, "none"), workers=4)
    item = plain.keep({"image": encoded(3), "class_index": 1})
    before = {p.pid for p in decoding_processes()}
    (batch,) = plain.batches(iter([[Draw([item, item], 0)]]))
    assert batch.labels.tolist() == [1, 1]
    assert {p.pid for p in decoding_processes()} <= before


@pytest.mark.parametrize(("num_cpus", "given", "expected"), [(8, None, 7), (1, None, 0), (8, 2, 2)])
def test_processes_are_counted_by_the_cpus_of_a_worker(num_cpus, given, expected):
    config = TrainingConfig(steps=1, num_cpus=num_cpus, decode_workers=given)
    assert config.decoders == expected
    assert TrainingConfig(steps=1, num_cpus=0.5).decoders == 0


def test_as_many_processes_start_as_shared_memory_has_room_for(tmp_path, caplog, monkeypatch):
    free = 64_000_000  # what a container has unless it is told otherwise
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free))
    batch = 256 * 3 * 224**2  # 38.5 MB
    assert with_room(12, batch) == 0
    assert "64 MB free" in caplog.text and "--shm-size" in caplog.text
    caplog.clear()
    assert with_room(12, 64 * 3 * 32**2) == 12
    assert not caplog.messages
    free = 20_000_000_000
    assert with_room(12, batch) == 12
    free = 250_000_000  # 5 batches, with one that was yielded: 2 processes
    assert with_room(12, batch) == 2


def test_without_shared_memory_this_thread_decodes_the_same(image_folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    monkeypatch.setattr(Decoder, "_processes", None)
    draws = mixed_draws(image_folder)
    for batch, some in zip(decoder(workers=2).batches(iter(draws)), draws, strict=True):
        assert torch.equal(batch.images, decoder().batch(*some).images)


def test_batches_have_channels_last_as_the_model_wants_them():
    pixels = decoder().batch(Draw([Item(encoded(n), n, "x") for n in range(3)], 0)).images
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert np.asarray(pixels).dtype == np.uint8


def test_ray_tasks_give_the_batches_that_this_thread_would(image_folder, local_ray):
    draws = mixed_draws(image_folder)
    one = Decoder(train_transform(16, CROPS), workers=1, on_cluster=True)
    here = decoder()
    for batch, some in zip(one.batches(iter(draws)), draws, strict=True):
        alone = here.batch(*some)
        assert torch.equal(batch.images, alone.images)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.names == alone.names
    assert one.corrupt == ["bad"]
    draws = [[Draw([Item(Elsewhere(n), n, str(n)) for n in range(4)], step)] for step in range(3)]
    found = [batch.labels.tolist() for batch in one.batches(iter(draws))]
    assert found == [[0, 1, 2, 3]] * 3


def test_decoding_on_the_cluster_says_how_many_cpus_it_takes():
    with pytest.raises(ValueError, match="decode_on: cluster needs decode_workers"):
        TrainingConfig(steps=1, decode_on="cluster")
