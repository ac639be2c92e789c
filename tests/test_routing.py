"""Routers: references, invariances, what the origin's router gets wrong, files, resume, and what 1,000 tasks cost."""
import json
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance, LedoitWolf, OAS, ledoit_wolf
from sklearn.neighbors import NearestCentroid

from adflow.continual.learner import Learner, Trainer
from adflow.continual.routers import find_clusters
from adflow.continual.routing import BYTES, ROUTERS, Mahalanobis, Router, dense_precision, fit_gaussian
from adflow.continual.tasks import ORDERS, make_tasks
from adflow.evaluate.stages import StageEvaluator
from adflow.features.store import from_arrays
from adflow.flow.moleflow import MoLEFlow
from adflow.parts import PartError

ORIGIN = {'name': 'mahalanobis', 'per': 'task', 'shrinkage': 1e-5, 'log_det': False, 'precision': 'full'}


def draw(means, n, seed, noise=.3, grid=(2, 2), split='train', label=0):
    "n images of each class `means` names: noise on patches, and twice as much that an image's patches share."
    g = torch.Generator().manual_seed(seed)
    d = len(next(iter(means.values())))
    x = [noise * (torch.randn(n, *grid, d, generator=g) + 2 * torch.randn(n, 1, 1, d, generator=g)) + m
         for m in means.values()]
    index = pd.DataFrame({'class': np.repeat(list(means), n), 'split': split, 'label': label})
    return from_arrays(torch.cat(x), index)

def four_classes(d=6):
    g = torch.Generator().manual_seed(1)
    return {c: 2 * torch.randn(d, generator=g) for c in 'abcd'}

def learned(spec, features, tasks):
    "A router that has learned tasks, each named after its classes."
    router = ROUTERS.build(spec)
    for name in tasks:
        task = SimpleNamespace(name=name, classes=tuple(name.split('+')))
        router.learn(task, features.where(**{'class': list(task.classes)}))
    return router

def right(router, features):
    said = router.route(features)
    return np.mean([c in t.split('+') and k in (c, None)
                    for c, t, k in zip(features.index['class'], said['task'], said['class'])])


# ---- against scikit-learn ----------------------------------------------------------------------------------

@pytest.mark.parametrize('n, d', [(10, 40), (41, 40), (300, 40)])
@pytest.mark.parametrize('shrinkage', ['ledoit_wolf', 1e-2])
def test_squared_distances_are_those_of_scikit_learn(n, d, shrinkage):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) / d**.5 + 30     # far from the origin
    y = torch.randn(20, d, generator=g) + 30
    reference = LedoitWolf() if shrinkage == 'ledoit_wolf' else EmpiricalCovariance()
    reference.fit(x.double().numpy())
    if shrinkage != 'ledoit_wolf':      # with n − 1, as the origin, and its ridge
        reference._set_covariance(np.cov(x.double().numpy().T) + shrinkage * np.eye(d))
    want = reference.mahalanobis(y.double().numpy())
    for precision in ('low_rank', 'full'):
        router = Mahalanobis(shrinkage=shrinkage, log_det=False, precision=precision)
        router.add('a', None, x)
        np.testing.assert_allclose(router.distances(y)[:, 0].numpy(), want, rtol=2e-3)
        router.log_det = True
        log_det = np.linalg.slogdet(reference.covariance_)[1]
        np.testing.assert_allclose(router.distances(y)[:, 0].numpy(), want + log_det, rtol=2e-3, atol=1e-2)

def test_the_reference_can_tell_another_shrinkage():
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    p = dense_precision(fit_gaussian(x)).numpy()
    assert not np.allclose(p, OAS().fit(x.numpy()).precision_, rtol=.02)
    np.testing.assert_allclose(p, LedoitWolf().fit(x.double().numpy()).precision_, rtol=1e-3, atol=1e-4)

def test_euclidean_is_the_nearest_centroid():
    means = four_classes()
    train, test = draw(means, 20, 0, noise=1.), draw(means, 100, 1, noise=1.)
    want = NearestCentroid().fit(train.pooled().numpy(), train.index['class']).predict(test.pooled().numpy())
    assert learned('euclidean', train, 'abcd').route(test)['class'].tolist() == want.tolist()
    assert .5 < np.mean(want == test.index['class']) < 1

