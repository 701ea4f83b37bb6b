"""The classes that Serve runs: each builds its part, keeps it registered, and ends it in order."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.block_changes import BlockChanges
from cluster.config import HeadraceConfig
from cluster.ids import ChainHash, Epoch, new_worker_id
from cluster.kv_layout import KvLayout
from cluster.membership import LeaseKeeper, WorkerDirectory
from cluster.messages import PROTOCOL_VERSION, Role, WorkerAddress, WorkerStatus
from cluster.model_card import ServedModel
from cluster.placement.predict import PlacementCosts
from cluster.placement.redis_store import RedisPlacementStore, connect
from cluster.placement.store import WorkerIdentity
from cluster.transfer.host_id import host_id
from headrace.alone import alone
from headrace.run_folder import RunFolder, default_run_folder
from router.app import Router

_WORKER_STORE_TIMEOUT_S = 1.0
_RUN_FOLDER = RunFolder(default_run_folder())
_MEASURING_LOCK = _RUN_FOLDER.measuring_lock


class UnhealthyError(RuntimeError):
    """Told to Serve, which replaces the replica."""


def _store(
    config: HeadraceConfig, served: ServedModel, redis_url: str, op_timeout_s: float
) -> RedisPlacementStore:
    return RedisPlacementStore(
        connect(redis_url),
        served.card.name,
        block_ttl_s=config.placement.block_ttl_s,
        op_timeout_s=op_timeout_s,
    )


class RouterReplica:
    """The ingress. `workers` are the handles that tie the deployments into one application."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self,
        config: HeadraceConfig,
        served: ServedModel,
        redis_url: str,
        kv_bytes_per_token: int,
        *workers: object,
    ) -> None:
        del workers
        self._store = _store(config, served, redis_url, config.placement.lookup_timeout_s)
        self._directory_store = _store(config, served, redis_url, _WORKER_STORE_TIMEOUT_S)
        self._directory = WorkerDirectory(self._directory_store)
        costs = PlacementCosts(kv_bytes_per_token=kv_bytes_per_token)
        folder = config.catalogue.folder
        self._router = Router(
            served,
            config,
            self._store,
            self._directory,
            catalogue_folder=_RUN_FOLDER.catalogues if folder is None else Path(folder),
            costs=costs,
        )
        await self._directory.start()
        await self._router.start()

    def __serve_build_asgi_app__(self) -> Any:
        return self._router.asgi

    async def __del__(self) -> None:
        await self._router.stop()
        await self._directory.stop()
        await self._store.close()
        await self._directory_store.close()


class _Membership:
    """A worker's lease and the store behind it."""

    def __init__(
        self,
        config: HeadraceConfig,
        served: ServedModel,
        redis_url: str,
        *,
        role: Role,
        grpc_address: str,
        layout: KvLayout,
        index_block_tokens: int,
        status: Callable[[], WorkerStatus],
        on_epoch: Callable[[WorkerAddress], None] | None = None,
        drain_blocks: Callable[[], BlockChanges] | None = None,
        all_blocks: Callable[[], Sequence[ChainHash]] | None = None,
    ) -> None:
        self._store = _store(config, served, redis_url, _WORKER_STORE_TIMEOUT_S)
        self._keeper = LeaseKeeper(
            self._store,
            WorkerIdentity(
                worker_id=new_worker_id(role),
                role=role,
                model=served.card.name,
                grpc_address=grpc_address,
                host_id=host_id(),
                protocol_version=PROTOCOL_VERSION,
                layout_fingerprint=layout.fingerprint,
                block_size_tokens=index_block_tokens,
            ),
            status,
            ttl_s=config.placement.lease_ttl_s,
            block_refresh_s=config.placement.block_ttl_s / 3,
            on_epoch=on_epoch,
            drain_blocks=drain_blocks,
            all_blocks=all_blocks,
        )

    async def start(self) -> None:
        await self._keeper.start()

    async def stop(self) -> None:
        """Give the lease back first: routers then send nothing more."""
        await self._keeper.stop()
        await self._store.close()


class PrefillReplica:
    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, config: HeadraceConfig, served: ServedModel, redis_url: str, host: str, artifact: str | None
    ) -> None:
        from headrace.build import prefill_worker

        built = await asyncio.to_thread(prefill_worker, config, served, host, artifact)
        self._worker = built.worker
        async with alone(_MEASURING_LOCK):
            bound_host, port = await self._worker.start()
        self._membership = _Membership(
            config,
            served,
            redis_url,
            role="prefill",
            grpc_address=f"{bound_host}:{port}",
            layout=built.layout,
            index_block_tokens=self._worker.index_block_tokens,
            status=self._worker.status,
            drain_blocks=self._worker.drain_block_changes,
            all_blocks=self._worker.all_block_hashes,
        )
        await self._membership.start()

    async def check_health(self) -> None:
        """Of progress: a worker whose engine is stuck answers calls like a sound one."""
        if not self._worker.is_healthy():
            raise UnhealthyError("the prefill engine makes no progress")

    async def __del__(self) -> None:
        await self._membership.stop()
        await self._worker.stop()


class DecodeReplica:
    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, config: HeadraceConfig, served: ServedModel, redis_url: str, host: str, artifact: str | None
    ) -> None:
        from headrace.build import decode_worker

        self._epoch = Epoch(0)
        self._worker = await asyncio.to_thread(
            decode_worker,
            config,
            served,
            host,
            artifact,
            lambda: self._epoch,
            _RUN_FOLDER.fetched_catalogues,
        )
        async with alone(_MEASURING_LOCK):
            grpc_address = await self._worker.start()
        self._membership = _Membership(
            config,
            served,
            redis_url,
            role="decode",
            grpc_address=grpc_address,
            layout=self._worker.layout,
            index_block_tokens=self._worker.layout.block_size_tokens,
            status=self._worker.status,
            on_epoch=self._set_epoch,
            drain_blocks=self._worker.drain_block_changes,
            all_blocks=self._worker.all_block_hashes,
        )
        await self._membership.start()

    def _set_epoch(self, address: WorkerAddress) -> None:
        self._epoch = address.epoch

    async def check_health(self) -> None:
        if fault := self._worker.health_fault():
            raise UnhealthyError(fault)

    async def __del__(self) -> None:
        await self._membership.stop()
        await self._worker.stop()
