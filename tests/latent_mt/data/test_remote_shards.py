"""Shards that are read as streams: the plan, going on within a shard, and what can't be read."""

from __future__ import annotations

import itertools
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_shards import ALL, COUNTS, opened, seen
from tiny_shards import files_of, png, sample_of, write_shards

from guided_mt.errors import UserError
from latent_mt.data import ShardData
from latent_mt.data.shards import lanes as lanes_module
from latent_mt.data.shards import stream
from latent_mt.data.shards.index import SampleRule
from latent_mt.data.shards.lanes import LanePlan


@pytest.fixture(autouse=True)
def counts_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setenv("MT_DIFFUSION_LISTINGS", str(tmp_path / "listings"))


def remote(folder: Path, counts: tuple[int, ...] = COUNTS, files: Any = files_of, **params: Any) -> ShardData:
    write_shards(folder, counts, files)
    pattern = f"pipe:cat {folder}/{{00000..{len(counts) - 1:05d}}}.tar"
    return opened(pattern, **{"lanes": 6, "shuffle": 4, **params})


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(("shards", "lanes"), [(7, 3), (4, 4), (2, 5), (1, 1)])
def test_every_shard_is_dealt_once_before_any_is_dealt_again(shards, lanes):
    plan = LanePlan([f"s{k}" for k in range(shards)], SampleRule(), 5, lanes, lanes, 1, "stop")
    dealt = [list(itertools.islice(plan.shards_of(lane), shards)) for lane in range(lanes)]
    in_turn = [dealt[number % lanes][number // lanes] for number in range(shards * lanes)]
    for epoch in range(lanes):
        assert sorted(in_turn[epoch * shards : (epoch + 1) * shards]) == sorted(plan.shards)
    assert shards < 3 or in_turn[:shards] != in_turn[shards : 2 * shards]


def test_what_is_seen_does_not_depend_on_processes_workers_or_interruptions(tmp_path, monkeypatch):
    data = remote(tmp_path, ucg_rate=0.2).open()
    assert data.amount == "4 remote shards" and len(data.source) == 22
    whole = seen(data, range(14))
    assert sorted(whole) == list(range(84)) and {x[:2] for x in whole.values()} == ALL
    assert seen(data, range(14), world=2) == whole and seen(data, range(14), world=3) == whole
    data.num_workers = 2
    assert seen(data, range(4)) == {p: whole[p] for p in range(24)}
    # going on within a shard, with the counts that were kept, and without them
    read: list[str] = []
    monkeypatch.setattr(
        lanes_module, "samples_of", lambda shard, rule: read.append(shard) or stream.samples_of(shard, rule)
    )
    data.num_workers = 0
    assert seen(data, range(9, 14), world=3) == {p: whole[p] for p in range(54, 84)}
    with_counts = len(read)
    monkeypatch.setenv("MT_DIFFUSION_LISTINGS", "off")
    assert seen(data, range(9, 14), world=3) == {p: whole[p] for p in range(54, 84)}
    assert len(read) - with_counts > with_counts


def test_one_process_sees_beforehand_what_all_will_see(tmp_path):
    """What is measured before the first step is measured on the samples of the first steps, however many processes there are."""
    data = remote(tmp_path, lanes=8).open()
    whole = seen(data, range(4), batch=8)
    for world in (1, 2, 4):
        data.batch_size = 8 // world
        with data.stream_of_all(seed=3, world_size=world, batches=3 * world) as stream:
            parts = list(stream)
        assert [len(part.images) for part in parts] == [8 // world] * (3 * world)
        found = {
            position: (*sample_of(image), caption)
            for part in parts
            for position, image, caption in zip(
                part.positions.tolist(), part.images.numpy(), part.captions, strict=True
            )
        }
        assert found == {position: whole[position] for position in range(24)}


def test_a_run_on_other_batches_is_told_that_the_order_is_a_new_one(tmp_path):
    marks = []
    for batch, world in ((8, 1), (4, 2), (4, 1)):
        data = remote(tmp_path).open()
        data.batch_size = batch
        data.stream(seed=0, world_size=world, rank=0)
        data.stream_of_all(seed=0, world_size=world, batches=1)
        marks.append(data.fingerprint)
    assert marks[0] == marks[1] != marks[2]


def test_a_lane_gives_all_samples_of_its_shards(tmp_path):
    data = remote(tmp_path, filters={"min_aesthetic": 20}, lanes=1, shuffle=5).open()
    wanted = {(shard, sample) for shard, sample in ALL if sample >= 2}
    found = [x[:2] for x in seen(data, range(30), batch=1).values()]
    shards = [shard for shard, _ in itertools.groupby(shard for shard, _ in found)]
    assert len(shards) > 3 and {*found} == wanted
    assert all(found.count(x) in (1, 2, 3) for x in wanted)


def test_a_limit_is_one_of_the_first_samples(tmp_path):
    data = remote(tmp_path, limit=3).open()
    assert {x[:2] for x in seen(data, range(2), batch=3).values()} == {(0, 0), (0, 1), (0, 2)}
    with pytest.raises(UserError, match=r"data\.params\.limit 65: of remote shards at most the first 64 samples"):
        remote(tmp_path, limit=65).open()


def test_the_first_samples_stand_for_the_data(tmp_path):
    data = remote(tmp_path, (70, 2)).open()
    assert len(data.source) == 64 and data.source.captions[3] == ("shard 0 sample 3",)
    assert data.val_source is None and data.source.read(3).size == (16, 16)


def test_nothing_is_unpickled(tmp_path):
    def files(shard: int, sample: int) -> dict[str, bytes]:
        unsafe = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "npy", "pt"), pickle.dumps(pytest.fail))
        return {**unsafe, **files_of(shard, sample)}

    assert len(seen(remote(tmp_path, files=files).open(), range(4))) == 24


# ---------------------------------------------------------------- what is wrong


def test_lanes_and_processes(tmp_path):
    data = remote(tmp_path).open()
    data.batch_size = 1
    expected = r"data\.params\.lanes: 2 lanes share out a batch of 4, and don't divide by 4 processes; take a multiple"
    with pytest.raises(UserError, match=expected):
        data.stream(seed=0, world_size=4)


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        ("pipe:exit 7", r"pipe:exit 7: its command ended with exit code 7"),
        ("pipe:true", r"pipe:true: (not a whole tar archive \(empty file\)|nothing came)"),
        ("pipe:echo no tar", r"pipe:echo no tar: not a whole tar archive \("),
        ("http://127.0.0.1:9/00000.tar", r"http://127\.0\.0\.1:9/00000\.tar: its command ended with exit code 7"),
        ("s3://bucket/00000.tar", r"s3://bucket/00000\.tar: needs the program nowhere, which is not there"),
        ("ftp://host/00000.tar", r"ftp://host/00000\.tar: .*no gopen handler"),
    ],
)
def test_a_store_that_can_not_be_read(shard, expected, monkeypatch):
    monkeypatch.setitem(stream._PROGRAMS, "s3", ["nowhere"])
    with pytest.raises(UserError, match=expected) as caught:
        opened(shard).open()
    assert "\n" not in str(caught.value)


