"""Adapters and flow parts: what must hold for every registered part, and parity of the whole flow with references"""
import copy
import importlib
import math
import pkgutil

import FrEIA.modules as Fm
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import adflow
from adflow.flow.coupling import CouplingBlock, DIAFlow, PerPatch
from adflow.flow.losses import build_losses, patch_nll
from adflow.parts import REGISTRIES, TaskModule, add_task, observing, slot_of, train_only, use_task

for m in pkgutil.walk_packages(adflow.__path__, 'adflow.'):    # what is written later registers itself and is tested
    if not m.name.startswith(('adflow.workbook', 'adflow.cli')): importlib.import_module(m.name)

# ----------------------------------------------------------------------------------------------- every registered part
DIM, GRID = 8, (6, 5)
HOUSES = {  # what the house gives to a part of a kind, and the channels of the features it gets
    'features': (lambda: dict(dim=DIM, grid=GRID, generator=torch.Generator().manual_seed(0)), DIM),
    'subnet': (lambda: dict(dim_in=DIM // 2, dim_out=DIM // 2, generator=torch.Generator().manual_seed(0)), DIM // 2),
    'invertible': (lambda: dict(dims_in=[(*GRID, DIM)], subnet={'name': 'scale_context', 'rank': 2, 'kernel': 3},
                                generator=torch.Generator().manual_seed(0)), DIM)}
ARGUMENTS = {'coupling': [{}, {'global_affine': True}],        # what shall be tested instead of the defaults
             'lora': [{'rank': 2}, {'rank': 0}, {'rank': 2, 'first_task': False}],
             'scale_context': [{'rank': 2, 'kernel': 3}],
             'lora_context': [{'rank': 2, 'kernel': 3, 'gate': 'patch', 'gate_hidden': 4}],
             'linear': [{'kernel': 3}, {'kernel': 0}], 'neighbour': [{'rank': 2}],
             'spectral': [{'rank': 2, 'kernel': 3}, {'rank': 0, 'kernel': 0, 'norm': 2.}],
             'spatial_lora': [{'rank': 2, 'cells': 2, 'kernel': 3}, {'cells': 3, 'kernel': 0, 'first_task': False}],
             'cross_patch': [{'context': c} for c in ('fixed', 'learned', 'per_task')],
             'coupling_per_task': [{}, {'global_affine': True}],
             'film': [{}, {'identity': 0.}], 'soft_ln': [{}, {'later': False}],
             'instance_norm_mlp': [{}, {'first_task': False}],
             'pca': [{}, {'keep': 3, 'noise': 'drop'}, {'keep': .9, 'rotate_back': True}],
             'content': [{'prototypes': 3}, {'mode': 'replace'}],
             'mixer': [{'mode': m} for m in ('depthwise', 'depthwise_residual', 'local_stats', 'full')],
             'multi_scale': [{}, {'regions': 0}], 'task_multi_scale': [{'rank': 2}],
             'task_adaptive': [{}, {'mode': 'local_stats'}], 'patch_attention': [{'hidden': 6}]}

def house_of(kind):
    "Which of the houses the parts of a kind live in; None: they are no parts of the flow."
    context = REGISTRIES[kind].context
    return ('features' if kind in ('align', 'position', 'context') else
            'subnet' if {'dim_in', 'dim_out'} <= context else 'invertible' if 'dims_in' in context else None)

PARTS = [pytest.param(kind, {'name': name, **args}, id=f'{kind}-{name}' + ''.join(f'-{k}={v}' for k, v in args.items()))
         for kind in REGISTRIES if house_of(kind) for name in REGISTRIES[kind] for args in ARGUMENTS.get(name, [{}])]

class Root(nn.Module):
    "A part below a root, so that names look as they do in a detector."
    def __init__(self, part):
        super().__init__()
        self.part = part
    def forward(self, x):
        if not isinstance(self.part, Fm.InvertibleModule): return self.part(x), 0.
        (z,), log_det = self.part((x,))
        return z, log_det

def build(kind, spec):
    context, dim = HOUSES[house_of(kind)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Root(REGISTRIES[kind].build(spec, **context())), dim

def rand(*shape, seed=0, **kw): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kw)
def features(dim, slot=0, n=4): return rand(n, *GRID, dim, seed=slot) * (1 + slot)

def learn(root, x, slot, steps):
    "A look at the data and some steps of AdamW as the learner does them; what got a gradient in no step, and why."
    use_task(root, slot)
    with observing(root): root(x)
    train = train_only(root, [slot], shared=slot == 0)
    if not train: return {}
    opt, dead = torch.optim.AdamW(train.values(), lr=.02, weight_decay=.1), dict.fromkeys(train, 'is zero')
    weight = rand(*root(x)[0].shape, seed=9)
    for _ in range(steps):
        opt.zero_grad(set_to_none=True)
        y, log_det = root(x)
        ((y * weight).mean() + .1 * y.square().mean() - .1 * torch.as_tensor(log_det).mean()).backward()
        for k, p in train.items():
            if p.grad is None: dead[k] = 'is None'
            elif p.grad.abs().max() > 0: dead.pop(k, None)
        opt.step()
    return dead

def tensors(root): return {**dict(root.named_parameters()), **dict(root.named_buffers())}

def without_gradient(root, dim):
    "What does not learn on the first task or on later ones. Factors that start at zero may need three steps to wake."
    dead = {}
    for slot in range(3):
        add_task(root, seed=1)
        dead |= {f'task {slot}: {k}': why for k, why in learn(root, features(dim, slot), slot, steps=4).items()}
    return dead

def changed_outside(root, dim):
    "Tensors outside slot 1 that differ in any bit after task 1 was learned and scored; and whether slot 1 learned."
    add_task(root, seed=1)
    learn(root, features(dim), 0, steps=2)
    add_task(root, seed=1)
    before = {k: v.detach().clone() for k, v in tensors(root).items()}
    learn(root, features(dim, 1), 1, steps=3)
    with torch.no_grad(): root(features(dim, 1))
    after = tensors(root)
    assert before.keys() == after.keys()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    return {k for k in changed if slot_of(k) != 1}, bool(changed) or all(slot_of(k) != 1 for k in after)

@pytest.mark.parametrize('kind, spec', PARTS)
def test_every_trainable_parameter_gets_a_gradient(kind, spec):
    root, dim = build(kind, spec)
    assert without_gradient(root, dim) == {}

@pytest.mark.parametrize('kind, spec', PARTS)
def test_everything_outside_the_slot_is_frozen_to_the_bit(kind, spec):
    root, dim = build(kind, spec)
    outside, learned = changed_outside(root, dim)
    assert not outside and learned

@pytest.mark.parametrize('kind, spec', PARTS)
def test_slots_do_not_see_each_other(kind, spec):
    "Output of slot 0 is the same to the bit when later slots come and learn, and its gradient reaches the input."
    root, dim = build(kind, spec)
    add_task(root, seed=1)
    learn(root, features(dim), 0, steps=2)
    x = features(dim, 5).requires_grad_()
    y, log_det = root(x)
    grad, = torch.autograd.grad(y.square().sum(), x)
    assert grad.abs().sum() > 0
    for slot in (1, 2): add_task(root, seed=1); learn(root, features(dim, slot), slot, steps=2)
    use_task(root, 0)
    again, again_det = root(x)
    assert torch.equal(y, again) and torch.equal(torch.as_tensor(log_det), torch.as_tensor(again_det))

@pytest.mark.parametrize('kind, spec', [p for p in PARTS if house_of(p.values[0]) == 'invertible'])
def test_invertible_parts_against_the_jacobian(kind, spec):
    root, dim = build(kind, spec)
    add_task(root)
    learn(root, features(dim), 0, steps=3)
    root.double()
    x = features(dim, n=2).double()
    z, log_det = root(x)
    assert log_det.shape == x.shape[:3]
    (back,), back_det = root.part((z,), rev=True)
    assert torch.allclose(back, x, atol=1e-9) and torch.allclose(back_det, -log_det, atol=1e-9)
    for b in range(2):
        def image(v, b=b): return root(v.view(1, *x.shape[1:]))[0].flatten()
        J = torch.autograd.functional.jacobian(image, x[b].flatten())
        assert math.isclose(log_det[b].sum().item(), J.slogdet().logabsdet.item(), abs_tol=1e-9)
    assert log_det.dtype == torch.float64 and root.float()(x.float())[1].dtype == torch.float32

def test_a_part_says_whether_it_is_inside_the_likelihood():
    for kind in ('align', 'position', 'context'):
        for name in REGISTRIES[kind]:
            assert isinstance(getattr(REGISTRIES[kind][name], 'in_likelihood', None), bool), f'{kind} {name}'

# -------------------------------------------------------------------------- the tests above can fail: planted faults
class Forgotten(TaskModule):
    "Never uses one of its weights."
    def task_weights(self, first, generator):
        return nn.ParameterDict({'used': torch.ones(DIM), 'forgotten': torch.ones(DIM)})
    def forward(self, x): return x * self.own['used']

class LaterDead(TaskModule):
    "Learns on the first task only."
    def task_weights(self, first, generator): return nn.ParameterDict({'w': torch.ones(DIM)})
    def forward(self, x): return x * (self.own['w'] if self.slot == 0 else self.own['w'].detach() + 0 * self.own['w'])

class Leaky(nn.Module):
    "Keeps a running mean that later tasks go on changing."
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(DIM), persistent=False)
    def forward(self, x):
        self.mean += .1 * x.detach().mean((0, 1, 2))
        return x - self.mean

def test_planted_faults_are_found():
    assert set(without_gradient(Root(Forgotten()), DIM).values()) == {'is None'}
    assert set(without_gradient(Root(LaterDead()), DIM)) == {'task 1: part.tasks.1.w', 'task 2: part.tasks.2.w'}
    assert changed_outside(Root(Leaky()), DIM)[0] == {'part.mean'}

# -------------------------------------------------------- the whole flow against FrEIA's blocks with un-merged adapters
class PlainLinear(nn.Module):
    "The formula of `LoRALinear` as it stands, around the same weights."
    def __init__(self, lora):
        super().__init__()
        self.lora = lora
    def forward(self, x):
        own = self.lora.own
        update = self.lora.scale * (x @ own['a'].T) @ own['b'].T
        return F.linear(x, self.lora.weight, self.lora.bias) + update + own['bias']

class PlainSubnet(nn.Module):
    "The scale-context subnet on rows, as in the origin; shares all weights with ours."
    def __init__(self, ours, grid):
        super().__init__()
        self.ours, self.grid = ours, grid
        self.scale, self.shift = [nn.Sequential(PlainLinear(m.first), nn.ReLU(), PlainLinear(m.second))
                                  for m in (ours.scale, ours.shift)]
    def forward(self, rows):
        x, k = rows.view(-1, *self.grid, rows.shape[-1]).permute(0, 3, 1, 2), self.ours.context.weight.shape[-1] // 2
        conv = self.ours.context
        c = F.conv2d(F.pad(x, (k,) * 4, mode='reflect'), conv.weight, conv.bias, groups=x.shape[1])
        c = self.ours.alpha_max * torch.sigmoid(self.ours.gate) * c.permute(0, 2, 3, 1).reshape(rows.shape)
        return torch.cat([self.scale(torch.cat([rows, c], 1)), self.shift(rows)], 1)

def ours_and_freia(dim, grid, blocks=3, rank=4, dtype=torch.float64, noise=.2):
    "Two flows with the same weights, ours and FrEIA's AllInOneBlock with plain subnets; two slots, far from the start."
    g = torch.Generator().manual_seed(0)
    spec = {'name': 'scale_context', 'rank': rank, 'kernel': 3}
    ours = nn.ModuleList(CouplingBlock([(*grid, dim)], subnet=spec, generator=g) for _ in range(blocks))
    for _ in range(2): add_task(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(noise * p.shape[-1:].numel() ** -.5 * torch.randn(p.shape, generator=g))
    ours.to(dtype)
    theirs = nn.ModuleList()
    for block in ours:
        def subnet(i, o, block=block): return PlainSubnet(block.subnet, grid)
        b = Fm.AllInOneBlock([(dim,)], subnet_constructor=subnet, affine_clamping=1.9, permute_soft=False).to(dtype)
        P = torch.eye(dim, dtype=dtype)[block.order.long()]
        for p, q in ((b.w_perm, P), (b.w_perm_inv, P.T), (b.global_scale, 2 * math.log(math.expm1(5)))):
            p.data.copy_(torch.as_tensor(q, dtype=dtype))        # the last is 1 after FrEIA's softplus, in float64 too
        for p in (b.global_scale, b.global_offset): p.requires_grad_(False)
        theirs.append(b)
    return ours, theirs

def run(blocks, x, rows):
    log_det, z = 0., x.reshape(-1, x.shape[-1]) if rows else x
    for b in blocks:
        (z,), j = b((z,))
        log_det = log_det + j
    return z.reshape(x.shape), log_det.reshape(x.shape[:-1])

@pytest.mark.parametrize('slot', [0, 1])
def test_flow_equals_freia_with_gradients(slot):
    ours, theirs = ours_and_freia(dim=10, grid=(4, 5))
    use_task(ours, slot)
    train = train_only(ours, [slot], shared=slot == 0)
    x = rand(2, 4, 5, 10, seed=1, dtype=torch.float64, requires_grad=True)
    results = []
    for blocks, rows in ((ours, False), (theirs, True)):
        z, log_det = run(blocks, x, rows)
        grads = torch.autograd.grad(patch_nll(z, log_det).square().mean(), [x, *train.values()])
        results.append([z, log_det, *grads])
    for name, a, b in zip(['z', 'log_det', 'x', *train], *results):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item()), name
        assert b.abs().max() > 0, name

def test_default_width_equals_freia_in_float32():
    ours, theirs = ours_and_freia(dim=768, grid=(6, 6), blocks=2, rank=64, dtype=torch.float32)
    use_task(ours, 1)
    x = rand(1, 6, 6, 768, seed=1)
    with torch.no_grad(): (z, j), (w, k) = run(ours, x, False), run(theirs, x, True)
    assert j.abs().max() > .1
    assert torch.allclose(z, w, rtol=1e-5, atol=1e-5) and torch.allclose(j, k, rtol=1e-5, atol=1e-5)

def test_second_derivatives_of_the_whole_flow():
    "A score-matching loss, ‖∂ log p/∂x‖², has the right gradient for every trainable weight, W frozen or not."
    ours, theirs = ours_and_freia(dim=6, grid=(3, 4), blocks=2, rank=2)
    for slot in (0, 1):
        use_task(ours, slot)
        train = train_only(ours, [slot], shared=slot == 0)
        x = rand(1, 3, 4, 6, seed=1, dtype=torch.float64, requires_grad=True)
        grads = []
        for blocks, rows in ((ours, False), (theirs, True)):
            score, = torch.autograd.grad(patch_nll(*run(blocks, x, rows)).sum(), x, create_graph=True)
            grads.append(torch.autograd.grad(score.square().sum(), list(train.values()), materialize_grads=True))
        for name, a, b in zip(train, *grads): assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), (slot, name)

