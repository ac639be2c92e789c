"""Severity from the fault to the number: what every fault must be, what the trainer hands over, that the head leaves
the decoder alone to the last bit in the learner too, and planted mistakes that must be caught"""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from adflow.continual.learner import Learner, Trainer
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.data.faults import AXES, MODES, apply_fault, draw_severity, fault_field
from adflow.dinomaly.model import Dinomaly
from adflow.dinomaly.severity import SEVERITY, severity_loss
from adflow.evaluate.severity import minimum_detectable, severities, severity_metrics
from adflow.features.pseudo import batches_of_defects
from adflow.features.store import from_arrays
from adflow.parts import PartError

torch.set_num_threads(1)
SMALL = dict(layers=[8, 8], depth=2, heads=2, dropout=.1)
GRID = 6, 8


# ---- faults ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('seed', range(4))
def test_any_fault(axis, mode, seed):
    "Random sizes, teeth, leakage, lobes and ranges of values: mask, contrast, no clipping, input untouched."
    rng = np.random.default_rng(seed)
    size = tuple(int(v) for v in rng.integers(30, 90, 2))
    where = dict(axis=axis, tooth=float(rng.uniform(1, 4)), leakage=(1, .5, .1)[:rng.integers(1, 4)],
                 lines=int(rng.integers(1, 3)), lobes=int(rng.integers(0, 5)), width=float(rng.uniform(.3, 1)))
    field = fault_field(np.random.default_rng(seed), size, **where)
    assert field.max() == 1 and field.min() == 0
    assert (field == fault_field(np.random.default_rng(seed), size, **where)).all()
    image = np.random.default_rng(seed + 50).lognormal(3, 1, size).astype(np.float32)   # far above 1
    before, s = image.copy(), draw_severity(rng)
    bad, mask = apply_fault(image, field, s, mode)
    assert (image == before).all() and (mask == (bad != image)).all() and (mask == (field > 0)).all()
    level = image if mode == 'multiply' else image.mean()
    assert np.isclose(((bad - image) / level).max(), s, rtol=1e-3)
    assert bad.max() >= image.max() > 10

