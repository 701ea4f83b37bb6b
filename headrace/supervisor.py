"""The long-lived process behind `headrace up`: starts Redis, Ray and the application, and ends them all.

Run as `python -m headrace.supervisor`, in a session of its own, with a `Launch` as one line of JSON on its
standard input. Progress and addresses go to the run folder's state file, all else to standard error.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from cluster.config import HeadraceConfig
from cluster.placement.embedded import EmbeddedRedis, EmbeddedRedisError
from headrace import environment
from headrace.execution import ExecutionError
from headrace.ports import PortTakenError, internal_ports
from headrace.prepare import Prepared, prepare
from headrace.probe import NotServingError, generate_one_token, wait_until_ready
from headrace.processes import cluster_processes, is_alive, kill_all
from headrace.redis_check import RedisUnusableError, check_redis
from headrace.run_folder import ERROR, LOG, RunFolder
from headrace.sizing import SizingError, gpus_per_worker
from headrace.state_report import StateReport
from megakernel.manifest import ArtifactError
from megakernel.model.weights import ModelFormatError

EXIT_UNUSABLE = 2
"""What was asked for cannot run here; `RunFolder.error` says why."""
STOP_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 80 * 1024 * 1024
_WATCH_INTERVAL_S = 1.0

_UNUSABLE = (
    NotServingError,
    ModelFormatError,
    ArtifactError,
    ExecutionError,
    SizingError,
    EmbeddedRedisError,
    RedisUnusableError,
    PortTakenError,
)
"""Their messages say all there is to say."""

_log = logging.getLogger("headrace")


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    config: HeadraceConfig
    """With concrete ports."""
    is_attached: bool
    """Whether to end when standard input does: when the command that started us is gone."""
    lock_descriptor: int
    """Inherited: the run folder's lock, held by this process alone once its parent has let go."""


class StopRequestedError(Exception):
    """A signal arrived while starting."""


