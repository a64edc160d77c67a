"""The rules of the encoder-side baselines on hand-made features, against naive code or what the papers say.

Shapes: B samples, N visual tokens, E feature width.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_reduction_features import features, row

from budgets import presets
from budgets.registry import METHODS
from visor.engine.compat import rotated_ones
from visor.reduction._tiles import tiles_of_sample
from visor.reduction.cdpruner import greedy_map, text_relevance
from visor.reduction.divprune import farthest
from visor.reduction.flowcut import cuts_behind, flow, last_cut
from visor.reduction.hired import tile_shares, tiles_of
from visor.reduction.pooling import pool_packed
from visor.reduction.prumerge import outliers
from visor.reduction.sparsevlm import best_heads, clusters, num_clusters, split
from visor.reduction.tome import lengths, merge_pairs
from visor.reduction.vispruner import thinned_out
from visor.vision.encode import taps_of
from visor.vision.features import VisionFeatures
from visor.vision.taps import grid_places, tile_places

LLAVA = presets.preset("llava-1.5-7b")


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(x):
    x = torch.nn.functional.normalize(x, dim=-1)
    return x @ x.transpose(-1, -2)


# --- by salience ----------------------------------------------------------------------------------------------------


def test_fastervlm_keeps_the_most_salient_in_order():
    salience = torch.tensor([[0.1, 0.4, 0.2, 0.4, 0.0]])
    vision = VisionFeatures(torch.arange(5.0).view(1, 5, 1), taps={"salience": salience})
    reduced = METHODS.get("fastervlm")().reduce_features(vision, 3)
    assert reduced.features_BTD[0, :, 0].tolist() == [1, 2, 3]
    assert reduced.kept_BN.tolist() == [[False, True, True, True, False]]


def test_vispruner_keeps_half_by_salience_and_thins_out_the_rest():
    """Naive: Python lists, one sample."""
    vision, keep, step = features(batch=2, side=6), 10, 3
    reduced = METHODS.get("vispruner")(step=step).reduce_features(vision, keep)
    for b in range(2):
        order = vision.tap("salience")[b].argsort(descending=True, stable=True).tolist()
        important, rest, alike = order[:5], order[5:], cosine(vision.features_BND[b])
        while len(rest) > 5:
            even, odd = rest[::2], rest[1::2]
            closeness = {i: float(max(alike[i, j] for j in odd)) for i in even}
            even = sorted(even, key=lambda i: -closeness[i])[min(step, len(rest) - 5) :]
            rest = even + odd
        assert reduced.kept_BN[b].nonzero()[:, 0].tolist() == sorted(important + rest)


def test_thinning_out_ends():
    assert thinned_out(cosine(seeded(1, 1, 4)), 0, 8).shape == (1, 0)
    assert thinned_out(cosine(seeded(1, 3, 4)), 3, 8).tolist() == [[0, 1, 2]]
    assert [thinned_out(cosine(seeded(2, 9, 4)), n, 8).shape[1] for n in range(10)] == list(range(10))


# --- diversity ------------------------------------------------------------------------------------------------------


def test_divprune_is_greedy_max_min():
    similar = cosine(seeded(12, 5))
    distance = 1 - similar
    nearest = (distance + 9 * torch.eye(12)).amin(1)
    chosen = [int(nearest.argmax())]
    while len(chosen) < 6:
        others = [i for i in range(12) if i not in chosen]
        chosen.append(max(others, key=lambda i: float(distance[i, chosen].min())))
    assert farthest(similar[None], 6).tolist() == [chosen]


def test_divprune_does_not_see_scale_or_order():
    vision, keep = features(side=5), 8
    kept = METHODS.get("divprune")().reduce_features(vision, keep).kept_BN
    scales = 1 + seeded(2, 25, 1).abs()
    scaled = VisionFeatures(vision.features_BND * scales)
    assert torch.equal(METHODS.get("divprune")().reduce_features(scaled, keep).kept_BN, kept)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    shuffled = VisionFeatures(vision.features_BND[:, order])
    assert torch.equal(METHODS.get("divprune")().reduce_features(shuffled, keep).kept_BN, kept[:, order])


@pytest.mark.parametrize("num_tokens", [3, 7, 10])
def test_cdpruner_is_brute_force(num_tokens):
    """Greedy: of all ways to add one token to those chosen, the one with the largest determinant."""
    relevance = 0.2 + seeded(num_tokens, seed=2).abs()
    kernel = (relevance[:, None] * cosine(seeded(num_tokens, 16)) * relevance).double()
    chosen = []
    for _ in range(num_tokens):
        others = [i for i in range(num_tokens) if i not in chosen]
        chosen.append(max(others, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert greedy_map(kernel[None].float(), num_tokens).tolist() == [chosen]


def test_cdpruners_first_two_are_the_best_pair_that_holds_the_most_relevant():
    kernel = cosine(seeded(8, 16, seed=4)).double()
    first, second = greedy_map(kernel[None].float(), 2)[0].tolist()
    pairs = itertools.combinations(range(8), 2)
    best = max((p for p in pairs if first in p), key=lambda p: float(torch.linalg.det(kernel[list(p)][:, list(p)])))
    assert {first, second} == set(best)


def test_cdpruner_goes_on_beyond_the_rank_of_its_kernel():
    flat = torch.cat([seeded(1, 4, 2), seeded(1, 4, 2)], dim=1)  # 8 tokens in a plane, each twice
    assert sorted(greedy_map(cosine(flat), 8)[0].tolist()) == list(range(8))


@pytest.mark.parametrize("rule", [lambda cos: greedy_map(cos, 12), lambda cos: farthest(cos, 12)])
def test_of_equal_tokens_the_earlier_is_chosen_whatever_rounding_says(rule):
    """The separators of tiles are equal vectors; which one wins must not hang on the batch or the processor."""
    tokens = seeded(1, 16, 32)
    twice = cosine(torch.cat([tokens, tokens], dim=1))  # token i + 16 is token i
    twice.diagonal(dim1=1, dim2=2).fill_(1)
    for seed in range(8):
        rounding = 1e-7 * seeded(1, 32, 32, seed=seed).clamp(-1, 1).triu(1)
        chosen = rule(twice + rounding + rounding.transpose(1, 2))[0]
        assert chosen.tolist() == rule(twice)[0].tolist() and chosen.max() < 16


def test_relevance_is_the_mean_cosine_to_the_text_of_the_sample():
    tokens, texts = seeded(2, 9, 6), [seeded(4, 6, seed=1), seeded(2, 6, seed=2)]
    normalize = torch.nn.functional.normalize
    for b, text in enumerate(texts):
        raw = (normalize(tokens[b], dim=-1) @ normalize(text, dim=-1).T).mean(1)
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        assert torch.allclose(text_relevance(tokens, texts)[b], expected, atol=1e-5)
    vision = VisionFeatures(tokens, stage="projected")
    with pytest.raises(ValueError, match="2 samples but 0 texts"):
        METHODS.get("cdpruner")().reduce_features(vision, 3)
    assert METHODS.get("cdpruner")(relevance="none").reduce_features(vision, 3).kept_BN.sum() == 6


# --- PruMerge -------------------------------------------------------------------------------------------------------


def test_the_iqr_rule_on_a_hand_made_vector():
    # Quartiles of 1..9 with 30: 3.25 and 7.75, so the fence is 7.75 + 1.5 * 4.5 = 14.5.
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 30], [5.0] * 10])
    assert outliers(scores).sum(1).tolist() == [1, 0]
    assert outliers(torch.cat([scores, -torch.ones(2, 4)], 1))[:, :10].equal(outliers(scores))  # ends of lines


def prumerge_features(scores, width=3, seed=0):
    num = scores.shape[1]
    keys = seeded(len(scores), num, 4, seed=seed + 1)
    return VisionFeatures(seeded(len(scores), num, width, seed=seed), taps={"last_salience": scores, "last_keys": keys})


def test_prumerge_merges_neighbours_and_the_rest():
    scores = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]])
    vision = prumerge_features(scores)
    reduced = METHODS.get("prumerge")(neighbours=2).reduce_features(vision, 3)
    x, alike = vision.features_BND[0], cosine(vision.tap("last_keys")[0])
    for place, token in enumerate((1, 3)):  # in the order of scores
        near = sorted((i for i in range(5) if i != token), key=lambda i: -float(alike[token, i]))[:2]
        merged = x[token] + sum(scores[0, i] * x[i] for i in near)
        assert torch.allclose(reduced.features_BTD[0, place], merged, atol=1e-6)
    rest = sum(scores[0, i] * x[i] for i in (0, 2, 4))
    assert torch.allclose(reduced.features_BTD[0, 2], rest, atol=1e-6)
    assert reduced.kept_BN.tolist() == [[False, True, False, True, False]]


def test_prumerge_counts_what_stands_out():
    scores = torch.rand((1, 36), generator=torch.Generator().manual_seed(0))
    scores[0, [3, 20]] = 50
    schedule = METHODS.get("prumerge")().schedule(LLAVA, 36)
    assert schedule.encoder.keep == 36  # at most
    resolved = METHODS.get("prumerge")().resolve(schedule, prumerge_features(scores))
    assert resolved.encoder.keep == 3 and resolved.structure == schedule.structure
    kept = METHODS.get("prumerge")().reduce_features(prumerge_features(scores), 3).kept_BN
    assert kept.nonzero()[:, 1].tolist() == [3, 20]
    counted = METHODS.get("prumerge")(keep=9).schedule(LLAVA, 36)
    assert METHODS.get("prumerge")().resolve(counted, prumerge_features(scores)) == counted


def test_prumerge_plus_adds_evenly_spaced_tokens():
    scores = torch.linspace(0.1, 0.2, 20)[None].repeat(2, 1)
    scores[0, [4, 5]] = 9.0
    kept = METHODS.get("prumerge+")().reduce_features(prumerge_features(scores), 9).kept_BN
    assert kept.sum(1).tolist() == [8, 8]
    assert kept[0, [4, 5]].all()
    others = [i for i in range(20) if i not in (4, 5)]
    gaps = torch.tensor([place for place, i in enumerate(others) if kept[0, i]]).diff()
    assert gaps.max() - gaps.min() <= 1
    scores[0] = 9.0 * (torch.arange(20) < 12)  # more stand out than there is room for
    assert METHODS.get("prumerge+")().reduce_features(prumerge_features(scores), 4).kept_BN.sum(1).tolist() == [3, 3]


def test_prumerge_plus_puts_outliers_by_score_then_spaced_tokens_by_place_then_the_rest():
    scores = torch.linspace(0.1, 0.2, 20)[None].clone()
    scores[0, [4, 5]] = torch.tensor([9.0, 8.0])
    vision = prumerge_features(scores)
    reduced = METHODS.get("prumerge+")(keep=9, neighbours=0).reduce_features(vision, 9)
    assert reduced.places_BT[0, :8].tolist() == [4, 5, 2, 7, 10, 13, 16, 19]
    kept = [4, 5, 2, 7, 10, 13, 16, 19]
    assert torch.equal(reduced.features_BTD[0, :8], vision.features_BND[0, kept])
    rest = sum(scores[0, i] * vision.features_BND[0, i] for i in range(20) if i not in kept)
    assert torch.allclose(reduced.features_BTD[0, 8], rest, atol=1e-5)
    scores[0, [4, 5]] = torch.tensor([8.0, 9.0])
    assert METHODS.get("prumerge+")().reduce_features(prumerge_features(scores), 9).places_BT[0, :2].tolist() == [5, 4]


def adaptive(scores):
    """Naive: the authors' rule for one sample, as a list of places."""
    values = scores.tolist()
    fence = torch.quantile(scores, 0.75) + 1.5 * (torch.quantile(scores, 0.75) - torch.quantile(scores, 0.25))
    best = sorted((i for i, value in enumerate(values) if value > fence), key=lambda i: -values[i])
    step = max(1, int(int(len(values) / max(1, len(best))) / 3))
    return best + [i for i in range(0, len(values) - 1, step) if i not in best]


