"""Each analysis on a case whose answer is known: gradients against brute force, planted ranks and subspaces,
calibrated nulls, the hypotheses of the tail on planted data"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import roc_auc_score

from adflow.analysis import similarity, svd, tail_gradient as tg
from adflow.features.store import FeatureSet, from_arrays
from adflow.flow.losses import build_losses, patch_nll
from adflow.flow.moleflow import MoLEFlow
from adflow.parts import add_task, train_only, use_task

GRID, DIM = (8, 8), 6

def rng(seed=0): return np.random.default_rng(seed)

def flow(subnet='scale_context', groups='a', seed=0, noise=.1, **kw):
    args = {'name': subnet, 'rank': 2} | ({'kernel': 3} if subnet == 'scale_context' else {})
    det = MoLEFlow(DIM, GRID, couplings=2, subnet=args, seed=seed, **kw)
    for g in groups: det.groups[g] = add_task(det, seed)
    g = torch.Generator().manual_seed(seed)
    for p in det.parameters(): p.data += noise * torch.randn(p.shape, generator=g)
    return det

def images(n=3, seed=1): return torch.randn(n, *GRID, DIM, generator=torch.Generator().manual_seed(seed))


# ---- tail_gradient: measures --------------------------------------------------------------------------------

def test_gini_of_known_distributions():
    r = rng()
    for x, known in ((np.full(50, 3.), 0), (np.eye(50)[7], .98), (np.arange(1, 101), 99 / 300),
                     (r.exponential(size=200_000), .5), (r.random(200_000), 1 / 3),
                     (r.pareto(3, 400_000) + 1, 1 / 5), (np.exp(r.normal(size=200_000)), math.erf(.5))):
        assert tg.gini(x) == pytest.approx(known, abs=.01)
    two = tg.gini(np.stack([np.ones(9), np.eye(9)[0]]))
    assert two.shape == (2,) and two == pytest.approx([0, 8 / 9])
    x = r.random(30)
    assert tg.gini(5 * x) == pytest.approx(tg.gini(x))
    assert tg.gini(x) == pytest.approx(abs(x[:, None] - x).sum() / (2 * 30**2 * x.mean()))      # the definition

def test_top_share():
    x = np.arange(1., 101)
    assert tg.top_share(x, .02) == pytest.approx(199 / 5050) and tg.top_share(x, 1.) == pytest.approx(1)
    assert tg.tail_size(784, .02) == 15 and tg.tail_size(10, .02) == 1

CASES = [*itertools.product((64, 196, 784), (.02, .1, 1.), (0., .3, 1., 1.2))]

@pytest.mark.parametrize('patches, ratio, weight', CASES)
def test_the_loss_moves_weight_and_makes_none(patches, ratio, weight):
    k, (tail, rest) = tg.tail_size(patches, ratio), tg.tail_factors(patches, ratio, weight)
    assert k * tail + (patches - k) * rest == pytest.approx(patches)


# ---- tail_gradient: gradients -------------------------------------------------------------------------------

LOSSES = {'mean': tg.MEAN, 'tail': tg.tail_loss(.7, .05), 'only tail': tg.tail_loss(1., .1)}

@pytest.mark.parametrize('loss', [*LOSSES.values()], ids=[*LOSSES])
def test_gradient_of_a_patch_is_that_of_finite_differences(loss):
    det, x = flow().double(), images(1).double()
    got, losses = tg.patch_gradients(det, x, 'a', loss), build_losses(loss)
    def value(v): return losses(*det.flow(v))[0].item()
    for i, j in ((0, 0), (3, 4), (7, 7)):
        exact = []
        for d in range(DIM):
            e = torch.zeros_like(x)
            e[0, i, j, d] = 1e-6
            exact.append((value(x + e) - value(x - e)) / 2e-6)
        assert got['feature'][0, i, j].item() == pytest.approx(np.linalg.norm(exact), rel=1e-4, abs=1e-8)

@pytest.mark.parametrize('weight, ratio', [*itertools.product((.3, .7, 1.), (.02, .05, .2))])
def test_amplification_is_the_algebra_to_the_last_digits(weight, ratio):
    det, x = flow().double(), images().double()
    mean, tail = (tg.patch_gradients(det, x, 'a', v) for v in (tg.MEAN, tg.tail_loss(weight, ratio)))
    mask = torch.as_tensor(tg.tail_patches(mean['nll'].numpy(), ratio))
    for level in ('likelihood', 'latent'):
        by = tail[level] / mean[level]
        for m, factor in zip((mask, ~mask), tg.tail_factors(64, ratio, weight)):
            assert torch.allclose(by[m], torch.tensor(factor, dtype=by.dtype), rtol=1e-9, atol=1e-12)
    if weight == 1: assert mask.sum(dtype=float) / 3 * by[mask].mean() == pytest.approx(64)           # HW / k

def test_latent_gradient_is_weight_times_norm():
    det, x = flow(), images()
    maps, (z, log_det) = tg.patch_gradients(det, x, 'a', tg.MEAN), det.flow(x)
    assert torch.allclose(maps['latent'], z.norm(dim=-1) / 64, atol=1e-6)
    assert torch.allclose(maps['nll'], patch_nll(z, log_det), atol=1e-4)

def test_log_det_loss_is_seen_and_batches_do_not_matter():
    det, x = flow(), images()
    spec = {'nll': {}, 'logdet': {'weight': .1}}
    maps = tg.patch_gradients(det, x, 'a', spec)
    assert torch.allclose(maps['likelihood'], (1 - .2 * det.flow(x)[1]) / 64, atol=1e-6)
    some = tg.gradient_maps(det, x, 'a', spec, batch_size=2)
    assert all(np.allclose(some[k], maps[k].numpy(), atol=1e-5) for k in maps)

def test_without_neighbourhoods_nothing_leaks():
    "Where no patch sees another, λ = 1 leaves the rest without gradient; else it does not (the origin's .0168)."
    x = images()
    alone, mixed = flow('lora', context='none'), flow()
    for det, leaks in ((alone, False), (mixed, True)):
        maps = tg.patch_gradients(det, x, 'a', tg.tail_loss(1., .05))
        rest = maps['feature'][~torch.as_tensor(tg.tail_patches(maps['nll'].numpy(), .05))]
        assert (rest.max() > 0) == leaks

def test_weights_gradient_against_autograd():
    det, x = flow(groups='ab'), images()
    train_only(det, [0], shared=False)
    asked = [p.requires_grad for p in det.parameters()]
    mask = tg.tail_patches(tg.patch_gradients(det, x, 'b', tg.MEAN)['nll'].numpy(), .05)
    table = tg.parameter_gradients(det, x, 'b', {'tail': mask})
    assert [p.requires_grad for p in det.parameters()] == asked            # left as found
    train_only(det, [1], shared=True)
    use_task(det, 1)
    det.zero_grad()
    patch_nll(*det.flow(x))[torch.as_tensor(mask)].mean().backward()
    own = torch.cat([p.grad.reshape(-1) for p in det.parameters() if p.grad is not None])
    assert table.norm['tail'] == pytest.approx(own.norm().item(), rel=1e-4)
    assert table.cosine['all'] == pytest.approx(1, abs=1e-4) and table.patches.tolist() == [192, mask.sum()]
    one = np.zeros_like(mask)
    one[1, 2, 3] = True
    alone = tg.parameter_gradients(det, x, 'b', {'one': one}).norm['one']
    assert tg.patch_parameter_norms(det, x, 'b', one) == pytest.approx([alone], rel=1e-3)

def test_sweep_follows_the_algebra():
    table = tg.sweep(flow(), images(), 'a', (.3, 1.), (.05, .1))
    assert np.allclose(table['amplification_latent'], table['algebra'], rtol=1e-3)
    assert table['k'].tolist() == [3, 3, 6, 6] and np.isinf(table['contrast_latent'].iloc[1])


# ---- tail_gradient: effects and hypotheses ------------------------------------------------------------------

def test_masks_and_their_controls():
    nll, strata = rng().normal(size=(5, *GRID)), tg.edge_distance(GRID)
    mask = tg.tail_patches(nll, .1)
    for s in (None, strata):
        other = tg.random_others(mask, rng(), s)
        assert (mask.sum((1, 2)) == 6).all() and (other.sum((1, 2)) == 6).all() and not (mask & other).any()
    for m, o in zip(mask, tg.random_others(mask, rng(), strata)):
        assert sorted(strata[m]) == sorted(strata[o])                      # as many at every distance
    drawn = sum(tg.random_others(mask, rng(i)) for i in range(400)) / 400
    assert abs(drawn[~mask] - 6 / 58).max() < .08                          # uniform over what is left

def test_control_takes_the_nearest_where_a_stratum_is_used_up():
    mask = np.zeros((1, *GRID), bool)
    mask[0, 3:5, 3:5] = True                                               # all four of distance 3
    other = tg.random_others(mask, rng(), tg.edge_distance(GRID))
    assert tg.edge_distance(GRID)[other[0]].tolist() == [2, 2, 2, 2]

def test_effect_sizes_have_their_definitions():
    a, b = rng(1).normal(.4, 1, 60), rng(2).normal(0, 2, 80)
    row = tg.effect(a, b, paired=False)
    pooled = math.sqrt((59 * a.var(ddof=1) + 79 * b.var(ddof=1)) / 138)
    assert row['d'] == pytest.approx((a.mean() - b.mean()) / pooled)
    assert row['r'] == pytest.approx(2 * roc_auc_score([1] * 60 + [0] * 80, [*a, *b]) - 1)
    assert row['d_low'] < row['d'] < row['d_high'] and row['r_low'] < row['r'] < row['r_high']
    both = tg.effect(a, a + .1 * b[:60])
    assert both['d'] == pytest.approx(-b[:60].mean() / b[:60].std(ddof=1)) and -1 < both['r'] < 1
    assert tg.effect(a, a - 1)['r'] == 1 and math.isnan(tg.effect(a, a)['d'])

def test_intervals_cover_and_null_is_calibrated():
    rows = [tg.effect(*rng(i).normal(size=(2, 40)), resamples=199) for i in range(120)]
    covered = np.mean([r['d_low'] <= 0 <= r['d_high'] for r in rows])
    assert .87 < covered <= 1 and np.mean([r['p'] < .05 for r in rows]) < .11

def test_edge_distance_tells_the_grid():
    assert tg.edge_distance((28, 28)).mean() == pytest.approx(4.179, abs=5e-4)         # the origin's "uniform" value
    assert tg.edge_distance((14, 14)).mean() == pytest.approx(1.857, abs=5e-4)
    assert tg.edge_distance((3, 5)).tolist() == [[0] * 5, [0, 1, 1, 1, 0], [0] * 5]

def test_image_gradient_finds_a_step():
    x = np.zeros((1, 32, 32, 3))
    x[:, :, 18:] = 1                                                       # a vertical edge, in the fifth column of 8
    g = tg.image_gradient(x, GRID)[0]
    assert g.argmax(1).tolist() == [4] * 8 and g[:, [0, 1, 2, 6, 7]].max() == 0

def test_boundary_with_a_border_and_with_the_control_for_it():
    r, border = rng(), tg.edge_distance(GRID) == 0
    nll, pictures = r.normal(size=(20, *GRID)) + 5 * border, r.random((20, 32, 32, 3))
    free = tg.boundary(nll, pictures, .05).set_index('quantity')
    held = tg.boundary(nll, pictures, .05, strata=tg.edge_distance(GRID)).set_index('quantity')
    assert free.d['edge distance'] < -1 and held.difference['edge distance'] == 0
    assert abs(free.d['image gradient']) < 1

def test_resemblance_null():
    r = rng()
    x, nll = r.normal(size=(12, *GRID, DIM)).astype('float32'), r.normal(size=(12, *GRID))
    ps = [tg.resemblance(x, rng(s).normal(size=nll.shape), {'v': x[0].reshape(-1, DIM) + 1}, .05, 19, rng(s))['p'][0]
          for s in range(30)]
    assert .3 < np.mean(ps) < .7

def test_clustering_sees_clusters_only_across_images():
    r = rng()
    nll = r.normal(size=(10, *GRID))
    mask, noise = tg.tail_patches(nll, .05), r.normal(size=(10, *GRID, DIM))
    same = noise + 9 * mask[..., None]                                     # all tails in one place
    own = noise + mask[..., None] * 50 * r.normal(size=(10, 1, 1, DIM))    # each image's tail in a place of its own
    assert tg.clustering(same, nll, .05)['first'][0] > .95
    assert tg.clustering(own, nll, .05)['first'][0] < .95
    assert abs(tg.clustering(noise, nll, .05)['first'][0] - .5) < .1

def test_alignment_and_overlap():
    r, labels = rng(), np.repeat([0, 1], 15)
    maps = r.normal(size=(30, *GRID))
    spot = maps + 6 * (labels[:, None, None] * np.eye(8)[0][:, None] * np.eye(8)[0])
    table = tg.alignment(maps, spot, labels, (.02, 1.))
    assert table['difference'].iloc[0] > table['difference'].iloc[1] and table['first'].iloc[0] > .95
    a = tg.tail_patches(maps, .1)
    assert tg.common_share(a, a)['share'] == 1 and tg.common_share(a, tg.random_others(a, r))['share'] == 0

def test_block_log_dets_add_up():
    det, x = flow(), images()
    log_dets, z = tg.block_log_dets(det, x, 'a')
    want, total = det.flow(x)
    assert log_dets.shape == (3, *GRID, 3)                                 # two couplings and DIA
    assert np.allclose(log_dets.sum(-1), total.detach(), atol=1e-4) and np.allclose(z, want.detach(), atol=1e-5)
    table = tg.jacobian(log_dets, x.square().sum(-1).numpy(), .05)
    assert table['quantity'].tolist() == ['log-det, all blocks', *(f'log-det, block {i}' for i in range(3))]


class Toy(torch.nn.Module):
    "z = s (x − b) with log-det t · x₅: the gradient of b over a set is −s² times the set's mean, at b = 0."
    def __init__(self, scale=(1,) * DIM, t=0.):
        super().__init__()
        self.b, self.scale, self.t, self.groups = torch.nn.Parameter(torch.zeros(DIM)), torch.tensor(scale), t, {'a': 0}
        self.blocks, self.scorer = [self.block], SimpleNamespace(views=[{'channels': slice(None)}])
    @property
    def flow(self): return self
    def aligned(self, x): return x
    def block(self, h):
        z, log_det = self(h[0])
        return (z,), log_det
    def forward(self, x): return self.scale * (x - self.b), self.t * x[..., 5]

def test_dilution_of_a_planted_tail():
    "Tail patches lie at 5 e₀, others at e₁: norms and cosines can be said beforehand."
    k, x = tg.tail_size(64, .05), torch.zeros(4, *GRID, DIM)
    x[..., 1] = 1 + .01 * torch.randn(4, *GRID, generator=torch.Generator().manual_seed(0))
    x[:, 0, :k] = torch.tensor([5., 0, 0, 0, 0, 0])
    table = tg.dilution(Toy(), x, 'a', .05).set_index('quantity')
    f = k / 64
    whole = math.hypot(5 * f, 1 - f)
    for name, tail, other in (('norm_to_all', 5 / whole, 1 / whole), ('cosine', 5 * f / whole, (1 - f) / whole)):
        row = table.loc[f"weights' gradient, {name}"]
        assert row['first'] == pytest.approx(tail, rel=.01) and row['second'] == pytest.approx(other, rel=.01)
        assert row['difference'] == pytest.approx(tail - other, rel=.01) and abs(row['d']) > 100
    even = tg.dilution(Toy(), torch.randn(4, *GRID, DIM, generator=torch.Generator().manual_seed(1)) + 3, 'a', .05)
    assert (even['first'] / even['second'] - 1).abs().max() < .5              # no tail of another kind: about the same

@pytest.fixture
def planted(monkeypatch):
    """Twelve normals, three patches of each at 3 e₀ on the border, and twenty test images, half of them with defects in
    the middle: at 3 e₀ too, at 4 e₁, which the 'mean' model is blind to, and with x₅ = 2, which only 'tail' minds."""
    r = rng(5)
    x = .3 * r.normal(size=(32, *GRID, DIM)).astype('float32')
    x[..., 5] *= .03
    x[:, 0, 2:5, 0] += 3
    masks = np.zeros((32, *GRID), bool)
    masks[22:, 3:5, 3:5] = True
    x[masks] += np.array([3, 4, 0, 0, 0, 2], 'float32')
    index = pd.DataFrame({'split': ['train'] * 12 + ['test'] * 20, 'class': 'a', 'label': [0] * 22 + [1] * 10})
    monkeypatch.setattr(FeatureSet, 'images', lambda self, rows: r.random((len(self), 32, 32, 3)))
    models = {'mean': Toy((1, .001, 1, 1, 1, 1), 1.), 'tail': Toy((1,) * DIM, -1.)}
    table = tg.hypotheses(models, from_arrays(x, index, masks=masks), 'a', .05)
    return x, masks[12:], table.set_index(['hypothesis', 'quantity', 'model', 'control']).sort_index()

def test_hypotheses_on_planted_answers(planted):
    x, masks, table = planted
    at = lambda *k: table.loc[k]
    for model in ('mean', 'tail'):
        free, held = (at('H1', 'edge distance', model, c) for c in ('random', 'same border distance'))
        assert free['first'] == 0 and free['high'] < -.5 and held['difference'] == 0 == held['low'] == held['high']
        near, far = (at('H2', f'distance of {k}', model, 'random') for k in ('defects', 'normals'))
        assert near['high'] < 0 < far['low'] and near['n'] == 40
        assert at('H5', 'tail among 10 neighbours', model, 'random')['first'] > .5
        inside = lambda row: row['low'] < row['first'] < row['high']
        z = x[:12] * np.array([1, .001 if model == 'mean' else 1, 1, 1, 1, 1])
        for k, v in {'mean': z.mean(), 'radial_mean': (z ** 2).sum(-1).mean() / DIM}.items():
            row = at('H7', k, model, '')
            assert row['first'] == pytest.approx(v, rel=1e-3) and inside(row)
        assert at('H7', 'std', model, '')['first'] == pytest.approx(z.std(), rel=1e-3)
    weights = [at('H3', f"weights' gradient, {k}", 'tail', 'random') for k in ('norm_to_all', 'cosine')]
    mask = tg.tail_patches(.5 * (x[:8] ** 2).sum(-1) + x[:8, ..., 5], .05)
    tail, whole = x[:8][mask].mean(0), x[:8].mean((0, 1, 2))
    norm = np.linalg.norm
    assert [w['first'] for w in weights] == pytest.approx(
        [norm(tail) / norm(whole), tail @ whole / norm(tail) / norm(whole)], rel=1e-3)
    for share in ('0.4%', '2.0%'):
        row = at('H4', f'image AUROC, top {share}', 'tail against mean', '')
        assert row['first'] == 1 and row['low'] > .1 and row['low'] < row['difference'] < row['high']
    assert at('H4', 'overlap of the tails', 'tail against mean', '')['low'] > 0       # of normals: mostly the same
    assert at('H6', 'patch_ap_minus_log_det', 'tail', '')['first'] == 1
    assert at('H6', 'patch_ap_minus_log_det', 'mean', '')['first'] < 2 * masks.mean()

def test_what_is_no_mean_has_no_interval(planted):
    rows = planted[2].reset_index()
    means = {'mean', 'beyond_2', 'beyond_3', 'radial_mean', 'radial_beyond_99'}
    h7 = (rows['hypothesis'] == 'H7') & rows['quantity'].isin(means)
    known = rows['hypothesis'].isin(['H1', 'H2', 'H4', 'H5']) | h7 | rows['quantity'].eq('log-det, all blocks')
    assert (rows['low'].notna() == known).all() and (rows['high'].notna() == known).all()
    assert (rows['low'][known] <= rows['high'][known]).all()
    assert set(rows['hypothesis']) == {f'H{i}' for i in range(1, 8)}

def test_interval_of_a_mean_draws_whole_images():
    r = rng(2)
    levels = r.normal(size=200)
    ends = tg.mean_interval(levels)
    assert (ends['high'] - ends['low']) / 2 == pytest.approx(1.96 * levels.std() / 200 ** .5, rel=.1)
    patches = np.repeat(levels[:20], 50) + .01 * r.normal(size=1000)       # fifty patches of each of twenty images
    whole, naive = (tg.mean_interval(patches, u) for u in (np.repeat(range(20), 50), None))
    width = lambda e: e['high'] - e['low']
    assert width(whole) == pytest.approx(width(tg.mean_interval(levels[:20])), rel=.05)
    assert width(whole) > 5 * width(naive)
    ends = [tg.mean_interval(rng(i).normal(size=40), seed=i) for i in range(150)]
    covered = [e['low'] <= 0 <= e['high'] for e in ends]
    assert .88 < np.mean(covered) <= 1 and all(math.isnan(v) for v in tg.mean_interval([1., 2.], [0, 0]).values())


# ---- svd ----------------------------------------------------------------------------------------------------

def low_rank(m, n, r, noise=0., seed=0):
    g = rng(seed)
    return torch.tensor(g.normal(size=(m, r)) @ g.normal(size=(r, n)) + noise * g.normal(size=(m, n))).float()

@pytest.mark.parametrize('m, n, r', [(60, 40, 3), (40, 60, 7), (50, 50, 1)])
def test_planted_rank_is_found(m, n, r):
    change = low_rank(m, n, r, .05)
    row = svd.spectrum_table({'x': (torch.ones(m, n), change)}, ranks=(8,)).iloc[0]
    assert row['above'] == r == svd.above_noise(torch.linalg.svdvals(change), (m, n))
    assert row['energy95'] <= r and row['structure'] > .95
    assert row['null_energy95'] > .5 * min(m, n) and row['sum99'] > row['energy99']
    assert row['change'] == pytest.approx(change.norm().item() / math.sqrt(m * n), rel=1e-4)

@pytest.mark.parametrize('kind', ['gaussian', 'permuted'])
def test_noise_is_like_its_null(kind):
    rows = [svd.spectrum_table({'x': (torch.ones(60, 40), low_rank(60, 40, 1, 1., s) - low_rank(60, 40, 1, 0., s))},
                               ranks=(8,), null=kind).iloc[0] for s in range(10)]
    assert abs(np.mean([r['energy95'] - r['null_energy95'] for r in rows])) < 1
    assert abs(np.mean([r['at_8'] - r['null_at_8'] for r in rows])) < .02
    assert np.mean([r['above'] for r in rows]) < .5

def test_one_direction_does_not_hide_the_next():
    q, r = rotation(60), rotation(40, 1)
    noise = low_rank(60, 40, 1, .1) - low_rank(60, 40, 1)                  # edge 1.4
    change = noise + torch.tensor(q[:, :3] * [100, 8, 3] @ r[:3]).float()
    s = torch.linalg.svdvals(change)
    assert (s > svd.noise_edge((60, 40), change.norm())).sum() == 1 and svd.above_noise(s, (60, 40)) == 3
    assert svd.above_noise(np.ones(1), (1, 1)) == 0

@pytest.mark.parametrize('shape', [(200, 200), (300, 100)])
def test_noise_edge(shape):
    m = svd.random_like(torch.ones(shape), draws=4)
    assert torch.linalg.svdvals(m)[:, 0].mean().item() == pytest.approx(svd.noise_edge(shape, m[0].norm()), rel=.03)

def test_random_matrices_keep_the_norm_and_need_no_global_state():
    m = low_rank(20, 30, 4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for kind in ('gaussian', 'permuted'):
        r = svd.random_like(m, kind, 3)
        assert torch.allclose(r.norm(dim=(1, 2)), m.norm().expand(3), rtol=1e-4)
        assert torch.equal(r, svd.random_like(m, kind, 3))
    svd.spectra({'x': low_rank(200, 200, 5)}, rank=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(svd.random_like(m, 'permuted', 1).flatten().sort().values, m.flatten().sort().values)
    with pytest.raises(ValueError, match='permuted'): svd.random_like(m, 'uniform')

def test_batched_and_randomized_spectra():
    many = {f'{i}': low_rank(*s, 4, .01, i) for i, s in enumerate([(90, 70), (30, 90), (90, 70)])}
    full, first = svd.spectra(many), svd.spectra(many, rank=6)
    assert list(full) == list(many) == list(first)
    for k, m in many.items():
        assert torch.allclose(full[k], torch.linalg.svdvals(m), rtol=1e-3, atol=1e-3) and first[k].shape == (6,)
        assert torch.allclose(first[k][:4], full[k][:4], rtol=1e-3)
        assert svd.energy_at(first[k], 4, m.norm()) == pytest.approx(svd.energy_at(full[k], 4), abs=1e-3)

@pytest.mark.parametrize('m, n, r', [(90, 70, 4), (60, 110, 6)])
def test_a_table_of_the_first_singular_values(m, n, r):
    "What so few can say is what all say, and the rest is NaN: no number that was not computed."
    pairs = {'planted': (torch.ones(m, n), low_rank(m, n, r, .02)),
             'noise': (torch.ones(m, n), low_rank(m, n, 1, 1., 3) - low_rank(m, n, 1, 0., 3))}
    full, first = (svd.spectrum_table(pairs, ranks=(4, 8, 32), rank=k) for k in (None, 12))
    for k in ('above', 'energy95', 'energy99'): assert full.loc['planted', k] == first.loc['planted', k]
    assert first.loc['planted', 'above'] == r and first.loc['noise', 'above'] == 0
    for k in ('change', 'at_4', 'at_8', 'null_at_4', 'null_at_8'):
        assert np.allclose(full[k].astype(float), first[k].astype(float), atol=.005), k
    assert first[['sum95', 'sum99', 'null_sum95', 'at_32', 'null_at_32', 'null_energy95']].isna().all(axis=None)
    assert first.loc['noise', ['energy95', 'energy99']].isna().all() and full.notna().all(axis=None)
    many = svd.spectrum_table({'planted': pairs['planted']}, rank=3).loc['planted']     # all three stand out: how many?
    assert np.isnan(many['above']) and np.isnan(many['structure']) and np.isnan(many['energy99'])

@pytest.mark.parametrize('rank', [None, 6])
def test_spectra_are_computed_where_they_are_asked_for(monkeypatch, rank):
    "Changes, nulls and truncations go to the device; without a GPU here, `meta` stands in and is seen to be asked."
    asked, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, *a, **k: (asked.append(str(a[0])) or to(x, 'cpu', *a[1:], **k))
                        if a and str(a[0]) == 'meta' else to(x, *a, **k))
    svd.spectrum_table({'x': (torch.ones(50, 40), low_rank(50, 40, 2))}, device='meta', rank=rank)
    assert len(asked) == 2                                                 # the change, and its null
    det = flow()
    next(svd.truncations(svd.weights_of(det), flow(noise=.3), (1,), 'meta'))
    assert len(asked) == 2 + len(svd.weight_changes(svd.weights_of(det), flow(noise=.3)))

def test_both_conventions():
    s = np.array([4., 2., 1., 1.])                                         # energy 16, 4, 1, 1; sum 4, 2, 1, 1
    assert [svd.effective_rank(s, q) for q in (.7, .9, .95, 1.)] == [1, 2, 3, 4]
    assert [svd.effective_rank(s, q, 'sum') for q in (.5, .75, .8)] == [1, 2, 3]
    assert svd.effective_rank(np.stack([s, [1, 0, 0, 0]])).tolist() == [3, 1]
    assert svd.effective_rank(s[::-1], .9) == 2                            # the order does not matter
    with pytest.raises(ValueError, match='energy'): svd.effective_rank(s, .9, 'trace')

def test_weight_changes_take_shared_matrices(tmp_path):
    det = flow(groups='ab')
    before = svd.weights_of(det)
    with torch.no_grad():
        for p in det.parameters(): p += 1
    changes = svd.weight_changes(before, det)
    assert all('tasks' not in k and w.ndim == 2 for k, (w, _) in changes.items())
    assert all(torch.allclose(d, torch.ones_like(d), atol=1e-5) for _, d in changes.values())
    assert all(min(w.shape) >= 4 for w, _ in changes.values())
    own = [svd.weight_changes(before, det, shared=s, smallest=2) for s in (True, False)]
    assert len(own[0]) < len(own[1]) and any('tasks' in k for k in own[1])
    det.save(tmp_path/'run'/'checkpoint'/'state-3'/'detector')
    (tmp_path/'run'/'checkpoint'/'current').write_text('state-3')
    for at in ('run', 'run/checkpoint', 'run/checkpoint/state-3/detector'):            # a run, a checkpoint, a detector
        assert torch.equal(svd.weight_changes(before, tmp_path/at)[(k := next(iter(changes)))][1], changes[k][1])
    with pytest.raises(ValueError, match='in common'): svd.weight_changes({}, det)
    with pytest.raises(FileNotFoundError, match='nothing'): svd.weights_of(tmp_path/'nothing')

def test_lora_changes_are_what_the_layer_adds():
    det = flow(groups='ab')
    for k, (w, d) in svd.lora_changes(det, 'b').items():
        layer = det.get_submodule(k.removesuffix('.weight'))
        own, x = layer.tasks[1], torch.eye(layer.in_features)
        use_task(layer, 1)
        with torch.no_grad(): y = layer(x) - layer.bias - own['bias']
        assert torch.allclose((w + d).T, y, atol=1e-5) and torch.linalg.matrix_rank(d, atol=1e-6) <= 2

def test_truncated_is_the_best_of_its_rank():
    det = flow()
    before, after = svd.weights_of(det), svd.weights_of(flow(noise=.3))
    for rank, state in svd.truncations(before, after, (0, 1, 3)):
        part = svd.weight_changes(before, state)
        for k, (_, d) in svd.weight_changes(before, after).items():
            s = torch.linalg.svdvals(d)
            assert (part[k][1] - d).norm().item() == pytest.approx(s[rank:].norm().item(), rel=1e-3, abs=1e-4)
        det.load_state_dict(state)                                         # a whole state dict


# ---- similarity ---------------------------------------------------------------------------------------------

def rotation(n, seed=0): return np.linalg.qr(rng(seed).normal(size=(n, n)))[0]

@pytest.mark.parametrize('unbiased', [False, True])
def test_cka_of_rotated_copies_is_one(unbiased):
    x = rng().normal(size=(40, 10))
    assert similarity.linear_cka(x, 7 * x @ rotation(10) + 3, unbiased) == pytest.approx(1)

@pytest.mark.parametrize('n, p, q', [(30, 30, 30), (100, 20, 60), (400, 10, 10)])
def test_cka_of_independent_ones(n, p, q):
    "The biased one is far from 0 and where the formula says; the unbiased one is 0 on average."
    pairs = [(rng(i).normal(size=(n, p)), rng(100 + i).normal(size=(n, q))) for i in range(20)]
    biased, unbiased = (np.mean([similarity.linear_cka(a, b, u) for a, b in pairs]) for u in (False, True))
    assert biased == pytest.approx(similarity.cka_of_noise(n, p, q), abs=.02) and abs(unbiased) < .03
    with pytest.raises(ValueError, match='4 examples'): similarity.linear_cka(np.eye(3), np.eye(3), True)

def test_unbiased_cka_against_its_definition():
    x, y, n = *rng().normal(size=(2, 12, 5)), 12
    def hsic(a, b):
        total = sum(a[i, j] * b[i, j] for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
        three = np.mean([a[i, j] * b[i, k] for i, j, k in itertools.permutations(range(n), 3)])
        four = np.mean([a[i, j] * b[k, l] for i, j, k, l in itertools.permutations(range(n), 4)])
        return total - 2 * three + four
    k, l = (v @ v.T for v in (x, y))
    want = hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))
    assert similarity.linear_cka(x, y, True) == pytest.approx(want)

@pytest.mark.parametrize('angle', [0., .3, 1., math.pi / 2])
def test_overlap_of_planted_subspaces(angle):
    q = rotation(20)
    a, b = q[:, :3], q[:, :3] * math.cos(angle) + q[:, 3:6] * math.sin(angle)
    assert similarity.subspace_overlap(a, b) == pytest.approx(math.cos(angle)**2, abs=1e-9)
    assert similarity.subspace_overlap(a, 5 * b @ rotation(3)) == pytest.approx(math.cos(angle)**2, abs=1e-9)

def test_leading_directions():
    m = low_rank(20, 12, 2).numpy()
    for side, size in (('output', 20), ('input', 12)):
        v = similarity.leading(m, 2, side)
        assert v.shape == (size, 2) and np.allclose(v.T @ v, np.eye(2), atol=1e-5)
    assert np.allclose(m @ similarity.leading(m, 2, 'input') @ similarity.leading(m, 2, 'input').T, m, atol=1e-4)
    assert similarity.cosine(m, -2 * m) == pytest.approx(-1) and similarity.cosine(m, 0 * m) == 0

def two_directions(a, b): return similarity.subspace_overlap(*(similarity.leading(v, 2) for v in (a, b)))

@pytest.mark.parametrize('null, f', [('rows', similarity.linear_cka), ('entries', similarity.cosine),
                                     ('rotated', two_directions), ('subspace', similarity.subspace_overlap)])
def test_nulls_are_calibrated_and_keep_what_they_say(null, f):
    g = rng(3)
    ps = [similarity.against_null(f, *g.normal(size=(2, 12, 6)), null, 19, rng=g)['p'] for _ in range(120)]
    assert .42 < np.mean(ps) < .6 and np.mean(np.array(ps) <= .05) < .12
    m = g.normal(size=(12, 6))
    made = similarity.NULLS[null](m, g)
    assert made.shape == m.shape and not np.allclose(made, m)
    if null != 'subspace': assert np.linalg.norm(made) == pytest.approx(np.linalg.norm(m))
    if null in ('rows', 'rotated'): assert np.allclose(*(np.linalg.svd(v, compute_uv=False) for v in (made, m)))
    assert similarity.against_null(f, m, m, null, 19)['p'] == .05

def test_frechet_distance():
    g = rng()
    x, y = g.normal(size=(500, 5)), g.normal(size=(400, 5)) @ g.normal(size=(5, 5)) + 2
    a, b = np.cov(x.T), np.cov(y.T)
    want = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert similarity.frechet_distance(x, y) == pytest.approx(want) == pytest.approx(similarity.frechet_distance(y, x))
    assert similarity.frechet_distance(x, x + [3, 4, 0, 0, 0]) == pytest.approx(25)
    few = g.normal(size=(6, 40))
    assert similarity.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert similarity.frechet_distance(few, few + 1) == pytest.approx(40)              # singular covariances

def test_mahalanobis_distance_does_not_see_units():
    g = rng()
    x = g.normal(size=(5000, 4))
    stretch = np.diag([1., 1.2, .8, 1.])
    assert similarity.mahalanobis_distance(x, x + [3, 0, 0, 0]) == pytest.approx(3, rel=.05)
    assert similarity.mahalanobis_distance(x @ stretch, (x + [0, 2, 0, 0]) @ stretch) == pytest.approx(2, rel=.05)

def test_mantel():
    at = rng().normal(size=(7, 3))
    d = np.linalg.norm(at[:, None] - at[None], axis=-1)
    follows = similarity.mantel(3 * d + 1, d, draws=199)
    assert follows['r'] == pytest.approx(1) and follows['p'] <= .01 and follows['n'] == 42
    assert similarity.mantel(d[:3, :3]**3, d[:3, :3], rank=True)['permutations'] == 6
    holes = d.copy()
    holes[0, 1] = np.nan
    assert similarity.mantel(d, holes, draws=49)['n'] == 41 and similarity.mantel(holes, d, draws=49)['n'] == 41
    ps = [similarity.mantel(rng(i).random((5, 5)), d[:5, :5])['p'] for i in range(40)]
    assert .35 < np.mean(ps) < .65


@pytest.mark.slow
def test_the_real_umap_keeps_clusters_apart_and_is_the_same_twice():
    "The notebook of the latent view has a stand-in; this is the package, where it is installed (extra `umap`)."
    pytest.importorskip('umap')
    from sklearn.neighbors import KNeighborsClassifier

    from adflow.views.latent import project
    rng = np.random.default_rng(0)
    centres, label = rng.normal(0, 6, (4, 1, 64)), np.repeat(np.arange(4), 100)
    x = (centres + rng.normal(size=(4, 100, 64))).reshape(-1, 64)
    (here, there, said), (again, _, _) = (project(x, centres[:, 0], 'umap', seed=1) for _ in range(2))
    assert said.startswith('UMAP') and np.array_equal(here, again)
    assert (KNeighborsClassifier(5).fit(here, label).predict(there) == np.arange(4)).all()   # not fitted on them
