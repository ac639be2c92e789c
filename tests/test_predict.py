"""A finished run on new images: the same numbers as its evaluator for every family of detectors, a promise that holds,
and errors in words."""
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from adflow import cli
from adflow.analysis.calibration import conformal_p
from adflow.data.synthetic import write_embedded
from adflow.parts import Detector, PartError
from adflow.predict.calibration import remember
from adflow.predict import files
from adflow.predict.files import score_files
from adflow.predict.score import load
from adflow.workbook.params import find_experiment, resolve, to_yaml
from adflow.workbook.runs import RunError
from adflow.workbook.study import Study

CLASSES = ['film', 'brick']

def make_run(outputs, name, experiment='moleflow', data_root=None, finish=True, **values):
    "A finished run below `outputs`, over a tree of its own that can be deleted: path, study, last stage."
    stream = dict(train=12, validation=19, good=4, defects=1, kinds=['scratch', 'perlin_blob'], size=128)
    tree = Path(data_root or Path(outputs).parent/f'data-{name}')
    write_embedded(tree, 0, CLASSES, **stream)
    values = resolve(find_experiment(experiment), dict(
        dataset='folder', data_root=str(tree), classes=CLASSES, image_size=96, batch_size=6, device='cpu') | values)
    path = Path(outputs)/experiment/name
    path.mkdir(parents=True)
    study = Study(path/'checkpoint', progress=False, **values)
    stage = list(study.learner.stages(study.tasks))[-1]
    (path/'params.yaml').write_text(to_yaml(dict(experiment=experiment, name=name, **values)))
    (path/'manifest.json').write_text('{"state": "done"}')
    if finish: remember(path, study, stage)
    return path, study, stage

def known(study, stage, column='group'):
    "Test images: score by the adapters of `column`, as the evaluator's own functions say, and their routes."
    table = study.evaluator.image_table(stage).query("split == 'test'").reset_index(drop=True)
    sent = study.evaluator.route(stage)
    assert table['image'].tolist() == sent['image'].tolist()
    return table, sent

@pytest.fixture(scope='module')
def bank(tmp_path_factory):
    "A memory bank, quick to learn."
    outputs = tmp_path_factory.mktemp('bank')/'outputs'
    return make_run(outputs, 'bank', detector={'name': 'patchcore', 'size': 200})


FAMILIES = {
    'flow': dict(couplings=1, epochs=1), 'bank': dict(detector={'name': 'patchcore', 'size': 200}),
    'joint': dict(detector={'name': 'shared_coreset', 'size': 200}, router='euclidean'),
    'dinomaly': dict(experiment='dinomaly', steps=4, depth=2), 'scenario': dict(
        scenario='joint', router={'name': 'clustered', 'least': 2}, adapters='task', couplings=1, epochs=1),
    'two_stage': dict(router='two_stage', couplings=1, epochs=1),
    'learned': dict(detector={'name': 'patchcore', 'size': 200}, pseudo={}, aggregate='learned', smoothing='chosen')}

@pytest.mark.parametrize('family', FAMILIES)
def test_the_evaluators_numbers_without_the_data(family, tmp_path):
    path, study, stage = make_run(tmp_path/'outputs', family, **FAMILIES[family])
    table, sent = known(study, stage)
    images = [shutil.copy(f, tmp_path/f'{i}.png') for i, f in enumerate(table['image'])]
    shutil.rmtree(study.p.data_root)
    assert not Path(study.p.data_root).exists()
    predictor = load(path, .1)
    routed, told = predictor.score_batch(images), predictor.score_batch(images, table['class'].tolist())
    assert routed['error'].isna().all() and told['error'].isna().all()
    np.testing.assert_allclose(told['score'], table['score'], rtol=2e-4)
    assert told['group'].tolist() == table['group'].tolist()
    assert routed['group'].tolist() == sent['routed_group'].tolist()
    assert routed['class'].tolist() == sent['routed_class'].tolist()
    np.testing.assert_allclose(routed['margin'], sent['margin'], rtol=1e-3)
    right = (sent['group'] == sent['routed_group']).to_numpy()
    np.testing.assert_allclose(routed['score'][right], table['score'][right], rtol=2e-4)
    assert right.mean() > .5