@pytest.mark.parametrize("num_out", [0, 1, 2, 5, 40, 100])
def test_prumerge_plus_counts_by_how_many_stand_out(num_out):
    method = METHODS.get("prumerge+")()
    generator = torch.Generator().manual_seed(num_out)
    scores = torch.rand((1, 576), generator=generator)
    scores[0, torch.randperm(576, generator=generator)[:num_out]] += 50
    expected = adaptive(scores[0])
    schedule = method.schedule(LLAVA, 576)
    assert schedule.encoder.keep == 576  # at most
    resolved = method.resolve(schedule, prumerge_features(scores))
    assert resolved.encoder.keep == min(576, len(expected) + 1) and resolved.structure == schedule.structure
    reduced = method.reduce_features(prumerge_features(scores), resolved.encoder.keep)
    assert reduced.places_BT[0, : len(expected)].tolist() == expected


# --- FlowCut --------------------------------------------------------------------------------------------------------


def flow_of(values_TPD, num_heads, **others):
    zeros = torch.zeros_like(values_TPD)
    alive = torch.ones(values_TPD.shape[:2], dtype=torch.bool)
    return flow({"q": zeros, "k": zeros, "v": values_TPD, **others}, alive, num_heads, True)


def test_flowcut_scores_each_head_for_itself_and_measures_the_mean_value():
    values = torch.tensor([[[1.0, 0, 1, 0], [3, 0, -3, 0], [1, 0, 1, 0], [0, 1, 0, 1]]])
    attention, scores = flow_of(values, 2)
    assert torch.allclose(attention, torch.full((1, 3), 1 / 3))
    assert torch.allclose(scores, torch.tensor([[0.0, 0.686, 0.463]]), atol=5e-4)


