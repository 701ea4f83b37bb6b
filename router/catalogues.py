"""The catalogues that this router knows: found for requests, compiled from uploads, handed to workers."""

import asyncio
import difflib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from cluster.catalogue.file import Catalogue
from cluster.catalogue.file_format import CatalogueFileError, read_preamble
from cluster.catalogue.store import CatalogueInfo, CatalogueStore, ConflictError, UnknownCatalogueError
from cluster.config import CatalogueConfig
from cluster.messages import CatalogueRef, Record
from cluster.model_card import ServedModel
from router.catalogue_names import MAX_NAME_CHARS, NAME_PATTERN
from router.compile_messages import CompileJob
from router.errors import RequestError, invalid, unavailable

ALL_INTERFACES = ("0.0.0.0", "::", "")  # noqa: S104 - what is recognised, not bound
MAX_KEPT_FACTS = 256
MAX_NAMED = 5
_NAME = re.compile(NAME_PATTERN)

_log = logging.getLogger(__name__)


class CatalogueFacts(Record, frozen=True, kw_only=True):
    """What a router needs to know of a catalogue's served version."""

    ref: CatalogueRef
    num_items: int
    num_nodes: int
    max_item_tokens: int
    """Of the longest item's text."""
    kinds: dict[str, Literal["number", "text"]]
    """Of the attributes, by name."""
    fingerprint: str
    """Of the model that it was compiled for."""
    created_unix_s: int

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self.kinds)


class _FileFacts(Record, frozen=True, kw_only=True):
    max_item_tokens: int
    kinds: dict[str, Literal["number", "text"]]