def test_the_rate_is_kept_by_held_out_normals_and_not_by_training_normals(bank, tmp_path):
    path, study, stage = bank
    tree = write_embedded(tmp_path/'fresh', 5, CLASSES, train=1, validation=80, good=0, defects=0, size=128)
    predictor = load(path, .1)
    fresh = predictor.score_batch(sorted(tree.glob('*/validation/good/*.png')))
    learned = study.evaluator.image_table(stage, study.features.where(split='train'))
    for c, part in fresh.groupby('class'):
        n = len(predictor.held['routed', c])
        k = math.floor((n + 1) * .1)
        low, high = stats.betabinom(len(part), k, n + 1 - k).ppf([.0005, .9995])
        assert low <= part['alarm'].sum() <= high
        np.testing.assert_array_equal(part['alarm'].to_numpy(bool), part['p_value'] <= .1 + 1e-9)
        assert stats.mannwhitneyu(part['score'], predictor.held['routed', c]['score']).pvalue > 1e-3
        wrong = learned.loc[learned['class'] == c, 'score']        # what the promise would be worth without holding out
        assert stats.mannwhitneyu(part['score'], wrong).pvalue < 1e-4
        assert (conformal_p(wrong, part['score'], seed=None) <= .1).mean() > .5

def test_a_first_use_calibrates_an_older_run_and_says_when_it_cannot(tmp_path):
    path, study, stage = make_run(tmp_path/'outputs', 'old', detector={'name': 'patchcore', 'size': 100}, finish=False)
    tree = Path(study.p.data_root)
    tree.rename(tree.with_name('elsewhere'))
    with pytest.raises(RunError, match='no predictor.json that fits(.|\n)*bring it back'): load(path)
    tree.with_name('elsewhere').rename(tree)
    first = load(path).held
    written = json.loads((path/'predictor.json').read_text())
    assert written['held_out']['score'] == remember(path, study, stage)['held_out']['score']
    shutil.rmtree(tree)
    again = load(path).held
    for k in first: pd.testing.assert_frame_equal(first[k], again[k])

def test_another_checkpoint_does_not_use_this_calibration(bank, tmp_path):
    shutil.copytree(bank[0], tmp_path/'moleflow'/'other')
    path = tmp_path/'moleflow'/'other'
    about = json.loads((path/'predictor.json').read_text())
    (path/'predictor.json').write_text(json.dumps(about | {'learned': 'x'}))
    before = about['held_out']['score']
    assert load(path).about['held_out']['score'] == pytest.approx(before, rel=1e-6)       # made anew, from the data
    assert json.loads((path/'predictor.json').read_text())['learned'] == about['learned']

def test_other_weights_of_the_backbone_are_refused(bank, tmp_path):
    shutil.copytree(bank[0], tmp_path/'moleflow'/'other')
    path = tmp_path/'moleflow'/'other'
    about = json.loads((path/'predictor.json').read_text())
    about['backbone']['weights_sha256'] = '0' * 64
    (path/'predictor.json').write_text(json.dumps(about))
    with pytest.raises(PartError, match='not those it was learned with'): load(path)

def test_what_is_no_finished_run_is_told(bank, tmp_path):
    with pytest.raises(RunError, match='There is no run'): load(tmp_path/'nowhere')
    with pytest.raises(RunError, match='is no run'): load(tmp_path)
    (tmp_path/'moleflow'/'.new.partial').mkdir(parents=True)
    with pytest.raises(RunError, match='not finished'): load(tmp_path/'moleflow'/'new')
    (tmp_path/'moleflow'/'table').mkdir()
    for name in ('params.yaml', 'manifest.json'): shutil.copy(bank[0]/name, tmp_path/'moleflow'/'table')
    with pytest.raises(RunError, match='keeps no detector'): load('moleflow/table', outputs=tmp_path)
    with pytest.raises(PartError, match='holds no detector.json'): Detector.load(tmp_path)

def test_detector_load_finds_the_class_by_itself(bank):
    detector = Detector.load(bank[1].learner.checkpoint.current/'detector')
    assert type(detector).__name__ == 'PatchCore' and list(detector.groups) == CLASSES

def test_detector_load_of_a_run_takes_images(bank):
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    a, b = Detector.load(bank[0])(image), load(bank[0])(image)
    assert a['score'] == b['score'] and a['task'] == b['task'] and np.array_equal(a['map'], b['map'])

