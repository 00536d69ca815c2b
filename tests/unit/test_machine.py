"""The pure parts of `./build.sh machine-test`: what a serial line says, what a disk forgets, which kernels ran."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import socket
import sqlite3
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_agent.chat.journal_file import JournalFile
from tests.machine import cpio, disk
from tests.machine.agreement import agreement
from tests.machine.console import MachineError, Ready, Replies, Reply, command_line
from tests.machine.device import durations
from tests.machine.disk import BLOCK_BYTES, ForgetfulDisk, Temper
from tests.machine.inside import damage_index, damaged_files
from tests.machine.instructions import kernels

BLOCKS = 16
ROOT = Path(__file__).parents[2]


def reply(number: int, code: int, text: str) -> bytes:
    return b"@machine %d %d %s\n" % (number, code, base64.b64encode(text.encode()))


# --- The serial line --------------------------------------------------------------------------------------


def test_a_reply_is_found_between_lines_of_the_kernel() -> None:
    said = b"[ 1.0] virtio\r\n@machine ready 1234-5\r\nnoise @machine 1 0 aGk=\r\n[ 2.0] oops\n" + reply(
        2, 7, "é\n"
    )
    assert Replies().feed(said) == [Ready("1234-5"), Reply(1, 0, "hi"), Reply(2, 7, "é\n")]


def test_a_reply_may_come_in_any_pieces() -> None:
    said, replies = reply(3, 0, "x" * 100) + reply(4, 1, ""), Replies()
    found = [each for at in range(len(said)) for each in replies.feed(said[at : at + 1])]
    assert found == [Reply(3, 0, "x" * 100), Reply(4, 1, "")]


@pytest.mark.parametrize(
    "line", ["@machine", "@machine x 0 aGk=", "@machine 1", "@machine 1 0 a*k=", "machine 1 0"]
)
def test_a_line_that_was_cut_is_left_out(line: str) -> None:
    assert Replies().feed(line.encode() + b"\n") == []


def test_a_command_is_one_line_whatever_is_in_it() -> None:
    line = command_line(5, "echo 'a\nb'")
    assert line.count(b"\n") == 1
    assert base64.b64decode(line.split()[2]) == b"echo 'a\nb'"


# --- The disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    return path


def durable(file: Path, block: int) -> bytes:
    return file.read_bytes()[block * BLOCK_BYTES :][:4]


def test_what_was_not_flushed_is_gone_with_the_power(file: Path) -> None:
    plain = ForgetfulDisk(file, Temper())
    plain.write(0, b"kept".ljust(BLOCK_BYTES, b"."))
    plain.flush()
    plain.write(BLOCK_BYTES, b"lost".ljust(BLOCK_BYTES, b"."))
    assert plain.read(0, 2 * BLOCK_BYTES).count(b"kept") == plain.read(0, 2 * BLOCK_BYTES).count(b"lost") == 1
    assert (durable(file, 0), durable(file, 1)) == (b"kept", bytes(4))
    assert plain.forgotten_bytes == BLOCK_BYTES


def test_a_write_with_fua_keeps_itself_and_nothing_else(file: Path) -> None:
    plain = ForgetfulDisk(file, Temper())
    plain.write(0, b"lost".ljust(BLOCK_BYTES))
    plain.write(BLOCK_BYTES, b"kept".ljust(BLOCK_BYTES), durable=True)
    assert (durable(file, 0), durable(file, 1)) == (bytes(4), b"kept")


def test_parts_of_blocks_read_back_as_they_were_written(file: Path) -> None:
    plain = ForgetfulDisk(file, Temper())
    whole = bytearray(BLOCKS * BLOCK_BYTES)
    for offset, length, byte in ((100, 9000, b"a"), (4096, 512, b"b"), (8000, 200, b"c"), (0, 1, b"d")):
        plain.write(offset, byte * length)
        whole[offset : offset + length] = byte * length
    assert plain.read(0, len(whole)) == whole
    assert plain.read(4000, 5000) == whole[4000:9000]
    plain.flush()
    assert file.read_bytes() == whole


def test_some_blocks_are_durable_early_and_the_seed_says_which(file: Path) -> None:
    def kept(seed: str) -> list[int]:
        file.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
        hasty = ForgetfulDisk(file, Temper(early=0.5), seed=seed)
        hasty.write(0, b"\1" * BLOCKS * BLOCK_BYTES)
        return [block for block in range(BLOCKS) if durable(file, block)[0]]

    assert 0 < len(kept("1")) < BLOCKS
    assert kept("1") == kept("1") != kept("2")


def test_a_liar_keeps_only_what_its_cache_has_no_room_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_LIAR_BYTES", 4 * BLOCK_BYTES)
    liar = ForgetfulDisk(file, Temper(lies=True))
    for block in range(6):
        liar.write(block * BLOCK_BYTES, b"\1" * BLOCK_BYTES, durable=True)
        liar.flush()
    assert [durable(file, block)[0] for block in range(6)] == [1, 1, 0, 0, 0, 0]


def test_a_slow_disk_takes_its_time(file: Path) -> None:
    slept: list[float] = []
    slow = ForgetfulDisk(file, Temper(latency_s=0.01, bytes_per_s=1_000_000), sleep=slept.append)
    slow.write(0, bytes(10_000))
    slow.read(0, 50_000)
    slow.flush()
    assert slept == pytest.approx([0.02, 0.05, 0.01])


def test_nothing_is_read_or_written_outside_of_the_disk(file: Path) -> None:
    plain = ForgetfulDisk(file, Temper())
    for offset, length in ((-1, 1), (0, BLOCKS * BLOCK_BYTES + 1), (BLOCKS * BLOCK_BYTES, 1), (0, 0)):
        with pytest.raises(ValueError, match="not on this disk"):
            plain.read(offset, length)


def test_qemu_is_served_and_the_gauge_says_what_a_cut_would_take(file: Path, tmp_path: Path) -> None:
    """The client's side of NBD, as the specification has it."""
    path = tmp_path / "socket"
    ours, theirs = socket.socketpair()
    gauge = disk._gauge(path)

    def serve() -> None:
        with theirs:
            plain = ForgetfulDisk(file, Temper())
            if disk._negotiate(theirs, plain.size):
                disk._answer_requests(theirs, plain, gauge)

    thread = threading.Thread(target=serve)
    thread.start()
    with ours:
        assert ours.recv(18)[:8] == b"NBDMAGIC"
        ours.sendall(bytes.fromhex("00000003"))
        ours.sendall(b"IHAVEOPT" + bytes.fromhex("00000008 00000000"))  # structured replies: not here
        assert ours.recv(20)[12:16] == bytes.fromhex("80000001")
        ours.sendall(b"IHAVEOPT" + bytes.fromhex("00000007 00000006 00000000 0000"))  # GO, no name
        information = ours.recv(20 + 12, socket.MSG_WAITALL)[20:]
        assert int.from_bytes(information[2:10], "big") == BLOCKS * BLOCK_BYTES
        ours.recv(20, socket.MSG_WAITALL)

        def request(kind: int, length: int, content: bytes = b"", flags: int = 0) -> bytes:
            header = bytes.fromhex("25609513") + flags.to_bytes(2, "big") + kind.to_bytes(2, "big")
            ours.sendall(header + b"12345678" + bytes(8) + length.to_bytes(4, "big") + content)
            answer = ours.recv(16, socket.MSG_WAITALL)
            assert (answer[:4], answer[4:8], answer[8:]) == (bytes.fromhex("67446698"), bytes(4), b"12345678")
            return ours.recv(length, socket.MSG_WAITALL) if kind == 0 else b""

        request(1, 4, b"data")
        assert (disk.forgotten_bytes(path), durable(file, 0)) == (BLOCK_BYTES, bytes(4))
        assert request(0, 4) == b"data"
        request(3, 0)
        assert (disk.forgotten_bytes(path), durable(file, 0)) == (0, b"data")
        ours.sendall(bytes.fromhex("25609513 0000 0002") + bytes(20))  # DISC
    thread.join(10)
    assert not thread.is_alive()
    gauge.close()


