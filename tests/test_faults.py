"""What can go wrong in a night, planted: each ends in a message that says what, where and what to do, nothing that was
done is lost, and the same command goes on after the repair. Kills are in test_sweeps.py."""
import contextlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_sweeps import ENV, Fake, expected, found, home, sweep_of  # noqa: F401  home: a fixture
from tiny import write_experiment

from adflow.continual.learner import Checkpoint
from adflow.sweeps.execute import Local, execute
from adflow.sweeps.plan import SweepError
from adflow.workbook.files import broken_files
from adflow.workbook.runs import RunError, RunFolder, read_json, update_manifest

TRAINED = ['''
lr: float = 1e-4   # learning rate
seed: int = 0      # none
run_dir: str = ''  # set by the launcher
''', '''
import pandas as pd, torch
from adflow.continual.tasks import Task
from adflow.continual.trainer import Trainer
from adflow.features.store import from_arrays
from adflow.flow.moleflow import MoLEFlow
from adflow.workbook.runs import Run
run = Run(run_dir)
x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
features = from_arrays(x, pd.DataFrame({'class': 'a', 'image': [f'{i}.png' for i in range(8)]}))
trainer = Trainer(epochs=3, batch_size=4, lr=lr, clip=0, optimizer='sgd', progress=False)
MoLEFlow(dim=4, grid=(4, 4), context='none', couplings=1, dia_blocks=0).learn(Task(0, ('a',)), features, trainer)
loss = trainer.history[-1]['loss']
run.metrics(pd.DataFrame([dict(stage=0, task='a', routed=True, image_auroc=loss)]))
''']
LEARNED = ['''
how: str = 'not'   # memory ends: device, machine, not
full: str = ''     # while this file is there
seed: int = 0      # none
run_dir: str = ''  # set by the launcher
''', '''
import pandas as pd, torch
from pathlib import Path
from adflow.continual.learner import Learner
from adflow.continual.routing import ROUTERS
from adflow.continual.tasks import make_tasks
from adflow.continual.trainer import Trainer
from adflow.features.store import from_arrays
from adflow.flow.moleflow import MoLEFlow
from adflow.workbook.runs import Run
run = Run(run_dir)
x = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
features = from_arrays(x, pd.DataFrame({'class': ['a'] * 8 + ['b'] * 8}))
class Small(Trainer):
    def step(self, detector, *args, **state):
        if len(self.history) == 4 and state['step'] == 3 and Path(full).is_file():        # task b, in its second epoch
            if how == 'device': raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')
            if how == 'machine': torch.empty(2**50, dtype=torch.uint8)
        with open(run.path/'steps.txt', 'a') as f: f.write(f"{len(self.history)} {state['step']}\\n")
        return super().step(detector, *args, **state)
trainer = Small(epochs=3, batch_size=4, lr=1e-3, checkpoint_seconds=-1, progress=False)
flow = MoLEFlow(dim=4, grid=(4, 4), context='none', couplings=1, dia_blocks=1)
last = [*Learner(flow, ROUTERS.build('oracle'), trainer, features, run.checkpoint).stages(make_tasks('ab', '1-1'))][-1]
apart = float(last.detector.score(x, 'b').double().mean())
run.metrics(pd.DataFrame([dict(stage=1, task='b', routed=True, image_auroc=apart)]))
''']
STORED = ['''
root: str = ''     # of the images
cache: str = ''    # of the features
seed: int = 0      # none
run_dir: str = ''  # set by the launcher
''', '''
import pandas as pd
from adflow.data.datasets import open_dataset
from adflow.features.backbone import BACKBONES
from adflow.features.store import extract
from adflow.workbook.runs import Run
run = Run(run_dir)
images = open_dataset('folder', root, ['film'])
features = extract(images, BACKBONES.build('tf_efficientnet_lite0', image_size=64), cache=cache, progress=False)
run.metrics(pd.DataFrame([dict(stage=0, task='a', routed=True, image_auroc=float(features.batch(range(4)).mean()))]))
''']


def experiment(home, name, cells):  # noqa: F811
    write_experiment(home, cells, 'seed: 0\n', name=name)
    return f'../{name}/base.yaml'

