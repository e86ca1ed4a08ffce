"""A port that is held for several processes to listen on together, and that no other server can take meanwhile (Linux)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from openbook_server.config import ServerConfig
from openbook_server.listening import cannot_listen


@contextmanager
def reserved_port(config: ServerConfig) -> Iterator[ServerConfig]:
    """Within, the port is ours on all addresses of the host, to be listened on with SO_REUSEPORT; yields settings that name it.

    The sockets here are bound and never listen. They were bound as the only ones: a server that listens, or one that reserved the
    port, is met as an error. Only then are they made to share it.

    Raises:
        InvalidRequest: the address cannot be listened on.
    """
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                held = stack.enter_context(socket.socket(family, kind, protocol))
                if family == socket.AF_INET6:
                    held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
                held.bind((address[0], config.port, *address[2:]))
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                config = replace(config, port=held.getsockname()[1])
        except (OSError, UnicodeError) as error:
            raise cannot_listen(config) from error
        yield config
