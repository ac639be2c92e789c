"""Calibration, separation, spatial, replication and report on cases with a known answer."""
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from adflow.analysis.calibration import (conformal_ks, conformal_p, gaussianity, normality, qq, radial,
                                         score_calibration, uniformity)
from adflow.analysis.replication import (against, interaction, noise_floor, over_seeds, paired, seeds_needed,
                                         simple_effects, smallest_difference)
from adflow.analysis.report import ReportError, latex, markdown, published, run_result, save_figure, tabulate
from adflow.analysis.separation import dimension_terms, effective_terms, overlap, separate, separation_table, shares
from adflow.analysis.spatial import (defect_overlap, edge_distance, edge_moments, edge_null, edge_statistics,
                                     image_gradient, rings, spatial, tail_contrast, tail_patches)


@pytest.fixture
def rng(): return np.random.default_rng(7)


# ---- calibration -------------------------------------------------------------------------------------------

def test_a_planted_gaussian_passes(rng):
    z = rng.normal(size=(80, 6, 6, 12))
    d, r = gaussianity(z), radial(z)
    assert (d['ad_p'] < .01).mean() <= 1 / 12 and d['ks'].max() < .04 and d['tail_error'].max() < .12
    assert r['ks_p'] > .01 and abs(r['effective_dimensions'] - 12) < 1 and abs(r['mean'] - 1) < .02

@pytest.mark.parametrize('spoil', [lambda z, g: z * .685, lambda z, g: z + .5, lambda z, g: z ** 3 / 15 ** .5,
                                   lambda z, g: g.standard_t(2, z.shape)], ids=['narrow', 'shifted', 'cubed', 't'])
def test_what_is_not_gaussian_fails(rng, spoil):
    d = gaussianity(spoil(rng.normal(size=(150, 4, 4, 6)), rng))
    assert (d['ad_p'] < .01).mean() > .8 and (d['tail_error'] > .2).all()

def test_dependent_dimensions_are_seen_by_the_length_alone(rng):
    "Ten copies of one N(0, 1) pass in every dimension as often as chance lets them, and never by their length."
    draws = [rng.normal(size=(60, 3, 3, 1)) for _ in range(60)]
    copies = [np.repeat(x, 10, -1) for x in draws]
    tables = [gaussianity(z, seed=i) for i, z in enumerate(copies)]
    assert all(np.ptp(t['ad_p']) == 0 for t in tables)                   # ten times the same
    for k in ('ad_p', 'ks_p'):
        p = np.array([t[k][0] for t in tables])
        assert stats.kstest(p, 'uniform').pvalue > .01 and (p < .05).mean() <= .15
    assert max(radial(z)['ks_p'] for z in copies) < 1e-4
    assert abs(np.mean([radial(z)['effective_dimensions'] for z in copies]) - 1) < .1
    apart = [radial(rng.normal(size=(60, 3, 3, 10))) for _ in range(60)]
    assert stats.kstest([r['ks_p'] for r in apart], 'uniform').pvalue > .01
    assert abs(np.mean([r['effective_dimensions'] for r in apart]) - 10) < .5

def test_numbers_are_scipys(rng):
    v = rng.gamma(3, size=500)
    m = normality(v)
    assert np.allclose([m['skew'], m['kurtosis']], [stats.skew(v), stats.kurtosis(v)])
    assert np.isclose(m['ks'], stats.kstest(v, 'norm').statistic)
    assert np.isclose(m['qq_correlation'], qq(v, 500)[['theoretical', 'observed']].corr().iloc[0, 1])
    assert np.allclose(qq(v, 9)['theoretical'], stats.norm.ppf((np.arange(9) + .5) / 9))

@pytest.mark.parametrize('a, p', [(1.933, .1), (2.492, .05), (3.857, .01)])   # tables of Anderson–Darling, case 0
def test_anderson_p(a, p):
    from adflow.analysis.calibration import _anderson_p
    assert abs(_anderson_p(a) - p) < .001

def test_uniformity_refuses(rng):
    with pytest.raises(ValueError, match='no values'): uniformity([])
    with pytest.raises(ValueError, match='leave'): uniformity([-.1, .5])
    with pytest.raises(ValueError, match='leave'): uniformity([np.nan, .5])

