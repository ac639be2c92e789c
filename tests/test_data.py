"What the data notebooks do not tell: bad input, readers on generated trees, two processes at once, a kill, real data."

import os
import signal
import subprocess
import sys
import time
import warnings
from hashlib import sha1
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from adflow.data import synthetic
from adflow.data.datasets import MPDD, MVTEC, VISA, DataError, DataWarning, open_dataset
from adflow.data.preprocess import BadFile, Preprocess, image_size, read_image, read_mask, shared_data
from adflow.parts import PartError

SMALL = dict(train=3, validation=1, good=2, defects=1, size=48)
real = pytest.mark.skipif(shared_data() is None, reason='no real data: neither $ADFLOW_SHARED_DATA nor ../shared/data')


def write(path, value=None, size=(12, 16), mode='RGB'):
    "A file of noise, or of one value."
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == 'L' else (*size, 3)
    a = np.random.default_rng(len(str(path))).integers(0, 255, shape) if value is None else np.full(shape, value)
    Image.fromarray(a.astype(np.uint8)).save(path)
    return path


def tree(root, classes=('cup',), train=4, good=2, defect=2):
    "A tree in the MVTec layout."
    for c in classes:
        for i in range(train): write(root/c/f'train/good/{i:03}.png')
        for i in range(good): write(root/c/f'test/good/{i:03}.png')
        for i in range(defect):
            write(root/c/f'test/crack/{i:03}.png')
            write(root/c/f'ground_truth/crack/{i:03}_mask.png', 255, mode='L')
    return root


def digest(root):
    files = [p for p in Path(root).rglob('*') if p.is_file()]
    return {p.relative_to(root).as_posix(): sha1(p.read_bytes()).hexdigest() for p in files}


# --- planted faults --------------------------------------------------------------------------------------------------

def _cut(root):
    p = root/'cup/train/good/001.png'
    p.write_bytes(p.read_bytes()[:-20])
    return p, 'cut off'

def _empty(root):
    p = root/'cup/test/good/000.png'
    p.write_bytes(b'')
    return p, 'not a readable image'

def _text(root):
    p = root/'cup/test/crack/000.png'
    p.write_text('<html>404</html>')
    return p, 'not a readable image'

def _no_mask(root):
    (root/'cup/ground_truth/crack/001_mask.png').unlink()
    return root/'cup/test/crack/001.png', 'no mask'

def _no_masks_at_all(root):
    for p in (root/'cup/ground_truth/crack').iterdir(): p.unlink()
    return root/'cup/test/crack/000.png', 'no mask'

def _mask_size(root):
    return write(root/'cup/ground_truth/crack/000_mask.png', 255, (16, 12), 'L'), 'the mask is 16×12, its image 12×16'

def _mask_broken(root):
    p = root/'cup/ground_truth/crack/000_mask.png'
    p.write_bytes(p.read_bytes()[:40])
    return p, 'not a readable image (UnidentifiedImageError: cannot identify image file it)'


@pytest.mark.parametrize('fault', [_cut, _empty, _text, _no_mask, _no_masks_at_all, _mask_size, _mask_broken])
def test_planted_fault_is_named_then_skipped(tmp_path, fault):
    root = tree(tmp_path/'d').resolve()
    whole = open_dataset('folder', root, validation=0)
    file, why = fault(root)
    with pytest.raises(DataError) as e: open_dataset('folder', root)
    assert str(file) in str(e.value) and why in str(e.value) and 'on_bad: skip' in str(e.value)
    with pytest.warns(DataWarning) as said: data = open_dataset('folder', root, validation=0, on_bad='skip')
    assert any(str(file) in str(w.message) for w in said)
    assert str(file) in [s['file'] for s in data.skipped]
    assert len(data) == len(whole) - len(data.skipped)
    assert str(file) not in set(data.index['image']) | set(data.index['mask'].dropna())


