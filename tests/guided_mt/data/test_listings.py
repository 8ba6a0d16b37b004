"""Listings of archives: the same as the standard library's, read once and kept, and what becomes of damaged ones."""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import select
import signal
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from test_data import make_files, write

from guided_mt.data import open_source
from guided_mt.data.sources import cache, tar
from guided_mt.data.sources import zip as zips
from guided_mt.data.sources.formats import image_names
from guided_mt.data.sources.listing import Listing, ListingBuilder, cleaned
from guided_mt.data.sources.names import Names
from guided_mt.errors import UserError

WORDS = ["a/b.png", "a/é.png", "a0.png", "", "ü\udcff.png", "z" * 300, "日本/語.png", "a/b"]


# ---------------------------------------------------------------- names


def test_names_are_the_strings_they_were_made_of():
    names = Names.of(WORDS)
    assert list(names) == WORDS == [names[k] for k in range(len(names))] and names[-1] == WORDS[-1]
    assert list(names[2:5]) == WORDS[2:5] and list(names.take(np.array([5, 0]))) == [WORDS[5], WORDS[0]]
    assert list(pickle.loads(pickle.dumps(names))) == WORDS and list(Names.of([])) == []


def test_names_in_order_are_found_by_their_beginning():
    names = sorted(WORDS)
    for prefix in ("", "a", "a/", "a/b", "日", "ü\udcff", "q", "\U0010ffff"):
        found = Names.of(names).take(Names.of(names).below(prefix))
        assert list(found) == [name for name in names if name.startswith(prefix)]
        assert list(found.without(prefix)) == [name[len(prefix) :] for name in found]


def test_hidden_files_are_no_images():
    names = [
        "a.PNG",
        ".a.png",
        "x/.b/c.png",
        "x/__MACOSX/a.png",
        "x/y__MACOSX.png",
        "__MACOSX/._a.png",
        "a.txt",
        "x/a.b.jpg",
    ]
    assert image_names(Names.of(names)).tolist() == [True, False, False, False, True, False, False, True]


# ---------------------------------------------------------------- tar and zip against the standard library


def members() -> dict[str, bytes]:
    names = [
        "a.png",
        "./b/c.png",
        "b//d.png",
        "é.png",
        "x" * 99,
        "x" * 100,
        "x" * 101 + "/" + "y" * 40,
        "p/" * 60 + "q.png",
    ]
    return {
        name: bytes([k]) * (k * 300)
        for k, name in enumerate([*names, "long/" * 60 + "日.png", "empty.png", "last.png"])
    }


def write_tar(path, format: int, mtime: float = 0, **header: dict[str, str]) -> None:
    """Files of all lengths of names, with folders, links and a file that is replaced later."""
    with tarfile.open(path, "w", format=format, **header) as archive:
        for name, content in [*members().items(), ("a.png", b"new")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            try:
                archive.addfile(info, io.BytesIO(content))
            except ValueError:  # a name that ustar cannot hold
                assert format == tarfile.USTAR_FORMAT
        for name, kind, target in (("b", tarfile.DIRTYPE, ""), ("s.png", tarfile.SYMTYPE, "a.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for target in ("a.png", "b/c.png", "nowhere.png"):
            info = tarfile.TarInfo(f"link-{target.replace('/', '-')}")
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("after.png"))


def rows(listing: Listing) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(c[k]) for c in listing.columns.values()) for k, name in enumerate(listing.names)}