def test_conformal_p_is_uniform_with_ties(rng):
    p = [conformal_p(rng.integers(3, size=9), rng.integers(3, size=1), i)[0] for i in range(1500)]
    assert uniformity(p)['ks_p'] > .001
    assert conformal_p([1, 2, 3], [10.])[0] < .25 < .75 < conformal_p([1, 2, 3], [-10.])[0]
    with pytest.raises(ValueError, match='held-out'): conformal_p([], [1.])

def test_conformal_ks_has_its_own_null(rng):
    p = [conformal_ks(rng.normal(size=12), rng.normal(size=15))['p'] for _ in range(300)]
    assert np.mean(np.array(p) < .05) < .09
    assert conformal_ks(rng.normal(size=20), rng.normal(2, 1, 20))['p'] < .01

def test_score_calibration_says_which_class_is_off(rng):
    rows = [{'class': c, 'split': s, 'label': 0, 'score': x} for c, shift in (('a', 0), ('b', 3))
            for s in ('validation', 'test') for x in rng.normal(shift * (s == 'test'), 1, 60)]
    t = score_calibration(pd.DataFrame(rows)).set_index(['calibration', 'class'])
    assert t.loc[('own', 'a'), 'p'] > .01 and t.loc[('own', 'b'), 'p'] < .01
    assert t.loc[('own', 'b'), 'false_alarms'] > .8 and np.isnan(t.loc[('own', 'b'), 'found'])


# ---- separation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('d', [0., .5, 1., 3.])
def test_planted_effect_sizes(rng, d):
    s, phi = separate(rng.normal(size=20000), rng.normal(d, 1, 20000)), stats.norm.cdf
    for k, v in dict(cohens_d=d, fisher=d * d / 2, overlap=2 * phi(-d / 2), ks=2 * phi(d / 2) - 1,
                     auroc=phi(d / 2 ** .5)).items():
        assert abs(s[k] - v) < .06, k

def test_overlap_of_uniforms(rng):
    assert abs(overlap(rng.random(5000), .25 + rng.random(5000)) - .75) < .05
    assert overlap([0, 1, 2], [10, 11, 12]) == 0 and overlap(np.ones(9), np.ones(9)) == 1

def test_unequal_sizes_use_the_pooled_deviation():
    a, b = [0., 2.], [4., 6., 8., 10.]
    assert np.isclose(separate(a, b)['cohens_d'], 6 / ((2 + 20) / 4) ** .5)
    assert np.isclose(separate(a, b)['fisher'], 36 / (2 + 20 / 3)) and separate(a, b)['auroc'] == 1

def test_separation_table_leaves_out_what_has_too_few():
    t = pd.DataFrame({'class': 'a', 'split': 'test', 'kind': ['good'] * 3 + ['x'] * 3 + ['y'],
                      'label': [0] * 3 + [1] * 4, 'score': range(7)})
    assert separation_table(t, 20)['kind'].tolist() == ['all', 'x']

def test_shares_add_up(rng):
    z, ld = rng.normal(size=(6, 4, 4, 5)), rng.normal(size=(6, 4, 4))
    bad = rng.random((6, 4, 4)) < .2
    terms = dimension_terms(z, ld)
    s = shares(terms, bad)
    assert np.allclose(s[['variance_share', 'gap_share']].sum(), 1) and len(s) == 6
    assert np.allclose(sum(terms.values()), .5 * (z ** 2).sum(-1) - ld)
    assert shares(terms)['gap_share'].isna().all()
    assert np.isclose(effective_terms([.5, -.5]), 2) and np.isclose(effective_terms([1, 0, 0]), 1)
    with pytest.raises(ValueError, match='does not vary'): shares({'a': np.ones(4)})


# ---- spatial -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('grid', [(1, 1), (2, 7), (5, 5), (16, 16), (31, 95)])
def test_edge_null_is_exact(grid):
    by_force = np.array([[min(i, grid[0] - 1 - i, j, grid[1] - 1 - j) for j in range(grid[1])] for i in range(grid[0])])
    assert (edge_distance(grid) == by_force).all()
    null = edge_null(grid)
    assert (np.bincount(by_force.ravel()) == null['patches']).all() and np.isclose(null['probability'].sum(), 1)
    assert np.allclose(edge_moments(grid), (by_force.mean(), by_force.var()))