# ----------------------------------------------------------------------------------------------- precision and storage
def small_flow(seed=0):
    g = torch.Generator().manual_seed(seed)
    spec = {'name': 'scale_context', 'rank': 4, 'kernel': 3}
    flow = nn.ModuleList([CouplingBlock([(6, 6, 32)], subnet=spec, global_affine=True, generator=g) for _ in range(2)])
    flow.append(DIAFlow([(6, 6, 32)]))
    for _ in range(2): add_task(flow, seed=seed)
    with torch.no_grad():
        for p in flow.parameters(): p.add_(.1 * torch.randn(p.shape, generator=g))
    use_task(flow, 1)
    return flow

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=no_gpu)])
def test_bfloat16_autocast_stays_near_float32(device):
    flow = small_flow().to(device)
    x = rand(2, 6, 6, 32, seed=1).to(device)
    train = train_only(flow, [1], shared=False)
    full = patch_nll(*run(flow, x, False))
    with torch.autocast(device, torch.bfloat16):
        z, log_det = run(flow, x, False)
        half = patch_nll(z, log_det)
    assert z.dtype == log_det.dtype == half.dtype == torch.float32
    assert (half - full).abs().max() < .02 * full.abs().max()
    for a, b in zip(*[torch.autograd.grad(v.mean(), list(train.values())) for v in (half, full)]):
        assert a.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), 0) > .97

