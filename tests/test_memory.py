"""Memory banks: the coreset against the textbook in numpy, distances against scikit-learn, and what a stream of tasks
does to each kind of bank"""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from adflow.continual.learner import Learner, Trainer, digests
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.evaluate.stages import StageEvaluator
from adflow.features.store import from_arrays
from adflow.features.coreset import Cover, greedy_coreset, squared_distance
from adflow.memory.patchcore import lonely_weights, member_counts, nearest_members
from adflow.parts import DETECTORS, PartError

DIM, GRID = 8, (6, 5)
MEMORIES = {'patchcore': {'ratio': .1}, 'patchcore_joint': {'ratio': .1}, 'shared_coreset': {'size': 120}}

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

# ------------------------------------------------------------------------------------------------------------- coreset
def textbook(x, size, start=0):
    "Greedy k-center in numpy, float64, one pass over all points per pick."
    x, picks = x.double().numpy(), [start]
    d = np.full(len(x), np.inf)
    for _ in range(size - 1):
        d = np.minimum(d, ((x - x[picks[-1]]) ** 2).sum(1))
        d[picks] = -np.inf
        picks.append(int(np.argmax(d)))
    return picks

def integers(n, d, top): return torch.randint(0, top, (n, d), generator=torch.Generator().manual_seed(0)).float()

heavy = rand(1500, 12) / torch.rand(1500, 1, generator=torch.Generator().manual_seed(1)) ** 2  # norms over decades
POINTS = {
    'gauss': rand(1500, 20), 'plane': rand(1500, 3) @ rand(3, 20, seed=1) + .01 * rand(1500, 20, seed=2),
    'line': rand(1500, 1), 'ties': integers(1500, 6, 3), 'all ties': torch.eye(300),
    'copies': integers(40, 5, 50).repeat(20, 1), 'copies at the end': torch.cat([rand(600, 4), torch.zeros(600, 4)]),
    'one point': torch.ones(200, 3), 'heavy tails': heavy, 'far away': rand(900, 6) + 1e5, 'huge': 1e15 * rand(900, 6),
    'tiny': 1e-15 * rand(900, 6), 'half': rand(900, 6).half(), 'double': 1e4 + 1e-7 * rand(900, 6).double(),
    'two clouds': torch.cat([rand(700, 10), rand(700, 10, seed=1) * .01 + 50]), 'wide': rand(300, 700)}

@pytest.mark.parametrize('name', POINTS)
def test_greedy_coreset_is_the_textbook(name):
    x = POINTS[name]
    size, start = min(len(x), 300), len(x) // 3
    expected = textbook(x, size, start)
    for candidates in (512, 5): assert greedy_coreset(x, size, start, candidates).tolist() == expected, candidates

def test_a_whole_set_is_ordered_and_none_comes_twice():
    for x in (POINTS['line'][:200], POINTS['copies'][:200]):
        assert greedy_coreset(x, len(x)).tolist() == textbook(x, len(x))
        assert greedy_coreset(x, len(x)).sort().values.tolist() == list(range(len(x)))

def test_a_selection_begins_with_every_smaller_one():
    x, all_ = POINTS['plane'], greedy_coreset(POINTS['plane'], 400, 7)
    for n in (1, 2, 50, 399): assert torch.equal(greedy_coreset(x, n, 7), all_[:n])

@pytest.mark.parametrize('name', ['gauss', 'heavy tails', 'far away', 'huge', 'wide', 'copies'])
def test_float32_is_within_the_bound_that_decides(name):
    x, picks = POINTS[name], torch.arange(0, len(POINTS[name]), 7)
    cover = Cover(x, len(picks))
    for part in picks.split(20): cover.add(part)
    true = torch.stack([squared_distance(x, x[i]) for i in picks], 1).amin(1)
    wrong, slack = (cover.low + cover.norm - true).abs(), cover.slack(true, cover.norm.double())
    assert (wrong <= slack / 2).all() and (wrong.max() > 0 or name in ('far away', 'copies'))   # those are exact
    free = torch.ones(len(x), dtype=torch.bool).index_fill(0, picks, False).nonzero().flatten()
    assert torch.equal(cover.exact(free), true[free])
    assert (cover.exact(picks[:5]) == -torch.inf).all()
    rows, rest = cover.farthest(10)
    others = true.index_fill(0, torch.cat([rows, picks]), -torch.inf)
    assert len(rows) >= 10 and others.max() <= rest and true[rows].min() >= others.max() - slack.max()

def test_threads_do_not_change_the_choice():
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = greedy_coreset(POINTS['plane'], 200)
    finally: torch.set_num_threads(n)
    assert torch.equal(two, greedy_coreset(POINTS['plane'], 200))

