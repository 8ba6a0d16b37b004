"""What an .npz or .npy file holds, by the headers of its arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from evaluations.errors import EvaluationError
from guided_mt.errors import NPZ_ERRORS, reason

from .facts import Facts, shortened, size_of

STATISTICS = ("mu", "sigma")
RESTORED = ("original", "masked", "restored", "mask")


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def text(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def is_images(self) -> bool:
        return len(self.shape) == 4 and self.shape[-1] == 3 and self.dtype == np.uint8


def describe(path: str) -> Facts:
    """Raises EvaluationError for a broken file, and one of Python objects."""
    file = Path(path).expanduser()
    headers = read_headers(file)
    objects = [name for name, header in headers.items() if header.dtype.hasobject]
    if objects:
        raise EvaluationError(f"{path}: holds pickled objects ({', '.join(objects)}), which are never loaded")
    facts = Facts(path, "")
    facts.kind = _kind(path, headers, facts)
    facts.add("arrays", {name: header.text for name, header in headers.items()})
    if "arr_1" in headers and headers["arr_1"].dtype.kind in "iu" and len(headers["arr_1"].shape) == 1:
        facts.add("classes", f"arr_1 has {len(np.unique(_load(file, 'arr_1')))} different ones")
    facts.add("size on disk", size_of(file))
    return facts


def read_headers(file: Path) -> dict[str, Header]:
    """{name: its header}; of an .npy the file's own name. Raises EvaluationError."""
    try:
        if file.suffix.lower() == ".npy":
            with open(file, "rb") as content:
                return {file.stem: _header(content)}
        with zipfile.ZipFile(file) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as content:
                    found[name.removesuffix(".npy")] = _header(content)
            return found
    except NPZ_ERRORS as error:
        raise EvaluationError(f"{file}: is no whole {file.suffix} file ({reason(error)}); copy it again") from None


def _header(content: IO[bytes]) -> Header:
    major, _ = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(content)
    return Header(shape, dtype)


def _load(file: Path, name: str) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        return arrays[name]


def _kind(path: str, headers: Mapping[str, Header], facts: Facts) -> str:
    """What the file is; what to type next goes into `facts`."""
    if all(name in headers for name in RESTORED):
        facts.command("PSNR, SSIM, LPIPS", "score", "restoration", path)
        return f"{headers['restored'].shape[0]:,} images restored by `restore`, with originals and masks"
    if all(name in headers for name in STATISTICS):
        facts.command("score samples against it", "evaluate", path, "SAMPLES")
        stored = f", and {headers['arr_0'].shape[0]:,} of the images" if "arr_0" in headers else ""
        stored += f", and those of {headers['pool'].shape[0]:,} images themselves" if "pool" in headers else ""
        return f"a reference batch: statistics of Inception features{stored}"
    if "probabilities" in headers and len(headers["probabilities"].shape) == 2:
        count, classes = headers["probabilities"].shape
        if "labels" in headers:
            facts.command("accuracy and calibration", "score", "classification", path)
        if "classes" in headers:
            facts.add("names of classes", shortened([str(name) for name in _load(Path(path).expanduser(), "classes")]))
        true = "" if "labels" in headers else ", without their true classes"
        return f"class probabilities of {count:,} images for {classes:,} classes{true}, as `classify` writes them"
    if "total_bpd" in headers:
        return f"bits per dimension of {headers['total_bpd'].shape[0]:,} images and the terms of the bound, from `nll`"
    images = headers.get("arr_0")
    if images is not None and images.is_images:
        return _images(path, headers, facts, images)
    if list(headers) == ["labels"] or (list(headers) == ["arr_0"] and images and len(images.shape) == 1):
        only = next(iter(headers.values()))
        facts.command("draw images of these classes", "sample", "--model_path", "RUN", "--given", f"label={path}")
        return f"{only.shape[0]:,} labels"
    vectors = [x for x in headers.values() if len(x.shape) == 2 and x.dtype.kind == "f"]
    if len(vectors) == len(headers) == 1:
        words = ("--mt_task", "representation", "--representation_file", path)
        facts.command("train on images with these vectors", "train", *words, "--data_dir", "IMAGES")
        return f"{vectors[0].shape[0]:,} vectors of {vectors[0].shape[1]:,} numbers, one per image"
    return "arrays of no kind that is known here" if headers else "an empty .npz file"


def _images(path: str, headers: Mapping[str, Header], facts: Facts, images: Header) -> str:
    count, height, width, _ = images.shape
    facts.command("FID and its like", "evaluate", "REFERENCE", path)
    facts.command("train on them", "train", "--data_dir", path, "--image_size", min(height, width))
    beside = [name for name in headers if name not in ("arr_0", "arr_1")]
    labels = " with a label each (arr_1)" if "arr_1" in headers else ""
    more = f", and of each {', '.join(beside)}" if beside else ""
    return f"{count:,} images of {height} x {width} pixels{labels}{more}: samples, or a data set"
