"""Smoothing, aggregates, scores, refinement, calibration, branches: what holds for every registered part, and edges."""
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from adflow.evaluate.metrics import pixel_metrics
from adflow.evaluate.scoring import AGGREGATES, image_scores, pixel_maps
from adflow.evaluate.smoothing import SMOOTHING, average_precision
from adflow.features.store import from_arrays
from adflow.flow.branches import BRANCHES, Scorer, narrow, soft_mean
from adflow.flow.losses import patch_nll
from adflow.flow.moleflow import MoLEFlow
from adflow.flow.scores import CALIBRATION, REFINE, SCORES, held_or_training, maps_of, prefix_nll
from adflow.parts import PartError, add_task, load_weights, use_task

DIM, GRID, LAYERS = 8, (6, 6), [3, 5]


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def problem(seed=0, n=12, grid=(9, 9), views=1):
    "Score maps of normals and of defects (2×2 patches) per view, and masks."
    maps, masks = [30 * rand(2 * n, *grid, seed=seed + i) - 500 for i in range(views)], torch.zeros(n, *grid).bool()
    for i in range(n): masks[i, i % 7:i % 7 + 2, (3 * i) % 7:(3 * i) % 7 + 2] = True
    for m in maps: m[n:][masks] += 80
    return [m[:n] for m in maps], [m[n:] for m in maps], masks

def with_slots(part, n=2):
    for _ in range(n): add_task(part, seed=1)
    use_task(part, 0)
    return part

def buffers(part, slot): return {k: v.clone() for k, v in part.state_dict().items() if f'tasks.{slot}.' in k}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------ map → map parts with slots, every one of them
MAPS = [(r, name) for r in (CALIBRATION, REFINE, BRANCHES) for name in r]

def build(registry, name): return with_slots(registry.build(name, dim=DIM, grid=(9, 9), layers=LAYERS))
def maps_for(registry, part, seed): return problem(seed, views=len(part.views()) if registry is BRANCHES else 1)
def call(registry, part, maps): return part(maps if registry is BRANCHES else maps[0])

def fit(registry, part, normal, defect, masks):
    if registry is CALIBRATION: part.fit(normal[0])
    elif registry is REFINE: part.fit(normal[0], defect[0], masks)
    else: part.fit(normal, defect, masks)

def fitted(registry, name, unit=lambda m: m):
    "A part fitted on one problem, and its maps of another's defects, all scores in another unit."
    part = build(registry, name)
    normal, defect, masks = maps_for(registry, part, 0)
    fit(registry, part, [unit(m) for m in normal], [unit(m) for m in defect], masks)
    return part, call(registry, part, [unit(m) for m in maps_for(registry, part, 9)[1]])

every = pytest.mark.parametrize('registry, name', MAPS, ids=lambda v: getattr(v, 'kind', v))

@every
def test_what_is_fitted_lives_in_the_slot(registry, name):
    part, out = fitted(registry, name)
    assert not list(part.parameters())                        # nothing for an optimizer to find without a gradient
    assert out.isfinite().all() and out.shape == (12, 9, 9)
    first, neutral = buffers(part, 0), buffers(part, 1)
    use_task(part, 1)
    fit(registry, part, *maps_for(registry, part, 5))
    assert same(buffers(part, 0), first)                      # to the bit
    if part.fits: assert not same(buffers(part, 1), neutral)
    other, new = build(registry, name), maps_for(registry, part, 9)[1]
    load_weights(other, part.state_dict())
    use_task(part, 0)
    assert torch.equal(call(registry, part, new), out) and torch.equal(call(registry, other, new), out)

@every
def test_fitting_is_deterministic_and_does_not_depend_on_the_unit(registry, name):
    "With scores in another unit, 2s − 900, calibrated and fused maps are the same, refined ones in that unit."
    out, again, moved = (fitted(registry, name, u)[1] for u in (lambda m: m, lambda m: m, lambda m: 2 * m - 900))
    assert torch.equal(out, again)
    unit = registry is REFINE or name == 'none'
    assert torch.allclose(moved, 2 * out - 900 if unit else out, atol=2e-2 if unit else 2e-3)

