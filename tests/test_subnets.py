"""Subnets and invertible blocks: every subnet inside a coupling, spectral norms, gates, norms that start from data"""
import os
import copy
import math

import pandas as pd
import pytest
import torch
from torch import nn

from adflow.continual.learner import Learner, Trainer
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.features.store import from_arrays
from adflow.flow.coupling import INVERTIBLE, ActNorm, CouplingBlock, CrossPatchCoupling
from adflow.flow.lora import SpectralLoRALinear
from adflow.flow.losses import patch_nll
from adflow.flow.moleflow import MoLEFlow, parameter_counts
from adflow.flow.subnets import SUBNETS, gate_statistics
from adflow.parts import PartError, add_task, observing, slot_of, train_only, use_task

DIM, GRID = 6, (4, 5)
SPECS = [{'name': 'lora', 'rank': 2}, {'name': 'scale_context', 'rank': 2, 'kernel': 3},
         {'name': 'lora_context', 'rank': 2, 'kernel': 3, 'gate': 'patch', 'gate_hidden': 4},
         {'name': 'linear', 'kernel': 0}, {'name': 'linear', 'kernel': 3}, {'name': 'spectral', 'rank': 2, 'kernel': 3},
         {'name': 'spatial_lora', 'cells': 2, 'rank': 2, 'kernel': 3}, {'name': 'neighbour', 'rank': 2}]
def name(spec): return '-'.join(str(v) for v in spec.values())

def rand(*shape, seed=0, **kw): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kw)

def far(module, slots=2, seed=0, noise=.4):
    "With task slots, the second in use, all weights far from their start, in float64 and without power iteration."
    for _ in range(slots): add_task(module)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()): p.add_(noise * rand(*p.shape, seed=seed + i))
    use_task(module, slots - 1)
    return module.double().eval()

def jacobian(part, x):
    def f(v): return part((v.view_as(x),))[0][0].flatten()
    return torch.autograd.functional.jacobian(f, x.flatten()).slogdet().logabsdet

def test_every_subnet_is_tried_here(): assert {s['name'] for s in SPECS} == set(SUBNETS)

# ------------------------------------------------------------------------------------- every subnet, in every coupling
@pytest.mark.parametrize('spec', SPECS, ids=name)
@pytest.mark.parametrize('block', ['coupling', 'cross_patch', 'coupling_per_task'])
def test_log_det_is_exact_and_the_inverse_too(block, spec):
    g = torch.Generator().manual_seed(0)
    part = far(INVERTIBLE.build(block, dims_in=[(*GRID, DIM)], subnet=spec, generator=g))
    x = rand(2, *GRID, DIM, seed=9, dtype=torch.float64)
    (y,), log_det = part((x,))
    for b in range(2): assert math.isclose(log_det[b].sum().item(), jacobian(part, x[b:b + 1]).item(), abs_tol=1e-9)
    (back,), back_det = part((y,), rev=True)
    assert torch.allclose(back, x, atol=1e-9) and torch.allclose(back_det, -log_det, atol=1e-9)
    assert log_det.abs().max() > .1

@pytest.mark.parametrize('spec', SPECS, ids=name)
def test_gradients_of_first_and_second_order(spec):
    "With the base frozen, as score matching on a later task needs them."
    part = far(CouplingBlock([(3, 3, 4)], subnet=spec, generator=torch.Generator().manual_seed(0)))
    weights = list(train_only(part, [1], shared=False).values())
    x = rand(1, 3, 3, 4, seed=1, dtype=torch.float64, requires_grad=True)
    def f(v, *_):
        (z,), log_det = part((v,))
        return patch_nll(z, log_det).sum()
    inputs = (x, *weights)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)

@pytest.mark.parametrize('spec', SPECS, ids=name)
def test_bfloat16_autocast_stays_near_float32(spec):
    part = far(CouplingBlock([(6, 6, 32)], subnet=spec, generator=torch.Generator().manual_seed(0)), noise=.05).float()
    x = rand(2, 6, 6, 32, seed=1)
    (z, ), log_det = part((x,))
    with torch.autocast('cpu', torch.bfloat16): (w,), half = part((x,))
    assert half.dtype == w.dtype == torch.float32
    assert (half - log_det).abs().max() < .03 * log_det.abs().max() and (w - z).abs().max() < .03 * z.abs().max()

