"""A disk that forgets, as a block device over NBD: `python -m tests.machine.disk --help`.

`ForgetfulDisk` keeps what was written in memory until a flush, as a disk's write-back cache does, and every now and
then makes a block durable early, in no order, as disks do. SIGKILL is the end of the power: what is in the file is what
the platters have. It can be slow, too, and it can lie about flushes. `serve` speaks NBD's simple form to one client,
qemu: no other command than READ, WRITE with FUA, FLUSH and DISC is offered. Source: doc/proto.md of NBD.

How many bytes were told and not made durable is in a small file beside the socket, so that who cuts the power can tell
that something was lost. In the same file it can be told to stall: to take so many writes more, and then to say nothing
until the power is cut, so that the cut comes between a write and its flush.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096
_LIAR_BYTES = 32 << 20
"""What a disk that lies about flushes has in its cache at most: what is older, it has written after all."""
_MAGIC, _OPTION_MAGIC, _OPTION_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _REPLY = 0x25609513, 0x67446698
_FIXED, _NO_ZEROES = 1, 2
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA = 1, 4, 8
_EXPORT_NAME, _ABORT, _GO = 1, 2, 7
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FUA = 1
_EINVAL = 22
_GAUGE = struct.Struct("<Qq")
_STALLED = -1


@dataclass(frozen=True, kw_only=True)
class Temper:
    """How a disk behaves.

    Attributes:
        early: the share of blocks that it makes durable before it is told to.
        lies: a flush is answered and not done.
        latency_s: what each write and each flush takes.
        bytes_per_s: what it reads and writes at most; 0 without a limit.
    """

    early: float = 0.0
    lies: bool = False
    latency_s: float = 0.0
    bytes_per_s: int = 0


class ForgetfulDisk:
    """A file as a disk with a cache. One thread.

    Args:
        file: what is durable; its size is the disk's.
        seed: of what is made durable early.
    """

    def __init__(
        self, file: Path, temper: Temper, *, seed: str = "", sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._file = os.open(file, os.O_RDWR)
        self.size = os.fstat(self._file).st_size
        self._temper = temper
        self._sleep = sleep
        self._random = random.Random(seed)
        self._cache: dict[int, bytes] = {}

    @property
    def forgotten_bytes(self) -> int:
        """What a power cut would take, at this moment."""
        return len(self._cache) * BLOCK_BYTES

    def read(self, offset: int, length: int) -> bytes:
        """
        Raises:
            ValueError: it is outside of the disk.
        """
        self._check(offset, length)
        self._take_time(0, length)
        content = bytearray(os.pread(self._file, length, offset))
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        for number in range(first, last + 1):
            block = self._cache.get(number)
            if block is not None:
                at = number * BLOCK_BYTES - offset
                begin, end = max(at, 0), min(at + BLOCK_BYTES, length)
                content[begin:end] = block[begin - at : end - at]
        return bytes(content)

    def write(self, offset: int, content: bytes, *, durable: bool = False) -> None:
        """
        Args:
            durable: it must be on the disk when this returns; nothing else needs to be.

        Raises:
            ValueError: it is outside of the disk.
        """
        self._check(offset, len(content))
        self._take_time(self._temper.latency_s, len(content))
        position = offset
        while position < offset + len(content):
            number, within = divmod(position, BLOCK_BYTES)
            piece = content[position - offset :][: BLOCK_BYTES - within]
            self._put(number, within, piece, durable=durable and not self._temper.lies)
            position += len(piece)
        while self._temper.lies and self.forgotten_bytes > _LIAR_BYTES:
            self._keep(next(iter(self._cache)))

    def flush(self) -> None:
        """What was written is on the disk when this returns, unless the disk lies."""
        self._take_time(self._temper.latency_s, 0)
        if not self._temper.lies:
            for number in list(self._cache):
                self._keep(number)

    def _put(self, number: int, within: int, piece: bytes, *, durable: bool) -> None:
        if len(piece) < BLOCK_BYTES:
            whole = bytearray(self._block(number))
            whole[within : within + len(piece)] = piece
            piece = bytes(whole)
        self._cache.pop(number, None)  # to the end: the oldest block is the first
        self._cache[number] = piece
        if durable or (self._temper.early and self._random.random() < self._temper.early):
            self._keep(number)

    def _block(self, number: int) -> bytes:
        at = number * BLOCK_BYTES
        return self._cache.get(number) or os.pread(self._file, BLOCK_BYTES, at)

    def _keep(self, number: int) -> None:
        os.pwrite(self._file, self._cache.pop(number), number * BLOCK_BYTES)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not on this disk of {self.size}")

    def _take_time(self, latency_s: float, length: int) -> None:
        if self._temper.bytes_per_s:
            latency_s += length / self._temper.bytes_per_s
        if latency_s:
            self._sleep(latency_s)


def serve(disk: ForgetfulDisk, path: Path) -> None:
    """Serves one client, and ends with it."""
    with socket.socket(socket.AF_UNIX) as listener, _gauge(path) as gauge:
        listener.bind(str(path))
        listener.listen(1)
        client, _ = listener.accept()
        with client:
            if _negotiate(client, disk.size):
                _answer_requests(client, disk, gauge)


def forgotten_bytes(path: Path) -> int:
    """What the disk behind a socket had not made durable when it was killed, or has not now."""
    return int(_GAUGE.unpack(gauge_of(path).read_bytes())[0])


def stall_after(path: Path, writes: int) -> None:
    """Lets the disk behind a socket say nothing any more after so many writes from now, 1 or more."""
    with gauge_of(path).open("r+b") as file, mmap.mmap(file.fileno(), _GAUGE.size) as gauge:
        struct.pack_into("<q", gauge, 8, writes)


def stalled(path: Path) -> bool:
    return bool(_GAUGE.unpack(gauge_of(path).read_bytes())[1] == _STALLED)


def gauge_of(path: Path) -> Path:
    return path.with_name(path.name + ".forgotten")


def _gauge(path: Path) -> mmap.mmap:
    """Shared memory: it says what it said last when this process has been killed, and costs no call for each block."""
    gauge = gauge_of(path)
    gauge.write_bytes(bytes(_GAUGE.size))
    with gauge.open("r+b") as file:
        return mmap.mmap(file.fileno(), _GAUGE.size)


def _negotiate(client: socket.socket, size: int) -> bool:
    """Gives False where the client goes away."""
    client.sendall(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, _FIXED | _NO_ZEROES))
    _receive(client, 4)
    flags = _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA
    while True:
        magic, option, length = struct.unpack(">QII", _receive(client, 16))
        if magic != _OPTION_MAGIC or length > 1 << 16:
            return False
        _receive(client, length)
        if option == _EXPORT_NAME:
            client.sendall(struct.pack(">QH", size, flags))
            return True
        if option == _GO:
            information = struct.pack(">HQH", 0, size, flags)
            client.sendall(struct.pack(">QIII", _OPTION_REPLY, option, _INFO, len(information)) + information)
            client.sendall(struct.pack(">QIII", _OPTION_REPLY, option, _ACK, 0))
            return True
        client.sendall(
            struct.pack(">QIII", _OPTION_REPLY, option, _ACK if option == _ABORT else _UNSUPPORTED, 0)
        )
        if option == _ABORT:
            return False


def _answer_requests(client: socket.socket, disk: ForgetfulDisk, gauge: mmap.mmap) -> None:
    while True:
        magic, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", _receive(client, 28))
        if magic != _REQUEST or kind == _DISCONNECT:
            return
        content, error = b"", 0
        try:
            if kind == _READ:
                content = disk.read(offset, length)
            elif kind == _WRITE:
                disk.write(offset, _receive(client, length), durable=bool(flags & _FUA))
            elif kind == _FLUSH:
                disk.flush()
            else:
                error = _EINVAL
        except ValueError:
            error = _EINVAL
        struct.pack_into("<Q", gauge, 0, disk.forgotten_bytes)
        if kind == _WRITE and _stalls(gauge):
            while client.recv(1 << 16):
                pass
            return
        client.sendall(struct.pack(">IIQ", _REPLY, error, handle) + content)


def _stalls(gauge: mmap.mmap) -> bool:
    """Counts a write; True for the last one that it takes."""
    (left,) = struct.unpack_from("<q", gauge, 8)
    if left <= 0:
        return False
    struct.pack_into("<q", gauge, 8, left - 1 or _STALLED)
    return bool(left == 1)


def _receive(client: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        more = client.recv(length - len(content))
        if not more:
            raise EOFError("the client has gone")
        content += more
    return bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", required=True, type=Path, help="what is durable")
    parser.add_argument("--socket", required=True, type=Path, help="where to listen")
    parser.add_argument("--seed", default="", help="of what becomes durable early")
    parser.add_argument("--early", type=float, default=0.0, help="the share of blocks that do")
    parser.add_argument("--lies", action="store_true", help="answer flushes and do nothing")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds for each write and flush")
    parser.add_argument("--rate", type=int, default=0, help="bytes in a second")
    options = parser.parse_args()
    temper = Temper(
        early=options.early, lies=options.lies, latency_s=options.latency, bytes_per_s=options.rate
    )
    try:
        serve(ForgetfulDisk(options.file, temper, seed=options.seed), options.socket)
    except (EOFError, ConnectionError):
        pass  # the machine was cut


if __name__ == "__main__":
    main()
