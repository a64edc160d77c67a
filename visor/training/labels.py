"""Pseudo-labels: what every configuration scores on every question of a training subset; the router learns from them.

Written in chunks, a batch each; what is on disk is not evaluated again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visor.training.data import Skipped, Stream
from visor.training.encoding import Encoder
from visor.training.explore import (
    Encoded,
    Subset,
    check_score,
    encode,
    evaluate,
    lengths_of,
    read_rows,
    relative_cost,
)
from visor.training.forward import PackedModel
from visor.training.processes import Processes
from visor.training.rows import Row
from visor.training.run_folder import write_json


@dataclass
class Labels:
    """What the router learns from: N questions with C configurations each.

    Args:
        vectors_NR: routing vectors.
        scores_NC: score of each configuration.
        images_N: number of the example a question belongs to; a held-out split must not part them.
        kinds: of each question.
        costs_C: decoder prefill FLOPs of the configurations, relative to dense, at the mean lengths.
    """

    vectors_NR: Tensor
    scores_NC: Tensor
    images_N: Tensor
    kinds: list[str]
    costs_C: list[float]

    def labels_N(self, reach: float = 0.99) -> Tensor:
        """The cheapest configuration that reaches `reach` of the score of the costliest one."""
        enough_NC = self.scores_NC >= reach * self.scores_NC[:, -1:]
        return enough_NC.to(torch.uint8).argmax(1)

    @classmethod
    def load(cls, folder: Path) -> Labels:
        """All chunks that `run_labels` has written.

        Raises:
            ValueError: there are none, or the run is not finished.
        """
        if not (folder / "labels.json").exists():
            raise ValueError(f"no finished labels in {folder}; run the stage `labels` first")
        document = json.loads((folder / "labels.json").read_text())
        chunks = [torch.load(folder / name, weights_only=True) for name in document["chunks"]]
        return cls(
            torch.cat([chunk["vectors"] for chunk in chunks]).float(),
            torch.cat([chunk["scores"] for chunk in chunks]),
            torch.cat([chunk["images"] for chunk in chunks]),
            [kind for chunk in chunks for kind in chunk["kinds"]],
            document["costs"],
        )


@torch.no_grad()
def label_batch(
    packed: PackedModel,
    one: Encoded,
    configurations: Sequence[Subset],
    routing: Sequence[str],
    score: str,
    processes: Processes,
) -> tuple[Tensor, list[list[list[float]]]]:
    """(routing vectors [B, Q, R], scores by configuration, row and segment)."""
    with processes.autocast():
        vectors = packed.routing_vectors(one.batch, one.features, configurations, routing)
    scores = [evaluate(packed, one, subset, score, processes) for subset in configurations]
    return vectors, scores


def run_labels(
    packed: PackedModel,
    stream: Stream,
    encoder: Encoder,
    folder: Path,
    processes: Processes,
    routing: Sequence[str],
    num_examples: int = 4096,
    batch_size: int = 32,
    score: str = "exact",
    reach: float = 0.99,
    first_position: int = 0,
) -> dict[str, Any]:
    """Run every configuration over a training subset; writes chunks and `labels.json`.

    Args:
        routing: parts of the routing vector (`visor.model.router`).
        reach: share of the costliest configuration's score that a label has to reach.
        first_position: where in the stream the subset begins.
    """
    check_score(score)
    folder.mkdir(parents=True, exist_ok=True)
    packed.model.to(processes.device).eval()
    configurations = [tuple(subset) for subset in packed.visor.config.configurations]
    if packed.visor.config.router_layer is None:
        raise ValueError(
            f"there is nothing to choose between the configurations {configurations}; run the search first"
        )
    pad_id = encoder.tokenizer.pad_token_id or 0
    skipped = Skipped(folder / f"skipped{'' if processes.size == 1 else f'.{processes.rank}'}.jsonl")
    starts = list(range(0, num_examples, batch_size))
    for chunk in processes.share(range(len(starts))):
        path = folder / f"chunk-{chunk:05d}.pt"
        if path.exists():
            continue
        positions = range(starts[chunk], min(starts[chunk] + batch_size, num_examples))
        rows = read_rows(stream, encoder, [first_position + p for p in positions], skipped)
        one = encode(packed, rows, pad_id, processes, skipped)
        if one is None:
            continue
        vectors, scores = label_batch(packed, one, configurations, routing, score, processes)
        write_chunk(path, one.batch.rows, starts[chunk], vectors, scores)
        if processes.is_main and chunk % (10 * processes.size) == 0:
            print(f"labels: {starts[chunk] + len(positions)} of {num_examples} images", flush=True)
    processes.wait()
    if not processes.is_main:
        return {}
    chunks = sorted(path.name for path in folder.glob("chunk-*.pt"))
    if not chunks:
        raise ValueError(f"no usable example: {skipped.summary()}; see {skipped.path}")
    skips = sum(len(path.read_text().splitlines()) for path in folder.glob("skipped*.jsonl"))
    return summarise(packed, folder, chunks, {"score": score, "reach": reach, "skipped": skips})


def write_chunk(
    path: Path, rows: Sequence[Row], first_image: int, vectors: Tensor, scores: Sequence[Sequence[Sequence[float]]]
) -> None:
    """Write the labels of a batch, whole or not at all.

    Args:
        first_image: number of the batch's first example.
        vectors, scores: as `label_batch` gives them.
    """
    nums = [len(row.segments) for row in rows]
    content = {
        "vectors": torch.cat([vectors[i, :n] for i, n in enumerate(nums)]).to(torch.bfloat16).cpu(),
        "scores": torch.tensor([[s for row in config for s in row] for config in scores]).T.contiguous(),
        "images": torch.tensor([first_image + i for i, n in enumerate(nums) for _ in range(n)]),
        "kinds": [kind for row in rows for kind in row.kinds],
        "lengths": list(lengths_of(rows)),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def summarise(
    packed: PackedModel, folder: Path, chunks: Sequence[str], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `labels.json`, which says that the labels are finished and what is in them.

    Args:
        conditions: what else it says of how they were made; with `reach`.
    """
    configurations = packed.visor.config.configurations
    lengths = [torch.load(folder / name, weights_only=True)["lengths"] for name in chunks]
    num_visual, num_text = (round(float(np.mean([one[k] for one in lengths]))) for k in (0, 1))
    cost = relative_cost(packed, num_visual, num_text)
    document = {
        "configurations": [list(subset) for subset in configurations],
        "costs": [cost(tuple(subset)) for subset in configurations],
        "num_visual": num_visual,
        "num_text": num_text,
        **conditions,
        "chunks": list(chunks),
    }
    write_json(folder / "labels.json", document)  # what `Labels.load` reads
    labels = Labels.load(folder)
    chosen, kinds = labels.labels_N(conditions["reach"]), np.array(labels.kinds)
    of_kind = {kind: kinds == kind for kind in sorted(set(labels.kinds))}
    counts = lambda labels_N: torch.bincount(labels_N, minlength=len(configurations))
    document["num_questions"] = len(labels.kinds)
    document["mean_score"] = [round(value, 4) for value in labels.scores_NC.mean(0).tolist()]
    document["label_share"] = counts(chosen).div(len(chosen)).tolist()
    document["label_share_by_kind"] = {
        kind: counts(chosen[torch.from_numpy(own)]).tolist() for kind, own in of_kind.items()
    }
    document["score_by_kind"] = {
        kind: [round(v, 4) for v in labels.scores_NC.numpy()[own].mean(0).tolist()] for kind, own in of_kind.items()
    }
    write_json(folder / "labels.json", document)
    return document