def test_flowcut_does_not_see_in_which_order_heads_come():
    values = seeded(2, 9, 12)
    swapped = values.unflatten(-1, (3, 4)).flip(2).flatten(2)
    assert torch.allclose(flow_of(values, 3)[1], flow_of(swapped, 3)[1], atol=1e-6)
    assert not torch.allclose(flow_of(values, 3)[1], flow_of(values, 1)[1], atol=1e-2)


def test_flowcut_cuts_behind_every_second_block_up_to_the_last_but_one():
    """CLIP-L's features are behind block 22 of 0..23."""
    assert [block for block in range(23) if cuts_behind(block, 23)] == list(range(1, 22, 2)) and last_cut(23) == 21
    assert [block for block in range(26) if cuts_behind(block, 26)] == list(range(0, 25, 2))
    assert [block for block in range(2) if cuts_behind(block, 2)] == [0]
    assert [block for block in range(1) if cuts_behind(block, 1)] == [0]


class Walk:
    """A tower whose blocks pass on what they get, with the projections that it is given."""

    has_cls = True

    def __init__(self, num_blocks, num_heads, width):
        self.num_heads, self.lengths = num_heads, []
        projections = {f"{name}_proj": torch.nn.Linear(width, width) for name in "qkv"}
        attention = torch.nn.Module()
        for name, projection in projections.items():
            setattr(attention, name, projection)
        block = torch.nn.Module()
        block.self_attn = attention
        self.blocks = [block] * num_blocks

    def embed(self, hidden_TPD):
        return hidden_TPD

    def attend(self, block, hidden_TPD, bias_T1PP):
        self.lengths.append(hidden_TPD.shape[1] - 1)
        for name in "qkv":
            getattr(block.self_attn, f"{name}_proj")(hidden_TPD)
        return hidden_TPD

    def feed_forward(self, block, hidden_TPD):
        return hidden_TPD


