"""What can go wrong in a night, planted: each ends in a message that says what, where and what to do, nothing that was
done is lost, and the same command goes on after the repair. Kills are in test_sweeps.py."""
import contextlib
import os
import subprocess

import nbformat
import pytest
from test_sweeps import Fake, expected, found, home, sweep_of  # noqa: F401  home: a fixture

from adflow.sweeps.execute import Local, execute
from adflow.sweeps.plan import SweepError
from adflow.workbook.runs import read_json, run_state, update_manifest

TRAINED = ['''
lr: float = .1     # learning rate
seed: int = 0      # none
run_dir: str = ''  # set by the launcher
''', '''
import pandas as pd, torch
from adflow.continual.learner import Trainer
from adflow.workbook.runs import Run
run = Run(run_dir)
class Line(torch.nn.Module):
    groups = {'a': 0}
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
    def loss(self, x, group, **state): return (self.w * x).square().mean() ** 2, {}
net, x = Line(), torch.ones(3)
trainer = Trainer(lr=lr, clip=0, progress=False)
opt = torch.optim.SGD(net.parameters(), lr=lr)
for step in range(9): loss = trainer.step(net, opt, {'w': net.w}, x, 'a', f'task a, epoch 0, step {step}')['loss']
run.metrics(pd.DataFrame([dict(stage=0, task='a', routed=True, image_auroc=loss)]))
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
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells])
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, home / f'nbs/experiments/{name}.ipynb')
    (home / f'params/{name}').mkdir()
    (home / f'params/{name}/base.yaml').write_text('seed: 0\n')
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
@pytest.mark.parametrize('leave', [0, 40_000], ids=['nothing', '40 kB'])
def test_a_full_disk(home, leave):  # noqa: F811
    "With room for the first of two runs only. What is done stays done, the other one goes on when there is room."
    with small_disk(home / 'outputs', 8):
        sweep = sweep_of(home, seeds=[0, 1])
        out, _ = run_all(sweep, max_runs=1, min_free=0)
        assert len(out.done) == 1 and found(sweep) == expected(sweep)[:1]
        ballast = fill(home / 'outputs', leave)
        out, said = run_all(sweep)                            # as it is by default: not even begun
        assert out.stopped.endswith('make room, then give the same command again.') and 'starts' not in said
        out, said = run_all(sweep, min_free=0, retries=0)
        told = f'{out.stopped} {out.failed}'
        assert 'No space left on device' in told or 'is full' in told, (told, said)
        assert found(sweep) == expected(sweep)[:1] and len(out.done) == 1
        ballast.unlink()
        out, _ = run_all(sweep, min_free=0)
        assert len(out.done) == 2 and not out.failed and found(sweep) == expected(sweep)

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
    sweep = sweep_of(home, base=experiment(home, 'trained', TRAINED), grid={'lr': [.1, 1e30, .01]})
    out, said = run_all(sweep)
    assert [sweep.state(r) for r in sweep.runs] == ['done', 'failed', 'done']
    (why, kept), = out.failed.values()
    assert 'FloatingPointError: The loss became' in why and 'in task a, epoch 0, step' in why and kept.is_file()
    assert said.count('FAILED') == 1
    out, said = run_all(sweep)                                # told again, not tried again
    assert list(out.failed.values()) == [(why, kept)] and 'starts' not in said and len(out.done) == 2

def interrupted(home):  # noqa: F811
    "A sweep of two runs, one of which failed after its third checkpoint; and what repairs it."
    sweep = sweep_of(home, seeds=[0, 1], sets={'fail': 'value'})
    out, _ = run_all(sweep, max_runs=1)
    assert len(out.failed) == 1
    return sweep, sweep.partial(sweep.runs[0])

@pytest.mark.slow
def test_a_corrupt_checkpoint(home):  # noqa: F811
    "Refused before the kernel starts, by name; brought back, the run goes on from it."
    sweep, partial = interrupted(home)
    file = partial / 'checkpoint/state.json'
    whole = file.read_bytes()
    file.write_bytes(whole[:9])
    out, _ = run_all(sweep, max_runs=1, retry_failed=True)
    why, log = out.failed[sweep.runs[0].name]
    assert str(file) in why and 'JSONDecodeError' in why and f'remove {partial}' in why, why
    assert log.suffix == '.log' and file.read_bytes() == whole[:9]      # nothing was touched
    file.write_bytes(whole)
    out, _ = run_all(sweep, max_runs=1, retry_failed=True)
    why, kept = out.failed[sweep.runs[0].name]
    assert 'as you asked' in why and len(read_json(partial / 'manifest.json')['starts']) == 2

@pytest.mark.slow
def test_a_corrupt_params_file(home):  # noqa: F811
    "Of the sweep, of an unfinished run, and the manifest of a finished one."
    for text, word in (('steps: [', 'base.yaml:1: not readable as YAML'),
                       ('stepps: 2', 'base.yaml:1: there is no parameter'), ('- 1', 'expected `name: value` lines')):
        (home / 'params/tiny/base.yaml').write_text(text)
        with pytest.raises(SweepError, match=word.replace('[', r'\[')): sweep_of(home, seeds=[0])
    (home / 'params/tiny/base.yaml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(SweepError, match='base.yaml: cannot be read'): sweep_of(home, seeds=[0])
    (home / 'params/tiny/base.yaml').write_text('steps: 3\n')
    sweep, partial = interrupted(home)
    whole = (partial / 'params.yaml').read_bytes()
    for torn, word in ((b'lr: {', 'not readable as YAML'), (b'\xff\xfe', 'no text'), (b'', 'expected `name: value`')):
        (partial / 'params.yaml').write_bytes(torn)
        out, _ = run_all(sweep, max_runs=1, retry_failed=True)
        why, _ = out.failed[sweep.runs[0].name]
        assert word in why and str(partial / 'params.yaml') in why and f'remove {partial}' in why, why
    (partial / 'params.yaml').write_bytes(whole)

@pytest.mark.slow
def test_a_corrupt_manifest(home):  # noqa: F811
    "A finished run whose manifest is torn is not taken for done, nor overwritten."
    sweep = sweep_of(home, seeds=[0])
    assert len(run_all(sweep)[0].done) == 1
    final = sweep.final(sweep.runs[0])
    whole = (final / 'manifest.json').read_bytes()
    (final / 'manifest.json').write_bytes(whole[:-9])
    out, _ = run_all(sweep)
    why, _ = out.failed[sweep.runs[0].name]
    assert 'manifest.json cannot be read' in why and f'remove {final}' in why and not out.done
    (final / 'manifest.json').write_bytes(whole)
    assert len(run_all(sweep)[0].done) == 1 and found(sweep) == expected(sweep)

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

def test_a_failed_run_says_so_after_a_repair_by_hand(home):  # noqa: F811
    "A folder that was removed, as the messages propose, is a new run."
    sweep = sweep_of(home, seeds=[0])
    partial = sweep.partial(sweep.runs[0])
    partial.mkdir(parents=True)
    update_manifest(partial, state='failed', error='x')
    assert run_state(sweep.final(sweep.runs[0])) == 'failed'
    (partial / 'manifest.json').unlink(); partial.rmdir()
    assert run_state(sweep.final(sweep.runs[0])) == 'new'
    assert len(execute(sweep, Fake(sweep, {}), say=str).done) == 1
