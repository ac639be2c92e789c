"""Dinomaly through the learner, with every mixer and token dropout; and number by number beside anomalib's"""
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from adflow.attention.dropout import TOKEN_DROPOUTS
from adflow.attention.mixers import MIXERS
from adflow.continual.learner import Learner, Trainer
from adflow.continual.optimizers import OPTIMIZERS, SCHEDULES
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.dinomaly.losses import RECONSTRUCTION, GlobalCosine
from adflow.dinomaly.model import Dinomaly
from adflow.dinomaly.network import MLP, Reconstructor
from adflow.evaluate.stages import StageEvaluator
from adflow.features.store import from_arrays
from adflow.parts import DETECTORS, PartError, add_task, use_task
from adflow.workbook.params import load

D, GRID, S = 8, (4, 6), 3
SMALL = dict(layers=[D, D], depth=2, heads=2, dropout=.2)
TRAINER = dict(epochs=3, batch_size=4, lr=3e-3, optimizer='stable_adamw', schedule='cosine', clip=.1, progress=False)

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def stream(n=8, classes='ab', special=False):
    basis = [rand(3, 2 * D, seed=50 + i) for i in range(len(classes))]
    x = torch.cat([rand(n, *GRID, 3, seed=i) @ b + .1 * rand(n, *GRID, 2 * D, seed=20 + i)
                   for i, b in enumerate(basis)])
    index = pd.DataFrame({'class': [c for c in classes for _ in range(n)]})
    return from_arrays(x, index, special=rand(len(x), S, 2 * D, seed=9) if special else None)

def learner(features, folder=None, trainer=None, **settings):
    detector = Dinomaly(2 * D, GRID, special=features.special, **SMALL | settings)
    return Learner(detector, ROUTERS.build('mahalanobis'), Trainer(**TRAINER | (trainer or {})), features, folder)

def tensors(detector): return {k: v.detach().clone() for k, v in detector.state_dict().items()}

# ------------------------------------------------------------------------------------------------- one model for all
def test_one_model_mixes_classes_in_a_batch_and_learns():
    made, seen = learner(stream(), trainer=dict(epochs=60)), set()
    loss = made.detector.loss
    def spy(x, group, **state):
        seen.add(group)
        return loss(x, group, **state)
    made.detector.loss = spy
    stage, = made.stages(make_tasks('ab', 'joint'))
    assert seen == {'all'} and stage.detector.groups == {'all': 0}
    assert stage.history[-1]['loss'] < .5 * stage.history[0]['loss'], stage.history
    x = made.features.batch([0, 1])
    spoiled = x.clone()
    spoiled[:, 2, 3] = rand(2, 2 * D, seed=77)
    maps = stage.detector.score(spoiled, 'all')
    assert (maps.flatten(1).argmax(1) == 2 * GRID[1] + 3).all()

def test_strategies_mean_what_they_say():
    "freeze: the second task changes nothing; finetune: everything; separate: each class its own, and the first stays."
    for strategy in ('freeze', 'finetune'):
        made = learner(stream(), trainer=dict(strategy=strategy))
        if strategy == 'freeze':
            with pytest.warns(UserWarning, match='nothing learns'):
                first, second = [tensors(s.detector) for s in made.stages(make_tasks('ab', '1-1'))]
            assert all(torch.equal(first[k], second[k]) for k in first)
        else:
            first, second = [tensors(s.detector) for s in made.stages(make_tasks('ab', '1-1'))]
            assert all(not torch.equal(first[k], second[k]) for k, p in made.detector.named_parameters())
    made = learner(stream(), trainer=dict(strategy='separate'))
    first, second = [tensors(s.detector) for s in made.stages(make_tasks('ab', '1-1'))]
    assert made.detector.groups == {'a': 0, 'b': 1} and set(first) < set(second)
    assert all(torch.equal(first[k], second[k]) for k in first)

class Killed(Exception): pass

def run(folder, kill=None, **settings):
    "All stages and how many checkpoints were written; stops like a kill after some."
    made, count = learner(stream(), folder, dict(checkpoint_seconds=-1), **settings), [0]
    write = made.checkpoint.write
    def counting(*args):
        write(*args)
        count[0] += 1
        if count[0] == kill: raise Killed
    made.checkpoint.write = counting
    try: return list(made.stages(make_tasks('ab', 'joint')))[-1], count[0]
    except Killed: return None, count[0]

@pytest.mark.parametrize('settings', [
    {}, {'normalize': 'channel', 'mixer': {'name': 'biased', 'beta': .8, 'ramp': 'linear'}},
    {'token_dropout': {'name': 'directional', 'rate': .3, 'ramp': 'cosine'}, 'drop_at': 'blocks',
     'reconstruction': {'directional_tail': {'select': {'name': 'directional', 'warmup': 5}}}},
    {'reconstruction': {'global_cosine': {'select': {'name': 'random', 'warmup': 3}}}}],
    ids=['plain', 'biased', 'drop', 'random'])
