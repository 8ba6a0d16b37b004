"""Captions of images: texts beside them (NAME.txt), or the rows of a table (.csv, .tsv, .jsonl)."""

from __future__ import annotations

import csv
import io
import json
import os.path
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from ..errors import NPZ_ERRORS, UserError, reason
from .open import open_source
from .sources import IMAGE_SUFFIXES, FileSource, ImageSource

BESIDE = "txt"  # what stands for a text file beside each image
# Columns of tables, in small letters: img2dataset's and Hugging Face's names among them.
FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "prompt", "title")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
TABLES = (*_DELIMITERS, *_LINES)


class Captions(Sequence[Sequence[str]]):
    """The captions of N items, () for an item that has none. places [N]: what `read` takes, None for none."""

    def __init__(self, places: Sequence[Any], read: Callable[[Any], Sequence[str]]):
        self.places, self.read = places, read

    def __len__(self) -> int:
        return len(self.places)

    @override
    def __getitem__(self, index: int) -> Sequence[str]:  # type: ignore[override]  # one by one alone
        place = self.places[index]
        return () if place is None else self.read(place)


class OfLabels(Sequence[Sequence[str]]):
    """A caption for each item, made of its class: `template` with the class's name in the place of {class}; () without a class.

    Raises UserError for a template with another field, and where the items have no classes.
    """

    def __init__(self, template: str, source: ImageSource, flag: str):
        where = f"{flag} '{template}'"
        if source.labels is None:
            raise UserError(f"{source.path}: {where} makes captions of classes, and {source.without_class()} has none")
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
            other = sorted(fields - {"class"})
            if other or not fields:
                got = f"'{{{other[0]}}}' is no field" if other else "it has no field, so that all captions would be one"
                raise UserError(f"{where}: {got}; write the class's name as {{class}}, as in 'a photo of a {{class}}'")
            self.texts = [template.format(**{"class": name}) for name in source.class_names]
        except (ValueError, LookupError) as error:
            raise UserError(f"{where}: {error}; write the class's name as {{class}}") from None
        self.labels = source.labels

    def __len__(self) -> int:
        return len(self.labels)

    @override
    def __getitem__(self, index: int) -> Sequence[str]:  # type: ignore[override]  # one by one alone
        label = int(self.labels[index])
        return () if label < 0 else (self.texts[label],)


def find_captions(path: str, source: ImageSource, flag: str) -> Sequence[Sequence[str]]:
    """The captions that lie where they usually do: the array `captions` of an .npz, captions.csv (.tsv, .jsonl) in the folder or
    archive `path`, else NAME.txt beside NAME.jpg. Raises UserError where there are none."""
    file = Path(path).expanduser()
    if file.suffix == ".npz" and file.is_file():
        return _of_array(file, len(source))
    for suffix in TABLES:
        try:
            return open_captions(f"captions{suffix}", path, source, flag)
        except NoTable:
            continue
    try:
        return open_captions(BESIDE, path, source, flag)
    except UserError:
        raise UserError(
            f"{path}: has no captions: neither captions.csv (.tsv, .jsonl) nor NAME.txt beside an image; name a table with {flag}"
        ) from None


