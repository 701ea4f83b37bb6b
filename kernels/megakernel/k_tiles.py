"""How many K-tiles each linear role has: a part of a row's arithmetic, so decided once for all programs."""

from collections.abc import Mapping

from megakernel.graph import usual_formats
from megakernel.linear_tiles import COST_TOLERANCE, LinearRole, candidates, linear_roles
from megakernel.machine import Machine
from megakernel.memory import ScratchError
from megakernel.model.shape import ModelShape


def shared_k_tiles(
    shape: ModelShape, machine: Machine, formats: Mapping[str, str] | None = None
) -> dict[str, int]:
    """K-tiles by linear role, for every bucket and, on a CPU, for any number of workers.

    The sums of K-tiles are rounded before they are added: two programs that split K otherwise differ in
    bits. A token must not depend on the rows beside it, nor on how many threads its worker has, as prefill
    and decode workers, and a replay on another one, have to agree. So neither goes in here. The search does
    not change the answer. Raises ScratchError where no tile of a role fits.
    """
    stored = usual_formats(shape) if formats is None else formats
    return {role.name: num_k_tiles(role, machine) for role in linear_roles(shape, stored, machine)}


def num_k_tiles(role: LinearRole, machine: Machine) -> int:
    """A CPU: the fewest with which the narrowest tile fits a core's scratch memory, in practice 1.

    A GPU, whose number of workers is part of what it is: the fewest of those that cost about the least.
    """
    found = candidates(role, machine)
    if not found:
        raise ScratchError(
            f"{role.name}: no tile of {role.grain} columns or more fits the {machine.usable_bytes} scratch "
            f"bytes of a worker of {machine.name}"
        )
    if machine.kind == "cpu":
        return min(candidate.num_k_tiles for candidate in found)
    bearable_us = min(candidate.cost_us for candidate in found) * (1 + COST_TOLERANCE)
    return min(candidate.num_k_tiles for candidate in found if candidate.cost_us <= bearable_us)