@torch.no_grad()
def test_flowcut_is_the_rule_written_down_naively():
    """One sample, no masks, five ways that differ from other rules of the kind: all in twenty lines."""
    torch.manual_seed(0)
    num_blocks, num_heads, width, keep = 7, 2, 8, 9
    walk, hidden = Walk(num_blocks, num_heads, width), 2 * seeded(1, 41, width)
    tokens, places, running, expected_lengths = hidden[0], list(range(40)), None, []
    for block in range(num_blocks):
        expected_lengths.append(len(tokens) - 1)
        if block > num_blocks - 2:
            break
        q, k, v = (getattr(walk.blocks[block].self_attn, f"{name}_proj")(tokens) for name in "qkv")
        heads = range(num_heads)
        part = lambda x, head: x[:, head * 4 : head * 4 + 4]
        a = torch.stack([(part(q, h)[0] @ part(k, h).T / 2).softmax(-1) for h in heads]).mean(0)[1:]
        c = torch.stack([(part(v, h)[0] @ part(v, h).T).softmax(-1) for h in heads]).mean(0)[1:]
        size = (sum(part(v, h) for h in heads) / num_heads).abs().sum(-1)[1:]
        score = (a / a.sum() + c / c.sum()) * size
        running = score if running is None else 0.5 * running + 0.5 * score
        left = num_blocks - 2 - block
        if left % 2:
            continue
        share = a / a.sum()
        spread = -(share * share.log()).sum() / torch.tensor(float(len(a))).log()
        gone = round(float((len(a) - keep) / left**0.5 * (1 - spread**2))) if left else len(a) - keep
        stay = running.topk(len(a) - gone).indices.sort().values
        tokens, running = torch.cat([tokens[:1], tokens[1:][stay]]), running[stay]
        places = [places[i] for i in stay]
    found, kept = METHODS.get("flowcut")(keep=keep).reduce_in_tower(walk, hidden, keep)
    assert kept[0].nonzero()[:, 0].tolist() == places and walk.lengths == expected_lengths
    assert len(set(expected_lengths)) >= 3 and expected_lengths[-1] == keep
    assert torch.equal(found[0], tokens)


# --- HiRED ----------------------------------------------------------------------------------------------------------


def hired_features(batch=2, seed=0):
    """An overview of 4 x 4, and 1 x 2 tiles whose image fills them but for the last column; lines end."""
    places = torch.cat(list(tile_places(torch.zeros(3, 16, 1), 0, (1, 2))))
    overview, parts = places[:16], places[16:].view(2, 4, 4, 3).transpose(0, 1).reshape(4, 8, 3)[:, :7]
    end = torch.full((4, 1, 3), -1.0)
    places = torch.cat([overview, torch.cat([parts, end], 1).flatten(0, 1)])
    generator = torch.Generator().manual_seed(seed)
    taps = {name: torch.rand((batch, 48), generator=generator) for name in ("salience", "first_salience")}
    is_end = places[:, 0] < 0
    taps = {name: tap.masked_fill(is_end, -1.0) for name, tap in taps.items()}
    taps["places"] = places.expand(batch, -1, -1)
    return VisionFeatures(torch.rand((batch, 48, 5), generator=generator), "projected", taps)


