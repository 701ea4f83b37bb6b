"""Thousands of broken programs: what the VM or the brute-force oracle finds harmful must be refused."""

import random
from collections import Counter

import msgspec
import numpy as np
import pytest

from megakernel.hazards import explore_states, find_hazard
from megakernel.program import Program
from megakernel.schedule_error import ScheduleError
from megakernel.validate import validate
from megakernel.vm import Vm, VmStuckError
from megakernel.vm_state import NO_PARENT, OpWeights, VmKv, VmStep, kv_for
from tests.megakernel.mutations import MUTATIONS, NUM_BARRIER_MUTATIONS
from tests.megakernel.programs import Recipe, build_program
from tests.megakernel.vm_steps import BLOCK_SIZE, Rows, Sequence, step_of
from tests.tiny_model import tiny_weights

K_SPLITS = ({}, {"o": 2, "down": 2}, {"qkv": 2, "gate_up": 3, "head": 2})
ADVERSARIAL_ORDERS = 4
"""Interleavings tried on a mutant that was accepted; one that starves workers among the first."""


class Base(msgspec.Struct, frozen=True, eq=False):
    program: Program
    weights: OpWeights
    kv: VmKv
    step: VmStep
    expected: dict[str, np.ndarray]


def _base(number: int, *, has_shared_heads: bool = False) -> Base:
    """Those with shared heads are a GPU's: several instructions make up a head."""
    weights = tiny_weights(
        number,
        ("llama", "qwen2", "qwen3")[number % 3],
        num_layers=1 + number % 2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=72,
        max_context_tokens=32,
    )
    bucket = (1, 2, 4)[number % 3]
    workers = 2 + 2 * (number % 2) if has_shared_heads else 2 + number % 3
    recipe = Recipe(
        workers=workers,
        bucket=bucket,
        barriers=("op", "running", "pairs")[(number // 2) % 3],
        seed=number,
        k_tiles=K_SPLITS[(number // 3) % 3],
        tile_columns={"qkv": 4 if has_shared_heads else 16},
        row_tiles=1 if has_shared_heads else 1 + (number // 5) % 2,
        split_tokens=8,
        swiglu_group=8,
        stats_span=24,
        attention_parts=workers if has_shared_heads else 1 + (number // 4) % 2,
    )
    program = build_program(weights.shape, recipe)
    if has_shared_heads:
        program = msgspec.structs.replace(program, kind="cuda")
    kv = kv_for(program, 40, block_size=BLOCK_SIZE)
    sequence = Sequence([7, 2, 5, 0, 3])
    shared = OpWeights(weights)
    sequence.extend(Vm(program, shared, kv), [5, 9, 2, 30, 71, 8, 8, 1, 0, 11], bucket)
    parents = [NO_PARENT, 0, 0, 2][:bucket]
    step = step_of([Rows(sequence, [4, 6, 3, 20][:bucket], parents)])
    return Base(program, shared, kv, step, Vm(program, shared, kv).run(step).buffers)


@pytest.fixture(scope="module")
def bases() -> list[Base]:
    return [_base(number) for number in range(18)] + [
        _base(number, has_shared_heads=True) for number in range(6)
    ]


def _vm_hazard(program: Program, base: Base, num_orders: int) -> str | None:
    vm = Vm(program, base.weights, base.kv)
    for seed in range(num_orders):
        try:
            buffers = vm.run(base.step, seed=seed).buffers
        except (VmStuckError, IndexError, ValueError) as error:
            return f"the VM fails: {error}"
        for name, expected in base.expected.items():
            if not np.array_equal(buffers[name], expected, equal_nan=True):
                return f"the VM finds another {name} in order {seed}"
    return None


def _is_accepted(program: Program) -> bool:
    try:
        validate(program)
    except ScheduleError:
        return False
    return True


def _campaign(bases: list[Base], count: int, seed: int) -> Counter[str]:
    """Raises at the first mutant that is accepted and harmful."""
    rng, outcomes = random.Random(seed), Counter[str]()
    while outcomes.total() < count:
        base, mutation = rng.choice(bases), rng.choice(MUTATIONS)
        mutant = mutation(rng, base.program)
        if mutant is None:
            continue
        is_accepted = _is_accepted(mutant)
        orders = ADVERSARIAL_ORDERS if is_accepted else 1
        hazard = find_hazard(mutant) or _vm_hazard(mutant, base, orders)
        assert not (is_accepted and hazard), f"{mutation.__name__} accepted, though {hazard}"
        outcomes[f"{'harmful' if hazard else 'harmless'} {'accepted' if is_accepted else 'rejected'}"] += 1
    return outcomes


def _report(capsys, outcomes: Counter[str]) -> None:
    with capsys.disabled():
        shown = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"\n  {outcomes.total():,} mutants: {shown}; 0 harmful accepted")


def test_unmutated_programs_are_accepted_and_the_oracle_agrees(bases):
    for base in bases:
        assert validate(base.program).num_instructions == sum(map(len, base.program.workers))
        assert find_hazard(base.program) is None
        assert _vm_hazard(base.program, base, 2) is None


def test_no_harmful_mutant_of_a_thousand_is_accepted(bases, capsys):
    outcomes = _campaign(bases, 1_000, seed=1)
    _report(capsys, outcomes)
    assert outcomes["harmful rejected"] > 500


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_harmful_mutant_of_ten_thousand_is_accepted(bases, capsys):
    outcomes = _campaign(bases, 10_000, seed=2)
    _report(capsys, outcomes)
    assert outcomes["harmful rejected"] > 5_000


@pytest.mark.parametrize("barriers", ["op", "running", "pairs"])
def test_the_oracle_says_what_a_walk_through_every_state_says(barriers):
    """On order alone: mutants of waits and signals, of a program small enough to walk."""
    weights = tiny_weights(
        num_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=48,
        max_context_tokens=16,
    )
    sizes = {"swiglu_group": 8, "stats_span": 24, "split_tokens": 8, "tile_columns": {"embed": 8, "o": 8}}
    program = build_program(weights.shape, Recipe(workers=2, barriers=barriers, **sizes))
    assert explore_states(program) is None
    rng, verdicts = random.Random(3), Counter[bool]()
    for number in range(100):
        mutant = MUTATIONS[number % NUM_BARRIER_MUTATIONS](rng, program)
        if mutant is None:
            continue
        if rng.random() < 0.5:
            mutant = MUTATIONS[number % NUM_BARRIER_MUTATIONS](rng, mutant) or mutant
        is_harmful = explore_states(mutant) is not None
        assert is_harmful == (find_hazard(mutant) is not None)
        assert not (is_harmful and _is_accepted(mutant))
        verdicts[is_harmful] += 1
    assert verdicts[True] > 20