@pytest.mark.parametrize('ask, why', [
    (dict(dataset='foldr'), "Did you mean 'folder'"),
    (dict(dataset={'name': 'folder', 'rooot': 1}), "takes no 'rooot'"),
    (dict(dataset='folder', classes=['cupp']), "Did you mean 'cup'"),
    (dict(dataset='folder', classes=['cup', 'cup']), 'named twice'),
    (dict(dataset='folder', classes='cup'), 'give a list'),
    (dict(dataset='folder', on_bad='ignore'), 'raise or skip'),
    (dict(dataset='folder', validation=1.), 'validation=1.0'),
    (dict(dataset='folder', root='nowhere/at/all'), 'no such folder'),
    (dict(dataset='folder', root=None), 'data_root'),
    (dict(dataset='mvtec', classes=['botle']), "Did you mean 'bottle'"),
    (dict(dataset='mpdd'), 'no folder with a train folder for bracket_black'),
    (dict(dataset='visa'), '1cls.csv'),
    (dict(dataset={'name': 'embedded', 'kinds': ['scrach']}, root='new'), "Did you mean 'scratch'"),
    (dict(dataset={'name': 'embedded', 'train': 0}, root='new'), 'train=0'),
    (dict(dataset={'name': 'embedded', 'train': 'many'}, root='new'), "train='many'"),
    (dict(dataset='embedded', classes=['bricks'], root='new'), "Did you mean 'brick'"),
])
def test_wrong_question_names_the_nearest_right_one(tmp_path, monkeypatch, ask, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, PartError), match=why.replace('(', r'\(')):
        open_dataset(**{'root': tree(tmp_path/'d'), **ask})
    assert not (tmp_path/'new').exists()


def test_class_without_normals_is_an_error_even_when_skipping(tmp_path):
    root = tree(tmp_path, ['cup', 'plate'])
    for p in (root/'plate/train/good').iterdir(): p.unlink()
    with pytest.raises(DataError, match="class 'plate' has no normal images"):
        open_dataset('folder', root, on_bad='skip')
    assert open_dataset('folder', root, classes=['cup']).classes == ['cup']


@pytest.mark.parametrize('good, defect, why', [
    (0, 0, 'no test images'), (0, 2, 'no test good'), (2, 0, 'no test defect')])
def test_class_that_cannot_be_evaluated_warns(tmp_path, good, defect, why):
    with pytest.warns(DataWarning, match=why): open_dataset('folder', tree(tmp_path, good=good, defect=defect))


def test_no_class_at_all(tmp_path):
    with pytest.raises(DataError, match='no class found'): open_dataset('folder', tmp_path)


def test_defects_in_train_are_not_learned(tmp_path):
    root = tree(tmp_path)
    write(root/'cup/train/crack/000.png')
    with pytest.warns(DataWarning, match='only train/good'): data = open_dataset('folder', root, validation=0)
    assert len(data.where(split='train')) == 4


# --- readers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, counts', [('mvtec', MVTEC), ('mpdd', MPDD)])
def test_published_dataset(tmp_path, name, counts):
    root = tree(tmp_path, counts)
    with pytest.warns(DataWarning) as said: data = open_dataset(name, root, validation=0)
    assert data.classes == list(counts) == sorted(counts)
    c = data.classes[0]
    assert f"class '{c}' has 4 train and 4 test images" in str(said[0].message)
    assert f'the published split {counts[c][0]} and {counts[c][1]}' in str(said[0].message)
    assert len(said) == len(counts)
    for p in sorted((root/c).rglob('*.png')): p.unlink()
    (root/c/'train/good').rmdir()
    (root/c/'train').rmdir()
    with pytest.raises(DataError, match=f'no folder with a train folder for {c}'): open_dataset(name, root)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert open_dataset(name, root, classes=data.classes[:0:-1]).classes == data.classes[:0:-1]


def test_full_counts_are_silent(tmp_path):
    train, test = MPDD['connector']
    root = tree(tmp_path, ['connector'], train=train, good=30, defect=test - 30)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = open_dataset('mpdd', root, classes=['connector'])  # held-out normals do not count as missing
    assert data.counts().loc['connector'].tolist() == [115, 13, 30, 14]


