"""What a cubin's kernels are in machine code: instructions by mnemonic, bytes of code."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from megakernel.build import BuildError
from megakernel.cuda_toolkit import find_tool

TENSOR_CORE = ("HMMA",)
ASYNC_COPY = ("LDGSTS",)
"""cp.async"""
BULK_COPY = ("UBLKCP",)
"""cp.async.bulk"""
INDIRECT_BRANCH = ("BRX", "BRXU", "JMX", "JMXU")
LOCAL_MEMORY = ("LDL", "STL")
_INSTRUCTION_BYTES = 16
"""From sm_70 on."""
_LIMIT_S = 600

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


class KernelCode(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel, with the functions that it calls."""

    name: str
    instructions: Mapping[str, int]
    """How many, by mnemonic with its suffixes (`HMMA.16816.F32.BF16`)."""

    @property
    def num_bytes(self) -> int:
        """With what fills the end."""
        return sum(self.instructions.values()) * _INSTRUCTION_BYTES

    def count(self, mnemonics: Iterable[str]) -> int:
        """Of mnemonics without suffixes."""
        wanted = set(mnemonics)
        return sum(count for name, count in self.instructions.items() if name.partition(".")[0] in wanted)


def disassemble(cubin: Path) -> tuple[KernelCode, ...]:
    """By name. Raises ToolMissingError without nvdisasm, BuildError for a file that it does not read."""
    command = [str(find_tool("nvdisasm")), "--print-code", "--no-dataflow", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)  # noqa: S603 - our own command
    if done.returncode != 0:
        raise BuildError(f"`{command[0]}` failed with status {done.returncode}: {done.stderr.strip()}")
    return parse_nvdisasm(done.stdout.splitlines())


def parse_nvdisasm(lines: Iterable[str]) -> tuple[KernelCode, ...]:
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in lines:
        if section := _SECTION.match(line):
            current = counts.setdefault(section[1], Counter())
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[1]] += 1
    return tuple(KernelCode(name=name, instructions=dict(counts[name])) for name in sorted(counts))
