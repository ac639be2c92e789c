"""Sweeps: what is killed goes on, what fails is told, two at once do not step on each other, the table is the same."""
import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import pandas as pd
import psutil
import pytest
from bs4 import BeautifulSoup
from PIL import Image
from tiny import write_experiment

from adflow.data.synthetic import write_embedded
from adflow.sweeps import plan
from adflow.sweeps.comparison import effects, varied_columns
from adflow.sweeps.execute import Local, execute, progress_of, result_table, state_table
from adflow.sweeps.mirror import Mirror
from adflow.sweeps.plan import Sweep, SweepError, plan_table
from adflow.sweeps.watch import remaining
from adflow.workbook.runs import flat, read_json, update_manifest

ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(
    [str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]))
CELLS = ['''
x: float = 1.      # what is measured
steps: int = 3     # of .2 s each, with a checkpoint after each
fail: str = ''     # what to raise
seed: int = 0      # of the noise
run_dir: str = ''  # set by the launcher
''', '''
import json, os, random, time
import pandas as pd
from adflow.workbook.runs import Run, write_file
run = Run(run_dir)
file = run.checkpoint/'state.json'
state = json.loads(file.read_text()) if file.is_file() else {'step': 0, 'sum': 0.}
for i in range(state['step'], steps):
    time.sleep(.2)
    state = {'step': i + 1, 'sum': state['sum'] + x * random.Random(seed * 1000 + i).random()}
    write_file(file, json.dumps(state))
if fail == 'value': raise ValueError('as you asked')
if fail == 'memory': raise MemoryError('CUDA out of memory')
run.metrics(pd.DataFrame([dict(stage=0, task='a', routed=True, image_auroc=state['sum'])]))
''']


@pytest.fixture
def home(tmp_path):
    "A folder with a small experiment and its base file."
    return write_experiment(tmp_path, CELLS, 'steps: 3\n')

def sweep_of(home, outputs='outputs', name='s', **spec):
    file = home / f'params/sweeps/{name}.yaml'
    file.write_text(json.dumps(dict(base='../tiny/base.yaml') | spec))
    return Sweep(file, home / outputs)

def command(home, *more, name='s', outputs='outputs', workers=2):
    return [sys.executable, '-m', 'adflow.cli', 'sweep', str(home / f'params/sweeps/{name}.yaml'), '--outputs',
            str(home / outputs), '--gpus', 'none', '--workers', str(workers), *more]

def expected(sweep):
    "What every run must end with, computed without any of adflow."
    out = []
    for r in sweep.runs:
        v, total = r.params.values, 0.
        for i in range(v['steps']): total += v['x'] * random.Random(v['seed'] * 1000 + i).random()
        out.append(total)
    return out

def found(sweep): return result_table(sweep)['image_auroc'].tolist()


def test_plan_and_dry_run(home, capsys):
    from adflow.cli import main
    sweep_of(home, grid={'x': [1., 2.]}, seeds=[0, 1])
    assert main(command(home, '--dry-run')[3:]) == 0
    said = capsys.readouterr().out
    assert '4 runs, 4 new; 2 at a time' in said and 'tiny/base+x-1+seed-0+' in said
    assert not (home / 'outputs').exists()
    (home / 'params/sweeps/s.yaml').write_text('{base: ../tiny/base.yaml, grid: {x: [much]}}')
    assert main(command(home)[3:]) == 2 and "run base+x-much" in capsys.readouterr().err
    (home / 'params/sweeps/s.yaml').write_text('{base: ../tiny/base.yaml}')
    assert main(command(home, '--address', 'auto')[3:]) == 2
    assert "executor 'local' takes no 'address'" in capsys.readouterr().err


@pytest.mark.parametrize('text', ['base: ../tiny/base.yaml  # Größe'.encode('latin-1'), b'\xff\xfeb\x00'])
def test_a_sweep_that_is_no_text(home, capsys, text):
    from adflow.cli import main
    (home / 'params/sweeps/s.yaml').write_bytes(text)
    assert main(command(home, '--dry-run')[3:]) == 2
    said = capsys.readouterr().err
    assert 's.yaml: no UTF-8 text: ' in said and 'Save it as UTF-8.' in said and 'Traceback' not in said

BUILT_IN = sorted((Path(__file__).resolve().parents[1] / 'params/sweeps').glob('*.yaml'))

@functools.cache
def built_in(name):
    "A sweep that comes with adflow, its data unread."
    with unittest.mock.patch('adflow.sweeps.plan.data_version', lambda values: ''):
        return Sweep(BUILT_IN[0].parent / f'{name}.yaml', '/nowhere')