def test_a_killed_run_ends_with_the_same_bits(settings, tmp_path):
    whole, n = run(tmp_path / 'whole', **settings)
    for kill in (1, 5, n - 1):
        assert run(tmp_path / str(kill), kill, **settings)[0] is None
        torch.rand(7)                                       # the global stream is nobody's
        again, _ = run(tmp_path / str(kill), **settings)
        assert again.digests == whole.digests and again.history == whole.history, kill
    x = stream().batch([0, 9])
    whole.detector.save(tmp_path / 'saved')
    loaded = Dinomaly.load(tmp_path / 'saved').eval()
    assert torch.equal(loaded.score(x, 'all'), whole.detector.score(x, 'all'))

def test_special_tokens_go_through_learner_evaluator_and_router():
    features = stream(special=True)
    for settings in ({'specials': True}, {'specials': True, 'recenter': 'cls'}, {'specials': False}):
        made = learner(features, **settings)
        stage, = made.stages(make_tasks('ab', 'joint'))
        x = features.tokens([0]) if settings['specials'] else features.batch([0])
        assert x.shape == ((1, S + 24, 2 * D) if settings['specials'] else (1, *GRID, 2 * D))
        assert stage.detector.score(x, 'all').shape == (1, *GRID)
    with pytest.raises(PartError, match='CLS'): learner(stream(), specials=True)

def test_a_stage_of_dinomaly_is_evaluated_as_any_other():
    x, mask = stream(12), torch.zeros(24, *GRID, dtype=torch.bool)
    for i in (8, 9, 10, 20, 21): mask[i, i % 4, i % 6] = True
    data = torch.where(mask[..., None], rand(24, *GRID, 2 * D, seed=4) * 2, x.batch(range(24)))
    index = x.index.assign(split=['train'] * 8 + ['test'] * 4 + ['train'] * 8 + ['test'] * 4,
                           label=mask.flatten(1).any(1).long().numpy())
    features = from_arrays(data, index, masks=mask.numpy())
    made = learner(features, trainer=dict(epochs=40))
    stage, = made.stages(make_tasks('ab', 'joint'))
    rows = StageEvaluator(features, 'max', 'none', progress=False)(stage)
    assert (rows['pixel_auroc'] > .9).all() and set(rows['class']) == {'a', 'b'}, rows

# ------------------------------------------------------------------------------------------ every mixer and dropout
ABLATION = sorted((Path(__file__).parents[1] / 'params/dinomaly').glob('**/*.yaml'))

@pytest.mark.parametrize('file', ABLATION, ids=[f'{f.parent.name}-{f.stem}' for f in ABLATION])
def test_every_parameter_file_builds_and_learns(file):
    "On a small grid of tokens, with the parts that the file names."
    values = load(file).values
    args = {k: values[k] for k in DETECTORS.arguments('dinomaly') if k in values}
    house = dict(dim=16, grid=(9, 8), layers=[8, 8], special=5 if args['specials'] else 0)
    d, g = DETECTORS.build({'name': 'dinomaly', **args, 'depth': 4}, **house), torch.Generator()
    d.groups['all'] = add_task(d)
    x = rand(3, 5 + 72, 16) if args['specials'] else rand(3, 9, 8, 16)
    opt = OPTIMIZERS.build(values['optimizer'], params=d.parameters(), lr=3e-3)
    d.train()
    for i in range(12):
        loss, _ = d.loss(x, 'all', generator=g.manual_seed(i), step=i, progress=i / 12)
        opt.zero_grad()
        loss.backward()
        opt.step()
    d.eval()
    en, de = d.net(x)
    again = sum((1 - torch.cosine_similarity(e, y, dim=-1)).mean() for e, y in zip(en, de)) / 2
    assert again < .95 and torch.isfinite(d.score(x, 'all')).all()

