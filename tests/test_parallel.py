"""Later tasks trained at once: the same as one after the other, for every part of a flow; elsewhere, to the bit"""
import json
import math
import warnings

import pandas as pd
import pytest
import torch
from safetensors.torch import load

import adflow.continual.batched  # noqa: F401  registers its part
from adflow.continual.learner import Learner
from adflow.continual.parallel import PARALLEL, Elsewhere, changed, shared_tensors, train_alone
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.continual.trainer import Trainer
from adflow.dinomaly.model import Dinomaly
from adflow.features.store import FeatureSet, from_arrays
from adflow.flow.moleflow import MoLEFlow
from adflow.parts import PartError, TaskModule, slot_of

warnings.filterwarnings('ignore', message='The prototype of')
D, GRID, SIZES = 12, (6, 6), {'a': 8, 'b': 12, 'c': 9, 'd': 3, 'e': 6, 'f': 4}
TASKS, SINGLE = make_tasks('abcdef', '1-2'), make_tasks('abcd', '1-1')      # a, b+c, d+e, f; adapters per class or task

def stream():
    g, xs = torch.Generator().manual_seed(0), []
    for n in SIZES.values():
        mix, shift = torch.randn(4, D, generator=g), torch.randn(D, generator=g)
        xs.append(torch.randn(n, *GRID, 4, generator=g) @ mix + shift + .3 * torch.randn(n, *GRID, D, generator=g))
    return from_arrays(torch.cat(xs), pd.DataFrame({'class': [c for c, n in SIZES.items() for _ in range(n)]}))

FEATURES = stream()

def learner(parallel='none', folder=None, detector=MoLEFlow, trainer=None, **args):
    if detector is MoLEFlow:
        args = dict(couplings=1, dia_blocks=1, subnet={'name': 'scale_context', 'rank': 2, 'kernel': 3}) | args
    made = Trainer(**dict(epochs=3, batch_size=4, lr=3e-3, progress=False, checkpoint_seconds=-1) | (trainer or {}))
    return Learner(detector(D, GRID, **args), ROUTERS.build('oracle'), made, FEATURES, folder,
                   parallel=PARALLEL.build(parallel))

def learned(parallel, tasks=TASKS, **kw): return list(learner(parallel, **kw).stages(tasks))

def apart(a, b, tasks):
    "Relative differences of later tasks' weights, of score maps (patch by patch, of their mean size), of losses."
    x, y = a[-1].detector, b[-1].detector
    u, v = (torch.cat([p.detach().double().flatten() for k, p in d.named_parameters() if slot_of(k)]) for d in (x, y))
    of = [(c, x.group_of(t.name, c)) for t in tasks[1:] for c in t.classes]
    m, n = (torch.cat([d.score(FEATURES.where(**{'class': c}).batch(slice(None)), g) for c, g in of]) for d in (x, y))
    losses = [abs(p['loss'] - q['loss']) / abs(p['loss']) for p, q in zip(a[-1].history, b[-1].history)]
    return ((u - v).norm() / u.norm()).item(), ((m - n).abs().max() / m.abs().mean()).item(), max(losses)

SCALE = {'name': 'scale_context', 'rank': 2, 'kernel': 3}
FLOWS = {
    'default': {}, 'per task': dict(adapters='task'), 'actnorm': dict(norm='actnorm', couplings=2),
    'global affine': dict(global_affine=True), 'no dia': dict(dia_blocks=0), 'dia alone': dict(couplings=0),
    **{f'align {k}': dict(align=k) for k in ('none', 'whitening_no_ln', 'film', 'soft_ln', 'instance_norm_mlp', 'pca')},
    **{f'context {k}': dict(context=k) for k in ('none', 'task_adaptive', 'global_regions')},
    'context task_multi_scale': dict(context={'name': 'task_multi_scale', 'rank': 2}, align='film'),
    'subnet lora': dict(subnet={'name': 'lora', 'rank': 2}), 'subnet linear': dict(subnet='linear'),
    'subnet spectral': dict(subnet={'name': 'spectral', 'rank': 2}),
    'subnet spatial': dict(subnet={'name': 'spatial_lora', 'rank': 2, 'cells': 2}),
    'subnet neighbour': dict(subnet={'name': 'neighbour', 'rank': 2}),
    'gate per patch': dict(subnet=SCALE | {'gate': 'patch'}),
    'cross_patch per task': dict(invertible={'name': 'cross_patch', 'context': 'per_task'},
                                 subnet={'name': 'lora', 'rank': 2}),
    'coupling_per_task': dict(invertible='coupling_per_task'),
    'losses': dict(loss={'nll': {}, 'tail': [.1, .9], 'logdet': {}, 'identity': {'on': 'all'}, 'center': {}}),
    'adaptive losses': dict(loss={'nll': {}, 'adaptive_tail': {}, 'adaptive_logdet': {}}),
    'focal': dict(loss={'focal': {}}),
    'branches': dict(branches='improved_dual_branch'),
}

