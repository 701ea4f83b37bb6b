"""An attribute of all items: numbers, or text as codes into its distinct values."""

from functools import cached_property

import numpy as np
import numpy.typing as npt

from cluster.catalogue.file_format import Strings
from cluster.messages import Condition

BoolArray = npt.NDArray[np.bool_]
ABSENT = -1
"""The code of an item that lacks a text attribute; a number's is NaN."""


class NumberColumn:
    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        self._values = values

    def meets(self, condition: Condition) -> BoolArray:
        """`any_of` is compared by value: "2" and "2.0" are one. Raises ValueError for a bound that is NaN."""
        mask = ~np.isnan(self._values)
        if condition.any_of is not None:
            numbers = [_number(text) for text in condition.any_of]
            mask &= np.isin(self._values, [number for number in numbers if number is not None])
        for bound in (condition.at_least, condition.at_most):
            if bound is not None and np.isnan(bound):
                raise ValueError("a bound is not a number")
        if condition.at_least is not None:
            mask &= self._values >= condition.at_least
        if condition.at_most is not None:
            mask &= self._values <= condition.at_most
        return mask


class TextColumn:
    def __init__(self, codes: npt.NDArray[np.int32], values: Strings) -> None:
        self._codes = codes
        self._values = values

    @cached_property
    def _code_of(self) -> dict[str, int]:
        return {self._values[code]: code for code in range(len(self._values))}

    def meets(self, condition: Condition) -> BoolArray:
        """Raises ValueError for a condition on numbers."""
        if condition.at_least is not None or condition.at_most is not None:
            raise ValueError("it is text: ask with `any_of`, not `at_least` or `at_most`")
        if condition.any_of is None:
            return np.not_equal(self._codes, ABSENT)
        # One lookup a code, whatever the items: `isin` would sort them.
        is_asked = np.zeros(len(self._code_of) + 1, np.bool_)
        is_asked[[self._code_of[text] for text in condition.any_of if text in self._code_of]] = True
        is_asked[ABSENT] = False
        met: BoolArray = is_asked[self._codes]
        return met


Column = NumberColumn | TextColumn


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