def test_variance_without_replacement():
    "All pairs of a 3×4 grid: the mean distance has just the variance of the formula."
    d = edge_distance((3, 4)).ravel()
    means = [(d[i] + d[j]) / 2 for i, j in product(range(12), range(12)) if i < j]
    mean, var = edge_moments((3, 4))
    assert np.isclose(np.mean(means), mean) and np.isclose(np.var(means), var / 2 * 10 / 11)
    tail = np.zeros((1, 3, 4), bool); tail[0, 1, 1:3] = True
    assert np.isclose(edge_statistics(tail, 9)['z'], (1 - mean) / (var / 2 * 10 / 11) ** .5)

def test_edge_planted_and_not(rng):
    x, ring = rng.normal(size=(30, 12, 12)), edge_distance((12, 12)) == 0
    assert edge_statistics(tail_patches(x), 199)['p_shift'] > .01
    near, far = (edge_statistics(tail_patches(x + s * 3 * ring), 199) for s in (1, -1))
    assert near['outer_ring'] > .9 and near['p_shift'] < .01 and near['distance'] < near['null']
    assert far['outer_ring'] == 0 and far['distance'] > far['null']

def test_tail_has_as_many_patches_with_ties():
    assert tail_patches(np.zeros((2, 10, 10)), .05).sum((1, 2)).tolist() == [5, 5]

def test_gradient_of_ramps():
    x = np.tile(np.arange(32.), (1, 32, 1))
    g = image_gradient(x, (4, 4))
    assert np.allclose(g, 1) and np.allclose(image_gradient(np.repeat(x[..., None], 3, -1), (4, 4)), g)

def test_contrast_inside_only(rng):
    tail, v = np.zeros((12, 8, 8), bool), rng.random((12, 8, 8))
    tail[:, 0, 0] = tail[:, 4, 4] = True
    v[:, 0, 0] += 9
    assert tail_contrast(tail, v)['ratio'] > 3 and .5 < tail_contrast(tail, v, inner=1)['ratio'] < 1.5

def test_overlap_with_defects():
    bad = np.zeros((2, 4, 4), bool); bad[1, :2, :2] = True
    tail = np.zeros((2, 4, 4), bool); tail[:, 0, :2] = True
    assert defect_overlap(tail, bad) == {'precision': 1., 'recall': .5, 'prevalence': .25, 'lift': 4.}
    assert np.isnan(defect_overlap(tail[:1], bad[:1])['lift'])

def test_rings_see_a_blind_edge(rng):
    y, bad, x = np.repeat([0, 1], 15), np.zeros((30, 10, 10), bool), rng.normal(size=(30, 10, 10))
    bad[15:, 0, :3] = bad[15:, 5, 5:8] = True
    x = x + 5 * bad - 30 * (edge_distance((10, 10)) == 0)
    t = rings(x, y, bad, .05)
    assert t['tail_share'][0] == 0 and t['level'][0] < -10 and t['auroc'][0] > .95
    assert np.isclose(t['null_share'][0], .36)
    assert np.isclose(spatial(x, y, bad, ratio=.05, draws=9)['outer_ring'], 0)


# ---- replication -------------------------------------------------------------------------------------------

def test_analysis_of_variance_by_hand():
    "2×2, two replicates, no block: 10 12 | 14 16 // 20 22 | 40 42."
    t = pd.DataFrame([(a, b, y) for (a, b), ys in {('p', 'x'): (10, 12), ('p', 'y'): (14, 16), ('q', 'x'): (20, 22),
                                                  ('q', 'y'): (40, 42)}.items() for y in ys], columns=['A', 'B', 'y'])
    r = interaction(t, 'y', 'A', 'B', block=None)
    # grand 22; A: 13, 31; B: 16, 28; cells 11, 15, 21, 41
    assert np.allclose(r.loc[['A', 'B', 'A × B', 'residual'], 'sum_sq'], [648, 288, 128, 8])
    assert np.allclose(r.loc[['A', 'B', 'A × B'], 'F'], [324, 144, 64]) and r.loc['residual', 'df'] == 4
    assert np.allclose(r.loc[['A', 'B', 'A × B'], 'partial_eta2'], [648 / 656, 288 / 296, 128 / 136])
    assert np.allclose(r.loc[['A', 'B', 'A × B'], 'omega2'], [(s - 2) / (1072 + 2) for s in (648, 288, 128)])

