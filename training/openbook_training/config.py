"""Settings of a training run: a TOML file in, a frozen dataclass out, all mistakes reported at once.

A dataclass of settings says itself which of its values cannot work, by a method `problems() -> list[str]`, as far as they show it without
checkpoint and data.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openbook_training.errors import InvalidConfig

_MOST_THREADS = 4096  # more than any machine's cores; a system refuses to start them long before
# Larger than any model that is trained here; a system would refuse the memory, or end the process.
WIDEST, MOST_LAYERS, MOST_PIECES, MOST_TOKENS = 8192, 1024, 2**20, 2**17
_TEMPERATURES = 1e-4, 1e4  # beyond them a softmax of cosines or scores is no number, or even


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What every objective shares: how long, how fast, how often to save."""

    seed: int = 42  # of data order, sampling and initialisation
    epochs: int = 3  # passes over the training examples
    batch_examples: int = 32  # an optimiser step
    micro_batch_examples: int = 8  # of them, those whose activations are held at once: bounds memory, changes no gradient
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: a third more time, far less memory, same gradients
    learning_rate: float = 5e-4  # peak; LoRA wants about ten times a full fine-tuning's
    warmup_share: float = 0.06  # of all steps, linear from 0; then linear down to 0
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    average_decay: float = 0.999  # exponential moving average of the trained weights, used for evaluation; 0 turns it off
    precision: str = "bf16"  # "bf16" (autocast) or "fp32"
    threads: int = 0  # CPU threads; 0 = all cores
    checkpoint_minutes: float = 5.0  # wall time between checkpoints; a stop loses at most this much
    evaluate_every_epochs: int = 1
    max_steps: int = 0  # stop early after this many steps, for trying things out; 0 = no limit

    def problems(self) -> list[str]:
        """What cannot work."""
        return [
            *too_low(self, epochs=1, batch_examples=1, micro_batch_examples=1, evaluate_every_epochs=1),
            *not_positive(self, "learning_rate", "max_gradient_norm"),
            *no_share(self, "warmup_share"),
            *no_share(self, "average_decay", below_one=True),
            *([] if self.precision in {"bf16", "fp32"} else [f"precision: {self.precision!r} is neither 'bf16' nor 'fp32'"]),
            *too_low(self, weight_decay=0, checkpoint_minutes=0),
            *too_high(self, weight_decay=1000),  # by which a step of any learning rate here leaves nothing of a weight
            *too_high(self, seed=2**32 - 1, threads=_MOST_THREADS),  # of the seed, NumPy's limit
        ]


def too_low(config: Any, **least: int) -> list[str]:
    """Of each setting named that is below its least value, what is wrong."""
    return [f"{name}: {value} is below {least[name]}" for name in least if (value := getattr(config, name)) < least[name]]


def too_high(config: Any, **most: int) -> list[str]:
    """Of each setting named that is above its highest value, what is wrong."""
    return [f"{name}: {value} is above {most[name]}" for name in most if (value := getattr(config, name)) > most[name]]


def no_rank(config: Any, *, least: int = 1) -> list[str]:
    """What is wrong with the low-rank updates of a model; a rank above the width of its layers adds nothing but memory."""
    return [*too_low(config, lora_rank=least, lora_alpha=1), *too_high(config, lora_rank=WIDEST, lora_alpha=2**31)]


def not_positive(config: Any, *names: str) -> list[str]:
    """Of each setting named that is 0 or less, what is wrong."""
    return [f"{name}: {value} is not above 0" for name in names if (value := getattr(config, name)) <= 0]


def no_temperature(config: Any, *names: str) -> list[str]:
    """Of each setting named by which scores cannot be divided before a softmax, what is wrong."""
    low, high = _TEMPERATURES
    return [f"{name}: {value} is not in [{low}, {high:.0f}]" for name in names if not low <= (value := getattr(config, name)) <= high]