# --------------------------------------------------------------------------------------------------------- the bar
class Bar:
    "Notes what a bar of tqdm is told, and when."
    def __init__(self, total=0, **_): self.total, self.n, self.losses = total, 0, {}
    def update(self, n=1): self.n += n
    def set_postfix(self, loss, refresh): self.losses[self.n] = loss
    def close(self): pass

@pytest.mark.parametrize('parallel, waits', [('none', False), ('none', True), ('batched', None)])
def test_the_loss_arrives_at_the_bar(monkeypatch, parallel, waits):
    """Every step's on a CPU; the last one of each epoch where nothing waits for the device; of tasks trained together,
    the mean of an epoch's means."""
    made = []
    for where in ('trainer', 'batched'):
        monkeypatch.setattr(f'adflow.continual.{where}.tqdm', lambda **kw: made.append(Bar(**kw)) or made[-1])
    one = learner(parallel, trainer={'progress': True})
    one.trainer.waits = waits
    history = list(one.stages(SINGLE))[-1].history
    losses = {t.name: [h['loss'] for h in history if h['task'] == t.name] for t in SINGLE}
    assert all(b.n == b.total for b in made) and len(made) == (4 if parallel == 'none' else 2)
    assert [b.total for b in made[:1]] == [3 * 2]              # three epochs of two batches of task a
    if parallel == 'none':
        for b, told in zip(made, losses.values()):
            steps = b.total // 3
            at = [steps * (e + 1) for e in range(3)]
            if steps == 1: assert list(b.losses.values())[-1] == f'{told[-1]:.1f}'
            if waits: assert list(b.losses) == at
            else:
                assert set(range(b.total)) <= set(b.losses)
                means = [sum(float(b.losses[i]) for i in range(n - steps, n)) / steps for n in at]
                assert means == pytest.approx(told, abs=.06)
    else:
        last = [told[-1] for name, told in losses.items() if name != SINGLE[0].name]
        assert len(last) == 3 and list(made[1].losses.values())[-1] == f'{sum(last) / 3:.1f}'

# ------------------------------------------------------------------------------------------------------------ batched
@pytest.mark.parametrize('name', FLOWS)
def test_batched_equals_one_after_the_other(name):
    "Groups of 3 to 12 images, so batches of 3 and 4; one to three steps an epoch; two groups in a task."
    one, all_ = (learned(p, trainer={'epochs': 2}, **FLOWS[name]) for p in ('none', 'batched'))
    assert max(apart(one, all_, TASKS)) < 1e-5
    assert [(r['task'], r['epoch'], r['lr'], sorted(r)) for r in one[-1].history] == \
           [(r['task'], r['epoch'], r['lr'], sorted(r)) for r in all_[-1].history]
    assert one[0].digests == all_[0].digests
    for a, b in zip(all_, all_[1:]): assert {k: b.digests[k] for k in a.digests} == a.digests

def test_a_loss_that_differs_between_steps_and_tasks_trains_something():
    "The comparison above is worth something: without the steps of the later tasks, and with other seeds, it fails."
    one, other = learned('none'), learned('none', trainer={'seed': 1})
    still = learned('none', trainer={'lr': 1e-9})
    assert min(max(apart(one, v, TASKS)) for v in (other, still)) > 1e-3

