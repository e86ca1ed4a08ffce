"""One adapter from several, readers or retrievers of one checkpoint: the mean of what they add to it ("Model soups", Wortsman et al. 2022).

    python -m openbook_training.average OUT ADAPTER ADAPTER... [--rank 96]

Runs that began differently end in different weights that are about equally good; their mean is often better than each, and
costs nothing more to serve. Of each layer the updates B·A are averaged, and the mean is cut to `--rank` by its singular values;
a reader's head is averaged as it is. Settings beside the weights (reader.json) are those of the first adapter: constants calibrated for
one do not hold for the mean.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openbook_training.adapters import SETTINGS, WEIGHTS
from openbook_training.errors import InvalidConfig, InvalidData, NotWritten, TrainingError
from openbook_training.reader import READER_SETTINGS
from openbook_training.retriever import RETRIEVER_SETTINGS


def average(folders: Sequence[Path], out: Path, *, rank: int) -> float:
    """Write the mean of adapters to `out`; returns the largest share of a layer's mean update (of its squares) that cutting it lost.

    Args:
        rank: of the result's updates; more than the sum of the adapters' ranks adds nothing.

    Raises:
        InvalidData: a folder holds no adapter of a reader or a retriever, or a damaged one, they are of different kinds, checkpoints or
            layers, or `out` exists.
        InvalidConfig: `rank` is above the width of a layer.
        NotWritten: the system refuses to write `out`; it is there whole or not at all.
    """
    if out.exists():
        raise InvalidData(f"{out} exists; name another folder")
    kinds = [_kind(folder) for folder in folders]
    settings = [_settings(folder) for folder in folders]
    bases = [
        (its["base_model_name_or_path"], _stated(folder / kind, "base_digest")["base_digest"])
        for folder, kind, its in zip(folders, kinds, settings, strict=True)
    ]
    weights = [_weights(folder) for folder in folders]
    shapes = [_shapes(each) for each in weights]
    for folder, *its in zip(folders, kinds, bases, shapes, strict=True):
        if its != [kinds[0], bases[0], shapes[0]]:
            raise InvalidData(
                f"{folder} and {folders[0]} are adapters of different kinds, checkpoints or layers; only like can be averaged, "
                "all readers or all retrievers"
            )
    width = min((weight.shape[".lora_A." in name] for name, weight in weights[0].items() if ".lora_" in name), default=0)
    if rank > width:
        raise InvalidConfig(f"rank {rank} is above {width}, the width of a layer; lower --rank")
    aside = out.with_name(f"{out.name}.new")  # always the same, so that what a killed run has left goes with the next
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)  # before the work: whether it can be written shows here
        result, lost = _mean(weights, settings, rank)
        shutil.copytree(folders[0], aside, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)
        save_file(result, aside / WEIGHTS)
        (aside / SETTINGS).write_text(json.dumps(settings[0] | {"r": rank, "lora_alpha": rank}, indent=2, sort_keys=True) + "\n")
        aside.rename(out)
    except (OSError, SafetensorError) as error:
        raise NotWritten(f"{out} cannot be written ({error}); make room, or name another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return lost


def _mean(weights: Sequence[Mapping[str, Tensor]], settings: Sequence[Mapping[str, Any]], rank: int) -> tuple[dict[str, Tensor], float]:
    """The mean weights, its updates of `rank`, and the largest share that cutting lost."""
    result: dict[str, Tensor] = {}
    lost = 0.0
    for name in weights[0]:
        if ".lora_A." in name:
            other_name = name.replace(".lora_A.", ".lora_B.")
            updates = [
                its["lora_alpha"] / its["r"] * each[other_name].float() @ each[name].float()
                for its, each in zip(settings, weights, strict=True)
            ]
            result[name], result[other_name], cut = _low_rank(torch.stack(updates).mean(0), rank)
            lost = max(lost, cut)
        elif ".lora_B." not in name:
            result[name] = torch.stack([each[name].float() for each in weights]).mean(0).half()
    return result, lost


def _kind(folder: Path) -> str:
    """What the adapter is of, by the file beside it. Heads of a classifier lie in a file of their own, and are of its own labels."""
    if not all((folder / name).is_file() for name in (SETTINGS, WEIGHTS)):
        raise InvalidData(f"{folder} holds no adapter: no {SETTINGS} and {WEIGHTS} in it")
    found = [name for name in (READER_SETTINGS, RETRIEVER_SETTINGS) if (folder / name).is_file()]
    if len(found) != 1:
        raise InvalidData(
            f"{folder} holds no reader or retriever ({' and '.join(found) or f'no {READER_SETTINGS} or {RETRIEVER_SETTINGS}'} in it); "
            "only those can be averaged"
        )
    return found[0]


def _settings(folder: Path) -> dict[str, Any]:
    settings = _stated(folder / SETTINGS, "r", "lora_alpha", "base_model_name_or_path")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings[name], int | float) or not settings[name] > 0:
            raise InvalidData(f"{folder / SETTINGS}: {name} is {settings[name]!r}, no number above 0; copy the whole folder again")
    return settings


def _stated(file: Path, *names: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name in names:
            found[name]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidData(f"{file} cannot be read ({reason}); copy the whole folder again") from error
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InvalidData(f"{folder / WEIGHTS} cannot be read ({error}); copy the whole folder again") from error


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of each weight, with the adapter's own rank left out."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return {name: shape[1:] if ".lora_A." in name else shape[:1] if ".lora_B." in name else shape for name, shape in shapes.items()}


def _low_rank(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (rank, in) and B (out, rank), in half precision, whose product is the nearest of that rank; and the share of squares it lacks."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    roots = values[:rank].sqrt()
    lost = float(values[rank:].square().sum() / values.square().sum().clamp(min=1e-30))
    return (roots[:, None] * right[:rank]).half().contiguous(), (left[:, :rank] * roots).half().contiguous(), lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="folders that `openbook train` wrote")
    parser.add_argument("--rank", type=int, default=96, help="of the mean's updates (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.rank < 1:
        parser.error("--rank takes 1 or more")
    try:
        lost = average(arguments.adapters, arguments.out, rank=arguments.rank)
    except TrainingError as error:
        print(f"average: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: mean of {len(arguments.adapters)} adapters; cutting to rank {arguments.rank} lost at most {100 * lost:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