def test_the_shared_covariance_is_that_of_all_residuals_however_they_came():
    means = four_classes()
    train, test = draw(means, 15, 0), draw(means, 10, 1)
    x = train.pooled().double().view(4, 15, -1)
    w = LedoitWolf(assume_centered=True).fit((x - x.mean(1, keepdim=True)).flatten(0, 1).numpy()).precision_
    diff = (test.pooled().double()[:, None] - x.mean(1)).numpy()
    want = np.einsum('npd,de,npe->np', diff, w, diff)
    for tasks in (['a', 'b', 'c', 'd'], ['a+b', 'c+d'], ['a+b+c+d']):
        router = learned({'name': 'mahalanobis', 'precision': 'shared'}, train, tasks)
        np.testing.assert_allclose(router.distances(test.pooled()).numpy(), want, rtol=1e-3, atol=1e-2)


# ---- invariances -------------------------------------------------------------------------------------------

def test_low_rank_decides_as_full_where_it_is_exact_and_as_todays_router_did():
    "Fewer images than channels, real sizes: D = 152, 40 images; the former router was float64 with a dense precision."
    g = torch.Generator().manual_seed(0)
    means = {c: torch.randn(152, generator=g) for c in 'abcdef'}
    train, test = draw(means, 40, 0, noise=.8), draw(means, 200, 1, noise=.8)
    low, full = (learned({'name': 'mahalanobis', 'precision': p}, train, 'abcdef') for p in ('low_rank', 'full'))
    assert low.bank['basis'].shape == (6, 39, 152)
    former = []
    for c in 'abcdef':
        x = train.where(**{'class': c}).pooled().double().numpy()
        cov = ledoit_wolf(x)[0]
        diff = test.pooled().double().numpy() - x.mean(0)
        former.append(np.einsum('nd,de,ne->n', diff, np.linalg.inv(cov), diff) + np.linalg.slogdet(cov)[1])
    former = np.stack(former, 1)
    np.testing.assert_allclose(low.distances(test.pooled()).numpy(), former, rtol=1e-3, atol=.05)
    a, b = low.route(test), full.route(test)
    assert a['class'].tolist() == b['class'].tolist() == ['abcdef'[i] for i in former.argmin(1)]
    np.testing.assert_allclose(a['margin'], b['margin'], rtol=1e-2, atol=.1)

@pytest.mark.parametrize('spec', ['euclidean', 'mahalanobis', {'name': 'mahalanobis', 'precision': 'full'}])
def test_rotating_the_features_changes_no_distance(spec):
    means = four_classes()
    train, test = draw(means, 20, 0), draw(means, 10, 1)
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    def turned(f): return from_arrays(f.batch(slice(None)) @ q + 5, f.index)
    a = learned(spec, train, 'abcd').distances(test.pooled())
    b = learned(spec, turned(train), 'abcd').distances(turned(test).pooled())
    torch.testing.assert_close(a, b, rtol=1e-2, atol=.05)

@pytest.mark.parametrize('spec', ['euclidean', 'mahalanobis', 'regional', 'clustered'])
def test_a_new_task_leaves_the_distances_to_old_ones_bit_identical(spec):
    means = four_classes()
    train, test = draw(means, 20, 0), draw(means, 10, 1)
    router = learned(spec, train, ['a', 'b+c'])
    x = router.inputs(test)
    before, n = router.distances(x).clone(), len(router.prototypes)
    router.learn(SimpleNamespace(name='d', classes=('d',)), train.where(**{'class': 'd'}))
    after = router.distances(x)
    assert after.shape[1] > n and torch.equal(after[:, :n], before)

