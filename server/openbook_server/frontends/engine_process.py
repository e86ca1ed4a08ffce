"""The engine: what `openbook serve` runs without front ends, with front ends in the place of a port."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

from openbook_server.config import ServerConfig
from openbook_server.frontends.child import Supervised, run, told_to_stop
from openbook_server.frontends.relay import Relay
from openbook_server.listening import Handlers, Listener, max_calls, max_wire_bytes
from openbook_server.metrics import Metrics
from openbook_server.priority import put_loop_first
from openbook_server.rpc import Refusal
from openbook_server.serving import running_server, stop_loading


class _FrontEnds:
    """A `Listener` whose calls front ends forward."""

    def __init__(self, relay: Relay, supervised: Supervised) -> None:
        self._relay, self._supervised = relay, supervised
        self.port = supervised.orders.config.port  # theirs

    def report(self, metrics: Metrics) -> None:
        relay, supervised = self._relay, self._supervised
        metrics.observe_calls(relay.calls)
        metrics.observe_front_ends(relay, lambda: supervised.restarts)

    def refuse(self, refusal: Refusal) -> None:
        self._relay.refusal = refusal

    async def serving(self, name: str, state: str) -> None:
        self._relay.tell(ready=True)
        self._supervised.say(serving=True, name=name, state=state)

    async def stop(self, grace: float) -> None:
        self._relay.tell(ready=False)
        await self._relay.stop(grace)


async def main(supervised: Supervised) -> None:
    """Serve until SIGTERM, then drain; one before it serves stops at once."""
    put_loop_first()
    orders = supervised.orders
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop_loading)

    async def listen(handlers: Handlers, config: ServerConfig) -> Listener:
        relay = Relay(handlers, max_calls=max_calls(config), max_message_bytes=max_wire_bytes(config))
        await relay.listen(socket.socket(fileno=orders.listening))
        return _FrontEnds(relay, supervised)

    async with running_server(orders.bundle, orders.knowledge_base, orders.config, listen):
        await told_to_stop().wait()


if __name__ == "__main__":
    sys.exit(run(main))
