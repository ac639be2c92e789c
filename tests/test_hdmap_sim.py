"""Simulated HDMaps against the published tables, and every promise of the files, the scale, the torus and the controls.
No real map is in it: what is asserted holds for the simulator and for the code."""
import shutil
from hashlib import sha1
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.io import savemat
from scipy.stats import ks_2samp

from adflow.data.datasets import DataError, open_dataset
from adflow.data.hdmap_files import convert_mat, read_mat
from adflow.data.hdmap_sim import DOMAINS, KINDS, add_fault, map_statistics, normal_map, normal_maps
from adflow.data.preprocess import BadFile, Preprocess, read_image, read_mask
from adflow.data.synthetic import rng_for
from adflow.evaluate.scoring import image_scores, pixel_maps
from adflow.features.augment import AUGMENT
from adflow.features.backbone import BACKBONES
from adflow.features.store import extract
from adflow.memory.patchcore import PatchCore
from adflow.memory.profiles import Profile
from adflow.parts import DETECTORS

SIM = dict(name='hdmap_sim', train=16, validation=4, good=16, faults=16, other=8)
RAW = Preprocess((31, 95), mean=(0,) * 3, std=(1,) * 3)

@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch): monkeypatch.setenv('ADFLOW_CACHE', str(tmp_path_factory.getbasetemp()/'c'))

def digest(root): return {p.relative_to(root).as_posix(): sha1(p.read_bytes()).hexdigest()
                          for p in root.rglob('*') if p.is_file()}

def auroc(good, bad):
    good, bad = np.asarray(good), np.asarray(bad)
    return float((bad[:, None] > good).mean() + (bad[:, None] == good).mean() / 2)

def cells(data, **args):
    return extract(data, BACKBONES.build(dict(name='cells', **args), image_size=(31, 95)), dtype='float32',
                   progress=False)

def learned(name, x, cls='domain_C', **args):
    d = DETECTORS.build(dict(name=name, **args), dim=x.dim, grid=x.grid, seed=0)
    d.learn(SimpleNamespace(index=0, name=cls, classes=[cls]), x.where(split='train', **{'class': cls}))
    return d

def scores(d, x, cls='domain_C', aggregate='max'):
    return image_scores(d.score(x.batch(range(len(x))), cls), aggregate).numpy()

# ---------------------------------------------------------------------------------------------------------- simulator
PUBLISHED = {'cold': (.190, .046, .095, .487, .130), 'warm': (.265, .075, .114, .748, .168)} # 500 maps each
TRAIN = {'A': (.0804, .34, 4.0), 'B': (.3344, .33, 4.0), 'C': (.0215, .29, 4.1), 'D': (.0915, .37, 4.6)}

@pytest.mark.parametrize('condition', PUBLISHED)
@pytest.mark.parametrize('seed', [0, 1])
def test_single_maps_of_domain_c(condition, seed):
    got = map_statistics(normal_maps('domain_C', 300, condition == 'warm', seed))
    for (k, v), want in zip(got.items(), PUBLISHED[condition]):
        assert abs(v / want - 1) < (.03 if k == 'mean' else .12), (k, v, want)

@pytest.mark.parametrize('domain', TRAIN)
def test_training_maps_of_a_domain(domain):
    d, (mean, cv, top) = DOMAINS[f'domain_{domain}'], TRAIN[domain]
    x = normal_maps(f'domain_{domain}', 200, d.warm_share)
    assert abs(x.mean() * d.top / mean - 1) < .04 and abs(x.std() / x.mean() / cv - 1) < .10
    assert .75 < x.max() / x.mean() / top < 1.5 and x.min() > 0 and x.dtype == np.float32
    halves = [normal_maps(f'domain_{domain}', 100, w).mean() for w in (0, 1)]
    assert abs(halves[1] / halves[0] / 1.39 - 1) < .04