def visa_tree(root, classes=('candle', 'pcb1')):
    rows = ['object,split,label,image,mask']
    for c in classes:
        for i in range(3): rows.append(f'{c},train,normal,{c}/Data/Images/Normal/{i:04}.JPG,')
        rows.append(f'{c},test,normal,{c}/Data/Images/Normal/0003.JPG,')
        rows.append(f'{c},test,anomaly,{c}/Data/Images/Anomaly/000.JPG,{c}/Data/Masks/Anomaly/000.png')
        for i in range(4): write(root/f'{c}/Data/Images/Normal/{i:04}.JPG', size=(20, 30))
        write(root/f'{c}/Data/Images/Anomaly/000.JPG', size=(20, 30))
        write(root/f'{c}/Data/Masks/Anomaly/000.png', 2, (20, 30), 'L')  # VisA stores the kind's number
    (root/'split_csv').mkdir()
    (root/'split_csv/1cls.csv').write_text('\n'.join(rows) + '\n')
    return root


def test_visa(tmp_path):
    root = visa_tree(tmp_path)
    with pytest.warns(DataWarning) as said: data = open_dataset('visa', root, validation=0)
    assert ["'candle' has 3 train and 2 test" in str(said[0].message), len(said)] == [True, 2]
    assert data.classes == ['candle', 'pcb1'] and list(data.index.columns)[:4] == ['class', 'split', 'kind', 'label']
    assert data.counts().loc['pcb1'].tolist() == [3, 0, 1, 1]
    bad = data.where(label=1).index
    assert list(bad.kind) == ['anomaly'] * 2 and Preprocess(16).mask(bad['mask'][0]).all()
    assert data.index['mask'][data.index.label == 0].isna().all()
    with pytest.raises(DataError, match="'pcb1'"): open_dataset('visa', root, classes=['pcb'])
    table = root/'split_csv/1cls.csv'
    table.write_text(table.read_text().replace('candle/Data/Masks/Anomaly/000.png', ''))
    with pytest.raises(DataError, match='candle/Data/Images/Anomaly/000.JPG: no mask'): open_dataset('visa', root)
    table.write_text(table.read_text().replace('object', 'class'))
    with pytest.raises(DataError, match='object'): open_dataset('visa', root)
    assert len(VISA) == 12


def test_visa_converted_tree_says_what_to_do(tmp_path):
    tree(tmp_path/'1cls', ['candle'])
    with pytest.raises(DataError, match='use dataset: folder with data_root: .*1cls'): open_dataset('visa', tmp_path)


def test_folder_variants(tmp_path):
    root = tree(tmp_path/'cup_only', ['.'])                       # a root that is one class
    write(root/'validation/good/7.png')
    write(root/'test/crack/10.png')
    write(root/'ground_truth/crack/10.png', 255, mode='L')        # mask without _mask
    (root/'test/crack/.DS_Store').write_text('x')
    data = open_dataset('folder', root, validation=.5)            # the tree's own validation counts, not the share
    assert data.classes == ['cup_only'] and data.counts().loc['cup_only'].tolist() == [4, 1, 2, 3]
    assert [Path(p).name for p in data.where(kind='crack').index['image']] == ['000.png', '001.png', '10.png']
    assert data.where(kind='crack', split='train').classes == []


def test_hold_out_and_fingerprint(tmp_path):
    root = tree(tmp_path, ['cup', 'plate'], train=20)
    a, b, c = (open_dataset('folder', root, seed=s) for s in (0, 0, 1))
    held = [set(d.where(split='validation').index['image']) for d in (a, b, c)]
    assert held[0] == held[1] != held[2] and len(held[0]) == 4
    assert a.fingerprint == b.fingerprint != c.fingerprint
    moved = root.rename(root.parent/'moved')                      # the place does not matter, the content does
    assert open_dataset('folder', moved).fingerprint == a.fingerprint
    write(moved/'cup/train/good/000.png', 7)
    assert open_dataset('folder', moved).fingerprint != a.fingerprint


def test_cut_away_is_reported(tmp_path):
    for i in range(2): write(tmp_path/f'c/train/good/{i}.png', size=(20, 60))
    write(tmp_path/'c/test/good/0.png', size=(20, 60))
    for i, x in enumerate([0, 28]):
        write(tmp_path/f'c/test/crack/{i}.png', size=(20, 60))
        m = np.zeros((20, 60), np.uint8)
        m[5:15, x:x + 6] = 255
        (tmp_path/'c/ground_truth/crack').mkdir(parents=True, exist_ok=True)
        Image.fromarray(m).save(tmp_path/f'c/ground_truth/crack/{i}.png')
    data = open_dataset('folder', tmp_path)
    assert not len(data.cut_away(Preprocess(20)))
    with pytest.warns(DataWarning, match='1 of 2 defects and removes 1 of them whole'):
        lost = data.cut_away(Preprocess(20, crop=20))
    assert lost.lost.tolist() == [1.] and lost.image[0].endswith('crack/0.png')


