"""Settings of one server process; what the models need lives in the bundle, not here."""

from __future__ import annotations

from dataclasses import dataclass

from openbook_server.errors import InvalidRequest

RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "metrics_port": (0, 65_535),
    "recall_share": (0, 1),
    "recall_target": (0, 1),
    "shadow_share": (0, 1),
    "frontends": (0, 256),
    "threads": (0, 1_024),
    "sessions": (0, 64),
    "max_batch_tokens": (512, 1 << 20),
    "cache_mb": (0, 1 << 20),
    "max_queued": (1, 1 << 20),
    "max_texts": (1, 4_096),
    "max_text_bytes": (1, 256 * 1024 * 1024),
    "max_top_k": (1, 1_000),
    "max_message_bytes": (1_024, 256 * 1024 * 1024),
    "default_deadline_seconds": (0.001, 86_400),
    "drain_seconds": (0, 86_400),  # 0 = requests in flight are cut off
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Each field but max_answers and max_deadline_seconds is a flag of `openbook serve` of the same name."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 opens the server to the network
    port: int = 50051  # 0 = any free one, printed at start
    device: str = "auto"  # auto, cpu, openvino or cuda
    precision: str = ""  # fp32, bf16, fp16 or int8; empty = the device's lossless default
    frontends: int = 0  # processes that speak gRPC beside the one that computes; 0 = one process does both
    threads: int = 0  # processor threads for inference; 0 = all cores
    sessions: int = 0  # batches at once, which share the threads; 0 = as many as threads, up to 8; on a GPU 2
    max_batch_tokens: int = 1_024  # a batch, padding included: what a core keeps in its cache; raise it on a GPU until the device is busy
    cache_mb: int = 64  # vectors of texts and questions kept, about 500 of them a MB; 0 = every text is computed
    max_queued: int = 2_048  # texts and passages waiting; beyond it callers get RESOURCE_EXHAUSTED
    max_texts: int = 256  # texts or questions a request
    max_text_bytes: int = 65_536  # of one text
    max_message_bytes: int = 8 * 1024 * 1024
    max_top_k: int = 100
    max_answers: int = 20
    default_deadline_seconds: float = 30.0  # for callers that set none
    max_deadline_seconds: float = 600.0  # a longer one counts as this
    drain_seconds: float = 20.0  # after SIGTERM, time for requests in flight
    writable: bool = False  # take writes although `host` lets other machines in; on a loopback address they are taken anyway
    read_only: bool = False  # take no writes on a loopback address either
    recall_share: float = 0.01  # of the dense searches, made again exactly in the background to know their recall; 0 = none
    recall_target: float = 0.99  # recall@10 that the index's ef is moved to hold
    shadow_share: float = 0.05  # of the questions, answered in the background by the generation being built as well, to compare; 0 = none
    metrics_port: int = 0  # Prometheus over HTTP on the same host; 0 = off

    def __post_init__(self) -> None:
        if self.host.startswith("[") and self.host.endswith("]"):  # an IPv6 address as it stands before a port
            object.__setattr__(self, "host", self.host[1:-1])
        if self.writable and self.read_only:
            raise InvalidRequest("--read-only", "and --writable contradict each other; leave one out")
        if not self.host:
            raise InvalidRequest("--host", "empty; 127.0.0.1 takes calls of this machine, 0.0.0.0 of the network")
        for name in RANGES:
            check_range(name, getattr(self, name))

    def address(self, port: int) -> str:
        """HOST:PORT on this host, an IPv6 address in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


def check_range(name: str, value: float) -> None:
    """Refuse a value that `ServerConfig` would refuse, for any command that has the flag.

    Raises:
        InvalidRequest: it is out of its range, or NaN.
    """
    low, high = RANGES[name]
    if not low <= value <= high:
        raise InvalidRequest("--" + name.replace("_", "-"), f"{value} is outside {low} to {high}")
