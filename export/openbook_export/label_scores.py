"""How well a classifier or a verifier labels texts, in PyTorch: each of its readings beside the main one, on the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from openbook_training.bootstrap import interval, resampled
from openbook_training.checkpoint import Checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidData
from openbook_training.evidence import PASSAGES, beside_retrieved, evidence_corpus, evidence_found
from openbook_training.heads import HeadModel, RowEncoder, load_head_model
from openbook_training.label_readings import (
    Found,
    LabelReader,
    Probabilities,
    beside_evidence,
    beside_neighbours,
    evidence_readings,
    neighbour_readings,
)
from openbook_training.labelled import Columns, Labelled, draw_shots, load_labelled
from openbook_training.metrics import LOWER_IS_BETTER, label_statistics
from openbook_training.negatives import embed
from openbook_training.neighbours import nearest
from openbook_training.pretrained import best_device
from openbook_training.progress import progress
from openbook_training.rows import report_left_out
from openbook_training.squad import spread
from rich.console import Console

from openbook_export.errors import CheckpointUnsupported
from openbook_export.heads import stated_facts
from openbook_export.models import longest_text
from openbook_export.neighbours import stated_neighbours

OBJECTIVES = ("classifier", "verification")


@dataclass(frozen=True, slots=True)
class _Labeller:
    """What a run left, ready to read texts, and where the data that it was trained on kept them."""

    model: HeadModel
    reader: LabelReader
    settings: dict[str, Any]
    labels: list[str]
    columns: Columns

    def load(self, source: str, console: Console) -> tuple[list[Labelled], int]:
        """The rows whose label it knows, and how many others were left out and named."""
        rows, problems = load_labelled(source, self.columns, self.labels)
        report_left_out(console, source, len(rows), problems)
        return rows, len(problems)

    def gold(self, rows: Sequence[Labelled]) -> NDArray[np.int64]:
        return np.array([self.labels.index(row.label) for row in rows], np.int64)

    def read(self, found: Found, what: str, console: Console) -> Probabilities:
        with progress(console, f"reading {what}", len(found.texts)) as update, torch.inference_mode():
            return self.reader.probabilities(self.model, found, update)


def measure_classifier(
    checkpoint: Checkpoint, folder: Path, data: str, *, memory: str, shots: int | None, limit: int, console: Console
) -> dict[str, Any]:
    """Four readings, with neighbours from `memory`; the main one is "combined".

    Args:
        folder: what `openbook train classifier` left, trained on `checkpoint`.
        data, memory: labelled texts, in the columns that the training data had; rows of labels that it does not know are left out.
        shots: texts of each label of the memory, drawn as the run drew them; 0 = all, None = as many as the run drew.
        limit: texts measured at most, evenly spread; 0 = all.

    Returns:
        "texts", "left_out", "labels", "memory_texts", "shots", "neighbours", "mixture", and what `compared_readings` returns.

    Raises:
        CheckpointNotFound, CheckpointUnsupported: `folder` is none of that objective, of that checkpoint, or is damaged.
        InvalidData: a file is missing or has no usable row, or every text that is measured is in the memory too.
    """
    trained = _load(checkpoint, folder, "classifier", Columns(text="text", label="label"))
    stated = stated_neighbours(str(folder), trained.settings)
    if not memory:
        raise InvalidData(
            f"--task {folder} reads each text beside {stated.count} labelled neighbours, and no memory is given to find them in; "
            "name the labelled texts, those it was trained on for instance, with --memory FILE"
        )
    rows, left_out = trained.load(data, console)
    rows = spread(rows, limit)
    known, _ = trained.load(memory, console)
    shots = _stated_count(folder, trained.settings, "shots", 0) if shots is None else shots
    drawn = draw_shots(known, shots, _stated_count(folder, trained.settings, "seed", LoopConfig().seed))
    if len(drawn) < len(known):
        console.print(f"{memory}: {len(drawn)} of {len(known)} texts are the memory, {shots} of each label", soft_wrap=True, markup=False)
    if {row.text for row in rows} <= {row.text for row in drawn}:
        raise InvalidData(
            f"{data}: each of its {len(rows)} texts is in the memory {memory} too, and would find its own label there; "
            "measure texts that the memory does not hold"
        )
    texts = [row.text for row in (*rows, *drawn)]
    with progress(console, "embedding texts to find neighbours", len(texts)) as update:
        vectors = embed(checkpoint, texts, report=update)
    neighbours = nearest(vectors[: len(rows)], vectors[len(rows) :], trained.gold(drawn), stated.count)
    alone, model = (
        trained.read(beside_neighbours(rows, neighbours, [without] * len(rows)), what, console)
        for without, what in ((True, "texts alone"), (False, "texts beside neighbours"))
    )
    counts = {"texts": len(rows), "left_out": left_out, "labels": len(trained.labels), "memory_texts": len(drawn), "shots": shots}
    constants = {"neighbours": stated.count, "mixture": asdict(stated.mixture)}
    readings = neighbour_readings(alone, model, neighbours, stated.mixture)
    return counts | constants | compared_readings(readings, trained.gold(rows), "combined")


def measure_verification(checkpoint: Checkpoint, folder: Path, data: str, *, corpus: str, limit: int, console: Console) -> dict[str, Any]:
    """Claims alone, which is the main reading, beside their evidence, and beside what is found for them.

    Args:
        folder: what `openbook train verification` left, trained on `checkpoint`.
        data: labelled claims with evidence, in the columns that the training data had; rows of labels that it does not know are left out.
        corpus: where evidence is found: texts, or a folder in BEIR's layout; "" = in the evidence of all claims of `data`.
        limit: claims at most, evenly spread; 0 = all.

    Returns:
        "texts", "left_out", "labels", "corpus_passages", "passages" (found for a claim), and what `compared_readings` returns, with
        "evidence/all@k" and "evidence/any@k" among the metrics: how often a claim's own evidence is among what was found.

    Raises:
        CheckpointNotFound, CheckpointUnsupported: `folder` is none of that objective, of that checkpoint, or is damaged.
        InvalidData: a file is missing or has no usable row.
    """
    trained = _load(checkpoint, folder, "verification", Columns(text="claim", label="label", evidence="evidence"))
    count = _stated_count(folder, trained.settings, "passages", PASSAGES, least=1)
    everything, left_out = trained.load(data, console)
    rows, searched = spread(everything, limit), evidence_corpus(corpus, everything, console)

    def embed_all(texts: Sequence[str]) -> NDArray[np.float32]:
        with progress(console, "embedding texts to find evidence", len(texts)) as update:
            return embed(checkpoint, texts, report=update)

    retrieved = beside_retrieved(rows, searched, count, checkpoint, embed_all)
    claim_only, model, found = (
        trained.read(beside_evidence(claims, [without] * len(rows)), what, console)
        for claims, without, what in (
            (rows, True, "claims alone"),
            (rows, False, "claims beside their evidence"),
            (retrieved, False, "claims beside evidence found"),
        )
    )
    counts = {"texts": len(rows), "left_out": left_out, "labels": len(trained.labels), "corpus_passages": len(searched), "passages": count}
    report = counts | compared_readings(evidence_readings(claim_only, model, found), trained.gold(rows), "claim_only")
    shares = evidence_found(rows, retrieved, count)
    report["metrics"] |= {f"evidence/{name}": asdict(interval(100 * values)) for name, values in shares.items()}
    return report


def compared_readings(readings: Mapping[str, Probabilities], gold: NDArray[np.int64], main: str) -> dict[str, Any]:
    """Every metric of every reading in percent with its 95 % interval, and the others' paired differences to the reading `main`.

    Args:
        readings: (texts, labels) probabilities by name.
        gold: (texts,) label numbers.

    Returns:
        As `checkpoint_scores.compared`, by "reading/metric": "baseline" is what `main` has, "difference" that of the reading minus
        it, and "better" the share of resamples in which `main` is beaten, by a lower value where that is the better one.
    """
    statistics = {name: label_statistics(probabilities, gold) for name, probabilities in readings.items()}
    order = [main, *(name for name in readings if name != main)]
    report: dict[str, Any] = {"main": main, "metrics": {}, "baseline": {}, "difference": {}}
    for what in statistics[main]:
        drawn = {name: resampled(statistics[name][what], len(gold)) for name in order}
        for name in order:
            report["metrics"][f"{name}/{what}"] = asdict(drawn[name].interval())
            if name != main:
                difference = asdict(drawn[name].minus(drawn[main]).difference())
                if what in LOWER_IS_BETTER:
                    difference["better"] = 1 - difference["better"]
                report["baseline"][f"{name}/{what}"] = asdict(drawn[main].interval())
                report["difference"][f"{name}/{what}"] = difference
    return report


def _load(checkpoint: Checkpoint, folder: Path, objective: str, default: Columns) -> _Labeller:
    model, settings = load_head_model(checkpoint, folder)
    backbone: Any = model.backbone
    facts = stated_facts(str(folder), settings, longest_text(backbone))
    if facts["objective"] != objective:
        found = facts["objective"]
        way_out = f"`openbook evaluate {found}` measures it" if found in OBJECTIVES else "name another folder"
        raise CheckpointUnsupported(
            f"--task {folder} is of the objective {found!r}, wanted is what `openbook train {objective}` left in <output>/best; {way_out}"
        )
    columns = {what: settings.get(f"{what}_column", name) for what, name in asdict(default).items()}
    wrong = {f"{what}_column": name for what, name in columns.items() if not isinstance(name, str)}
    if wrong:
        raise CheckpointUnsupported(
            f"--task {folder}: task.json: " + ", ".join(f"{key!r} is {name!r}, no name" for key, name in wrong.items())
        )
    device = best_device()
    reader = LabelReader(encoder=RowEncoder(checkpoint, max_tokens=facts["max_tokens"]), device=device, precision="fp32")
    return _Labeller(model.to(device), reader, settings, facts["labels"], Columns(**columns))


def _stated_count(folder: Path, settings: Mapping[str, Any], key: str, default: int, *, least: int = 0) -> int:
    count = settings.get(key, default)
    if type(count) is not int or count < least:
        raise CheckpointUnsupported(f"--task {folder}: task.json: {key!r} is {count!r}; wanted is a whole number, {least} or above")
    return count