def no_share(config: Any, *names: str, below_one: bool = False) -> list[str]:
    """Of each setting named that is no share, 0 to 1, what is wrong; `below_one`: 1 is none either."""
    values = {name: getattr(config, name) for name in names}
    range_ = "[0, 1)" if below_one else "[0, 1]"
    return [f"{name}: {value} is not in {range_}" for name, value in values.items() if not 0 <= value <= 1 or (below_one and value == 1)]


def check(config: Any) -> None:
    """Raises:
    InvalidConfig: values that cannot work, of the configuration and of its tables; the message lists all.
    """
    if found := _found(config, ""):
        raise InvalidConfig("\n".join(found))


def _found(config: Any, prefix: str) -> list[str]:
    own = config.problems() if hasattr(config, "problems") else []
    if getattr(config, "output", None) == "":
        own = ["output: '' is the folder that the run begins in; name one of its own", *own]
    tables = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    nested = [problem for name, table in tables.items() if dataclasses.is_dataclass(table) for problem in _found(table, f"{prefix}{name}.")]
    return [*(prefix + problem for problem in own), *nested]


Config = TypeVar("Config")


def load_config(path: str | Path, kind: type[Config], overrides: dict[str, Any] | None = None) -> Config:
    """Read a TOML file into `kind`, whose nested dataclasses are tables of the file.

    Raises:
        InvalidConfig: unreadable file, or any unknown key, missing key, wrong type or value that cannot work: all are listed.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(f"configuration {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, of UTF-8, or a number of more digits than Python reads
        raise InvalidConfig(f"configuration {str(path)!r} is not valid TOML: {error}") from error
    return config_of(kind, {**table, **(overrides or {})}, f"configuration {str(path)!r}")


def config_of(kind: type[Config], table: dict[str, Any], source: str) -> Config:
    """`kind` of a table that was read from `source`.

    Raises:
        InvalidConfig: as `load_config`.
    """
    problems: list[str] = []
    config = _build(kind, table, "", problems)
    problems += _found(config, "")
    if problems:
        raise InvalidConfig(f"{source}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return typing.cast(Config, config)


def _build(kind: type[Any], table: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """Of a table with mistakes too: they leave the defaults, or nothing, so that it can still be asked what else is wrong."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    known = ", ".join(sorted(fields))
    problems.extend(f"{prefix}{key}: unknown key (known: {known})" for key in table if key not in fields)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = _value(hints[name], table[name], prefix + name, problems) if name in table else None
        if required and name not in table:
            problems.append(f"{prefix}{name}: missing, and it has no default")
        if required or value is not None:
            values[name] = value
    return kind(**values)


def _value(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(typing.cast(type[Any], hint), value, name + ".", problems)
    elif isinstance(hint, types.GenericAlias):  # tuple[int, ...] or tuple[float, ...]
        kind = typing.get_args(hint)[0]
        if isinstance(value, list) and value and all(_is(kind, item) for item in value):
            return tuple(kind(item) for item in value)
    elif hint is float and _is(float, value):
        return float(value)
    elif _is(hint, value):
        if hint is not str or "\0" not in value:
            return value
        problems.append(f"{name}: {value!r} holds a NUL character, which no name of a file may")
        return None
    problems.append(f"{name}: {value!r} is not {'a table' if dataclasses.is_dataclass(hint) else _describe(hint)}")
    return None


def _is(kind: Any, value: Any) -> bool:
    """Whether a value of the file is of a scalar kind; True is no number, and a whole number does for any."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind and not (kind is int and value < 0)


def _describe(hint: Any) -> str:
    kinds = {int: "a whole number >= 0", float: "a number", str: "a string", bool: "true or false"}
    if isinstance(hint, types.GenericAlias):
        return {int: "a list of whole numbers >= 0, at least one", float: "a list of numbers, at least one"}[typing.get_args(hint)[0]]
    return kinds[hint]
