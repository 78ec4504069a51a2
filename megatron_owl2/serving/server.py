"""The process of a server: its socket, its event loop, its signals and its end.

Under torchrun rank 0 serves and the other ranks follow it, all with a share of the weights.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import torch
import uvicorn

from megatron_owl2.errors import ServingError
from megatron_owl2.inference.loading import LoadedModel
from megatron_owl2.inference.scheduler import Scheduler
from megatron_owl2.serving import engine_loop
from megatron_owl2.serving.app import build_app
from megatron_owl2.serving.engine import Engine
from megatron_owl2.serving.engine_loop import Inbox, RankSource
from megatron_owl2.serving.fetch import ImageFetcher
from megatron_owl2.serving.limits import Limits
from megatron_owl2.serving.service import Service

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKSTOP_SECONDS = 10  # for connections that are open after all requests have ended

logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises ServingError if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        return bound
    except (OSError, OverflowError) as error:
        reason = f"{error}; choose another --host or --port"
        raise ServingError(f"{host}:{port} cannot be listened on: {reason}") from None


def build_service(
    loaded: LoadedModel,
    *,
    name: str,
    limits: Limits,
    fetcher: ImageFetcher | None = None,
    scheduler: Scheduler | None = None,
) -> Service:
    """The service of a loaded model, alone or on rank 0, while the other ranks `follow`.

    `scheduler` is one within `limits` unless given.
    """
    inbox = Inbox()
    source = inbox if torch.distributed.get_world_size() == 1 else RankSource(inbox)
    engine = Engine(scheduler or _scheduler(loaded, limits), source, inbox)
    return Service(loaded, engine, name=name, limits=limits, fetcher=fetcher)


def serve(service: Service, bound: socket.socket) -> None:
    """Answer requests on a bound socket until SIGTERM or SIGINT, which let those that are open end.

    Raises ServingError if the engine fails.
    """
    asyncio.run(_serve(service, bound))
    if failure := service.engine.failure:
        message = f"the engine failed: {type(failure).__name__}: {failure}"
        raise ServingError(message) from failure


def follow(loaded: LoadedModel, *, limits: Limits) -> None:
    """Make the calls that rank 0 makes, on another rank, until it ends; signals are rank 0's."""
    for kind in _SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
    engine_loop.run(_scheduler(loaded, limits), RankSource(None))


def _scheduler(loaded: LoadedModel, limits: Limits) -> Scheduler:
    return Scheduler(loaded, limits.max_batch, limits.max_positions)


class _Server(uvicorn.Server):
    """uvicorn, whose signals are this module's: it would end by the signal, not with code 0."""

    def __init__(self, config: uvicorn.Config, name: str):
        super().__init__(config)
        self._name = name

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or ():
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            logger.info("%s is served at http://%s:%d", self._name, shown, port)


async def _serve(service: Service, bound: socket.socket) -> None:
    limits = service.limits
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=int(limits.grace_seconds) + _BACKSTOP_SECONDS,
    )
    server = _Server(config, service.name)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread, as in tests
        for kind in _SIGNALS:
            loop.add_signal_handler(kind, service.end)
    service.start(on_end=lambda: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[bound])
    finally:
        await service.stop()
