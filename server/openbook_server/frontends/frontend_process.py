"""A front end: a share of the port's connections, and the health service; everything else is forwarded to the engine."""

from __future__ import annotations

import asyncio
import sys

from openbook_server.frontends.child import Supervised, run, told_to_stop
from openbook_server.frontends.link import Link
from openbook_server.listening import Port, max_wire_bytes


async def main(supervised: Supervised) -> None:
    """Forward until SIGTERM, then drain."""
    stop, orders = told_to_stop(), supervised.orders

    async def told(ready: bool) -> None:
        await port.set_readiness(ready=ready)
        supervised.say(serving=ready)

    link = Link(orders.socket, told, stop, max_message_bytes=max_wire_bytes(orders.config))
    port = Port((), orders.config, shared=True, otherwise=link.forward)
    await port.start()
    supervised.say(serving=False)
    linked, stopped = asyncio.ensure_future(link.run()), asyncio.ensure_future(stop.wait())
    await asyncio.wait([linked, stopped], return_when=asyncio.FIRST_COMPLETED)
    if linked.done():
        linked.result()  # raises: the socket is gone
    await port.stop(orders.config.drain_seconds)
    linked.cancel()


if __name__ == "__main__":
    sys.exit(run(main))
