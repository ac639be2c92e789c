"""Every registered loss in training: two tasks through the learner, nothing of the first touched by the second, the
same bits from the same seed; second derivatives of the assembled flow; precision; what losses do to whole flows"""
import math

import numpy as np
import pandas as pd
import pytest
import torch

import adflow.flow.margin
import adflow.flow.score_matching  # noqa: F401  (registers its losses)
from adflow.continual.learner import Learner, Trainer
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.features.store import from_arrays
from adflow.flow.losses import LOSSES, build_losses, patch_nll
from adflow.flow.moleflow import MoLEFlow
from adflow.parts import PartError, add_task, train_only, use_task

COLD = {'name': 'epoch_cosine', 'warmup': 0}
DIM, GRID, CLASSES = 8, (6, 5), ['plate', 'screw']
ARGUMENTS = {'nll': [{}, {'reduce': 'sum'}], 'identity': [{}, {'on': 'all'}],
             'adaptive_tail': [{}, {'per_class': {'plate': .3}}],
             'dsm': [{}, {'at': 'aligned', 'clean': .1}, {'projections': 2, 'weighting': 'none', 'unit': 'absolute'},
                     {'sigma': .2, 'schedule': 'fixed', 'weight': [.2, 1.]}],
             'margin': [{'make': m} for m in ('noise', 'swap', 'mix', 'defects')] + [{'shape': 'softplus'}]}
SPECS = [pytest.param(name, args, id=f'{name}-' + '-'.join(f'{k}={v}' for k, v in args.items()))
         for name in LOSSES for args in ARGUMENTS.get(name, [{}])]

def rand(*shape, seed=0, **kw): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kw)

def masks(n):
    m = np.zeros((n, *GRID), bool)
    m[:, 2:4, 1:3] = True
    return m

def spoil(x, by=4.): return x + torch.from_numpy(masks(len(x))[..., None]) * torch.as_tensor(by)

X = torch.cat([rand(8, *GRID, DIM, seed=i) * (1 + i) + i for i in range(2)])
INDEX = pd.DataFrame({'class': np.repeat(CLASSES, 8), 'split': 'train'})
NORMALS = from_arrays(X, INDEX)
DEFECTS = from_arrays(spoil(X), INDEX.assign(label=1), masks=masks(16))
PAINTED = spoil(X[:4]), torch.from_numpy(masks(4))

def spec_of(name, args): return {name: args} if name in ('nll', 'focal') else {'nll': {}, name: args}

def detector(loss, **kw):
    return MoLEFlow(DIM, GRID, subnet={'name': 'scale_context', 'rank': 2, 'kernel': 3}, couplings=2, dia_blocks=1,
                    loss=loss, **kw)

def learned(loss, epochs=2, normals=NORMALS, defects=DEFECTS, **kw):
    "Both tasks; the last stage."
    trainer = Trainer(epochs=epochs, batch_size=4, lr=1e-2, schedule=COLD, progress=False)
    learner = Learner(detector(loss, **kw), ROUTERS.build('mahalanobis'), trainer, normals, defects=defects)
    return list(learner.stages(make_tasks(CLASSES, '1-1')))[-1]

@pytest.mark.parametrize('name, args', SPECS)
def test_every_loss_learns_two_tasks(name, args):
    "It is in the history and finite; nothing shared and nothing of task 0 moves in task 1; same seed, same bits."
    stages = [learned(spec_of(name, args)) for _ in range(2)]
    history = pd.DataFrame(stages[0].history)
    assert history[name].notna().all() and np.isfinite(history[name]).all()
    pd.testing.assert_frame_equal(history, pd.DataFrame(stages[1].history))
    assert stages[0].digests == stages[1].digests
    trainer = Trainer(epochs=2, batch_size=4, lr=1e-2, schedule=COLD, progress=False)
    alone = list(Learner(detector(spec_of(name, args)), ROUTERS.build('mahalanobis'), trainer, NORMALS, defects=DEFECTS)
                 .stages(make_tasks(CLASSES, '1-1')[:1]))[-1]
    for owner in ('shared', '0'): assert alone.digests[owner] == stages[0].digests[owner], owner

@pytest.mark.parametrize('name, args', SPECS)
def test_every_loss_sends_a_gradient_into_the_flow(name, args):
    "Alone (its own value, not the total), on the first task and on a later one."
    d, loss = detector(None), LOSSES.build({'name': name, **args})
    reached = {}
    for slot in range(2):
        add_task(d), add_task(loss)
        for m in (d, loss): use_task(m, slot)
        train = train_only(d, [slot], shared=slot == 0)
        with torch.no_grad():
            for p in train.values(): p.add_(.1 * rand(*p.shape, seed=slot))
        x = NORMALS.batch(slice(8 * slot, 8 * slot + 4))
        z, log_det = d(x)
        value = loss(z, log_det, x=x, flow=d.flow, generator=torch.Generator().manual_seed(0), group=CLASSES[slot],
                     defects=PAINTED)
        assert value.ndim == 0
        grads = torch.autograd.grad(value, list(train.values()), allow_unused=True) if value.requires_grad else []
        reached[slot] = {k for k, g in zip(train, grads) if g is not None and g.abs().sum() > 0}
    if name == 'identity':
        assert all('align' in k for k in reached[0]) and reached[0] and bool(reached[1]) == (args.get('on') == 'all')
    else:
        for slot in range(2): assert any('.blocks.' in k for k in reached[slot]), slot