@pytest.mark.parametrize('rate, text', [(.01, '19 held-out normal images were sent to .*0.05 at best.*takes 99'),
                                        (0, 'between 0 and 1')])
def test_a_rate_that_cannot_be_promised(bank, rate, text):
    with pytest.raises(PartError, match=text): load(bank[0], rate).score_batch([np.zeros((9, 9, 3), np.uint8)])

def test_the_class_must_be_told_where_it_decides_how_an_image_is_read(tmp_path):
    path, study, stage = make_run(tmp_path/'outputs', 'sizes', detector={'name': 'patchcore', 'size': 100},
                                  resolution={'brick': 128})
    table, _ = known(study, stage)
    predictor = load(path)
    with pytest.raises(PartError, match='read in different ways'): predictor.score_batch(table['image'])
    told = predictor.score_batch(table['image'], table['class'].tolist())
    np.testing.assert_allclose(told['score'], table['score'], rtol=2e-4)
    assert {m.shape for m in told['map']} == {(12, 12)}

def test_the_oracle_must_be_told(tmp_path):
    path, study, stage = make_run(tmp_path/'outputs', 'oracle', detector={'name': 'patchcore', 'size': 100},
                                  router='oracle')
    table, _ = known(study, stage)
    with pytest.raises(PartError, match='oracle'): load(path).score_batch(table['image'])
    told = load(path).score_batch(table['image'], table['class'].tolist())
    np.testing.assert_allclose(told['score'], table['score'], rtol=2e-4)

def test_images_of_every_kind_are_one_image(bank):
    from PIL import Image
    predictor, file = load(bank[0]), known(*bank[1:])[0]['image'][0]
    rgb = np.array(Image.open(file).convert('RGB'))
    grey = rgb[..., 0]
    same = [rgb, Image.fromarray(rgb), rgb.astype(np.uint16) * 257, rgb / 255., np.dstack([rgb, grey])]
    scores = predictor.score_batch([file, *same])['score']
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)
    both = predictor.score_batch([grey, np.stack([grey] * 3, -1), np.array(Image.fromarray(rgb).resize((301, 57)))])
    assert both['score'][0] == pytest.approx(both['score'][1]) and both['error'].isna().all()
    assert len(predictor.score_batch([])) == 0
    one = predictor(rgb)
    assert one['score'] == pytest.approx(scores[0]) and one['map'].shape == (12, 12) and one['alarm'] in (True, False)


# ---- files and the command line ---------------------------------------------------------------------------

