"""The token at completion index t, as a pure function of (logits row, parameters, seed, t).

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al., "A* Sampling", 2014): the largest of
logit / temperature + noise is distributed as softmax. A token's noise is keyed on (seed, t, token id)
alone, so it depends neither on the batch nor on which other candidates the filters left.

Filters are applied in this order, each on what the one before left:

1. temperature: logits are divided by it; 0 is the likeliest token, the lowest id of equals.
2. top_k: the k likeliest; of equals at the edge, the lower ids. 0 keeps all.
3. top_p: the shortest run of likeliest tokens whose probabilities, renormalised, reach p.
4. min_p: tokens at least min_p times as likely as the likeliest.

So is every logprob: log-softmax of the raw logits, before temperature and filters.
"""

import math

import numpy as np
import numpy.typing as npt

from cluster.messages import EmittedToken, SamplingParams, TokenLogprob
from decode_workers.philox import philox4x32
from decode_workers.step_batch import Float32Array

Float64Array = npt.NDArray[np.float64]
TokenIdArray = npt.NDArray[np.int64]
PlaceArray = npt.NDArray[np.int64]
"""Indices into an array of token ids."""
ByteArray = npt.NDArray[np.uint8]

_WORDS, _BYTES = 4, 16
"""What one counter gives: four neighbouring tokens share one for words, sixteen one for bytes."""
_COARSE, _FINE = 0, 1
"""Last word of the counter: which of a token's two draws."""
_NUM_FRONT = 64
"""Likeliest candidates whose score is known before it is asked who else can win."""
_RUN = 256
"""Candidates in a row whose maximum is enough to find the front."""


class BadLogitsError(ValueError):
    """A logits row that no token can be drawn from: NaN, +inf, or -inf throughout.

    -inf for some tokens is sound: they are never chosen. Handled by the engine, which fails that
    sequence alone.
    """


def sample(row: Float32Array, params: SamplingParams, index: int) -> int:
    """The token at completion index `index`. Raises BadLogitsError."""
    best = int(row.argmax())
    check_best(float(row[best]), best)
    if params.temperature == 0:
        return best
    token_ids = _candidates(row, float(row[best]), params)
    logits = row if token_ids.size == row.size else row[token_ids]
    largest = float(row[best])
    coarse = _coarse(params.seed, index, token_ids)

    def scores(places: PlaceArray) -> Float64Array:
        noise = _noise(params.seed, index, token_ids[places], coarse[places])
        return _scaled(logits[places], largest, params.temperature) + noise

    if token_ids.size <= 2 * _NUM_FRONT:
        return int(token_ids[scores(np.arange(token_ids.size)).argmax()])
    front = _front(logits)
    front_scores = scores(front)
    edge = float(_scaled(logits[front].min(keepdims=True), largest, params.temperature)[0])
    rest = _contenders(front, coarse, float(front_scores.max()) - edge)
    places, all_scores = np.concatenate([front, rest]), np.concatenate([front_scores, scores(rest)])
    return int(token_ids[places[all_scores == all_scores.max()].min()])


def check_best(maximum: float, token_id: int) -> None:
    """Of a row: a NaN's where there is one, as NumPy's argmax finds it. Raises BadLogitsError."""
    if not math.isfinite(maximum):
        raise BadLogitsError(bad_logits(maximum, token_id))


def bad_logits(maximum: float, token_id: int) -> str:
    return f"logit of token {token_id} is {maximum}: no token can be chosen"


def gumbel(seed: int, index: int, token_ids: TokenIdArray) -> Float64Array:
    """Standard Gumbel noise of each token at completion index `index`; ids ascending, not empty.

    From 40 random bits a token: a coarse byte, which a whole vocabulary can be screened by, then a fine word.
    """
    return _noise(seed, index, token_ids, _coarse(seed, index, token_ids))