def test_prototypes_of_different_rank_do_not_disturb_each_other():
    means = four_classes(20)
    train = draw(means, 30, 0)
    few = from_arrays(draw(means, 3, 5).batch(slice(0, 3)), pd.DataFrame({'class': ['e'] * 3}))
    test = draw(means, 10, 1).pooled()
    router = learned('mahalanobis', train, 'abcd')
    before = router.distances(test).clone()
    with pytest.warns(UserWarning, match='rests on 3 images'):
        router.learn(SimpleNamespace(name='e', classes=('e',)), few)
    alone = Mahalanobis()
    alone.add('e', None, few.pooled())
    torch.testing.assert_close(router.distances(test)[:, :4], before)
    torch.testing.assert_close(router.distances(test)[:, 4:], alone.distances(test))

def test_the_number_of_directions_changes_nothing_that_it_need_not():
    "With rank n − 1 exact; below, the sum of variances stays; the 100 kB hold."
    x = torch.randn(50, 768, generator=torch.Generator().manual_seed(0))
    router = Mahalanobis()
    router.add('a', None, x)
    p = router.prototypes[0]
    assert len(p['basis']) == 29 and sum(v.nbytes for v in p.values() if torch.is_tensor(v)) < BYTES
    trace = (1 / p['weight']).sum() + (768 - 29) * p['rest']
    torch.testing.assert_close(trace, p['spread'].sum()[None], rtol=1e-4, atol=0)


# ---- what the origin's router gets wrong -------------------------------------------------------------------

def test_planted_failure_one_gaussian_for_two_products():
    "A task of two products far apart, then one between them. The origin's router gives the task all of the third."
    d = 24
    means = {'a': torch.zeros(d), 'b': torch.full((d,), 2.), 'c': torch.ones(d)}
    train, test = draw(means, 60, 0), draw(means, 200, 1)
    tasks = ['a+b', 'c']
    origin, shrunk, clustered, classes = (right(learned(s, train, tasks), test) for s in (
        ORIGIN, {'name': 'euclidean', 'per': 'task'}, 'clustered', 'mahalanobis'))
    assert clustered > .99 and classes > .99, (clustered, classes)
    assert origin < .9 and shrunk < .8, (origin, shrunk)
    # one product per task: nothing wrong with a prototype per task
    assert right(learned({'name': 'mahalanobis', 'per': 'task'}, train, 'abc'), test) > .99

def test_planted_failure_more_images_than_channels_beside_fewer():
    "A subspace with a ridge of 1e-5 next to a full-rank Gaussian: everything goes to the latter."
    g = torch.Generator().manual_seed(0)
    means = {'a': torch.zeros(30), 'b': 2 * torch.randn(30, generator=g)}
    few, many = draw(means, 12, 0).where(**{'class': 'a'}), draw(means, 200, 0).where(**{'class': 'b'})
    train = from_arrays(torch.cat([f.batch(slice(None)) for f in (few, many)]), pd.concat([few.index, many.index]))
    test = draw(means, 100, 1)
    assert right(learned(ORIGIN, train, 'ab'), test) < .6
    assert right(learned('mahalanobis', train, 'ab'), test) > .99

@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_clusters_are_the_products(k):
    means = dict(list(four_classes(24).items())[:k])
    x = draw(means, 30, 0).pooled()
    labels = find_clusters(x)
    assert labels.max() + 1 == k
    assert len(set(zip(labels, np.repeat(range(k), 30)))) == k          # and pure
    np.testing.assert_array_equal(labels, find_clusters(x))             # and the same again
    assert (find_clusters(x, most=1) == 0).all() and (find_clusters(x[:15], least=8) == 0).all()


# ---- files, and a learner that is stopped and goes on ------------------------------------------------------

class Nearby:
    "Scores by the distance to the mean of each class's patches."
    def __init__(self, means): self.means = means
    def group_of(self, task, cls): return cls
    def score(self, x, group): return (x - self.means[group]).square().sum(-1)

def every_router():
    return [s for name in ROUTERS for s in ([name] if name != 'mahalanobis' else [name, ORIGIN, {
        'name': name, 'precision': 'shared'}])]

