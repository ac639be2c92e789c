"""Alignments, positions and contexts: what must hold for all of them beside what `test_flow.py` asks of every part"""
import pytest
import torch
import torch.nn.functional as F

from adflow.adapters import align, attention_context, context, position  # noqa: F401, they register themselves
from adflow.flow.moleflow import MoLEFlow
from adflow.parts import REGISTRIES, PartError, add_task, observing, task_modules, use_task

DIM, GRID = 8, (6, 5)
SPECS = {'multi_scale': [{'regions': 2}], 'pca': [{}, {'keep': 3, 'noise': 'drop'}, {'keep': .9, 'rotate_back': True}],
         'mixer': [{'mode': m} for m in ('depthwise_residual', 'local_stats', 'full')],
         'patch_attention': [{'hidden': 6}]}
PARTS = [pytest.param(kind, {'name': name, **args}, id=f'{kind}-{name}' + ''.join(f'-{v}' for v in args.values()))
         for kind in ('align', 'position', 'context') for name in REGISTRIES[kind] for args in SPECS.get(name, [{}])]


def rand(*shape, seed=0, **kw): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kw)

def built(kind, spec, seed=0, shaken=True):
    "A part with two slots that have seen data, far from its start, the second in use."
    part = REGISTRIES[kind].build(spec, dim=DIM, grid=GRID, generator=torch.Generator().manual_seed(seed))
    for slot in range(2):
        add_task(part, seed)
        use_task(part, slot)
        with observing(part): part(rand(3, *GRID, DIM, seed=slot) + slot)
    if shaken:
        with torch.no_grad():
            for i, p in enumerate(part.parameters()): p.add_(.3 * rand(*p.shape, seed=i))
    return part


@pytest.mark.parametrize('kind, spec', PARTS)
def test_second_derivatives(kind, spec):
    "Score matching takes the gradient of a gradient, to the input and to every weight in use."
    part = built(kind, spec).double()
    x, weights = rand(2, *GRID, DIM, seed=5, dtype=torch.float64, requires_grad=True), list(part.parameters())
    def penalty(x): return torch.autograd.grad(part(x).tanh().sum(), x, create_graph=True)[0].square().sum()
    grad, *_ = torch.autograd.grad(penalty(x), [x, *weights], allow_unused=True)
    step, eps = rand(*x.shape, seed=6, dtype=torch.float64), 1e-6
    slope = (penalty(x + eps * step) - penalty(x - eps * step)) / (2 * eps)
    assert torch.isclose((grad * step).sum(), slope, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('kind, spec', PARTS)
def test_bfloat16_autocast_stays_near_float32(kind, spec):
    part, x = built(kind, spec), rand(2, *GRID, DIM, seed=5)
    with torch.no_grad():
        full = part(x)
        with torch.autocast('cpu', torch.bfloat16): half = part(x)
    assert (half - full).abs().max() < .05 * full.abs().max()

@pytest.mark.parametrize('kind, spec', PARTS)
def test_the_start_depends_on_the_generator_alone(kind, spec):
    torch.manual_seed(1)
    one, state = built(kind, spec, shaken=False).state_dict(), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())             # and leaves torch's global stream as it is
    torch.manual_seed(2)
    two, other = [built(kind, spec, seed=s, shaken=False).state_dict() for s in (0, 7)]
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    random = {'film', 'soft_ln', 'instance_norm_mlp', 'relative', 'content', 'hybrid', 'multi_scale',
              'task_multi_scale', 'global_regions', 'semantic', 'patch_attention'}
    assert all(torch.equal(v, other[k]) for k, v in one.items()) == (spec['name'] not in random)

@pytest.mark.parametrize('kind, spec', PARTS)
def test_any_grid_and_flat_images(kind, spec):
    "A grid other than the house's, and an image without any contrast, whose gradient must not be NaN."
    part = built(kind, spec)
    assert part(rand(1, 7, 12, DIM)).shape[:3] == (1, 7, 12)
    x = torch.full((1, *GRID, DIM), 2., requires_grad=True)
    part(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in part.parameters() if p.grad is not None)

@pytest.mark.parametrize('kind, spec', PARTS)
def test_a_patch_is_scored_the_same_whatever_batch_it_comes_in(kind, spec):
    part, x = built(kind, spec), rand(4, *GRID, DIM, seed=5)
    with torch.no_grad(): assert torch.allclose(part(x), torch.cat([part(v[None]) for v in x]), atol=1e-5)

@pytest.mark.parametrize('kind, spec', PARTS)
def test_a_detector_with_the_part_survives_a_file(kind, spec, tmp_path):
    others = {'align': 'none', 'context': 'none', 'position': 'none'} | {kind: spec}
    make = dict(dim=DIM, grid=GRID, couplings=1, dia_blocks=1, subnet={'name': 'lora', 'rank': 2}, **others)
    detector, x = MoLEFlow(**make), rand(2, *GRID, DIM, seed=5)
    for slot, group in enumerate('ab'):
        detector.groups[group] = add_task(detector, 0)
        use_task(detector, slot)
        with observing(detector): detector(rand(3, *GRID, DIM, seed=slot) * (1 + slot))
    before = {g: detector.score(x, g) for g in 'ab'}
    detector.save(tmp_path)
    again = MoLEFlow.load(tmp_path)
    for g in 'ab': assert torch.equal(again.score(x, g), before[g])
    if task_modules(getattr(detector.flow, kind)) and spec['name'] in ('pca', 'film', 'content'):
        assert not torch.equal(before['a'], before['b'])

def test_whitening_beside_several_scales_is_refused_with_the_reason():
    for name in ('multi_scale', 'task_multi_scale'):
        with pytest.raises(PartError, match='whitening do not go together: .*likelihood'):
            MoLEFlow(DIM, GRID, align='whitening', context=name)
        MoLEFlow(DIM, GRID, align='none', context=name, couplings=1)

def test_every_affine_alignment_tells_scale_and_shift():
    for name in ('film', 'soft_ln', 'whitening', 'whitening_no_ln'):
        gamma, beta = built('align', {'name': name}).affine()
        assert gamma.shape == beta.shape == (DIM,) and gamma.requires_grad and beta.requires_grad

def test_pca_of_patches_that_do_not_vary():
    part = REGISTRIES['align'].build('pca', dim=DIM)
    add_task(part); use_task(part, 0)
    with pytest.raises(PartError, match='vary'), observing(part): part(torch.ones(2, *GRID, DIM))

def test_whitened_patches_are_white_at_the_size_of_a_backbone():
    "A hard spectrum, five orders of magnitude, in float32."
    x = rand(4, 28, 28, 152) @ torch.linalg.qr(rand(152, 152, seed=1))[0] * torch.logspace(2, -3, 152) + 10
    part = REGISTRIES['align'].build({'name': 'pca', 'shrinkage': 0.}, dim=152)
    add_task(part); use_task(part, 0)
    with observing(part): y = part(x).reshape(-1, 152)
    assert F.mse_loss(torch.cov(y.T), torch.eye(152)) < 1e-6