def _noise(seed: int, index: int, token_ids: TokenIdArray, coarse: ByteArray) -> Float64Array:
    fine = _words(seed, index, token_ids // _WORDS, _FINE)[token_ids % _WORDS, np.arange(token_ids.size)]
    uniform = ((coarse * 2.0**32 + fine) + 0.5) * 2.0**-40
    noise: Float64Array = -np.log(-np.log(uniform))
    return noise


def with_logprobs(row: Float32Array, token_id: int, num_top: int) -> EmittedToken:
    """The token with its log-probability and those of the `num_top` likeliest, likeliest first."""
    shift = float(row.max())
    log_total = shift + math.log(float(np.exp(row - np.float32(shift)).sum(dtype=np.float64)))
    top_ids = _by_likelihood(row, _top_k(row, num_top)) if num_top else np.arange(0)
    return EmittedToken(
        token_id=token_id,
        logprob=float(row[token_id]) - log_total,
        top_logprobs=tuple(
            TokenLogprob(token_id=int(top_id), logprob=float(row[top_id]) - log_total) for top_id in top_ids
        ),
    )


def _coarse(seed: int, index: int, token_ids: TokenIdArray) -> ByteArray:
    """The highest 8 of each token's random bits."""
    end = int(token_ids[-1]) + 1
    num_blocks = -(-end // _BYTES)
    if num_blocks < token_ids.size:
        every = _as_bytes(_words(seed, index, np.arange(num_blocks), _COARSE)).reshape(-1)
        return every[:end] if token_ids.size == end else every[token_ids]
    words = _words(seed, index, token_ids // _BYTES, _COARSE)
    return _as_bytes(words)[np.arange(token_ids.size), token_ids % _BYTES]


def _as_bytes(words: npt.NDArray[np.uint32]) -> ByteArray:
    """[4, n] words to [n, 16] bytes, low ones first on any machine."""
    return np.ascontiguousarray(words.T).astype("<u4", copy=False).view(np.uint8)


def _words(seed: int, index: int, blocks: TokenIdArray, which: int) -> npt.NDArray[np.uint32]:
    counters = np.zeros((4, blocks.size), dtype=np.uint32)
    counters[0] = blocks
    counters[1] = index & 0xFFFFFFFF
    counters[3] = which
    return philox4x32(counters, seed)


def _front(logits: Float32Array) -> PlaceArray:
    """The likeliest candidates, about _NUM_FRONT: all that are as likely as the least of them."""
    num_runs = logits.size // _RUN
    if num_runs < 2 * _NUM_FRONT:
        return _top_k(logits, _NUM_FRONT)
    maxima = logits[: num_runs * _RUN].reshape(num_runs, _RUN).max(axis=1)
    floor = np.partition(maxima, num_runs - _NUM_FRONT)[num_runs - _NUM_FRONT]
    return np.flatnonzero(logits >= floor)


def _contenders(front: PlaceArray, coarse: ByteArray, needed_noise: float) -> PlaceArray:
    """Those beside the front that can still win.

    Whoever is no likelier than the front needs noise of the front's best score less its last logit: few have
    a coarse byte that allows it, and the rest of their noise is never drawn.
    """
    needed_uniform = math.exp(-math.exp(-needed_noise))
    is_contender = coarse >= math.floor(needed_uniform * 256 - 1e-9)
    is_contender[front] = False
    return np.flatnonzero(is_contender)


def _scaled(logits: Float32Array, largest: float, temperature: float) -> Float64Array:
    """Logits over temperature, shifted so that the largest is 0, however small the temperature."""
    with np.errstate(over="ignore"):  # to -inf, which is what it comes to
        shifted: Float64Array = (logits.astype(np.float64) - largest) / temperature
    return shifted


def _candidates(row: Float32Array, largest: float, params: SamplingParams) -> TokenIdArray:
    """Ids that the filters leave, ascending; never empty."""
    token_ids = _top_k(row, params.top_k) if params.top_k else np.arange(row.size)
    if params.top_p < 1:
        token_ids = _top_p(row, token_ids, largest, params)
    if params.min_p > 0:
        scaled = _scaled(row[token_ids], largest, params.temperature)
        token_ids = token_ids[scaled >= math.log(params.min_p)]
    return token_ids


def _top_k(row: Float32Array, k: int) -> TokenIdArray:
    if k >= row.size:
        return np.arange(row.size)
    edge = np.partition(row, row.size - k)[row.size - k]
    token_ids = np.flatnonzero(row >= edge)
    if token_ids.size > k:
        at_edge = np.flatnonzero(row[token_ids] == edge)
        token_ids = np.delete(token_ids, at_edge[k - token_ids.size :])
    return token_ids


def _top_p(
    row: Float32Array, token_ids: TokenIdArray, largest: float, params: SamplingParams
) -> TokenIdArray:
    weights = np.exp(_scaled(row[token_ids], largest, params.temperature))
    total = float(weights.sum())
    # Tokens below this add up to less than 1 - p together, so the run never reaches them: sort the rest.
    floor = (1 - params.top_p) * total / token_ids.size
    kept = np.flatnonzero(weights >= floor)
    order = kept[np.lexsort((token_ids[kept], -row[token_ids[kept]]))]
    reached = int(np.searchsorted(np.cumsum(weights[order]), params.top_p * total))
    return np.sort(token_ids[order[: reached + 1]])


def _by_likelihood(row: Float32Array, token_ids: TokenIdArray) -> TokenIdArray:
    return token_ids[np.lexsort((token_ids, -row[token_ids]))]
