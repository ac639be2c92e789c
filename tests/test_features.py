"Backbone: parity with the origin's recipe and with hooks. Store: kills, torn and foreign stores, full disks, …"
import errno, json, os, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pytest
import timm, torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from adflow.data.datasets import open_dataset
from adflow.data.preprocess import BadFile, Preprocess, shared_data
from adflow.features import disk
from adflow.features.backbone import Backbone
from adflow.features.disk import StoreError
from adflow.features.store import extract
from adflow.features.weights import WeightsError, load_strictly, read_weights
from adflow.parts import PartError

RNG = torch.Generator().manual_seed(0)

# ---------------------------------------------------------------- backbone

def origin_recipe(maps, dim):
    "MoLE-Flow (facts §1.2), literally: zero-padded 3×3 unfold, patch grid upsampled, pooled, mean over layers."
    size, out = maps[0].shape[2:], []
    for m in maps:
        B, C, H, W = m.shape
        u = F.unfold(m, 3, padding=1).view(B, C, 3, 3, H, W)
        u = F.interpolate(u.reshape(B, C * 9, H, W), size=size, mode='bilinear', align_corners=False)
        rows = u.permute(0, 2, 3, 1).reshape(-1, 1, C * 9)
        out.append(F.adaptive_avg_pool1d(rows, dim).view(B, *size, dim))
    return torch.stack(out).mean(0)

@pytest.mark.parametrize('name', ['resnet26', 'wide_resnet50_2'])
def test_origin_recipe(name):
    b = Backbone(name, weights='random', border='zero', image_size=64)
    ref = timm.create_model(name, features_only=True, out_indices=(2, 3)).eval()     # layer2, layer3
    ref.load_state_dict(b.net.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64, generator=RNG)
    with torch.no_grad(): want = origin_recipe(ref(x), 768)
    got, special = b(x)
    assert special is None and got.shape == (2, 8, 8, 768) and b.grid == (8, 8)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()

@pytest.mark.parametrize('name, modules', [
    ('tf_efficientnet_lite0', ['blocks.2', 'blocks.4']), ('convnext_atto', ['stages.1', 'stages.2']),
    ('regnety_002', ['s2', 's3'])])