@pytest.mark.parametrize('x, args, words', [
    (rand(5, 3), {'size': 6}, 'do not fit'), (rand(5, 3), {'size': 0}, 'do not fit'),
    (rand(5, 3), {'size': 2, 'start': 5}, 'do not fit'), (rand(5, 3), {'size': 2, 'start': -1}, 'do not fit'),
    (rand(5), {'size': 2}, 'expected (N, D)'), (rand(5, 3) * torch.nan, {'size': 2}, 'not finite')])
def test_a_coreset_that_cannot_be(x, args, words):
    with pytest.raises(PartError) as e: greedy_coreset(x, **args)
    assert words in str(e.value)

# ----------------------------------------------------------------------------------------------------------- distances
@pytest.mark.parametrize('n, members, k, shift', [(70, 50, 1, 0), (1025, 1030, 1, 0), (130, 2100, 4, 0), (10, 3, 3, 0),
                                                  (200, 300, 2, 1000.)])
def test_nearest_members_equal_scikit_learn(n, members, k, shift):
    x, bank = rand(n, 16) + shift, rand(members, 16, seed=1) + shift
    d, at = nearest_members(x, bank, k)
    theirs, where = NearestNeighbors(n_neighbors=k, algorithm='brute').fit(bank.double()).kneighbors(x.double())
    np.testing.assert_allclose(d, theirs, rtol=1e-5)
    assert (at.numpy() == where).mean() > .99 and d.shape == at.shape == (n, k)
    np.testing.assert_allclose(d, (x[:, None] - bank[at]).norm(dim=-1), rtol=1e-6)

def test_a_member_is_at_no_distance():
    bank = rand(2000, 64) * 100 + 500
    assert (nearest_members(bank, bank)[0] == 0).all()

def test_weights_of_lonely_members():
    "Equation 7 of PatchCore in numpy; a member among its like weighs less than one that stands alone."
    bank, x = rand(60, 5), rand(40, 5, seed=1)
    at = nearest_members(x, bank)[1][:, 0]
    w = lonely_weights(x, bank, at, 4)
    b, p = bank.double().numpy(), x.double().numpy()
    for i in range(40):
        near = np.argsort(np.linalg.norm(b - b[at[i]], axis=1), kind='stable')[:4]
        e = np.exp(np.linalg.norm(p[i] - b[near], axis=1))
        assert at[i] in near and abs(w[i] - (1 - np.exp(np.linalg.norm(p[i] - b[at[i]])) / e.sum())) < 1e-5
    crowd = torch.cat([torch.zeros(5, 2) + .01 * rand(5, 2), torch.tensor([[10., 0.]]), 50 + .01 * rand(5, 2)])
    both = lonely_weights(torch.tensor([[0., 1.], [10., 1.]]), crowd, torch.tensor([0, 5]), 4)
    assert both[1] > both[0]
    assert torch.isfinite(lonely_weights(1e4 * x, bank, at, 4)).all()       # no overflow of exponentials

# ----------------------------------------------------------------------------------------------------- a small stream
CLASSES = ('a', 'b', 'c')

def stream(classes=CLASSES, n=24):
    "Three classes near planes; a square of defective patches in every second test image."
    x, index, masks = [], [], []
    for seed, c in enumerate(classes):
        plane = rand(3, DIM, seed=seed + 50)
        y = rand(n + 12, *GRID, 3, seed=seed) @ plane + .1 * rand(n + 12, *GRID, DIM, seed=seed + 9)
        y = y + 3 * rand(DIM, seed=seed + 70)
        m = torch.zeros(n + 12, *GRID, dtype=torch.bool)
        m[-6:, 2:4, 1:3] = True
        x.append(y + m[..., None] * 4 * rand(DIM, seed=seed + 30))
        masks.append(m)
        index += [{'class': c, 'split': 'train' if i < n else 'test', 'label': int(i >= n + 6), 'image': f'{c}{i}.png',
                   'kind': 'square' if i >= n + 6 else 'good'} for i in range(n + 12)]
    return from_arrays(torch.cat(x), pd.DataFrame(index), masks=torch.cat(masks).numpy())

def memory(name, **args): return DETECTORS.build({'name': name, **MEMORIES[name], **args}, dim=DIM, grid=GRID, seed=0)