def by_tarfile(path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive.getmembers():
            if member.islnk() and cleaned(member.linkname) in found:
                found[cleaned(member.name)] = found[cleaned(member.linkname)]
            elif member.isfile():
                found[cleaned(member.name)] = (member.offset_data, member.size)
    return dict(sorted(found.items()))


KINDS = {
    "ustar": {"format": tarfile.USTAR_FORMAT},
    "gnu": {"format": tarfile.GNU_FORMAT},
    "pax": {"format": tarfile.PAX_FORMAT},
    "pax with times": {"format": tarfile.PAX_FORMAT, "mtime": 1.75},
    "pax for all": {"format": tarfile.PAX_FORMAT, "mtime": 1.75, "pax_headers": {"comment": "a commit"}},
    "pax that renames all": {"format": tarfile.PAX_FORMAT, "pax_headers": {"path": "same.png"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tar_is_listed_as_tarfile_does(kind, tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, **KINDS[kind])
    assert list(rows(tar.list_tar(path)).items()) == list(by_tarfile(path).items())


@pytest.mark.parametrize(("kind", "by_tarfile"), [("ustar", 8), ("pax with times", 14)])
def test_plain_headers_are_not_left_to_tarfile(kind, by_tarfile, tmp_path, monkeypatch):
    write_tar(tmp_path / "x.tar", **KINDS[kind])
    taken, next_of = [], tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda archive: taken.append(next_of(archive)) or taken[-1])
    tar.list_tar(tmp_path / "x.tar")
    assert len(taken) <= by_tarfile


def test_damage_is_found_wherever_tarfile_finds_it(tmp_path):
    """Every byte of a plain header, and of one behind pax records, in turn: the listing of tarfile, or an error."""
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, mtime in (("a.png", 0), ("b.png", 0), ("c.png", 1.5), ("d.png", 0)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 5, mtime
            archive.addfile(info, io.BytesIO(b"12345"))
    content, path = whole.read_bytes(), tmp_path / "x.tar"
    for place in (*range(1024, 1536, 19), *range(2048, 3584, 23)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            with tarfile.open(path, "r:") as archive:
                expected = by_tarfile(path) if archive.getmembers() else {}
                archive.fileobj.seek(archive.offset)
                ended = not archive.fileobj.read(512).strip(b"\0")
        except (tarfile.TarError, ValueError):
            ended = False
        if ended:
            assert rows(tar.list_tar(path)) == expected, place
        else:
            with pytest.raises(UserError, match="not a whole tar archive"):
                tar.list_tar(path)
    for size in (1024, 1030, 1536, 2000, 3000):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="not a whole tar archive"):
            tar.list_tar(path)


def test_a_zip_is_listed_as_zipfile_does(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # later entries have places and sizes in extra fields
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("folder") if hasattr(archive, "mkdir") else archive.writestr("folder/", b"")
        for k, (name, content) in enumerate(members().items()):
            info = zipfile.ZipInfo(name)
            info.compress_type = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[k % 3]
            info.extra = struct.pack("<HH4s", 0x7075, 4, b"\0abc") if k == 1 else b""
            archive.writestr(info, content)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())  # something before the archive moves all places
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    expected = {
        cleaned(info.filename): (
            info.header_offset,
            info.compress_size,
            info.compress_type if info.compress_type in (0, 8) else zips.OTHER,
            info.CRC,
        )
        for info in infos
    }
    assert rows(zips.list_zip(path)) == expected and len(expected) == len(members())


# ---------------------------------------------------------------- kept ones


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """All archives count as large; how often one is listed is counted."""
    monkeypatch.setenv("MT_DIFFUSION_LISTINGS", str(tmp_path / "listings"))
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(cache, "LEAST_SECONDS", 0)
    made: list[str] = []
    finish = ListingBuilder.finish
    monkeypatch.setattr(ListingBuilder, "finish", lambda self: made.append("listing") or finish(self))
    return made


def files_of(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != "lock")


def everything(source) -> list[tuple[str, bytes, int]]:
    return [(source.name(k), source.read_bytes(k), int(source.labels[k])) for k in range(len(source))]


@pytest.mark.parametrize("container", ["tar", "zip", "zip-deflated"])
def test_an_archive_is_listed_once(container, kept, tmp_path):
    path = write(container, {f"set/{name}": content for name, content in make_files().items()}, tmp_path)
    first = open_source(path)
    again, inner = open_source(path), open_source(path / "set", suffixes=(".png",))
    assert kept == ["listing"] and len(files_of(tmp_path / "listings")) == 1
    assert everything(again) == everything(first) and inner.name(0) == "cat/0000.png"
    assert everything(pickle.loads(pickle.dumps(again))) == everything(first)


def test_a_changed_archive_is_listed_anew_and_its_old_listing_replaced(kept, tmp_path):
    path = write("zip", {"a.png": b"first"}, tmp_path)
    assert len(open_source(path)) == 1
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.png", b"second")
    assert len(open_source(path)) == 2 and len(kept) == 2
    os.utime(path, ns=(1, 1))
    assert len(open_source(path)) == 2 and len(kept) == 3
    assert len(files_of(tmp_path / "listings")) == 1


def test_a_damaged_or_foreign_listing_is_made_anew(kept, tmp_path):
    path = write("tar", make_files(), tmp_path)
    expected = everything(open_source(path))
    (listing,) = (file for file in (tmp_path / "listings").iterdir() if file.name != "lock")
    whole = listing.read_bytes()
    end = whole.index(b"\n", 9) + 1
    pickled = whole[:end].replace(b'"|u1"', b'"|O"') + whole[end:]
    foreign = (
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        b"null\n",
        b"\x80\x04.",
        whole[:-1],
        whole + b"x",
        whole[: end // 2],
        pickled,
    )
    flipped = [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in range(1, len(whole), len(whole) // 30)]
    for content in (*foreign, *flipped):
        listing.write_bytes(content)
        kept.clear()
        assert everything(open_source(path)) == expected
        assert kept == ["listing"] and listing.read_bytes() == whole
    listing.unlink()
    listing.mkdir()  # nothing can be written in its place
    assert everything(open_source(path)) == expected and files_of(tmp_path / "listings") == [listing.name]


def test_nothing_is_kept_where_it_is_switched_off_or_cannot_be(kept, tmp_path, monkeypatch):
    path = write("tar", make_files(), tmp_path)
    (tmp_path / "file").touch()
    for setting in ("off", str(tmp_path / "file" / "below")):
        monkeypatch.setenv("MT_DIFFUSION_LISTINGS", setting)
        assert len(open_source(path)) == len(open_source(path)) == 21
    assert len(kept) == 4
    monkeypatch.delenv("MT_DIFFUSION_LISTINGS")
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    open_source(path)
    assert len(files_of(tmp_path / "cache" / "listings")) == 1
    monkeypatch.delenv("MT_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_source(path)
    assert len(files_of(tmp_path / "xdg" / "mt-diffusion" / "listings")) == 1


def test_a_small_archive_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MT_DIFFUSION_LISTINGS", str(tmp_path / "listings"))
    open_source(write("tar", make_files(), tmp_path))
    assert not (tmp_path / "listings").exists()


def test_listings_that_were_not_used_for_long_give_way(kept, tmp_path, monkeypatch):
    paths = []
    for k in range(3):
        (tmp_path / str(k)).mkdir()
        paths.append(write("zip", make_files(), tmp_path / str(k)))
        open_source(paths[k])
    listings = sorted(tmp_path.joinpath("listings").glob("*.listing"), key=lambda file: file.stat().st_mtime_ns)
    for k, file in enumerate(listings):
        os.utime(file, ns=(k, k))
    (tmp_path / "listings" / "of the user.listing").touch()
    open_source(paths[0])  # it was used last
    monkeypatch.setattr(cache, "MOST_BYTES", 7 * listings[0].stat().st_size // 2)
    (tmp_path / "new").mkdir()
    open_source(write("zip", make_files(), tmp_path / "new"))
    left = files_of(tmp_path / "listings")
    assert (
        len(left) == 4 and listings[0].name in left and listings[1].name not in left and "of the user.listing" in left
    )


def test_who_waits_reads_what_the_first_one_made(kept, tmp_path, monkeypatch):
    """The lock is another process's, which writes the listing while this one waits."""
    path = write("tar", make_files(), tmp_path)
    expected = everything(open_source(path))
    (listing,) = tmp_path.joinpath("listings").glob("*.listing")
    content = listing.read_bytes()
    listing.unlink()
    monkeypatch.setattr(cache, "_lock", lambda handle, byte: bool(listing.write_bytes(content)))
    assert everything(open_source(path)) == expected and len(kept) == 1
    listing.unlink()
    monkeypatch.setattr(cache, "_lock", lambda handle, byte: True)  # the first one kept nothing
    assert everything(open_source(path)) == expected and len(kept) == 2


def test_the_lock_holds_between_processes(tmp_path):
    place = tmp_path / "0123abc.listing"
    heard, said = os.pipe()

    def answer() -> bytes:
        ready, _, _ = select.select([heard], [], [], 60)
        return os.read(heard, 1) if ready else b""

    with cache._turn(place) as waited:
        assert not waited
        child = os.fork()
        if child == 0:
            try:
                _wait_aloud(place, said)
            finally:
                os._exit(1)
        assert answer() == b"w"
    try:
        assert answer() == b"\1"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _wait_aloud(place, said: int) -> None:
    """Say w before waiting for the lock, and then whether it was waited for."""
    lockf = fcntl.lockf

    def speak(handle, kind, *rest) -> None:
        if kind == fcntl.LOCK_SH:
            os.write(said, b"w")
        lockf(handle, kind, *rest)

    cache.fcntl.lockf = speak
    with cache._turn(place) as waited:
        os.write(said, bytes([waited]))