def test_weights_and_permutations_survive_a_file(tmp_path):
    flow, other = small_flow(seed=0), small_flow(seed=1)
    x = rand(1, 6, 6, 32, seed=1)
    assert not torch.equal(flow[0].order, other[0].order)
    save_file(flow.state_dict(), tmp_path / 'flow.safetensors')
    other.load_state_dict(load_file(tmp_path / 'flow.safetensors'))
    with torch.no_grad(): (z, j), (w, k) = run(flow, x, False), run(other, x, False)
    assert torch.equal(z, w) and torch.equal(j, k)

def test_building_a_flow_depends_on_its_seed_alone():
    a = small_flow(seed=3)
    torch.rand(5)
    b = small_flow(seed=3)
    for (k, p), q in zip(a.state_dict().items(), b.state_dict().values()): assert torch.equal(p, q), k

def test_merged_weight_is_never_stale():
    "A step, a load and another slot are all seen by the next score."
    flow = small_flow()
    x = rand(1, 6, 6, 32, seed=1)
    fresh = copy.deepcopy(flow)
    with torch.no_grad(): before = run(flow, x, False)[0]
    with torch.no_grad():
        for f in (flow, fresh): f[0].subnet.scale.first.tasks[1]['b'].add_(.5)
        after = run(flow, x, False)[0]
        assert not torch.equal(after, before) and torch.equal(after, run(fresh, x, False)[0])
        use_task(flow, 0)
        assert not torch.equal(run(flow, x, False)[0], after)