def values_of(name, *keys):
    "Of each run of a built-in sweep: resolved parameters, nested ones as 'a.b'."
    rows = []
    for r in built_in(name).runs:
        v = flat(r.params.values)
        rows.append(tuple(json.dumps(v.get(k, r.params.values.get(k))) for k in keys))
    return rows

@pytest.mark.parametrize('file', BUILT_IN, ids=lambda f: f.stem)
def test_built_in_sweeps(file):
    "Every run of every sweep that comes with adflow resolves, and says in its first line what it asks."
    sweep = built_in(file.stem)
    assert len(sweep) > 1 and file.read_text().startswith('# ')
    assert len({r.readable for r in sweep.runs}) == len({r.id for r in sweep.runs}) == len(sweep)

@pytest.mark.parametrize('sweep, key, least', [
    ('hyperparameters', 'subnet.rank', 4), ('hyperparameters', 'couplings', 4), ('hyperparameters', 'dia_blocks', 4),
    ('hyperparameters', 'loss.tail.weight', 4), ('hyperparameters', 'loss.tail.ratio', 4),
    ('hyperparameters', 'loss.logdet.weight', 4), ('hyperparameters', 'subnet.kernel', 4),
    ('hyperparameters', 'aggregate.k', 5), ('hyperparameters', 'lr', 3), ('hyperparameters', 'epochs', 3),
    ('hyperparameters', 'image_size', 4), ('hyperparameters', 'backbone.layers', 3), ('backbones', 'backbone', 5),
    ('design', 'align', 5), ('design', 'context', 3), ('design', 'position', 4), ('design', 'subnet', 4),
    ('design', 'norm', 2), ('design', 'router', 4), ('design', 'aggregate', 2), ('design', 'adapters', 2),
    ('seeds', 'seed', 10), ('attention', 'mixer', 10), ('attention', 'seed', 3), ('modules', 'seed', 3)])
def test_built_in_sweeps_vary(sweep, key, least):
    "The tables of the seeds: so many different values of a parameter reach the runs."
    assert len(set(values_of(sweep, key))) >= least

def test_built_in_sweeps_cross():
    "Where every combination is meant, it is there."
    def combinations(name, *keys): return sorted(set(values_of(name, *keys)))
    assert len(combinations('visa', 'couplings', 'dia_blocks', 'loss.tail.weight', 'loss.logdet.weight')) == 2**4
    assert set(values_of('visa', 'dataset')) == {('"visa"',)}
    streams = combinations('scenarios', 'scenario', 'order')
    assert {s for s, _ in streams} == {'"1-1"', '"2-2"', '"joint"'} and len(streams) == 2 * 3 + 1
    dropout = [(a, r) for a, r in combinations('dropout', 'token_dropout.axis', 'token_dropout.rate') if r != '0.0']
    assert len(dropout) == 4 * 3 and {a for a, _ in dropout} == {'"row"', '"column"', '"isotropic"', '"random"'}
    cells = combinations('interaction', 'strategy', 'align', 'dia_blocks', 'loss.tail.weight')
    assert len(cells) == 2 * 4 and len(built_in('interaction')) == 2 * 4 * 4
    default = dict(zip(MODULES, values_of('modules', *MODULES)[0]))
    lacks = {r.changes['variant']: {k for k, v in zip(MODULES, row) if v != default[k]}
             for r, row in zip(built_in('modules').runs, values_of('modules', *MODULES))}
    assert lacks == {
        'whole': set(), 'no_tail': {'loss.tail.weight'}, 'no_logdet': {'loss.logdet.weight'}, 'no_alignment': {'align'},
        'no_context': {'context'}, 'no_position': {'position'}, 'no_lora': {'subnet.rank'}, 'no_dia': {'dia_blocks'},
        'no_lora_no_dia': {'subnet.rank', 'dia_blocks'}}

MODULES = ['loss.tail.weight', 'loss.logdet.weight', 'align', 'context', 'position', 'subnet.rank', 'dia_blocks']

def test_variants_are_compared_as_wholes(home):
    "What a variant sets does not hide its effect: the pairs agree in all else."
    parts = {'whole': {}, 'no_x': {'x': 0.}, 'neither': {'x': 0., 'fail': 'value'}}
    sweep = sweep_of(home, variants=parts, grid={'steps': [1, 2]}, seeds=[0, 1])
    planted = [.5 + .1 * r.changes['steps'] - .2 * (r.params.values['x'] == 0) for r in sweep.runs]
    table = pd.DataFrame([sweep.varied(r) | {'pixel_ap': v} for r, v in zip(sweep.runs, planted)])
    assert varied_columns(sweep, table) == ['variant', 'steps']
    at = effects(table, varied_columns(sweep, table), 'pixel_ap').set_index(['parameter', 'value'])
    assert at['pairs'].tolist() == [4, 4, 4, 6, 6]
    assert at['difference'].iloc[[1, 2, 4]].tolist() == pytest.approx([-.2, -.2, .1])