def test_hired_knows_which_part_of_the_overview_a_tile_shows():
    tile, seen = tiles_of(hired_features().tap("places"))
    assert tile[0, :16].eq(0).all()
    assert tile[0, 16:24].tolist() == [1, 1, 1, 1, 2, 2, 2, -1]
    # Tile 1 shows 4 of the image's 7 columns: the middles of the overview's first two columns lie in it.
    assert seen[0, :4].tolist() == [1, 1, 2, 2]
    assert tiles_of(torch.tensor([[[0.0, 0.5, 0.5]]]))[1].tolist() == [[0]]


def test_hired_shares_by_where_the_overview_looks():
    vision, keep = hired_features(), 20
    reduced = METHODS.get("hired")().reduce_features(vision, keep)
    tile, seen = tiles_of(vision.tap("places"))
    for b in range(2):
        kept = reduced.kept_BN[b]
        assert kept.sum() == keep and not kept[tile[b] == -1].any()
        mass = [float(vision.tap("first_salience")[b, :16][seen[b, :16] == q].sum()) for q in (1, 2)]
        shares = [10, *(int(10 * m / sum(mass)) for m in mass)]
        for q, share in enumerate(shares):
            members = (tile[b] == q).nonzero()[:, 0]
            best = members[vision.tap("salience")[b, members].argsort(descending=True)][:share]
            assert kept[best].all()
            assert share <= kept[members].sum() <= share + 1  # what rounding leaves goes to the best


@pytest.mark.parametrize("keep", [1, 2, 7, 30, 44, 47])
def test_hired_gives_any_number_of_tokens_and_never_more(keep):
    assert METHODS.get("hired")().reduce_features(hired_features(), keep).features_BTD.shape == (2, keep, 5)
    mass, size = torch.rand(3, 5), torch.tensor([[16, 3, 16, 0, 9]] * 3)
    shares = tile_shares(mass, size, keep, 0.5)
    assert (shares.sum(1) <= keep).all() and (shares <= size).all()


def test_hired_on_one_tile_is_the_most_salient():
    vision = features(side=4)
    places = torch.nn.functional.pad(grid_places(4, 4, torch.device("cpu")), (1, 0)).expand(2, -1, -1)
    taps = {**vision.taps, "first_salience": torch.rand(2, 16), "places": places}
    reduced = METHODS.get("hired")().reduce_features(VisionFeatures(vision.features_BND, taps=taps), 5)
    assert torch.equal(reduced.kept_BN, METHODS.get("fastervlm")().reduce_features(vision, 5).kept_BN)