def test_a_disk_that_was_told_to_stall_takes_so_many_writes_and_says_nothing_then(
    file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    ours, theirs = socket.socketpair()
    gauge = disk._gauge(path)
    plain = ForgetfulDisk(file, Temper())
    thread = threading.Thread(target=disk._answer_requests, args=(theirs, plain, gauge))
    thread.start()
    disk.stall_after(path, 2)
    with ours, theirs:
        for block in range(2):
            header = bytes.fromhex("25609513 0000 0001") + bytes(8) + (block * BLOCK_BYTES).to_bytes(8, "big")
            ours.sendall(header + (4).to_bytes(4, "big") + b"data")
            if block == 0:
                assert len(ours.recv(16, socket.MSG_WAITALL)) == 16
                assert not disk.stalled(path)
        ours.sendall(bytes.fromhex("25609513 0000 0003") + bytes(20))  # FLUSH
        ours.shutdown(socket.SHUT_WR)
        thread.join(10)
        assert not thread.is_alive()
        theirs.shutdown(socket.SHUT_WR)
        assert ours.recv(16) == b""
    assert disk.stalled(path)
    assert disk.forgotten_bytes(path) == 2 * BLOCK_BYTES
    assert durable(file, 0) == durable(file, 1) == bytes(4)
    gauge.close()


# --- What ran ---------------------------------------------------------------------------------------------


def test_kernels_of_aarch64_are_known_by_their_encoding() -> None:
    log = [
        "----------------\n",
        "IN: \n",
        "0xffff8000:  4e84a420  .byte 0x20, 0xa4, 0x84, 0x4e\n",  # smmla v0.4s, v1.16b, v4.16b
        "0xffff8004:  4e829420  sdot v0.4s, v1.16b, v2.16b\n",
        "0xffff8008:  4fa2e020  sdot v0.4s, v1.16b, v2.4b[1]\n",
        "0xffff800c:  0e628020  smlal v0.4s, v1.4h, v2.4h\n",
        "0xffff8010:  6e42ec20  bfmmla v0.4s, v1.8h, v2.8h\n",
        "0xffff8014:  d503201f  nop\n",
    ]
    assert kernels(log, "aarch64") == {"bfmmla": 1, "sdot": 2, "smlal": 1, "smmla": 1}


def test_kernels_of_x86_64_are_known_by_their_names() -> None:
    log = ["0x7f00:  c4 e2 75 04 c2           vpmaddubsw ymm0, ymm1, ymm2\n", "0x7f05:  c3      retq     \n"]
    assert kernels(log, "x86_64") == {"vpmaddubsw": 1}


# --- The first file system --------------------------------------------------------------------------------


def test_an_archive_has_its_files_where_linux_looks_for_them(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "init").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "init").chmod(0o755)
    out = io.BytesIO()
    cpio.write(tmp_path, out)
    content = out.getvalue()
    assert len(content) % 4 == 0
    names = []
    at = 0
    while at < len(content):
        assert content[at : at + 6] == b"070701"
        fields = [int(content[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = content[at + 110 : at + 110 + fields[11] - 1].decode()
        at += -(-(110 + fields[11]) // 4) * 4
        names.append((name, oct(fields[1])[-3:], content[at : at + fields[6]]))
        at += -(-fields[6] // 4) * 4
    assert [name for name, _, _ in names] == ["bin", "init", "TRAILER!!!"]
    assert names[1][1:] == ("755", b"#!/bin/sh\n")


# --- The same answers elsewhere ---------------------------------------------------------------------------


def computed(*rows: list[float]) -> list[dict[str, Any]]:
    """One greedy answer from these logits, as tokens.py prints it."""
    best = [sorted(enumerate(row), key=lambda each: -each[1]) for row in rows]
    return [{"tokens": [row[0][0] for row in best], "best": best}]


def test_the_same_tokens_are_told_with_what_is_between_their_logits() -> None:
    here, there = computed([0, 8, 2], [0, 1, 9]), computed([0, 8.5, 2], [0.25, 1, 9])
    said = "2 tokens the same, best logits at most 0.5 apart, the best two at least 6"
    assert agreement(there, here) == said


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (computed([0, 8, 2], [0, 5.1, 5]), "rounding: answer 1 has another token 2"),
        (computed([0, 8, 2], [0, 9, 5]), "more than rounding: answer 1 has another token 2"),
        (computed([0, 8, 2]), "answer 1 ends elsewhere"),
    ],
)
def test_another_token_is_told_with_whether_it_may_be_rounding(
    there: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(MachineError) as raised:
        agreement(there, computed([0, 8, 2], [0, 5, 5.1]))
    assert str(raised.value).startswith(said)


# --- An emulator that is lent ------------------------------------------------------------------------------


def test_an_emulator_that_another_process_was_lent_stays(tmp_path: Path) -> None:
    script = (ROOT / "tests/machine/prepare.sh").read_text()
    begun = script.replace("readonly BINFMT=/proc/sys/fs/binfmt_misc", f"BINFMT={tmp_path}")
    assert begun != script
    (tmp_path / "machine-test-1").touch()
    (tmp_path / "machine-test").touch()
    command = f'{begun}\n: >"$BINFMT/machine-test-$$"\ngive_emulator_back'
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True, timeout=60)
    told = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert sorted(told.values()) == ["", "", "-1\n"]
    assert told["machine-test"] == told["machine-test-1"] == ""


# --- An installation ---------------------------------------------------------------------------------------


def test_each_line_of_an_installation_has_the_seconds_until_the_next_one() -> None:
    said = "100 install.sh: checking the bundle\n103 install.sh: compiling\n110 a warning\n110\n"
    assert durations(said) == ["checking the bundle (3 s)", "compiling (7 s)", "a warning (0 s)"]


# --- What the machine's own Python does -------------------------------------------------------------------


def test_a_file_that_is_not_what_its_wheel_had_is_named(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "a-1.dist-info").mkdir(parents=True)
    records = []
    for name, content in (("whole.py", b"1"), ("empty.py", b"2"), ("gone.py", b"3")):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        records.append(f"{name},sha256={digest},1")
    (packages / "whole.py").write_bytes(b"1")
    (packages / "empty.py").touch()
    (packages / "a-1.dist-info" / "RECORD").write_text("\n".join([*records, "a-1.dist-info/RECORD,,"]))
    found = list(damaged_files(tmp_path))
    assert found == [f"{tmp_path.name}: empty.py", f"{tmp_path.name}: gone.py"]


def test_a_journal_whose_index_is_damaged_keeps_every_prompt_when_it_is_rebuilt(tmp_path: Path) -> None:
    journal = tmp_path / "journal.db"
    JournalFile(journal).close()
    assert damage_index(journal).endswith("of journal.db, 0 rows")
    with contextlib.closing(sqlite3.connect(journal)) as db:
        assert db.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",)
    JournalFile(journal).close()
    assert list(tmp_path.glob("*damaged*"))
