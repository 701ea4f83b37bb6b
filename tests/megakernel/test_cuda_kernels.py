"""The generated CUDA kernels under emulation: the VM's results op by op, in any order of threads."""

import random
from collections import Counter
from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from megakernel.footprint import stages_attention
from megakernel.memory import role_of
from megakernel.pack_cuda import PACKED_FORMATS
from megakernel.pipeline import compile_program
from megakernel.plan import OpPlan
from megakernel.program import Epilogue, Opcode
from megakernel.schedule import list_schedule
from megakernel.step import Rows
from megakernel.vm import Vm
from megakernel.vm_state import NO_PARENT, Arithmetic, OpWeights, VmKv
from tests.forests import draw_forest
from tests.megakernel.emulated_cases import BUCKETS, FAMILIES, NUM_WORKERS, Case, draw_case
from tests.megakernel.emulated_model import EmulatedModel, EmulatedStep, toy_gpu
from tests.megakernel.native_steps import BLOCK, Group, chain, rows_of, vm_step
from tests.megakernel.op_by_op import check_ops, unrestricted
from tests.megakernel.stored_weights import StoredAs
from tests.tiny_model import tiny_weights

NUM_CASES = 210
NUM_INTERLEAVINGS = 50
CASES_A_GROUP = 10
SLOW_GROUPS = (*range(11), 18)
"""Of the groups: the rest takes too long for CI. These have every opcode in every format too."""
MOST_DEALT = 55
"""`kMostDealt`"""
FEW_CASES = (2, 4, 12, 13, 16, 19, 21, 24, 27, 29, 30, 31, 33, 38)
FEW_INTERLEAVINGS = 4
BULK = ("-DHEADRACE_BULK_COPY=1",)


def model_of(case: Case, weights, edit=None, flags=()) -> EmulatedModel:
    flags = BULK * case.is_bulk + flags
    return EmulatedModel([case.program], weights, flags, edit)


def check(case: Case, num_interleavings: int) -> None:
    """Raises AssertionError with the case's description."""
    weights, kv = case.weights(), case.kv()
    op_weights = OpWeights(weights, Arithmetic.CUDA)
    try:
        model = model_of(case, weights)
        found = model.run(case.program.bucket, kv, case.rows, has_journal=True)
        check_ops(case.program, op_weights, kv, found, case.rows)
        check_whole_step(case, op_weights, kv, found)
        for seed in range(1, num_interleavings):
            again = model.run(case.program.bucket, kv, case.rows, seed=seed)
            assert again.bits == found.bits, f"interleaving {seed} gives other bits"
    except Exception as error:
        error.add_note(str(case))
        raise


def check_whole_step(case: Case, weights: OpWeights, kv: VmKv, found: EmulatedStep) -> None:
    """To what activations rounded the other way to bfloat16 make of it, in one op after another."""
    own = VmKv(len(kv.layers), kv.num_slots, kv.layers[0].shape[1], block_size=BLOCK, dtype=np.float16)
    for layer, values in zip(own.layers, kv.layers, strict=True):
        layer[...] = values
    expected = Vm(case.program, weights, own).run(unrestricted(vm_step(case.rows)), seed=case.seed)
    for name in ("hidden", "queries", "mlp", "logits"):
        close_in_scale(found.buffers[name], expected.buffers[name], name)
    close_in_scale(found.regions["kv"].astype(np.float32), np.stack(own.layers), "kv")


def close_in_scale(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    is_written = ~np.isnan(found)
    assert is_written.all() or name == "logits"
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        found[is_written], expected[is_written], rtol=0, atol=scale * 2**-5, err_msg=name
    )


def check_cases(seeds, num_interleavings: int) -> None:
    for seed in seeds:
        check(draw_case(seed), num_interleavings)


@pytest.mark.parametrize("first", range(0, len(FEW_CASES), 4))
def test_kernels_compute_what_the_vm_does(first):
    check_cases(FEW_CASES[first : first + 4], FEW_INTERLEAVINGS)


