"""A front: a process with a gRPC server, its event loop and a frontend of each model. `deploy.fronts` starts and watches it.

It talks to its parent over an inherited socket. It sends {"serving"} once, and a few times a second, from the loop that serves,
{"lost"}: which of its engines it cannot reach. It receives {"drain"}, or {"give_way"} when another front has taken its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.deploy import runtime
from expertwire.deploy.grpc.catalog import open_catalog
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.grpc.event_loop import GrpcEventLoop
from expertwire.deploy.grpc.memory import Memory
from expertwire.deploy.grpc.security import Security
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.grpc.server_info import ServerInfo
from expertwire.engine import process
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.cascade_legs import CascadePolicy
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.strategies.cascade import Cascade
from expertwire.strategies.decision_log import DecisionLog

NOTHING = np.zeros(0, np.uint8)
# Time for which the loop waits, whenever it goes on, for a thread that computes; by default it is ten times that.
_SWITCH_S = 0.5e-3


@dataclass(frozen=True, kw_only=True)
class FrontArgs:
    """Arguments of a front.

    Args:
        engines: options of each model's engine, of which the model's folder counts.
        controllers: descriptors of the sockets to the controllers, of the engines in their order.
        failed: by name, why further models cannot serve.
        cascades: policies over the models, by name.
        server: the server's options, with the port that all fronts share.
        parent: descriptor of the socket to the parent.
    """

    engines: tuple[EngineConfig, ...]
    controllers: tuple[int, ...]
    failed: dict[str, str]
    cascades: dict[str, Cascade]
    server: ServerConfig
    parent: int


def front_main(args: FrontArgs) -> None:
    """Serve until the parent asks to drain or to give way, or closes the lifeline; entry point of the process."""
    faulthandler.register(signal.SIGUSR1)  # the parent asks for the stacks of a front that it kills
    process.raise_descriptor_limit()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("expertwire").setLevel(args.server.log_level.upper())
    parent = SocketChannel(socket.socket(fileno=args.parent))
    with contextlib.ExitStack() as stack:
        frontends = []
        for engine, controller in zip(args.engines, args.controllers, strict=True):
            tokenizer = runtime.open_tokenizer(engine)
            if tokenizer is not None:
                _ = tokenizer.vocabulary_text  # now, and not when a request's strategy first needs it
            to_controller = SocketChannel(socket.socket(fileno=controller))
            frontend = Frontend(to_controller, tokenizer, watches=True)
            frontends.append(stack.enter_context(contextlib.closing(frontend)))
        memory = Memory()
        sys.setswitchinterval(_SWITCH_S)
        with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
            runner.run(_serve(args, frontends, parent, memory))


async def _serve(args: FrontArgs, frontends: Sequence[Frontend], parent: SocketChannel, memory: Memory) -> None:
    config, stop, loop = args.server, asyncio.Event(), asyncio.get_running_loop()
    gives_way = False

    def listen_to_parent() -> None:
        nonlocal gives_way
        try:
            if (message := parent.recv(0)) is None:
                return
            gives_way = "give_way" in message
        except ChannelClosed:
            pass
        loop.remove_reader(parent.fileno())
        stop.set()

    def beat() -> None:
        if not parent.pending:
            lost = [number for number, frontend in enumerate(frontends) if frontend.failure is not None]
            with contextlib.suppress(ChannelClosed):
                parent.send({"lost": np.array(lost, np.int32)})
        memory.tend(server.num_calls)

    loop.add_reader(parent.fileno(), listen_to_parent)
    security = Security.open(config)
    catalog = open_catalog(config.strategies, config.services(), config.verifier_ca_certs)
    with process.batch_threads():
        server = Server(config.host, config.port, config.limits, credentials=security.credentials(), shares_port=True)
    pairs = list(zip(args.engines, frontends, strict=True))
    texts = [TextWorkers(frontend, engine.model) for engine, frontend in pairs]
    log = None if config.decision_log is None else DecisionLog(config.decision_log)
    refreshing = asyncio.create_task(security.keep_fresh())
    try:
        await server.serve(
            frontends[0],
            authenticator=security.authenticator(),
            stop=stop,
            gives_way=lambda: gives_way,
            drain_timeout_s=config.drain_timeout_s,
            texts=texts[0],
            others=list(zip(frontends, texts, strict=True))[1:],
            failed=args.failed,
            cascades={
                name: CascadePolicy(cascade=cascade, verifier=catalog.verifiers.get(cascade.verifier or ""))
                for name, cascade in args.cascades.items()
            },
            decision_log=log,
            info=ServerInfo([(engine, frontend.model_info) for engine, frontend in pairs], config),
            catalog=catalog,
            on_ready=lambda: parent.send({"serving": NOTHING}),
            on_beat=beat,
        )
    finally:
        for each in texts:
            each.close()
        refreshing.cancel()
        if log is not None:
            log.close()
