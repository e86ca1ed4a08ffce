"""Configuration files: defaults, types, and every mistake reported at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from openbook_training.config import LoopConfig, check, load_config
from openbook_training.errors import InvalidConfig
from openbook_training.scratch import ScratchConfig
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.reader import ReaderConfig
from openbook_training.tasks.retriever import RetrieverConfig


def write(folder: Path, text: str) -> Path:
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


def test_missing_keys_take_their_defaults_and_tables_nest(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, 'train = "t.jsonl"\nnegatives = [0, 2]\n[loop]\nlearning_rate = 1\n'), ReaderConfig)
    assert (config.train, config.negatives, config.loop.learning_rate, config.loop.seed) == ("t.jsonl", (0, 2), 1.0, 42)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = 'trian = "t"\nmax_tokens = "many"\nnegatives = [-1]\nstride = -5\n[loop]\nepochs = true\nspeed = 3\n'
    with pytest.raises(InvalidConfig) as raised:
        load_config(write(tmp_path, text), ReaderConfig)
    for part in (
        "trian: unknown key",
        "train: missing",
        "max_tokens: 'many'",
        "negatives: [-1]",
        "stride: -5",
        "loop.epochs: True",
        "loop.speed",
    ):
        assert part in str(raised.value)


def test_values_that_cannot_work_are_reported_with_the_other_mistakes_of_all_tables(tmp_path: Path) -> None:
    loop = "learning_rate = 0\nwarmup_share = 1.5\nmax_gradient_norm = -1\naverage_decay = 1\nepochs = 0\nprecision = 'fp8'\n"
    text = f'trian = "t"\nlora_rank = 0\nmined = 0\nno_answer_share = 2\nmax_tokens = 100\n[loop]\n{loop}'
    with pytest.raises(InvalidConfig) as raised:
        load_config(write(tmp_path, text), ReaderConfig)
    for part in (
        "trian: unknown key",
        "train: missing",
        "lora_rank: 0 is below 1",
        "mined: 0 is below 1",
        "no_answer_share: 2.0 is not in [0, 1]",
        "max_tokens: 100 leaves no room",
        "loop.learning_rate: 0.0 is not above 0",
        "loop.warmup_share: 1.5 is not in [0, 1]",
        "loop.max_gradient_norm: -1.0 is not above 0",
        "loop.average_decay: 1.0 is not in [0, 1)",
        "loop.epochs: 0 is below 1",
        "loop.precision: 'fp8' is neither",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("objective", "changes", "problem"),
    [
        ("classifier", {"temperature": 1e-320}, "temperature: 1e-320 is not in [0.0001, 10000]"),
        ("retriever", {"temperature": 1e308}, "temperature: 1e+308 is not in"),
        ("retriever", {"reader_temperature": 0.0}, "reader_temperature: 0.0 is not in"),
        ("reader", {"teacher_temperature": 1e308}, "teacher_temperature: 1e+308 is not in"),
        ("realm", {"temperature": 1e308}, "temperature: 1e+308 is not in"),
        ("classifier", {"loop": LoopConfig(weight_decay=1e308)}, "loop.weight_decay: 1e+308 is above 1000"),
        ("verification", {"shots": 1}, "shots: 1 row of each label leaves none to choose the best epoch by; give at least 2, or 0 for all"),
        ("causal_lm", {"layers": 10**12}, "layers: 1000000000000 is above 1024"),
        ("causal_lm", {"dim": 2**40}, "dim: 1099511627776 is above 8192"),
        ("causal_lm", {"vocabulary": 10**12}, "vocabulary: 1000000000000 is above 1048576"),
        ("causal_lm", {"stride_tokens": 10**12}, "stride_tokens 1000000000000, context_tokens 64, passages 1 of 64 tokens: 1000000000130"),
        ("causal_lm", {"context_tokens": 10**12, "checkpoint": "any"}, "context_tokens 1000000000000"),
        ("causal_lm", {"passages": 10**12}, "tokens at once are above 131072"),
        ("masked_lm", {"scratch": ScratchConfig(layers=10**12)}, "scratch.layers: 1000000000000 is above 1024"),
        ("masked_lm", {"scratch": ScratchConfig(hidden=2**40)}, "scratch.hidden: 1099511627776 is above 8192"),
        ("masked_lm", {"scratch": ScratchConfig(vocabulary=10**12)}, "scratch.vocabulary: 1000000000000 is above 1048576"),
        ("masked_lm", {"scratch": ScratchConfig(vocabulary=1)}, "scratch.vocabulary: 1 is below 6"),
    ],
)
def test_numbers_that_no_model_is_made_with_are_refused_by_name(objective: str, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(problem)):
        check(OBJECTIVES[objective].config()(train="t", **changes))


@pytest.mark.parametrize("text", ["= 3", "train = 'a\n", "\udcff"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidConfig, match=r"broken\.toml"):
        load_config(path, ReaderConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"none\.toml"):
        load_config(tmp_path / "none.toml", ReaderConfig)


def test_lists_of_numbers_take_whole_ones_and_refuse_what_is_no_number(tmp_path: Path) -> None:
    text = 'train = "t"\nmatryoshka_dims = [8, 4]\nmatryoshka_weights = [1, 0.5]\n'
    assert load_config(write(tmp_path, text), RetrieverConfig).matryoshka_weights == (1.0, 0.5)
    for wrong in ("[true]", "[]", '["1"]', "[nan]", "1.0"):
        with pytest.raises(InvalidConfig, match="matryoshka_weights: .* is not a list of numbers, at least one"):
            load_config(write(tmp_path, f'train = "t"\nmatryoshka_weights = {wrong}\n'), RetrieverConfig)


def test_numbers_and_names_beyond_what_the_machine_takes_are_told_with_the_other_mistakes(tmp_path: Path) -> None:
    loop = f"seed = 4294967296\nthreads = 99999999999\nlearning_rate = 1{'0' * 400}\n"
    text = f'train = "a\\u0000b"\noutput = ""\nlora_rank = 100000000000\n[loop]\n{loop}'
    with pytest.raises(InvalidConfig) as raised:
        load_config(write(tmp_path, text), ReaderConfig)
    for part in (
        r"train: 'a\x00b' holds a NUL character",
        "output: '' is the folder that the run begins in; name one of its own",
        "lora_rank: 100000000000 is above 8192",
        "loop.seed: 4294967296 is above 4294967295",
        "loop.threads: 99999999999 is above 4096",
        "is not a number",
    ):
        assert part in str(raised.value)
    with pytest.raises(InvalidConfig, match="is not valid TOML"):
        load_config(write(tmp_path, f"held_out = 1{'0' * 5000}\n"), ReaderConfig)
