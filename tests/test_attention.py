"""Attention: the operator against a loop over pairs of tokens, faults that must be found, every mixer, token dropout"""
import itertools

import pytest
import torch
import torch.nn.functional as F

from adflow.attention import dropout, kernels
from adflow.attention.dropout import TOKEN_DROPOUTS, TokenDropout, segments, set_progress
from adflow.attention.kernels import Band, axial_attention, feature_map, linear_attention, position_weights
from adflow.attention.mixers import MIXERS
from adflow.parts import PartError


def gen(seed=0): return torch.Generator().manual_seed(seed)
def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=gen(seed), dtype=dtype)

def qkv(grid, specials=0, b=2, heads=2, d=3, seed=0):
    q, k, v = rand(3, b, heads, specials + grid[0] * grid[1], d, seed=seed)
    return feature_map(q), feature_map(k), v

# -------------------------------------------------------------------------------------------------------- the operator

def reference(q, k, v, grid, g=1., r=0., c=0., s=0., bands=(), specials=0, keep=None, circular=False):
    "Token by token, weight by weight, in Python."
    (h, w), out = grid, torch.zeros(q.shape[:3] + v.shape[-1:]).to(v)
    def away(a, b, n): return min(abs(a - b), n - abs(a - b)) if circular else abs(a - b)
    places = [None] * specials + list(itertools.product(range(h), range(w)))
    for i, p in enumerate(places):
        above, below = 0., 0.
        for j, o in enumerate(places):
            weight = 1.
            if p is not None and o is not None:
                y, x = away(p[0], o[0], h), away(p[1], o[1], w)
                weight = g + r * (y == 0) + c * (x == 0) + s * (y == x == 0)
                for b, n, m in bands: weight = weight + b * ((n is None or y <= n) and (m is None or x <= m))
            if isinstance(weight, torch.Tensor): weight = weight[..., None]
            a = weight * (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True)
            if keep is not None: a = a * keep[:, None, j, None]
            above, below = above + a * v[:, :, j], below + a
        out[:, :, i] = above / below
    return out

CASES = {
    'global': {}, 'row': dict(g=0, r=1), 'column': dict(g=0, c=1), 'biased': dict(r=-.7), 'blind': dict(r=-1),
    'blind for columns': dict(c=-1), 'blind for both': dict(r=-1, c=-1, s=1), 'without itself': dict(s=-1),
    'all': dict(g=.3, r=.5, c=1.5, s=-2), 'both less': dict(r=-.4, c=-.5), 'self': dict(g=0, s=2), 'scaled': dict(g=.2),
    'row twice': dict(g=0, r=1, bands=[(1, 0, None)]), 'near rows': dict(bands=[(-.9, 1, None)]),
    'near columns': dict(g=0, bands=[(2, None, 1)]), 'window': dict(g=0, bands=[(1, 1, 2)]),
    'no window': dict(bands=[(-1, 1, 1)]), 'row band': dict(r=.5, bands=[(-.6, 0, 1), (.3, 2, None), (-.2, None, 1)]),
    'wide': dict(bands=[(1, 9, 0), (1, 0, 9), (1, 9, 9)])}

def check(attention, name, grid, specials=0, circular=False, **more):
    t, w = qkv(grid, specials), CASES[name]
    got = attention(*t, grid, specials=specials, circular=circular, **w, **more)
    want = reference(*t, grid, specials=specials, circular=circular, **w, **more)
    assert (got - want).abs().max() < 1e-12

@pytest.mark.parametrize('circular', [False, True])
@pytest.mark.parametrize('grid, specials', [((4, 5), 0), ((5, 3), 2)])
@pytest.mark.parametrize('name', CASES)
def test_against_the_loop(name, grid, specials, circular): check(linear_attention, name, grid, specials, circular)

@pytest.mark.parametrize('grid', [(1, 4), (4, 1), (1, 1), (2, 2)])
def test_thin_grids(grid):
    for name in ('global', 'row', 'column', 'biased', 'blind', 'all', 'near rows', 'window', 'wide'):
        for circular in (False, True): check(linear_attention, name, grid, 2, circular)

def test_keep_weighs_the_keys():
    check(linear_attention, 'row band', (4, 5), 2, keep=torch.rand(2, 22, generator=gen(), dtype=torch.float64))
    check(linear_attention, 'blind', (4, 5), 2, keep=(torch.rand(2, 22, generator=gen()) > .3).double())