def run(features, detector, checkpoint=None, scenario='1-1', stop=None, router='mahalanobis'):
    "Stages with their evaluation; `stop`: after that many."
    evaluate, out = StageEvaluator(features, smoothing=0, progress=False), []
    learner = Learner(detector, ROUTERS.build(router), Trainer(progress=False), features, checkpoint)
    for stage in learner.stages(make_tasks(CLASSES, scenario)):
        out.append((stage, evaluate(stage), member_counts(stage.detector)))
        if len(out) == stop: break
    return out

@pytest.fixture(scope='module')
def features(): return stream()

@pytest.mark.parametrize('name', MEMORIES)
def test_a_stream_is_learned_and_the_defects_are_found(features, name):
    out = run(features, memory(name))
    last = out[-1][1]
    assert (last['pixel_ap'] > .9).all() and (last['image_auroc'] > .95).all() and (last['routing'] == 1).all()
    assert list(out[-1][0].detector.groups) == list(CLASSES)

@pytest.mark.parametrize('name', MEMORIES)
def test_a_stopped_run_ends_like_one_that_was_not(features, name, tmp_path):
    whole, _ = run(features, memory(name)), run(features, memory(name), tmp_path, stop=1)
    again = run(features, memory(name), tmp_path)
    assert [s.restored for s, _, _ in again] == [True, False, False]
    assert again[-1][0].digests == whole[-1][0].digests and again[-1][1].equals(whole[-1][1])
    with pytest.raises(PartError, match='with other detector'): run(features, memory(name, neighbours=3), tmp_path)

def test_a_bank_per_class_is_frozen_after_later_tasks(features):
    out = run(features, memory('patchcore'))
    for before, after in zip(out, out[1:]): assert before[0].digests.items() <= after[0].digests.items()
    kept = out[-1][1][out[-1][1]['class'] == 'a'].drop(columns='stage').reset_index(drop=True)
    assert kept.equals(out[0][1].drop(columns='stage'))                     # so are the numbers of the class

def test_the_joint_bank_grows_and_old_scores_only_fall(features):
    x, before, bits = features.where(split='test', **{'class': 'a'}).batch(slice(None)), None, {}
    det = memory('patchcore_joint')
    for t in make_tasks(CLASSES, '1-1'):
        det.learn(t, features.where(split='train', **{'class': t.name}))
        now, own = det.score(x, det.group_of(t.name, t.name)), digests(det)
        assert bits.items() <= own.items() and sum(member_counts(det).values()) == 72 * (t.index + 1)
        if before is not None: assert (now <= before).all()
        before, bits = now, own
    assert det.group_of('a', 'a') == det.group_of('c', 'c')

def test_the_shared_budget_stays_and_old_classes_shrink(features):
    out = run(features, memory('shared_coreset', size=100))
    counts = [c for _, _, c in out]
    assert [sum(c.values()) for c in counts] == [100] * 3 and counts[0]['a'] > counts[1]['a'] > counts[2]['a'] > 0
    assert out[1][0].digests['0'] != out[0][0].digests['0']

def test_the_shared_coreset_is_the_greedy_one_of_memory_and_news(features):
    det, tasks = memory('shared_coreset', size=90), make_tasks(CLASSES, '1-1')
    normal = {t.name: features.where(split='train', **{'class': t.name}) for t in tasks}
    det.learn(tasks[0], normal['a'])
    bank = det.banks.tasks[0]
    old, news = bank.members.clone(), ((normal['b'].batch(slice(None)) - bank.mean) / bank.std).flatten(0, 2)
    det.learn(tasks[1], normal['b'])
    kept, union = torch.cat([b.members for b in det.banks.tasks]), torch.cat([old, news])
    at = [int((union == m).all(1).nonzero()[0]) for m in kept]
    start = next(i for i in at if sorted(textbook(union, 90, i)) == sorted(at))      # which one was first, is drawn
    assert at == sorted(at) and start in at
    assert all(i < 90 for i in at[:len(det.banks.tasks[0].members)])

def test_a_memory_that_is_not_full_keeps_everything(features):
    det, t = memory('shared_coreset', size=10_000), make_tasks(CLASSES, 'joint')[0]
    det.learn(t, features.where(split='train'))
    assert member_counts(det) == dict.fromkeys(CLASSES, 24 * 30)
    assert det.score(features.where(split='train').batch(slice(None)), 'all').max() < 1e-4

@pytest.mark.parametrize('name', MEMORIES)
def test_learning_a_class_again_replaces_it(features, name):
    det, tasks = memory(name), make_tasks(CLASSES, '1-1')
    for t in (tasks[0], tasks[1], tasks[1]): det.learn(t, features.where(split='train', **{'class': t.name}))
    assert list(det.groups) == ['a', 'b'] and len(det.banks.tasks) == 2
    assert sum(member_counts(det).values()) == {'patchcore': 144, 'patchcore_joint': 144, 'shared_coreset': 120}[name]