def said(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err

def test_score_on_the_command_line(bank, tmp_path, capsys):
    path, study, stage = bank
    table, _ = known(study, stage)
    folder = tmp_path/'images'
    folder.mkdir()
    for i, f in enumerate(table['image']): shutil.copy(f, folder/f'{i:02}.png')
    outputs = ['--outputs', path.parents[1]]
    code, out, _ = said(capsys, 'score', 'moleflow/bank', folder, *outputs)
    to = path.parents[1]/'scores'/'moleflow-bank'
    found = pd.read_parquet(to/'scores.parquet')
    assert code == 0 and f'{len(table)} of {len(table)} images scored (0 kept' in out
    np.testing.assert_allclose(found['score'], table['score'], rtol=2e-4)          # these classes are never confused
    assert all((to/p).is_file() for p in found['picture']) and len(set(found['picture'])) == len(table)
    (folder/'zz.png').write_bytes(b'no image')
    code, out, err = said(capsys, 'score', path, folder, *outputs)
    assert code == 1 and f'{len(table)} kept' in out and 'zz.png: not a readable image' in err
    found = pd.read_parquet(to/'scores.parquet')
    assert found['error'].notna().sum() == found['alarm'].isna().sum() == 1 and math.isnan(found['score'].iloc[-1])
    (tmp_path/'empty').mkdir()
    for argv, text in ((['score', path, tmp_path/'empty'], 'there is no image in it'),
                       (['score', path, folder, '--false-alarms', '0.01'], 'at best, not by 0.01'),
                       (['score', path, folder, '--false-alarms', 'few'], 'give a share'),
                       (['score', path, folder, '--class', 'flim'], "Did you mean 'film'?"),
                       (['score', 'moleflow/bnk', folder], 'There is no run')):
        code, _, err = said(capsys, *argv, *outputs)
        assert code == 2 and text in err and 'Traceback' not in err

def test_a_killed_process_goes_on(bank, tmp_path):
    path, study, stage = bank
    table, _ = known(study, stage)
    folder, to = tmp_path/'images', tmp_path/'out'
    folder.mkdir()
    for i in range(60):                                                         # 60 contents: PNG ignores what follows
        (folder/f'{i:02}.png').write_bytes(Path(table['image'][i % len(table)]).read_bytes() + bytes([i]))
    program = (f"from adflow.predict.files import score_files; from adflow.predict.score import load; "
               f"score_files(load({str(path)!r}), {str(folder)!r}, {str(to)!r}, batch_size=2, part=2, progress=False)")
    p = subprocess.Popen([sys.executable, '-c', program], env=os.environ | {'OMP_NUM_THREADS': '1'})
    end = time.time() + 120
    while len(list(to.glob('.parts/*.parquet'))) < 3 and p.poll() is None and time.time() < end: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = sum(len(pd.read_parquet(f)) for f in to.glob('.parts/*.parquet'))
    assert 6 <= done < 60 and not (to/'scores.parquet').exists()
    predictor = load(path)
    resumed = score_files(predictor, folder, to, batch_size=2, progress=False)
    whole = score_files(predictor, folder, tmp_path/'whole', batch_size=2, progress=False)
    assert resumed.attrs['kept'] == done and whole.attrs['kept'] == 0
    pd.testing.assert_frame_equal(resumed, whole)
    assert not (to/'.parts').exists() and len(list(to.rglob('*.png'))) == 60
    assert not [f for f in to.rglob('*') if '.tmp' in f.name]

def test_a_map_on_another_scale_is_drawn_again(bank, tmp_path):
    path, study, stage = bank
    images = known(study, stage)[0]['image'].tolist()[:3]
    score_files(load(path, .1), images, tmp_path, progress=False)
    before = {f: f.read_bytes() for f in tmp_path.rglob('*.png')}
    score_files(load(path, .4), images, tmp_path, progress=False)
    assert all(f.read_bytes() != b for f, b in before.items()) and len(before) == 3


# ---- ONNX -----------------------------------------------------------------------------------------------

needs_onnx = pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ('onnx', 'onnxscript', 'onnxruntime')),
                                reason='pip install adflow[onnx]')

@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize('family', ['flow', 'bank', 'dinomaly'])
def test_onnx_agrees_on_real_images(family, tmp_path, capsys):
    import onnxruntime
    path, study, stage = make_run(tmp_path/'outputs', family, **FAMILIES[family])
    code, out, _ = said(capsys, 'export', path, '--onnx', '--outputs', tmp_path)
    assert code == 0
    predictor, images = load(path, .1), known(study, stage)[0]['image'].tolist()
    files = sorted((path/'onnx').glob('*.onnx'))
    assert {f.stem for f in files} == set(predictor.aggregates)
    for file in files:
        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        meta = session.get_modelmeta().custom_metadata_map
        assert json.loads(meta['image_size']) == [96, 96] and meta['run'] == f'{path.parent.name}/{family}'
        cls = json.loads(meta['classes'])[0]
        x = np.stack([predictor.read(f)[1] for f in images]).transpose(0, 3, 1, 2)
        maps, scores = session.run(None, {'image': x})
        predictor.dtype = torch.float32                              # as the graph, without the store's rounding
        ours = predictor.score_batch(images, cls)
        unit = np.ptp(np.stack(ours['map']))
        assert np.abs(maps - np.stack(ours['map'])).max() / unit < 1e-4
        assert np.abs(scores - ours['score']).max() / unit < 1e-4
        assert json.loads(meta['limit'])[cls] == pytest.approx(ours['limit'][0])