def per_head(x): return torch.tensor(x, dtype=torch.float64)
LEARNED = [dict(r=per_head([-.3, -1.])), dict(r=per_head([[-.3, .2], [-1., 0.]]), c=per_head([.5, 0.])),
           dict(g=per_head([.5, 2.]), s=per_head([1., 0.]),
                bands=[(per_head([-.2, .4]), 1, None), (per_head([.1, .2]), 1, 1)])]

@pytest.mark.parametrize('w', LEARNED)
def test_learned_weights(w):
    t = qkv((4, 5), 2)
    assert (linear_attention(*t, (4, 5), specials=2, **w) - reference(*t, (4, 5), specials=2, **w)).abs().max() < 1e-12

@pytest.mark.parametrize('start', [0., .3, -.3])
def test_gradients_of_everything(start):
    "Also where a weight is exactly 0, in whose neighbourhood it changes sides."
    t = [x[:1, :1].clone().requires_grad_() for x in qkv((3, 2), 1)]
    w = torch.full((5, 1), start, dtype=torch.float64).requires_grad_()
    def f(q, k, v, w):
        return linear_attention(q, k, v, (3, 2), 1.5 + w[0], w[1], w[2], w[3], [Band(w[4], 1)], specials=1)
    assert torch.autograd.gradcheck(f, (*t, w))
    if not start:
        t = [x.detach() for x in t]
        def loop(w): return reference(*t, (3, 2), 1.5 + w[0], w[1], w[2], w[3], [(w[4], 1, None)], specials=1)
        plain, ours = [torch.autograd.functional.jacobian(h, w.detach()) for h in (loop, lambda w: f(*t, w))]
        assert (plain - ours).abs().max() < 1e-12 and (ours.abs().amax((0, 1, 2, 3)) > 0).all()

FAULTS = {
    'rows taken for columns': lambda q, k, v, grid, r=0., c=0., **w: linear_attention(q, k, v, grid, r=c, c=r, **w),
    'grid transposed': lambda q, k, v, grid, **w: linear_attention(q, k, v, grid[::-1], **w),
    'specials at the end': lambda q, k, v, *a, **w: linear_attention(q.roll(2, 2), k.roll(2, 2), v.roll(2, 2), *a, **w),
    'not around': lambda q, k, v, grid, circular, **w: linear_attention(q, k, v, grid, circular=False, **w)}

@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_found(fault):
    name = 'near rows' if fault == 'not around' else 'blind'
    check(linear_attention, name, (4, 5), 2, True)
    with pytest.raises(AssertionError): check(FAULTS[fault], name, (4, 5), 2, True)

def test_contracting_the_wrong_axis_is_found(monkeypatch):
    "Seed 000's sketch sums over the channels of the other axis; on square grids this even runs."
    right = kernels.along
    monkeypatch.setattr(kernels, 'along', lambda q, k, v, mix, memory=None: right(q, k.transpose(2, 3), v, mix, memory))
    with pytest.raises(AssertionError): check(linear_attention, 'row', (4, 4))

def test_keep_before_the_map_removes_nothing():
    "What the origin does: φ(0) = 1."
    q, k, v = rand(3, 1, 1, 6, 3)
    keep = torch.tensor([[1., 1, 0, 1, 1, 1]], dtype=torch.float64)
    stays = keep[0] > 0
    short = linear_attention(feature_map(q)[:, :, stays], feature_map(k)[:, :, stays], v[:, :, stays], (1, 5))
    want = linear_attention(feature_map(q), feature_map(k), v, (2, 3), keep=keep)
    assert torch.allclose(want[:, :, stays], short)
    origin = linear_attention(feature_map(q), feature_map(k * keep[:, None, :, None]), v, (2, 3))
    assert (origin - want).abs().max() > .01

def test_no_influence_of_what_is_blind():
    "Rows and columns exactly; windows, which are subtracted, to rounding."
    t = [x.float() for x in qkv((5, 6), 2, b=1)]
    loud = t[2].clone()
    loud[:, :, 2 + 6:2 + 24] = 1e6
    w = dict(bands=[Band(-1, rows=1)], specials=2)
    quiet, loud = [linear_attention(*t[:2], v, (5, 6), **w)[:, :, 14:20] for v in (t[2], loud)]      # row 2
    assert torch.equal(quiet, loud)
    def seen(v): return linear_attention(*t[:2], v, (5, 6), bands=[Band(-1, 1, 1)], specials=2)[0, 0, 2 + 13]
    felt = torch.autograd.functional.jacobian(seen, t[2])[:, 0, 0].abs().sum((0, 2))
    inside = torch.zeros(5, 6, dtype=torch.bool)
    inside[1:4, 0:3] = True
    assert (felt[2:].view(5, 6)[inside] < 1e-7).all() and (felt[2:].view(5, 6)[~inside] > 1e-4).all()

