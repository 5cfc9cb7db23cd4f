"""The verb `feed` of `jobs/bench.py`: JPEGs on a disk to batches; ours, torch's DataLoader, webdataset.

All contenders crop at random as timm does, with the same policy, and give uint8 batches. A rate is of the
steady state: from a batch's arrival to a later one's, when all processes have long been at work.
"""

from __future__ import annotations

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ray_synth.config import SourceConfig

SIZE = 224
CLASSES = 16
TARS = 16  # webdataset shares files out to processes
TITLES = {
    "ours": "ours, files in folders",
    "ours_tar": "ours, places in tar files",
    "dataloader": "torch's DataLoader over timm's dataset, files in folders",
    "webdataset": "webdataset's WebLoader, tar files one after the other",
}


class Shape(NamedTuple):
    """What is measured: batches of a size, and how many of them."""

    folder: Path
    policy: str
    batch_size: int
    batches: int


class Locked:
    """Copies each batch into the same memory, as into page-locked memory where there is a GPU."""

    def __init__(self) -> None:
        self.memory: Any = None

    def __call__(self, images: Any) -> Any:
        if self.memory is None:
            self.memory = images.clone()
        return self.memory.copy_(images)


class Rate(NamedTuple):
    """How fast, and what an image costs.

    Attributes:
        images: per second.
        cpu_ms: CPU time of all processes; unlike a rate, the same on a machine that has other work.
        parent_ms: CPU time of the process that trains, a copy of the batch included.
    """

    images: float
    cpu_ms: float
    parent_ms: float


Loader = Callable[[Shape, int], Iterator[Any]]


