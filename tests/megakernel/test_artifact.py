from megakernel.artifact import packed_formats
from tests.tiny_model import tiny_weights


def test_every_weight_of_an_op_is_packed_alike():
    shape = tiny_weights(1, hidden_size=64, intermediate_size=128).shape
    stored = dict.fromkeys(tiny_weights(1).formats, "Q4_1")
    stored |= {"embed": "Q8_0", "final_norm": "F32"}
    stored |= {"layers.0.v": "Q6_K", "layers.1.up": "Q8_0", "layers.1.down": "Q4_K"}
    packed = packed_formats(shape, stored)
    assert packed["embed"] == "Q8_0"
    assert packed["layers.1.q"] == packed["layers.0.gate"] == packed["layers.0.down"] == "Q4_1"
    for name in ("layers.0.q", "layers.0.v", "layers.1.gate", "layers.1.up", "layers.1.down"):
        assert packed[name] == "F32", name
    assert packed["layers.0.attn_norm"] == "F32"
    assert packed.keys() == stored.keys()