def run_all(sweep, **more):
    "Executes a sweep here; what it came to, and what it said."
    said = []
    return execute(sweep, Local(workers=1, gpus='none'), say=said.append, **more), '\n'.join(said)

@contextlib.contextmanager
def small_disk(place, megabytes):
    "A file system of its own; skips where none may be mounted."
    place.mkdir(parents=True)
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(place)],
                          capture_output=True)
    if made.returncode: pytest.skip(f'no tmpfs can be mounted here: {made.stderr.decode().strip()}')
    try: yield
    finally: subprocess.run(['umount', '-l', str(place)], check=True)

def fill(place, leave):
    "Fills a disk but for some bytes."
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (ballast := place / 'ballast').write_bytes(b'x' * max(free - leave, 0))
    return ballast


@pytest.mark.slow
def test_a_full_disk(home):  # noqa: F811
    "With room for the first of two runs only. What is done stays done, the other one goes on when there is room."
    with small_disk(home / 'outputs', 8):
        sweep = sweep_of(home, seeds=[0, 1])
        out, _ = run_all(sweep, max_runs=1, min_free=0)
        assert len(out.done) == 1 and found(sweep) == expected(sweep)[:1]
        ballast = fill(home / 'outputs', leave=40_000)
        out, said = run_all(sweep)                            # as it is by default: not even begun
        assert out.stopped.endswith('make room, then give the same command again.') and 'starts' not in said
        out, said = run_all(sweep, min_free=0, retries=0)
        told = f'{out.stopped} {out.failed}'
        assert 'No space left on device' in told or 'is full' in told, (told, said)
        assert found(sweep) == expected(sweep)[:1] and len(out.done) == 1
        ballast.unlink()
        out, _ = run_all(sweep, min_free=0)
        assert len(out.done) == 2 and not out.failed and found(sweep) == expected(sweep)

@pytest.mark.slow
def test_outputs_that_cannot_be_written(home):  # noqa: F811
    "A file system becomes read-only between two runs: the sweep and `adflow run` say so; once writable, it goes on."
    outputs = home / 'outputs'
    with small_disk(outputs, 8):
        sweep = sweep_of(home, seeds=[0, 1])
        assert len(run_all(sweep, max_runs=1, min_free=0)[0].done) == 1
        remount = lambda how: subprocess.run(['mount', '-o', f'remount,{how}', str(outputs)], check=True)
        remount('ro')
        out, said = run_all(sweep, min_free=0)
        assert 'Read-only file system' in out.stopped + said and len(out.done) == 1 and not out.failed
        call = [sys.executable, '-m', 'adflow.cli', 'run', f'{home}/params/tiny/base.yaml', '--outputs', str(outputs)]
        p = subprocess.run(call, env=ENV, cwd=home, capture_output=True, text=True, timeout=120)
        assert p.returncode in (1, 2) and 'Read-only file system' in p.stderr and 'Traceback' not in p.stderr, p.stderr
        remount('rw')
        out, _ = run_all(sweep, min_free=0)
        assert len(out.done) == 2 and found(sweep) == expected(sweep)

def test_the_state_of_a_sweep_that_cannot_be_written_stops_no_run(home, monkeypatch):  # noqa: F811
    sweep, said = sweep_of(home, seeds=[0, 1]), []
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('adflow.sweeps.execute.write_status', full)
    out = execute(sweep, Fake(sweep, {}), say=said.append)
    assert len(out.done) == 2 and sum('its runs go on' in s for s in said) == 1
    sweep = sweep_of(home, name='t', seeds=[2, 3])
    monkeypatch.setattr('adflow.sweeps.execute.write_file', full)        # now the runs cannot be begun either
    out = execute(sweep, Fake(sweep, {}), say=said.append)
    assert 'could not be started: [Errno 28]' in out.stopped and 'the same command again' in out.stopped
    assert len(out.left) == 2
    monkeypatch.undo()
    assert len(execute(sweep, Fake(sweep, {}), say=said.append).done) == 2