# --- a number in every tile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "fastervlm"])
def test_a_number_in_every_tile_is_the_rule_in_each_by_itself(name):
    vision = hired_features()
    vision = replace(vision, taps={**vision.taps, "keys": seeded(2, 48, 8)})
    method, alone = METHODS.get(name)(keep=7, per_tile=True), METHODS.get(name)()
    tiles = tiles_of(vision.tap("places"))[0]
    kept = method.reduce_features(vision, 21)
    for b in range(2):
        for tile in range(3):
            members = (tiles[b] == tile).nonzero()[:, 0]
            part = replace(
                vision, features_BND=vision.features_BND[b : b + 1, members],
                taps={key: tap[b : b + 1, members] for key, tap in vision.taps.items()},
            )  # fmt: skip
            expected = alone.reduce_features(part, 7).kept_BN[0]
            assert torch.equal(kept.kept_BN[b, members], expected) and expected.sum() == 7
        assert not kept.kept_BN[b, tiles[b] < 0].any()  # no end of a line
    num_merged = method.num_contextual(7) if name == "visionzip" else 0
    own = kept.places_BT[:, : 21 - 3 * num_merged]
    assert torch.equal(own, own.sort(1).values)
    if not num_merged:
        assert torch.equal(kept.features_BTD, vision.features_BND.gather(1, own[..., None].expand(-1, -1, 5)))
    apart = torch.cat([method.reduce_features(row(vision, b), 21).features_BTD for b in range(2)])
    assert torch.equal(kept.features_BTD, apart)


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "fastervlm"])
@pytest.mark.parametrize(("keep", "total"), [(128, 640), (64, 320), (32, 160)])
def test_per_tile_is_what_the_authors_report_on_llava_next(name, keep, total):
    """Four tiles and the overview of a square image: 576 tokens each, and 48 ends of lines."""
    overview, tiles = grid_places(24, 24, torch.device("cpu")), 2 * grid_places(48, 48, torch.device("cpu"))
    lines = torch.nn.functional.pad(tiles, (1, 0), value=1.0).view(48, 48, 3)
    lines = torch.cat([lines, torch.full((48, 1, 3), -1.0)], dim=1).flatten(0, 1)
    places = torch.cat([torch.nn.functional.pad(overview, (1, 0)), lines])[None]
    salience = torch.rand(1, 2928).masked_fill(places[..., 0] < 0, -1)
    taps = {"places": places, "salience": salience, "keys": torch.rand(1, 2928, 4)}
    vision = VisionFeatures(seeded(1, 2928, 6), "projected", taps)
    method, geometry = METHODS.get(name)(keep=keep, per_tile=True), presets.preset("llava-next-7b")
    schedule = method.schedule(geometry, 2928)
    assert method.adaptive and "places" in method.taps and not METHODS.get(name)().adaptive
    resolved = method.resolve(schedule, vision)
    assert resolved.encoder.keep == total <= schedule.encoder.keep and resolved.structure == schedule.structure
    assert type(method)(**dict(resolved.encoder.params)) == method
    assert method.reduce_features(vision, total).features_BTD.shape == (1, total, 6)


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "fastervlm"])
def test_per_tile_of_one_tile_is_the_number(name):
    vision = features(side=4)
    places = torch.nn.functional.pad(grid_places(4, 4, torch.device("cpu")), (1, 0)).expand(2, -1, -1)
    vision = replace(vision, taps={**vision.taps, "places": places})
    tile, whole = (METHODS.get(name)(keep=5, per_tile=per_tile) for per_tile in (True, False))
    assert tile.resolve(tile.schedule(LLAVA, 16), vision).encoder.keep == 5
    assert torch.equal(tile.reduce_features(vision, 5).features_BTD, whole.reduce_features(vision, 5).features_BTD)


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "fastervlm"])
def test_per_tile_runs_from_pixels_to_an_answer(name):
    from samples import loaded, samples

    for family in ("llava_next", "llava"):
        model, prepared = loaded(family), samples(family)[:2]
        method = METHODS.get(name)(keep=3, per_tile=True)
        schedules = [method.schedule(model.geometry, sample.num_visual) for sample in prepared]
        vision = model.encode(prepared, taps_of(schedules))
        resolved = model.resolve(vision, schedules)
        counts = [min(3, len(tile)) for each in vision for tile in tiles_of_sample(each, 0)]
        assert sum(schedule.encoder.keep for schedule in resolved) == sum(counts)
        assert all(len(answer.token_ids) == 1 for answer in model.generate(prepared, vision, resolved, 1))
    with pytest.raises(ValueError, match="cannot be composed"):
        METHODS.get(f"{name}+fastv")(**{f"{name}_per_tile": True}).schedule(LLAVA, 576)


# --- ToMe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_cls", [False, True])
def test_merging_pairs_keeps_sizes_and_the_weighted_mean(has_cls):
    hidden, size, keys = seeded(2, 9, 5), torch.randint(1, 5, (2, 9)).float(), seeded(2, 9, 4, seed=1)
    for num_merged in (1, 2, 4):
        merged, sizes, stays = merge_pairs(hidden, size, keys, num_merged, has_cls)
        assert merged.shape == (2, 9 - num_merged, 5)
        assert torch.allclose(sizes.sum(1), size.sum(1))
        assert torch.allclose((merged * sizes[..., None]).sum(1), (hidden * size[..., None]).sum(1), atol=1e-5)
        assert stays[:, -4:].tolist() == [[1, 3, 5, 7]] * 2  # B behind what is left of A
        if has_cls:
            assert stays[:, 0].tolist() == [0, 0] and torch.allclose(merged[:, 0], hidden[:, 0], atol=1e-6)
            assert torch.equal(stays[:, :-4].sort(1).values, stays[:, :-4])


def test_the_most_similar_pair_goes_first():
    keys = torch.tensor([[[1.0, 0], [0, 1], [0.1, 1], [1, 1], [-1, 0]]])  # token 2 is nearly token 1
    merged, sizes, stays = merge_pairs(torch.arange(5.0).view(1, 5, 1), torch.ones(1, 5), keys, 1, False)
    assert stays.sort(1).values.tolist() == [[0, 1, 3, 4]]
    into = stays[0].tolist().index(1)
    assert sizes[0, into] == 2 and merged[0, into, 0] == 1.5


def test_behind_a_cls_the_patches_1_3_5_look_for_partners_among_0_2_4():
    """Patch 1 and patch 3 are most similar to patch 0; both go into it."""
    hidden = torch.tensor([9.0, 0, 1, 2, 3]).view(1, 5, 1)  # the CLS first
    keys = torch.tensor([[[0.0, -1], [1, 0.1], [1, 0], [1, -0.1], [0, 1]]])
    merged, sizes, stays = merge_pairs(hidden, torch.ones(1, 5), keys, 2, True)
    assert stays.tolist() == [[0, 1, 3]] and sizes.tolist() == [[1, 3, 1]]
    assert merged[0, :, 0].tolist() == pytest.approx([9, 4 / 3, 2])


