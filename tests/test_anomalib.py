"""anomalib's four models on our images: the same images in the same order, the same seed the same maps, our evaluator.
$ADFLOW_ANOMALIB names the Python of an environment with anomalib; without it only the refusals are tested."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adflow.data.datasets import open_dataset
from adflow.data.preprocess import Preprocess
from adflow.evaluate.anomalib import AnomalibError, run_anomalib
from adflow.evaluate.metrics import METRICS, evaluate_class, image_metrics
from adflow.features.backbone import Backbone
from adflow.features.store import extract

PYTHON = os.environ.get('ADFLOW_ANOMALIB')
needs = pytest.mark.skipif(not PYTHON, reason='$ADFLOW_ANOMALIB names no Python with anomalib')
ARGS = {'patchcore': dict(image_size=96, weights='embedded'),
        'dinomaly': dict(image_size=56, weights='random', steps=2, batch_size=4,
                         model_args={'encoder_name': 'vit_small_patch14_reg4_dinov2'}),
        'draem': dict(image_size=32, steps=1, batch_size=2),
        'fastflow': dict(image_size=64, weights='random', steps=3)}

def write_tree(root, classes=('dots', 'waves'), size=96):
    "Striped squares; the defect is a red patch nobody can overlook."
    rng, at = np.random.default_rng(0), np.mgrid[:size, :size]
    for k, c in enumerate(classes):
        for split, kind, n in (('train', 'good', 5), ('test', 'good', 3), ('test', 'hole', 3)):
            for i in range(n):
                a = 120 + 40 * np.sin(at[k] / 4 + rng.uniform(0, 6))[..., None] + rng.normal(0, 6, (size, size, 3))
                file = root / c / split / kind / f'{i:03}.png'
                file.parent.mkdir(parents=True, exist_ok=True)
                if kind == 'hole':
                    top, left = rng.integers(10, size - 34, 2)
                    mask = np.zeros((size, size), np.uint8)
                    mask[top:top + 24, left:left + 24] = 255
                    a[mask > 0] = 250, 20, 20
                    gt = root / c / 'ground_truth' / kind / f'{i:03}_mask.png'
                    gt.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(gt)
                Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(file)
    return root

@pytest.fixture(scope='module')
def root(tmp_path_factory): return write_tree(tmp_path_factory.mktemp('tree'))

@pytest.fixture(scope='module')
def images(root): return open_dataset('folder', root, ['waves', 'dots'], validation=.2)


# ---- without anomalib --------------------------------------------------------------------------------------

def test_without_anomalib_the_error_says_what_to_install(images, monkeypatch):
    monkeypatch.delenv('ADFLOW_ANOMALIB', raising=False)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(AnomalibError, match=r"pip install 'adflow\[anomalib\]'"): run_anomalib('patchcore', images)

def test_the_extra_is_in_the_project():
    project = (Path(__file__).resolve().parents[1] / 'pyproject.toml').read_text()
    assert '\nanomalib = ["anomalib>=2.7' in project

@pytest.mark.skipif(bool(importlib.util.find_spec('anomalib')), reason='anomalib is installed here')
def test_a_python_without_anomalib_says_so(images, tmp_path):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(AnomalibError, match="No module named 'anomalib'"):
        run_anomalib('draem', images, 32, python=str(python), progress=False)


# ---- with it -----------------------------------------------------------------------------------------------

TWICE = '''
import json, logging, random, sys
import numpy as np, timm, torch
import timm.models.vision_transformer as vit
from adflow.data.datasets import open_dataset
from adflow.evaluate.anomalib import run_anomalib
root, out, args = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
images = open_dataset('folder', root, ['waves', 'dots'], validation=.2)
state = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
                 id(timm.create_model), id(vit.resample_abs_pos_embed), logging.root.manager.disable)
before, found = state(), {}
for model, more in args.items():
    a, b = (run_anomalib(model, images, progress=False, **more) for _ in range(2))
    assert torch.equal(a.maps, b.maps) and torch.equal(a.scores, b.scores), f'{model}: two runs differ'
    assert state() == before, f'{model} left a trace'
    if model == 'fastflow':
        c = run_anomalib(model, images, progress=False, seed=1, **more)
        assert not torch.equal(a.maps, c.maps), f'{model}: the seed does nothing'
    a.table.to_json(f'{out}/{model}.json', orient='records')
    a.index.to_json(f'{out}/{model}-index.json', orient='records')
    np.savez(f'{out}/{model}.npz', maps=a.maps, scores=a.scores)
'''

@pytest.fixture(scope='module')
def here(root, tmp_path_factory):
    "All four in anomalib's own process, twice."
    out = tmp_path_factory.mktemp('out')
    env = {k: v for k, v in os.environ.items() if k != 'ADFLOW_ANOMALIB'}
    env['PYTHONPATH'] = str(Path(__file__).resolve().parents[1])
    args = {k: v for k, v in ARGS.items() if k != 'patchcore'}
    args['patchcore'] = ARGS['patchcore'] | dict(weights='random')          # the embedded may not be there
    done = subprocess.run([PYTHON, '-c', TWICE, str(root), str(out), json.dumps(args)], env=env, capture_output=True,
                          text=True)
    assert not done.returncode, done.stderr[-3000:]
    return out

@needs
@pytest.mark.parametrize('model', ARGS)
def test_same_seed_same_maps_in_our_order(here, images, model):
    table = json.loads((here / f'{model}.json').read_text())
    index = json.loads((here / f'{model}-index.json').read_text())
    test = images.where(split='test')
    assert [r['image'] for r in index] == test.index['image'].tolist()
    size = ARGS[model]['image_size']
    maps = np.load(here / f'{model}.npz')['maps']
    assert maps.shape == (len(test), size, size) and np.isfinite(maps).all()
    assert [r['class'] for r in table] == ['waves', 'dots'] and all(r['n_train'] == 4 for r in table)
    assert all(r['by'].startswith('anomalib 2.') and np.isfinite([r[m] for m in METRICS]).all() for r in table)

@needs
def test_patchcore_elsewhere_finds_the_hole_and_the_numbers_are_our_evaluators(images):
    run = run_anomalib('patchcore', images, progress=False, **ARGS['patchcore'])
    assert (run.table['image_auroc'] > .9).all() and (run.table['own_image_auroc'] > .9).all()
    assert (run.table['pixel_auroc'] > .9).all()
    preprocess = Preprocess(96)
    for row in run.table.to_dict('records'):
        at = np.flatnonzero(run.index['class'] == row['class'])
        part = run.index.iloc[at]
        masks = torch.stack([preprocess.mask(m) for m in part['mask']])
        assert evaluate_class(run.maps[at], masks, part['label'].to_numpy()) == {k: row[k] for k in METRICS}
        own = image_metrics(run.scores[at], part['label'].to_numpy())
        assert own == {k: row[f'own_{k}'] for k in own}
    # the highest patch lies in the hole: maps and images are not mixed up
    for m, path in zip(run.maps, run.index['mask']):
        if isinstance(path, str): assert preprocess.mask(path).flatten()[m.flatten().argmax()]

@needs
def test_torn_files_and_feature_sets(root, images, tmp_path):
    torn = write_tree(tmp_path / 'tree', ['dots'])
    whole = open_dataset('folder', torn, validation=.2)
    for split in ('train', 'test'):                     # a header, an end, and nothing in between
        file = Path(whole.index.loc[whole.index['split'] == split, 'image'].iloc[0])
        data = file.read_bytes()
        file.write_bytes(data[:2000] + data[-12:])
    features = extract(whole, Backbone(image_size=96), cache=tmp_path, on_bad='skip', progress=False)
    a = run_anomalib('patchcore', whole, 96, weights='random', on_bad='skip', progress=False)
    b = run_anomalib('patchcore', features, weights='random', progress=False)
    assert len(a.skipped) == 2 and not b.skipped and torch.equal(a.maps, b.maps)
    assert a.index['image'].tolist() == features.where(split='test').index['image'].tolist()
    assert a.table['n_train'].tolist() == [len(features.where(split='train'))] == [3]

@needs
def test_one_model_for_all_classes(images):
    run = run_anomalib('patchcore', images, 96, weights='random', one_model=True, progress=False)
    assert run.table['class'].tolist() == ['waves', 'dots'] and run.table['n_train'].tolist() == [8, 8]
    assert run.index['image'].tolist() == images.where(split='test').index['image'].tolist()
