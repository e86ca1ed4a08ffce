"""The methods about generations that both Python clients have, against a real server."""

from __future__ import annotations

from pathlib import Path

from openbook.client import AsyncClient, Client
from openbook_server.config import ServerConfig
from openbook_server.serving import running_server

CONFIG = ServerConfig(port=0, device="cpu", threads=1, drain_seconds=1.0)
WAIT = 120  # seconds, on a busy machine


async def test_the_async_client_takes_a_generation_there_and_back(tiny_bundle: Path, tuned_bundle: Path, tiny_knowledge_base: Path) -> None:
    async with (
        running_server(tiny_bundle, tiny_knowledge_base, CONFIG) as port,
        AsyncClient(f"127.0.0.1:{port}", timeout_seconds=WAIT) as client,
    ):
        [old] = await client.generations()
        new = await client.build_generation(str(tuned_bundle), graph_dims=0)
        assert await client.publish_generation() == new
        assert (await client.describe_knowledge_base()).generation == new
        assert await client.roll_back_generation() == old.name
        await client.remove_generation(new)
        assert [generation.name for generation in await client.generations()] == [old.name]


def test_both_clients_have_the_same_methods_with_the_same_words() -> None:
    methods = [{name for name in dir(kind) if not name.startswith("_")} for kind in (Client, AsyncClient)]
    assert methods[0] == methods[1]
    assert Client.publish_generation.__doc__ == Client("localhost:1").publish_generation.__doc__
    assert "live" in str(Client.publish_generation.__doc__)