def test_what_a_cluster_is_given_and_gives_back(bank, tmp_path, monkeypatch):
    """Without a cluster: workers that are handed JSON-able batches and answer in any order. The table is that of one
    process; what is known is kept; contents are read in the workers, not in the process that gathers."""
    from adflow.predict.cluster import OnRay
    path, study, stage = bank
    (folder := tmp_path/'images').mkdir()
    for i, f in enumerate(known(study, stage)[0]['image'][:5]): shutil.copy(f, folder/f'{i}.png')
    (folder/'x.png').write_text('no image')
    inside, real = [], files.content_of
    def content_of(f):
        assert inside, f'{f} is read by the driver'
        return real(f)
    monkeypatch.setattr(files, 'content_of', content_of)
    class Data:
        def from_items(self, items, override_num_blocks):
            self.items = json.loads(json.dumps(items))
            assert 1 <= override_num_blocks <= len(items)
            return self
        def map(self, worker, fn_constructor_args, num_gpus, compute):
            self.made = worker(*fn_constructor_args)
            return self
        def iter_rows(self):
            for item in reversed(self.items):
                inside.append(item)
                made = self.made(item)
                inside.clear()
                yield made
        def ActorPoolStrategy(self, size): return size
    on = OnRay.__new__(OnRay)
    on.ray, on.gpus, on.workers = type('ray', (), {'data': Data()}), 0., 2
    predictor, how = load(path, device='cpu'), dict(batch_size=2, part=2, progress=False)
    many = score_files(predictor, folder, tmp_path/'many', scorer=on, **how)
    again = score_files(predictor, folder, tmp_path/'many', scorer=on, **how)
    plain = score_files(predictor, folder, tmp_path/'no', pictures=False, scorer=on, **how)
    monkeypatch.undo()
    one = score_files(predictor, folder, tmp_path/'one', **how)
    for table in (many, again): pd.testing.assert_frame_equal(one, table, rtol=1e-6)
    assert (many.attrs['kept'], again.attrs['kept']) == (0, 5) and plain['picture'].isna().all()
    drawn = [sorted(p.relative_to(tmp_path/n) for p in (tmp_path/n).rglob('*.png')) for n in ('one', 'many', 'no')]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5 and not drawn[2]

@pytest.mark.slow
def test_score_on_a_ray_cluster(bank, tmp_path, capsys, monkeypatch):
    """Two workers write the table and the pictures that one process writes; a file that is no image is among them.
    Given again, they keep what is known, by contents that this process never reads."""
    ray = pytest.importorskip('ray', reason="ray is not installed: pip install 'adflow[ray]'")
    folder = tmp_path/'images'
    folder.mkdir()
    for i, f in enumerate(known(*bank[1:])[0]['image'][:6]): shutil.copy(f, folder/f'{i}.png')
    (folder/'x.png').write_text('no image')
    try:
        for name, more in (('one', []), ('many', ['--executor', 'ray', '--address', 'local', '--workers', '2'])):
            code, out, err = said(capsys, 'score', bank[0], folder, '--to', tmp_path/name, '--batch-size', 2, *more)
            assert code == 1 and '6 of 7 images scored (0 kept' in out and 'x.png' in err
            before = {f: f.stat().st_mtime_ns for f in (tmp_path/name).rglob('*.png')}
            def unread(file): raise AssertionError(file)
            monkeypatch.setattr('adflow.predict.files.content_of', unread)
        code, out, err = said(capsys, 'score', bank[0], folder, '--to', tmp_path/'many', '--batch-size', 2, *more)
        assert code == 1 and '6 of 7 images scored (6 kept' in out
        assert len(before) == 6 and all(f.stat().st_mtime_ns == t for f, t in before.items())
    finally: ray.shutdown()
    one, many = (pd.read_parquet(tmp_path/n/'scores.parquet') for n in ('one', 'many'))
    pd.testing.assert_frame_equal(one, many, rtol=1e-6)
    assert [(tmp_path/n/one['picture'][0]).read_bytes() for n in ('one', 'many')][0].startswith(b'\x89PNG')
    drawn = [sorted(p.relative_to(tmp_path/n) for p in (tmp_path/n).rglob('*.png')) for n in ('one', 'many')]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6

def test_onnx_refuses_what_it_cannot_write(tmp_path):
    from adflow.predict.export import ExportError, graph_of
    path, study, stage = make_run(tmp_path/'outputs', 'stn', couplings=1, epochs=1, augment='stn')
    with pytest.raises(ExportError, match="augment 'stn'"): graph_of(load(path, device='cpu'), 'film')
