"""Words are predicted slot by slot; that is what one product for all slots would say, in the order of the facts."""

import pytest
import torch
import torch.nn.functional as F

from visor.training.auxiliary.word_heads import WordHead


def test_slot_by_slot_equals_all_at_once_and_keeps_the_order_of_the_facts():
    torch.manual_seed(0)
    head = WordHead(8, 5, 11)
    readings = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    slot_N = torch.tensor([3, 0, 3, 4, 0, 1])
    with torch.no_grad():  # the head is right about the facts 0, 3 and 5
        logits_NSW = head.classifier(head.norm(readings[-1])).view(6, 5, 11)
        said_N = logits_NSW[torch.arange(6), slot_N].argmax(-1)
    expected = [True, False, False, True, False, True]
    word_N = torch.where(torch.tensor(expected), said_N, (said_N + 1) % 11)
    loss, right = head.read(readings, slot_N, word_N)
    definition = sum(
        F.cross_entropy(head.classifier(head.norm(x)).view(6, 5, 11)[torch.arange(6), slot_N], word_N, reduction="sum")
        for x in readings
    )
    assert right == expected and loss.item() == pytest.approx(definition.item() / 2, rel=1e-5)
    weights = [*head.parameters(), *readings]
    for ours, theirs in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(definition / 2, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
