"""openbook's client side: the protocol's messages (openbook.v1), a thin client, and the `openbook` command."""

__version__ = "0.1.0"
