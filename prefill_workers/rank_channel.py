"""What the prefill worker and the ranks of its TensorRT-LLM engine tell each other, by a Unix socket.

The ranks are processes that TensorRT-LLM starts; they hear of the socket by the arguments that it hands to
them. It has a name but no file (Linux's abstract sockets), so a worker that is killed leaves nothing behind.
Every message is one packet, so none comes in part. Where the worker dies, its ranks read an end of file, and
copy nothing more for it.
"""

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from cluster.kv_layout import KvDtype
from prefill_workers.copy_costs import CopyCosts

_VARIABLE = "TRTLLM_HEADRACE_EXPORT"
_MAX_MESSAGE_BYTES = 65536
_SEND_TIMEOUT_S = 5.0
_LEASE_PERIOD_S = 0.5
_CREDENTIALS = struct.Struct("iII")
"""Process, user, group."""


class ExportSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must know before its first request.

    It travels as one of the variables that an engine is given for its ranks' environment, and is read from
    the engine's arguments: ranks are spawned with an environment that is older than this process's.
    """

    socket_name: str
    """Of the same network namespace."""
    staging_path: str
    num_ranks: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    wire_dtype: KvDtype

    def to_variables(self) -> dict[str, str]:
        return {_VARIABLE: msgspec.json.encode(self).decode()}

    @classmethod
    def from_variables(cls, variables: Mapping[str, str] | None) -> "ExportSettings":
        """Raises ChannelError."""
        text = (variables or {}).get(_VARIABLE)
        if text is None:
            raise ChannelError(
                f"the engine's arguments have no {_VARIABLE}: this connector runs in an engine that "
                "a Headrace prefill worker starts"
            )
        return msgspec.json.decode(text, type=cls)


class ChannelError(Exception):
    """The other end is not there, or says something else than was agreed."""


class Export(msgspec.Struct, frozen=True, kw_only=True, tag="export"):
    """To every rank, before the request is submitted whose seed is `number`.

    KV of tokens [first_token, end_token), piece by piece in the order of tokens: a piece has all its layers,
    a layer `[2, tokens, heads, head_dim]`.
    """

    number: int
    first_token: int
    end_token: int
    offset: int
    """Of its region in the staging memory."""
    lease_s: float
    """Nothing is copied for it after this long, whatever is heard."""


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """To every rank: acknowledged, failed or cancelled. Nothing more is written."""

    number: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A connector's first words."""

    rank: int
    role: str
    """`worker` or `scheduler`."""
    is_exporting: bool = True
    """False: its heads are exported by another rank."""
    num_blocks: int = 0
    """Of a worker's pool."""
    copy_costs: CopyCosts | None = None
    """Of a worker that exports."""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """From rank 0's scheduler: the first step is about to run."""

    number: int
    cached_tokens: int
    """Which the engine's prefix cache has."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The rank knows of the export."""

    number: int
    rank: int


class LayersReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The rank's heads of layers [first_layer, end_layer) of a piece are in the staging memory."""

    number: int
    rank: int
    first_layer: int
    end_layer: int
    first_token: int
    end_token: int


class Released(msgspec.Struct, frozen=True, tag="released"):
    """No copy of the rank's is under way for the export any more."""

    number: int
    rank: int


class ExportFailed(msgspec.Struct, frozen=True, tag="failed"):
    number: int
    rank: int
    message: str


ToRank = Export | Settled
FromRank = Hello | Opened | Started | LayersReady | Released | ExportFailed

_TO_RANK = msgspec.msgpack.Decoder(ToRank)
_FROM_RANK = msgspec.msgpack.Decoder(FromRank)
_ENCODER = msgspec.msgpack.Encoder()