@pytest.mark.parametrize('spec', SPECS, ids=name)
def test_shared_weights_follow_from_the_generator(spec):
    def build(seed): return SUBNETS.build(spec, dim_in=4, dim_out=4, generator=torch.Generator().manual_seed(seed))
    def state(net): return torch.cat([v.flatten() for v in net.state_dict().values()] or [torch.zeros(0)])
    first = state(build(1))
    torch.rand(3)
    assert torch.equal(first, state(build(1)))
    assert spec['name'] == 'linear' or not torch.equal(first, state(build(2)))

def test_wrong_arguments_are_refused_by_name():
    for spec, word in (({'name': 'lora_context', 'gate': 'patches'}, 'patch'), ({'name': 'linear', 'kernel': 4}, 'odd'),
                       ({'name': 'spectral', 'norm': -1.}, 'above 0'), ({'name': 'spatial_lora', 'cells': 0}, 'cells'),
                       ({'name': 'linear', 'rank': 3}, "takes no 'rank'"),
                       ({'name': 'neighbour', 'kernel': 1}, 'at least 3')):
        with pytest.raises(PartError, match=word): SUBNETS.build(spec, dim_in=4, dim_out=4)
    for spec, word in (({'name': 'cross_patch', 'context': 'both'}, 'per_task'),
                       ({'name': 'actnorm', 'floor': 0.}, 'floor'), ({'name': 'actnorm', 'eps': 0.}, "takes no 'eps'")):
        with pytest.raises(PartError, match=word): INVERTIBLE.build(spec, dims_in=[(*GRID, DIM)])

# ------------------------------------------------------------------------------------------------------ spectral norms
def test_scoring_between_steps_does_not_change_the_training_of_spectral_layers():
    "Power iteration belongs to training steps alone: a run that is watched ends as one that is not."
    ends = []
    for watched in (False, True):
        layer = SpectralLoRALinear(6, 5, rank=2, vectors=2, generator=torch.Generator().manual_seed(0))
        add_task(layer); use_task(layer, 0)
        opt = torch.optim.AdamW(train_only(layer, [0], shared=True).values(), lr=.05)
        for i in range(5):
            loss = (layer(rand(8, 6, seed=i)) - rand(8, 5, seed=9)).square().mean() + layer(rand(8, 6)).mean()
            opt.zero_grad(); loss.backward(); opt.step()       # two calls in one graph: nothing was overwritten
            if watched:
                with torch.no_grad(): layer(rand(8, 6, seed=i))
                layer.eval()(rand(8, 6)); layer.train()
        ends.append(layer.state_dict())
    for k, v in ends[0].items(): assert torch.equal(v, ends[1][k]), k

def test_spectral_norms_hold_in_a_trained_flow():
    net = SUBNETS.build({'name': 'spectral', 'rank': 2, 'kernel': 3, 'norm': .8}, dim_in=24, dim_out=24,
                        generator=torch.Generator().manual_seed(0))
    add_task(net); use_task(net, 0)
    opt = torch.optim.Adam(train_only(net, [0], shared=True).values(), lr=3e-3)
    x, y = rand(4, *GRID, 24), 10 * rand(4, *GRID, 48, seed=1)
    for _ in range(60):
        opt.zero_grad(); (net(x) - y).square().mean().backward(); opt.step()
    with torch.no_grad():
        layers = [m for m in net.modules() if isinstance(m, SpectralLoRALinear)]
        kept, raw = [[torch.linalg.svdvals(w)[0].item() for w in ws] for ws in
                     ([m.base() for m in layers], [m.weight for m in layers])]
    assert len(layers) == 4 and kept == pytest.approx([.8] * 4, rel=.05) and max(raw) > 1

