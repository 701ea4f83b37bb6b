"""Stochastic beams: a top-down draw of log-probabilities perturbed by Gumbel noise.

Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them" (ICML 2019): the k items of highest
perturbed score are k draws without replacement. A node's noise is keyed on (seed, node) alone, so it does not
depend on what ran with it.
"""

import numpy as np

from decode_workers.philox import philox4x32
from decode_workers.targeting.scoring import Float64Array
from decode_workers.targeting.wanted import IndexArray

_OF_NODE, _OF_REST = 0, 1
"""Last word of the counter: a node's own draw, or that of all paths below it that are not wanted."""


def root_score(seed: int) -> float:
    return float(_gumbel(seed, np.zeros(1, dtype=np.intp), _OF_NODE)[0])


def perturbed(
    seed: int,
    *,
    parents: IndexArray,
    parent_scores: Float64Array,
    parent_logprobs: Float64Array,
    edge_starts: IndexArray,
    edge_nodes: IndexArray,
    edge_logprobs: Float64Array,
) -> Float64Array:
    """Scores of edges, given their parents': noise on each, on condition that the largest is the parent's.

    `edge_logprobs` are conditional on the parent. Where they leave probability to paths that are not wanted,
    those take part as one more child: so each item's score is Gumbel noise on its own log-probability.
    """
    counts, starts = np.diff(edge_starts), edge_starts[:-1]
    raw = parent_logprobs.repeat(counts) + edge_logprobs + _gumbel(seed, edge_nodes, _OF_NODE)
    largest = np.maximum.reduceat(raw, starts)
    rest = 1.0 - np.add.reduceat(np.exp(edge_logprobs), starts)
    has_rest = rest > 1e-9
    if has_rest.any():
        others = (
            np.log(rest[has_rest]) + parent_logprobs[has_rest] + _gumbel(seed, parents[has_rest], _OF_REST)
        )
        largest[has_rest] = np.maximum(largest[has_rest], others)
    bound = parent_scores.repeat(counts)
    below = raw - largest.repeat(counts)
    with np.errstate(divide="ignore"):
        # log(1 - exp(below)), which is -inf for the largest itself.
        shortfall = bound - raw + np.log(-np.expm1(below))
    scores: Float64Array = bound - np.maximum(shortfall, 0.0) - np.log1p(np.exp(-np.abs(shortfall)))
    return scores


def _gumbel(seed: int, nodes: IndexArray, which: int) -> Float64Array:
    counters = np.zeros((4, len(nodes)), dtype=np.uint32)
    counters[0] = nodes
    counters[3] = which
    words = philox4x32(counters, seed)
    uniform = (words[0] * 2.0**20 + (words[1] >> np.uint32(12)) + 0.5) * 2.0**-52
    noise: Float64Array = -np.log(-np.log(uniform))
    return noise