def test_what_a_run_is(home):
    "Another program or another image makes another run; the same ones again make the same run again."
    root = write_embedded(home / 'data', 0, ['film'], train=4, validation=0, good=1, defects=1, size=64)
    cells = ["""
dataset: str = 'folder'  # its kind
data_root: str = ''      # its place
classes: list = []       # of it
seed: int = 0            # none
run_dir: str = ''        # set by the launcher""", 'print(seed)']
    write_experiment(home, cells, f'data_root: {root}\nclasses: [film]\n', name='seen')
    notebook, image = home / 'nbs/experiments/seen.ipynb', min((root / 'film/train').rglob('*.png'))
    def planned():
        plan._data_of.cache_clear()                                      # a command of its own
        return sweep_of(home, base='../seen/base.yaml', seeds=[0]).runs[0]
    first, source, picture = planned(), notebook.read_text(), Image.open(image)
    assert planned().id == first.id
    notebook.write_text(source.replace('print(seed)', 'print(seed)  # a comment'))
    assert planned().id == first.id
    notebook.write_text(source.replace('print(seed)', 'print(seed + 1)'))
    other = planned()
    assert other.id != first.id and other.name != first.name and other.readable == first.readable
    notebook.write_text(source)
    raw = image.read_bytes()
    picture.point(lambda v: 255 - v).save(image)
    third = planned()
    assert len({first.id, other.id, third.id}) == 3 and third.name != first.name
    image.write_bytes(raw)
    assert planned().id == first.id

def test_outputs_that_cannot_be_written(home):
    (home / 'outputs').write_text('a file is in the way')
    sweep = sweep_of(home, seeds=[0])
    with pytest.raises(SweepError, match='cannot be made.*--outputs'): execute(sweep, Local(workers=1, gpus='none'))


class Fake:
    "An executor that ends runs as a script says, at once."
    slots = 2
    def __init__(self, sweep, codes): self.sweep, self.codes, self.running, self.asked = sweep, codes, {}, []
    def start(self, name, command, log):
        self.asked.append(name); self.running[name] = self.codes[name].pop(0) if self.codes.get(name) else 0
    def finished(self):
        ended = list(self.running.items())
        for name, code in ended:
            run = next(r for r in self.sweep.runs if r.name == name)
            state = {0: 'done', 1: 'failed'}.get(code)
            if code == 'nothing': code = 0; ended = [(n, 0) for n, _ in ended]      # 0, and no run
            folder = self.sweep.final(run) if code == 0 else self.sweep.partial(run)
            if state:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / 'manifest.json').write_text(json.dumps(dict(state=state, error='cell 2 failed: x')))
        self.running = {}
        return ended
    def stop(self): self.running = {}

def test_what_exit_codes_mean(home):
    "Killed runs are tried again, three times by default; a failed one is not; a locked one waits."
    sweep = sweep_of(home, seeds=[0, 1, 2, 3])
    a, b, c, d = [r.name for r in sweep.runs]
    fake = Fake(sweep, {a: [-9, 137], b: [1], c: [-9] * 9, d: [75, 0]})
    said = []
    out = execute(sweep, fake, say=said.append)
    assert sorted(out.done) == sorted([a, d]) and set(out.failed) == {b, c} and out.left == []
    assert [fake.asked.count(n) for n in (a, b, c, d)] == [3, 1, 4, 2]
    assert sum('killed' in s for s in said) == 6 and sum('FAILED' in s for s in said) == 2
    again = Fake(sweep, {})
    out = execute(sweep, again, say=said.append)         # failed ones only when asked for; killed ones always
    assert again.asked == [c] and set(out.failed) == {b}
    again = Fake(sweep, {})
    out = execute(sweep, again, retry_failed=True, say=said.append)
    assert again.asked == [b] and len(out.done) == 4 and not out.failed

def test_a_run_that_says_nothing_is_not_done(home):
    "Exit code 0 without a finished folder is a failure, with the last words of the log."
    sweep = sweep_of(home, seeds=[0])
    out = execute(sweep, Fake(sweep, {sweep.runs[0].name: ['nothing']}), say=str)
    assert list(out.failed.values())[0][0] == 'nothing was said' and not out.done