def test_a_store_that_is_silent(monkeypatch):
    monkeypatch.setattr(stream, "REACH_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"pipe:exec sleep 60: nothing came within 0 seconds"):
        opened("pipe:exec sleep 60").open()


@pytest.mark.parametrize("whole_files", [True, False])
def test_a_truncated_shard(whole_files, tmp_path, caplog):
    data = remote(tmp_path)
    data.open()
    content = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(content[: 1024 * 9 if whole_files else 1024 * 9 + 100])
    with pytest.raises(
        UserError, match=r"00001\.tar: not a whole tar archive \(.*\); data\.params\.missing_shards=skip leaves"
    ):
        seen(data, range(9))
    data.missing_shards = "skip"
    found = {x[:2] for x in seen(data, range(9)).values()}
    assert found >= {x for x in ALL if x[0] != 1} and "00001.tar: not a whole tar archive" in caplog.text


def test_broken_samples(tmp_path, monkeypatch, caplog):
    def files(shard: int, sample: int) -> dict[str, bytes]:
        return {**files_of(shard, sample), **({"png": b"broken"} if (shard, sample) == (1, 4) else {})}

    data = remote(tmp_path, files=files).open()
    whole = seen(data, range(8))
    assert caplog.text.count("000010004 is broken and left out (no known format)") == 1
    assert (1, 4) not in {x[:2] for x in whole.values()} and len({x[:2] for x in whole.values()}) > 15
    assert all(caption == f"shard {s} sample {k}" for s, k, caption in whole.values())
    assert seen(data, range(3, 8), world=2) == {p: whole[p] for p in range(18, 48)}
    data = remote(tmp_path, files=lambda shard, sample: {"png": b"broken" if sample else png(shard, sample)}).open()
    with pytest.raises(UserError, match=r"are broken"):
        seen(data, range(8))


@pytest.mark.parametrize("counts", [(0, 1, 0), (2, 0)])
def test_shards_without_a_sample_are_passed_over_however_often_they_come(counts, tmp_path):
    """Also where a lane meets one more often in a row than there are shards, and where others are skipped unread."""
    data = remote(tmp_path, counts, lanes=2).open()
    whole = seen(data, range(16), batch=2)
    wanted = {(shard, k) for shard, count in enumerate(counts) for k in range(count)}
    assert sorted(whole) == list(range(32)) and {x[:2] for x in whole.values()} == wanted
    assert seen(data, range(13, 16), batch=2) == {p: whole[p] for p in range(26, 32)}


def test_a_command_that_leaves_programs_behind(monkeypatch):
    """They keep the pipe open, so that only who waits with an end notices; later in a shard it may take longer."""
    monkeypatch.setattr(stream, "REACH_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"pipe:sleep 3 \| cat: nothing came within 0 seconds"):
        opened("pipe:sleep 3 | cat").open()


def test_a_command_that_stalls(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "STALL_SECONDS", 0.2)
    write_shards(tmp_path, (9,))
    command = f"pipe:head -c 20480 {tmp_path}/00000.tar; exec sleep 3"
    found: list[str] = []
    with pytest.raises(stream.ShardError, match=r"exec sleep 3: nothing came within 0 seconds"):
        found.extend(sample.name for sample in stream.samples_of(command, SampleRule()))
    assert 1 <= len(found) < 9


def test_shards_that_fail_are_skipped_wherever_they_stand(tmp_path, caplog):
    write_shards(tmp_path, (3,))
    whole = f"pipe:cat {tmp_path}/00000.tar"
    for shards in ([whole, "pipe:exit 3"], ["pipe:exit 3", whole]):
        data = opened(shards, missing_shards="skip", lanes=2, shuffle=4).open()
        assert len(data.source) == 3
        caplog.clear()
        assert {x[:2] for x in seen(data, range(8), batch=2).values()} == {(0, k) for k in range(3)}
        assert caplog.text.count("exit code 3; what is left of it is left out") <= 2  # once for each lane
    with pytest.raises(UserError, match=r"exit code 3; data\.params\.missing_shards=skip leaves such shards out"):
        opened([whole, "pipe:exit 3"]).open()
    with pytest.raises(UserError, match=r"exit code 4 \(of the first 2 of 2 shards none can be read\)"):
        opened(["pipe:exit 4", "pipe:exit 5"], missing_shards="skip").open()


def test_samples_without_a_caption_are_counted(tmp_path, caplog):
    def files(shard: int, sample: int) -> dict[str, bytes]:
        return {suffix: x for suffix, x in files_of(shard, sample).items() if suffix != "txt" or sample}

    remote(tmp_path, (3, 2), files).open()
    assert "2 of the first 5 samples have no caption; such samples are given the empty one" in caplog.text


def test_filters_that_nothing_passes(tmp_path):
    with pytest.raises(UserError, match=r"no sample of the 4 shards is left by data\.params\.filters"):
        remote(tmp_path, filters={"min_width": 99}).open()


def test_shards_of_a_server(tmp_path):
    write_shards(tmp_path)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/{{00000..00003}}.tar"
        data = opened(address, lanes=6, shuffle=4).open()
        assert {x[:2] for x in seen(data, range(12)).values()} == ALL
        with pytest.raises(UserError, match=r"/00004\.tar: its command ended with exit code 22"):
            opened(address.replace("00000..00003", "00004..00005")).open()
    finally:
        server.shutdown()
        server.server_close()