def test_the_same_files_from_the_same_seed(tmp_path):
    a, b, c = (open_dataset(dict(SIM, seed=s), tmp_path/n, ['domain_B']) for n, s in (('a', 0), ('b', 0), ('c', 1)))
    assert digest(tmp_path/'a') == digest(tmp_path/'b') and a.fingerprint == b.fingerprint != c.fingerprint
    more = open_dataset(dict(SIM, faults=20, kinds=['sun', 'transient']), tmp_path/'d', ['domain_B'])
    old, new = digest(tmp_path/'a'), digest(tmp_path/'d')             # nothing depends on what is drawn beside it
    shared = [k for k in old if k in new and k.endswith(('.tiff', '.png'))]
    assert len(shared) > 60 and all(old[k] == new[k] for k in shared) and len(more.where(kind='sun')) == 20
    (tmp_path/'a/domain_B/index.csv').unlink()                        # a domain that lost a file is written again
    open_dataset(SIM, tmp_path/'a', ['domain_B'])
    assert digest(tmp_path/'a') == old
    with pytest.raises(DataError, match='other settings'): open_dataset(dict(SIM, train=17), tmp_path/'a', ['domain_B'])

def test_masks_and_teeth():
    for kind in KINDS:
        for i in range(12):
            clean = normal_map(rng_for(i, kind), 'domain_D', warm := bool(i % 2))
            before = clean.copy()
            bad, mask, tooth, partner = add_fault(rng_for(i, kind, 'f'), clean, kind, .8, warm)
            assert np.array_equal(clean, before) and np.array_equal(mask, bad != clean) and (bad > 0).all()
            change = bad / clean - 1
            if kind == 'driving_tooth': assert change.sum(1).argmax() == tooth and mask.any(1).sum() == 3
            if kind == 'driven_tooth': assert change.sum(0).argmax() == tooth and mask.any(0).sum() == 3
            if kind == 'tooth_pair': assert np.unravel_index(change.argmax(), (31, 95)) == (tooth, partner)
            top = .8 * (6 if warm and kind in ('driving_tooth', 'driven_tooth', 'transient') else 1)
            assert abs(change.max() / top - 1) < (.02 if kind in ('eccentricity', 'sun') else 1e-3)

@pytest.mark.parametrize('kind', KINDS)
def test_severity_is_monotone(kind):
    clean = normal_map(rng_for(0, 'x'), 'domain_A', False)
    made = [add_fault(rng_for(3, kind), clean, kind, s, False) for s in (.1, .3, 1., 3.)]
    assert len({m[1].tobytes() for m in made}) == 1 and len({m[2:] for m in made}) == 1   # the same cells and tooth
    logs = np.stack([np.abs(np.log(m[0] / clean)) for m in made])
    assert (np.diff(logs, axis=0)[:, made[0][1]] > 0).all()

def test_files_keep_what_was_made():
    data = open_dataset(SIM)
    assert data.classes == list(DOMAINS) and list(data.counts().loc['domain_A']) == [16, 4, 16, 96]
    for c in data.classes:
        i = data.where(split='test', **{'class': c}).index
        assert (i.groupby(['kind', 'condition']).size() == 8).all()
    bad = data.where(label=1).index
    assert max(read_image(f).max() for f in bad['image']) > 1.5        # nothing is clipped
    for r in bad.sample(20, random_state=0).itertuples():
        mask = read_mask(r.mask, (31, 95))
        if r.kind == 'driving_tooth': assert mask.any(1)[r.tooth] and mask.any(1).sum() == 3
    assert set(data.index['severity'].dropna()) == {.25, .5, 1., 2.}
    assert data.index['severity'].notna().equals(data.index['label'] == 1)

def test_run_shift_is_off_and_then_exactly_a_gain():
    off, on = (open_dataset(dict(SIM, run_shift=s), classes=['domain_B', 'domain_C']) for s in (False, True))
    assert set(off.where(label=1).index['run']) == {0} and set(on.where(label=1).index['run']) == {1}
    for a, b in zip(off.index.itertuples(), on.index.itertuples()):
        x, y = (read_image(r.image)[..., 0] for r in (a, b))
        gain = {'domain_B': .85, 'domain_C': 1.15}[a._1] if b.label or b.split == 'control' else 1.
        if a.split == 'control': np.testing.assert_array_equal(x, y)
        else: np.testing.assert_allclose(y, x * gain, rtol=1e-5)
    other = off.where(split='control').index
    assert set(other['label']) == {0} and set(other['kind']) == {'other_run'} and set(other['run']) == {1}

def test_rolled_maps_keep_their_teeth():
    kinds = ['driving_tooth', 'driven_tooth']
    data = open_dataset(dict(SIM, rolled=True, severities=[3.], kinds=kinds), classes=['domain_A'])
    for r in data.where(label=1).index.itertuples():
        mask, axis = read_mask(r.mask), int(r.kind == 'driving_tooth')
        lines, n = np.flatnonzero(mask.any(axis)), mask.shape[1 - axis]
        assert set(lines) == {(r.tooth + k) % n for k in (-1, 0, 1)}