def test_a_fault_wraps_around():
    "Every shift by whole teeth is as likely, and one across the border is a shifted one."
    where = dict(tooth=3, lobes=0, gaps=0, leakage=(1, .4))
    fields = [fault_field(np.random.default_rng(i), (30, 7), **where) for i in range(300)]
    rows = np.array([f[:, 0].argmax() // 3 for f in fields])
    assert np.bincount(rows, minlength=10).min() > 12
    for f, r in zip(fields, rows): assert (np.roll(f, -3 * r, 0) == np.roll(fields[0], -3 * rows[0], 0)).all()


# ---- from the trainer to the loss --------------------------------------------------------------------------

def product(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    return torch.randn(n, *GRID, 3, generator=g) @ basis + .05 * torch.randn(n, *GRID, 16, generator=g)

def damaged(x, s, row):
    "In a row, the features get a strange part of size s."
    x, i = x.clone(), torch.arange(len(x))
    strange = torch.randn(16, generator=torch.Generator().manual_seed(5)) * torch.ones(len(x), 8, 1)
    x[i, row] = x[i, row] + torch.as_tensor(s)[:, None, None] * strange
    return x

def normals(n=24, classes=('plate', 'screw')):
    index = pd.DataFrame([{'class': c, 'split': 'train', 'image': f'{c}/{i}.png'} for c in classes for i in range(n)])
    return from_arrays(product(len(index)), index)

def faults(features, seed=0, low=.1, high=2.):
    "Two severities of one fault per image."
    rng, n = np.random.default_rng(seed), len(features)
    s = np.sort([[draw_severity(rng, low, high) for _ in range(2)] for _ in range(n)], 1).ravel().astype(np.float32)
    row = torch.from_numpy(rng.integers(0, 6, n)).repeat_interleave(2)
    x = damaged(features.batch(slice(None)).repeat_interleave(2, 0), s, row)
    masks = np.zeros((2 * n, *GRID), bool)
    masks[np.arange(2 * n), row] = True
    index = features.index.loc[np.repeat(np.arange(n), 2)].assign(severity=s, label=1, fault=np.arange(n).repeat(2))
    return from_arrays(x, index, masks=masks)

def learn(features, defects=None, models='all', scenario='joint', epochs=6, **detector):
    trainer = Trainer(epochs=epochs, batch_size=8, lr=3e-3, clip=.1, optimizer='adamw', progress=False)
    d = Dinomaly(16, GRID, **SMALL, models=models, **detector)
    learner = Learner(d, ROUTERS.build('oracle'), trainer, features, defects=defects)
    return list(learner.stages(make_tasks(['plate', 'screw'], scenario)))[-1]

@pytest.mark.parametrize('models, scenario', [('all', 'joint'), ('class', '1-1')])
def test_the_decoder_does_not_notice_the_head(models, scenario):
    "Through the learner: gradient clipping, draws, optimizer and slots included."
    x = normals()
    plain = learn(x, models=models, scenario=scenario, epochs=3).detector
    head = learn(x, faults(x), models, scenario, epochs=3, severity='head').detector
    mine, other = plain.state_dict(), head.state_dict()
    assert {k for k in other if not k.startswith('heads')} == set(mine)
    for k, v in mine.items(): assert torch.equal(v, other[k]), k
    untrained = Dinomaly(16, GRID, **SMALL, severity='head').heads
    if models == 'all': assert not torch.equal(head.heads.lines[0].weight, untrained.lines[0].weight)

def test_the_same_seed_gives_the_same_head():
    x = normals()
    a, b = (learn(x, faults(x), epochs=2, severity={'name': 'head', 'eta': .3}).digests for _ in range(2))
    assert a == b

def test_severity_rises_with_the_fault():
    "On images and faults that training never saw: ranks, the same fault growing, and normals near 0."
    x = normals(40)
    d = learn(x, faults(x), epochs=60, severity={'name': 'head', 'weight': 1.}).detector
    fresh, s = product(30, seed=5), torch.linspace(.1, 2, 12)
    row = torch.arange(30) % 6
    grown = torch.stack([d.severity(damaged(fresh, s[k].expand(30), row), 'all') for k in range(12)], 1)    # (30, 12)
    assert (grown.diff(dim=1) > -.02).float().mean() > .95
    assert severity_metrics(grown.flatten(), s.repeat(30))['severity_spearman'] > .85
    zero = d.severity(fresh, 'all')
    assert zero.max() < grown[:, -1].median() / 2
    held = from_arrays(product(120, seed=6))
    normal = severities(d, held, ['all'] * len(held))
    found = minimum_detectable(grown.flatten(), s.repeat(30), normal, fpr=.02)
    assert .1 <= found < 2

def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    "Head, its optimizer state and the draws of faults included."
    x = normals(16)
    f = faults(x)
    def learner(folder):
        trainer = Trainer(epochs=4, batch_size=8, lr=3e-3, clip=.1, optimizer='stable_adamw', progress=False,
                          checkpoint_seconds=0)
        d = Dinomaly(16, GRID, **SMALL, severity={'name': 'head', 'eta': .3})
        return Learner(d, ROUTERS.build('oracle'), trainer, x, folder, defects=f)
    tasks = make_tasks(['plate', 'screw'], 'joint')
    whole = list(learner(tmp_path / 'whole').stages(tasks))[-1].digests
    step, seen = Trainer.step, []
    def killed(self, *args, **kw):
        seen.append(1)
        if len(seen) == 7: raise KeyboardInterrupt
        return step(self, *args, **kw)
    monkeypatch.setattr(Trainer, 'step', killed)
    with pytest.raises(KeyboardInterrupt): list(learner(tmp_path / 'cut').stages(tasks))
    monkeypatch.setattr(Trainer, 'step', step)
    assert list(learner(tmp_path / 'cut').stages(tasks))[-1].digests == whole

@pytest.mark.parametrize('args', [dict(detach=False), dict(eta=.5), dict(pool='attention', weight=(0., 1.))], ids=str)
def test_other_settings_train(args):
    x = normals(8)
    stage = learn(x, faults(x), epochs=2, severity={'name': 'head', **args})
    assert np.isfinite(stage.history[-1]['severity']) and ('denoise' in stage.history[-1]) == ('eta' in args)

def test_special_tokens_come_along():
    x = normals(8, ['plate'])
    cls = lambda f: f.batch(slice(None)).mean((1, 2))[:, None]
    f = faults(x)
    with_cls = [from_arrays(v.batch(slice(None)), v.index, cls(v), v.given_masks) for v in (x, f)]
    d = Dinomaly(16, GRID, **SMALL, special=1, specials=True, severity='head')
    trainer = Trainer(epochs=1, batch_size=4, optimizer='adamw', progress=False)
    learner = Learner(d, ROUTERS.build('oracle'), trainer, with_cls[0], defects=with_cls[1])
    stage = list(learner.stages(make_tasks(['plate'])))[-1]
    assert severities(stage.detector, with_cls[1], ['all'] * len(f)).shape == (16,)

def test_what_a_step_gets():
    "Copies of the batch's own images, all severities of one fault, the place in the batch right."
    x = normals(8)
    f = faults(x)
    hand = batches_of_defects(f, {'all': list(range(len(f)))}, share=.3)
    paths = x.index['image'].tolist()
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        d = hand('all', paths[4:12], generator)
        assert len(d.severity) % 2 == 0 and torch.rand((), generator=generator) == torch.rand(
            (), generator=torch.Generator().manual_seed(i))                        # the step's own draws stay
        for k in range(0, len(d.severity), 2):
            assert d.severity[k] < d.severity[k + 1] and d.fault[k] == d.fault[k + 1] and d.of[k] == d.of[k + 1]
            clean = x.batch([4 + int(d.of[k])])[0]
            changed = (d.features[k] != clean).any(-1)
            assert torch.equal(changed, d.masks[k]) and changed.any(1).sum() == 1
    assert hand('other', paths, torch.Generator()) is None and hand('all', ['no.png'], torch.Generator()) is None
    any_of = batches_of_defects(f, {'all': list(range(len(f)))})('all', paths[:5], torch.Generator().manual_seed(0))
    assert len(any_of.features) == 5 and (any_of.of == -1).all()

def test_what_is_missing_is_said():
    x = normals(4)
    with pytest.raises(PartError, match='make: faults'): learn(x, severity='head')
    f = faults(x)
    f.index = f.index.drop(columns='fault')
    with pytest.raises(PartError, match='column fault'): learn(x, f, severity='head')


# ---- planted mistakes --------------------------------------------------------------------------------------

def error_maps(s, seed, gain=1.):
    "(2, n, 10, 12) errors with a faulty row; `gain` multiplies them all."
    g, n = torch.Generator().manual_seed(seed), len(s)
    maps = .1 * torch.rand(2, n, 10, 12, generator=g).mul(.6).add(.7).square()
    maps[:, torch.arange(n), torch.randint(10, (n,), generator=g)] += .15 * s[:, None]
    return torch.as_tensor(gain).expand(n)[:, None, None] * maps

def head_taught(gain_of, scale, steps=120):
    "A head whose training faults come with a gain that depends on their severity."
    head = SEVERITY.build({'name': 'head', 'scale': scale, 'pool': 'mean'}, groups=2,
                          generator=torch.Generator().manual_seed(0))
    opt = torch.optim.AdamW(head.parameters(), 3e-2)
    for i in range(steps):
        s = (torch.rand(16, generator=torch.Generator().manual_seed(i)) * 3 - 2.3).exp()
        faulty = SimpleNamespace(severity=s, of=torch.arange(16), fault=torch.arange(16))
        loss, _ = severity_loss(head, error_maps(0 * s, i), error_maps(s, i, gain_of(s)), faulty)
        opt.zero_grad(); loss.backward(); opt.step()
    return head

@torch.no_grad()
def follows_gain(head):
    zero = torch.zeros(60)
    return float(head(error_maps(zero, 998, 1.6)).mean() - head(error_maps(zero, 998)).mean())

def test_a_head_that_learned_brightness_is_caught():
    "Good on data with the same confound, and the control tells it from an honest one."
    confounded = lambda s: 1 + s
    cheat, honest = head_taught(confounded, 'none'), head_taught(confounded, 'ratio')
    s = torch.linspace(.1, 2, 40)
    with torch.no_grad(): assert severity_metrics(cheat(error_maps(s, 999, confounded(s))), s)['severity_spearman'] > .9
    assert follows_gain(cheat) > .1 > 100 * abs(follows_gain(honest))

def test_shuffled_labels_teach_nothing():
    "The recipe finds no severity where there is none to find."
    head = SEVERITY.build('head', groups=2, generator=torch.Generator().manual_seed(0))
    opt = torch.optim.AdamW(head.parameters(), 2e-2)
    for i in range(80):
        g = torch.Generator().manual_seed(i)
        s = torch.rand(16, generator=g) * 2
        faulty = SimpleNamespace(severity=s, of=-torch.ones(16, dtype=torch.long), fault=torch.arange(16))
        loss, _ = severity_loss(head, error_maps(s * 0, i), error_maps(s * 0 + 1, i), faulty)
        opt.zero_grad(); loss.backward(); opt.step()
    s = torch.linspace(.1, 2, 60)
    with torch.no_grad(): p = head(error_maps(s * 0 + 1, 999))
    assert abs(severity_metrics(p, s)['severity_spearman']) < .35