# --------------------------------------------------------------------------------------------------------- the detector
CLASSES = 'abc'
def stream(n=8):
    x = torch.cat([rand(n, *GRID, 3, seed=i) @ rand(3, 8, seed=100 + i) + rand(8, seed=200 + i)
                   + .3 * rand(n, *GRID, 8, seed=i) for i in range(len(CLASSES))])
    return from_arrays(x, pd.DataFrame({'class': [c for c in CLASSES for _ in range(n)]}))
FEATURES = stream()

def learned(**settings):
    "A detector that has learned all classes, and the scores of the first class after each of them."
    spec = {'name': 'scale_context', 'rank': 2, 'kernel': 3}
    detector = MoLEFlow(**dict(dim=8, grid=GRID, couplings=2, dia_blocks=0, subnet=spec) | settings)
    trainer = Trainer(epochs=3, batch_size=4, lr=.01, schedule={'name': 'epoch_cosine', 'warmup': 1}, progress=False)
    stages = Learner(detector, ROUTERS.build('mahalanobis'), trainer, FEATURES).stages(make_tasks(CLASSES, '1-1'))
    x = FEATURES.where(**{'class': 'a'}).batch(slice(None))
    return detector, x, [detector.score(x, 'a').clone() for _ in stages]

SETTINGS = [{'subnet': s} for s in SPECS] + [
    {'invertible': {'name': 'cross_patch', 'context': c}} for c in ('fixed', 'learned', 'per_task')] + [
    {'invertible': 'coupling_per_task', 'norm': 'actnorm'}, {'norm': 'actnorm', 'couplings': 3, 'separate': True}]

@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_a_detector_learns_three_tasks_forgets_nothing_and_survives_a_file(settings, tmp_path):
    detector, x, scores = learned(**settings)
    assert all(torch.equal(s, scores[0]) for s in scores) and scores[0].isfinite().all()
    detector.save(tmp_path)
    for d in (MoLEFlow.load(tmp_path), copy.deepcopy(detector)): assert torch.equal(d.score(x, 'a'), scores[0])

def test_nothing_of_a_coupling_per_task_is_shared():
    detector = learned(invertible='coupling_per_task', position='none', context='none', align='none')[0]
    assert parameter_counts(detector)['shared'] == 0
    orders = {k: v for k, v in detector.state_dict().items() if k.endswith('order')}
    assert len(orders) == 6 and all(slot_of(k) is not None for k in orders)

def test_actnorms_of_a_flow_start_from_the_data_of_their_task():
    "What every coupling of a new task gets has mean 0 and variance 1, also behind others; old slots stay."
    detector = learned(norm='actnorm')[0]
    new = from_arrays(50 * rand(8, *GRID, 8, seed=77) + 9, pd.DataFrame({'class': ['d'] * 8}))
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    detector.groups['d'] = add_task(detector, 0)
    detector.start('d', new)
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out[0][0].flatten(0, -2)))
             for m in detector.modules() if isinstance(m, ActNorm)]
    detector.score(new.batch(slice(None)), 'd')
    for h in hooks: h.remove()
    assert len(seen) == 2
    for y in seen:
        assert y.mean(0).abs().max() < 1e-4 and (y.std(0, correction=0) - 1).abs().max() < 1e-3
    assert all(torch.equal(v, detector.state_dict()[k]) for k, v in before.items())

def test_an_actnorm_without_variance_stays_finite():
    norm = ActNorm([(*GRID, DIM)])
    add_task(norm); use_task(norm, 0)
    with observing(norm): norm((torch.ones(2, *GRID, DIM),))
    (y,), log_det = norm((torch.full((2, *GRID, DIM), 1.5),))
    assert torch.allclose(y, torch.full_like(y, .5)) and torch.equal(log_det, torch.zeros(2, *GRID))