def test_defects_are_asked_for():
    for loss in ({'nll': {}, 'boundary': {}}, {'nll': {}, 'margin': {'make': 'defects'}}):
        with pytest.raises(PartError, match='synthetic defects'): learned(loss, defects=None)

# ------------------------------------------------------------------------------------------- score matching, whole flow
def double_flow():
    "The assembled flow in float64, two slots, away from its start."
    d = detector(None, global_affine=True)
    for slot in range(2): add_task(d, seed=1)
    with torch.no_grad():
        for i, p in enumerate(d.parameters()): p.add_(.2 * rand(*p.shape, seed=i))
    return d.double()

@pytest.mark.parametrize('slot', [0, 1])
@pytest.mark.parametrize('args', [{}, {'projections': 2}, {'weighting': 'none', 'unit': 'absolute', 'clean': .3}])
def test_dsm_gradient_against_finite_differences(slot, args):
    "Base and adapters while the base learns; adapters alone (merged linear layers) when it is frozen."
    d, loss = double_flow(), LOSSES.build({'name': 'dsm', 'sigma': .3, 'schedule': 'fixed', **args})
    use_task(d, slot)
    train = train_only(d, [slot], shared=slot == 0)
    x = rand(2, *GRID, DIM, seed=3, dtype=torch.float64)
    def value(): return loss(*d(x), x=x, flow=d.flow, generator=torch.Generator().manual_seed(1))
    checked = 0
    grads = torch.autograd.grad(value(), list(train.values()), materialize_grads=True)
    for (name, p), grad in zip(train.items(), grads):
        v, eps = rand(*p.shape, seed=5, dtype=torch.float64), 1e-6
        with torch.no_grad():
            p.add_(eps * v)
            up = value()
            p.sub_(2 * eps * v)
            down = value()
            p.add_(eps * v)
        slope, ours = (up - down) / (2 * eps), (grad * v).sum()
        assert torch.isclose(slope, ours, rtol=2e-5, atol=2e-5 * max(1., abs(value().item()) * 1e-2)), name
        checked += bool(ours.abs() > 1e-4)
    assert checked > len(train) / 2

def test_dsm_after_the_alignment_leaves_the_flow_as_it_was():
    d, x = detector(None), NORMALS.batch(slice(0, 4))
    add_task(d), use_task(d, 0)
    before = d(x)[0]
    loss = LOSSES.build({'name': 'dsm', 'at': 'aligned'})
    loss(*d(x), x=x, flow=d.flow, generator=torch.Generator().manual_seed(0))
    assert torch.equal(d(x)[0], before) and not d.flow.align._forward_hooks
    d.flow.align.forward = lambda x: 1 / 0                     # the hook goes even if the flow breaks
    with pytest.raises(ZeroDivisionError): loss(None, None, x=x, flow=d.flow, generator=torch.Generator())
    assert not d.flow.align._forward_hooks

def test_dsm_learns_a_blurred_density_where_nll_learns_a_sharp_one():
    "The same tiny flow on the same Gaussian: the spread of the latents tells the blur."
    x = rand(64, *GRID, DIM, seed=0)
    data = from_arrays(x, pd.DataFrame({'class': ['plate'] * 64}))
    spread = {}
    blur = {'nll': {}, 'dsm': {'weight': 1., 'sigma': 1., 'schedule': 'fixed'}}
    for name, loss in {'nll': {'nll': {}}, 'dsm': blur}.items():
        d = MoLEFlow(DIM, GRID, position='none', align='none', context='none', subnet={'name': 'lora', 'rank': 0},
                     couplings=1, dia_blocks=0, global_affine=True, loss=loss)
        trainer = Trainer(epochs=25, batch_size=16, lr=.15, schedule=COLD, clip=0, progress=False)
        list(Learner(d, ROUTERS.build('mahalanobis'), trainer, data).stages(make_tasks(['plate'], '1-1')))
        with torch.no_grad(): spread[name] = d(x)[0].square().mean().item()
    assert abs(spread['nll'] - 1.) < .1 and abs(spread['dsm'] - .5) < .1    # variance 1 ÷ (1 + σ²)