@pytest.mark.parametrize('mixer', list(MIXERS))
def test_every_mixer_learns_and_comes_back_from_a_file(mixer, tmp_path):
    spec = {'name': mixer, **({'size': 3} if mixer == 'neighbour' else {})}     # the grid is small
    d, x = Dinomaly(2 * D, GRID, mixer=spec, **SMALL), stream().batch(range(8))
    d.groups['all'] = add_task(d)
    use_task(d, 0)
    opt, losses = torch.optim.AdamW(d.parameters(), 3e-3), []
    d.train()
    for i in range(30):
        loss, _ = d.loss(x, 'all', generator=torch.Generator().manual_seed(i), step=i, progress=i / 30)
        opt.zero_grad()
        loss.backward()
        dead = [k for k, p in d.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not dead
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < .9 * losses[0]
    d.eval()
    d.save(tmp_path)
    assert torch.allclose(Dinomaly.load(tmp_path).eval().score(x, 'all'), d.score(x, 'all'), atol=1e-6)

@pytest.mark.parametrize('name', list(TOKEN_DROPOUTS))
@pytest.mark.parametrize('drop_at', ['input', 'bottleneck', 'blocks'])
def test_token_dropout_acts_in_training_only(name, drop_at):
    d, x = Dinomaly(2 * D, GRID, token_dropout=name, drop_at=drop_at, **SMALL | {'dropout': 0.}), stream().batch([0, 1])
    d.groups['all'] = add_task(d)
    plain = Dinomaly(2 * D, GRID, **SMALL | {'dropout': 0.}).eval()
    plain.groups['all'] = add_task(plain)
    assert torch.equal(d.eval().score(x, 'all'), plain.score(x, 'all'))
    with torch.no_grad():
        losses = [d.train().loss(x, 'all', generator=torch.Generator().manual_seed(i))[0] for i in range(4)]
        same = d.train().loss(x, 'all', generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(same, losses[0]) and (len({v.item() for v in losses}) > 1) == (name != 'none')

@pytest.mark.parametrize('name', list(RECONSTRUCTION))
def test_every_loss_learns(name):
    made = learner(stream(), trainer=dict(epochs=20, clip=1.), reconstruction={name: {}})
    stage, = made.stages(make_tasks('ab', 'joint'))
    clean = made.features.batch(range(16))
    untrained = learner(stream()).detector
    untrained.groups['all'] = add_task(untrained)
    assert stage.detector.score(clean, 'all').mean() < .8 * untrained.eval().score(clean, 'all').mean()

# --------------------------------------------------------------------------------------------------- beside anomalib
THEIRS = '''
import sys, torch
from functools import partial
from torch import nn
from safetensors.torch import save_file
from anomalib.models.image.dinomaly import torch_model as m
from anomalib.models.image.dinomaly.components import CosineHardMiningLoss, StableAdamW, WarmCosineScheduler
from anomalib.models.image.dinomaly.components.layers import DinomalyMLP, LinearAttention
torch.manual_seed(0)
B, D, GRID, out = 3, 32, (4, 6), {}
class Encoder(nn.Module):
    patch_size, num_register_tokens = 14, 4
    def forward(self, x): return self.given
model = m.DinomalyModel.__new__(m.DinomalyModel)
nn.Module.__init__(model)
model.encoder, model.target_layers = Encoder(), list(range(8))
model.encoder.given = {f'blocks.{i}': torch.randn(B, 5 + 24, D) for i in range(8)}
model.fuse_layer_encoder = model.fuse_layer_decoder = [[0, 1, 2, 3], [4, 5, 6, 7]]
model.bottleneck = nn.ModuleList([DinomalyMLP(D, 4 * D, D, act_layer=nn.GELU, drop=.2, bias=False,
                                              apply_input_dropout=True)])
model.decoder = nn.ModuleList([m.DecoderViTBlock(dim=D, num_heads=4, mlp_ratio=4., qkv_bias=True,
    norm_layer=partial(nn.LayerNorm, eps=1e-8), attn_drop=0., attn=LinearAttention) for _ in range(8)])
model.remove_class_token = False
model.eval()
for recenter in (False, True):
    model.use_context_recentering = recenter
    with torch.no_grad(): en, de = model.get_encoder_decoder_outputs(torch.zeros(B, 3, 56, 84))
    maps = m.DinomalyModel.calculate_anomaly_maps(en, de, out_size=(56, 84))[0]
    for g in range(2): out[f'en{g}{recenter}'], out[f'de{g}{recenter}'] = en[g].contiguous(), de[g].contiguous()
    out[f'maps{recenter}'] = maps.contiguous()
for i in range(8): out[f'layer{i}'] = model.encoder.given[f'blocks.{i}']
out.update({'model.' + k: v for k, v in model.state_dict().items()})
loss = CosineHardMiningLoss()
en, de = [torch.randn(B, D, *GRID) for _ in range(2)], [torch.randn(B, D, *GRID) for _ in range(2)]
for g in range(2): out[f'le{g}'], out[f'ld{g}'] = en[g], de[g]
for step in (0, 300, 5000):
    leaves = [d.clone().requires_grad_() for d in de]
    value = loss(en, [d * 1. for d in leaves], global_step=step)
    value.backward()
    out[f'loss{step}'] = value.detach()
    for g in range(2): out[f'grad{g}{step}'] = leaves[g].grad
p = nn.Parameter(torch.randn(6, 5))
out['p'] = p.detach().clone()
opt = StableAdamW([p], lr=2e-3, betas=(.9, .999), weight_decay=1e-4, amsgrad=True, eps=1e-10)
schedule = WarmCosineScheduler(opt, 2e-3, 2e-4, 50, warmup_iters=5)
path, grads, rates = [], torch.randn(50, 6, 5) * torch.logspace(-2, 2, 50)[:, None, None], []
for g in grads:
    rates.append(opt.param_groups[0]['lr'])
    p.grad = g.clone(); opt.step(); schedule.step(); path.append(p.detach().clone())
out |= dict(path=torch.stack(path), grads=grads, rates=torch.tensor(rates, dtype=torch.float64))
save_file({k: v.contiguous().clone() for k, v in out.items()}, sys.argv[1])
'''

@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    python = os.environ.get('ADFLOW_ANOMALIB')
    if not python: pytest.skip('ADFLOW_ANOMALIB does not name the Python of an environment with anomalib')
    path = tmp_path_factory.mktemp('anomalib') / 'out.safetensors'
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    p = subprocess.run([python, '-c', THEIRS, str(path)], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    return load_file(path)

@pytest.mark.parametrize('recenter', [False, True])
def test_the_network_agrees_with_anomalibs_on_copied_weights(theirs, recenter):
    net = Reconstructor(width=32, n_layers=8, grid=GRID, specials=5, depth=8, heads=4, mlp_ratio=4., groups=2,
                        dropout=.2, mixer='linear', token_dropout='none', drop_at='input',
                        recenter='cls' if recenter else 'none',
                        mlp_bias=True, seed=0).eval()
    ours = net.state_dict()
    name = {'bottleneck.0.': 'bottleneck.', 'decoder.': 'blocks.', '.attn.': '.mixer.'}
    copied = {}
    for k, v in theirs.items():
        if not k.startswith('model.'): continue
        k = k.removeprefix('model.')
        for a, b in name.items(): k = k.replace(a, b)
        copied[k] = v
    missing = set(ours) - set(copied)
    assert set(copied) <= set(ours) and all('bias' in k for k in missing)      # theirs leaves some biases out: zero
    net.load_state_dict(copied | {k: torch.zeros_like(ours[k]) for k in missing})
    with torch.no_grad(): en, de = net([theirs[f'layer{i}'] for i in range(8)])
    for g in range(2):
        for mine, key in ((en[g], 'en'), (de[g], 'de')):
            assert torch.allclose(mine.permute(0, 3, 1, 2), theirs[f'{key}{g}{recenter}'], atol=2e-5), (key, g)
    maps = torch.stack([1 - torch.cosine_similarity(e, d, dim=-1) for e, d in zip(en, de)]).mean(0)
    big = torch.nn.functional.interpolate(maps[:, None], (56, 84), mode='bilinear', align_corners=True)
    assert torch.allclose(big, theirs[f'maps{recenter}'], atol=1e-5)           # the mean may come before the upsampling

def test_loss_and_hooked_gradient_agree_with_anomalibs(theirs):
    turn = lambda x: x.permute(0, 2, 3, 1)
    for step in (0, 300, 5000):
        leaves = [turn(theirs[f'ld{g}']).clone().requires_grad_() for g in range(2)]
        value = GlobalCosine()([turn(theirs[f'le{g}']) for g in range(2)], [d * 1. for d in leaves], step=step)
        value.backward()
        assert torch.allclose(value, theirs[f'loss{step}'], atol=1e-6)
        for g in range(2): assert torch.allclose(leaves[g].grad, turn(theirs[f'grad{g}{step}']), atol=1e-8)

def test_optimizer_and_schedule_agree_with_anomalibs(theirs):
    p = torch.nn.Parameter(theirs['p'].clone())
    opt, schedule = OPTIMIZERS.build('stable_adamw', params=[p], lr=2e-3), SCHEDULES.build('cosine')
    for i, g in enumerate(theirs['grads']):
        opt.param_groups[0]['lr'] = rate = 2e-3 * schedule(i, 50)
        assert abs(rate - theirs['rates'][i].item()) < 1e-12
        p.grad = g.clone()
        opt.step()
        assert torch.allclose(p, theirs['path'][i], rtol=1e-5, atol=1e-7), i

def test_the_noisy_bottleneck_drops_in_three_places():
    "p of the inputs, of the hidden and of the outputs; the decoder's MLP none."
    ones, noisy = torch.ones(64, 64, 32), MLP(32, 4., .2, noisy_input=True)
    seen = {}
    noisy.fc1.register_forward_pre_hook(lambda m, x: seen.update(input=x[0]))
    noisy.fc2.register_forward_pre_hook(lambda m, x: seen.update(hidden=x[0]))
    seen['output'] = noisy(ones)
    for k, v in seen.items(): assert abs((v == 0).float().mean().item() - .2) < .02, k
    assert torch.equal(seen['input'].unique(), torch.tensor([0., 1.25]))
