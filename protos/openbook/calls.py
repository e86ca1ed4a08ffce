"""Methods that both clients have, written once: of the arguments the request, of the reply the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, overload

from google.protobuf.message import Message

from openbook.messages import check_options
from openbook.v1 import knowledge_base_pb2 as kb

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One message to the KnowledgeBase service."""

    method: str
    request: Message
    result: Callable[[Any], T]  # of the reply
    repeatable: bool = True  # whether making it twice does what making it once does


class Calling(ABC):
    """A client whose methods return results."""

    @abstractmethod
    def _make(self, call: Call[T]) -> T:
        """The result of a call."""


class AsyncCalling(ABC):
    """A client whose methods return what is awaited for results."""

    @abstractmethod
    async def _make(self, call: Call[T]) -> T:
        """The result of a call."""


class Method(Generic[P, T]):
    """A method of `Calling` and of `AsyncCalling`, with the arguments and the docstring of the function that makes its call."""

    def __init__(self, function: Callable[P, Call[T]]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    @overload
    def __get__(self, client: Calling, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncCalling, owner: type) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Method[P, T]: ...
    def __get__(self, client: Calling | AsyncCalling | None, owner: type) -> Any:
        if client is None:
            return self

        def method(*arguments: P.args, **options: P.kwargs) -> Any:
            return client._make(self._function(*arguments, **options))

        method.__doc__, method.__name__ = self._function.__doc__, self._function.__name__
        return method


def generations() -> Call[list[kb.Generation]]:
    """Every generation of the server's knowledge base, in the order in which they were made."""
    return Call("ListGenerations", kb.ListGenerationsRequest(), lambda reply: list(reply.generations))


def build_generation(bundle: str, *, graph_dims: int | None = None) -> Call[str]:
    """Begin to build the generation of a bundle, a folder on the server's machine; returns its name."""
    check_options({"bundle": bundle} if graph_dims is None else {"bundle": bundle, "graph_dims": graph_dims})
    return Call("BuildGeneration", kb.BuildGenerationRequest(bundle=bundle, graph_dims=graph_dims), _name, repeatable=False)


def publish_generation(name: str = "") -> Call[str]:
    """Make a generation live once it lacks nothing, by default the one that is being built; returns its name."""
    check_options({"name": name})
    return Call("PublishGeneration", kb.PublishGenerationRequest(name=name), _name, repeatable=False)


def roll_back_generation() -> Call[str]:
    """Make live again what was live before; returns its name."""
    return Call("RollBackGeneration", kb.RollBackGenerationRequest(), _name, repeatable=False)


def remove_generation(name: str) -> Call[None]:
    """Remove a generation for good; not the live one."""
    check_options({"name": name})
    return Call("RemoveGeneration", kb.RemoveGenerationRequest(name=name), lambda reply: None, repeatable=False)


def describe_knowledge_base() -> Call[kb.DescribeKnowledgeBaseResponse]:
    """What the server's knowledge base holds, and how its index does."""
    return Call("Describe", kb.DescribeKnowledgeBaseRequest(), lambda reply: reply)


def _name(reply: Any) -> str:
    return str(reply.name)


class GenerationMethods:
    """What both clients can do with generations."""

    generations = Method(generations)
    build_generation = Method(build_generation)
    publish_generation = Method(publish_generation)
    roll_back_generation = Method(roll_back_generation)
    remove_generation = Method(remove_generation)
    describe_knowledge_base = Method(describe_knowledge_base)