def test_layers_are_those_of_the_facts(name, modules):
    b = Backbone(name, weights='random', image_size=64, pool='average', combine='concat', dim='all')
    seen = {}
    hooks = [b.net.get_submodule(m).register_forward_hook(lambda _, i, o, m=m: seen.__setitem__(m, o)) for m in modules]
    got, _ = b(torch.randn(1, 3, 64, 64, generator=RNG))
    for h in hooks: h.remove()
    want = [F.avg_pool2d(F.pad(seen[m], (1,) * 4, mode='reflect'), 3, 1) for m in modules]
    want = torch.cat([F.interpolate(w, size=b.grid, mode='bilinear', align_corners=False) for w in want], 1)
    want = want.permute(0, 2, 3, 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('name, size, prefix', [
    ('vit_tiny_patch16_224', (64, 96), 1), ('vit_small_patch14_reg4_dinov2', (56, 84), 5)])
def test_special_tokens_stay_beside(name, size, prefix):
    b = Backbone(name, weights='random', image_size=size, blocks=[1, 3, 5, 11])
    seen = []
    hooks = [b.net.blocks[i].register_forward_hook(lambda _, inp, out: seen.append(out)) for i in (1, 3, 5, 11)]
    x = torch.randn(2, 3, *size, generator=RNG)
    b.net.forward_features(x)
    for h in hooks: h.remove()
    tokens = torch.stack(seen).mean(0)                                   # pre-norm, as the origin's hooks
    patches, special = b(x)
    assert b.special == prefix and tokens.shape[1] == prefix + b.grid[0] * b.grid[1]
    torch.testing.assert_close(special, tokens[:, :prefix])
    torch.testing.assert_close(patches, tokens[:, prefix:].view(2, *b.grid, -1))

def test_stops_after_the_last_layer():
    b = Backbone('vit_tiny_patch16_224', weights='random', blocks=[1], image_size=32)
    b.net.blocks[2].register_forward_hook(lambda *a: pytest.fail('block 2 ran'))
    b(torch.zeros(1, 3, 32, 32))
    c = Backbone(weights='random', layers=[2], image_size=32)
    c.net.blocks[3].register_forward_hook(lambda *a: pytest.fail('blocks.3 ran'))
    assert c(torch.zeros(1, 3, 32, 32))[0].shape == (1, 4, 4, 40)

def test_dims():
    kw = dict(weights='random', image_size=32)
    assert Backbone('resnet18', combine='concat', dim=101, **kw)(torch.zeros(1, 3, 32, 32))[0].shape == (1, 4, 4, 101)
    assert Backbone('resnet18', combine='concat', dim='all', pool='none', **kw).dim == 128 + 256
    assert Backbone('resnet18', combine='concat', dim='all', **kw).dim == (128 + 256) * 9
    with pytest.raises(PartError, match='one dim'): Backbone('resnet18', dim='all', **kw)
    with pytest.raises(PartError, match='0 to 4'): Backbone('resnet18', layers=[2, 5], **kw)
    with pytest.raises(ValueError, match='set image_size'): Backbone('resnet18', **kw)(torch.zeros(1, 3, 64, 64))

def test_embedded_weights_classify():
    "Weights matched by order would run with two tensors swapped, too; a cat and a cup say that they were not."
    data = pytest.importorskip('skimage').data
    b = Backbone()
    for image, classes in [(data.chelsea(), {281, 282, 283, 285}), (data.coffee(), {504, 967, 968, 969, 960, 923})]:
        side = min(image.shape[:2])
        t, l = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = Image.fromarray(image[t:t + side, l:l + side]).resize((224, 224), Image.BICUBIC)
        x = np.asarray(square, np.float32) / 255
        p = b.preprocess()
        x = torch.from_numpy((x - np.float32(p.mean)) / np.float32(p.std)).permute(2, 0, 1)[None]
        with torch.no_grad(): assert int(b.net(x.float()).argmax()) in classes

def test_weights_from_files(tmp_path):
    b = Backbone('resnet18', weights='random', seed=3, image_size=32)
    state = {k: v.contiguous() for k, v in b.net.state_dict().items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, tmp_path / 'half.safetensors')
    torch.save({'state_dict': state}, tmp_path / 'full.pth')
    assert all(v.dtype != torch.float16 for v in read_weights(tmp_path / 'half.safetensors').values())
    full = Backbone('resnet18', weights=tmp_path / 'full.pth', image_size=32)
    assert full.hash == b.hash != Backbone('resnet18', weights='random', seed=4, image_size=32).hash
    assert full.describe()['weights'].endswith('full.pth') and full.describe() | {'weights': 'random'} == b.describe()

    odd = {k: v for k, v in state.items() if k != 'layer1.0.conv1.weight'} | {'odd': torch.ones(1)}
    save_file(odd, tmp_path / 'bad.safetensors')
    with pytest.raises(WeightsError, match='missing layer1.0.conv1.weight; unexpected odd'):
        Backbone('resnet18', weights=tmp_path / 'bad.safetensors')
    save_file({k: v for k, v in state.items() if not k.startswith('fc.')}, tmp_path / 'headless.safetensors')
    x = torch.ones(1, 3, 32, 32)
    headless = Backbone('resnet18', weights=tmp_path / 'headless.safetensors', image_size=32)
    assert torch.equal(headless(x)[0], b(x)[0])
    (tmp_path / 'torn.safetensors').write_bytes((tmp_path / 'half.safetensors').read_bytes()[:5000])
    with pytest.raises(WeightsError, match='torn.safetensors cannot'): read_weights(tmp_path / 'torn.safetensors')
    torch.save({'x': Path('code')}, tmp_path / 'pickle.pth')              # an object, not a tensor: never unpickled
    with pytest.raises(WeightsError, match='pickle.pth'): read_weights(tmp_path / 'pickle.pth')
    with pytest.raises(WeightsError, match='no weight file'): Backbone('resnet18', weights=tmp_path / 'none.pth')

def test_dinov2_own_file():
    "Facebook's file: class token and its position apart, registers under another name, a mask token."
    b = Backbone('vit_small_patch14_reg4_dinov2', weights='random', image_size=56)
    net = timm.create_model('vit_small_patch14_reg4_dinov2', img_size=56)
    state = dict(net.state_dict())
    position = torch.randn(1, 1, 384, generator=RNG)
    own = {k: v for k, v in state.items() if k != 'reg_token'} | {
           'mask_token': torch.zeros(1, 384), 'register_tokens': state['reg_token'],
           'pos_embed': torch.cat([position, state['pos_embed']], 1), 'cls_token': state['cls_token'] - position}
    load_strictly(b.net, own, 'dinov2.pth')
    for k, v in b.net.state_dict().items(): torch.testing.assert_close(v, state[k])

def test_offline(monkeypatch):
    def no_network(*a, **k): raise OSError('Name or service not known')
    monkeypatch.setattr(timm, 'create_model', no_network)
    with pytest.raises(WeightsError, match='path to a .safetensors'): Backbone('resnet18', weights='timm')

def test_v1_stride():
    kw = dict(weights='random', image_size=64)
    a, b = Backbone('resnet50', **kw), Backbone('resnet50', v1_stride=True, **kw)
    x = torch.randn(1, 3, 64, 64, generator=RNG)
    assert a.hash == b.hash
    for m in [*a.net.modules(), *b.net.modules()]:
        if hasattr(m, 'bn3'): m.bn3.weight.fill_(1)          # timm's random residual branches begin at zero
    assert a.grid == b.grid and not torch.allclose(a(x)[0], b(x)[0])
    assert a.describe() != b.describe()
    with pytest.raises(PartError, match='bottleneck'): Backbone('resnet18', v1_stride=True, **kw)

@pytest.mark.skipif(shared_data() is None, reason='no ../shared/data')
def test_keras_resnet_needs_its_stride():
    "With the wrong stride the file loads as strictly, and sees worse: its own logits are less certain."
    file = shared_data() / 'weights' / 'resnet50_keras_v1stride.fp16.safetensors'
    x = torch.stack([Preprocess(mean=(.485, .456, .406), std=(.229, .224, .225)).image(f)
                     for f in sorted((shared_data() / 'hazelnut_toy').rglob('train/good/*'))[:4]])
    top = {}
    for v1 in (True, False):
        b = Backbone('resnet50', weights=file, v1_stride=v1)
        with torch.no_grad(): top[v1] = b.net(x).softmax(1).amax(1).mean().item()
    assert top[True] > top[False]

def test_gradients_reach_the_image():
    b = Backbone(weights='random', image_size=32)
    x = torch.randn(1, 3, 32, 32, generator=RNG, requires_grad=True)
    b.features(x)[0].square().sum().backward()
    assert x.grad.abs().sum() > 0 and not b(x)[0].requires_grad and not any(p.requires_grad for p in b.net.parameters())

# ---------------------------------------------------------------- store

SIZE, BATCH = 32, 4

def write_tree(root, classes=('nut', 'tile'), seed=0):
    rng = np.random.default_rng(seed)
    for c in classes:
        for folder, n in {'train/good': 14, 'test/good': 3, 'test/spot': 3, 'ground_truth/spot': 3}.items():
            (root / c / folder).mkdir(parents=True)
            for i in range(n):
                truth = 'truth' in folder
                pixels = np.zeros((40, 48), np.uint8) if truth else rng.integers(0, 255, (40, 48, 3), np.uint8)
                if 'spot' in folder: pixels[10:20, 10:20] = 255
                Image.fromarray(pixels).save(root / c / folder / (f'{i:03}_mask.png' if truth else f'{i:03}.png'))
    return root

class Counted(Backbone):
    "The default backbone, which counts its batches and can be slowed down or broken."
    calls, pause, spoil = 0, 0, None
    def __call__(self, images):
        self.calls += 1
        time.sleep(self.pause)
        patches, special = super().__call__(images)
        return (patches if self.spoil is None else self.spoil(patches)), special

@pytest.fixture
def tree(tmp_path): return write_tree(tmp_path / 'data')

@pytest.fixture
def net(): return Counted(weights='random', image_size=SIZE)

def run(tree, net, cache, classes=None, **kw):
    "Opens the tree and extracts."
    images = open_dataset('folder', root=tree, classes=classes)
    return extract(images, net, cache=cache, progress=False, **{'batch': BATCH} | kw)

def bytes_of(cache):
    "Everything numeric that is published."
    files = sorted((Path(cache) / 'features').glob('*/*.npy'))
    return {f.relative_to(cache): f.read_bytes() for f in files if '.partial' not in str(f)}

CHILD = '''
import sys, torch
sys.path.insert(0, {tests!r})
from test_features import Counted, run, SIZE
torch.set_num_threads({threads})
net = Counted(weights='random', image_size=SIZE)
net.pause = {pause}
print('go', flush=True)
fs = run({tree!r}, net, {cache!r})
print(net.calls, fs.fingerprint)
'''

def child(tree, cache, pause):
    code = CHILD.format(tests=str(Path(__file__).parent), tree=str(tree), cache=str(cache), pause=pause,
                        threads=torch.get_num_threads())
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                            cwd=Path(__file__).parents[1], env=os.environ | {'TQDM_DISABLE': '1'})