@every
def test_a_planted_defect_scores_higher_than_normal_and_no_score_is_turned_around(registry, name):
    part, s = fitted(registry, name)
    normal, _, masks = maps_for(registry, part, 9)
    n = call(registry, part, normal)
    assert s[masks].mean() > n.mean() + 1.5 * n.std()
    if registry is REFINE: return                             # a neighbour's score may lower a map there, see below
    x = [m.clone().requires_grad_() for m in normal]
    for grad in torch.autograd.grad(call(registry, part, x).sum(), x, materialize_grads=True): assert grad.min() > -1e-6

@pytest.mark.parametrize('name', [n for n in BRANCHES if BRANCHES[n].wants_defects])
def test_fitted_fusion_is_at_least_as_good_as_the_start_on_what_it_was_fitted_on(name):
    for seed in range(3):
        part = build(BRANCHES, name)
        normal, defect, masks = problem(seed, views=2)
        defect[0] = normal[0]                                  # the first branch sees nothing
        y = torch.cat([torch.zeros_like(masks), masks]).flatten()
        def ap(): return average_precision_score(y, part([torch.cat(m) for m in zip(normal, defect)]).flatten())
        part.fit(normal)
        start = ap()
        part.fit(normal, defect, masks)
        assert ap() >= start


# ---------------------------------------------------------------------------------------------------------- calibration
def test_zscore_is_standard_on_what_it_was_fitted_on():
    maps = 25 * rand(20, 7, 8) - 688
    part = with_slots(CALIBRATION.build('zscore'))
    part.fit(maps)
    assert abs(part(maps).mean()) < 1e-4 and abs(part(maps).std() - 1) < 1e-4

def test_per_location_against_loops():
    maps, k = rand(6, 3, 4) + torch.arange(4.), 5.
    part = with_slots(CALIBRATION.build({'name': 'per_location', 'prior': k}))
    part.fit(maps)
    s = maps.double().numpy()
    for y, x in itertools.product(range(3), range(4)):
        v = s[:, y, x]
        mean = (6 * v.mean() + k * s.mean()) / (6 + k)
        var = (6 * ((v - mean)**2).mean() + k * s.var()) / (6 + k)      # the variance around the shrunken mean
        np.testing.assert_allclose(part(maps)[:, y, x], (v - mean) / math.sqrt(var), atol=1e-4)

@pytest.mark.parametrize('maps', [rand(10, 6, 6).round(), torch.full((4, 3, 3), -7.), rand(1, 4, 4) * 1e4,
                                  rand(9, 2, 2)**5],
                         ids=['ties', 'constant', 'one image', 'heavy tail'])
def test_conformal_is_strictly_monotone_whatever_the_normals(maps):
    part = with_slots(CALIBRATION.build('conformal'))
    part.fit(maps)
    wide = torch.linspace(maps.min() - 5, maps.max() + 50, 4000).double()[None, None]
    assert (part(wide).diff() > 0).all() and part(wide).isfinite().all()
    assert (part(wide.float()).diff() >= 0).all()              # in float32 never inverted
    assert part(maps).median() < 1.5                           # half of the normals are below −log ½, ties allowed

def test_conformal_levels_are_the_share_of_normals_above():
    maps = rand(40, 20, 20)
    part = with_slots(CALIBRATION.build('conformal'))
    part.fit(maps)
    for t in (.3, 1., 2.5, 4.5): assert math.isclose((part(maps) > t).float().mean(), math.exp(-t), rel_tol=.05)

def test_held_out_normals_or_a_warning():
    train, held = (from_arrays(rand(n, *GRID, DIM)) for n in (20, 8))
    assert held_or_training(train, held) is held
    for few in (None, held.where(label=1), from_arrays(rand(7, *GRID, DIM))):
        with pytest.warns(UserWarning, match='at least 8'): assert held_or_training(train, few) is train


# --------------------------------------------------------------------------------------------------------------- refine
def test_a_patch_that_scores_higher_never_comes_out_lower():
    for least, temperature in itertools.product((.12, .5, 1.), (.25, 1., 8.)):
        part = with_slots(REFINE.build({'name': 'multi_scale_consistency', 'least': least, 'temperature': temperature}))
        x = (10 * rand(4, 9, 9).double()).requires_grad_()
        for y, u in ((0, 0), (4, 4), (8, 3)):
            out = part(x)[:, y, u].sum()
            assert torch.autograd.grad(out, x)[0][:, y, u].min() > -1e-6

