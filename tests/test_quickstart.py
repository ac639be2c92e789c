"""The main job, as a user types it: what it must reach, and that a kill at any moment changes nothing."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from nbformat import read as read_notebook
from PIL import Image

from adflow.evaluate.forgetting import DEFINITIONS, forgetting_table
from adflow.evaluate.metrics import METRICS
from adflow.workbook.runs import read_json

pytestmark = pytest.mark.slow
SMALL = ['classes=[film, retina]', 'image_size=96', 'epochs=3', 'couplings=2', 'checkpoint_seconds=0.2']


def command(outputs, *sets):
    return [sys.executable, '-m', 'adflow.cli', 'run', 'params/moleflow/quickstart.yaml', '--outputs', str(outputs),
            *(['--set', *sets] if sets else [])]

def adflow_run(outputs, *sets):
    done = subprocess.run(command(outputs, *sets), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return outputs / 'moleflow' / 'quickstart'

def same_bits(a, b):
    x, y = (pd.read_parquet(f / 'metrics.parquet') for f in (a, b))
    assert list(x.columns) == list(y.columns) and len(x) == len(y)
    for c in x:
        if x[c].dtype.kind != 'f': assert (x[c] == y[c]).all(), c
        else: assert (x[c].to_numpy().view('int64') == y[c].to_numpy().view('int64')).all(), c

def weights(folder):
    checkpoint = folder / 'checkpoint'
    newest = checkpoint / (checkpoint / 'current').read_text().strip()
    return (newest / 'detector' / 'detector.safetensors').read_bytes()


@pytest.fixture(scope='module')
def quickstart(tmp_path_factory): return adflow_run(tmp_path_factory.mktemp('whole'))

def test_reaches_what_the_readme_says(quickstart):
    results = pd.read_parquet(quickstart / 'metrics.parquet')
    assert {'stage', 'task', 'class', 'routed', *METRICS} <= set(results.columns)
    tasks = results.task.nunique()
    assert tasks >= 3 and len(results) == tasks * (tasks + 1)   # all seen classes after every task, routed and oracle
    final = results[(results.stage == results.stage.max()) & results.routed]
    assert final.image_auroc.mean() >= .90
    assert final.routing.mean() >= .99

def test_forgets_nothing_on_any_metric(quickstart):
    results = pd.read_parquet(quickstart / 'metrics.parquet')
    table = forgetting_table(results)
    measured = [d for d in DEFINITIONS if d != 'forgetting_pyclad']     # needs tasks scored before they were learned
    assert (table[measured] == 0).all().all() and len(table) == len(METRICS)
    state = json.loads(next((quickstart / 'checkpoint').glob('state-*/state.json')).read_text())
    for before, after in zip(state['digests'], state['digests'][1:]):
        assert all(after[owner] == bits for owner, bits in before.items())

def test_leaves_a_complete_and_light_run_folder(quickstart):
    for name in 'notebook.ipynb report.html metrics.parquet params.yaml manifest.json checkpoint figures'.split():
        assert (quickstart / name).exists(), name
    assert (quickstart / 'notebook.ipynb').stat().st_size < 2_000_000
    nb = read_notebook(quickstart / 'notebook.ipynb', 4)
    assert 'widgets' not in nb.metadata and not any('plotly.js' in str(c.get('outputs')) for c in nb.cells)
    manifest = read_json(quickstart / 'manifest.json')
    assert manifest['state'] == 'done' and manifest['peak_memory_gib'] < 3
    assert {'versions', 'hardware', 'data', 'evaluator', 'seed'} <= set(manifest)


@pytest.fixture(scope='module')
def small(tmp_path_factory): return adflow_run(tmp_path_factory.mktemp('small'), *SMALL)

def test_killed_at_four_moments_it_ends_with_the_same_bits(small, tmp_path):
    "kill -9 before anything, in the first task, in the second, and when only the report is missing; the same command."
    partial = tmp_path / 'moleflow' / '.quickstart.partial'
    def reached(moment):
        current = partial / 'checkpoint' / 'current'
        if moment == 'early': return (partial / 'manifest.json').exists()
        if not current.exists(): return False
        state = read_json(partial / 'checkpoint' / current.read_text().strip() / 'state.json')
        return {'first task': state.get('task') == 0 and 'epoch' in state,
                'second task': state.get('task') == 1 and 'epoch' in state,
                'end': (partial / 'metrics.parquet').exists()}[moment]
    for moment in ('early', 'first task', 'second task', 'end'):
        child = subprocess.Popen(command(tmp_path, *SMALL), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 300
        while not reached(moment):
            assert child.poll() is None and time.time() < end, f'never reached: {moment}'
            time.sleep(.02)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert partial.exists() and not (tmp_path / 'moleflow' / 'quickstart').exists()
    again = adflow_run(tmp_path, *SMALL)
    assert len(read_json(again / 'manifest.json')['starts']) == 5
    same_bits(small, again)
    assert weights(small) == weights(again)

def test_a_finished_run_is_not_run_again(small):
    before = (small / 'metrics.parquet').stat().st_mtime_ns
    done = subprocess.run(command(small.parents[1], *SMALL), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'done already' in done.stdout
    assert (small / 'metrics.parquet').stat().st_mtime_ns == before

def test_finetuning_really_forgets(tmp_path):
    "The measure can show forgetting: without protection it is there."
    run = adflow_run(tmp_path, 'classes=[film, retina]', 'image_size=96', 'couplings=2', 'strategy=finetune',
                     'epochs=5', 'lr=0.01')
    table = forgetting_table(pd.read_parquet(run / 'metrics.parquet'))
    assert table.loc['pixel_ap', 'forgetting_initial'] > .02, table


def write_folder(root, classes, rng, n_train=10):
    "A tiny MVTec-style tree: noise of a colour per class, a bright square as defect."
    for k, c in enumerate(classes):
        def save(path, defect=False, k=k):
            path.parent.mkdir(parents=True, exist_ok=True)
            a = rng.normal(60 + 60 * k, 12, (64, 64, 3))
            mask = np.zeros((64, 64), 'uint8')
            if defect:
                y, x = rng.integers(0, 50, 2)
                a[y:y + 12, x:x + 12], mask[y:y + 12, x:x + 12] = 255, 255
            Image.fromarray(a.clip(0, 255).astype('uint8')).save(path)
            return mask
        for i in range(n_train): save(root / c / 'train/good' / f'{i}.png')
        for i in range(4): save(root / c / 'test/good' / f'{i}.png')
        for i in range(4):
            mask = save(root / c / 'test/spot' / f'{i}.png', True)
            path = root / c / 'ground_truth/spot' / f'{i}_mask.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)

TINY = ['dataset=folder', 'classes=[]', 'image_size=64', 'epochs=1', 'couplings=1', 'validation=0']

def test_what_was_skipped_and_cut_away_is_in_the_manifest(tmp_path):
    write_folder(tmp_path / 'data', ['a a', 'b.b'], np.random.default_rng(0))
    (tmp_path / 'data/a a/train/good/3.png').write_bytes(b'no image')
    Image.new('L', (10, 10)).save(tmp_path / 'data/b.b/ground_truth/spot/1_mask.png')
    sets = [*TINY, f'data_root={tmp_path / "data"}', 'crop=0.5']
    refused = subprocess.run(command(tmp_path / 'no', *sets), capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and '3.png' in refused.stderr and '1_mask.png' in refused.stderr
    manifest = read_json(adflow_run(tmp_path / 'yes', *sets, 'on_bad=skip') / 'manifest.json')
    skipped = manifest['data']['skipped']
    assert {s['file'].split('/')[-1] for s in skipped} == {'3.png', '1_mask.png'}, skipped
    assert manifest['cut_away'], 'a crop of half the image must have cut defects'

def test_several_classes_per_task_with_one_set_of_adapters_as_in_the_origin(tmp_path):
    write_folder(tmp_path / 'data', ['a', 'b', 'c'], np.random.default_rng(0))
    run = adflow_run(tmp_path / 'out', *TINY, f'data_root={tmp_path / "data"}', 'scenario=2-1', 'adapters=task',
                     'router={name: mahalanobis, per: task, shrinkage: 0.001, log_det: false}')
    results = pd.read_parquet(run / 'metrics.parquet')
    assert sorted(results[results.stage == 1].task.unique()) == ['a+b', 'c'] and len(results) == 2 * (2 + 3)