def test_the_next_block_deals_out_the_order_that_this_one_left():
    """Six patches, one merge a block. After the first the order is [CLS, 3, 5 | 0, 2, 4]: 3, 0 and 4 are then in B."""
    walk = Walk(2, 1, 2)
    keys = torch.tensor([[0.0, -1], [1, 0], [1, 0.01], [0.9, 0.3], [0.2, 1], [-1, 0.4], [-0.2, 1]])
    with torch.no_grad():
        walk.blocks[0].self_attn.k_proj.weight.copy_(torch.eye(2))
        walk.blocks[0].self_attn.k_proj.bias.zero_()
    hidden, kept = METHODS.get("tome")(keep=4).reduce_in_tower(walk, keys[None], 4)
    # First patch 1 into 0; then of A = [5, 2] patch 5 (-.2, 1) into 3 (.2, 1), by cosine .92; 2 into 0 would have .95.
    second = {5: {p: float(cosine(keys[1:])[5, p]) for p in (3, 4)}, 2: float(cosine(keys[1:])[2, 0])}
    assert second[2] > max(second[5].values())
    assert kept[0].nonzero()[:, 0].tolist() == [0, 3, 4, 5]
    assert torch.allclose(hidden[0, 1], (keys[1] + keys[2] + keys[3]) / 3)
    assert torch.equal(hidden[0, [0, 2, 3, 4]], keys[[0, 4, 5, 6]])


def test_every_block_merges_at_most_half_and_all_reach_the_number():
    for num_visual, keep, num_blocks in ((576, 64, 23), (576, 1, 23), (36, 9, 2), (16, 16, 3)):
        per_block = lengths(num_visual, keep, num_blocks)
        assert per_block[0][0] == num_visual and per_block[-1][1] == keep and len(per_block) == num_blocks
        assert all(left >= live - live // 2 for live, left in per_block)
    with pytest.raises(ValueError, match="keep=3 cannot be reached"):
        lengths(36, 3, 2)


# --- SparseVLM ------------------------------------------------------------------------------------------------------


def test_sparsevlm_keeps_the_authors_tables():
    assert METHODS.get("sparsevlm")(tokens=192).schedule(LLAVA, 576).visual_tokens == tuple(
        [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16
    )
    for name, version in (("sparsevlm", 1), ("sparsevlm-v2", 2)):
        for tokens, counts in METHODS.get(name).table.items():
            if 0 < tokens < 576:
                assert METHODS.get(name)(tokens=tokens).kept(576) == list(counts), version
    schedule = METHODS.get("sparsevlm")(tokens=192).schedule(LLAVA, 576)
    assert sum(schedule.visual_tokens) / 32 == 206.5  # the mean that its authors count
    v2 = METHODS.get("sparsevlm-v2")().schedule(LLAVA, 576)
    assert v2.visual_tokens == tuple([576] * 3 + [300] * 4 + [200] * 9 + [118] * 16) and v2.positions == "kept"


@pytest.mark.parametrize("tokens", [64, 96, 128, 192])
def test_a_count_splits_as_it_was_made(tokens):
    live = 576
    for kept in METHODS.get("sparsevlm")(tokens=tokens).kept(576):
        left = kept + num_clusters(live - kept)
        assert split(live, left) == (kept, left - kept)
        live = left


def test_clusters_are_density_peaks_whatever_the_padding():
    """Naive: one sample, loops."""
    points, num = seeded(7, 6, seed=5), 3
    distance = torch.cdist(points, points) / 6**0.5
    spread = distance.square().sort(1).values[:, :num].mean(1)
    delta = []
    for i in range(7):
        denser = [j for j in range(7) if spread[j] < spread[i]]
        delta.append(float(distance[i, denser].min() if denser else distance[i].max()))
    peaks = (torch.tensor(delta) * (-spread).exp()).argsort(descending=True)[:num].tolist()
    joins = [peaks.index(i) if i in peaks else int(distance[i, peaks].argmin()) for i in range(7)]
    expected = torch.stack([points[[i for i in range(7) if joins[i] == c]].mean(0) for c in range(num)])
    padded = torch.stack([torch.cat([points, 100 * torch.ones(4, 6)]), seeded(11, 6, seed=6)])
    valid = torch.tensor([[True] * 7 + [False] * 4, [True] * 11])
    means, centres = clusters(padded, valid, torch.tensor([[3], [5]]), 5)
    assert centres[0, :3].tolist() == peaks
    assert torch.allclose(means[0, :3], expected, atol=1e-5)


def merged_points(points, num):
    means, _ = clusters(points[None], torch.ones(1, len(points), dtype=torch.bool), torch.tensor([[num]]), num)
    return means[0]


def test_of_two_points_of_equal_density_the_earlier_is_the_denser():
    """With two clusters a density is that of the nearest neighbour: each other's nearest have the same."""
    far = torch.tensor([[20.0 + 3 * i, 7.0 * i] for i in range(8)])
    points = torch.cat([torch.tensor([[0.0, 0], [0.1, 0], [5, 0], [5.3, 0]]), far])
    assert torch.allclose(merged_points(points, 2), torch.tensor([[0.05, 0], [25.43, 19.6]]), atol=5e-3)


def test_equal_points_are_one_place_to_the_clusters():
    """Plain background gives equal tokens; rounding must not make one of them a peak of its own."""
    tokens = 30 * seeded(6, 64)
    points = torch.cat([tokens, tokens[:3]])  # 6 is 0, 7 is 1, 8 is 2
    _, centres = clusters(points[None], torch.ones(1, 9, dtype=torch.bool), torch.tensor([[3]]), 3)
    assert centres.max() < 6
    for seed in range(4):
        noisy = points * (1 + 1e-7 * seeded(9, 64, seed=seed).clamp(-1, 1))
        assert clusters(noisy[None], torch.ones(1, 9, dtype=torch.bool), torch.tensor([[3]]), 3)[1].equal(centres)


def test_the_rope_kernel_at_a_head_width_of_128():
    from tiny_models import make_model

    attention = make_model("llava").get_decoder().layers[0].self_attn
    attention.head_dim = 128  # the tiny model has narrower heads; the kernel asks for nothing else of it
    angles = torch.tensor([0.0, 600, 1000])[:, None] * 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    angles = torch.cat([angles, angles], dim=1)[None]
    ones = rotated_ones(attention, (angles.cos(), angles.sin()))[0]
    kernel = (ones @ ones.T) / 128**0.5
    assert kernel[0, 0] == pytest.approx(11.3, abs=0.02) and kernel[0, 1] == pytest.approx(2.35, abs=0.01)
    assert kernel[1, 2] == pytest.approx(float((2 * (400 * 10000.0 ** (-torch.arange(0, 128, 2) / 128)).cos()).sum()
                                               / 128**0.5), abs=1e-3)  # fmt: skip


def test_only_the_heads_with_the_most_attention_to_the_image_count():
    attention = torch.rand((2, 8, 5, 12), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 1, 1]])
    visual = torch.arange(12)[None].repeat(2, 1) < torch.tensor([[9], [6]])
    attention[~(weights > 0)[:, None].expand(-1, 8, -1)] = torch.nan  # rows of padding saw nothing
    scores = best_heads(attention, weights, visual, 3 / 8)
    for b in range(2):
        rows = attention[b][:, weights[b] > 0]
        mass = [float(rows[h][:, visual[b]].sum()) for h in range(8)]
        best = sorted(range(8), key=lambda h: -mass[h])[:3]
        assert torch.allclose(scores[b], rows[best].mean((0, 1)), atol=1e-6)
    assert torch.allclose(best_heads(attention, weights, visual, 1.0)[0], attention[0][:, weights[0] > 0].mean((0, 1)))