@pytest.mark.parametrize('spec', every_router(), ids=str)
def test_saved_and_loaded_it_answers_the_same_and_learns_on(spec, tmp_path):
    means = four_classes()
    train, test, detector = draw(means, 20, 0), draw(means, 5, 1), Nearby(means)
    tasks = [SimpleNamespace(name=n, classes=tuple(n.split('+'))) for n in ('a', 'b', 'c+d')]
    def teach(router, task):
        part = train.where(**{'class': list(task.classes)})
        router.learn(task, part, detector)
        router.calibrate(task, part, detector)
    one, seen = ROUTERS.build(spec), test.where(**{'class': ['a', 'b']})
    for t in tasks[:2]: teach(one, t)
    one.save(tmp_path / 'router')
    assert not [p for p in (tmp_path / 'router').rglob('*') if p.suffix not in ('.json', '.safetensors', '')]
    assert json.loads((tmp_path / 'router/router.json').read_text())['router'] in ROUTERS
    two = Router.load(tmp_path / 'router')
    assert type(two) is type(one) and two.settings == one.settings
    pd.testing.assert_frame_equal(two.route(seen, detector), one.route(seen, detector))
    for r in (one, two): teach(r, tasks[2])
    pd.testing.assert_frame_equal(two.route(test, detector), one.route(test, detector))
    assert two.route(test, detector)['task'].isin([t.name for t in tasks]).all()
    teach(two, tasks[2])                                                # once more, as after a kill inside the task
    pd.testing.assert_frame_equal(two.route(test, detector), one.route(test, detector))

@pytest.mark.parametrize('spec', every_router(), ids=str)
def test_a_router_before_its_first_task_can_be_saved(spec, tmp_path):
    ROUTERS.build(spec).save(tmp_path)
    assert not Router.load(tmp_path).prototypes

@pytest.mark.parametrize('spec, adapters', [('two_stage', 'class'), ('regional', 'class'), ('clustered', 'task'),
                                            ({'name': 'mahalanobis', 'precision': 'shared'}, 'class'),
                                            ('oracle', 'class'), ('euclidean', 'class')], ids=str)
def test_a_learner_goes_on_with_its_router(spec, adapters, tmp_path):
    means = four_classes(8)
    parts = [draw(means, n, i, split=s, label=y, grid=(3, 3))
             for i, (s, n, y) in enumerate([('train', 10, 0), ('validation', 5, 0), ('test', 4, 0), ('test', 4, 1)])]
    features = from_arrays(torch.cat([p.batch(slice(None)) for p in parts]),
                           pd.concat([p.index for p in parts]).assign(image=[str(i) for i in range(92)]),
                           masks=np.repeat([False] * 76 + [True] * 16, 9).reshape(92, 3, 3))
    tasks = make_tasks(list('abcd'), '2-2' if adapters == 'task' else '1-1')
    def learner(folder):
        flow = MoLEFlow(8, (3, 3), couplings=1, dia_blocks=1, subnet='linear', adapters=adapters)
        trainer = Trainer(epochs=2, batch_size=4, lr=1e-3, progress=False)
        return Learner(flow, ROUTERS.build(spec), trainer, features, folder)
    evaluate = StageEvaluator(features, smoothing=0., progress=False)
    straight = [s for s in learner(tmp_path / 'one').stages(tasks)][-1]
    stages = learner(tmp_path / 'two').stages(tasks)
    next(stages)
    stages.close()
    resumed = [s for s in learner(tmp_path / 'two').stages(tasks)][-1]
    test = features.where(split='test')
    pd.testing.assert_frame_equal(resumed.router.route(test, resumed.detector),
                                  straight.router.route(test, straight.detector))
    table = evaluate(resumed)
    assert len(table) == 8 and (table[~table.routed].routing == 1).all()
    assert table[table.routed].routing.mean() > .8

def test_a_checkpoint_knows_the_settings_of_its_router(tmp_path):
    means = four_classes(8)
    features = draw(means, 10, 0, grid=(3, 3))
    def learner(spec):
        flow = MoLEFlow(8, (3, 3), couplings=1, dia_blocks=0, subnet='linear')
        return Learner(flow, ROUTERS.build(spec), Trainer(epochs=1, progress=False), features, tmp_path)
    first = {'name': 'two_stage', 'first': {'name': 'euclidean'}}
    next(learner(first).stages(make_tasks(list('abcd'))))
    next(learner(first).stages(make_tasks(list('abcd'))))
    with pytest.raises(PartError, match='with other router'):
        next(learner(first | {'first': {'name': 'mahalanobis', 'rank': 3}}).stages(make_tasks(list('abcd'))))


