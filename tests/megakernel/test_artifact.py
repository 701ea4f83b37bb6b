import msgspec
import numpy as np
import pytest

from megakernel import pack_cuda
from megakernel.artifact import lay_out_weights, pack_weights, packed_formats, packed_segments
from megakernel.float_formats import round_to_bf16
from megakernel.group_formats import GroupQuantizedWeights
from megakernel.packing import PackedLinear
from tests.megakernel.programs import Recipe, build_program
from tests.tiny_model import tiny_weights


@pytest.mark.parametrize(("backend", "floats"), [("cpu", "F32"), ("cuda", "BF16")])
def test_every_weight_of_an_op_is_packed_alike(backend, floats):
    shape = tiny_weights(1, hidden_size=64, intermediate_size=128).shape
    stored = dict.fromkeys(tiny_weights(1).formats, "Q4_1")
    stored |= {"embed": "Q8_0", "final_norm": "F32"}
    stored |= {"layers.0.v": "Q6_K", "layers.1.up": "Q8_0", "layers.1.down": "Q4_K"}
    packed = packed_formats(shape, stored, backend)
    assert packed["embed"] == "Q8_0"
    assert packed["layers.1.q"] == packed["layers.0.gate"] == packed["layers.0.down"] == "Q4_1"
    for name in ("layers.0.q", "layers.0.v", "layers.1.gate", "layers.1.up", "layers.1.down"):
        assert packed[name] == floats, name
    assert packed["layers.0.attn_norm"] == "F32"
    assert packed.keys() == stored.keys()
    assert packed_formats(shape, packed, backend) == packed


def unpacked(layout, packed: np.ndarray, in_features: int, *names: str) -> np.ndarray:
    segment = layout.at(*names)
    data = packed[segment.offset : segment.offset + segment.num_bytes]
    columns = len(data) // pack_cuda.group_bytes(segment.format, in_features) * 16
    return pack_cuda.unpack(
        PackedLinear(format=segment.format, in_features=in_features, out_features=columns, data=data)
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_cuda_weights_are_those_of_the_model_as_bf16(architecture):
    weights = tiny_weights(3, architecture, vocab_size=163)
    layout = lay_out_weights(build_program(weights.shape, Recipe()), weights.formats, "cuda")
    packed = np.full(layout.num_bytes, 0xA5, np.uint8)
    pack_weights(layout, weights, packed)
    dense = {name: round_to_bf16(weights.dense(name)) for name in weights.names}
    assert [names for names in layout.segments if "embed" in names] == [("embed",)]
    embed = unpacked(layout, packed, 48, "embed")
    np.testing.assert_array_equal(embed[:163], dense["embed"])
    assert not embed[163:].any()
    qkv = [f"layers.1.{part}" for part in "qkv"]
    expected = np.concatenate([dense[name] for name in qkv])
    np.testing.assert_array_equal(unpacked(layout, packed, 48, *qkv)[: len(expected)], expected)
    gate_up = unpacked(layout, packed, 48, "layers.0.gate", "layers.0.up").reshape(-1, 2, 16, 48)
    np.testing.assert_array_equal(gate_up[:, 1].reshape(-1, 48), dense["layers.0.up"])
    norm = layout.at("final_norm")
    vector = packed[norm.offset : norm.offset + norm.num_bytes].view(np.float32)
    np.testing.assert_array_equal(vector, weights.dense("final_norm"))
    ends = [0]
    for segment in layout.segments.values():
        assert segment.offset % 4096 == 0
        assert segment.offset >= ends[-1]
        ends.append(segment.offset + segment.num_bytes)
    assert ends[-1] <= layout.num_bytes


def test_cuda_weights_keep_group_formats_and_share_what_is_packed_as_stored():
    plain = tiny_weights(4, hidden_size=256, intermediate_size=192, has_tied_head=False)
    formats = {"layers.0.down": "W4G128", "layers.1.o": "W8G128", "head": "W4G128", "layers.0.q": "W8G128"}
    weights = GroupQuantizedWeights(plain, formats)
    layout = lay_out_weights(build_program(plain.shape, Recipe()), weights.formats, "cuda")
    packed = np.zeros(layout.num_bytes, np.uint8)
    pack_weights(layout, weights, packed)
    assert layout.at("layers.0.q", "layers.0.k", "layers.0.v").format == "BF16"
    for name, in_features in (("layers.0.down", 192), ("layers.1.o", 96), ("head", 256)):
        assert layout.at(name).format == formats[name]
        dense = weights.dense(name)
        np.testing.assert_array_equal(unpacked(layout, packed, in_features, name)[: len(dense)], dense)
    assert layout.at("embed").format == "BF16"


def test_a_layout_remembers_whose_kernels_it_is_for():
    weights = tiny_weights(5, hidden_size=64, intermediate_size=128, num_heads=4)
    program = build_program(weights.shape, Recipe())
    formats = dict.fromkeys(weights.formats, "BF16")
    cpu, cuda = (lay_out_weights(program, formats, backend) for backend in ("cpu", "cuda"))
    assert cpu == msgspec.structs.replace(cuda, backend="cpu")  # of one size, in another order
    (_, first), (_, second) = (next(packed_segments(layout, weights)) for layout in (cpu, cuda))
    assert (first != second).any()