@pytest.mark.parametrize("seed", [3, 45])
def test_where_keys_and_values_are_held_changes_no_bit(seed, monkeypatch):
    found = []
    for is_staged in (True, False):
        if not is_staged:
            monkeypatch.setattr("megakernel.footprint.stages_tokens", lambda *_: False)
        case = draw_case(seed)
        assert stages_attention(case.program) == is_staged
        kv = case.kv()
        found.append(model_of(case, case.weights()).run(case.program.bucket, kv, case.rows).regions)
    for name in ("logits", "stats", "values", "tokens", "kv"):
        assert found[0][name].tobytes() == found[1][name].tobytes(), name


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(
            group * CASES_A_GROUP,
            marks=pytest.mark.slow if group in SLOW_GROUPS else pytest.mark.exhaustive,
        )
        for group in range(NUM_CASES // CASES_A_GROUP)
    ],
)
def test_many_cases_in_many_interleavings(first):
    check_cases(range(first, first + CASES_A_GROUP), NUM_INTERLEAVINGS)


LINEAR = (Opcode.LINEAR, Opcode.LINEAR_ACCUMULATE)
OPCODES_OF = {"embed": (Opcode.EMBED,)} | dict.fromkeys(("qkv", "o", "gate_up", "down", "head"), LINEAR)
EPILOGUES = (Epilogue.ROPE_APPEND, Epilogue.RESIDUAL, Epilogue.SWIGLU, Epilogue.LOGITS)


ALWAYS_WANTED = (
    {("bucket", bucket) for bucket in BUCKETS}
    | {("family", family) for family in FAMILIES}
    | {(opcode,) for opcode in (Opcode.EMBED, Opcode.ATTENTION)}
    | {(opcode, format) for opcode in (Opcode.EMBED, *LINEAR) for format in PACKED_FORMATS}
    | {(Opcode.LINEAR_ACCUMULATE, epilogue) for epilogue in EPILOGUES}
    | {("ask", ask) for ask in ("best", "mixed", "restricted", "nothing")}
    | {("head_dim", size) for size in (16, 32, 64)}
    | {("splits", number) for number in (1, 2, 3)}
    | {(name, value) for name in ("is_tied", "is_bulk") for value in (True, False)}
    | {("part of a head", value) for value in (*FAMILIES, Opcode.LINEAR, 1, 32, 64)}
    | {("tiles a head", number) for number in (2, 4)}
)


def covered_by(seeds) -> set[tuple[object, ...]]:
    return set().union(*(draw_case(seed).covers() for seed in seeds))


def test_few_cases_cover_every_opcode_in_every_format():
    assert not ALWAYS_WANTED - covered_by(FEW_CASES)


