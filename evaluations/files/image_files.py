"""Image files in folders, .zip and .tar archives and .parquet files, found by name and decoded to RGB."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import posixpath
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import EvaluationError, warn

# Still images that Pillow decodes by itself; training reads the same (guided_mt.data.sources.formats).
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k"),
    *(".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".qoi"),
)
# Files beside images that nobody takes for images.
_QUIET_SUFFIXES = (
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".htm", ".yaml", ".yml"),
    *(".log", ".ini", ".py", ".sh", ".pdf", ".mat"),
)
_QUIET_NAMES = ("readme", "license", "licence", "copying", "makefile", "thumbs.db")
_SHOWN = 3  # names in a message
_LARGEST_FILE_BYTES = 1 << 30  # no image needs more; a small .zip may claim any size
_ROWS_AT_ONCE = 64
_TAR_BLOCK = 512


class ImageFile(NamedTuple):
    """A name with forward slashes, relative to its folder or archive, and what reads its bytes, from any thread."""

    name: str
    read: Callable[[], bytes]


def image_files(path: Path) -> list[ImageFile]:
    """Every image file of a folder and all below it, a .zip or a .tar, sorted by name; hidden files are left out.

    Says which other files are left out, but for texts: what is left looks like all of the data.
    Of two files with the same name in an archive the last counts, as when unpacking. Raises EvaluationError where
    `path` is missing, of another kind or damaged, or where there are no images.
    """
    kind = path.name.lower()
    if not path.exists():
        raise EvaluationError(f"{path}: no such file or folder")
    if path.is_dir():
        names = walk(path, links=True)
        entries: dict[str, Callable[[], bytes]] = {
            name: partial((path / name).read_bytes) for name in names if is_image(name) and (path / name).is_file()
        }
        others = [name for name in names if name not in entries]
    elif kind.endswith(".zip"):
        entries, others = _zip_entries(path)
    elif kind.endswith(".tar"):
        entries, others = _tar_entries(path)
    elif kind.endswith((".tar.gz", ".tgz")):  # names in order would mean unpacking all of it again and again
        raise EvaluationError(f"{path}: a compressed .tar cannot be read in place; unpack it once: gunzip -k {path}")
    else:
        raise EvaluationError(
            f"{path}: not a kind of file that holds images; give an .npz, .npy, .zip, .tar or .parquet file or a folder"
        )
    files = [ImageFile(name, entries[name]) for name in sorted(entries) if _visible(name)]
    if not files:
        suffixes = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise EvaluationError(f"{path}: no images here or below; give a folder or an archive of {suffixes} files")
    _say_left_out(path, others)
    return files


def _say_left_out(path: Path, names: list[str]) -> None:
    """names: of the files that are no images by their names, and of links that lead nowhere."""
    names = [name for name in names if _visible(name) and not _is_quiet(name.rpartition("/")[2].lower())]
    if names:
        shown = ", ".join(sorted(names)[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
        warn(f"{path}: {len(names)} file(s) are no images by their names and left out: {shown}")


def _is_quiet(file: str) -> bool:
    return file.endswith(_QUIET_SUFFIXES) or file.startswith(_QUIET_NAMES)


def walk(folder: Path, links: bool = False) -> list[str]:
    """The names of all files below `folder`, sorted, hidden ones left out. Links are followed, but never back up.

    links: name those that lead nowhere too.
    """
    return sorted(_walk(str(folder), "", frozenset(), links))


def decode(path: Path, file: ImageFile, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3]. As in ADM and torchvision, alpha is dropped and EXIF orientation ignored; of a GIF the first frame.

    16-bit grey is scaled to 8 bits. `path` is where `file` is from. Raises EvaluationError for a broken image, and
    where it is not `size`, (height, width), before any of its pixels are decoded.
    """
    data = file.read()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if size is not None and (image.height, image.width) != size:
                raise EvaluationError(
                    f"{path}: {file.name} is {image.width}x{image.height} pixels, the first image is {size[1]}x{size[0]}; "
                    "make them equal: mt-diffusion prepare SRC OUT.zip --size N"
                )
            return np.asarray(_to_rgb(image))
    except (EvaluationError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise EvaluationError(
            f"{path}: {file.name} has more pixels than are decoded here ({one_line(error)}); make the images smaller: "
            "python scripts/prepare_images.py SRC OUT.zip --size N --max_pixels PIXELS"
        ) from error
    except Exception as error:  # decoders of broken files raise nearly everything
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise EvaluationError(f"{path}: {file.name} cannot be decoded ({reason}); replace or remove it") from error


def parquet_files(path: Path) -> list[str]:
    """The names of the .parquet files below a folder, sorted; [""] for one that is such a file itself."""
    if path.is_dir():
        return [name for name in walk(path) if name.lower().endswith(".parquet")]
    return [""] if path.suffix.lower() == ".parquet" else []


def parquet_count(path: Path, names: list[str]) -> int:
    """How many rows the .parquet files `names` of `path` have. Raises EvaluationError for a damaged one."""
    count = 0
    for name in names:
        with _open_parquet(path / name) as file:
            count += file.metadata.num_rows
    return count


def parquet_rows(path: Path, names: list[str]) -> Iterator[ImageFile]:
    """The images of the .parquet files `names` of `path` in order, a few rows read at a time.

    They are in column `image`, else in the first one that is bytes or a struct {bytes, path}, as Hugging Face writes
    them. Raises EvaluationError for a damaged file, or one without such a column, or a row without bytes.
    """
    for name in names:
        with _open_parquet(path / name) as file:
            column, key = _image_column(path / name, file.schema_arrow)
            row = 0
            for rows in file.iter_batches(_ROWS_AT_ONCE, columns=[key], use_threads=False):
                for cell in rows.column(0).to_pylist():
                    data = cell["bytes"] if isinstance(cell, dict) else cell
                    if data is None:
                        raise EvaluationError(f"{path / name}: row {row} has no bytes in column {column}; remove it")
                    yield ImageFile(f"{name}, row {row}".removeprefix(", "), partial(bytes, data))
                    row += 1


@contextlib.contextmanager
def whole(what: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into EvaluationError naming `what`. The system's own refusals pass."""
    try:
        yield
    except EvaluationError:
        raise
    except (
        *(OSError, EOFError, ValueError, KeyError, RuntimeError),  # the last two: pyarrow, and zipfile for encryption
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    ) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise EvaluationError(f"{what}: damaged or cut short ({one_line(error)}); copy or write it again") from error


def one_line(error: BaseException) -> str:
    """What went wrong, on one line of moderate length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_image(name: str) -> bool:
    """Whether a file of this name is an image."""
    return name.lower().endswith(SUFFIXES)


def _walk(folder: str, prefix: str, above: frozenset[str], links: bool) -> Iterator[str]:
    """Names relative to the root; `above`: the real paths of the folders we are in."""
    real = os.path.realpath(folder)
    if real in above:
        return  # a link that leads back up
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _visible(entry.name):
                continue
            # Where links go round in a circle, a Path is neither; an entry raises.
            there = Path(entry.path) if entry.is_symlink() else entry
            if there.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {real}, links)
            elif there.is_file() or (links and entry.is_symlink()):
                yield prefix + entry.name


def _zip_entries(path: Path) -> tuple[dict[str, Callable[[], bytes]], list[str]]:
    """({name: what reads an image}, the names of the other files)."""
    entries: dict[str, Callable[[], bytes]] = {}
    others: list[str] = []
    with whole(str(path)):
        archive, lock = zipfile.ZipFile(path), threading.Lock()
        for info in archive.infolist():
            name = _clean(info.filename)
            if info.is_dir() or not is_image(name):
                others += [] if info.is_dir() else [name]
                continue
            if info.flag_bits & 1:
                raise EvaluationError(f"{path}: {name} is encrypted; unpack the archive and give the folder")
            if info.file_size > _LARGEST_FILE_BYTES:
                raise EvaluationError(f"{path}: {name} would unpack to {info.file_size:,} bytes; remove it")
            entries[name] = partial(_read_zip, path, archive, lock, info)
    return entries, others


def _read_zip(path: Path, archive: zipfile.ZipFile, lock: threading.Lock, info: zipfile.ZipInfo) -> bytes:
    with whole(f"{path}: {info.filename}"), lock:  # ZipFile counts its readers without a lock
        return archive.read(info)


def _tar_entries(path: Path) -> tuple[dict[str, Callable[[], bytes]], list[str]]:
    """({name: what reads an image}, the names of the other files)."""
    entries: dict[str, Callable[[], bytes]] = {}
    others: list[str] = []
    with whole(str(path)):
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = _clean(member.name)
                if member.islnk() and _clean(member.linkname) in entries:
                    entries[name] = entries[_clean(member.linkname)]
                elif member.isreg() and is_image(name):
                    if member.issparse():
                        raise EvaluationError(f"{path}: {name} is stored sparse; pack it again without --sparse")
                    entries[name] = partial(_read_at, path, member.offset_data, member.size)
                elif member.isreg():
                    others.append(name)
                archive.members.clear()  # type: ignore[attr-defined]  # `entries` is the index; tarfile's own is many times as large
            end = archive.offset
        # tarfile takes any damaged or missing header for the end of the archive; the real end is a block of zeros
        if _read_at(path, end, _TAR_BLOCK).strip(b"\0"):
            raise tarfile.ReadError("damaged header")
    return entries, others


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise EvaluationError(f"{path}: damaged or cut short (ends after {offset + len(data):,} bytes); copy it again")
    return data


def _clean(name: str) -> str:
    """A member's name without "./", "/" in front and "..": ./train/a.png and train/a.png are the same file."""
    return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB. Raises ValueError for pixels that are no colours, such as floating-point ones."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit pixels")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    image.info.pop("transparency", None)  # convert() would print a warning per image
    return image.convert("RGB")


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator:
    """A pyarrow ParquetFile. Raises EvaluationError without pyarrow and for a damaged file."""
    parquet = _pyarrow(path)
    with whole(str(path)), parquet.ParquetFile(path) as file:
        yield file


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow.parquet  # here: slow to import, and only .parquet files need it
    except ImportError as error:
        raise EvaluationError(f"{path}: .parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def _image_column(path: Path, schema: Any) -> tuple[str, str]:
    """(name of the column with the images, what to read of it) of a pyarrow schema."""
    import pyarrow.types as types

    def key(field: Any) -> str | None:
        if types.is_struct(field.type):
            inside = field.type.get_field_index("bytes")
            return f"{field.name}.bytes" if inside >= 0 and is_bytes(field.type.field(inside).type) else None
        return field.name if is_bytes(field.type) else None

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    for field in sorted(schema, key=lambda field: field.name != "image"):
        if (found := key(field)) is not None:
            return field.name, found
    raise EvaluationError(
        f"{path}: no column of images, bytes or struct {{bytes, path}} (it has {', '.join(schema.names) or 'none'}); "
        "save them as a column image"
    )
