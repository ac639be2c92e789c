"""Trackers beside real runs: live rows, once each after kills, two at once in one database, trouble that is told."""
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from tiny import write_experiment

from adflow.cli import main
from adflow.parts import PartError
from adflow.sweeps.plan import Sweep
from adflow.workbook.runs import read_json
from adflow.workbook.track import Follower, history_of, report_runs, results_of

ROOT = Path(__file__).resolve().parents[1]
CELLS = ['''
epochs: int = 4    # of .2 s, each with a checkpoint as the learner writes it
wait: bool = False # for a file `go` after the third
seed: int = 0      # added to every loss
run_dir: str = ''  # set by the launcher
''', '''
import time
import pandas as pd
from adflow.continual.learner import Checkpoint
from adflow.workbook.runs import Run
run = Run(run_dir)
class Nothing:
    def save(self, folder): folder.mkdir(parents=True, exist_ok=True)
checkpoint = Checkpoint(run.checkpoint)
read = checkpoint.read()
history = read[1]['history'] if read else []
for e in range(len(history), epochs):
    history.append({'task': 'ab'[e // 2 % 2], 'epoch': e % 2, 'lr': .1, 'loss': seed + 10. - e})
    checkpoint.write(Nothing(), Nothing(), {'history': history}, {}, {})
    while wait and e == 2 and not (run.path/'go').exists(): time.sleep(.1)
    time.sleep(.2)
run.metrics(pd.DataFrame([dict(stage=s, task='a', routed=True, image_auroc=.8 + .1 * s + seed) for s in (0, 1)]))
''']

def mlflow():
    for name in ('mlflow', 'sqlalchemy', 'alembic'):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'adflow[track]'")
    from mlflow.tracking import MlflowClient
    return MlflowClient