# -------------------------------------------------------------------------------------------------------------- reader
def write_raw(root, cls='domain_C', n=6):
    for split, kind in ('train', 'good'), ('test', 'good'), ('test', 'fault'):
        (root/cls/split/kind).mkdir(parents=True)
        for i in range(n):
            x = normal_map(rng_for(0, cls, split, kind, i), cls, i >= n // 2) * (3 if kind == 'fault' else 1)
            tifffile.imwrite(root/cls/split/kind/f'{i:06}.tiff', x * np.float32(DOMAINS[cls].top))
    return root

def test_scale_is_one_number_for_train_and_test(tmp_path):
    root = write_raw(write_raw(tmp_path), 'domain_A')
    shutil.copy(root/'domain_C/train/good/000001.tiff', root/'domain_C/test/fault/000001.tiff')
    data = open_dataset(dict(name='hdmap', scale='published', condition='first_half_cold'), root, validation=0)
    x = cells(data)
    for c in data.classes:
        part = x.where(**{'class': c})
        want = np.stack([read_image(f)[..., 0] for f in part.index['image']]) / np.float32(DOMAINS[c].top)
        np.testing.assert_allclose(part.batch(slice(None))[..., 0], want, rtol=1e-6)
    names = x.index['image'].str.removeprefix(str(root)).tolist()
    twins = [names.index(f'/domain_C/{f}/000001.tiff') for f in ('train/good', 'test/fault')]
    assert torch.equal(*x.batch(twins)) and x.batch(slice(None)).max() > 1.5
    assert x.manifest['preprocess']['scale'] == [['domain_A', .324670], ['domain_C', .087341]]
    told = x.where(split='test', label=0, **{'class': 'domain_A'}).index['condition'].tolist()
    assert told == ['cold'] * 3 + ['warm'] * 3
    assert x.index['condition'][x.index['split'] == 'train'].isna().all() and x.masks().sum() == 0

def test_the_scale_is_in_the_fingerprint_and_only_there(tmp_path):
    root = write_raw(tmp_path)
    prints = {s: cells(open_dataset(dict(name='hdmap', scale=s), root, validation=0)).manifest['fingerprint']
              for s in ('train', 'published', 'none')}
    assert len(set(prints.values())) == 3
    plain = cells(open_dataset(SIM, classes=['domain_A'])).manifest['preprocess']
    assert not {'scale', 'wrap'} & set(plain)                         # datasets without a scale keep their stores
    for f in (root/'domain_C/test').rglob('*.tiff'): tifffile.imwrite(f, read_image(f)[..., 0] * 5)
    louder = open_dataset('hdmap', root, validation=0)                # test maps have no say in their scale
    assert louder.scale['domain_C'][1] == max(read_image(f).max() for f in (root/'domain_C/train').rglob('*.tiff'))

def test_alone_or_together_a_domain_has_the_same_store(tmp_path):
    root = write_raw(write_raw(tmp_path), 'domain_A')
    both, one = (cells(open_dataset('hdmap', root, c, validation=0)) for c in (None, ['domain_C']))
    assert one.manifest['stores'][0] in both.manifest['stores'] and one.manifest['extracted'] == 0

def test_mat_round_trip(tmp_path):
    x = np.random.default_rng(0).gamma(2, .5, (31, 95, 3, 7)).astype(np.float32)
    savemat(tmp_path/'m.mat', {'Xdata': x})
    assert convert_mat(tmp_path/'m.mat', tmp_path/'out', channel=2, limit=5) == 5 and x.max() > 1
    for i in range(5): np.testing.assert_array_equal(read_image(tmp_path/f'out/{i:06}.tiff')[..., 0], x[:, :, 2, i])
    np.testing.assert_array_equal(read_mat(tmp_path/'m.mat'), x)
    for name in ('train/good', 'test/good', 'test/fault'):
        (tmp_path/'tree/domain_X'/name).parent.mkdir(parents=True, exist_ok=True)
        savemat(tmp_path/f'tree/domain_X/{name}.mat', {'Xdata': x})
    data = open_dataset(dict(name='hdmap', channel=1, scale={'domain_X': 2.}), tmp_path/'tree', validation=0)
    assert data.counts().loc['domain_X'].tolist() == [7, 0, 7, 7]
    np.testing.assert_array_equal(data.scaled(RAW).pixels(data.index['image'][3])[..., 0], x[:, :, 1, 3] / 2)
    with pytest.raises(BadFile, match="no variable 'X'"): read_mat(tmp_path/'m.mat', 'X')
    (tmp_path/'new.mat').write_bytes(b'MATLAB 7.3 MAT-file'.ljust(124) + b'\x00\x02IM' + bytes(64))
    if not find_spec('h5py'):
        with pytest.raises(BadFile, match='pip install h5py'): read_mat(tmp_path/'new.mat')

def test_sixteen_bits(tmp_path):
    x = normal_map(rng_for(0, 'p'), 'domain_A', False)
    Image.fromarray((x.clip(0, 1) * 65535).round().astype(np.uint16)).save(tmp_path/'x.png')
    assert abs(read_image(tmp_path/'x.png')[..., 0] - x.clip(0, 1)).max() <= .6 / 65535

# --------------------------------------------------------------------------------------------------------------- torus
def torus_net(border):
    how = dict(name='tf_efficientnet_lite0', layers=[2], border=border, margin=40)
    return BACKBONES.build(how, image_size=(248, 760))

@pytest.mark.parametrize('border, same', [('circular', True), ('reflect', False)])
def test_rolling_a_map_rolls_its_features(border, same):
    "31 × 95 tokens of a CNN of stride 8, one per pair of teeth; 40 pixels are as far as its third stage sees."
    x = torch.from_numpy(normal_map(rng_for(0, 't'), 'domain_C', True))[None, None].expand(-1, 3, -1, -1) * 4 - 1
    x = x.repeat_interleave(8, 2).repeat_interleave(8, 3)
    net = torus_net(border)
    assert net.grid == (31, 95)
    a, b = net(x)[0], net(x.roll((7 * 8, 30 * 8), (2, 3)))[0].roll((-7, -30), (1, 2))
    off = float((a - b).abs().max() / a.std())
    assert off < 1e-3 if same else off > .1
    maps = torch.stack([a[..., 0], b[..., 0]])[:, 0]
    how = dict(name='gaussian', sigma=6., border=border)
    still, rolled = (pixel_maps(m[None], (248, 760), how) for m in (maps[0], maps[1].roll((7, 30), (0, 1))))
    gap = float((still - rolled.roll((-56, -240), (1, 2))).abs().max() / maps[0].std())
    assert gap < 1e-3 if same else gap > .05

@pytest.mark.parametrize('border, same', [('circular', True), ('reflect', False)])
def test_files_too(tmp_path, border, same):
    "From the file on: resizing looks across the seam as well."
    x, net = normal_map(rng_for(0, 't'), 'domain_C', True), torus_net(border)
    out = []
    for by in ((0, 0), (7, 30)):
        tifffile.imwrite(tmp_path/'x.tiff', np.roll(x, by, (0, 1)))
        out.append(net(net.preprocess().image(tmp_path/'x.tiff')[None])[0].roll((-by[0], -by[1]), (1, 2)))
    off = float((out[0] - out[1]).abs().max() / out[0].std())
    assert off < 1e-3 if same else off > .1

def test_tokens_of_a_vit_are_aligned_to_the_teeth():
    vit = dict(name='vit_small_patch14_dinov2', weights='random', blocks=[0])
    assert [BACKBONES.build(vit, image_size=s).grid for s in ((434, 448), (434, 1330))] == [(31, 32), (31, 95)]

def test_shifts_are_whole_teeth():
    x = torch.from_numpy(np.stack([normal_map(rng_for(0, i), 'domain_A', True) for i in range(6)]))[:, None]
    y = AUGMENT.build('circular_shift')(x, torch.Generator().manual_seed(0))
    assert torch.equal(x.flatten(1).sort().values, y.flatten(1).sort().values) and not torch.equal(x, y)
    for a, b in zip(x[:, 0], y[:, 0]):
        at = divmod(int(b.argmax()), 95), divmod(int(a.argmax()), 95)
        assert torch.equal(b, a.roll([p - q for p, q in zip(*at)], (0, 1)))

def false_alarms(border):
    "Scores of unseen normal maps, at the border of the grid and inside; maps begin anywhere, so neither is special."
    how = dict(SIM, rolled=True, train=6, validation=1, good=8, faults=1, other=0, kinds=['sun'])
    x = extract(open_dataset(how, classes=['domain_C']), torus_net(border), progress=False)
    d = learned('patchcore', x, size=1000, select='random')
    s = d.score(x.where(split='test', label=0).batch(slice(None)), 'domain_C').numpy()
    edge = np.zeros(s.shape[1:], bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return s[:, edge].ravel(), s[:, ~edge].ravel()

def test_the_border_raises_no_more_alarms_than_the_inside():
    shift = {}
    for border in ('circular', 'reflect'):
        edge, inside = false_alarms(border)
        shift[border] = ks_2samp(edge, inside).statistic, (edge > np.quantile(inside, .99)).mean()
    assert shift['circular'][0] < .06 and .003 < shift['circular'][1] < .025, shift
    assert shift['reflect'][0] > 2 * shift['circular'][0], shift

# ------------------------------------------------------------------------------------------------------------ controls
def test_the_largest_pixel_separates_warm_faults_and_not_cold_ones():
    "Facts §1.2, domain C: AUROC 1.000 warm, .760 cold."
    how = dict(SIM, good=80, faults=80, kinds=['driving_tooth'], severities=[1.])
    x = cells(open_dataset(how, classes=['domain_C']))
    d, found = learned('max_pixel', x), {}
    for c in ('cold', 'warm'):
        found[c] = auroc(*(scores(d, x.where(split='test', label=k, condition=c)) for k in (0, 1)))
    assert found['warm'] > .98 and .6 < found['cold'] < .88, found

def test_profiles_find_the_planted_tooth():
    kinds = ['driving_tooth', 'driven_tooth']
    x = cells(open_dataset(dict(SIM, train=40, good=40, faults=40, severities=[1.], kinds=kinds), classes=['domain_C']))
    for kind, axis in zip(kinds, ('row', 'column')):
        d, bad = learned('profile', x, axis=axis, gain='matched'), x.where(kind=kind)
        assert isinstance(d, Profile)
        maps = d.score(bad.batch(slice(None)), 'domain_C')
        line = (maps[:, :, 0] if axis == 'row' else maps[:, 0]).argmax(1).numpy()
        assert (line == bad.index['tooth']).mean() > .95
        for c in ('cold', 'warm'):
            good = scores(d, x.where(split='test', label=0, condition=c))
            assert auroc(good, scores(d, bad.where(condition=c))) > .95, (kind, c)

def test_matched_gain_is_blind_for_the_run():
    x = cells(open_dataset(dict(SIM, train=40, good=60, other=60, faults=1), classes=['domain_C']))
    for name in ('profile', 'max_pixel'):
        two, found = (x.where(split='test', label=0), x.where(split='control')), {}
        for g in ('kept', 'matched'): found[g] = auroc(*(scores(learned(name, x, gain=g), part) for part in two))
        assert abs(found['matched'] - .5) < .12, (name, found)
        assert name == 'max_pixel' or found['kept'] > .6, found
        d, part = learned(name, x, gain='matched'), x.where(split='test').batch(slice(8))
        torch.testing.assert_close(*(d.score(part * g, 'domain_C') for g in (.85, 1.)), rtol=1e-3, atol=1e-3)

def test_scores_roll_with_the_map():
    x = cells(open_dataset(dict(SIM, rolled=True), classes=['domain_C']))
    part, by, teeth = x.where(split='test').batch(slice(6)), (5, 61), dict(teeth='any')
    for name, args in (('profile', teeth), ('profile', dict(teeth, gain='matched')), ('max_pixel', {}),
                       ('patchcore', dict(size=200, select='random', line_context='both'))):
        d = learned(name, x, **args)
        a, b = d.score(part, 'domain_C'), d.score(part.roll(by, (1, 2)), 'domain_C').roll((-5, -61), (1, 2))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

def test_a_line_beside_the_patch_helps_to_find_a_faint_row():
    how = dict(SIM, train=40, good=40, faults=40, severities=[.5], kinds=['driving_tooth'])
    x, hits = cells(open_dataset(how, classes=['domain_C'])), {}
    bad = x.where(label=1, condition='cold')
    for context in ('none', 'row'):
        d = learned('patchcore', x, size=1500, select='random', line_context=context)
        assert isinstance(d, PatchCore) and d.banks.tasks[0].members.shape[1] == (2 if context == 'row' else 1)
        rows = d.score(bad.batch(slice(None)), 'domain_C').mean(2).argmax(1).numpy()
        hits[context] = float((rows == bad.index['tooth']).mean())
    assert hits['row'] > hits['none'], hits