def test_interaction_refuses_without_replicates():
    t = pd.DataFrame([(a, b, 0, 1.) for a in 'pq' for b in 'xy'], columns=['A', 'B', 'seed', 'y'])
    with pytest.raises(ValueError, match='without replicates'): interaction(t, 'y', 'A', 'B')
    with pytest.raises(ValueError, match='two levels'): interaction(t[t.A == 'p'], 'y', 'A', 'B')
    lacking = pd.concat([t[:3], t[:3]])
    with pytest.raises(ValueError, match='has 0 runs'): interaction(lacking, 'y', 'A', 'B')

def test_blocks_take_the_seed_out(rng):
    t = pd.DataFrame([(a, b, s, (a == 'q') * .02 + s + rng.normal(0, .005))
                      for a in 'pq' for b in 'xy' for s in range(5)], columns=['A', 'B', 'seed', 'y'])
    assert interaction(t, 'y', 'A', 'B').loc['A', 'p'] < .01 < .5 < interaction(t, 'y', 'A', 'B', None).loc['A', 'p']

def test_simple_effects(rng):
    t = pd.DataFrame([(a, b, s, s + 3 * (b == 'on') * (a == 'q'))
                      for a in 'pq' for b in ('off', 'on') for s in range(4)], columns=['A', 'B', 'seed', 'y'])
    assert simple_effects(t, 'y', 'A', 'B')['mean'].tolist() == [0, 3, 3]
    assert simple_effects(t, 'y', 'A', 'B', order=('on', 'off'))['mean'].tolist() == [0, -3, -3]

def test_paired_is_scipys(rng):
    a, b = rng.normal(size=8), rng.normal(.5, 1, 8)
    p = paired(a, b)
    assert np.isclose(p['t_p'], stats.ttest_rel(a, b).pvalue)
    assert np.isclose(p['wilcoxon_p'], stats.wilcoxon(a - b).pvalue)
    assert np.isclose(p['d_z'], (b - a).mean() / (b - a).std(ddof=1)) and p['wilcoxon_least'] == 1 / 128
    assert p['low'] <= p['mean'] <= p['high'] and paired(b, a)['mean'] == -p['mean']
    assert np.isnan(paired([1.], [2.])['t_p']) and np.isnan(paired([1., 2.], [2., 3.])['d_z'])
    with pytest.raises(ValueError, match='same seeds'): paired([1.], [1., 2.])

def test_against_pairs_by_seed_not_by_row():
    t = pd.DataFrame({'configuration': list('aaabbb'), 'seed': [0, 1, 2, 2, 1, 0], 'y': [1., 2., 4., 4.5, 2.4, 1.6]})
    r = against(t, 'y', 'a')
    assert np.isclose(r.loc['b', 'mean'], .5) and np.isclose(r.loc['b', 'std'], .1)
    with pytest.raises(ValueError, match="no 'z'"): against(t, 'y', 'z')

def test_noise_floor_and_power():
    assert np.isclose(noise_floor([1., 3.])['difference_std'], 2) and noise_floor([2., 2.])['limit'] == 0
    n = 6
    d, df = smallest_difference(1., n), n - 1
    nc, crit = d * n ** .5, stats.t.ppf(.975, df)
    assert np.isclose(stats.nct.sf(crit, df, nc) + stats.nct.cdf(-crit, df, nc), .8, atol=1e-3)
    assert seeds_needed(d, 1.) == n and seeds_needed(d * .99, 1.) == n + 1
    assert smallest_difference(1., n, paired=False) > d
    assert np.isnan(over_seeds([1.])['std'])


# ---- report ------------------------------------------------------------------------------------------------

def make_run(folder, value, state='done', **columns):
    folder.mkdir(parents=True)
    (folder/'params.yaml').write_text('experiment: x\n')
    (folder/'manifest.json').write_text(json.dumps({'state': state, 'seed': 0}))
    pd.DataFrame([{'class': c, 'pixel_ap': value + d, 'forgetting_max': 1 - value, **columns}
                  for c, d in (('a', -.1), ('b', .1))]).to_parquet(folder/'metrics.parquet')
    return folder

@pytest.fixture
def runs(tmp_path):
    for i, v in enumerate((.50, .52)): make_run(tmp_path/f'good-{i}', v)
    for i, v in enumerate((.40, .42)): make_run(tmp_path/f'a_b-{i}', v)
    return {'good': str(tmp_path/'good-*'), 'a_b': [tmp_path/'a_b-0', tmp_path/'a_b-1']}