def test_one_bank_for_a_task_of_several_classes(features):
    det = memory('patchcore', adapters='task')
    per_task = {'name': 'mahalanobis', 'per': 'task'}
    out = run(features, det, scenario='2-1', router=per_task)
    assert out[-1][2] == {'a+b': 144, 'c': 72}
    with pytest.raises(PartError, match='adapters'): run(features, memory('patchcore'), scenario='2-1', router=per_task)

@pytest.mark.parametrize('name', MEMORIES)
def test_a_memory_survives_a_file(features, name, tmp_path):
    det = memory(name, neighbours=3)
    for t in make_tasks(CLASSES, '2-1'): det.learn(t, features.where(split='train', **{'class': list(t.classes)}))
    det.save(tmp_path)
    again, x = type(det).load(tmp_path), features.where(split='test').batch(slice(None))
    group = det.group_of('c', 'c')
    assert torch.equal(again.score(x, group), det.score(x, group)) and digests(again) == digests(det)
    meta = json.loads((tmp_path / 'detector.json').read_text())
    assert meta['detector'] == name and meta['groups'] == list(CLASSES) and again.settings == det.settings

def test_size_ratio_and_choice(features):
    t, x = make_tasks(CLASSES, '1-1')[0], features.where(split='train', **{'class': 'a'})
    def members(**args):
        det = memory('patchcore', **args)
        det.learn(t, x)
        return det.banks.tasks[0].members
    asked = [{'ratio': .05}, {'size': 50}, {'size': 10**6}, {'ratio': 1.}]
    assert [len(members(**args)) for args in asked] == [36, 50, 720, 720]
    assert torch.equal(members(select='random', size=50), members(select='random', size=50))
    all_, raw = members(ratio=1., select='random'), members(ratio=1., standardize=False)
    np.testing.assert_allclose(all_.std(0), 1, atol=1e-5)
    assert raw.std(0).max() > 1.2
    greedy, random = members(size=50), members(select='random', size=50)
    assert nearest_members(all_, greedy)[0].max() < nearest_members(all_, random)[0].max()

def test_a_constant_channel_does_no_harm():
    x = rand(20, *GRID, DIM)
    x[..., 3] = 7.
    det = memory('patchcore')
    det.learn(make_tasks(['synthetic'], '1-1')[0], from_arrays(x))
    assert torch.isfinite(det.score(x, 'synthetic')).all() and det.score(x, 'synthetic').max() < 10

@pytest.mark.parametrize('name, args, words', [
    ('patchcore', {'ratio': 0.}, '(0, 1]'), ('patchcore', {'ratio': 2.}, '(0, 1]'),
    ('patchcore', {'size': -5}, 'too small'),
    ('patchcore', {'neighbours': 1}, '2 or more'), ('patchcore', {'select': 'herding'}, 'select'),
    ('patchcore', {'adapters': 'pixel'}, 'adapters'), ('patchcore_joint', {'ratio': -1.}, '(0, 1]'),
    ('shared_coreset', {'size': 0}, 'too small'), ('shared_coreset', {'ratio': .1}, "takes no 'ratio'")])
def test_arguments_that_cannot_be(name, args, words):
    with pytest.raises(PartError) as e: DETECTORS.build({'name': name, **args}, dim=DIM, grid=GRID)
    assert words in str(e.value)

def test_a_memory_is_asked_for_what_it_has(features):
    det = memory('patchcore')
    with pytest.raises(PartError, match="No bank for 'a'"): det.score(rand(1, *GRID, DIM), 'a')
    det.learn(make_tasks(CLASSES, '1-1')[0], features.where(split='train', **{'class': 'a'}))
    with pytest.raises(ValueError, match='as built'): det.score(rand(1, *GRID, DIM + 1), 'a')
    assert det.score(rand(0, *GRID, DIM), 'a').shape == (0, *GRID)

def test_all_memories_are_tested():
    assert set(MEMORIES) == {n for n in DETECTORS if DETECTORS[n].__module__ == 'adflow.memory.patchcore'}

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_the_same_on_a_gpu(features):
    x = POINTS['plane']
    assert torch.equal(greedy_coreset(x.cuda(), 200).cpu(), greedy_coreset(x, 200))
    det = memory('patchcore').to('cuda')
    det.learn(make_tasks(CLASSES, '1-1')[0], features.where(split='train', **{'class': 'a'}).to('cuda'))
    assert det.score(x[:30, :DIM].view(1, *GRID, DIM).cuda(), 'a').is_cuda
