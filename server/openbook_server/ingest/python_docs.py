"""The documentation that every CPython carries: language-reference topics and the standard library's docstrings.

Read from the running interpreter: source files are parsed, never imported; built-in types and C modules, which have no
source, are the ones already inside the interpreter or imported by name from the standard library.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import sysconfig
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

from openbook_server.knowledge import Document

# Importing these has no side effect; they are written in C, so that only the live objects have docstrings.
_C_MODULES = (
    "array atexit binascii builtins cmath collections errno functools gc itertools marshal math operator re select signal sys "
    "time unicodedata zlib _thread"
).split()
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "ensurepip", "__pycache__", "pydoc_data"}
_SHORTEST = 20  # characters of a docstring worth keeping


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """Every topic, module, class and function with a docstring, each a document named by its dotted name; about 2 MB."""
    documents: dict[str, Document] = {}
    for document in [*_topics(), *_live_modules(), *_source_modules()]:
        documents.setdefault(document.id, document)
    return tuple(documents.values())


def _topics() -> Iterator[Document]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        body = "\n".join(line for line in text.splitlines() if not set(line) <= set("*=-~^ ") or not line.strip())
        heading = next((line.strip() for line in body.splitlines() if line.strip()), name)
        yield _document(f"topic:{name}", heading, body, "The Python Language Reference")


def _live_modules() -> Iterator[Document]:
    for name in _C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not on this platform
            continue
        yield from _live(name, module, depth=0)


def _live(name: str, thing: object, depth: int) -> Iterator[Document]:
    doc = inspect.getdoc(thing) if depth < 2 or not isinstance(thing, type) else None
    if doc and len(doc) >= _SHORTEST:
        yield _document(name.removeprefix("builtins."), _title(name, thing), f"{_heading(name, thing)}\n{doc}", _module_of(name))
    if depth == 2 or not isinstance(thing, types.ModuleType | type):
        return
    for key, value in sorted(vars(thing).items(), key=lambda item: item[0]):
        public = not key.startswith("_")
        native = callable(value) and not isinstance(value, types.ModuleType)
        home = getattr(value, "__module__", None)
        if public and native and (depth > 0 or home in (None, name, "builtins")):
            yield from _live(f"{name}.{key}", value, depth + 1)


def _source_modules() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if (
            _SKIPPED & set(parts)
            or any(part.startswith("_") and part != "__init__" for part in parts)
            or parts[0] in {"this", "antigravity"}
        ):
            continue
        if parts[0] not in sys.stdlib_module_names:
            continue
        name = ".".join(part for part in parts if part != "__init__")
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # old escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # templates that are no Python
            continue
        doc = ast.get_docstring(tree)
        if doc and len(doc) >= _SHORTEST:
            yield _document(name, f"module {name}", f"The module {name}.\n{doc}", name)
        yield from _definitions(name, tree, name)


def _definitions(prefix: str, node: ast.Module | ast.ClassDef, module: str) -> Iterator[Document]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        doc = ast.get_docstring(child)
        if doc and len(doc) >= _SHORTEST:
            if isinstance(child, ast.ClassDef):
                yield _document(name, f"class {name}", f"class {name}\n{doc}", module)
            else:
                signature = f"{name}({ast.unparse(child.args)})"
                yield _document(name, f"{name}()", f"{signature}\n{doc}", module)
        if isinstance(child, ast.ClassDef):
            yield from _definitions(name, child, module)


def _heading(name: str, thing: object) -> str:
    shown = name.removeprefix("builtins.")
    if isinstance(thing, types.ModuleType):
        return f"The module {shown}."
    if isinstance(thing, type):
        return f"class {shown}"
    try:
        return f"{shown}{inspect.signature(thing)}"  # type: ignore[arg-type]  # callables without a signature raise
    except (ValueError, TypeError, AttributeError):  # the last where a default names a constant, as that of select.poll
        return f"{shown}()"


def _title(name: str, thing: object) -> str:
    shown = name.removeprefix("builtins.")
    if isinstance(thing, types.ModuleType):
        return f"module {shown}"
    return f"class {shown}" if isinstance(thing, type) else f"{shown}()"


def _module_of(name: str) -> str:
    return name.partition(".")[0]


def _document(name: str, title: str, text: str, module: str) -> Document:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Document(
        id=f"python:{name}",
        title=title[:200],
        text=textwrap.dedent(text).strip().replace("\0", " "),
        source=f"Python {version} documentation: {name}",
        metadata={"module": module},
    )