def test_cells_and_bold(runs):
    t = tabulate(runs, ('pixel_ap', 'forgetting_max'))
    assert np.isclose(t.values.loc['good', 'pixel_ap'], 51) and np.isclose(t.spread.loc['good', 'pixel_ap'], 2 ** .5)
    tex = latex(t)
    assert r'good & \textbf{51.0} $\pm$ 1.4 & \textbf{49.0} $\pm$ 1.4 \\' in tex     # less forgetting is better
    assert r'a\_b & 41.0 $\pm$ 1.4 & 59.0 $\pm$ 1.4 \\' in tex and r'\midrule' in tex and 'published' not in tex
    assert '| good | **51.0** ± 1.4 | **49.0** ± 1.4 | 2 runs |' in markdown(t)
    assert len(t.traces()) == 8 and set(t.traces()['method']) == {'good', 'a_b'}

def test_equal_after_rounding_are_both_bold(tmp_path):
    make_run(tmp_path/'x', .5), make_run(tmp_path/'y', .50001)
    assert markdown(tabulate({k: tmp_path/k for k in 'xy'}, ['pixel_ap'])).count('**50.0**') == 2

@pytest.mark.parametrize('damage, word', [
    (lambda t, h: t.values.__setitem__('pixel_ap', [51., 77.]), 'a_b, pixel_ap: the table says 77'),
    (lambda t, h: t.spread.__setitem__('pixel_ap', [2 ** .5, 99.]), r'a_b, pixel_ap: the table says ± 99'),
    (lambda t, h: t.spread.__setitem__('pixel_ap', [np.nan, 2 ** .5]), r'good, pixel_ap: the table says ± nan'),
    (lambda t, h: t.runs.pop(('good', 'pixel_ap')), 'good, pixel_ap: 51 has no run'),
    (lambda t, h: (h/'good-1/manifest.json').unlink(), 'lacks manifest.json'),
    (lambda t, h: (h/'good-1/manifest.json').write_text('{"state": "failed"}'), 'not finished'),
    (lambda t, h: (h/'good-1/manifest.json').write_text('{'), 'not readable'),
    (lambda t, h: pd.DataFrame({'pixel_ap': [.9]}).to_parquet(h/'good-1/metrics.parquet'), 'the table says 51')])
def test_a_number_without_a_run_is_refused(runs, tmp_path, damage, word):
    t = tabulate(runs, ['pixel_ap'])
    damage(t, tmp_path)
    for write in (t.check, lambda: latex(t), lambda: markdown(t)):
        with pytest.raises(ReportError, match=word): write()

def test_rows_that_count(tmp_path):
    f = make_run(tmp_path/'r', .5, arm='x')
    assert np.isclose(run_result(f, {'arm': 'x'})['pixel_ap'], .5)
    with pytest.raises(ReportError, match='no rows'): run_result(f, {'arm': 'y'})
    with pytest.raises(ReportError, match='no column'): run_result(f, {'arms': 'y'})
    with pytest.raises(ReportError, match='no metric'): tabulate({'r': f}, ['pixel_app'])
    t = tabulate({'x': (f, {'arm': 'x'})}, ['pixel_ap'])
    assert t.check() is t

def test_published_rows_stay_apart(runs, tmp_path):
    file = tmp_path/'p.yaml'
    file.write_text('- {method: A & B, kind: paper, source: there, cite: ab2020, dataset: d, pixel_ap: 99}\n')
    tex = latex(tabulate(runs, ['pixel_ap'], published(file, dataset='d')), 'Caption', 'tab:x')
    assert r'A \& B~\cite{ab2020} & 99.0 \\' in tex and r'\textbf{99' not in tex and tex.count(r'\midrule') == 2
    assert r'\label{tab:x}' in tex and tex.count('{') == tex.count('}')
    assert '*99.0*' in markdown(tabulate(runs, ['pixel_ap'], published(file)))
    assert '*0.990*' in markdown(tabulate(runs, ['pixel_ap'], published(file), percent=False))
    file.write_text('- {method: A, kind: paper, pixel_ap: 99}\n')
    with pytest.raises(ReportError, match="no 'source'"): published(file)

def test_the_published_file_has_sources():
    t = published()
    assert len(t) >= 10 and t['source'].str.len().min() > 5 and set(t['kind']) <= {'paper', 'collected'}
    assert t[['image_auroc', 'pixel_ap']].max(axis=None) <= 100