def test_gate_statistics_tell_every_subnet_in_order():
    detector, x, _ = learned(subnet={'name': 'lora_context', 'rank': 2, 'kernel': 3, 'gate': 'patch'}, couplings=3)
    before, mode = [len(m._forward_pre_hooks) for m in detector.modules()], detector.training
    rows = gate_statistics(detector, x)
    assert [r['subnet'].split('.')[-2:] for r in rows] == [[str(i), 'subnet'] for i in range(3)]
    for r in rows: assert 0 < r['min'] <= r['mean'] <= r['max'] < .2 and r['closed'] == 0 and r['std'] > 0
    assert gate_statistics(detector, x, closed=1.)[0]['closed'] == 1
    assert before == [len(m._forward_pre_hooks) for m in detector.modules()] and mode == detector.training
    assert gate_statistics(learned(subnet={'name': 'lora', 'rank': 2})[0], x) == []

def test_context_of_the_other_half_would_break_the_likelihood():
    "The test that a context of all channels must fail: planted, its log-det is wrong."
    class Whole(CrossPatchCoupling):
        def forward(self, x_or_z, c=None, rev=False, jac=True):
            x1, x2 = x_or_z[0].split(self.split, -1)
            context, subnet = self.subnet
            e = context((x1 + x2))[..., self.split[0]:]
            raw_s, raw_t = subnet(torch.cat([x1, e], -1)).split(self.split[1], -1)
            s = self.clamp * (.1 * raw_s).tanh()
            return (torch.cat([x1, x2 * s.exp() + .1 * raw_t], -1),), s.sum(-1)
    part = far(Whole([(*GRID, DIM)], subnet={'name': 'lora', 'rank': 2}, context='fixed'))
    x = rand(1, *GRID, DIM, seed=9, dtype=torch.float64)
    assert abs(part((x,))[1].sum() - jacobian(part, x)) > .01

# ------------------------------------------------------------------------------------------------- depth, on real parts
def textures(task, seed, n, dim=16):
    "16 channels with 4 directions of texture and noise of .01; directions and mean are the task's."
    g = torch.Generator().manual_seed(1000 * task)
    A, mean = torch.randn(dim, 4, generator=g) / 2, torch.randn(dim, generator=g)
    g.manual_seed(seed)
    x = mean + torch.tanh(1.5 * torch.randn(n, 2, 2, 4, generator=g) @ A.T)
    return x + .01 * torch.randn(x.shape, generator=g)

def second_task(couplings, norm):
    "Held-out negative log-likelihood of a second task on a frozen base, before and after a hundred steps."
    detector = MoLEFlow(dim=16, grid=(2, 2), position='none', align='none', context='none', couplings=couplings,
                        dia_blocks=0, norm=norm, loss={'nll': {}},
                        subnet={'name': 'lora', 'rank': 16, 'alpha': .25, 'hidden': 128})
    for task, steps in ((0, 600), (1, 100)):
        group = str(task)
        detector.groups[group] = add_task(detector, 0)
        detector.start(group, from_arrays(textures(task, 10**5, 64), pd.DataFrame({'class': [group] * 64})))
        train = list(train_only(detector, [task], shared=task == 0).values())
        opt = torch.optim.AdamW(train, lr=5e-3)
        def held(): return detector.score(textures(task, 10**6, 256), group).mean().item()
        before = held()
        for i in range(steps):
            opt.param_groups[0]['lr'] = 5e-3 * (1 + math.cos(math.pi * i / steps)) / 2
            loss, _ = detector.loss(textures(task, i, 16), group)
            opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(train, .5); opt.step()
    return before, held()

@pytest.mark.skipif('ADFLOW_DEEP' not in os.environ, reason='minutes of training: ADFLOW_DEEP=1 runs it')
def test_deep_stacks_learn_a_second_task_with_actnorm_and_blow_up_without():
    shallow = second_task(4, 'none')
    deep, deep_normed = second_task(16, 'none'), second_task(16, 'actnorm')
    assert deep[0] > 1e6 and deep[0] > 1e3 * shallow[0]                  # nats per patch
    assert deep_normed[0] < shallow[0] and deep_normed[1] < min(shallow[1], deep[1])
    assert second_task(12, 'actnorm')[1] < shallow[1]