# ----------------------------------------------------------------------------------------------- precision and the rest
@pytest.mark.parametrize('name, args', [p for p in SPECS if p.values[0] not in ('identity',)])
def test_bfloat16_autocast_stays_near_float32(name, args):
    d, x = detector(None), NORMALS.batch(slice(0, 8))
    add_task(d), use_task(d, 0)
    with torch.no_grad():
        for i, p in enumerate(d.parameters()): p.add_(.1 * rand(*p.shape, seed=i))
    loss = LOSSES.build({'name': name, **args})
    def value():
        return loss(*d(x), x=x, flow=d.flow, generator=torch.Generator().manual_seed(0), defects=PAINTED)
    full = value()
    with torch.autocast('cpu', torch.bfloat16): half = value()
    assert half.dtype == torch.float32 and math.isclose(half.item(), full.item(), rel_tol=.1, abs_tol=.3)

def test_identity_keeps_the_first_alignment_only():
    "With a heavy pull γ stays at 1 on task 0 and is free on task 1; in separate flows too, each of which has one slot."
    for separate in (False, True):
        d = learned({'nll': {}, 'identity': 1e4}, epochs=4, separate=separate).detector
        free = learned({'nll': {}}, epochs=4, separate=separate).detector
        moved = {}
        for slot in range(2):
            for key, m in (('pulled', d), ('free', free)):
                use_task(m, slot)
                gamma, beta = m.flow.align.affine()
                moved[key, slot] = ((gamma - 1).square().mean() + beta.square().mean()).item()
        assert moved['pulled', 0] < .2 * moved['free', 0] and moved['pulled', 1] > .5 * moved['free', 1], moved

def test_adaptive_weights_are_of_each_class():
    "Even patches keep their mean, uneven ones get a tail; a class with a weight of its own is not measured."
    patches = torch.linspace(.2, 3., GRID[0] * GRID[1]).view(1, *GRID, 1)
    even, uneven = (rand(8, *GRID, DIM, seed=i) * s for i, s in enumerate((1., patches)))
    found = {}
    for key, x, args in (('even', even, {}), ('uneven', uneven, {}), ('known', uneven, {'per_class': {'screw': .3}})):
        normals = from_arrays(torch.cat([X[:8], x]), INDEX)
        history = pd.DataFrame(learned({'nll': {}, 'adaptive_tail': args}, normals=normals, defects=None, align='none',
                                       position='none').history)
        found[key] = history[history['task'] == history['task'].iloc[-1]]['adaptive_tail_weight'].mean()
    assert 0 <= found['even'] < .4 < found['uneven'] < 1 and np.isclose(found['known'], .3), found

def test_a_margin_separates_what_a_likelihood_does_not():
    "A shift that is small beside the channel's own spread: seen by the flow that was told to keep away from it."
    x, index = rand(48, *GRID, DIM, seed=0), pd.DataFrame({'class': ['plate'] * 48, 'split': 'train'})
    bad, m, found = spoil(x.roll(1, 0), [1.5, -1.5] + [0.] * (DIM - 2)), torch.from_numpy(masks(48)), {}
    data, made = from_arrays(x, index), from_arrays(bad, index.assign(label=1), masks=masks(48))
    for name, loss in {'nll': {'nll': {}}, 'margin': {'nll': {}, 'margin': {'make': 'defects', 'weight': 2.}}}.items():
        d = MoLEFlow(DIM, GRID, align='none', subnet={'name': 'lora', 'rank': 2}, couplings=2, dia_blocks=1, loss=loss)
        trainer = Trainer(epochs=12, batch_size=8, lr=.01, schedule=COLD, progress=False)
        list(Learner(d, ROUTERS.build('mahalanobis'), trainer, data, defects=made).stages(make_tasks(['plate'], '1-1')))
        score = d.score(bad, 'plate')
        found[name] = (score[m][:, None] > score[~m][None, ::7]).float().mean().item()
    assert found['margin'] > found['nll'] + .05, found

def test_center_is_the_nll_of_a_narrower_prior():
    "Gradients for every weight of the whole flow, not only values."
    d, x = double_flow(), rand(2, *GRID, DIM, seed=3, dtype=torch.float64)
    use_task(d, 0)
    train, lam = train_only(d, [0], shared=True), .25
    z, log_det = d(x)
    total, _ = build_losses({'nll': {}, 'center': lam})(z, log_det)
    prior = torch.distributions.Normal(0., torch.tensor(1 + 2 * lam, dtype=torch.float64)**-.5)
    narrow = -(prior.log_prob(z).sum(-1) + log_det).mean() + DIM / 2 * math.log(1 + 2 * lam)
    assert torch.isclose(total, narrow)
    for a, b in zip(*[torch.autograd.grad(v, list(train.values()), retain_graph=True) for v in (total, narrow)]):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)

def test_focal_reaches_hard_patches_more():
    z = rand(2, 5, 5, 3, seed=0, requires_grad=True)
    nll = patch_nll(z, torch.zeros(2, 5, 5))
    plain, focal = (torch.autograd.grad(build_losses(s)(z, torch.zeros(2, 5, 5))[0], z)[0].norm(dim=-1).flatten()
                    for s in ({'nll': {}}, {'focal': {}}))
    ratio = (focal / plain)[nll.flatten().argsort()]
    assert (ratio.diff() >= -1e-6).all() and ratio[0] < 1e-6 and ratio[-1] > .5