# --- preprocessing ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_every_mode_is_three_channels(tmp_path, mode):
    path = tmp_path/('x.tif' if mode == 'CMYK' else 'x.png')
    Image.new('RGB', (9, 7), (255, 255, 255)).convert(mode).save(path)
    a = read_image(path)
    assert a.shape == (7, 9, 3) and a.dtype == np.float32 and image_size(path) == (7, 9)
    if mode != 'CMYK': assert (a == 1).all()


def test_float_image_keeps_its_values(tmp_path):
    a = np.random.default_rng(0).normal(3, 2, (8, 8)).astype(np.float32)
    tifffile.imwrite(tmp_path/'x.tif', a)
    x = Preprocess(8, mean=(0, 0, 0), std=(1, 1, 1)).image(tmp_path/'x.tif')
    np.testing.assert_array_equal(x[1].numpy(), a)
    a[3, 3] = np.inf
    tifffile.imwrite(tmp_path/'x.tif', a)
    with pytest.raises(BadFile, match='x.tif: 3 values are NaN or infinite'): Preprocess(8).image(tmp_path/'x.tif')


def test_channels_first_tiff(tmp_path):
    a = np.random.default_rng(0).random((3, 10, 12)).astype(np.float32)
    tifffile.imwrite(tmp_path/'x.tif', a, photometric='minisblack')
    np.testing.assert_array_equal(read_image(tmp_path/'x.tif'), a.transpose(1, 2, 0))
    assert image_size(tmp_path/'x.tif') == (10, 12)
    tifffile.imwrite(tmp_path/'volume.tif', np.zeros((9, 10, 12), np.uint8), photometric='minisblack')
    with pytest.raises(BadFile, match=r'volume.tif: expected one image .* found shape \(9, 10, 12\)'):
        read_image(tmp_path/'volume.tif')


def test_jpeg_mask_ignores_ringing(tmp_path):
    m = np.zeros((64, 64), np.uint8)
    m[20:40, 20:44] = 255
    Image.fromarray(m).save(tmp_path/'m.jpg', quality=60)
    assert (read_mask(tmp_path/'m.jpg') == (m > 0)).mean() > .999


def test_identity_and_normalization(tmp_path):
    p = write(tmp_path/'x.png', size=(32, 32))
    a = np.asarray(Image.open(p)) / 255
    x = Preprocess(32, mean=(.1, .2, .3), std=(.5, .25, .125)).image(p)
    ref = torch.from_numpy((a - [.1, .2, .3]) / [.5, .25, .125]).permute(2, 0, 1)
    assert x.dtype == torch.float32 and torch.allclose(x.double(), ref.double(), atol=1e-5)


# --- the embedded stream ---------------------------------------------------------------------------------------------

def test_splits_share_no_pixel():
    assert len(synthetic.SURFACES) >= 6
    for c, s in synthetic.SURFACES.items():
        used = np.zeros(synthetic.photograph(c).shape[:2], int)
        for l, t, r, b in (s.train, s.validation, s.test): used[t:b, l:r] += 1
        assert used.max() == 1, c


def test_crops_stay_in_their_boxes(monkeypatch):
    "The true test of disjointness: a photograph with another colour per split gives crops of that colour only."
    for c, s in synthetic.SURFACES.items():
        a = np.zeros((*synthetic.photograph(c).shape[:2], 3), np.uint8)
        for k, (l, t, r, b) in enumerate((s.train, s.validation, s.test)): a[t:b, l:r, k] = 200
        monkeypatch.setattr(synthetic, 'photograph', {c: a}.get)
        for k, split in enumerate(synthetic.SPLITS):
            for i in range(60):
                seen = synthetic.crop(c, split, synthetic.rng_for(9, c, split, i), 32).reshape(-1, 3).min(0)
                assert seen[k] > 150 and (np.delete(seen, k) == 0).all(), (c, split)
        monkeypatch.undo()


