"""Every idea of params/moleflow/ideas builds from its YAML, learns two tasks on tiny features, and scores them"""
import copy
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from adflow.continual.tasks import make_tasks
from adflow.evaluate.stages import score_maps
from adflow.features.store import from_arrays
from adflow.workbook.params import load
from adflow.workbook.study import Study

IDEAS = sorted(Path(__file__).parents[1].glob('params/moleflow/ideas/*.yaml'))
IMAGES = {'augment', 'backbone', 'resolution', 'image_size'}      # what needs images and a backbone
SMALL = dict(epochs=2, batch_size=4, dia_blocks=1, validation=.1)
CLASSES = 'abcd'

def tiny(n=8, held=9, grid=(8, 8), layers=(5, 7)):
    "Normal features of four classes on their own planes, held-out ones, test images with a square, and synthetic ones."
    g, parts, rows, masks = np.random.default_rng(0), [], [], []
    for k, c in enumerate(CLASSES):
        plane = g.normal(size=(4, sum(layers))) + k
        for split, label, count in (('train', 0, n), ('validation', 0, held), ('test', 0, 3), ('test', 1, 3),
                                    ('synthetic', 1, held)):
            x = g.normal(size=(count, *grid, 4)) @ plane + .1 * g.normal(size=(count, *grid, sum(layers)))
            m = np.zeros((count, *grid), bool)
            if label: m[:, 2:4, 3:5] = True; x[m] += 4 * g.normal(size=sum(layers))
            parts.append(x); masks.append(m)
            rows += [{'class': c, 'split': split, 'kind': 'spot' if label else 'good', 'label': label,
                      'image': f'{c}/{split}/{i}'} for i in range(count)]
    all_, index = np.concatenate(parts).astype('float32'), pd.DataFrame(rows)
    fake = (index['split'] == 'synthetic').to_numpy()
    real = from_arrays(all_[~fake], index[~fake], masks=np.concatenate(masks)[~fake])
    twice = [index[fake].assign(split=s) for s in ('train', 'validation')]
    painted = from_arrays(np.tile(all_[fake], (2, 1, 1, 1)), pd.concat(twice),
                          masks=np.tile(np.concatenate(masks)[fake], (2, 1, 1)))
    real.backbone = type('Net', (), {'layers': list(layers)})()
    return real, painted

FEATURES, PAINTED = tiny()

class Tiny(Study):
    "A study whose features are the tiny ones."
    @cached_property
    def features(self): return FEATURES
    @cached_property
    def defects(self): return None if self.p.pseudo is None else PAINTED
    @cached_property
    def tasks(self):
        return make_tasks(list(CLASSES), self.p.scenario, self.p.order, self.p.seed, FEATURES)[:2]

def smaller(values):
    "The same parts at the size of a test."
    out = values | SMALL | {'couplings': min(values['couplings'], 2)}
    for kind in ('subnet', 'context', 'align', 'loss', 'aggregate'):
        if isinstance(out[kind], dict): out[kind] = copy.deepcopy(out[kind])
    if isinstance(out['subnet'], dict):
        few = dict(rank=min(2, out['subnet'].get('rank', 2)), kernel=3)
        out['subnet'] |= {k: v for k, v in few.items() if k in out['subnet']}
    if isinstance(out['align'], dict) and 'keep' in out['align']: out['align']['keep'] = 6
    return out

def study_of(file):
    values = load(file).values
    if IMAGES & {k for k in values if values[k] != load('params/moleflow/quickstart.yaml').values[k]} - {'image_size'} \
            or file.stem == 'image_224':
        small = smaller(values) | {'classes': ['film', 'retina'], 'image_size': 64, 'epochs': 1, 'batch_size': 8}
        if small['resolution']: small['resolution'] = {'film': 96}
        return Study(progress=False, **small)
    return Tiny(progress=False, **smaller(values))

@pytest.mark.parametrize('file', IDEAS, ids=lambda f: f.stem)
def test_an_idea_learns_two_tasks(file):
    study = study_of(file)
    stages = list(study.learner.stages(study.tasks))
    assert [s.index for s in stages] == [0, 1]
    detector, tasks = stages[-1].detector, stages[-1].tasks
    for t in tasks:
        for c in t.classes:
            part = study.features.where(split='test', **{'class': c})
            maps = score_maps(detector, part, [detector.group_of(t.name, c)] * len(part))
            assert torch.isfinite(maps).all() and maps.std() > 0
    results = study.evaluator(stages[-1])
    assert results.query('routed').image_auroc.between(0, 1).all()
    if study.p.strategy == 'freeze' and study.p.detector in ('moleflow', 'patchcore'):       # by construction
        before, after = stages[0].digests, stages[1].digests
        assert all(after[k] == v for k, v in before.items())
    history = pd.DataFrame(stages[-1].history)
    if len(history): assert np.isfinite(history['loss']).all()