def test_vanished_features_give_zero_not_nan():
    q, k, v = [x.float().requires_grad_() for x in rand(3, 1, 2, 6, 4)]
    for w in ({}, dict(r=-1), dict(g=0, c=1)):
        y = linear_attention(feature_map(q - 200), feature_map(k), v, (2, 3), **w)
        assert (y == 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum() + y.sum(), (q, k, v)))

def test_what_is_refused():
    t = qkv((3, 4))
    for w, word in ((dict(g=-1), 'weight -1'), (dict(r=-2), 'weight -1'), (dict(g=0), 'sees nothing'),
                    (dict(bands=[(-1, 1, None)]), 'sees nothing'), (dict(c=-.5, s=-.6), '0 rows and 0 columns')):
        with pytest.raises(PartError, match=word): linear_attention(*t, (3, 4), **w)
    with pytest.raises(ValueError, match='12 tokens are not 1 specials'): linear_attention(*t, (3, 4), specials=1)
    linear_attention(*t, (3, 4), r=-1, c=-1, s=1)               # no token has the weight g + r + c

def test_weights_as_a_matrix():
    for name, circular in itertools.product(CASES, (False, True)):
        w = position_weights((4, 5), **CASES[name], specials=2, circular=circular).double()
        q, k, v = qkv((4, 5), 2)
        a = w * (q @ k.mT)
        want = reference(q, k, v, (4, 5), **CASES[name], specials=2, circular=circular)
        assert ((a / a.sum(-1, keepdim=True)) @ v - want).abs().max() < 1e-6

# ---------------------------------------------------------------------------------------------------------- every mixer

HOUSE = dict(dim=12, heads=3, grid=(5, 6), specials=2)
SPECS = [{'name': n} for n in MIXERS if n != 'neighbour'] + [
    {'name': 'neighbour', 'size': 3}, {'name': 'neighbour', 'size': 3, 'circular': True},
    {'name': 'softmax', 'beta': 1},
    {'name': 'biased', 'axis': 'column', 'beta': 1}, {'name': 'biased', 'learned': True},
    {'name': 'biased', 'ramp': 'cosine'},
    {'name': 'axial', 'mode': 'learned'}, {'name': 'axial', 'mode': 'image'},
    {'name': 'axial', 'mode': 'token', 'alpha': .2},
    {'name': 'merged', 'learned': True, 'r': .5}, {'name': 'merged', 'g': 0, 'r': 1, 'c': 1, 's': -1},
    {'name': 'banded', 'rows': 0, 'columns': 2, 'weight': -.5},
    {'name': 'banded', 'base': 0, 'weight': 1, 'circular': True}]
every = pytest.mark.parametrize('spec', SPECS, ids=lambda s: '-'.join(map(str, s.values())))
def build(spec, **house): return MIXERS.build(spec, **HOUSE | house, generator=gen(1))
def tokens(n=2, seed=3): return rand(n, 32, 12, seed=seed, dtype=torch.float32)

@every
def test_every_mixer(spec):
    part, x = build(spec), tokens()
    state = torch.get_rng_state()
    y = part(x)
    assert y.shape == x.shape and torch.equal(y, build(spec)(x)) and torch.equal(state, torch.get_rng_state())
    assert torch.allclose(y[:1], part(x[:1]), atol=1e-6)                         # images do not see each other
    assert {'qkv.weight', 'qkv.bias', 'proj.weight', 'proj.bias'} <= set(part.state_dict())
    assert set(part.state_dict()) == {n for n, _ in part.named_parameters()}     # nothing but weights
    (y * rand(*y.shape, seed=4, dtype=torch.float32)).sum().backward()
    dead = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert torch.equal(build('linear').qkv.weight, part.qkv.weight)              # the same start for all

@every
def test_effective_attention(spec):
    part, x = build(spec), tokens()
    v = part.split(x)[2]
    for query in (0, 1, 2, (2, 3), (4, 5)):
        a = part.attention_of(x, query)
        i = query if isinstance(query, int) else 2 + 6 * query[0] + query[1]
        assert a.shape == (2, 3, 32) and torch.allclose(a.sum(-1), torch.ones(2, 3), atol=1e-5)
        assert torch.allclose(part.proj((a[:, :, None] @ v).flatten(1)), part(x)[:, i], atol=1e-5)
    with torch.no_grad(): assert not part.attention_of(x, 3).requires_grad