def test_a_clock_that_jumps(home, monkeypatch):
    "Nothing in the loop trusts the wall clock."
    sweep = sweep_of(home, seeds=[0, 1, 2])
    monkeypatch.setattr(time, 'time', lambda t=iter(range(10**9, 0, -10**6)): next(t))
    out = execute(sweep, Fake(sweep, {sweep.runs[0].name: [75]}), say=str)
    assert len(out.done) == 3

def test_max_runs_and_disk(home):
    sweep = sweep_of(home, seeds=[0, 1, 2])
    fake = Fake(sweep, {})
    out = execute(sweep, fake, max_runs=2, say=str)
    assert len(out.done) == 2 and len(out.left) == 1 and len(fake.asked) == 2
    out = execute(sweep, fake, min_free=1e9, say=str)
    assert len(out.left) == 1 and 'make room' in out.stopped and len(fake.asked) == 2
    states = [json.loads(line)['state'] for line in (sweep.folder / 'status.jsonl').read_text().splitlines()]
    assert sorted(states) == ['done', 'done', 'new']


def test_time_left_on_a_first_night(home, monkeypatch):
    "No past run tells; the first that ends does, in the middle of the sweep."
    class Timed(Fake):
        slots = 1
        def finished(self):
            ended = super().finished()
            for r in self.sweep.runs:
                if r.name in dict(ended):
                    update_manifest(self.sweep.final(r), minutes=7.)
                    (self.sweep.final(r) / 'params.yaml').write_text(r.params.yaml())
            return ended
    monkeypatch.setattr(time, 'monotonic', itertools.count(0, 3).__next__)      # so that every turn is looked at
    sweep, seen = sweep_of(home, seeds=[0, 1, 2]), []
    execute(sweep, Timed(sweep, {}), lambda table: seen.append(remaining(table, 1)), say=str)
    assert [seen[0] != seen[0], *seen[1:]] == [True, 14., 7.]

def test_progress_of_a_run(tmp_path):
    "The bar moves the share of the present cell, and knows a lower bound of the time; without it past runs tell."
    def told(guess=float('nan'), **about):
        (tmp_path / '.progress.json').write_text(json.dumps(dict(cell=3, cells=8, minutes=2.) | about))
        return progress_of(tmp_path, guess)
    bar = dict(doing='learn film', done=120, of=480, left='1:01:30', loss=351.2)
    p = told(**bar)
    assert (p['doing'], p['progress'], p['left'], p['loss']) == ('learn film 120/480', 3.25 / 8, 61.5, 351.2)
    assert told(5., **bar)['left'] == 61.5 and told(90., **bar)['left'] == 88.
    assert told(5.)['left'] == 3. and told(1.)['left'] == 0. and told(5., **bar | dict(left='?'))['left'] == 3.
    assert told()['left'] != told()['left'] and told(**bar | dict(doing=''))['progress'] == 3 / 8


@pytest.mark.parametrize('mask, gpus, want', [
    ('', 'auto', ['0', '1']), ('4,5', 'auto', ['4', '5']), ('4,5', '1', ['5']), ('4,5', '0,1', ['4', '5']),
    ('GPU-8932f937,GPU-1ab2c3d4', [1], ['GPU-1ab2c3d4']), ('', '1', ['1'])])
def test_runs_keep_to_the_gpus_that_are_ours(tmp_path, monkeypatch, mask, gpus, want):
    "What a run finds in its environment, where two GPUs are visible."
    monkeypatch.setattr('adflow.sweeps.execute.gpu_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', mask)
    monkeypatch.delenv('CUDA_DEVICE_ORDER', raising=False)
    local = Local(gpus)
    show = 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("CUDA_DEVICE_ORDER"))'
    for i in range(local.slots): local.start(str(i), [sys.executable, '-S', '-c', show], tmp_path / str(i))
    while local.running: local.finished()
    order = None if mask else 'PCI_BUS_ID'              # who wrote a mask counted in an order of his own
    assert [(tmp_path / str(i)).read_text() for i in range(local.slots)] == [f'{w} {order}\n' for w in want]

def test_gpus_that_are_not_ours(monkeypatch):
    monkeypatch.setattr('adflow.sweeps.execute.gpu_count', lambda: 2)
    for mask, gpus, said in (('4,5', '4,5', r'\[4, 5\] are not there: this machine has 2 .*=4,5: numbers are places'),
                             ('', '2', r'\[2\] are not there: this machine has 2\.'), ('', '0;1', 'expected numbers')):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', mask)
        with pytest.raises(SweepError, match=said): Local(gpus)