# ---- a thousand tasks --------------------------------------------------------------------------------------

@pytest.mark.parametrize('d', [152, 768])
def test_the_default_router_at_a_thousand_tasks(d):
    "Under 100 kB per task, all that is held counted; under 1 ms an image (here 5, the machine may be busy)."
    g = torch.Generator().manual_seed(0)
    router, n = Mahalanobis(), 32
    means = torch.randn(1000, d, generator=g)
    shapes = torch.exp(torch.randn(20, 1, d, generator=g))
    kinds = [fit_gaussian(torch.randn(n if d == 768 else 160, d, generator=g) * s,
                          rank=29 if d == 768 else None) for s in shapes]
    router.prototypes = [{'task': f'{i}', 'class': f'{i}', **kinds[i % 20], 'mean': m} for i, m in enumerate(means)]
    x = (means[:64] + torch.randn(64, d, generator=g) * shapes[torch.arange(64) % 20, 0])
    router.near(x[:2])
    held = sum(v.nbytes for v in [*router.bank.values(), *router._index])
    assert router.bank['basis'].shape[1] == (29 if d == 768 else 151)        # the largest there can be
    assert held / 1000 < 100_000, held
    times = []
    for _ in range(5):
        start = time.process_time()
        near = router.near(x)
        times.append((time.process_time() - start) / 64 * 1e3)
    assert min(times) < 5, times
    assert near.isfinite().sum(1).eq(router.shortlist).all()
    exact = router.distances(x[:16])
    assert (near[:16].argmin(1) == exact.argmin(1)).all() and (near.argmin(1) == torch.arange(64)).float().mean() > .95

def test_few_prototypes_are_all_compared():
    router = Mahalanobis()
    x = torch.randn(64, 10, 5, generator=torch.Generator().manual_seed(0))
    for i in range(64): router.add(f'{i}', None, x[i])
    assert router.near(x[0]).isfinite().all()
    router.add('64', None, x[0] + 1)
    assert router.near(x[0]).isfinite().sum(1).eq(8).all()


# ---- orders ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [n for n in ORDERS if n not in ('list', 'texture_first', 'easy_first', 'hard_first')])
def test_every_order_is_a_permutation_and_the_same_again(name):
    features = draw(four_classes(), 10, 0)
    if name == 'measured': name = {'name': name, 'by': 'spread'}
    a, b = (make_tasks(list('abcd'), '1-1', name, 3, features) for _ in range(2))
    assert a == b and sorted(t.name for t in a) == list('abcd')

def test_a_measured_order_never_looks_at_test_images():
    means = four_classes()
    parts = [draw(means, 10, 0), draw(means, 4, 1, split='validation'), draw(means, 4, 2, split='test', label=1)]
    index = pd.concat([p.index for p in parts])
    x = torch.cat([p.batch(slice(None)) for p in parts])
    broken = x.clone()
    broken[-16:] = float('nan')
    for name in ('measured', 'similar_first', 'dissimilar_first'):
        orders = [make_tasks(list('abcd'), '1-1', name, 0, from_arrays(v, index)) for v in (x, broken)]
        assert orders[0] == orders[1]

def test_wider_classes_are_harder():
    means, g = four_classes(), torch.Generator().manual_seed(0)
    widths = dict(zip('abcd', (1., .2, 2., .5)))
    x = torch.cat([w * torch.randn(12, 4, 4, 6, generator=g) + means[c] for c, w in widths.items()])
    features = from_arrays(x, pd.DataFrame({'class': np.repeat(list('abcd'), 12)}))
    tasks = make_tasks(list('abcd'), '1-1', {'name': 'measured', 'first': 'easy'}, 0, features)
    assert [t.name for t in tasks] == ['b', 'd', 'a', 'c']
    tasks = make_tasks(list('abcd'), '1-1', {'name': 'measured', 'first': 'hard'}, 0, features)
    assert [t.name for t in tasks] == ['c', 'a', 'd', 'b']