def test_open_embedded_uses_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('ADFLOW_CACHE', str(tmp_path))
    data = open_dataset({'name': 'embedded', **SMALL}, classes=['moon', 'brick'])
    assert data.classes == ['moon', 'brick'] and data.counts().loc['moon'].tolist() == [3, 1, 2, 6]
    before = digest(tmp_path)
    again = open_dataset({'name': 'embedded', **SMALL}, classes=['moon', 'brick'])
    assert again.fingerprint == data.fingerprint and digest(tmp_path) == before
    assert [p.name for p in (tmp_path/'embedded').iterdir()] == [data.root.name]
    assert open_dataset({'name': 'embedded', **SMALL, 'seed': 1}, classes=['moon']).root != data.root
    defects = data.where(label=1).index
    assert (defects.severity > 0).all() and defects['mask'].notna().all()


def test_saved_mask_is_the_painted_one(tmp_path):
    "The files on disk keep the promise too: the same clean crop, redrawn, equals the image outside the mask."
    root = synthetic.write_embedded(tmp_path, classes=['grass'], **SMALL)
    for kind in synthetic.DEFECTS:
        rng = synthetic.rng_for(0, 'grass', 'test', kind, 0)
        clean = synthetic.crop('grass', 'test', rng, SMALL['size'])
        image = np.asarray(Image.open(root/f'grass/test/{kind}/000.png').convert('RGB'))
        mask = np.asarray(Image.open(root/f'grass/ground_truth/{kind}/000_mask.png')) > 0
        assert mask.any() and np.array_equal(image[~mask], clean[~mask]), kind
        assert (image != clean).any(-1)[mask].mean() > .8, kind


STREAM = dict(classes=['brick', 'moon', 'film'], train=30, validation=1, good=2, defects=2, size=96)
WRITE = f'import sys; from adflow.data.synthetic import write_embedded; write_embedded(sys.argv[1], **{STREAM})'


def start(root):
    env = dict(os.environ, TQDM_DISABLE='1', OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', WRITE, str(root)], env=env, stderr=subprocess.PIPE)


def test_two_processes_and_a_kill(tmp_path):
    both = [start(tmp_path/'both'), start(tmp_path/'both')]
    for p in both:
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err.decode()
    whole = digest(tmp_path/'both')
    assert len(whole) == 3 * (30 + 1 + 2 + 6 * 2 * 2 + 2)         # no temporary file is left

    killed = start(tmp_path/'killed')                             # kill it in the middle of a class
    until = time.time() + 120
    begun = '.*.tmp/*/train/good/005.png'
    while not list((tmp_path/'killed').glob(begun)) and killed.poll() is None and time.time() < until: time.sleep(.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert digest(tmp_path/'killed') != whole
    synthetic.write_embedded(tmp_path/'killed', **STREAM)
    assert {k: v for k, v in digest(tmp_path/'killed').items() if '.tmp/' not in k} == whole
    for p in (tmp_path/'killed').glob('.*.tmp'): os.utime(p, (0, 0))  # hours later the leavings are swept up
    (tmp_path/'killed/moon/severity.csv').unlink()                # and a class that lost a file is written again
    synthetic.write_embedded(tmp_path/'killed', **STREAM)
    assert digest(tmp_path/'killed') == whole


# --- real data -------------------------------------------------------------------------------------------------------

@real
@pytest.mark.parametrize('name, counts', [('mvtec_bottle', [209, 0, 20, 63]), ('mvtec_toothbrush', [48, 0, 12, 30]),
                                          ('magnetic_tile', [300, 0, 100, 192]), ('hazelnut_toy', [28, 0, 6, 17])])
def test_real(name, counts):
    data = open_dataset('folder', shared_data(), classes=[name], validation=0)
    assert data.counts().loc[name].tolist() == counts and not data.skipped
    row = data.where(label=1).index.iloc[0]
    p = Preprocess(64)
    assert p.image(row['image']).shape == (3, 64, 64)
    assert p.mask(row['mask'], like=image_size(row['image'])).any()