def notes(cache):
    "How many chunks are noted in unfinished stores."
    return sum(f.read_text().count('"chunk"') for f in Path(cache).glob('features/*.partial/progress.jsonl'))

def test_killed_and_resumed(tree, net, tmp_path):
    whole = run(tree, net, tmp_path / 'whole')
    total, net.calls = net.calls, 0
    p = child(tree, tmp_path / 'cut', .3)
    stop = time.time() + 120
    while notes(tmp_path / 'cut') < 2 and p.poll() is None and time.time() < stop: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not list((tmp_path / 'cut' / 'features').glob('*/manifest.json')), 'a half store was published'
    done = notes(tmp_path / 'cut')
    journal = next((tmp_path / 'cut').glob('features/*.partial/progress.jsonl'))
    with open(journal, 'a') as f: f.write('{"chunk": ["train", 8, 12], "cr')    # the kill hit the middle of a note
    resumed = run(tree, net, tmp_path / 'cut')
    assert done >= 2 and net.calls == total - done
    assert bytes_of(tmp_path / 'cut') == bytes_of(tmp_path / 'whole') and resumed.fingerprint == whole.fingerprint

def test_killed_before_the_rename(tree, net, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(disk.os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): run(tree, net, tmp_path, ['nut'])
    calls = net.calls
    assert not bytes_of(tmp_path)
    run(tree, net, tmp_path, ['nut'])
    assert net.calls == calls, 'a complete extraction was thrown away'

def test_partial_with_a_wrong_chunk(tree, net, tmp_path, monkeypatch):
    "A chunk that was noted, but is not what the note says (power failure), is done again."
    with monkeypatch.context() as m:
        m.setattr(disk, '_publish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): run(tree, net, tmp_path / 'a', ['nut'])
    file = next((tmp_path / 'a').glob('features/*.partial/train.npy'))
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    net.calls = 0
    run(tree, net, tmp_path / 'a', ['nut'])
    assert net.calls == 1
    run(tree, net, tmp_path / 'b', ['nut'])
    assert bytes_of(tmp_path / 'a') == bytes_of(tmp_path / 'b')

def test_two_processes(tree, net, tmp_path):
    a, b = child(tree, tmp_path / 'both', .2), child(tree, tmp_path / 'both', .2)
    out = [p.communicate(timeout=180)[0].split() for p in (a, b)]
    assert a.returncode == b.returncode == 0
    whole = run(tree, net, tmp_path / 'one')
    assert out[0][2] == out[1][2] == whole.fingerprint
    assert int(out[0][1]) + int(out[1][1]) == net.calls, 'a batch was extracted twice'
    assert bytes_of(tmp_path / 'both') == bytes_of(tmp_path / 'one')

def _truncate(f): f.write_bytes(f.read_bytes()[:-100])
def _append(f): f.write_bytes(f.read_bytes() + b'\0' * 8)
def _flip(f, at=-9):
    data = bytearray(f.read_bytes())
    data[at] ^= 1
    f.write_bytes(data)
def _skip_one(f):
    f.write_text(json.dumps(json.loads(f.read_text()) | {'skipped': [{'file': 'x', 'split': 'train', 'row': 0}]}))
FAULTS = {
    'cut': ('train.npy', _truncate), 'longer': ('test.npy', _append), 'bit': ('train.npy', _flip),
    'pooled bit': ('train.pooled.npy', _flip), 'header': ('train.npy', lambda f: _flip(f, 3)),
    'no file': ('validation.npy', Path.unlink), 'no manifest': ('manifest.json', Path.unlink),
    'manifest edited': ('manifest.json', _skip_one), 'manifest cut': ('manifest.json', _truncate),
    'index': ('index.parquet', _flip),
    'manifest is a list': ('manifest.json', lambda f: f.write_text('[]')),
}

@pytest.mark.parametrize('fault', FAULTS)
def test_torn_store_is_rebuilt(fault, tree, net, tmp_path):
    run(tree, net, tmp_path, ['nut'])
    before = bytes_of(tmp_path)
    name, damage = FAULTS[fault]
    damage(next((tmp_path / 'features').glob(f'*/{name}')))
    net.calls = 0
    with pytest.warns(UserWarning, match='extracted anew'): run(tree, net, tmp_path, ['nut'])
    assert net.calls > 0 and bytes_of(tmp_path) == before

def test_foreign_store_is_rebuilt(tree, net, tmp_path):
    "The store of one class under the name of the other: everything in it is consistent, and wrong."
    run(tree, net, tmp_path)
    before = bytes_of(tmp_path)
    nut, tile = sorted((tmp_path / 'features').glob('*-*-*[0-9a-f]/'))
    shutil.rmtree(nut)
    shutil.copytree(tile, nut)
    with pytest.warns(UserWarning, match='other images or settings'): run(tree, net, tmp_path)
    assert bytes_of(tmp_path) == before

def test_nothing_is_extracted_twice(tree, net, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        both = run(tree, net, tmp_path)
        net.calls = 0
        swapped, one = run(tree, net, tmp_path, ['tile', 'nut']), run(tree, net, tmp_path, ['tile'])
        shutil.move(tree, tmp_path / 'elsewhere')
        moved = run(tmp_path / 'elsewhere', net, tmp_path)
    assert net.calls == 0
    assert list(swapped.index['class'].unique()) == ['tile', 'nut']
    for fs in (swapped, one, moved):
        for i in (0, 7, len(fs) - 1):
            j = both.index.index[both.index['image'] == fs.index['image'][i].replace('elsewhere', 'data')][0]
            assert torch.equal(fs.batch([i]), both.batch([j])) and fs.index['label'][i] == both.index['label'][j]

def test_every_setting_is_in_the_key(tree, net, tmp_path):
    def folder(net=net, **kw):
        kw = dict(preprocess=net.preprocess(), dtype='float16', batch=BATCH) | kw
        return disk.Plan(open_dataset('folder', root=tree, classes=['nut']), net, cache=tmp_path, **kw).folder
    base, seen = folder(), [folder(dtype='float32'), folder(batch=5)]
    seen += [folder(preprocess=net.preprocess(**kw)) for kw in (dict(interpolation='bicubic'), dict(mean=(0, 0, 0)))]
    for kw in [dict(border='zero'), dict(layers=[2]), dict(pool='none'), dict(dim=64), dict(seed=1), dict(kernel=5)]:
        seen.append(folder(Backbone(**dict(weights='random', image_size=SIZE) | kw)))
    _flip(next((tree / 'nut/train/good').glob('*.png')), -30)
    seen.append(folder())
    assert len({base, *seen}) == len(seen) + 1

def test_against_direct_computation(tree, net, tmp_path):
    fs = run(tree, net, tmp_path, dtype='float32')
    p, order = net.preprocess(), np.random.default_rng(0).permutation(len(fs))
    train = fs.where(split='train', **{'class': 'tile'})
    want = net(torch.stack([p.image(f) for f in train.index['image'][:BATCH]]))[0]   # the batch of the extraction
    assert torch.equal(train.batch(range(BATCH)), want)
    assert torch.equal(fs.batch(order), torch.cat([fs.batch([i]) for i in order]))
    everything = torch.cat([net(p.image(f)[None])[0] for f in fs.index['image']])
    torch.testing.assert_close(fs.batch(slice(None)), everything, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fs.pooled(), everything.mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert torch.equal(fs.where(label=1).to('cpu').batch([2, 0]), fs.where(label=1).batch([2, 0]))
    assert fs.masks().shape == (len(fs), SIZE, SIZE)
    assert fs.masks().any((1, 2)).tolist() == fs.index['label'].astype(bool).tolist()
    assert fs.images(slice(0, 2)).shape == (2, SIZE, SIZE, 3)
    none = fs.where(label=7)
    assert len(none) == len(none.masks()) == len(none.batch(slice(None))) == len(none.pooled()) == 0

def test_special_tokens_are_stored(tree, tmp_path):
    b = Backbone('vit_tiny_patch16_224', weights='random', image_size=SIZE)
    fs = run(tree, b, tmp_path, ['nut'])
    x = torch.stack([b.preprocess().image(f) for f in fs.index['image'][:BATCH]])
    assert fs.special_batch(range(BATCH)).shape == (BATCH, 1, 192)
    torch.testing.assert_close(fs.special_batch(range(BATCH)), b(x)[1], rtol=2e-3, atol=2e-3)
    assert torch.equal(fs.to('cpu').special_batch([3, 1]), fs.special_batch([3, 1]))

def test_bad_features_are_named(tree, net, tmp_path):
    def spoil(value):
        def f(x):
            if net.calls == 2: x[1, 0, 0, 0] = value
            return x
        return f
    first = sorted((tree / 'nut').rglob('*/*/*.png'))
    for value, match in [(float('nan'), 'NaN'), (float('inf'), 'NaN or infinite'), (7e4, 'use dtype: float32')]:
        net.calls, net.spoil = 0, spoil(value)
        with pytest.raises(StoreError, match=match) as e: run(tree, net, tmp_path / str(value), ['nut'])
        assert any(f.name in str(e.value) and str(f.relative_to(tree)) in str(e.value) for f in first)
        assert not bytes_of(tmp_path / str(value))
    net.calls = 0
    assert run(tree, net, tmp_path / 'wide', ['nut'], dtype='float32').batch(slice(None)).max() == 7e4

def test_bad_images(tree, net, tmp_path):
    "A picture whose header is right and whose pixels are not: found only when it is decoded."
    good = run(tree, net, tmp_path / 'good', ['nut'])
    bad = tree / 'nut/train/good/005.png'
    data = bytearray(bad.read_bytes())
    data[len(data) // 2:len(data) // 2 + 50] = bytes(50)
    bad.write_bytes(data)
    with pytest.raises(BadFile, match='005.png'): run(tree, net, tmp_path / 'bad', ['nut'])
    fs = run(tree, net, tmp_path / 'bad', ['nut'], on_bad='skip')
    assert [Path(s['file']) for s in fs.manifest['skipped']] == [bad] and len(fs) == len(good) - 1
    assert str(bad) not in set(fs.index['image']) and list(fs.index.index) == list(range(len(fs)))
    for i in (0, 5, len(fs) - 1):
        j = good.index.index[good.index['image'] == fs.index['image'][i]][0]
        torch.testing.assert_close(fs.batch([i]), good.batch([j]), rtol=5e-3, atol=5e-3)
    calls = net.calls
    assert len(run(tree, net, tmp_path / 'bad', ['nut'], on_bad='skip')) == len(fs) and net.calls == calls
    with pytest.raises(BadFile, match='005.png'): run(tree, net, tmp_path / 'bad', ['nut'])

def test_full_disk(tree, net, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(disk.shutil, 'disk_usage', lambda p: usage._replace(free=1000))
        with pytest.raises(OSError, match='MB are free.*ADFLOW_CACHE') as e: run(tree, net, tmp_path, ['nut'])
        assert e.value.errno == errno.ENOSPC and net.calls == 0
    def open_full(path, mode='r'):                  # the second chunk no longer fits
        if mode == 'r+b' and net.calls == 2: raise OSError(errno.ENOSPC, 'No space left on device')
        return open(path, mode)
    with monkeypatch.context() as m:
        m.setattr(disk, 'open', open_full, raising=False)
        with pytest.raises(OSError, match='no room for features') as e: run(tree, net, tmp_path, ['nut'])
        assert str(tmp_path) in str(e.value) and not bytes_of(tmp_path)
    run(tree, net, tmp_path, ['nut'])
    assert bytes_of(tmp_path)

def test_errors_say_what_to_do(tree, net, tmp_path):
    with pytest.raises(PartError, match="Did you mean 'float16'"): run(tree, net, tmp_path, dtype='float61')
    with pytest.raises(PartError, match='the backbone takes'): run(tree, net, tmp_path, preprocess=Preprocess(size=64))

# ---------------------------------------------------------------- real images

@pytest.mark.skipif(shared_data() is None, reason='no ../shared/data')
def test_nearest_neighbour_floor(tmp_path):
    "The recipe of shared/data/README.md on the features of this room: image AUROC 1.000 there."
    from sklearn.metrics import roc_auc_score
    data = open_dataset('folder', root=shared_data(), classes=['mvtec_bottle'], validation=0)
    fs = extract(data, Backbone(), cache=tmp_path, progress=False)
    train, test = fs.where(split='train'), fs.where(split='test')
    x = train.batch(slice(None)).reshape(-1, fs.dim)
    mean, std = x.mean(0), x.std(0)
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:15_000]
    bank = (x[pick] - mean) / std
    norm = bank.square().sum(1)
    scores = []
    for i in range(len(test)):
        q = (test.batch([i]).reshape(-1, fs.dim) - mean) / std
        near = (q.square().sum(1)[:, None] + norm - 2 * q @ bank.T).amin(1).clamp_min(0).sqrt()
        scores.append(near.topk(3).values.mean().item())
    assert len(train) == 209 and len(test) == 83
    assert roc_auc_score(test.index['label'], scores) >= .99