def test_freia_permutation_is_not_trained_through_per_patch():
    def subnet(i, o): return nn.Linear(i, o)
    part = PerPatch([(4, 4, 8)], part=Fm.AllInOneBlock, subnet_constructor=subnet)
    assert not [k for k in train_only(part, [], shared=True) if 'w_perm' in k]
    assert 'part.w_perm' in part.state_dict()

# ----------------------------------------------------------------------------------------------------------- the losses
def test_tail_gradient_reaches_the_tail_only():
    z = rand(2, 5, 5, 3, seed=0, requires_grad=True)
    nll = patch_nll(z, torch.zeros(2, 5, 5))
    total, _ = build_losses({'nll': {}, 'tail': {'weight': 1., 'ratio': .2}})(z, torch.zeros(2, 5, 5))
    grad, = torch.autograd.grad(total, z)
    worst = nll.flatten(1) >= nll.flatten(1).sort(descending=True).values[:, 4:5]
    assert torch.equal(grad.abs().sum(-1).flatten(1) > 0, worst)

def test_a_loss_registered_later_is_built_and_gets_the_state():
    seen = {}
    class Late(nn.Module):
        def __init__(self, weight: float = 1.):
            super().__init__()
            self.weight = weight
        def forward(self, z, log_det, nll=None, epoch=None, **state):
            seen.update(epoch=epoch, nll=nll)
            return log_det.mean()
    registry = REGISTRIES['loss']
    registry.register('late')(Late)
    try:
        z, log_det = torch.zeros(1, 2, 2, 3), torch.ones(1, 2, 2)
        total, values = build_losses({'nll': {}, 'late': {'weight': 2.}})(z, log_det, epoch=4)
    finally: del registry.parts['late']
    assert seen['epoch'] == 4 and torch.equal(seen['nll'], patch_nll(z, log_det))
    assert math.isclose(total.item(), (values['nll'] + 2 * values['late']).item(), rel_tol=1e-6)