def feeds(
    *, images: int, policy: str, batch_size: int, batches: int, rounds: int, workers: list[int]
) -> dict[str, Any]:
    """All contenders with each number of processes, in turn; the figures."""
    contenders: dict[str, Loader] = {
        "ours": _ours, "ours_tar": _ours_tar, "dataloader": _dataloader, "webdataset": _webdataset,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        kilobytes = write_pictures(Path(place), images)
        print(
            f"{images} JPEGs of {kilobytes:.0f} kB (500x375) to {SIZE} px, policy {policy}, batches of "
            f"{batch_size}, {os.cpu_count()} cores; median of {rounds} rounds (each)"
        )
        shape = Shape(Path(place), policy, batch_size, batches)
        found: dict[tuple[str, int], list[Rate]] = {}
        for _ in range(rounds):
            for number in workers:
                for name, loader in contenders.items():
                    found.setdefault((name, number), []).append(_rate(loader, shape, number))
    return _figures(found, workers)


def _figures(found: dict[tuple[str, int], list[Rate]], workers: list[int]) -> dict[str, Any]:
    middle = {
        key: Rate(*(statistics.median(values) for values in zip(*each, strict=True)))
        for key, each in found.items()
    }
    print(f"{'':<60} processes  images/s   CPU ms, of them the parent's")
    for (name, number), rate in sorted(middle.items(), key=lambda pair: pair[0][1]):
        shown = ", ".join(f"{each.images:.0f}" for each in found[name, number])
        print(
            f"{TITLES[name]:<60} {number:9d} {rate.images:9.1f} {rate.cpu_ms:8.2f} "
            f"{rate.parent_ms:19.3f}   ({shown})"
        )
    least, most = min(workers), max(workers)

    def over(other: str, figure: Callable[[Rate], float]) -> float:
        """The median of ratios within a round."""
        pairs = zip(found["ours", most], found[other, most], strict=True)
        return round(statistics.median(figure(a) / figure(b) for a, b in pairs), 4)

    others = ("dataloader", "webdataset")
    ratios = {f"feed_over_{other}": over(other, lambda rate: rate.images) for other in others}
    alone = middle["ours", least].images / least
    return {
        "images_per_second": {
            name: {str(number): round(middle[name, number].images, 1) for number in workers}
            for name in TITLES
        },
        **ratios,
        "feed_over_best": min(ratios.values()),
        **{f"cpu_over_{other}": over(other, lambda rate: rate.cpu_ms) for other in others},
        "parent_ms_per_image": round(middle["ours", most].parent_ms, 4),
        "dataloader_parent_ms_per_image": round(middle["dataloader", most].parent_ms, 4),
        "linear_share": {
            str(number): round(middle["ours", number].images / (alone * number), 4)
            for number in workers
        },
        "workers": most,
        "cores": os.cpu_count(),
    }


def _rate(loader: Loader, shape: Shape, workers: int) -> Rate:
    batches = loader(shape, workers)
    # A whole number of turns of all processes: batches come in bunches of as many.
    turns = -(-shape.batches // workers) * workers
    for _ in range(3 * workers):
        next(batches)
    started, all_of_us, parent = time.perf_counter(), _cpu_seconds(), time.process_time()
    for _ in range(turns):
        assert len(next(batches)) == shape.batch_size
    images = turns * shape.batch_size
    seconds, parent = time.perf_counter() - started, time.process_time() - parent
    all_of_us = _cpu_seconds() - all_of_us
    batches.close()  # type: ignore[attr-defined]
    return Rate(images / seconds, 1000 * all_of_us / images, 1000 * parent / images)


def _cpu_seconds() -> float:
    """Of this process and those it has started."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(found.user + found.system for found in times)


def _ours(shape: Shape, workers: int, source: SourceConfig | None = None) -> Iterator[Any]:
    """The prefetcher, as a training worker reads from it."""
    from ray_synth.data.dataset import load_index
    from ray_synth.training.augmentation import train_transform
    from ray_synth.training.decoder import Decoder
    from ray_synth.training.feed import IndexedImages, ShuffledFeed
    from ray_synth.training.prefetch import Prefetcher

    source = source or SourceConfig(format="imagefolder", path=str(shape.folder / "files"))
    feed = ShuffledFeed(IndexedImages(load_index(source)), batch_size=shape.batch_size, seed=0)
    decoder = Decoder(train_transform(SIZE, shape.policy), workers=workers)
    copied = Locked()
    prefetcher = Prefetcher([feed], decoder, start=0, finish=lambda x, y, _: (copied(x), y))
    try:
        while True:
            yield prefetcher.next().images
    finally:
        prefetcher.close()


def _ours_tar(shape: Shape, workers: int) -> Iterator[Any]:
    tars = SourceConfig(format="webdataset", path=str(shape.folder / "tars"))
    return _ours(shape, workers, tars)


def _transform(policy: str) -> Any:
    """timm's own, of the same crops and colours; both leave flips to the device."""
    from timm.data import create_transform

    from ray_synth.training.augmentation import resolve_augmentation

    ours = resolve_augmentation(policy)
    return create_transform(
        SIZE, is_training=True, scale=ours.crop_scale, hflip=0.0, color_jitter=0.0,
        auto_augment=ours.auto_augment or None, interpolation="bilinear", mean=(0.5, 0.5, 0.5),
        use_prefetcher=True,
    )  # fmt: skip


def _dataloader(shape: Shape, workers: int) -> Iterator[Any]:
    """As timm's own training script reads."""
    from timm.data import create_dataset
    from timm.data.loader import fast_collate
    from torch.utils.data import DataLoader

    dataset = create_dataset("folder", root=str(shape.folder / "files"))
    dataset.transform = _transform(shape.policy)
    loader = DataLoader(
        dataset, shape.batch_size, shuffle=True, num_workers=workers, collate_fn=fast_collate,
        drop_last=True, persistent_workers=True,
    )  # fmt: skip
    copied = Locked()
    while True:
        for images, _ in loader:
            yield copied(images)


def _webdataset(shape: Shape, workers: int) -> Iterator[Any]:
    import webdataset
    from timm.data.loader import fast_collate

    names = [str(path) for path in sorted((shape.folder / "tars").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(names, resampled=True)  # endless
        .shuffle(256)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(_transform(shape.policy), int)
        .batched(shape.batch_size, collation_fn=fast_collate, partial=False)
    )
    copied = Locked()
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield copied(images)


def write_pictures(folder: Path, count: int) -> float:
    """JPEGs in class folders, and the same in tar files; their mean size in kB."""
    total = 0
    (folder / "tars").mkdir()
    for number in range(count):
        data, label = picture(number), number % CLASSES
        path = folder / "files" / f"{label:04d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with tarfile.open(folder / "tars" / f"{number % TARS:02d}.tar", "a") as tar:
            for suffix, part in (("jpg", data), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
        total += len(data)
    return total / count / 1000


def picture(seed: int) -> bytes:
    """A JPEG of 500x375 of about 100 kB: noise of all wavelengths, as in photographs."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    width, height = 500, 375
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(1, 8):
        cells = rng.integers(0, 256, (2**octave * 3 // 4 + 1, 2**octave, 3), dtype=np.uint8)
        layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, dtype=np.float32) / 1.7**octave
    pixels += rng.normal(0, 20, pixels.shape)
    pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
