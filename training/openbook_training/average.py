"""One adapter from several of the same checkpoint: the mean of what they add to its weights ("Model soups", Wortsman et al. 2022).

    python -m openbook_training.average OUT ADAPTER ADAPTER... [--rank 96]

Runs that began differently end in different weights that are about equally good; their mean is often better than each, and
costs nothing more to serve. Of each layer the updates B·A are averaged, and the mean is cut to `--rank` by its singular values;
heads are averaged as they are. Settings beside the weights (reader.json) are those of the first adapter: constants calibrated for
one do not hold for the mean.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openbook_training.adapters import SETTINGS, WEIGHTS
from openbook_training.errors import InvalidConfig, InvalidData, TrainingError


def average(folders: Sequence[Path], out: Path, *, rank: int) -> float:
    """Write the mean of adapters to `out`; returns the largest share of a layer's mean update (of its squares) that cutting it lost.

    Args:
        rank: of the result's updates; more than the sum of the adapters' ranks adds nothing.

    Raises:
        InvalidData: a folder holds no adapter, they are of different checkpoints or layers, or `out` exists.
        InvalidConfig: `rank` is above the width of a layer.
    """
    if out.exists():
        raise InvalidData(f"{out} exists; name another folder")
    settings = [_settings(folder) for folder in folders]
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    for folder, other, its in zip(folders, weights, settings, strict=True):
        if other.keys() != weights[0].keys() or its["base_model_name_or_path"] != settings[0]["base_model_name_or_path"]:
            raise InvalidData(f"{folder} and {folders[0]} are adapters of different checkpoints or layers; only like can be averaged")
    width = min(weight.shape[".lora_A." in name] for name, weight in weights[0].items() if ".lora_" in name)
    if rank > width:
        raise InvalidConfig(f"rank {rank} is above {width}, the width of a layer; lower --rank")
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
    shutil.copytree(folders[0], out, ignore=shutil.ignore_patterns("README.md"))
    save_file(result, out / WEIGHTS)
    (out / SETTINGS).write_text(json.dumps(settings[0] | {"r": rank, "lora_alpha": rank}, indent=2, sort_keys=True) + "\n")
    return lost


def _settings(folder: Path) -> dict[str, Any]:
    if not all((folder / name).is_file() for name in (SETTINGS, WEIGHTS)):
        raise InvalidData(f"{folder} holds no adapter: no {SETTINGS} and {WEIGHTS} in it")
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return found


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
