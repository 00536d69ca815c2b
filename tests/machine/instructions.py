"""Which kernels for matrices a program took, from the instructions that qemu translated for it.

onnxruntime chooses its kernels by what it finds of the CPU, and says nothing about it. qemu writes down each piece of
code when it runs for the first time (`-d in_asm`), so what is there was run. aarch64's are found by their encoding,
because qemu's disassembler is older than some of them; x86_64's by their names. Source: Arm Architecture Reference
Manual, C7.2 (SDOT, SMMLA, USMMLA, BFMMLA, BFDOT).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_AARCH64 = {
    # name: (mask, value); the masks leave registers, and whether the vector has 64 or 128 bits
    "sdot": ((0xBFE0FC00, 0x0E809400), (0xBFC0F400, 0x0F80E000)),
    "udot": ((0xBFE0FC00, 0x2E809400), (0xBFC0F400, 0x2F80E000)),
    "smmla": ((0xFFE0FC00, 0x4E80A400),),
    "ummla": ((0xFFE0FC00, 0x6E80A400),),
    "usmmla": ((0xFFE0FC00, 0x4E80AC00),),
    "bfmmla": ((0xFFE0FC00, 0x6E40EC00),),
    "bfdot": ((0xBFE0FC00, 0x2E40FC00),),
    "smlal": ((0xBF20FC00, 0x0E208000),),
    "fmla": ((0xBFA0FC00, 0x0E20CC00), (0xBF80F400, 0x0F801000)),
}
_X86_64 = re.compile(
    r"\b(vpdpbusds?|vpdpwssds?|vpmaddubsw|pmaddubsw|vpmaddwd|pmaddwd|vfmadd\d+ps|mulps|tdp\w+)\b"
)
_LINE = re.compile(r"^0x[0-9a-f]+:\s+((?:[0-9a-f]{2} ?)+|[0-9a-f]{8})\s+(.*)$")


def kernels(log: Iterable[str], arch: str) -> dict[str, int]:
    """How often each instruction that multiplies matrices stands in code that has run.

    Args:
        log: the lines that qemu wrote.
        arch: `aarch64` or `x86_64`.
    """
    found: Counter[str] = Counter()
    for line in log:
        match = _LINE.match(line)
        if match is None:
            continue
        if arch == "aarch64":
            word = match[1].replace(" ", "")
            if len(word) == 8:
                found.update(_named(int(word, 16)))
        else:
            found.update(_X86_64.findall(match[2]))
    return dict(sorted(found.items()))


def _named(word: int) -> list[str]:
    return [name for name, forms in _AARCH64.items() if any(word & mask == value for mask, value in forms)]