class Supervisor:
    def __init__(self, folder: RunFolder, config: HeadraceConfig) -> None:
        self._folder = folder
        self._config = config
        self._stop = threading.Event()
        self._is_starting = True
        self._redis: EmbeddedRedis | None = None
        self._report = StateReport(folder, config)

    def request_stop(self, signum: int | None = None, frame: FrameType | None = None) -> None:
        """Also a signal handler; raises StopRequestedError out of whatever the main thread is starting."""
        del frame
        was_starting, self._is_starting = self._is_starting, False
        self._stop.set()
        if signum is not None and was_starting:
            raise StopRequestedError

    def start(self) -> None:
        """Raises what `_UNUSABLE` lists, or what Ray raises."""
        config = self._config
        with ThreadPoolExecutor(max_workers=2) as pool:
            with self._report.phase("redis"):
                redis_url = pool.submit(self._redis_url)
                # A compiler may run for long: beside Ray's start.
                preparing = pool.submit(prepare, config, self._show_progress)
            with self._report.phase("ray"):
                self._start_ray()
                self._catch_signals()  # Ray has set its own
            with self._report.phase("compile"):
                self._report.prepared = prepared = preparing.result()
            with self._report.phase("deploy"):
                self._deploy(prepared, redis_url.result())
        with self._report.phase("answer"):
            http_url = self._report.state.http_url
            wait_until_ready(http_url)
            generate_one_token(http_url, prepared.served.card.name)
        self._is_starting = False
        self._report.write("ready")
        _log.info("ready: %s", json.dumps(self._report.phase_seconds))

    def serve(self) -> None:
        """Until a stop is requested. Raises NotServingError where Ray is gone."""
        ray_parts = [
            process
            for process in psutil.Process().children()
            if process.name().startswith(("raylet", "gcs_server"))
        ]
        has_redis = True
        while not self._stop.wait(_WATCH_INTERVAL_S):
            if dead := [process for process in ray_parts if not is_alive(process)]:
                raise NotServingError(
                    f"Ray has ended by itself ({', '.join(str(part.pid) for part in dead)})"
                )
            if self._redis is not None and has_redis and not self._redis.is_alive():
                has_redis = False
                _log.error("the embedded Redis has ended; placement goes on by load alone")

    def stop(self, *, keep_log: bool) -> None:
        """End everything and leave nothing; by force once STOP_TIMEOUT_S is over."""
        self._is_starting = False
        force = threading.Timer(STOP_TIMEOUT_S, self._stop_by_force)
        force.daemon = True
        force.start()
        self._report.write("stopping")
        for end in (_end_ray, self._close_redis):
            try:
                end()
            except Exception:  # noqa: BLE001 - whatever fails, the rest must still end
                _log.exception("while stopping")
        force.cancel()
        self._remove_leftovers(keep_log=keep_log)

    def _stop_by_force(self) -> None:
        _log.error("did not stop within %s s; killing what is left", STOP_TIMEOUT_S)
        self._remove_leftovers(keep_log=True)
        os._exit(1)

    def _remove_leftovers(self, *, keep_log: bool) -> None:
        left = kill_all(lambda: cluster_processes(os.getsid(0), self._folder.sockets))
        for process in left:
            _log.error("process %d does not end", process.pid)
        self._folder.remove(keep=(LOG, ERROR) if keep_log else ())

    def _close_redis(self) -> None:
        if self._redis is not None:
            self._redis.close()

    def _show_progress(self, what: str, fraction: float) -> None:
        """Of the model's compilation, from its own thread; ends it once a stop is requested."""
        if self._stop.is_set():
            raise StopRequestedError
        self._report.show_progress(what, fraction)

    def _redis_url(self) -> str:
        configured = self._config.placement.redis_url
        if configured is not None:
            check_redis(configured)
            return configured
        folder = self._folder.sockets / "redis"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._redis = EmbeddedRedis(directory=folder)
        self._report.redis_url = self._redis.url
        return self._redis.url

    def _start_ray(self) -> None:
        environment.apply(self._folder.sockets, internal_ports())
        import ray  # reads the environment when imported

        ray.init(
            address="local",
            num_cpus=max(2, psutil.cpu_count() or 2),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            namespace="headrace",
            _temp_dir=str(self._folder.sockets / "ray"),
        )

    def _deploy(self, prepared: Prepared, redis_url: str) -> None:
        import ray

        from headrace.deploy import Workload, deploy  # imports Serve: after `apply`

        num_gpus = ray.cluster_resources().get("GPU", 0.0)
        deploy(
            Workload(
                config=prepared.config,
                served=prepared.served,
                artifacts=prepared.artifacts,
                redis_url=redis_url,
                kv_bytes_per_token=prepared.kv_bytes_per_token,
                gpus_per_worker=gpus_per_worker(num_gpus, prepared.config),
            )
        )

    def _catch_signals(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self.request_stop)


def _end_ray() -> None:
    if "ray" not in sys.modules:
        return
    import ray

    if not ray.is_initialized():
        return
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def _stop_at_end_of_input(stop: Callable[[], object]) -> None:
    """Attached: the other end of our standard input lives as long as the terminal's command does."""

    def wait() -> None:
        os.read(0, 1)
        stop()

    threading.Thread(target=wait, name="input", daemon=True).start()


def run(launch: Launch, folder: RunFolder) -> int:
    """Returns the exit status."""
    supervisor = Supervisor(folder, launch.config)
    supervisor._catch_signals()
    if launch.is_attached:
        _stop_at_end_of_input(lambda: os.kill(os.getpid(), signal.SIGTERM))
    status = 0
    try:
        supervisor.start()
        supervisor.serve()
    except StopRequestedError:
        _log.info("stopped while starting")
    except _UNUSABLE as error:
        _log.error("%s", error)
        folder.write_error(str(error))
        status = EXIT_UNUSABLE
    except Exception:  # noqa: BLE001 - whatever failed, what was started must end
        _log.exception("the cluster did not start")
        status = 1
    supervisor.stop(keep_log=status != 0)
    return status


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with open(0, "rb", buffering=0, closefd=False) as standard_input:
        launch = msgspec.json.decode(standard_input.readline(), type=Launch)
    os.set_inheritable(launch.lock_descriptor, False)
    return run(launch, RunFolder(Path(os.environ["HEADRACE_HOME"])))


if __name__ == "__main__":
    sys.exit(main())
