"""Settings of a training run: a TOML file in, a frozen dataclass out, all mistakes reported at once."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openbook_training.checkpoint import DEFAULT_CHECKPOINT
from openbook_training.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What every objective shares: how long, how fast, how often to save."""

    seed: int = 42  # of data order, sampling and initialisation
    epochs: int = 3  # passes over the training questions
    batch_questions: int = 32  # questions an optimiser step
    micro_batch_questions: int = 8  # of them, questions a backward pass: bounds memory, changes no gradient
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderConfig:
    """Settings of `openbook train reader`."""

    output: str = "runs/reader"  # run folder: config, metrics, checkpoints, the adapter
    checkpoint: str = DEFAULT_CHECKPOINT  # backbone: package:NAME, folder or hub id
    train: str  # questions: .jsonl/.json file or NAME:SPLIT of a Hugging Face dataset
    dev: str = ""  # questions for the report after each epoch; empty: only the held-out ones
    dev_questions: int = 1000  # first N of them for the report during training; 0 = all
    held_out: int = 300  # training questions set aside (whole passages) to choose the best epoch
    max_tokens: int = 384  # question + passage + special tokens; longer passages are read in windows
    stride: int = 128  # tokens that neighbouring windows share
    max_question_tokens: int = 64  # the rest of a longer question is cut
    max_answer_tokens: int = 30  # longest span considered
    negatives: tuple[int, ...] = (2,)  # hard negatives beside the gold passage, by epoch; the last value repeats
    mined: int = 20  # depth of the ranking that negatives are drawn from
    no_answer_share: float = 0.1  # questions whose gold passage is taken away; they learn to abstain
    lora_rank: int = 64
    lora_alpha: int = 64  # update is scaled by alpha / rank
    initial_adapter: str = ""  # go on from this adapter folder instead of a fresh one
    loop: LoopConfig = LoopConfig()


Config = TypeVar("Config")


def load_config(path: str | Path, kind: type[Config], overrides: dict[str, Any] | None = None) -> Config:
    """Read a TOML file into `kind`, whose nested dataclasses are tables of the file.

    Raises:
        InvalidConfig: unreadable file, or any unknown key, missing key or wrong type: all are listed.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig(f"configuration {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"configuration {str(path)!r} is not valid TOML: {error}") from error
    problems: list[str] = []
    config = _build(kind, {**table, **(overrides or {})}, "", problems)
    if problems:
        raise InvalidConfig(f"configuration {str(path)!r}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return typing.cast(Config, config)


def _build(kind: type[Any], table: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    known = ", ".join(sorted(fields))
    problems.extend(f"{prefix}{key}: unknown key (known: {known})" for key in table if key not in fields)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], prefix + name, problems)
        elif field.default is dataclasses.MISSING:
            problems.append(f"{prefix}{name}: missing, and it has no default")
    return kind(**values) if not problems else None


def _value(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(typing.cast(type[Any], hint), value, name + ".", problems)
    elif isinstance(hint, types.GenericAlias):  # tuple[int, ...]
        if isinstance(value, list) and value and all(isinstance(item, int) and item >= 0 for item in value):
            return tuple(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is hint and not (hint is int and value < 0):
        return value
    problems.append(f"{name}: {value!r} is not {'a table' if dataclasses.is_dataclass(hint) else _describe(hint)}")
    return None


def _describe(hint: Any) -> str:
    return {int: "a whole number >= 0", float: "a number", str: "a string", bool: "true or false"}.get(
        hint, "a list of whole numbers >= 0, at least one"
    )
