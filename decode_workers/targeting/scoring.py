"""Log-probabilities of edges from what a step says of their rows."""

import numpy as np
import numpy.typing as npt

from decode_workers.sampler import BadLogitsError
from decode_workers.step_batch import Float32Array
from decode_workers.targeting.wanted import IndexArray

Float64Array = npt.NDArray[np.float64]


def check_finite(values: Float32Array, name: str) -> None:
    """Raises BadLogitsError, which names the first that is not."""
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise BadLogitsError(f"{name} {first} is {values[first]}: no item can be scored")


def vocabulary_logprobs(logits: Float32Array, log_sums: Float32Array, counts: IndexArray) -> Float64Array:
    """Over all tokens. Never above 0, to which a float32 log-sum-exp may round: scores must not rise."""
    logprobs = logits.astype(np.float64)
    logprobs -= log_sums.repeat(counts)
    return np.minimum(logprobs, 0.0, out=logprobs)


def catalogue_logprobs(logits: Float32Array, starts: IndexArray, counts: IndexArray) -> Float64Array:
    """Over each row's own edges; `starts` are where they begin, of rows that have some."""
    logprobs = logits.astype(np.float64)
    logprobs -= np.repeat(np.maximum.reduceat(logits, starts), counts)
    logprobs -= np.repeat(np.log(np.add.reduceat(np.exp(logprobs), starts)), counts)
    return np.minimum(logprobs, 0.0, out=logprobs)