def test_a_uniform_map_and_everything_below_its_neighbours_stay():
    part = with_slots(REFINE.build('local_consistency'))
    maps = torch.full((1, 5, 5), 3.)
    assert torch.allclose(part(maps), maps)
    maps[0, 2, 2] = -10
    assert math.isclose(part(maps)[0, 2, 2].item(), -10, abs_tol=1e-5)


# --------------------------------------------------------------------------------------------------------------- scores
def detector(position='none', seed=0, dim=DIM, n=2):
    torch.manual_seed(seed)
    d = MoLEFlow(dim, GRID, position=position, couplings=2, dia_blocks=1, align='none', seed=seed,
                 subnet={'name': 'scale_context', 'rank': 2, 'kernel': 3})
    for i in range(n): d.groups[f'g{i}'] = add_task(d, seed)
    with torch.no_grad():
        for p in d.parameters(): p.add_(.2 * rand(*p.shape, seed=1) if p.ndim else 0)
    use_task(d, 0)
    return d

def group(seed, n=30):
    x = rand(n, *GRID, DIM, seed=seed) @ torch.diag(torch.linspace(.5, 2, DIM))
    index = pd.DataFrame({'split': ['train'] * (n - 10) + ['validation'] * 10})
    store = from_arrays(x, index)
    bad, masks = x[:10].clone(), np.zeros((10, *GRID), bool)
    masks[:, 2:4, 1:3] = True
    bad[:, 2:4, 1:3] += 3
    return store.where(split='train'), store.where(split='validation'), from_arrays(
        bad, pd.DataFrame({'split': ['validation'] * 10, 'label': [1] * 10}), masks=masks)

@pytest.mark.parametrize('name', list(SCORES))
def test_every_score_fits_its_slot_and_finds_a_planted_defect(name):
    g = torch.Generator().manual_seed(0)
    d, score = detector(), with_slots(SCORES.build(name, dim=DIM, grid=GRID, generator=g))
    train, held, defects = group(0)
    score.fit(d.flow, train, held, defects)
    first = buffers(score, 0)
    normal, bad = maps_of(score, d.flow, held), maps_of(score, d.flow, defects)
    assert bad.shape == (10, *GRID) and bad.dtype == torch.float32 and bad.isfinite().all()
    masks = torch.from_numpy(defects.masks())
    assert bad[masks].mean() > normal.mean() + normal.std()
    use_task(d, 1), use_task(score, 1)
    score.fit(d.flow, *group(3))
    assert same(buffers(score, 0), first)
    use_task(d, 0), use_task(score, 0)
    assert torch.equal(maps_of(score, d.flow, defects), bad)

def test_turning_the_image_turns_the_map_of_multi_orientation():
    d, score, x = detector(), SCORES.build('multi_orientation', grid=GRID), rand(3, *GRID, DIM, seed=2)
    with torch.no_grad():
        for k in (1, 2, 3):
            turned, back = score(d.flow, x.rot90(k, (1, 2))), score(d.flow, x).rot90(k, (1, 2))
            assert torch.allclose(turned, back, atol=1e-3)
        with_position = detector('sincos')
        a, b = score(with_position.flow, x.rot90(1, (1, 2))), score(with_position.flow, x).rot90(1, (1, 2))
        assert torch.allclose(a, b, atol=1e-3)                 # for the same four views are scored
        plain = patch_nll(*with_position.flow(x.rot90(1, (1, 2)))) - patch_nll(*with_position.flow(x)).rot90(1, (1, 2))
        assert plain.abs().max() > .1

def test_the_last_prefix_is_the_likelihood():
    d, x = detector(), rand(3, *GRID, DIM, seed=2)
    with torch.no_grad(): all, last = prefix_nll(d.flow, x), patch_nll(*d.flow(x))
    assert len(all) == len(d.flow.blocks) == 3 and torch.equal(all[-1], last)
    assert not any(b._forward_hooks for b in d.flow.blocks)    # nothing stays behind