@every
def test_half_precision(spec):
    part, x = build(spec), tokens()
    want = part(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): mixed = part(x)
    half = build(spec).bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (mixed.float() - want).abs().max() < .05 and (y.float() - want).abs().max() < .1
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())

@every
def test_a_token_that_is_not_kept(spec):
    part, x = build(spec), tokens()
    keep = torch.ones(2, 32)
    keep[:, [1, 9, 20]] = 0
    other = x.clone()
    other[:, [1, 9, 20]] += 10
    stays = keep[0].bool()
    if spec.get('mode') != 'image':                                              # whose α is read off all tokens
        assert torch.allclose(part(x, keep)[:, stays], part(other, keep)[:, stays], atol=1e-6)
    assert not torch.allclose(part(x)[:, stays], part(other)[:, stays], atol=1e-3)

def turned(x, h, w): return torch.cat([x[:, :2], x[:, 2:].unflatten(1, (h, w)).transpose(1, 2).flatten(1, 2)], 1)

@pytest.mark.parametrize('a, b', [('row', 'column'), ({'name': 'biased'}, {'name': 'biased', 'axis': 'column'}),
                                  ({'name': 'axial', 'alpha': .2}, {'name': 'axial', 'alpha': .8}),
                                  ('linear', 'linear'),
                                  ({'name': 'banded'}, {'name': 'banded', 'rows': None, 'columns': 1}),
                                  ({'name': 'merged', 'r': 1.}, {'name': 'merged', 'c': 1.}),
                                  ({'name': 'softmax', 'beta': .5}, {'name': 'softmax', 'beta': .5, 'axis': 'column'})])
def test_transposing_swaps_the_axes(a, b):
    x = tokens()
    assert torch.allclose(turned(build(a)(x), 5, 6), build(b, grid=(6, 5))(turned(x, 5, 6)), atol=1e-6)

def test_weights_can_be_copied_and_progress_is_no_state():
    part = build({'name': 'biased', 'beta': .8, 'ramp': 'linear'})
    set_progress(part, .5)
    assert part.strength() == .5
    other = build({'name': 'biased', 'beta': .8, 'ramp': 'linear'})
    other.load_state_dict(part.state_dict())
    assert other.strength() == 1                                                 # a loaded detector is at the end
    build('softmax').load_state_dict(build('linear').state_dict())

@pytest.mark.parametrize('spec, word', [
    ({'name': 'rows'}, "Did you mean 'row'"), ({'name': 'biased', 'bta': 1}, "Did you mean 'beta'"),
    ({'name': 'biased', 'axis': 'diagonal'}, 'axis'), ({'name': 'biased', 'beta': 2}, 'beta=2'),
    ({'name': 'biased', 'learned': True, 'beta': 1}, 'beta=1'), ({'name': 'axial', 'alpha': 1.2}, 'alpha=1.2'),
    ({'name': 'axial', 'mode': 'token', 'alpha': 0}, 'alpha=0'), ({'name': 'merged', 'r': -2}, 'must be 0 or more'),
    ({'name': 'merged', 'g': 0}, 'sees nothing'), ({'name': 'banded', 'rows': -1}, 'rows=-1'),
    ({'name': 'banded', 'weight': -1.5}, 'weight -0.5'), ({'name': 'neighbour', 'size': 2}, 'odd'),
    ({'name': 'neighbour', 'size': 11}, 'sees nothing'), ({'name': 'softmax', 'beta': -1}, 'beta=-1'),
    ({'name': 'biased', 'ramp': 'linear', 'start': .8, 'end': .2}, 'start=0.8')])
def test_wrong_mixers(spec, word):
    with pytest.raises(PartError, match=word): build(spec, specials=0)

def test_axial_shares_per_image():
    q, k, v = qkv((3, 4), 1)
    alpha = torch.rand(2, 2, 13, 1, generator=gen(), dtype=torch.float64)
    row, column = [reference(q, k, v, (3, 4), 0., *w, specials=1) for w in ((1., 0.), (0., 1.))]
    assert torch.allclose(axial_attention(q, k, v, (3, 4), alpha, 1), alpha * row + (1 - alpha) * column)

# -------------------------------------------------------------------------------------------------------- token dropout

def drop(seed=0, grid=(12, 15), **args):
    return TOKEN_DROPOUTS.build({'name': 'directional', **args}, dim=4, grid=grid, specials=2, generator=gen(seed))

