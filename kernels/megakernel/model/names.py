"""Our tensor names: what a shape requires, and what each file format calls them."""

from collections.abc import Iterable, Mapping

from megakernel.model.shape import ModelShape
from megakernel.model.weights import ModelFormatError

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")

GGUF_GLOBAL = {
    "token_embd.weight": "embed",
    "output_norm.weight": "final_norm",
    "output.weight": "head",
}
GGUF_LAYER = {
    "attn_norm.weight": "attn_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "attn_output.weight": "o",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}
HF_GLOBAL = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}
HF_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "o",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}


def our_name(
    file_name: str, top: Mapping[str, str], layer: Mapping[str, str], layer_prefix: str
) -> str | None:
    """`blk.3.attn_q.weight` -> `layers.3.q`; None for a tensor that the Llama family has no place for."""
    if file_name in top:
        return top[file_name]
    if not file_name.startswith(layer_prefix):
        return None
    number, _, rest = file_name.removeprefix(layer_prefix).partition(".")
    # One spelling a number: `blk.03` must not stand beside `blk.3`.
    if rest not in layer or not number.isascii() or not number.isdigit() or str(int(number[:9])) != number:
        return None
    return f"layers.{number}.{layer[rest]}"


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor a model of this shape has, by our name."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "o": (hidden, q_rows),
        "mlp_norm": (hidden,),
        "gate": (mlp, hidden),
        "up": (mlp, hidden),
        "down": (hidden, mlp),
    }
    if shape.has_qkv_bias:
        layer |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
    if shape.has_qk_norm:
        layer |= {"q_norm": (shape.head_dim,), "k_norm": (shape.head_dim,)}
    shapes = {f"layers.{i}.{part}": size for i in range(shape.num_layers) for part, size in layer.items()}
    shapes |= {"embed": (shape.vocab_size, hidden), "final_norm": (hidden,)}
    if not shape.has_tied_head:
        shapes["head"] = (shape.vocab_size, hidden)
    return shapes


def check_tensors(source: str, shape: ModelShape, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelFormatError where a tensor is missing, extra, or not of the shape the metadata says."""
    expected = expected_shapes(shape)
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelFormatError(
            f"{source}: tensor {_listed(missing)} missing for a {shape.architecture} model"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise ModelFormatError(
            f"{source}: tensor {_listed(extra)} should not be in this {shape.architecture} model "
            f"of {shape.num_layers} layers"
        )
    for name, size in expected.items():
        if found[name] != size:
            raise ModelFormatError(
                f"{source}: tensor `{name}` is {list(found[name])}; the metadata calls for {list(size)}"
            )


def refuse_unknown(source: str, unknown: Iterable[str], architecture: str) -> None:
    """A weight left out would make the model wrong without a word, so it is an error."""
    if names := sorted(unknown):
        raise ModelFormatError(
            f"{source}: tensor {_listed(names)} not known in a {architecture} model; this variant is not "
            f"supported (supported: dense {', '.join(SUPPORTED_ARCHITECTURES)})"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return (
        f"{shown} and {len(names) - 3} more are"
        if len(names) > 3
        else f"{shown} {'are' if names[1:] else 'is'}"
    )