@pytest.mark.slow
def test_many_cases_cover_every_opcode_in_every_format_of_every_role():
    wanted = {
        (role, opcode, format)
        for role, opcodes in OPCODES_OF.items()
        for opcode in opcodes
        for format in PACKED_FORMATS
    }
    wanted |= ALWAYS_WANTED | {("SMs", number) for number in NUM_WORKERS} | {("ask", "logits")}
    wanted |= {("part of a head", bucket) for bucket in BUCKETS}
    in_slow_groups = [case for case in range(NUM_CASES) if case // CASES_A_GROUP in SLOW_GROUPS]
    assert not wanted - covered_by(in_slow_groups)


@pytest.mark.parametrize("seed", [24, 31])
def test_ops_of_one_sm_follow_each_other_without_counters(seed):
    """All tiles are one SM's, the other has none: nothing waits, nothing signals."""
    case = draw_case(seed)
    program = case.program
    counts: Counter[str] = Counter(
        role_of(program.ops[one.op])
        for worker in program.workers
        for one in worker
        if program.ops[one.op].layer <= 0 and one.opcode is not Opcode.LINEAR_ACCUMULATE
    )
    counts["attention"] = case.shape.num_kv_heads * 2
    ops = {
        role: msgspec.structs.replace(op, tile_workers=(0,) * counts[role])
        for role, op in case.plan.ops.items()
    }
    ops["embed"] = OpPlan(tile_columns=case.shape.hidden_size, tile_workers=(0,))  # by several warps
    plan = msgspec.structs.replace(case.plan, ops=ops)
    machine = msgspec.structs.replace(case.machine, num_workers=2)
    stored = case.weights().formats
    program = compile_program(case.shape, "toy", machine, program.bucket, plan, formats=stored)
    assert not any(one.waits or one.signal >= 0 for one in program.workers[0])
    check(msgspec.structs.replace(case, program=program, machine=machine, plan=plan), FEW_INTERLEAVINGS)


def test_an_sm_has_more_tiles_of_attention_than_a_warp_has_lanes():
    """Rows begin at all of 12 parts, so that the last tiles have splits, too."""
    case = draw_case(228)
    shape = msgspec.structs.replace(case.shape, max_context_tokens=12 * 128)
    machine = msgspec.structs.replace(case.machine, num_workers=12)
    attention = msgspec.structs.replace(case.plan.ops["attention"], tile_workers=(0,) * 36)
    plan = msgspec.structs.replace(case.plan, ops=case.plan.ops | {"attention": attention})
    program = compile_program(
        shape, "toy", machine, case.program.bucket, plan, formats=case.weights().formats
    )
    assert sum(one.opcode is Opcode.ATTENTION for one in program.workers[0]) == 36
    changed = msgspec.structs.replace(case, shape=shape, program=program, machine=machine, plan=plan)
    check(changed, FEW_INTERLEAVINGS)


def test_norms_of_rows_whose_last_block_of_k_is_a_short_one():
    """Of 544 elements that are staged by 512: what is past them must not count as another row's."""
    plain = tiny_weights(6, "qwen2", num_layers=1, hidden_size=544, num_heads=2, head_dim=16, vocab_size=70)
    weights = StoredAs(plain, {name: "Q8_0" for name in plain.names if plain.dense(name).ndim == 2})
    plan = list_schedule(weights.shape, toy_gpu(), 4, weights.formats)
    of_qkv = msgspec.structs.replace(plan.ops["qkv"], load_k=512, input_k=512)
    plan = msgspec.structs.replace(plan, ops=plan.ops | {"qkv": of_qkv})
    program = compile_program(weights.shape, "toy", toy_gpu(), 4, plan, formats=weights.formats)
    shape = weights.shape
    kv = VmKv(1, 4 * BLOCK, 2 * shape.num_kv_heads * 16, block_size=BLOCK, dtype=np.float16)
    rows = rows_of(Group(tokens=[9, 3, 11, 60], parents=chain(4), context=0, table=[2]))
    model = EmulatedModel([program], weights)
    for seed in range(FEW_INTERLEAVINGS):
        found = model.run(4, kv, rows, seed=seed, has_journal=True)
        check_ops(program, OpWeights(weights, Arithmetic.CUDA), kv, found, rows)


IN_BLOCKS = {"load_k": 256, "input_k": 256}


def check_blocks_of_input(format: str, *sizes: Mapping[str, int], flags: tuple[str, ...] = ()) -> set[bytes]:
    """Runs QKV and down with their input in blocks of these sizes; what there is of logits and KV."""
    plain = tiny_weights(
        9,
        "llama",
        num_layers=1,
        hidden_size=1088,
        intermediate_size=1056,
        num_heads=2,
        head_dim=16,
        vocab_size=70,
    )
    weights = StoredAs(plain, {name: format for name in plain.names if plain.dense(name).ndim == 2})
    shape = weights.shape
    kv = VmKv(1, 4 * BLOCK, 2 * shape.num_kv_heads * 16, block_size=BLOCK, dtype=np.float16)
    rows = rows_of(Group(tokens=[9, 3, 11, 60, 7, 7], parents=chain(6), context=0, table=[2]))
    found = set()
    for of_role in sizes:
        plan = list_schedule(shape, toy_gpu(), 8, weights.formats)
        blocked = {role: msgspec.structs.replace(plan.ops[role], **of_role) for role in ("qkv", "down")}
        plan = msgspec.structs.replace(plan, ops=plan.ops | blocked)
        program = compile_program(shape, "toy", toy_gpu(), 8, plan, formats=weights.formats)
        model = EmulatedModel([program], weights, flags)
        for seed in range(2):
            step = model.run(8, kv, rows, seed=seed, has_journal=seed == 0)
            if seed == 0:
                check_ops(program, OpWeights(weights, Arithmetic.CUDA), kv, step, rows)
            found.add(step.buffers["logits"].tobytes() + step.regions["kv"].tobytes())
    return found


@pytest.mark.parametrize("format", ["BF16", "Q4_1"])
def test_inputs_in_blocks_of_k_give_the_same_bits_as_whole(format):
    """Up to four, of which one is multiplied while the next is on its way; normed and not."""
    assert len(check_blocks_of_input(format, {}, IN_BLOCKS)) == 1


def test_tiles_of_the_head_that_are_left_out_do_not_bring_the_others_sums_together():
    """Of one SM every second tile is wanted: sums of warps that are ahead are not where others still read."""
    weights = tiny_weights(
        8,
        "llama",
        num_layers=1,
        hidden_size=64,
        num_heads=2,
        head_dim=16,
        vocab_size=320,
        has_tied_head=False,
    )
    machine = toy_gpu(1)
    plan = list_schedule(weights.shape, machine, 1, weights.formats)
    ops = {role: msgspec.structs.replace(op, tile_workers=None) for role, op in plan.ops.items()}
    ops["head"] = OpPlan(tile_columns=32)
    plan = msgspec.structs.replace(plan, ops=ops)
    program = compile_program(weights.shape, "toy", machine, 1, plan, formats=weights.formats)
    kv = VmKv(1, 4 * BLOCK, 2 * weights.shape.num_kv_heads * 16, block_size=BLOCK, dtype=np.float16)
    rows = msgspec.structs.replace(
        rows_of(Group(tokens=[9], parents=chain(1), context=0, table=[2])),
        needs_best=np.array([False]),
        allowed_starts=np.array([0, 5], dtype=np.int32),
        allowed_token_ids=np.arange(0, 320, 64, dtype=np.int32) + 3,
    )
    model = EmulatedModel([program], weights)
    runs = [model.run(1, kv, rows, seed=seed) for seed in range(20)]
    assert all(run.bits == runs[0].bits for run in runs)


def test_an_sm_has_more_splits_than_it_notes_down():
    """32 rows, two KV heads, one or two splits of each: those past the noted are found in each layer."""
    weights = tiny_weights(12, "llama", num_layers=2, hidden_size=64, num_heads=4, head_dim=16, vocab_size=70)
    machine = toy_gpu(1)
    plan = list_schedule(weights.shape, machine, 32, weights.formats)
    program = compile_program(weights.shape, "toy", machine, 32, plan, formats=weights.formats)
    kv = VmKv(2, 12 * BLOCK, 2 * weights.shape.num_kv_heads * 16, block_size=BLOCK, dtype=np.float16)
    rng = np.random.default_rng(5)
    for layer in kv.layers:
        layer[...] = rng.standard_normal(layer.shape)
    table = [int(block) for block in rng.permutation(12)]
    rows = rows_of(Group(tokens=list(range(32)), parents=chain(32), context=8 * 16 - 12, table=table))
    num_splits = sum(-(-(position + 1) // program.split_tokens) for position in rows.positions)
    assert num_splits * weights.shape.num_kv_heads > MOST_DEALT
    step = EmulatedModel([program], weights).run(32, kv, rows, has_journal=True)
    check_ops(program, OpWeights(weights, Arithmetic.CUDA), kv, step, rows)


def test_a_row_has_the_same_bits_alone_in_company_and_in_any_bucket():
    plain = tiny_weights(
        4, "qwen3", hidden_size=64, num_heads=4, head_dim=64, vocab_size=203, has_tied_head=False
    )
    weights = StoredAs(plain, {name: "Q4_1" for name in plain.names if plain.dense(name).ndim == 2})
    programs = []
    for bucket in (1, 4, 16):
        plan = list_schedule(weights.shape, toy_gpu(), bucket, weights.formats)
        programs.append(
            compile_program(weights.shape, "toy", toy_gpu(), bucket, plan, formats=weights.formats)
        )
    model = EmulatedModel(programs, weights)
    kv = VmKv(2, 12 * BLOCK, 2 * 2 * 64, block_size=BLOCK, dtype=np.float16)
    rng = np.random.default_rng(7)
    for layer in kv.layers:
        layer[...] = rng.standard_normal(layer.shape)
    tree = Group(tokens=[5, 6, 7, 8], parents=[NO_PARENT, 0, 0, 1], context=21, table=[3, 8])
    single = Group(tokens=[9], parents=chain(1), context=33, table=[5, 1, 11])
    others = Group(tokens=[10, 11, 12], parents=chain(3), context=0, table=[0])
    together, alone, of_tree = (
        model.run(bucket, kv, rows_of(*groups)).buffers["logits"]
        for bucket, groups in ((16, (tree, single, others)), (1, (single,)), (4, (tree,)))
    )
    assert (together[4] == alone[0]).all()
    assert (together[:4] == of_tree).all()


def test_ancestors_may_be_rows_of_earlier_steps():
    """Trees behind contexts, in one step and level by level, over slots of no order: the same bits."""
    weights = tiny_weights(6, "llama", hidden_size=64, num_heads=4, head_dim=16, vocab_size=70)
    plan = list_schedule(weights.shape, toy_gpu(), 16, weights.formats)
    program = compile_program(weights.shape, "toy", toy_gpu(), 16, plan, formats=weights.formats)
    model, rng = EmulatedModel([program], weights), random.Random(8)
    forest = draw_forest(
        rng, vocab_size=70, block_size=BLOCK, num_blocks=40, most_nodes=14, contexts=(0, 5, 30, 125)
    )
    committed = np.random.default_rng(9).standard_normal((2, 40 * BLOCK, 2 * 2 * 16)).astype(np.float16)

    def logits_of(parts) -> np.ndarray:
        kv = VmKv(2, 40 * BLOCK, 2 * 2 * 16, block_size=BLOCK, dtype=np.float16)
        slots, found = forest.scattered_slots(rng, kv.num_slots), np.zeros((forest.num_nodes, 70))
        for layer, values in zip(kv.layers, committed, strict=True):
            layer[...] = values
            layer[slots] = np.nan
        for nodes in parts:
            step = model.run(16, kv, Rows(**forest.fields(nodes, slots)))
            found[nodes] = step.buffers["logits"]
            for layer, values in zip(kv.layers, step.regions["kv"], strict=True):
                layer[...] = values
        return found

    whole = logits_of([list(range(forest.num_nodes))])
    assert not np.isnan(whole).any()
    assert (logits_of(forest.levels()) == whole).all()
    assert (logits_of(forest.random_chunks(rng, 6)) == whole).all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "bucket"), [("qwen2", 4), ("qwen3", 32)])
def test_a_head_is_the_same_bits_of_however_many_tiles(family, bucket):
    weights = tiny_weights(
        5, family, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=128, vocab_size=70
    )
    machine, op_weights = toy_gpu(5), OpWeights(weights, Arithmetic.CUDA)
    kv = VmKv(2, 12 * BLOCK, 2 * 128, block_size=BLOCK, dtype=np.float16)
    for layer in kv.layers:
        layer[...] = np.random.default_rng(8).standard_normal(layer.shape)
    groups = [
        Group(tokens=[5, 6, 7], parents=[NO_PARENT, 0, 0], context=21, table=[3, 8]),
        Group(tokens=list(range(1, bucket // 2)), parents=chain(bucket // 2 - 1), context=0, table=[0, 1]),
    ]
    rows = rows_of(*groups)
    found = {}
    for columns in (16, 32, 64, 128, 256):
        plan = list_schedule(weights.shape, machine, bucket, weights.formats)
        ops = plan.ops | {"qkv": OpPlan(tile_columns=columns)}
        plan = msgspec.structs.replace(plan, ops=ops)
        program = compile_program(weights.shape, "toy", machine, bucket, plan, formats=weights.formats)
        model = EmulatedModel([program], weights)
        step = model.run(bucket, kv, rows, has_journal=True)
        check_ops(program, op_weights, kv, step, rows)
        again = model.run(bucket, kv, rows, seed=columns)
        names = ("hidden", "queries", "logits")
        assert all((again.buffers[name] == step.buffers[name]).all() for name in names)
        found[columns] = b"".join(step.buffers[name].tobytes() for name in names)
    assert len(set(found.values())) == 1
