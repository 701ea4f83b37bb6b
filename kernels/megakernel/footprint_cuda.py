"""What a tile needs of an SM's shared memory: as `kernels/include/cuda/ops` lays it out."""

from megakernel.cuda_constants import K_BLOCK, NUM_CONSUMER_WARPS, ROW_CHUNK
from megakernel.pack_cuda import common_format, unit_bytes, unit_k
from megakernel.packing import GROUP

_ROW_PADDING = 64
_FLOAT_BYTES = 4
_KV_ELEMENT_BYTES = 2
_STAGED_SHARE = 0.45


def weight_tile_bytes(stored: tuple[str, ...], columns: int, k: int) -> int:
    """Of `k` elements from a unit's start, whole units and column groups as they are packed; `stored` are the
    formats of the op's matrices."""
    # K is cut at whole blocks: what does not fill one in a tile does not in the whole of K.
    name = common_format(stored, k)
    return -(-columns // GROUP) * -(-k // unit_k(name)) * unit_bytes(name)


def input_tile_bytes(k: int, rows: int) -> int:
    """Rows as 16-bit numbers."""
    padded = -(-k // K_BLOCK) * K_BLOCK
    return min(rows, ROW_CHUNK) * (padded * 2 + _ROW_PADDING)


def output_tile_bytes(columns: int, rows: int) -> int:
    return min(rows, ROW_CHUNK) * columns * _FLOAT_BYTES


def attention_bytes(group: int, head_dim: int) -> int:
    """What the warps made of a split, for the query heads of a KV head: maximum, sum and values."""
    return NUM_CONSUMER_WARPS * group * (head_dim + 2) * _FLOAT_BYTES


def staged_tokens_bytes(split_tokens: int, head_dim: int) -> int:
    """Keys and values of a split of a KV head."""
    return 2 * split_tokens * head_dim * _KV_ELEMENT_BYTES


def stages_tokens(usable_bytes: int, needed_bytes: int) -> bool:
    """Whether attention has keys and values in shared memory, of which it then needs `needed_bytes`:
    `HeldTokens` of ops/attention_split.h. Memory that is taken is missing for weights that come meanwhile."""
    return needed_bytes <= usable_bytes * _STAGED_SHARE