@pytest.mark.parametrize('url', ['memory://{}', 'file://{}'])
def test_a_mirror(home, url):
    "What is done here is copied, whole; another machine fetches it and executes the rest. A torn copy is executed."
    mirror, said = Mirror(url.format(home / 'there')), []
    sweep = sweep_of(home, seeds=[0, 1, 2])
    def done_by(fake):                                       # the toy executor writes no parameters' hash
        for r in sweep.runs:
            if fake.sweep.state(r) == 'done': update_manifest(fake.sweep.final(r), params_hash=r.params.hash)
    fake = Fake(sweep, {})
    execute(sweep, fake, max_runs=2, say=said.append)
    done_by(fake)
    out = execute(sweep, Fake(sweep, {}), max_runs=0, mirror=mirror, say=said.append)
    done_by(fake)
    assert len(out.done) == 3 and sum('copied' in s for s in said) == 3
    execute(sweep, Fake(sweep, {}), mirror=mirror, say=said.append)      # the third has its hash now: copied again
    assert sum('copied' in s for s in said) == 4
    first = sweep.final(sweep.runs[0])
    mirror.fs.pipe_file(f'{mirror._at(first)}/manifest.json', b'{"state"')
    other = sweep_of(home, outputs='elsewhere', seeds=[0, 1, 2])
    fake, said = Fake(other, {}), []
    out = execute(other, fake, mirror=mirror, say=said.append)
    assert len(out.done) == 3 and fake.asked == [other.runs[0].name] and sum('fetched' in s for s in said) == 2
    assert mirror.files(other.final(other.runs[0]))['manifest.json'] > 9                # and is copied again
    for r, a in zip(sweep.runs[1:], other.runs[1:]):
        assert (sweep.final(r) / 'manifest.json').read_bytes() == (other.final(a) / 'manifest.json').read_bytes()

def test_a_mirror_in_trouble_stops_no_run(home):
    mirror, said = Mirror('memory://nowhere'), []
    def unreachable(*_): raise ConnectionError('no route to host')
    mirror.files = unreachable
    sweep = sweep_of(home, seeds=[0])
    assert len(execute(sweep, Fake(sweep, {}), mirror=mirror, say=said.append).done) == 1
    assert sum('warning' in s and 'no route to host' in s for s in said) == 3           # pull, push, push at the end

@pytest.mark.slow
def test_failures_are_told(home):
    "What the notebook raises is a failure of the run. Where memory ran out it is the machine's: the run may go on."
    sweep = sweep_of(home, variants={'good': {}, 'raises': {'fail': 'value'}, 'memory': {'fail': 'memory'}})
    p = subprocess.run(command(home, '--retries', '0'), env=ENV, capture_output=True, text=True, timeout=300)
    assert p.returncode == 1 and 'ValueError: as you asked' in p.stdout and 'CUDA out of memory' in p.stdout
    assert '1 done, 2 failed, 0 left' in p.stdout and found(sweep) == expected(sweep)[:1]
    assert [sweep.state(r) for r in sweep.runs] == ['done', 'failed', 'killed']
    kept = sweep.partial(sweep.runs[1]) / 'notebook.ipynb'
    assert str(kept) in p.stdout and kept.is_file()


REPORTED = [CELLS[0].replace("fail: str = ''", "lucky: bool = False"), '''
import pandas as pd
from adflow.workbook.runs import Run
run = Run(run_dir)
known = dict(stage=0, task='a', routed=True, image_auroc=.7 + .1 * x + .01 * seed, pixel_ap=.9 - .2 * x - .1 * lucky)
run.metrics(pd.DataFrame([known]))
''']

def tables_of(html):
    "The tables of a page, numbers as numbers."
    def plain(text):
        try: return float(text)
        except ValueError: return text
    page = BeautifulSoup(re.sub(r'<script.*?</script>', '', html, flags=re.S), 'html.parser')
    for t in page.find_all('table'):
        head, *rows = [[plain(c.get_text().strip()) for c in r.find_all(['th', 'td'])] for r in t.find_all('tr')]
        yield pd.DataFrame([r for r in rows if len(r) == len(head)], columns=head)

