"""Stop strings: an answer ends before the first of them, the rest of its batch goes on; the prefill's end is told."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor

from budgets.schedule import dense
from visor.inference import LoadedModel
from visor.inference.generation import StopStrings, cut_at


@pytest.fixture(scope="module")
def loaded():
    model = make_llava()
    model.generation_config.eos_token_id = None  # never stops by itself
    return LoadedModel(model, make_processor(), name="tiny")


def generate(loaded, num=3, **options):
    prepared = [loaded.prepare(make_image(seed), "what is it" + "?" * seed) for seed in range(num)]
    schedules = [dense(loaded.geometry.num_layers, each.num_visual) for each in prepared]
    return loaded.generate(prepared, loaded.encode(prepared), schedules, 16, **options)


def test_an_answer_ends_before_its_stop_string_and_the_others_do_not(loaded):
    free = generate(loaded)
    first = free[0].text
    stop = first[4:6]
    stopped = generate(loaded, stop_strings=(stop, "never said"))
    assert stopped[0].text == first[: first.find(stop)].strip() and len(stopped[0].text) < len(first)
    assert len(stopped[0].token_ids) < 16 and 0 not in stopped[0].token_ids  # padding is no part of it
    for one, other in zip(free[1:], stopped[1:], strict=True):
        assert other.text == cut_at(one.text, (stop,))


def test_without_a_match_nothing_changes(loaded):
    assert generate(loaded, stop_strings=("\n\n",)) == generate(loaded)


def test_cut_at():
    assert cut_at("yes\n\nbecause", ("\n\n",)) == "yes"
    assert cut_at("\n\n yes ", ("\n\n",)) == "yes"  # white space in front says nothing
    assert cut_at("one two three", ("three", "two")) == "one"
    assert cut_at(" plain ", ()) == "plain"


class Letters:
    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def test_a_row_is_done_at_the_step_that_completes_the_string():
    rule, prompt = StopStrings(Letters(), ("\n\n",), 2), [0, 0]
    steps = ["\n\nab\nc\n\nd", "abcdefghi"]
    done = []
    for length in range(1, 10):
        ids = torch.tensor([[*prompt, *map(ord, text[:length])] for text in steps])
        done.append(rule(ids, None).tolist())
    assert [row for row, _ in done] == [False] * 7 + [True, True]
    assert not any(other for _, other in done) and rule.num_tokens == {0: 8}


def test_the_end_of_the_prefill_is_told_once_a_group(loaded):
    calls = []
    generate(loaded, on_first_token=lambda: calls.append(1))
    assert calls == [1]
