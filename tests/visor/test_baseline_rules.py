"""The rules of the encoder-side baselines on hand-made features, against naive code or what the papers say.

Shapes: B samples, N visual tokens, E feature width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_reduction_features import features, row

from budgets import presets
from budgets.registry import METHODS
from visor.reduction.cdpruner import greedy_map, text_relevance
from visor.reduction.divprune import farthest
from visor.reduction.hired import tile_shares, tiles_of
from visor.reduction.pooling import pool_packed
from visor.reduction.prumerge import outliers
from visor.reduction.sparsevlm import clusters, num_clusters, split
from visor.reduction.tome import lengths, merge_pairs
from visor.reduction.vispruner import thinned_out
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


# --- ToMe -----------------------------------------------------------------------------------------------------------


def test_merging_pairs_keeps_sizes_and_the_weighted_mean():
    hidden, size, keys = seeded(2, 9, 5), torch.randint(1, 5, (2, 9)).float(), seeded(2, 9, 4, seed=1)
    for num_merged in (1, 2, 4):
        merged, sizes, stays = merge_pairs(hidden, size, keys, num_merged)
        assert merged.shape == (2, 9 - num_merged, 5)
        assert torch.allclose(sizes.sum(1), size.sum(1))
        assert torch.allclose((merged * sizes[..., None]).sum(1), (hidden * size[..., None]).sum(1), atol=1e-5)
        assert torch.equal(stays.sort(1).values, stays)
    merged, sizes, stays = merge_pairs(hidden, size, keys, 0)
    assert torch.allclose(merged, hidden, atol=1e-6) and torch.equal(sizes, size)


def test_the_most_similar_pair_goes_first():
    keys = torch.tensor([[[1.0, 0], [0, 1], [0.1, 1], [1, 1], [-1, 0]]])  # token 2 is nearly token 1
    merged, sizes, stays = merge_pairs(torch.arange(5.0).view(1, 5, 1), torch.ones(1, 5), keys, 1)
    assert stays.tolist() == [[0, 1, 3, 4]] and sizes.tolist() == [[1, 2, 1, 1]] and merged[0, 1, 0] == 1.5


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