@pytest.mark.slow
def test_a_run_that_diverges(home):  # noqa: F811
    "A NaN loss is a failure of that run alone, and its line says where."
    sweep = sweep_of(home, base=experiment(home, 'trained', TRAINED), grid={'lr': [1e30, 1e-4]})
    out, said = run_all(sweep)
    assert [sweep.state(r) for r in sweep.runs] == ['failed', 'done']
    (why, kept), = out.failed.values()
    assert 'FloatingPointError: The loss became' in why and 'in task a, epoch 0, step' in why and kept.is_file()
    assert said.count('FAILED') == 1
    out, said = run_all(sweep)                                # told again, not tried again
    assert list(out.failed.values()) == [(why, kept)] and 'starts' not in said and len(out.done) == 1

@pytest.mark.slow
def test_out_of_memory(home):  # noqa: F811
    """On the device (planted) and on the machine (a petabyte is really asked for), in the middle of a real training.
    Nothing is lost: the same command, no --retry-failed, goes on at the very step, and the numbers are the same."""
    full = home / 'others-use-the-memory'
    full.touch()
    sweep = sweep_of(home, base=experiment(home, 'learned', LEARNED), sets={'full': str(full)},
                     grid={'how': ['device', 'machine', 'not']})
    out, said = run_all(sweep, retries=0)
    assert [sweep.state(r) for r in sweep.runs] == ['killed', 'killed', 'done']
    for r, word in zip(sweep.runs, ('OutOfMemoryError: CUDA out of memory. Tried to', "RuntimeError: [enforce fail")):
        why, kept = out.failed[r.name]
        assert word in why and 'on another GPU (--gpus), the same command goes on' in why and kept.is_file(), why
        assert 'with a smaller batch (--set batch_size=…) it is another run' in why and why in said
        assert (sweep.partial(r) / 'checkpoint/current').is_file()
    full.unlink()
    out, said = run_all(sweep)
    assert len(out.done) == 3 and said.count('resumes') == 2
    steps = [(sweep.final(r) / 'steps.txt').read_text().split('\n') for r in sweep.runs]
    assert steps[0] == steps[1] == steps[2] and len(set(steps[0])) == len(steps[0]) == 2 * 3 * 2 + 1      # each once
    assert [len(read_json(sweep.final(r) / 'manifest.json')['starts']) for r in sweep.runs] == [2, 2, 1]
    assert len(found(sweep)) == 3 and len(set(found(sweep))) == 1

def interrupted(sweep):
    "The folder of the first run, as a kill after its second step leaves it."
    run, partial = sweep.runs[0], sweep.partial(sweep.runs[0])
    (partial / 'checkpoint').mkdir(parents=True)
    (partial / 'params.yaml').write_text(run.params.yaml())
    v = run.params.values
    total = sum(v['x'] * random.Random(v['seed'] * 1000 + i).random() for i in range(2))
    (partial / 'checkpoint/state.json').write_text(json.dumps({'step': 2, 'sum': total}))
    update_manifest(partial, state='running', experiment='tiny', name=run.name, starts=['2026-01-01T00:00:00Z'])
    return partial

@pytest.mark.slow
@pytest.mark.parametrize('name, torn, word', [
    ('checkpoint/state.json', b'{"step": 2, "su', 'JSONDecodeError'), ('params.yaml', b'lr: {', 'not readable as YAML'),
    ('params.yaml', b'\xff\xfe', 'no text'), ('params.yaml', b'', 'expected `name: value` lines')])
def test_a_corrupt_file_of_an_unfinished_run(home, name, torn, word):  # noqa: F811
    "Refused by name before a kernel starts, and left alone. Brought back, the run goes on from its checkpoint."
    sweep = sweep_of(home, seeds=[0])
    partial = interrupted(sweep)
    file, whole = partial / name, (partial / name).read_bytes()
    file.write_bytes(torn)
    out, said = run_all(sweep)
    (why, log), = out.failed.values()
    assert word in why and str(file) in why and f'remove {partial}' in why and 'same command again' in why, why
    assert said.count('FAILED') == 1 and log.suffix == '.log' and file.read_bytes() == torn
    assert sweep.state(sweep.runs[0]) == 'killed'             # so the next call tries again
    if name == 'params.yaml': return
    file.write_bytes(whole)
    out, _ = run_all(sweep)
    assert len(out.done) == 1 and found(sweep) == expected(sweep)
    assert len(read_json(sweep.final(sweep.runs[0]) / 'manifest.json')['starts']) == 2