@pytest.mark.slow
def test_the_report_of_a_sweep(home):
    """By the commands alone. Four runs with planted effects: of x, pixel_ap falls by .2; a run that nothing beats for
    each x; what they cost. The page needs no network, and no run is executed again."""
    write_experiment(home, REPORTED, 'steps: 3\n')
    kinds = {'plain': {'lucky': False}, 'worse': {'lucky': True}}
    sweep = sweep_of(home, variants=kinds, grid={'x': [1., 2.]}, seeds=[0])
    assert subprocess.run(command(home), env=ENV, capture_output=True, timeout=400).returncode == 0
    call = [sys.executable, '-m', 'adflow.cli', 'report', 'sweep', str(home / 'params/sweeps/s.yaml'), '--outputs',
            str(home / 'outputs')]
    p = subprocess.run(call, env=ENV, capture_output=True, text=True, timeout=400)
    page = home / 'outputs/sweep/s/report.html'
    assert p.returncode == 0 and str(page) in p.stdout, p.stderr
    html = page.read_text()
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*', html)     # no network
    done, found_effects, front, cost = [t for t in tables_of(html) if {'parameter', 'pixel_ap', 'minutes'} & {*t}]
    at = found_effects.set_index(['parameter', 'value'])
    assert at.loc[('x', 2.), ['runs', 'mean', 'pairs', 'difference']].tolist() == [2, .45, 2, -.2]
    assert at.loc[('variant', 'worse'), 'difference'] == pytest.approx(-.1) and len(at) == 4
    names = {r.readable: f'tiny/{r.name}' for r in sweep.runs}
    assert set(front['run']) == {n for k, n in names.items() if 'plain' in k} and len(done) == 4
    assert front.set_index('x')[['image_auroc', 'pixel_ap']].loc[[1., 2.]].to_numpy().tolist() == [[.8, .7], [.9, .5]]
    spent = {f'tiny/{r.name}': read_json(sweep.final(r) / 'manifest.json') for r in sweep.runs}
    for r in cost.itertuples():
        m = spent.pop(r.run)
        assert (r.minutes, r.memory_gib) == pytest.approx((m['minutes'], m['peak_memory_gib']))
        assert len(m['starts']) == 1
    assert not spent
    # both figures, drawn from data that is in the page, by a plotly that is in it too
    drawn = re.findall(r'Plotly.newPlot\("figure\d", ({.*?})\)</script>', html)
    assert [json.loads(d)['layout']['title']['text'] for d in drawn] == ['pixel_ap: mean ± std over runs',
                                                                       'pixel_ap against image_auroc']
    assert len(html) > 3e6 and all(n in drawn[1] for n in names.values())


