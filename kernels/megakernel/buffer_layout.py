"""Where the buffers between ops lie in an artifact's one piece of memory for them."""

from collections.abc import Sequence

from megakernel.program import Program, Space


def lay_out_buffers(programs: Sequence[Program], alignment: int) -> tuple[dict[str, int], int]:
    """Offset by buffer name, each with room for every bucket's; and bytes of all, at least `alignment`."""
    sizes: dict[str, int] = {}
    for program in programs:
        for buffer in program.buffers:
            if buffer.space is Space.ACTIVATION:
                num_bytes = 4 * buffer.columns * program.bucket
                sizes[buffer.name] = max(sizes.get(buffer.name, 0), num_bytes)
    offsets, end = {}, 0
    for name, num_bytes in sizes.items():
        offsets[name] = end
        end += -(-num_bytes // alignment) * alignment
    return offsets, max(end, alignment)
