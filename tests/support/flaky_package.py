"""One file of a package, on a server that does in turn what a test tells it: gives it, breaks off, or refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_agent.errors import TransportError
from edge_agent.sync.files import Listed, Stream


@dataclass(frozen=True, kw_only=True)
class Give:
    """Bytes from where they are asked for, at most `count`; then the connection ends, or breaks.

    Attributes:
        restart: the server cannot start in the middle.
        etag: of the file.
        breaks: an error at the end.
    """

    count: int = 1 << 30
    restart: bool = False
    etag: str = "v1"
    breaks: bool = False


@dataclass
class FlakyPackage:
    """Stands for `Package`.

    Attributes:
        content: of the one file.
        answers: one for each time the file is opened; the last one stays.
        offsets: what was asked for.
    """

    content: bytes
    answers: list[Give | Exception]
    piece_bytes: int = 10_000
    offsets: list[int] = field(default_factory=list)
    whole_files: bool = False
    over_line: bool = True

    def listing(self) -> list[Listed]:
        return [Listed(path="file", size_bytes=len(self.content))]

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str = "") -> Iterator[Stream]:
        self.offsets.append(offset)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        start = 0 if answer.restart else offset
        yield Stream(start=start, etag=answer.etag, chunks=self._chunks(answer, start))

    def _chunks(self, answer: Give, start: int) -> Iterator[bytes]:
        end = min(len(self.content), start + answer.count)
        for position in range(start, end, self.piece_bytes):
            yield self.content[position : min(end, position + self.piece_bytes)]
        if answer.breaks:
            raise TransportError("the connection broke")