def children_of(pid):
    try: return [p for p in psutil.Process(pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess: return []

def kind_of(process):
    "Which part of a sweep a process is."
    line = ' '.join(process.cmdline())
    kinds = {'adflow.cli sweep': 'sweep', 'adflow.cli run': 'launcher', 'adflow.workbook.child': 'child',
             'ipykernel': 'kernel'}
    return next((k for word, k in kinds.items() if word in line), 'other')

def survive(call, outputs, sweep, kills, seed=0, limit=900, env=ENV, checkpoint='state.json'):
    """Gives a command until the sweep is done although random ones of its processes, the launcher too, are killed.
    Which were. Every second kill waits for a run that has a checkpoint to lose."""
    rng, begun, done = random.Random(seed), time.monotonic(), []
    while True:
        p = subprocess.Popen(call, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
        pause = rng.uniform(2, 6)
        while p.poll() is None:
            assert time.monotonic() - begun < limit, state_table(sweep, plan_table(sweep))
            time.sleep(.1)
            if len(done) >= kills: continue
            pause -= .1
            if pause > 0 or (len(done) % 2 and not list(outputs.glob(f'*/.*.partial/checkpoint/{checkpoint}'))):
                continue
            pause = rng.uniform(2, 6)
            wanted = ('kernel', 'sweep', 'launcher', 'child')[len(done) % 4]     # all in turn, which of them by chance
            try:
                victims = [v for v in (psutil.Process(p.pid), *children_of(p.pid)) if kind_of(v) == wanted]
                if victims: rng.choice(victims).send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess: continue
            if not victims: pause = .5
            else: done.append(wanted)
        if p.returncode == 0: return done
        assert p.returncode in (-9, 1), p.returncode     # the launcher was killed: the same command again

@pytest.mark.slow
def test_random_kills_change_nothing(home):
    "Of launchers, kernels and whatever else belongs to a sweep. ADFLOW_KILLS=10 ADFLOW_RUNS=24 for the long version."
    runs, kills = int(os.environ.get('ADFLOW_RUNS', 6)), int(os.environ.get('ADFLOW_KILLS', 4))
    sweep = sweep_of(home, sets={'steps': 10}, grid={'x': [1., 2.]}, seeds=list(range(runs // 2)))
    assert len(survive(command(home), home / 'outputs', sweep, kills)) == kills
    assert found(sweep) == expected(sweep)
    starts = [len(read_json(sweep.final(r) / 'manifest.json')['starts']) for r in sweep.runs]
    assert max(starts) > 1                                # some run really was resumed
    assert not list((home / 'outputs/tiny').glob('.*.partial'))

@pytest.mark.slow
def test_killed_before_it_got_its_name(home):
    "All cells of a run are done and its launcher dies before the rename: the sweep names it and computes nothing."
    sweep = sweep_of(home, grid={'x': [1., 2.]}, seeds=[0])
    assert subprocess.run(command(home), env=ENV, timeout=400).returncode == 0
    run, read = sweep.runs[1], lambda: read_json(sweep.final(sweep.runs[1]) / 'manifest.json')
    before = read()
    sweep.final(run).rename(sweep.partial(run))
    assert sweep.state(run) == 'killed' and len(found(sweep)) == 1
    assert subprocess.run(command(home), env=ENV, timeout=400).returncode == 0
    assert found(sweep) == expected(sweep) and read() == before and not sweep.partial(run).exists()

@pytest.mark.skipif(not os.environ.get('ADFLOW_NIGHT'), reason='an hour: ADFLOW_NIGHT=1')
def test_a_night_of_the_quickstart(tmp_path, monkeypatch):
    """24 runs of the quickstart, two at a time, twice: left alone, and under ten kills.
    Each sweep extracts its own features. The tables are equal to the last bit."""
    runs, kills = int(os.environ.get('ADFLOW_RUNS', 24)), int(os.environ.get('ADFLOW_KILLS', 10))
    file, tables = tmp_path / 'night.yaml', {}
    file.write_text(json.dumps(dict(base='moleflow/quickstart.yaml', sets={'checkpoint_seconds': 1},
                                    grid={'couplings': [1, 2], 'subnet.rank': [2, 4]}, seeds=list(range(runs // 4)))))
    for name, n in (('undisturbed', 0), ('killed', kills)):
        outputs = tmp_path / name
        env = ENV | dict(ADFLOW_CACHE=str(tmp_path / f'cache-{name}'))
        call = [sys.executable, '-m', 'adflow.cli', 'sweep', str(file), '--outputs', str(outputs), '--gpus', 'none',
                '--workers', '2', '--threads', '1', '--retries', '99']
        monkeypatch.setenv('ADFLOW_CACHE', env['ADFLOW_CACHE'])
        plan._data_of.cache_clear()
        sweep, begun = Sweep(file, outputs), time.monotonic()
        killed = survive(call, outputs, sweep, n, limit=7200, env=env, checkpoint='current')
        starts = [len(read_json(sweep.final(r) / 'manifest.json')['starts']) for r in sweep.runs]
        tables[name] = result_table(sweep)
        print(f'{name}: {len(tables[name])} runs in {(time.monotonic() - begun) / 60:.1f} min; killed: '
              f'{pd.Series(killed, dtype=object).value_counts().to_dict()}; started more than once: '
              f'{sum(s > 1 for s in starts)} runs', flush=True)
        assert len(killed) == n and (max(starts) > 1) == (n > 0)
        assert not list(outputs.glob('*/.*.partial'))
    left = [t.drop(columns=['minutes', 'memory_gib']) for t in tables.values()]
    assert len(left[0]) == runs and left[0]['pixel_ap'].nunique() > runs // 2
    pd.testing.assert_frame_equal(*left, check_exact=True)

@pytest.mark.slow
def test_two_at_once(home):
    "Two sweeps that share runs, and one of them started twice: every run is executed once."
    first = sweep_of(home, name='a', seeds=[0, 1, 2])
    second = sweep_of(home, name='b', seeds=[1, 2, 3])
    shared = {r.name for r in first.runs} & {r.name for r in second.runs}
    assert len(shared) == 2
    calls = [subprocess.Popen(command(home, name=n, workers=1), env=ENV, stdout=subprocess.PIPE, text=True)
             for n in ('a', 'b', 'a')]
    said = [p.communicate(timeout=300)[0] for p in calls]
    assert [p.returncode for p in calls] == [0, 0, 0], said
    assert found(first) == expected(first) and found(second) == expected(second)
    for s in (first, second):
        for r in s.runs: assert len(read_json(s.final(r) / 'manifest.json')['starts']) == 1

@pytest.mark.slow
def test_stopping_leaves_nothing_behind(home):
    sweep = sweep_of(home, sets={'steps': 100}, seeds=[0, 1])
    p = subprocess.Popen(command(home), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if sum(sweep.state(r) == 'running' and (sweep.partial(r) / 'checkpoint/state.json').is_file()
               for r in sweep.runs) == 2: break
        time.sleep(.1)
    family = children_of(p.pid)
    assert len(family) >= 4
    p.terminate()
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'the same command goes on' in err
    psutil.wait_procs(family, timeout=20)
    assert not [c for c in family if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert [sweep.state(r) for r in sweep.runs] == ['killed', 'killed']
    assert pd.notna(state_table(sweep, plan_table(sweep))['state']).all()

@pytest.mark.parametrize('options, said', [
    (['--gpus', '0,1,4,5'], 'gpus is how many each run takes: a number such as 1 or 0.5, none, or auto'),
    (['--gpus', '-1'], 'gpus is how many each run takes'), (['--cpus', '0'], 'cpus=0.0 of each run must be above 0')])
def test_options_of_ray_are_told(home, capsys, options, said):
    "Before a cluster is even asked."
    from adflow.cli import main
    sweep_of(home, seeds=[0])
    assert main(command(home)[3:-4] + ['--executor', 'ray', *options]) == 2
    assert said in capsys.readouterr().err

def test_what_ray_says(home):
    "A lost machine is tried again; a task that raises of itself is told with its cause, and is not."
    ray = pytest.importorskip('ray', reason="ray is not installed: pip install 'adflow[ray]'")
    from adflow.sweeps.cluster import Ray
    errors = ray.exceptions
    class Cluster:                                                       # references are what comes of them
        exceptions = errors
        def get(self, ref):
            if isinstance(ref, Exception): raise ref
            return ref
        def wait(self, refs, num_returns, timeout): return refs, []
    sweep = sweep_of(home, seeds=[0, 1, 2])
    a, b, c = [r.name for r in sweep.runs]
    elsewhere = errors.RayTaskError('run_command', 'Traceback …', FileNotFoundError(2, 'No such file', '/far/log'))
    coming = {a: [errors.WorkerCrashedError(), errors.NodeDiedError('node gone')] * 2,
              b: [elsewhere.as_instanceof_cause()], c: [errors.RuntimeEnvSetupError('no pip')]}
    asked, executor = [], Ray.__new__(Ray)
    executor.ray, executor.running, executor.most = Cluster(), {}, 1
    executor.need, executor.ray.cluster_resources = {'CPU': 1.}, lambda: {'CPU': 3}
    executor.start = lambda n, _, log: (asked.append(n), executor.running.update({n: (coming[n].pop(0), log)}))
    said = []
    out = execute(sweep, executor, say=said.append)
    assert [asked.count(n) for n in (a, b, c)] == [4, 1, 1] and not out.done
    why, log = out.failed[b]
    assert "Ray could not start the run: FileNotFoundError: [Errno 2] No such file: '/far/log'. Does every" in why
    assert why in ' '.join(log.read_text().split()) and sum('killed' in s for s in said) == 4
    assert 'RuntimeEnvSetupError' in out.failed[c][0] and 'NodeDiedError' in out.failed[a][0]

@pytest.mark.slow
def test_a_cluster_loses_a_node(home, monkeypatch, capsys):
    """Two machines of one slot each; one is killed in the middle of its run. The table is that of an undisturbed sweep.
    Then by the command, on the machine that is left, where a run whose log has no folder has failed at once."""
    ray = pytest.importorskip('ray', reason="ray is not installed: pip install 'adflow[ray]'")
    from ray.cluster_utils import Cluster
    from adflow.sweeps.cluster import Ray
    monkeypatch.setenv('RAY_raylet_start_wait_time_s', '180')           # a busy machine
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    lost = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        sweep = sweep_of(home, sets={'steps': 25}, seeds=[0, 1, 2, 3])
        executor, gone, said = Ray(address=cluster.address), [], []
        assert executor.slots == 2
        def watch(table):
            begun = [r for r in sweep.runs if (sweep.partial(r) / 'checkpoint/state.json').is_file()]
            if len(begun) == 2 and not gone:
                gone.append(time.monotonic())
                cluster.remove_node(lost, allow_graceful=False)
        out = execute(sweep, executor, watch, say=said.append)
        assert gone and sum('killed' in s for s in said) >= 1
        assert len(out.done) == 4 and not out.failed and found(sweep) == expected(sweep)
        assert max(len(read_json(sweep.final(r) / 'manifest.json')['starts']) for r in sweep.runs) > 1
        executor.start('x', ['python', '-c', ''], home / 'nowhere/log')
        ray.wait([executor.running['x'][0]], timeout=60)
        assert executor.finished() == [('x', 2)]
        from adflow.cli import main
        more, call = sweep_of(home, name='t', seeds=[4]), command(home, name='t')[3:-4]
        call += ['--executor', 'ray', '--address', cluster.address, '--gpus', 'none']
        assert main([*call, '--cpus', '9']) == 2 and 'a run wants 9.0 CPU, the whole' in capsys.readouterr().err
        assert main([*call, '--cpus', '1']) == 0 and found(more) == expected(more)
        assert '1 done, 0 failed, 0 left' in capsys.readouterr().out
    finally:
        ray.shutdown()
        cluster.shutdown()
