"""The layouts that pairs come in, from a folder, .tar or .zip as downloaded, and what is where in each.

cityscapes  leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png, gtFine/SPLIT/CITY/NAME_gtFine_{labelIds,labelTrainIds,color}.png;
            also a folder with leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
aligned     SPLIT/NAME.jpg, A on the left and B on the right, as in pix2pix
folders     SPLITA/NAME.jpg and SPLITB/NAME.jpg, each the other's partner by its name. Only where it is asked for: CycleGAN's
            data sets look the same, and are not pairs
camvid      SPLIT/images/NAME.jpg, SPLIT/labels/NAME.png and classes.txt (lines `index name R G B`)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from guided_mt.data import MAX_PIXELS, open_source
from guided_mt.data.sources import IMAGE_SUFFIXES, FileSource
from guided_mt.errors import UserError, nearest, reason

from .label_maps import LabelReader, cityscapes_reader, class_file_reader
from .pairs import AlignedPairs, FilePairs, ImagePairs, PairSource, Side

logger = logging.getLogger("latent_mt.data")

DIRECTIONS = ("AtoB", "BtoA")
CLASS_FILE = "classes.txt"
_SHOWN = 5  # names in a message
_KNOWN_FOLDERS = ("train", "val", "test", "leftImg8bit", "gtFine")
_CITYSCAPES_ZIPS = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")
_CITYSCAPES_PHOTO = re.compile(r"leftImg8bit/([^/]+)/(.+)_leftImg8bit\.png$")
_CITYSCAPES_MAP = re.compile(r"gtFine/([^/]+)/(.+)_gtFine_(labelIds|labelTrainIds|color)\.png$")
_CITYSCAPES_KINDS = ("labelIds", "labelTrainIds", "color")
_CAMVID_FILE = re.compile(r"([^/]+)/(images|labels)/(.+)\.[^./]+$")


class Files:
    """The files of one or more sources by their names, without the folder that all of them lie in."""

    def __init__(self, path: str, sources: Sequence[FileSource]):
        self.path = path
        self.sources = list(sources)
        places = {name: (number, k) for number, source in enumerate(sources) for k, name in enumerate(source.names)}
        common = _common_folder([name for name in places if not name.endswith(".txt")])
        self.places = {name[len(common) :]: place for name, place in places.items() if name.startswith(common)}

    def read_bytes(self, name: str) -> bytes:
        """Bytes of the file of this name."""
        source, number = self.places[name]
        return self.sources[source].read_bytes(number)

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """int64 [N, 2]: which source, and which file of it."""
        return np.array([self.places[name] for name in names], dtype=np.int64).reshape(-1, 2)


def open_pairs(
    path: str | Path,
    layout: str = "auto",
    split: str = "train",
    direction: str = "AtoB",
    classes: str | Path | None = None,
    sides: Sequence[str] | None = None,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PairSource:
    """Open the pairs of one split, in the order of their names.

    path: a folder, .tar or .zip, or a folder inside one (x.tar/cityscapes). direction: AtoB puts A (the photo, the left
    half) first, BtoA the other. classes: a class file in place of camvid's classes.txt. sides: names of A and B, which
    are else photo and map, or A and B where both are images. limit: only the first so many pairs. max_pixels: larger images are
    not decoded. Raises UserError.
    """
    check_choice("layout", layout, ("auto", *LAYOUTS))
    check_choice("direction", direction, DIRECTIONS)
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: must be at least 1")
    if sides is not None and (isinstance(sides, str) or len(set(sides)) != 2 or len(sides) != 2):
        raise UserError(f"sides {sides}: must be two different names, of A and of B")
    files = _open_files(path, max_pixels)
    guessed = layout == "auto"
    layout = _layout_of(files) if guessed else layout
    if classes is not None and layout != "camvid":
        raise UserError(f"classes {classes}: only the layout camvid takes a class file; {path} is {layout}")
    source = LAYOUTS[layout](files, split, direction, classes, sides, limit)
    source.direction = direction
    if guessed and isinstance(source, AlignedPairs):
        _say_halves(source)
    return source


# ---------------------------------------------------------------- the layouts


def _cityscapes(
    files: Files,
    split: str,
    direction: str,
    classes: str | Path | None,
    sides: Sequence[str] | None,
    limit: int | None,
) -> PairSource:
    photos: dict[str, dict[str, str]] = {}  # split: {CITY/NAME: file}
    maps: dict[str, dict[str, dict[str, str]]] = {}  # split: {kind: {CITY/NAME: file}}
    for name in files.places:
        if match := _CITYSCAPES_PHOTO.match(name):
            photos.setdefault(match[1], {})[match[2]] = name
        elif match := _CITYSCAPES_MAP.match(name):
            maps.setdefault(match[1], {}).setdefault(match[3], {})[match[2]] = name
    if not maps or not photos:
        raise UserError(
            f"{files.path}: {'no photos leftImg8bit' if maps else 'no label maps gtFine'}/SPLIT/CITY/NAME_...png; "
            f"give a folder that holds both leftImg8bit and gtFine, or {' and '.join(_CITYSCAPES_ZIPS)}"
        )
    _check_split(files.path, split, set(photos) | set(maps))
    of_split, by_kind = photos.get(split, {}), maps.get(split, {})
    kind = max(_CITYSCAPES_KINDS, key=lambda kind: len(by_kind.get(kind, {}).keys() & of_split.keys()))
    return _file_pairs(files, of_split, by_kind.get(kind, {}), cityscapes_reader(kind), direction, sides, limit)


def _aligned(
    files: Files,
    split: str,
    direction: str,
    classes: str | Path | None,
    sides: Sequence[str] | None,
    limit: int | None,
) -> PairSource:
    images = [name for name in files.places if "/" in name and name.lower().endswith(IMAGE_SUFFIXES)]
    found = {name.partition("/")[0] for name in images}
    if split not in found:
        _refuse_unaligned(files.path, split, found)
    elif split.endswith(("A", "B")):
        _refuse_unaligned(files.path, split[:-1], found)
    _check_split(files.path, split, found)
    names = sorted(name for name in images if name.startswith(f"{split}/"))[:limit]
    both = [Side(name) for name in sides or ("A", "B")]
    halves = (0, 1) if direction == "AtoB" else (1, 0)
    numbers = files.numbers(names)[:, 1]  # one source: only Cityscapes comes in two
    return AlignedPairs(files.path, [both[half] for half in halves], files.sources[0], numbers, halves)


def _folders(
    files: Files,
    split: str,
    direction: str,
    classes: str | Path | None,
    sides: Sequence[str] | None,
    limit: int | None,
) -> PairSource:
    found: dict[str, dict[str, str]] = {}  # folder: {name without suffix: file}
    for name in files.places:
        folder, _, file = name.partition("/")
        if file.lower().endswith(IMAGE_SUFFIXES):
            stem = file.rpartition(".")[0]
            if stem in found.setdefault(folder, {}):
                raise UserError(
                    f"{files.path}: {found[folder][stem]} and {name} differ only in their suffix; remove one"
                )
            found[folder][stem] = name
    splits = {folder[:-1] for folder in found if {f"{folder[:-1]}A", f"{folder[:-1]}B"} <= found.keys()}
    _check_split(files.path, split, splits)
    both = [Side(name) for name in sides or ("A", "B")]
    names = [found[f"{split}A"], found[f"{split}B"]]
    for there, here, missing in ((names[0], names[1], f"{split}B"), (names[1], names[0], f"{split}A")):
        alone = sorted(there[key] for key in there.keys() - here.keys())
        if alone:
            raise UserError(
                f"{files.path}: {len(alone)} files have no partner of their name in {missing}: {_some(alone)}"
            )
    chosen = sorted(names[0])[:limit]
    numbers = [files.numbers([of_side[key] for key in chosen])[:, 1] for of_side in names]
    order = (0, 1) if direction == "AtoB" else (1, 0)
    return ImagePairs(
        files.path, [both[k] for k in order], files.sources[0], np.stack([numbers[k] for k in order], axis=1)
    )


def _camvid(
    files: Files,
    split: str,
    direction: str,
    classes: str | Path | None,
    sides: Sequence[str] | None,
    limit: int | None,
) -> PairSource:
    found: dict[str, dict[str, dict[str, str]]] = {}  # split: {"images" | "labels": {NAME: file}}
    for name in files.places:
        if match := _CAMVID_FILE.match(name):
            same = found.setdefault(match[1], {"images": {}, "labels": {}})[match[2]]
            if match[3] in same:
                raise UserError(f"{files.path}: {same[match[3]]} and {name} differ only in their suffix; remove one")
            if match[2] == "labels" and not name.lower().endswith(".png"):
                raise UserError(f"{files.path}: {name}: label maps must be PNG, which keeps class indices exactly")
            same[match[3]] = name
    _check_split(files.path, split, found)
    reader = class_file_reader(*_class_file(files, classes))
    return _file_pairs(files, found[split]["images"], found[split]["labels"], reader, direction, sides, limit)


LAYOUTS: dict[str, Callable[..., PairSource]] = {
    "cityscapes": _cityscapes,
    "aligned": _aligned,
    "camvid": _camvid,
    "folders": _folders,
}


def _layout_of(files: Files) -> str:
    """Raises UserError, saying what was looked for, where the files have none of the layouts."""
    names = files.places
    if any(name.startswith(("leftImg8bit/", "gtFine/")) for name in names):
        return "cityscapes"
    if {match[2] for name in names if (match := _CAMVID_FILE.match(name))} == {"images", "labels"}:
        return "camvid"
    if any(name.count("/") == 1 and name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return "aligned"
    raise UserError(
        f"{files.path}: none of the layouts that pairs come in: no leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png with gtFine "
        f"(cityscapes), no SPLIT/images/NAME.jpg with SPLIT/labels/NAME.png (camvid), no SPLIT/NAME.jpg (aligned); "
        f"the first file is {min(names)}"
    )


# ---------------------------------------------------------------- what they share


def _open_files(path: str | Path, max_pixels: int) -> Files:
    folder = Path(path).expanduser()
    zips = [folder / name for name in _CITYSCAPES_ZIPS]
    if any(file.is_file() for file in zips) and not (folder / "leftImg8bit").is_dir():
        missing = [file.name for file in zips if not file.is_file()]
        if missing:
            raise UserError(f"{folder}: no {missing[0]}; Cityscapes comes in {' and '.join(_CITYSCAPES_ZIPS)}")
        return Files(str(path), [_file_source(file, max_pixels) for file in zips])
    return Files(str(path), [_file_source(path, max_pixels)])


def _file_source(path: str | Path, max_pixels: int) -> FileSource:
    source = open_source(path, suffixes=(*IMAGE_SUFFIXES, ".txt"), max_pixels=max_pixels)
    if not isinstance(source, FileSource):
        raise UserError(f"{path}: pairs are read from a folder, .tar or .zip")
    return source


def _common_folder(names: Sequence[str]) -> str:
    """The folders above everything that are no part of a layout, such as "CamVid/" of CamVid/train/images/x.png."""
    common = ""
    while names:
        first = names[0][len(common) :].partition("/")[0]
        longer = f"{common}{first}/"
        least = longer.count("/") + 1  # a split has to be left
        if first in _KNOWN_FOLDERS or not all(name.startswith(longer) and name.count("/") >= least for name in names):
            break
        common = longer
    return common


def _file_pairs(
    files: Files,
    photos: Mapping[str, str],
    maps: Mapping[str, str],
    reader: LabelReader,
    direction: str,
    sides: Sequence[str] | None,
    limit: int | None,
) -> FilePairs:
    """Pairs of {name: photo} and {name: label map}. Raises UserError where one has no partner."""
    for there, here, missing in ((photos, maps, "label map"), (maps, photos, "photo")):
        alone = sorted(there[key] for key in there.keys() - here.keys())
        if alone:
            raise UserError(
                f"{files.path}: {len(photos)} photos and {len(maps)} label maps; {len(alone)} without a {missing}: {_some(alone)}"
            )
    photo, label = sides or ("photo", "map")
    both = [Side(photo), Side(label, "labels", reader.palette)]
    chosen = sorted(photos)[:limit]
    return FilePairs(
        files.path,
        both if direction == "AtoB" else both[::-1],
        reader,
        files.sources,
        files.numbers([photos[key] for key in chosen]),
        files.numbers([maps[key] for key in chosen]),
    )


def _class_file(files: Files, classes: str | Path | None) -> tuple[bytes, str]:
    """(content, what to call it)."""
    if classes is not None:
        try:
            return Path(classes).expanduser().read_bytes(), str(classes)
        except OSError as error:
            raise UserError(f"{classes}: cannot be read ({reason(error)})") from error
    if CLASS_FILE not in files.places:
        raise UserError(
            f"{files.path}: no {CLASS_FILE} (one line per class: index name R G B); add it, or name such a file by `classes`"
        )
    return files.read_bytes(CLASS_FILE), f"{files.path}: {CLASS_FILE}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def _refuse_unaligned(path: str, start: str, found: set[str]) -> None:
    """Raises UserError where the folders are CycleGAN's two sets of photos, whose halves are no pairs."""
    if {f"{start}A", f"{start}B"} <= found:
        raise UserError(
            f"{path}: {start}A and {start}B are two sets of single photos, as CycleGAN's, and not pairs; if {start}A/x.jpg and "
            f"{start}B/x.jpg show the same, ask for layout: folders and split: {start}"
        )


def _say_halves(source: AlignedPairs) -> None:
    """Say how the images are divided: an image that shows one thing alone divides just as well."""
    try:
        width, height = source.source.read(int(source.numbers[0])).size
    except Exception:  # training tells what is broken
        return
    if width // 2 != height:
        logger.warning(
            "%s: each image is read as a pair, A its left half and B its right one, %d x %d pixels each in the first; if these are "
            "single images, they are no pairs",
            *(source.path, width // 2, height),
        )


def _check_split(path: str, split: str, found: Mapping[str, object] | set[str]) -> None:
    if split not in found:
        there = ", ".join(sorted(found)) or "no folders"
        raise UserError(f"{path}: no split {split}{nearest(split, found)}; there is {there}")


def check_choice(key: str, value: str, valid: Sequence[str]) -> None:
    """Raises UserError where the value of `key` is not a valid one, with the nearest that is."""
    if value not in valid:
        raise UserError(f"{key} {value!r}: must be one of {', '.join(valid)}{nearest(str(value), valid)}")