class Catalogues:
    def __init__(
        self,
        folder: Path,
        served: ServedModel,
        config: CatalogueConfig,
        fetch_address: Callable[[], str],
    ) -> None:
        """`fetch_address`: where this router's gRPC is, once it is. Raises OSError."""
        self.folder = folder
        self._served = served
        self._config = config
        self._fetch_address = fetch_address
        self._store = CatalogueStore(folder)
        self._facts: OrderedDict[str, _FileFacts] = OrderedDict()

    async def find(self, tenant: str, name: str, param: str = "catalogue") -> CatalogueFacts:
        """The version served now; `param` is the field that names it. Raises RequestError: 404 that names the
        nearest."""
        check_name(name, param)
        try:
            info = self._store.get(name, tenant)
            return self._facts_of(info)
        except (UnknownCatalogueError, FileNotFoundError):
            # The second: a version removed between the two reads has a successor, or none.
            raise await self._not_found(tenant, name, param) from None
        except (OSError, CatalogueFileError) as error:
            message = f"catalogue `{name}` cannot be read: {error}"
            raise unavailable(message, code="catalogue_damaged") from None

    async def phrases(self, tenant: str, name: str | None) -> CatalogueRef | None:
        """Of a request's `phrases`; None, too, where the catalogue cannot be read: they only speed it up.

        Raises RequestError as `find` and `check_model` do.
        """
        if name is None:
            return None
        try:
            facts = await self.find(tenant, name, "phrases")
        except RequestError as error:
            if error.status < 500:
                raise
            _log.warning("a request goes on without its phrases: %s", error.message)
            return None
        self.check_model(facts, "phrases")
        return facts.ref

    def check_model(self, facts: CatalogueFacts, param: str = "catalogue") -> None:
        """Raises RequestError for one that was compiled for another model."""
        card = self._served.card
        if facts.fingerprint != card.fingerprint:
            message = f"catalogue `{facts.ref.name}` was compiled for another model than {card.name!r}: "
            code = "catalogue_of_another_model"
            raise RequestError(409, message + "upload it again", param=param, code=code)

    async def all_of(self, tenant: str) -> list[CatalogueFacts]:
        """By name. Raises RequestError."""
        try:
            return await asyncio.to_thread(
                lambda: [self._facts_of(info) for info in self._store.list(tenant)]
            )
        except (OSError, CatalogueFileError) as error:
            raise unavailable(f"the catalogues cannot be read: {error}", code="catalogue_damaged") from None

    async def delete(self, tenant: str, name: str) -> None:
        """Raises RequestError."""
        try:
            await asyncio.to_thread(self._store.delete, name, tenant)
        except UnknownCatalogueError:
            raise await self._not_found(tenant, name) from None
        except ConflictError:
            raise upload_under_way(name) from None

    async def check_room(self, tenant: str, name: str) -> None:
        """Raises RequestError for a new name where there are as many as may be."""
        limit = self._config.max_catalogues

        def is_full() -> bool:
            try:
                self._store.get(name, tenant)
            except UnknownCatalogueError:
                return sum(1 for _ in self.folder.glob("[!.]*/[!.]*/")) >= limit
            return False

        if await asyncio.to_thread(is_full):
            message = f"{limit} catalogues are here already; delete one, or raise `catalogue.max_catalogues`"
            raise invalid("catalogue", message, code="too_many_catalogues")

    def file_of(self, name: str, version: int, checksum: str) -> Path | None:
        """Any tenant's: who knows the checksum was told it by a router."""
        if _NAME.fullmatch(name) is None or not checksum:
            return None
        for path in self.folder.glob(f"*/{name}/v{version}-*"):
            try:
                if read_preamble(path).checksum == checksum:
                    return path
            except (OSError, CatalogueFileError):
                continue
        return None

    def compile_job(
        self, tenant: str, name: str, upload: Path, *, upload_format: Literal["jsonl", "csv"], skip_bad: bool
    ) -> CompileJob:
        """Raises RequestError for a model that has no end of text, OSError."""
        card = self._served.card
        if not card.eos_token_ids:
            raise invalid(None, f"the model {card.name!r} has no end of text: items cannot end")
        return CompileJob(
            upload=str(upload),
            upload_format=upload_format,
            skip_bad=skip_bad,
            max_items=self._config.max_items,
            folder=str(self.folder),
            tenant=tenant,
            name=name,
            tokenizer_json=self._served.tokenizer_json.decode(),
            end_token=end_token_of(self._served),
            fingerprint=card.fingerprint,
        )

    def _facts_of(self, info: CatalogueInfo) -> CatalogueFacts:
        of_file = self._facts.get(info.ref.checksum)
        if of_file is None:
            of_file = self._facts[info.ref.checksum] = _read_facts(Path(info.ref.path))
            while len(self._facts) > MAX_KEPT_FACTS:
                self._facts.popitem(last=False)
        return CatalogueFacts(
            ref=msgspec.structs.replace(info.ref, fetch_address=self._fetch_address()),
            num_items=info.num_items,
            num_nodes=info.num_nodes,
            max_item_tokens=of_file.max_item_tokens,
            kinds=of_file.kinds,
            fingerprint=info.fingerprint,
            created_unix_s=int(info.created_unix_s),
        )

    async def _not_found(self, tenant: str, name: str, param: str = "catalogue") -> RequestError:
        names = [info.ref.name for info in await asyncio.to_thread(self._store.list, tenant)]
        near = difflib.get_close_matches(name, names, n=MAX_NAMED, cutoff=0.0)
        hint = f"the nearest are {', '.join(f'`{one}`' for one in near)}" if near else "there is none yet"
        message = f"the catalogue `{name}` does not exist; {hint}"
        return RequestError(404, message, param=param, code="catalogue_not_found")


def check_name(name: str, param: str = "catalogue") -> None:
    """Raises RequestError."""
    if _NAME.fullmatch(name) is None:
        raise invalid(
            param,
            f"`{param}`: {name[:80]!r} cannot name a catalogue: 1 to {MAX_NAME_CHARS} of a-z, 0-9, dot, dash "
            "and underscore, a letter or digit first",
            code="invalid_value",
        )


def upload_under_way(name: str) -> RequestError:
    message = f"an upload of `{name}` is under way; try again when it has ended"
    return RequestError(409, message, param="name", code="upload_under_way")


def end_token_of(served: ServedModel) -> int:
    """What follows an item's text: the model's own end where its card names one, else the first there is."""
    card = served.card
    tokens = msgspec.json.decode(served.tokenizer_json).get("added_tokens") or ()
    named = next((token["id"] for token in tokens if token["content"] == card.eos_token), None)
    return named if named in card.eos_token_ids else card.eos_token_ids[0]


def reachable_host(host: str) -> str:
    """Listening on all interfaces is no address to call: this machine's own stands for it."""
    if host in ALL_INTERFACES:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _read_facts(path: Path) -> _FileFacts:
    catalogue = Catalogue.open(path, verify=False)
    kinds: dict[str, Literal["number", "text"]] = dict.fromkeys(catalogue.attributes, "number")
    kinds |= {column.name: column.kind for column in catalogue.header.columns}
    # The root counts in the height, and no end of text does.
    return _FileFacts(max_item_tokens=int(catalogue.trie.height[0]) - 1, kinds=kinds)