def _of_array(file: Path, count: int) -> Sequence[Sequence[str]]:
    """Raises UserError where the array is missing, or none of one text per image."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = next((arrays[name] for name in ("captions", "caption") if name in arrays.files), None)
    except NPZ_ERRORS as error:
        raise UserError(f"{file}: its captions can't be read ({reason(error)})") from None
    if found is None or found.dtype.kind != "U" or found.shape != (count,):
        got = "has no array captions" if found is None else f"captions is {found.dtype} {list(found.shape)}"
        raise UserError(f"{file}: {got}; it must be one text for each of the {count} images, unicode [N]")
    return [texts_of(str(text)) for text in found]


class NoTable(UserError):
    """The table that was asked for is not there."""


def open_captions(where: str, path: str, source: ImageSource, flag: str) -> Captions:
    """The captions of a source's items.

    where: "txt" for NAME.txt beside NAME.jpg, or a table: a file, or one inside the folder or archive `path`, which the source
    was opened by. flag: what names `where`, for messages. Raises UserError where there is none (NoTable, of a table), or no
    item has a caption.
    """
    names = [source.name(k) for k in range(len(source))]
    if not isinstance(where, str):  # what a YAML file gives
        raise UserError(f"data.params.captions {where!r}: name one place, {BESIDE} or a table")
    if where == BESIDE:
        captions = _beside(path, names, flag)
    elif Path(where).suffix.lower() in TABLES:
        captions = _of_table(where, path, names, flag)
    else:
        raise UserError(
            f"{flag} '{where}': write {BESIDE} for a text beside each image, or name a table ({', '.join(TABLES)})"
        )
    if all(place is None for place in captions.places):
        raise UserError(f"{path}: {flag} {where} has none for any of the {len(names)} images; the first is {names[0]}")
    return captions


class _TextFiles:
    """Reads text files of a source by their number; one of several lines is several captions."""

    def __init__(self, source: FileSource):
        self.source = source

    def __call__(self, number: int) -> Sequence[str]:
        return lines_of(self.source.read_bytes(number))


def lines_of(content: bytes) -> tuple[str, ...]:
    """The lines of a text that are not empty."""
    return tuple(line.strip() for line in decoded(content).splitlines() if line.strip())


def decoded(content: bytes) -> str:
    """A text in UTF-8, without the mark that some editors put before it; bytes that are none become question marks."""
    return content.decode("utf-8", "replace").removeprefix("\ufeff")


def texts_of(value: Any) -> tuple[str, ...]:
    """The captions in a value of a JSON file or table: a text, or a list of texts; of anything else, none."""
    values = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())


def _beside(path: str, names: Sequence[str], flag: str) -> Captions:
    source = _files(path, ".txt", flag)
    texts = {os.path.splitext(name)[0]: k for k, name in enumerate(source.names) if name.lower().endswith(".txt")}
    return Captions([texts.get(os.path.splitext(name)[0]) for name in names], _TextFiles(source))


def _of_table(where: str, path: str, names: Sequence[str], flag: str) -> Captions:
    content, called, within = _table(where, path, flag)
    found: dict[str, tuple[str, ...]] = {}  # file without suffix: its captions
    for file, texts in _rows(content, Path(where).suffix.lower(), called):
        key = os.path.splitext(file.replace("\\", "/").removeprefix("./"))[0]
        found[key] = (*found.get(key, ()), *texts)
    places = _matched(found, [within + os.path.splitext(name)[0] for name in names], called)
    return Captions([texts or None for texts in places], tuple)


def _matched(found: Mapping[str, tuple[str, ...]], names: Sequence[str], called: str) -> list[tuple[str, ...] | None]:
    """Rows for names, which may lie in more or fewer folders in the table than in the source: the fewest left out that fit.

    Raises UserError where two rows then fit one name.
    """
    most = max((key.count("/") for key in (*found, *names)), default=0)
    for depth in range(most + 1):
        shorter: dict[str, str] = {}
        doubtful: dict[str, str] = {}
        for key in found:
            short = _without(key, depth)
            doubtful |= {short: key} if short in shorter else {}
            shorter[short] = key
        for mine in (names, [_without(name, depth) for name in names]):
            if not any(name in shorter for name in mine):
                continue
            twice = next((name for name in mine if name in doubtful), None)
            if twice is not None:
                raise UserError(
                    f"{called}: {shorter[twice]} and another row both fit the image {twice}; write its whole path"
                )
            return [found[shorter[name]] if name in shorter else None for name in mine]
    return [None] * len(names)


def _without(name: str, folders: int) -> str:
    """A path without its first `folders` folders, or without all where it has fewer."""
    return name.split("/", folders)[-1] if name.count("/") >= folders else name.rpartition("/")[2]


def _table(where: str, path: str, flag: str) -> tuple[bytes, str, str]:
    """(content, what to call it, the folder of `path` as seen from it, "" or ending in /) of a file, or of one of that name inside
    `path`, beside it, or in the archive that `path` leads into."""
    file = Path(where).expanduser()
    if file.is_file():
        try:
            return file.read_bytes(), where, ""
        except OSError as error:
            raise UserError(f"{flag} {where}: cannot be read ({reason(error)})") from None
    place = Path(path).expanduser()
    for outer in (place, *place.parents):
        within = "".join(f"{part}/" for part in place.relative_to(outer).parts)
        if outer.is_dir() and (outer / where).is_file():
            return (outer / where).read_bytes(), str(outer / where), within
        if outer.is_file() and outer.suffix.lower() in (".tar", ".zip"):
            source = _files(str(outer), file.suffix.lower(), flag)
            if where in source.names:
                return source.read_bytes(list(source.names).index(where)), f"{outer}: {where}", within
            break
        if outer.is_dir() and outer != place:  # a table beside train/ and test/ is that of both
            break
    raise NoTable(f"{flag} {where}: no such file, and none of that name in {path}")


def _files(path: str, suffix: str, flag: str) -> FileSource:
    source = open_source(path, suffixes=(*IMAGE_SUFFIXES, suffix))
    if not isinstance(source, FileSource):
        raise UserError(f"{flag}: {path} is no folder, .tar or .zip, in which captions could lie; name a table")
    return source


def _rows(content: bytes, suffix: str, called: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(file, captions) of each row. Raises UserError for a table without these columns, or a row that is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{called}: line {line} is no UTF-8; save the table in that encoding") from None
    rows: Iterable[Mapping[str, Any]]
    if suffix in _LINES:
        rows = _json_lines(text, called)
    else:
        rows = _table_rows(text, _DELIMITERS[suffix], called)
    for number, row in enumerate(rows, 1):
        values = {str(key).lower(): value for key, value in row.items()}
        file = next((values[key] for key in FILE_COLUMNS if key in values), None)
        caption = next((key for key in CAPTION_COLUMNS if key in values), None)
        if not isinstance(file, str) or caption is None:
            lacking = FILE_COLUMNS if caption is not None else CAPTION_COLUMNS
            raise UserError(
                f"{called}: row {number} has none of the columns {', '.join(lacking)}; it has {', '.join(values) or 'none'}"
            )
        yield file, texts_of(values[caption])


def _table_rows(text: str, delimiter: str, called: str) -> Iterable[Mapping[str, Any]]:
    """Raises UserError for a row of more columns than the first, in which a text was cut at a comma of its own."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if any(word.strip() for word in row.pop(None, ())):  # type: ignore[call-overload]
                raise UserError(
                    f"{called}: line {reader.line_num} has more columns than the first one; put texts that hold "
                    f"{'a comma' if delimiter == ',' else 'a tab'} between double quotes"
                )
            yield row
    except csv.Error as error:
        raise UserError(
            f"{called}: can't be read behind line {reader.line_num} ({error}); is a double quote left open there?"
        ) from None


def _json_lines(text: str, called: str) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{called}: line {number} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{called}: line {number} is no JSON object")
        yield row