# ------------------------------------------------------------------------------------------------------------- branches
def train(flow, x, steps=40):
    opt = torch.optim.Adam(flow.parameters(), lr=.02)
    for _ in range(steps):
        opt.zero_grad()
        patch_nll(*flow(x)).mean().backward()
        opt.step()

def test_both_branches_are_trained_and_none_is_out_of_distribution():
    "The origin ran the flow that had learned with positions once more without them; ours has a flow for each view."
    normal, held, defects = group(0)
    scorer = with_slots(Scorer(DIM, GRID, branches='dual_branch', calibration='zscore'))
    assert [v['position'] for v in scorer.views] == [None, 'none']
    flows = [detector(v['position'] or 'sincos', n=2).flow for v in scorer.views]
    for f in flows: train(f, normal.batch(slice(None)))
    with torch.no_grad():
        x = held.batch(slice(None))
        with_position, without = (patch_nll(*f(x)).mean() for f in flows)
        position, flows[0].position = flows[0].position, nn.Identity()
        origins = patch_nll(*flows[0](x)).mean()
        flows[0].position = position
        assert origins > without + 1 and origins > with_position
        scorer.fit(flows, normal, held, defects)
        good, bad = scorer(flows, x), scorer(flows, defects.batch(slice(None)))
    assert abs(good.mean()) < 1e-3 and bad[torch.from_numpy(defects.masks())].mean() > good.mean() + 2

def test_scorer_with_defaults_is_the_likelihood_and_fits_nothing():
    d, x = detector(), rand(2, *GRID, DIM)
    scorer = with_slots(Scorer(DIM, GRID))
    assert not scorer.fits and not scorer.wants_defects and not scorer.state_dict()
    scorer.fit(None, None)
    with torch.no_grad(): assert torch.equal(scorer([d.flow], x), patch_nll(*d.flow(x)).float())

def test_scorer_without_defects_says_that_defaults_stay():
    normal, held, _ = group(0)
    scorer = with_slots(Scorer(DIM, GRID, refine='local_consistency'))
    with pytest.warns(UserWarning, match='LocalConsistency: no synthetic defects'):
        scorer.fit([detector().flow], normal, held)
    assert scorer.refine.own.temperature.item() == 2. and scorer.refine.own.scale.item() != 1.

def test_scorer_learns_from_defects_on_held_out_images_only():
    normal, held, defects = group(0)
    wrong = from_arrays(rand(10, *GRID, DIM, seed=8), pd.DataFrame({'split': ['train'] * 10, 'label': [1] * 10}),
                        masks=np.roll(defects.masks(), 3, 2))
    both = from_arrays(torch.cat([wrong.batch(slice(None)), defects.batch(slice(None))]),
                       pd.concat([wrong.index, defects.index]), masks=np.concatenate([wrong.masks(), defects.masks()]))
    out = []
    for d in (defects, both):
        scorer = with_slots(Scorer(DIM, GRID, branches='fpn_fusion', refine='local_consistency', layers=LAYERS))
        flows = [detector(dim=n).flow for n in LAYERS]
        scorer.fit(flows, normal, held, d)
        out.append(buffers(scorer, 0))
    assert same(*out)

def test_narrow_is_a_view():
    x = rand(4, *GRID, DIM)
    store = from_arrays(x)
    part = narrow(store, slice(2, 5))
    assert part.dim == 3 and torch.equal(part.batch([1, 3]), x[[1, 3], ..., 2:5]) and store.dim == DIM
    assert part.parts[0]['features'].data_ptr() == store.parts[0]['features'][..., 2:].data_ptr()
    assert torch.equal(part.where(label=0).pooled(), store.pooled()[:, 2:5]) and narrow(store, slice(0, DIM)) is store
    assert narrow(None, slice(0, 2)) is None

def test_soft_mean_has_its_limits():
    p, n = rand(5, 5).double(), rand(5, 5, seed=1).double()
    assert torch.allclose(soft_mean(p, n, .3, 0.), .3 * p + .7 * n)
    assert torch.allclose(soft_mean(p, n, .3, 1e-4), .3 * p + .7 * n, atol=1e-3)
    assert torch.allclose(soft_mean(p, n, .3, 500.), torch.maximum(p, n), atol=1e-2)
    assert torch.allclose(soft_mean(p, n, .3, -500.), torch.minimum(p, n), atol=1e-2)