def uneven(masks, rate):
    "The largest deviation of a row, a column and a token from the rate, in standard errors."
    n = len(masks)
    def off(share, m): return ((share - rate).abs().max() / (rate * (1 - rate) / m) ** .5).item()
    each = masks.double().mean(0)
    return max(off(each, n), off(each.mean(0), n), off(each.mean(1), n))

@pytest.mark.parametrize('rate', [.05, .2, .3])
@pytest.mark.parametrize('axis', ['row', 'column', 'isotropic', 'random'])
def test_rate_and_marginals(axis, rate):
    masks = drop(axis=axis, rate=rate, length=(2, 4)).mask(6000, gen(5))
    assert abs(masks.double().mean() - rate) < .004 and uneven(masks, rate) < 5

def test_the_origins_starts_are_found_uneven(monkeypatch):
    "Starts in [0, W − L], no way around: the border is dropped less often."
    def bounded(count, size, boxes, rate, generator):
        n, length = size[1], boxes[torch.randint(len(boxes), (count,), generator=generator), 1]
        start = (torch.rand(count, generator=generator) * (n - length + 1)).long()
        at, p = torch.arange(n), rate * n / boxes[:, 1].double().mean()
        on = (at >= start[:, None]) & (at < (start + length)[:, None]) & (torch.rand(count, 1, generator=generator) < p)
        return on[:, None]
    monkeypatch.setattr(dropout, 'segments', bounded)
    masks = drop(axis='row', rate=.1, length=(2, 4)).mask(6000, gen(5))
    assert abs(masks.double().mean() - .1) < .004 and uneven(masks, .1) > 8

def test_the_origins_rate():
    "Its rows, lengths and probabilities give .86 % on a 28×28 grid; ours are asked for the rate itself."
    chosen = torch.rand(20000, 28, generator=gen()) < .2
    dropped = chosen[..., None] & (torch.rand(20000, 28, 2, generator=gen(1)) < .6)
    assert abs(dropped.double().sum((1, 2)).mean() / 784 - .0086) < .0002

def test_squares_are_square_and_apart():
    m = segments(300, (9, 11), torch.tensor([[2, 2]]), .2, gen()).float()
    around = F.pad(m[:, None], (1, 2, 1, 2), mode='circular')
    alone = F.conv2d(around, F.pad(torch.full((1, 1, 2, 2), 10.), (1, 1, 1, 1), value=-9.))
    assert (alone == 40).sum() * 4 == m.sum()                                    # free-standing 2×2 squares and no more

def test_a_whole_line():
    m = drop(axis='row', length=(15, 15), rate=.2).mask(500, gen())
    assert set(m.sum(-1).unique().tolist()) == {0, 15} and abs(m.float().mean() - .2) < .02

def test_the_draws_are_the_generators():
    x, p = rand(3, 182, 4), drop(fill='swap', rate=.2)
    torch.manual_seed(0)
    a = p(x, gen(9))
    torch.manual_seed(1)
    assert torch.equal(a, p(x, gen(9))) and not torch.equal(a, p(x, gen(10)))
    assert not torch.equal(p(x), p(x))                                           # without one: the global stream
    with pytest.raises(ValueError, match='181 tokens'): p(x[:, 1:])

def test_a_resumed_run_is_the_same():
    "Strength and draws are functions of the step alone."
    def run(steps, part):
        out = []
        for step in steps:
            set_progress(part, step / 10)
            out.append(part(rand(2, 182, 4), gen(step)))
        return torch.stack(out)
    def args(): return drop(ramp='cosine', start=.1, end=.8, fill='mask_token')
    whole = run(range(10), args())
    part = args()
    part.load_state_dict(args().state_dict())
    assert torch.equal(whole[5:], run(range(5, 10), part)) and torch.equal(whole[0], rand(2, 182, 4))

def test_gradients_pass_where_nothing_is_dropped():
    for fill in ('zero', 'mean', 'mask_token', 'swap'):
        p, x = drop(fill=fill, rate=.2), rand(2, 182, 4).requires_grad_()
        dropped = p.mask(2, gen(7)).flatten(1)
        y = p(x, gen(7))
        y[:, :2].sum().backward(retain_graph=True)
        assert (x.grad[:, :2] == 1).all() and (x.grad[:, 2:] == 0).all()
        x.grad = None
        (y[:, 2:] * ~dropped[..., None]).sum().backward()
        assert torch.equal(x.grad[:, 2:, 0] == 1, ~dropped)
        assert isinstance(p, TokenDropout) and p.bfloat16()(x.detach().bfloat16(), gen(7)).dtype == torch.bfloat16
