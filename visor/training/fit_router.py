"""Train the router on routing vectors and labels that are known already: minutes of arithmetic on a small MLP.

Cross-entropy to the label, the cheapest configuration that suffices. The cost-aware policy reads the same softmax,
summed up to each configuration (`visor.model.router.RouterOutput.success`): no second head that could contradict it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visor.model.router import RouterOutput
from visor.training.explore import write_json
from visor.training.labels import Labels
from visor.training.recipe import RouterFit


def split(images_N: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) questions; all questions about an image are on one side."""
    images = images_N.unique()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    kept_apart = images[order[: max(1, round(held_out * len(images)))]]
    mask_N = torch.isin(images_N, kept_apart)
    return (~mask_N).nonzero()[:, 0], mask_N.nonzero()[:, 0]


def fit(router: nn.Module, labels: Labels, options: RouterFit, folder: Path) -> dict[str, Any]:
    """Train in place, keep the best epoch by held-out loss, write `router.json`; resumes after each epoch.

    Raises:
        ValueError: too few questions to keep some apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_M, test_M = split(labels.images_N, options.held_out, options.seed)
    if not len(train_M):
        raise ValueError(f"{len(labels.kinds)} questions about {len(labels.images_N.unique())} images are too few")
    labels_N, scores_NC, vectors_NR = labels.labels_N(options.reach), labels.scores_NC, labels.vectors_NR
    router.float().train()
    optimizer = torch.optim.AdamW(router.parameters(), lr=options.rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    path, best, best_state, history, first = folder / "state.pt", float("inf"), {}, [], 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        router.load_state_dict(state["router"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        best, best_state, history, first = state["best"], state["best_state"], state["history"], state["epoch"]
    for epoch in range(first, options.epochs):
        generator = torch.Generator().manual_seed(options.seed * 10_007 + epoch)
        order = train_M[torch.randperm(len(train_M), generator=generator)]
        total = 0.0
        for batch in order.split(options.batch_size):
            loss = F.cross_entropy(router(vectors_NR[batch]), labels_N[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        with torch.no_grad():
            held = F.cross_entropy(router(vectors_NR[test_M]), labels_N[test_M]).item()
        history.append([total / len(order), held])
        if held < best:
            best, best_state = held, {name: value.clone() for name, value in router.state_dict().items()}
        state = {
            "router": router.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "best": best, "best_state": best_state, "history": history, "epoch": epoch + 1,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    router.load_state_dict(best_state)
    router.eval()
    with torch.no_grad():
        document = report(router(vectors_NR[test_M]), labels_N[test_M], scores_NC[test_M], labels.costs_C, options)
    document["losses"] = [[round(value, 4) for value in pair] for pair in history]
    write_json(folder / "router.json", document)
    return document


def report(
    logits_NC: Tensor, labels_N: Tensor, scores_NC: Tensor, costs_C: list[float], options: RouterFit
) -> dict[str, Any]:
    """What the router is worth on held-out questions, beside every fixed configuration, chance and the oracle."""
    num = scores_NC.shape[1]
    costs = torch.tensor(costs_C)

    def point(chosen_N: Tensor) -> dict[str, Any]:
        score = scores_NC.gather(1, chosen_N[:, None]).mean().item()
        return {
            "score": round(score, 4),
            "cost": round(costs[chosen_N].mean().item(), 4),
            "share": [round(v, 4) for v in torch.bincount(chosen_N, minlength=num).div(len(chosen_N)).tolist()],
        }

    output = RouterOutput(logits_NC)
    chosen_N = logits_NC.argmax(1)
    confusion = torch.zeros(num, num, dtype=torch.long)
    confusion.index_put_((labels_N, chosen_N), torch.ones_like(labels_N), accumulate=True)
    # At equal mean cost: the router's choices, dealt to questions at random.
    random_score = (torch.bincount(chosen_N, minlength=num) / len(chosen_N)) @ scores_NC.mean(0)
    return {
        "num_questions": len(labels_N),
        "label_accuracy": round((chosen_N == labels_N).float().mean().item(), 4),
        "confusion": confusion.tolist(),
        "router": point(chosen_N),
        "random at its cost": {"score": round(random_score.item(), 4), "cost": point(chosen_N)["cost"]},
        "cost_aware": {
            f"{weight:g}": point(torch.tensor(output.choose(weight, [costs_C] * len(labels_N))))
            for weight in options.cost_weights
        },
        "fixed": [point(torch.full_like(labels_N, index)) for index in range(num)],
        "oracle": point(labels_N),
        "success_calibration": _calibration(output.success, (labels_N[:, None] <= torch.arange(num)).float()),
    }


def _calibration(success_NC: Tensor, suffices_NC: Tensor) -> list[dict[str, float]]:
    """In five bins of predicted success: what was predicted, what came, and how often."""
    bins = (success_NC * 5).long().clamp(max=4)
    return [
        {
            "predicted": round(success_NC[bins == b].mean().item(), 3),
            "seen": round(suffices_NC[bins == b].mean().item(), 3),
            "num": int((bins == b).sum()),
        }
        for b in range(5)
        if (bins == b).any()
    ]