@pytest.mark.parametrize('spec, word', [
    ({'name': 'dual_branch', 'share': 1.2}, 'share=1.2'), ({'name': 'improved_dual_branch', 'low': .8}, 'low=0.8'),
    ({'name': 'backbone_ensemble', 'groups': [2, 1]}, 'do not add up'),
    ({'name': 'fpn_fusion', 'weight': 1}, 'takes no')])
def test_wrong_branches(spec, word):
    with pytest.raises(PartError, match=word): BRANCHES.build(spec, dim=DIM, grid=GRID, layers=LAYERS)

@pytest.mark.parametrize('layers', [None, [8], [3, 4]])
def test_a_pyramid_needs_layers(layers):
    for name in ('fpn_fusion', 'backbone_ensemble'):
        with pytest.raises(PartError, match='layers'): BRANCHES.build(name, dim=DIM, layers=layers)


# ------------------------------------------------------------------------------------------------------------ smoothing
def discs(seed, n=12, grid=(10, 12), px=6):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, grid[0] * px, grid[1] * px), bool)
    yy, xx = np.mgrid[:grid[0] * px, :grid[1] * px]
    for m in masks[n // 2:]: m |= (yy - rng.uniform(10, 50))**2 + (xx - rng.uniform(10, 60))**2 < rng.uniform(4, 9)**2
    share = torch.from_numpy(masks).float().unfold(1, px, px).unfold(2, px, px).mean((3, 4))
    share = nn.functional.avg_pool2d(share[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    return 4 * share + .3 * torch.from_numpy(rng.standard_normal(share.shape)).float(), masks

def smoothing(name, seed=0):
    part = SMOOTHING.build({'name': name, **({'steps': 40} if name == 'learned_upsampling' else {})})
    return part.fit(*discs(seed)) if part.fits else part

@pytest.mark.parametrize('name', list(SMOOTHING))
def test_every_smoothing(name):
    part, (maps, masks) = smoothing(name), discs(1)
    size = masks.shape[1:]
    out = part(maps, size)
    assert out.shape == masks.shape and out.dtype == maps.dtype and out.isfinite().all()
    assert torch.equal(out, smoothing(name)(maps, size))                                    # deterministic
    one = torch.cat([part(m[None], size) for m in maps])
    assert torch.allclose(out, one, atol=1e-5)                                              # whatever the batch
    assert average_precision(out, masks) > .5
    assert part(maps[:0], size).shape == (0, *size) and part(maps, (7, 50)).shape == (12, 7, 50)
    np.testing.assert_array_equal(pixel_maps(maps.numpy(), size, part), out.numpy())
    assert part(maps.double(), size).dtype == torch.float64

@pytest.mark.parametrize('name', list(SMOOTHING))
def test_smoothing_commutes_with_the_unit(name):
    (maps, masks), (new, _) = discs(0), discs(1)
    a, b = (SMOOTHING.build(name if name != 'learned_upsampling' else {'name': name, 'steps': 5}) for _ in range(2))
    if a.fits: a.fit(maps.double(), masks), b.fit(3 * maps.double() - 700, masks)
    assert torch.allclose(b(3 * new.double() - 700, (30, 40)), 3 * a(new.double(), (30, 40)) - 700, atol=1e-2)

def test_learned_upsampling_is_at_least_the_gaussian_where_it_was_kept_out():
    part = smoothing('learned_upsampling')
    assert part.table[part.strength] >= part.table[0.]
    maps, masks = discs(5)
    ours, plain = (average_precision(p(maps, masks.shape[1:]), masks) for p in (part, SMOOTHING.build('gaussian')))
    assert ours >= plain

def test_chosen_takes_the_sigma_that_the_evaluator_would_take():
    maps, masks = discs(0)
    part = SMOOTHING.build('chosen').fit(maps, masks)
    ours = {s: pixel_metrics(pixel_maps(maps, masks.shape[1:], s), masks)['pixel_ap'] for s in part.sigmas}
    assert part.sigma == max(ours, key=ours.get) and part.table == pytest.approx(ours, abs=1e-12)

def test_average_precision_equals_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = rng.integers(2, 300)
        y = rng.permutation(np.arange(n) < rng.integers(1, n))
        s = np.round(rng.standard_normal(n) * 3) if rng.random() < .6 else rng.standard_normal(n)
        assert average_precision(torch.from_numpy(s), y) == pytest.approx(average_precision_score(y, s), abs=1e-12)

@pytest.mark.parametrize('spec, word', [(-1, 'negative'), ({'name': 'multi_sigma', 'sigmas': []}, 'empty'),
                                        (True, 'name'),
                                        ({'name': 'multi_sigma', 'sigmas': [1, 2], 'weights': [0, 0]}, 'as many'),
                                        ({'name': 'adaptive', 'fine': 9}, 'below'), ('adaptiv', "'adaptive'"),
                                        ({'name': 'chosen', 'sigmas': [-1]}, 'negative')])
def test_wrong_smoothing(spec, word):
    with pytest.raises(PartError, match=word): SMOOTHING.build(spec)

@pytest.mark.parametrize('name', [n for n in SMOOTHING if SMOOTHING[n].fits])
def test_smoothing_that_fits_must_be_fitted_and_wants_masks(name):
    maps, masks = discs(0)
    with pytest.raises(PartError, match='not fitted'): pixel_maps(maps, 20, name)
    for wrong in (masks[:3], masks & False, masks | True, masks[0]):
        with pytest.raises(PartError, match='one mask per score map'): SMOOTHING.build(name).fit(maps, wrong)


# ----------------------------------------------------------------------------------------------------------- aggregates
def test_spatial_cluster_prefers_a_cluster_under_any_offset():
    base = rand(1, 14, 14, seed=3).sort().values
    apart, together = base.clone(), base.clone()
    for i in range(9):
        apart[0, 1 + 5 * (i // 3), 1 + 5 * (i % 3)] = together[0, 6 + i // 3, 6 + i % 3] = 5 + .1 * i
    for form, shift in itertools.product(('neighbours', 'opening'), (-800., 0., 800.)):
        a, b = image_scores(torch.cat([apart, together]) + shift, {'name': 'spatial_cluster', 'form': form})
        assert b > a + .5, (form, shift)
    flat = torch.full((2, 4, 4), 7.)                          # nothing is high
    for form in ('neighbours', 'opening'):
        assert image_scores(flat, {'name': 'spatial_cluster', 'form': form}).tolist() == [7., 7.]

def test_learned_aggregate_is_sklearns_logistic_regression():
    maps = rand(60, 8, 8)
    maps[30:, 3, 3:5] += 2
    labels = np.arange(60) >= 30
    ours = AGGREGATES.build('learned').fit(maps, labels)
    s = np.sort(maps.reshape(60, -1).numpy().astype(float))
    x = np.concatenate([s[:, :-11:-1], s.mean(1, keepdims=True), s.std(1, ddof=1, keepdims=True)], 1)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(class_weight='balanced', max_iter=1000)).fit(x, labels)
    # StandardScaler divides by n, ours by n − 1: less than a percent of the weights' scale
    np.testing.assert_allclose(ours(maps), theirs.decision_function(x), atol=.1)
    shuffled = maps.flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))].view_as(maps)
    assert torch.allclose(ours(shuffled), ours(maps), atol=1e-5)          # wherever a patch stands
    with pytest.raises(ValueError, match='has 4 patches'): ours(maps[:, :2, :2])

def test_learned_aggregate_beats_or_equals_top_k_on_a_planted_problem():
    def draw(seed):
        maps = rand(80, 12, 12, seed=seed) + .6 * rand(80, 1, 1, seed=seed + 50)
        maps[40:, 4:6, 4:6] += 1.5
        return maps, np.arange(80) >= 40
    part, (maps, labels) = AGGREGATES.build('learned').fit(*draw(0)), draw(1)
    assert average_precision_score(labels, part(maps)) > average_precision_score(labels, image_scores(maps)) + .02

def test_nothing_here_warns_or_uses_the_global_generator():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in SMOOTHING: smoothing(name)
        for r, name in MAPS: fitted(r, name)
    assert torch.equal(torch.get_rng_state(), state)
