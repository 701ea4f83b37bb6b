"""Which CPU a library was made for: a library made for another may stop at its first instruction."""

import platform
from functools import lru_cache
from pathlib import Path

import msgspec

_PREFIXES = ("sse", "ssse", "avx", "amx", "bmi", "sha", "vaes", "vpclmul", "sve")
# fmt: off
_NAMES = frozenset(
    {
        "abm", "adx", "aes", "asimd", "asimddp", "asimdhp", "clflushopt",
        "clwb", "cx16", "f16c", "fma", "fsgsbase", "gfni", "movbe",
        "movdir64b", "movdiri", "pclmulqdq", "popcnt", "rdrand", "rdseed",
    }
)
# fmt: on
"""What compilers make use of. The system's other flags change with its kernel and mean nothing here."""


class CpuIdentity(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str
    model: str
    """Empty where the system does not say."""
    instruction_sets: tuple[str, ...]

    def unfit_for(self, here: "CpuIdentity") -> str | None:
        """Why what was made for this CPU is not for `here`; None where it is."""
        if self.architecture != here.architecture:
            return f"it is for {self.architecture}, this machine is {here.architecture}"
        if missing := sorted(set(self.instruction_sets) - set(here.instruction_sets)):
            return f"it is for {self.model or 'a CPU'} with {', '.join(missing)}, which this CPU lacks"
        if self.model != here.model:
            return f"it is for the CPU `{self.model}`, this one is `{here.model}`"
        return None


@lru_cache(maxsize=1)
def this_cpu() -> CpuIdentity:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return cpu_of(platform.machine(), text)


def cpu_of(architecture: str, cpu_info: str) -> CpuIdentity:
    """From the text of /proc/cpuinfo, the first CPU's paragraph."""
    facts: dict[str, str] = {}
    for line in cpu_info.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features") or ""
    sets = {flag for flag in flags.split() if flag.startswith(_PREFIXES) or flag in _NAMES}
    return CpuIdentity(
        architecture=architecture,
        model=facts.get("model name") or facts.get("CPU part") or "",
        instruction_sets=tuple(sorted(sets)),
    )