@pytest.mark.slow
@pytest.mark.parametrize('few', [False, True])
def test_the_report_notebook_on_planted_runs(tmp_path, few):
    "Table, traces and statistics of `nbs/experiments/report.ipynb` are those of the folders it is pointed at."
    import papermill
    values = {'good': [.50, .52, .57], 'a_b': [.40, .44, .45]}
    for name, of in values.items():
        for i, v in enumerate(of[:1 if few else 3]):
            folder = make_run(tmp_path/f'x/{name}-seed{i}', v)
            (folder/'manifest.json').write_text(json.dumps({'state': 'done', 'seed': i, 'git': {'commit': 'c0ffee00'}}))
    notebook = Path(__file__).parents[1]/'nbs/experiments/report.ipynb'
    done = papermill.execute_notebook(str(notebook), str(tmp_path/'out.ipynb'), progress_bar=False, parameters=dict(
        runs=['a_b=x/a_b-seed*', 'x/good-seed*'], outputs=str(tmp_path), metrics=['pixel_ap'], suffix='png',
        beside=['dataset=mvtec', 'setting=continual 1-1'], run_dir=str(tmp_path/'run')))
    text = (tmp_path/'run/table.md').read_text()
    shown = [o.get('data', {}) for c in done.cells for o in c.get('outputs', [])]
    said = [''.join(d['text/plain']) for d in shown if 'text/plain' in d]
    each = pd.read_parquet(tmp_path/'run/values.parquet')
    assert '*58.4*' in text and r'\cite{cadic2025} & 58.4' in (tmp_path/'run/table.tex').read_text()      # as printed
    traces = pd.read_csv(tmp_path/'run/traces.csv')
    assert (traces['commit'] == 'c0ffee00').all() and len(each) == len(traces) == (2 if few else 6)
    assert traces['run'].tolist() == [f'x/{k}-seed{i}' for k in ('a_b', 'good') for i in range(1 if few else 3)]
    if few:
        assert '| x/good-seed* | **50.0** | 1 run |' in text and any('no floor' in t for t in said)
        return
    a, b = (100 * np.array(values[k]) for k in ('a_b', 'good'))
    assert f'| a_b | 43.0 ± {a.std(ddof=1):.1f} | 3 runs |' in text
    assert f'| x/good-seed* | **53.0** ± {b.std(ddof=1):.1f} | 3 runs |' in text
    p, floor = stats.ttest_rel(b, a).pvalue, noise_floor(a)['limit']
    assert any('t_p' in t and f'{p:.3f}' in t and '10.0' in t for t in said)
    assert any('limit' in t and f'{floor:.2f}' in t for t in said)
    assert (tmp_path/'run/figures/pixel_ap.png').is_file() and (tmp_path/'run/figures/pixel_ap.json').is_file()

def test_a_chrome_draws_what_is_asked_for(tmp_path):
    import importlib.util
    import plotly.graph_objects as go
    browser = next(filter(shutil.which, ('chromium', 'google-chrome', 'chrome')), None)
    if not (importlib.util.find_spec('kaleido') and browser): pytest.skip('no kaleido or no Chrome')
    for suffix, magic in (('svg', b'<svg'), ('pdf', b'%PDF'), ('png', b'\x89PNG')):
        assert save_figure(go.Figure(go.Bar(y=[1, 2])), tmp_path/f'a.{suffix}').read_bytes().startswith(magic)

def test_a_missing_chrome_is_told(tmp_path, monkeypatch):
    import plotly.graph_objects as go
    def none(*a, **k): raise RuntimeError('Kaleido requires Google Chrome to be installed.')
    monkeypatch.setattr(go.Figure, 'write_image', none)
    figure = go.Figure(go.Bar(x=['a', 'b'], y=[1, 2]))
    with pytest.warns(UserWarning, match=r'pip install "adflow\[figures\]".*a.png was drawn by matplotlib'):
        assert save_figure(figure, tmp_path/'a.svg') == tmp_path/'a.png'
    assert Image.open(tmp_path/'a.png').size == (1280, 840)
    with pytest.raises(ReportError, match=r'pip install "adflow\[figures\]".*draws no parcoords'):
        save_figure(go.Figure(go.Parcoords()), tmp_path/'b.pdf')
    def broken(*a, **k): raise ValueError('of another kind')
    monkeypatch.setattr(go.Figure, 'write_image', broken)
    with pytest.raises(ValueError, match='another kind'): save_figure(go.Figure(), tmp_path/'a.pdf')
    assert save_figure(go.Figure(), tmp_path/'a.html').read_text().startswith('<!doctype html')