# --- pooling of packed tiles ----------------------------------------------------------------------------------------


def test_packed_tiles_are_pooled_by_windows():
    vision = hired_features(1)
    values = torch.arange(48.0)[:, None]
    values[vision.tap("places")[0, :, 0] < 0] = -7.0
    pooled = pool_packed(values, vision.tap("places")[0], 12)[:, 0].tolist()
    overview = values[:16].view(4, 4)
    assert pooled[:4] == [float(overview[i : i + 2, j : j + 2].mean()) for i in (0, 2) for j in (0, 2)]
    assert [pooled[4:].index(-7.0), pooled[-1]] == [3, -7.0]  # two strips, each ended
    for keep in range(1, 48):
        assert pool_packed(values, vision.tap("places")[0], keep).shape == (keep, 1)


def test_a_batch_is_its_samples_for_every_rule():
    """On features whose samples differ; the families' own tests are in test_baselines.py."""
    vision = hired_features(3)
    taps = {**vision.taps, "last_salience": vision.tap("salience"), "keys": seeded(3, 48, 8),
            "last_keys": seeded(3, 48, 8)}  # fmt: skip
    vision = VisionFeatures(vision.features_BND, "projected", taps, sample_keys=("a", "b", "c"))
    for name in ("fastervlm", "vispruner", "divprune", "hired", "prumerge", "prumerge+", "pooling", "random"):
        method = METHODS.get(name)()
        together = method.reduce_features(vision, 17).features_BTD
        apart = torch.cat([method.reduce_features(row(vision, i), 17).features_BTD for i in range(3)])
        assert torch.allclose(together, apart, atol=1e-5), name