def tensorboard():
    pytest.importorskip('tensorboard', reason="tensorboard is not installed: pip install 'adflow[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator

@pytest.fixture
def home(tmp_path): return write_experiment(tmp_path, CELLS, 'epochs: 4\n', 'quick')

def start(home, *sets, name='quick', look=.5):
    "The launcher, as a process of its own, with an impatient tracker."
    file, outputs = str(home / 'params/tiny/quick.yaml'), str(home / 'outputs')
    call = (f'import sys; from adflow.workbook import launch; launch.LOOK = {look}; '
            f'sys.exit(launch.run({file!r}, {sets!r}, {outputs!r}, name={name!r}))')
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', call], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)

def until(what, seconds=150):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(1)
    return found

def runs_of(home, experiment='tiny'):
    "What MLflow's own client reads: name → (status, parameters, key → points)."
    client = mlflow()(f"sqlite:///{home / 'outputs/mlflow.db'}")
    there = client.get_experiment_by_name(experiment)
    found = {}
    for r in client.search_runs([there.experiment_id]) if there else []:
        assert r.info.run_name not in found, 'twice'
        points = {k: [(p.step, p.value) for p in client.get_metric_history(r.info.run_id, k)] for k in r.data.metrics}
        found[r.info.run_name] = r.info.status, r.data.params, points
    return found

WHOLE = {'train/loss': [(0, 10.), (1, 9.), (2, 8.), (3, 7.)], 'train/task': [(0, 0.), (1, 0.), (2, 1.), (3, 1.)],
         'result/image_auroc': [(0, .8), (1, .9)]}

def test_a_tracked_run_is_the_same_run(home):
    mlflow()
    (home / 'params/sweeps/s.yaml').write_text('base: ../tiny/quick.yaml\nseeds: [0, 1]\n')
    plain = Sweep(home / 'params/sweeps/s.yaml', home / 'outputs')
    tracked = Sweep(home / 'params/sweeps/s.yaml', home / 'outputs', ['track=mlflow'])
    assert [r.id for r in plain.runs] == [r.id for r in tracked.runs]
    assert [r.name for r in plain.runs] == [r.name for r in tracked.runs]
    assert [r.params.track for r in tracked.runs] == ['mlflow'] * 2
    assert 'track: mlflow' in tracked.runs[0].params.yaml(track=True)
    assert tracked.runs[0].params.yaml() == plain.runs[0].params.yaml()

def test_what_is_missing_is_said_before_anything_runs(home, monkeypatch, capsys):
    real = __import__('importlib.util').util.find_spec
    monkeypatch.setattr('adflow.workbook.track.importlib.util.find_spec',
                        lambda name, *a: None if name in ('mlflow', 'tensorboard') else real(name, *a))
    file = str(home / 'params/tiny/quick.yaml')
    (home / 'params/sweeps/s.yaml').write_text('base: ../tiny/quick.yaml\nseeds: [0, 1]\n')
    for name in ('mlflow', 'tensorboard'):
        assert main(['run', file, '--outputs', str(home / 'outputs'), '--set', f'track={name}']) == 2
        assert f"track: {name} needs {name}" in capsys.readouterr().err
        assert main(['sweep', str(home / 'params/sweeps/s.yaml'), '--outputs', str(home / 'outputs'), '--set',
                     f'track={name}']) == 2
        assert "pip install 'adflow[track]'" in capsys.readouterr().err
    assert main(['run', file, '--set', 'track=mlfow']) == 2 and "Did you mean 'mlflow'?" in capsys.readouterr().err
    assert not (home / 'outputs').exists()

@pytest.mark.slow
def test_rows_arrive_while_it_runs_and_once(home):
    "Live, then kill -9 of the launcher, then the same command: every epoch once, in MLflow's own tables."
    mlflow()
    p = start(home, 'wait=true', 'track=mlflow')
    partial = home / 'outputs/tiny/.quick.partial'
    status, params, points = until(lambda: (r := runs_of(home).get('quick') if (home / 'outputs/mlflow.db').exists()
                                            else None) and len(r[2].get('train/loss', [])) == 3 and r)
    assert status == 'RUNNING' and points['train/loss'] == WHOLE['train/loss'][:3]
    assert params == {'epochs': '4', 'wait': 'True', 'seed': '0'}
    assert 'track' not in (partial / 'params.yaml').read_text()
    p.send_signal(signal.SIGKILL)
    p.communicate()
    (partial / 'go').touch()
    p = start(home, 'wait=true', 'track=mlflow')
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and 'warning' not in err, err
    (name, (status, params, points)), = runs_of(home).items()
    assert status == 'FINISHED' and {k: points[k] for k in WHOLE} == WHOLE
    assert main(['runs', '--outputs', str(home / 'outputs'), '--track', 'mlflow']) == 0      # nothing is new
    assert runs_of(home)['quick'] == (status, params, points)
    files = {f.name for f in (home / 'outputs').iterdir() if not f.name.startswith('.')}
    assert files == {'tiny', 'mlflow.db'}                                                    # no copies

@pytest.mark.slow
def test_two_at_once_in_a_database_that_is_not_there_yet(home):
    mlflow()
    (home / 'params/sweeps/s.yaml').write_text('base: ../tiny/quick.yaml\nseeds: [0, 1]\nsets: {track: mlflow}\n')
    p = subprocess.run([sys.executable, '-m', 'adflow.cli', 'sweep', str(home / 'params/sweeps/s.yaml'), '--outputs',
                        str(home / 'outputs'), '--gpus', 'none', '--workers', '2'], capture_output=True, text=True,
                       env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr
    logs = ''.join(f.read_text() for f in (home / 'outputs/sweeps/s/logs').iterdir())
    assert 'warning: track' not in logs, logs
    found = runs_of(home, 's')                                # MLflow's experiment is the sweep
    assert len(found) == 2 and {r[0] for r in found.values()} == {'FINISHED'}
    assert sorted(r[2]['train/loss'][-1][1] for r in found.values()) == [7., 8.]
    assert all(len(r[2]['train/loss']) == 4 for r in found.values())

@pytest.mark.slow
def test_a_locked_database_stops_nothing(home):
    mlflow()
    Follower('mlflow')(told(home, 'before'), over=True)       # there is a database
    lock = sqlite3.connect(home / 'outputs/mlflow.db')
    lock.execute('BEGIN EXCLUSIVE')
    try:
        p = start(home, 'track=mlflow', look=1)
        out, err = p.communicate(timeout=180)
    finally: lock.close()
    assert p.returncode == 0 and read_json(home / 'outputs/tiny/quick/manifest.json')['state'] == 'done', err
    assert err.count('warning: track: mlflow: ') == 1 and '--track mlflow' in err, err
    assert set(runs_of(home)) == {'before'} and report_runs(home / 'outputs', 'mlflow') == 2  # as the warning proposes
    status, params, points = runs_of(home)['quick']
    assert status == 'FINISHED' and points['train/loss'] == WHOLE['train/loss']

@pytest.mark.slow
def test_failed_and_killed_runs_say_so(home):
    mlflow()
    nb = nbformat.read(home / 'nbs/experiments/tiny.ipynb', 4)
    nb.cells[1].source += '\nif seed == 1: raise ValueError("as you asked")'
    nbformat.write(nb, home / 'nbs/experiments/tiny.ipynb')
    assert start(home, 'seed=1', 'track=mlflow', name='bad').wait(120) == 1
    assert runs_of(home)['bad'][0] == 'FAILED'
    p = start(home, 'wait=true', 'track=mlflow', name='stopped')
    until(lambda: (home / 'outputs/tiny/.stopped.partial/checkpoint/current').is_file())
    p.terminate()
    assert p.wait(60) == 143 and runs_of(home)['stopped'][0] == 'KILLED'

@pytest.mark.slow
def test_the_history_of_a_real_learner(tmp_path):
    "What a tracker finds in the folder is what the learner says of itself."
    from test_predict import CLASSES, make_run
    path, study, stage = make_run(tmp_path / 'outputs', 'flow', couplings=1, epochs=2)
    rows = history_of(path)['train']
    assert len(rows) == len(stage.history) == 2 * len(CLASSES) and [r['task'] for r in rows] == [0, 0, 1, 1]
    assert [r['loss'] for r in rows] == [r['loss'] for r in stage.history] and set(rows[0]) == set(stage.history[0])
    assert results_of(path) == []                             # no metrics were written

def told(home, name='quick'):
    "A finished run's folder, made by hand."
    folder = home / 'outputs/tiny' / name
    (folder / 'checkpoint/state-0').mkdir(parents=True)
    history = [dict(task='a', epoch=e, lr=.1, loss=10. - e) for e in range(4)]
    (folder / 'checkpoint/state-0/state.json').write_text(json.dumps(dict(history=history)))
    (folder / 'checkpoint/current').write_text('state-0')
    (folder / 'params.yaml').write_text('experiment: tiny\nname: quick\nlr: 0.1\nloss: {nll: {}}\n')
    about = dict(state='done', experiment='tiny', name=name, started='2026-01-01T00:00:00Z',
                 ended='2026-01-01T00:01:00Z')
    (folder / 'manifest.json').write_text(json.dumps(about))
    return folder

@pytest.mark.parametrize('tracker', ['mlflow', 'tensorboard'])
def test_no_network(home, tracker, monkeypatch):
    "Neither of them calls home; MLflow would."
    (mlflow if tracker == 'mlflow' else tensorboard)()
    called, real = [], socket.socket.connect
    def connect(self, address):
        if self.family != socket.AF_UNIX: called.append(address)
        return real(self, address)
    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *a, **k: called.append(a) or [])
    follow = Follower(tracker)
    follow(told(home), over=True)
    time.sleep(1)
    assert not called and not follow.warned

def test_tensorboard_reads_back(home):
    events, follow = tensorboard(), Follower('tensorboard')
    for _ in range(2): follow(told(home, 'quick') if _ == 0 else home / 'outputs/tiny/quick', over=True)
    read = events(str(home / 'outputs/tensorboard/tiny/quick')).Reload()
    assert [(e.step, e.value) for e in read.Scalars('train/loss')] == WHOLE['train/loss']
    assert not follow.warned and len(list((home / 'outputs/tensorboard/tiny/quick').iterdir())) == 1

def test_tensorboard_in_trouble_stops_nothing(home, capsys):
    tensorboard()
    (home / 'outputs').mkdir()
    (home / 'outputs/tensorboard').write_text('a file is in the way')
    follow, folder = Follower('tensorboard'), told(home)
    for _ in range(3): follow(folder, over=True)
    assert capsys.readouterr().err.count('warning: track: tensorboard: ') == 1
    with pytest.raises(OSError): report_runs(home / 'outputs', 'tensorboard')      # asked for by name: an error

def test_a_spec_that_does_not_fit(home):
    with pytest.raises(PartError, match="track 'mlflow' takes no 'uri'"): Follower({'name': 'mlflow', 'uri': 'http://x'})
