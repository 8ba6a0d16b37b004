"""How fast samples come out of local shards: ShardData against bare webdataset, and what an index costs.

    python benchmarks/shards.py [--images FILE.tar --samples 10000 --shards 4 --image_size 64 --rounds 5]

Shards are written once, as img2dataset writes them, of the images of an archive, over and over until there are enough. Both readers
run in this one process on one thread in turns: the file is read, the image decoded and cropped to image_size, the caption read.
webdataset reads its shards from beginning to end, with a shuffle buffer of 1,000 samples; ShardData draws from all shards at once.
The index is made of the first shard, without and with a filter that needs each sample's .json, and read back from the cache. All
times are of the processor, with the shards in the system's memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from guided_mt.data import center_crop_arr, open_source
from guided_mt.data.sources import FileSource, cache
from latent_mt.data import ShardData
from latent_mt.data.shards import index
from latent_mt.data.shards.filters import Filters

BATCH = 50


def write_shards(folder: Path, images: str, samples: int, shards: int) -> list[str]:
    """The files, of `samples` samples each."""
    source = open_source(images)
    assert isinstance(source, FileSource)
    files = []
    for shard in range(shards):
        files.append(str(folder / f"{shard:05d}.tar"))
        with tarfile.open(files[-1], "w") as tar:
            for k in range(samples):
                number = (shard * samples + k) % len(source)
                name = source.name(number)
                described = {
                    "width": 64,
                    "height": 64,
                    "url": f"https://example.org/{name}",
                    "caption": name,
                    "sha256": "0" * 64,
                }
                suffix = Path(name).suffix.lstrip(".")
                members = {
                    suffix: source.read_bytes(number),
                    "txt": name.encode(),
                    "json": json.dumps(described).encode(),
                }
                for kind, content in members.items():
                    entry = tarfile.TarInfo(f"{shard:05d}{k:05d}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return files


def by_webdataset(files: list[str], image_size: int) -> Iterator[tuple[np.ndarray, str]]:
    """Decoded as ShardData decodes, so that reading is what differs."""
    random.seed(0)
    samples: Any = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(1000)
    for sample in samples:
        image = next(sample[suffix] for suffix in index.IMAGES if suffix in sample)
        yield center_crop_arr(Image.open(io.BytesIO(image)), image_size), sample["txt"].decode()


def by_shard_data(files: list[str], image_size: int) -> Iterator[tuple[torch.Tensor, str]]:
    data = ShardData(files, image_size, BATCH, num_workers=0).open()
    with data.stream(seed=0, total_steps=len(data.source) // BATCH) as stream:
        for batch in stream:
            assert batch.captions is not None
            yield from zip(batch.images, batch.captions, strict=True)


def samples_per_second(made: Iterator[Any], count: int) -> float:
    """After the first 200, which open files and fill buffers."""
    for _ in range(200):
        next(made)
    start = time.process_time()
    for _ in range(count):
        next(made)
    return count / (time.process_time() - start)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def index_times(file: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds to make and to read an index, and its bytes."""
    rules = {
        "offsets alone": index.SampleRule(),
        "with two filters, from each .json": index.SampleRule(filters=Filters({"min_width": 32, "min_height": 32})),
    }
    found: dict[str, float] = {}
    cache.LEAST_BYTES = 0
    for name, rule in rules.items():
        made, read = [], []
        for _ in range(rounds):
            for old in folder.rglob("*.listing"):
                old.unlink()
            made.append(seconds(lambda rule=rule: index.index_of(file, rule)))  # type: ignore[misc]
            read.append(seconds(lambda rule=rule: index.index_of(file, rule)))  # type: ignore[misc]
        found[f"made, {name}"], found[f"read back, {name}"] = statistics.median(made), statistics.median(read)
        found[f"bytes, {name}"] = sum(kept.stat().st_size for kept in folder.rglob("*.listing"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", default="builtin", help="an archive or folder of images; builtin: noise of 64 pixels, as JPEG"
    )
    parser.add_argument("--samples", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["MT_DIFFUSION_LISTINGS"] = str(folder / "listings")
        if args.images == "builtin":
            (folder / "images").mkdir()
            for k in range(200):
                noise = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(folder / "images" / f"{k}.jpg")
            args.images = str(folder / "images")
        files = write_shards(folder, args.images, args.samples, args.shards)
        readers = {"webdataset": by_webdataset, "ShardData": by_shard_data}
        rates: dict[str, list[float]] = {name: [] for name in readers}
        count = min(2000, args.samples * args.shards // 2 // BATCH * BATCH)
        for _ in range(args.rounds):
            for name, reader in readers.items():
                rates[name].append(samples_per_second(iter(reader(files, args.image_size)), count))
        print("| reader | samples/s of processor time | range | against webdataset |\n| --- | --- | --- | --- |")
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(found, rates["webdataset"], strict=True))
            spread = f"{min(found):.0f} to {max(found):.0f}"
            print(f"| {name} | {statistics.median(found):.0f} | {spread} | {ratio:.2f} |")
        print(f"\n| index of {args.samples} samples | |\n| --- | --- |")
        for name, value in index_times(Path(files[0]), folder / "listings", args.rounds).items():
            print(f"| {name} | {value:,.0f} |" if name.startswith("bytes") else f"| {name} | {value * 1000:.1f} ms |")


if __name__ == "__main__":
    main()