def test_a_corrupt_base_file(home):  # noqa: F811
    "Said with its line before anything runs."
    base = home / 'params/tiny/base.yaml'
    for text, word in ((b'steps: [', 'base.yaml:1: not readable as YAML'), (b'- 1', 'expected `name: value` lines'),
                       (b'stepps: 2', 'base.yaml:1: there is no parameter'),
                       (b'\xff\xfe', 'base.yaml: cannot be read')):
        base.write_bytes(text)
        with pytest.raises(SweepError, match=re.escape(word)): sweep_of(home, seeds=[0])

@pytest.mark.parametrize('state', ['whole', 'torn', 'gone'])
def test_a_finished_run_whose_manifest_is_torn(home, state):  # noqa: F811
    "It is not taken for done, nor overwritten."
    sweep = sweep_of(home, seeds=[0])
    partial, run = interrupted(sweep), sweep.runs[0]
    update_manifest(partial, state='done')
    with RunFolder(sweep.outputs, run.params): pass           # publishes
    manifest = sweep.final(run) / 'manifest.json'
    if state == 'torn': manifest.write_bytes(manifest.read_bytes()[:-9])
    if state == 'gone': manifest.unlink()
    assert sweep.state(run) == ('done' if state == 'whole' else 'new')
    with RunFolder(sweep.outputs, run.params) as folder:
        if state == 'whole': assert folder.open() == 'done'
        else:
            with pytest.raises(RunError, match='manifest.json cannot be read.*\n.*remove'): folder.open()

@pytest.mark.parametrize('lost', [1, 9, 400])
def test_a_real_checkpoint_that_is_cut(tmp_path, lost):
    "Of the learner, in its current state; what a kill left of the next one does not count."
    class Part:
        def save(self, folder):
            folder.mkdir(parents=True)
            save_file({'w': torch.arange(100.)}, folder / 'part.safetensors')
    for _ in range(2): Checkpoint(tmp_path).write(Part(), Part(), {'task': 1}, {'m': torch.ones(99)}, {})
    (tmp_path / 'state-2').mkdir()
    (tmp_path / 'state-2/state.json').write_text('{"ta')
    assert list(broken_files(tmp_path)) == []
    files = [f for f in (tmp_path / 'state-1').rglob('*') if f.is_file()]
    assert len(files) == 5
    for f in files:
        whole = f.read_bytes()
        f.write_bytes(whole[:-lost] if lost < len(whole) else b'')
        told, = broken_files(tmp_path)
        assert told.startswith(f'{f} (')
        f.write_bytes(whole)

@pytest.mark.slow
@pytest.mark.parametrize('fault', ['cut', 'bits', 'manifest'])
def test_a_corrupt_feature_store(home, fault):  # noqa: F811
    "Detected by the next run that opens it, told in its log, made again: the same numbers."
    from adflow.data.synthetic import write_embedded
    root = write_embedded(home / 'data', 0, ['film'], train=4, validation=0, good=1, defects=1, size=64)
    base = experiment(home, 'stored', STORED)
    sweep = sweep_of(home, base=base, sets=dict(root=str(root), cache=str(home / 'cache')), seeds=[0, 1])
    assert len(run_all(sweep, max_runs=1)[0].done) == 1
    store, = [p for p in (home / 'cache/features').iterdir() if p.is_dir()]
    file = store / ('manifest.json' if fault == 'manifest' else 'train.npy')
    raw = bytearray(file.read_bytes())
    if fault == 'bits': raw[-9] ^= 255
    file.write_bytes(raw if fault == 'bits' else raw[:-9])
    out, _ = run_all(sweep)
    assert len(out.done) == 2 and len(set(found(sweep))) == 1
    log = (sweep.folder / 'logs' / f'{sweep.runs[1].name}.log').read_text()
    assert file.name in log and str(store) in log, log
