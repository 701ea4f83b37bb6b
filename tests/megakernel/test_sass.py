import pytest

from megakernel.build import BuildError
from megakernel.cuda_build import build_cubin
from megakernel.cuda_toolkit import ToolMissingError, find_tool
from megakernel.sass import (
    ASYNC_COPY,
    BULK_COPY,
    INDIRECT_BRANCH,
    LOCAL_MEMORY,
    TENSOR_CORE,
    disassemble,
    parse_nvdisasm,
)
from tests.megakernel.cuda_sources import BULK_COPIES, COPIES, JUMPS, MATRIX, SPILLING

PRINTED = """\
//--------------------- .text.two               --------------------------
	.section	.text.two,"ax",@progbits
        .size           two,(.L_x_1 - two)
two:
.text.two:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_0:
        /*0020*/                   BRA `(.L_x_0);
        /*0030*/                   NOP;
	.section	.text.one,"ax",@progbits
        /*0000*/              @!UP1 EXIT ;
"""


def can_find(tool: str) -> bool:
    try:
        find_tool(tool)
    except ToolMissingError:
        return False
    return True


needs_tools = pytest.mark.skipif(
    not (can_find("nvcc") and can_find("nvdisasm")),
    reason="no nvcc or no nvdisasm: pip install 'headrace[cuda-tools]'",
)


def counts(source, architecture, tmp_path):
    (code,) = disassemble(build_cubin(source, architecture, folder=tmp_path).path)
    return code


def test_instructions_are_counted_by_kernel():
    one, two = parse_nvdisasm(PRINTED.splitlines())
    assert (one.name, one.instructions) == ("one", {"EXIT": 1})
    assert (two.name, two.num_bytes) == ("two", 64)
    assert two.instructions == {"HMMA.16816.F32.BF16": 1, "BRA": 2, "NOP": 1}
    assert two.count(TENSOR_CORE) == 1
    assert two.count(("HM", "BRX")) == 0


@needs_tools
def test_matrix_instructions(tmp_path):
    code = counts(MATRIX, "sm_89", tmp_path)
    assert code.name == "matrix"
    assert code.count(TENSOR_CORE) == 1
    assert code.num_bytes % 128 == 0
    assert code.count((*ASYNC_COPY, *BULK_COPY, *INDIRECT_BRANCH, *LOCAL_MEMORY)) == 0


@needs_tools
def test_asynchronous_copies(tmp_path):
    assert counts(COPIES, "sm_89", tmp_path).count(ASYNC_COPY) == 1
    assert counts(BULK_COPIES, "sm_90", tmp_path).count(BULK_COPY) == 1


@needs_tools
def test_a_jump_table_is_an_indirect_branch(tmp_path):
    assert counts(JUMPS, "sm_89", tmp_path).count(INDIRECT_BRANCH) >= 1


@needs_tools
def test_spills_go_to_local_memory(tmp_path):
    assert counts(SPILLING, "sm_89", tmp_path).count(LOCAL_MEMORY) > 0


@needs_tools
def test_what_is_no_cubin_is_an_error(tmp_path):
    path = tmp_path / "no.cubin"
    path.write_bytes(b"nothing")
    with pytest.raises(BuildError, match=r"nvdisasm.* failed"):
        disassemble(path)