@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', {'name': 'adamp', 'weight_decay': .1}, 'stable_adamw', 'lion',
                                       'nadamw', 'radam'], ids=str)
def test_every_optimizer_over_a_longer_training(optimizer):
    lr = 1e-5 if optimizer in ('sgd', 'lion') else 3e-3
    one, all_ = (learned(p, trainer=dict(epochs=12, optimizer=optimizer, lr=lr)) for p in ('none', 'batched'))
    assert max(apart(one, all_, TASKS)) < 1e-5

@pytest.mark.parametrize('how', [dict(steps=7), dict(schedule={'name': 'cosine', 'warmup': 2}), dict(clip=0),
                                 dict(batch_size=16)], ids=str)
def test_steps_schedules_and_clipping_are_each_task_s_own(how):
    one, all_ = (learned(p, trainer=how) for p in ('none', 'batched'))
    assert max(apart(one, all_, TASKS)) < 1e-5 and len(one[-1].history) == len(all_[-1].history)

def test_double_precision_leaves_no_doubt(monkeypatch):
    batch = FeatureSet.batch
    monkeypatch.setattr(FeatureSet, 'batch', lambda self, rows: batch(self, rows).double())
    torch.set_default_dtype(torch.float64)
    try:
        for args, epochs in (({}, 12), ({'invertible': 'coupling_per_task'}, 2)):
            one, all_ = (learned(p, trainer={'epochs': epochs}, **args) for p in ('none', 'batched'))
            weights, _, losses = apart(one, all_, TASKS)             # maps are float32
            assert weights < 1e-11 and losses < 1e-11
    finally: torch.set_default_dtype(torch.float32)

def test_separate_flows_and_their_permutations():
    "Every slot owns W and the order of channels; a spectral norm also counts on in a buffer, which is refused."
    one, all_ = (learned(p, SINGLE, trainer={'strategy': 'separate'}) for p in ('none', 'batched'))
    assert max(apart(one, all_, SINGLE)) < 1e-5
    made = learner('batched', trainer={'strategy': 'separate'}, subnet={'name': 'spectral', 'rank': 2})
    with pytest.raises(PartError, match='changes while the loss is computed'): next(made.stages(SINGLE))

@pytest.mark.parametrize('tasks', [1, 2, 3])
def test_the_size_of_a_batch_of_tasks_does_not_matter(tasks):
    one, all_ = learned('none'), learned({'name': 'batched', 'tasks': tasks})
    assert max(apart(one, all_, TASKS)) < 1e-5

class Here(Elsewhere):
    "What goes through processes, in this one."
    def train(self, learner, tasks, parts):
        for t, job in zip(tasks, self.jobs(learner, tasks, parts)):
            tensors, rows = train_alone(*job)
            yield t, load(tensors), rows

def test_dinomaly():
    "Its schedules are numbers of the host and its dropout draws: not batched. Elsewhere it is the same, with draws."
    small = dict(detector=Dinomaly, models='class', depth=1, heads=2, groups=1,
                 trainer=dict(epochs=2, optimizer='stable_adamw'))
    with pytest.raises(PartError, match='batched: the loss of Dinomaly cannot be computed for several tasks at once'):
        next(learner('batched', **small).stages(SINGLE))
    with pytest.raises(PartError, match="tasks a and b train the same weights, those of 'all'"):
        next(learner('batched', **small | {'models': 'all'}).stages(SINGLE))
    made = learner('none', **small)
    made.parallel = Here()
    one, there = learned('none', SINGLE, **small), list(made.stages(SINGLE))
    assert [s.digests for s in one] == [s.digests for s in there] and one[-1].history == there[-1].history

def test_a_nan_is_named_and_reaches_no_checkpoint(tmp_path, monkeypatch):
    x = FEATURES.parts[0]['features'].clone()
    x[[c for c in ''.join(c * n for c, n in SIZES.items())].index('f') + 1] = math.nan
    monkeypatch.setitem(FEATURES.parts[0], 'features', x)
    going = learner('batched', tmp_path).stages(TASKS)
    next(going)
    with pytest.raises(FloatingPointError, match='The loss became nan in task f, epoch 0, step 0'): next(going)
    assert not (tmp_path / 'ahead').exists()