class RankHub:
    """The prefill worker's end. One thread reads what all ranks say; `tell` may be called from any."""

    def __init__(self, name: str, told: Callable[[FromRank], None], lost: Callable[[str], None]) -> None:
        """`name` is its socket's. `told` gets every message but Hello, `lost` why a rank is gone: both from
        the hub's thread."""
        self._told = told
        self._lost = lost
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_abstract(name))
        self._listener.listen(128)
        self._changed = threading.Condition()
        self._members: dict[socket.socket, Hello | None] = {}
        self._is_closed = False
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._read_all, name="rank-hub", daemon=True)
        self._thread.start()

    def wait_for(self, num_ranks: int, timeout_s: float) -> list[Hello]:
        """The workers' words once all ranks are there, and rank 0's scheduler. Raises ChannelError."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                known = [hello for hello in self._members.values() if hello is not None]
                workers = [hello for hello in known if hello.role == "worker"]
                if len(workers) == num_ranks and len(known) == num_ranks + 1:
                    return sorted(workers, key=lambda hello: hello.rank)
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    ranks = sorted(hello.rank for hello in workers)
                    raise ChannelError(
                        f"after {timeout_s:g} s ranks {ranks} of {num_ranks} have loaded the connector; the "
                        "engine's log says why the others have not"
                    )
                self._changed.wait(remaining_s)

    def tell(self, message: ToRank) -> None:
        """To all ranks. One that is gone, or has not read for so long that nothing more fits, is reported by
        `lost`."""
        packet = _ENCODER.encode(message)
        with self._changed:
            members = list(self._members)
        for member in members:
            try:
                member.send(packet)
            except OSError:
                # Whoever misses a word of ours cannot be relied on: the reader finds an end of file.
                with contextlib.suppress(OSError):
                    member.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_closed = True
        self._waker.send(b"x")
        self._thread.join()
        for member in (*self._members, self._listener, self._waker, self._wakened):
            member.close()

    def _read_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakened, selectors.EVENT_READ)
            while not self._is_closed:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        member, _ = self._listener.accept()
                        if not _is_own_user(member):
                            member.close()
                            continue
                        member.settimeout(_SEND_TIMEOUT_S)
                        with self._changed:
                            self._members[member] = None
                        selector.register(member, selectors.EVENT_READ)
                    elif key.fileobj is not self._wakened:
                        assert isinstance(key.fileobj, socket.socket)
                        if not self._read(key.fileobj):
                            selector.unregister(key.fileobj)

    def _read(self, member: socket.socket) -> bool:
        """False: it is gone."""
        try:
            packet = member.recv(_MAX_MESSAGE_BYTES)
            message = _FROM_RANK.decode(packet) if packet else None
        except (OSError, msgspec.DecodeError):
            message = None
        if message is None:
            with self._changed:
                hello = self._members.pop(member, None)
            member.close()
            if not self._is_closed:
                self._lost("a process" if hello is None else f"the {hello.role} of rank {hello.rank}")
            return False
        if isinstance(message, Hello):
            with self._changed:
                self._members[member] = message
                self._changed.notify_all()
        else:
            self._told(message)
        return True


class RankClient:
    """A connector's end: knows the exports that are under way. Any thread."""

    def __init__(
        self,
        settings: ExportSettings,
        hello: Hello,
        on_settled: Callable[[int], None] | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """`on_settled` is told of each export that ended, once `export` no longer knows it; `on_lost`, behind
        all of these, that the worker is gone. Raises ChannelError."""
        self.rank = hello.rank
        self._on_settled = on_settled
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._exports: dict[int, Export] = {}
        self._lease_ends: dict[int, float] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(_abstract(settings.socket_name))
        except OSError as error:
            self._socket.close()
            raise ChannelError(f"the prefill worker is gone: {settings.socket_name}: {error}") from error
        self.tell(hello)
        self._thread = threading.Thread(target=self._read_all, name="rank-client", daemon=True)
        self._thread.start()

    def export(self, number: int) -> Export | None:
        """None: unknown, settled, or its lease is over."""
        with self._lock:
            return self._exports.get(number)

    def tell(self, message: FromRank) -> None:
        """A worker that is gone hears nothing, and needs nothing."""
        with contextlib.suppress(OSError):
            self._socket.send(_ENCODER.encode(message))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _read_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while True:
                if selector.select(_LEASE_PERIOD_S):
                    try:
                        packet = self._socket.recv(_MAX_MESSAGE_BYTES)
                    except OSError:
                        packet = b""
                    if not packet:
                        break
                    self._hear(_TO_RANK.decode(packet))
                self._end_leases()
        for number in list(self._exports):
            self._settle(number)
        if self._on_lost is not None:
            self._on_lost()

    def _hear(self, message: ToRank) -> None:
        if isinstance(message, Settled):
            self._settle(message.number)
            return
        with self._lock:
            self._exports[message.number] = message
            self._lease_ends[message.number] = time.monotonic() + message.lease_s
        self.tell(Opened(message.number, self.rank))

    def _end_leases(self) -> None:
        now_s = time.monotonic()
        for number in [number for number, end_s in self._lease_ends.items() if end_s < now_s]:
            self._settle(number)

    def _settle(self, number: int) -> None:
        with self._lock:
            self._exports.pop(number, None)
            self._lease_ends.pop(number, None)
        # Of one that is not known, too: whoever settles waits to hear that it is released.
        if self._on_settled is not None:
            self._on_settled(number)


def _abstract(name: str) -> str:
    return f"\0{name}"


def _is_own_user(peer: socket.socket) -> bool:
    """Such a socket has no permissions: whoever reads its name may connect."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user_id, _ = _CREDENTIALS.unpack(credentials)
    return bool(user_id == os.geteuid())
