"""Which tokens' KV a step of TensorRT-LLM's scheduler brings, request by request. Pure.

The scheduler tells of a request what is new in each step: blocks, and how many tokens it computes from which
position on. What its prefix cache has comes with the first step, as does what earlier steps left.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from prefill_workers.rank_channel import Export


class ScheduledRequest(Protocol):
    """TensorRT-LLM's RequestData, as far as it is read."""

    request_id: int
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """KV of tokens [first_token, end_token), all layers, which is there once the step has run."""

    number: int
    request_id: int
    first_token: int
    end_token: int
    block_ids: tuple[int, ...]
    """Of the sequence from its first token on."""


class _Request(msgspec.Struct):
    number: int
    num_exported: int
    """Tokens before this one are in earlier pieces, or not asked for."""
    block_ids: list[int] = []


class ExportPieces:
    """The scheduler's side, on rank 0. `find_export` says what is known of an export by its number."""

    def __init__(self, find_export: Callable[[int], Export | None]) -> None:
        self._find_export = find_export
        self._requests: dict[int, _Request] = {}

    def begin(self, request_id: int, number: int) -> None:
        """A request that carries the number of an export; others have none, and none of their KV is sent."""
        self._forget_settled()
        export = self._find_export(number)
        if export is not None:
            self._requests[request_id] = _Request(number=number, num_exported=export.first_token)

    def step(self, scheduled: list[ScheduledRequest]) -> list[Piece]:
        return [piece for request in scheduled if (piece := self._piece(request)) is not None]

    def end(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def _forget_settled(self) -> None:
        """Of a request that was cancelled or failed, not every version of TensorRT-LLM tells the end."""
        for request_id, request in list(self._requests.items()):
            if self._find_export(request.number) is None:
                del self._requests[request_id]

    def _piece(self, scheduled: ScheduledRequest) -> Piece | None:
        request = self._requests.get(scheduled.request_id)
        if request is None:
            return None
        request.block_ids.extend(scheduled.new_block_ids)
        export = self._find_export(request.number)
        if export is None:
            return None
        end = min(scheduled.computed_position + scheduled.num_scheduled_tokens, export.end_token)
        if end <= request.num_exported:
            return None
        first, request.num_exported = request.num_exported, end
        return Piece(
            number=request.number,
            request_id=scheduled.request_id,
            first_token=first,
            end_token=end,
            block_ids=tuple(request.block_ids),
        )