def test_what_a_loss_writes_is_not_lost_silently(monkeypatch):
    "A part that counts in a buffer of its slot while it is trained would count in the stack, which is thrown away."
    class Counting(TaskModule):
        def task_weights(self, first, generator):
            own = torch.nn.Module(); own.register_buffer('count', torch.zeros(1))
            return own
        def forward(self, x): self.own.count.add_(1.); return x
    made = learner('batched')
    made.detector.flows[0].position = Counting()
    with pytest.raises(PartError, match=r'position.tasks.\*.count changes while the loss is computed'):
        next(made.stages(TASKS))

# --------------------------------------------------------------------------------------------------------- elsewhere
@pytest.mark.slow
@pytest.mark.parametrize('parallel', [{'name': 'processes', 'workers': 2}, 'ray'], ids=['processes', 'ray'])
def test_elsewhere_is_the_same_to_the_bit(parallel, tmp_path, monkeypatch):
    "Adapters per class and whitening from data; one of the tasks is there already, after a kill."
    if parallel == 'ray':
        pytest.importorskip('ray', reason="ray is not installed: pip install 'adflow[ray]'")
        monkeypatch.setenv('RAY_raylet_start_wait_time_s', '180')           # a busy machine
    args = dict(align='pca', norm='actnorm')
    truth, made = learned('none', **args), learner(parallel, tmp_path, **args)
    going = made.stages(TASKS)
    next(going)
    base, kept = shared_tensors(made.detector), []
    part = type(made.parallel)
    train = part.train
    def one_only(self, *a):
        for t, *rest in train(self, *a):
            yield t, *rest
            kept.append(t.index)
            raise KeyboardInterrupt                                         # the others are lost
    monkeypatch.setattr(part, 'train', one_only)
    with pytest.raises(KeyboardInterrupt): next(going)
    assert changed(base, made.detector) is None and len(list((tmp_path / 'ahead').glob('*.safetensors'))) == 1
    def rest_only(self, l, tasks, parts):
        assert [t.index for t in tasks] == [i for i in (1, 2, 3) if i not in kept]
        return train(self, l, tasks, parts)
    monkeypatch.setattr(part, 'train', rest_only)
    stages = learned(parallel, folder=tmp_path, **args)
    assert stages[-1].digests == truth[-1].digests and stages[-1].history == truth[-1].history
    assert [s.restored for s in stages] == [True, False, False, False] and not (tmp_path / 'ahead').exists()

def test_ray_that_is_not_there(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'ray', None)
    with pytest.raises(PartError, match=r"pip install 'adflow\[ray\]'"): PARALLEL.build('ray')

@pytest.mark.slow
def test_what_fails_elsewhere_says_what_it_said_there():
    made = learner({'name': 'processes', 'workers': 1}, trainer={'lr': 1e30, 'clip': 0})
    going = made.stages(TASKS)
    with pytest.raises(FloatingPointError, match='in task a, epoch'): next(going)
    made = learner({'name': 'processes', 'workers': 1})
    going = made.stages(TASKS)
    next(going)
    made.trainer.lr, made.trainer.clip = 1e30, 0
    with pytest.raises(FloatingPointError, match='The loss became .* in task'): next(going)

def test_files_of_other_settings_are_left_aside(tmp_path):
    made = learner('batched', tmp_path)
    going = made.stages(TASKS)
    next(going), next(going)
    names = sorted(p.name for p in (tmp_path / 'ahead').iterdir())
    assert names == [f'task-{i}.safetensors' for i in (1, 2, 3)]
    state = json.loads((tmp_path / (tmp_path / 'current').read_text() / 'state.json').read_text())
    assert state['task'] == 2
    with pytest.raises(PartError, match='with other trainer'):
        next(learner('batched', tmp_path, trainer={'lr': 1e-3}).stages(TASKS))
    truth = learned('batched')
    assert learned('batched', folder=tmp_path)[-1].digests == truth[-1].digests
