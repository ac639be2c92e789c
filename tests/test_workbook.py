"""Runs of a tiny experiment through the real launcher: success, failure, kill, resume, two at once, offline."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from adflow.flow.losses import build_losses
from adflow.parts import PartError
from adflow.workbook.child import report, without_progress
from adflow.workbook.params import ParamsError, load, read_yaml, set_path
from adflow.workbook.runs import Run, list_runs, read_json, update_manifest, write_file

ROOT = Path(__file__).resolve().parents[1]
CELLS = {
    'parameters': """
        from typing import Literal
        steps: int = 3          # of the bar
        finish: Literal['matt', 'gloss'] = 'matt'  # of the surface
        lr: float = 0.1         # a number
        blend: dict = {'salt': {'grams': 1.0}}  # a mapping
        fail: bool = False      # whether to fail
        wait: bool = False      # whether to wait for the file `go` in the checkpoint
        run_dir: str = ''       # set by the launcher""",
    'work': """
        import json, os, sys, time, warnings
        from pathlib import Path
        from tqdm import tqdm
        checkpoint = Path(run_dir)/'checkpoint'
        checkpoint.mkdir(exist_ok=True)
        (checkpoint/'pid').write_text(str(os.getpid()))
        at = checkpoint/'at.json'
        first = json.loads(at.read_text()) if at.exists() else 0
        print('started from', first)
        for i in tqdm(range(first, steps), desc='steps', disable=False):
            time.sleep(.02)
            at.write_text(json.dumps(i + 1))
        warnings.warn('keep this one')
        while wait and not (checkpoint/'go').exists(): time.sleep(.05)
        if fail: raise RuntimeError('the cell was told to fail')""",
    'result': """
        import pandas as pd
        from IPython.display import display
        pd.DataFrame([{'stage': s, 'task': 'a', 'class': 'a', 'routed': r, 'image_auroc': .8 + .1 * s, 'pixel_ap': lr}
                      for s in (0, 1) for r in (True, False)]).to_parquet(run_dir + '/metrics.parquet')
        for _ in range(2):
            lines = [{'type': 'scatter', 'y': [1, 3, 2], 'name': '</script>'}]
            display({'application/vnd.plotly.v1+json': {'data': lines, 'layout': {}},
                     'text/plain': 'figure'}, raw=True)""",
}


def strip(text):
    return '\n'.join(line[8:] if line.startswith(' ' * 8) else line for line in text.strip('\n').split('\n'))

@pytest.fixture
def home(tmp_path):
    "A folder with an experiment of its own and one parameter file."
    cell = {'cell_type': 'code', 'outputs': [], 'execution_count': None}
    made = [{'cell_type': 'markdown', 'metadata': {}, 'source': '# Tiny\n\nIs $x^2 < \\frac{1}{2}$? `$not_math$`'}]
    made += [{**cell, 'source': strip(s), 'metadata': {'tags': ['parameters']} if k == 'parameters' else {}} for k,
             s in CELLS.items()]
    (tmp_path / 'nbs/experiments').mkdir(parents=True)
    (tmp_path / 'nbs/experiments/tiny.ipynb').write_text(json.dumps({'cells': made, 'metadata': {}, 'nbformat': 4,
                                                                     'nbformat_minor': 4}))
    (tmp_path / 'params/tiny').mkdir(parents=True)
    (tmp_path / 'params/tiny/quick.yaml').write_text('steps: 4\nlr: 2e-1\n')
    return tmp_path

def start(home, *args, **popen):
    "`adflow run …` as a process of its own."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': ''}
    return subprocess.Popen([sys.executable, '-m', 'adflow.cli', 'run', 'params/tiny/quick.yaml', *args], cwd=home,
                            env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)

def adflow(home, *args):
    p = start(home, *args)
    out, err = p.communicate(timeout=180)
    return p.returncode, out, err

def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(.05)

def gone(pid):
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def test_a_run_from_beginning_to_end_and_again(home):
    code, out, err = adflow(home)
    assert code == 0, err
    done = home / 'outputs/tiny/quick'
    assert not (done.parent / '.quick.partial').exists()
    assert {p.name for p in done.iterdir()} == {'checkpoint', 'manifest.json', 'metrics.parquet', 'notebook.ipynb',
                                                'params.yaml', 'report.html'}
    # progress: in the terminal, not in the notebook; other words in both
    notebook = (done / 'notebook.ipynb').read_text()
    assert '4/4' in err and '4/4' not in notebook and 'it/s' not in notebook
    assert 'keep this one' in err and 'keep this one' in notebook and 'started from 0' in notebook
    assert '── Tiny' in err and len(notebook) < 100_000
    # parameters and manifest
    stored = read_yaml((done / 'params.yaml').read_text())
    assert stored['lr'] == .2 and stored['steps'] == 4 and stored['experiment'] == 'tiny' and 'run_dir' not in stored
    m = read_json(done / 'manifest.json')
    assert m['state'] == 'done' and m['peak_memory_gib'] > 0 and m['params_hash']
    assert m['versions']['torch'] and m['hardware']['cores']
    # what is said
    for name in ('notebook.ipynb', 'report.html', 'metrics.parquet', 'checkpoint'): assert str(done / name) in out
    assert '0.9000' in out and '0.8000' not in out   # the last stage, routed
    # the report
    check_report(done / 'report.html')
    # the same command again: nothing is computed
    before = {p: p.stat().st_mtime_ns for p in done.rglob('*')}
    code, out, err = adflow(home)
    assert code == 0 and 'is done already' in out and '0.9000' in out
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob('*')}
    # other parameters under the same name
    code, out, err = adflow(home, '--set', 'lr=0.3')
    assert code == 2 and 'lr: 0.2 → 0.3' in err and '--name' in err and '--force' in err and 'Traceback' not in err
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob('*')}
    # a forced run that fails leaves the finished one alone; one that succeeds replaces it
    assert adflow(home, '--force', '--set', 'fail=true')[0] == 1
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob('*')}
    assert adflow(home, '--force', '--set', 'lr=0.3')[0] == 0
    assert pd.read_parquet(done / 'metrics.parquet').pixel_ap.tolist() == [.3] * 4
    assert [p.name for p in sorted(done.parent.iterdir())] == ['.quick.lock', 'quick']

def check_report(path):
    page = path.read_text()
    assert path.stat().st_size < 8_000_000
    assert page.count('plotly.js v') == 1 and page.count('Plotly.newPlot("figure') == 2
    assert re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)\s*=\s*["\']?(?!data:|#)[^\s>]*', page) == []
    own = page.replace(max(re.findall(r'<script>.*?</script>', page, re.S), key=len), '')  # without plotly.js
    assert 'cdn' not in own.lower() and 'import(' not in own and '@import' not in own
    assert '<math' in page and '<mfrac' in page and '$not_math$' in page
    assert '"<\\/script>"' in page                     # a name in a figure cannot end its script
    assert 'keep this one' in own

def test_a_failing_cell(home):
    code, out, err = adflow(home, '--set', 'fail=true')
    kept = home / 'outputs/tiny/.quick.partial/notebook.ipynb'
    assert code == 1
    assert 'cell 4 (In [3]) failed: RuntimeError: the cell was told to fail' in err
    assert 'if fail: raise RuntimeError' in err
    assert str(kept) in err and '\x1b[' not in err.split('adflow:')[-1]
    assert 'the cell was told to fail' in kept.read_text()
    assert not (home / 'outputs/tiny/quick').exists()
    runs = list_runs(home / 'outputs')
    assert runs.state.tolist() == ['failed'] and 'RuntimeError' in read_json(kept.with_name('manifest.json'))['error']
    # repaired, the same parameters would resume; others are refused until forced
    assert adflow(home)[0] == 2
    assert adflow(home, '--force')[0] == 0
    assert list_runs(home / 'outputs').state.tolist() == ['done']

def test_kill_9_then_the_same_command(home):
    p = start(home, '--set', 'wait=true')
    checkpoint = home / 'outputs/tiny/.quick.partial/checkpoint'
    wait_for(lambda: (checkpoint / 'at.json').exists() and (checkpoint / 'at.json').read_text() == '4')
    kernel = int((checkpoint / 'pid').read_text())
    children = psutil.Process(p.pid).children(recursive=True)
    assert kernel in [c.pid for c in children]
    assert list_runs(home / 'outputs').state.tolist() == ['running']
    # a second process is told who is at it, and touches nothing
    code, _, err = adflow(home, '--set', 'wait=true')
    assert code == 75 and f'by process {p.pid}' in err
    p.kill()
    p.communicate()
    again = start(home, '--set', 'wait=true')   # at once, while the orphans may still be dying
    wait_for(lambda: all(gone(c.pid) for c in children), 20)
    wait_for(lambda: (checkpoint / 'pid').read_text() != str(kernel))
    (checkpoint / 'go').touch()
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert 'resuming' in err
    assert 'started from 4' in (home / 'outputs/tiny/quick/notebook.ipynb').read_text()
    assert len(read_json(home / 'outputs/tiny/quick/manifest.json')['starts']) == 2

def test_a_partial_run_is_not_continued_by_other_code(home):
    assert adflow(home, '--set', 'fail=true')[0] == 1
    partial, notebook = home / 'outputs/tiny/.quick.partial', home / 'nbs/experiments/tiny.ipynb'
    before, kept = notebook.read_text(), (partial / 'manifest.json').read_text()
    # other prose and other stored outputs are no other code; another cell is
    nb = json.loads(before)
    nb['cells'][0]['source'] = '# Other words'
    nb['cells'][2]['outputs'] = [{'output_type': 'stream', 'name': 'stdout', 'text': 'x'}]
    notebook.write_text(json.dumps(nb))
    update_manifest(partial, git=dict(commit='0' * 40, dirty=True),    # as if begun under another commit
                    versions=dict(torch='0.1'))                        # and another torch
    code, _, err = adflow(home, '--set', 'fail=true')
    assert code == 1 and 'resuming' in err                             # goes on, to the cell that fails
    assert 'warning: tiny/quick goes on under other code: torch 0.1 → ' in err
    assert [m.split(' ')[0] for m in read_json(partial / 'manifest.json')['mixed']] == ['torch']   # not the commit
    notebook.write_text(before.replace('time.sleep(.02)', 'time.sleep(.01)'))
    code, _, err = adflow(home, '--set', 'fail=true')
    assert code == 2 and 'its notebook or what that imports of adflow: ' in err and 'resuming' not in err
    assert 'Traceback' not in err
    assert '--force' in err and '--name' in err
    # another adflow, another evaluator
    notebook.write_text(before)
    (partial / 'manifest.json').write_text(kept)
    update_manifest(partial, adflow='0.0.0', evaluator='0')
    code, _, err = adflow(home, '--set', 'fail=true')
    assert code == 2 and 'adflow: 0.0.0 → ' in err and 'the evaluator: 0 → ' in err
    assert adflow(home, '--name', 'other')[0] == 0                     # the way out that is offered
    assert (partial / 'checkpoint').is_dir() and (home / 'outputs/tiny/other').is_dir()

@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_kernel_too(home, number, code):
    p = start(home, '--set', 'wait=true', start_new_session=True)
    pid = home / 'outputs/tiny/.quick.partial/checkpoint/pid'
    wait_for(lambda: pid.exists() and pid.read_text())
    children = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(number)
    _, err = p.communicate(timeout=30)
    assert p.returncode == code and 'the same command resumes' in err and 'Traceback' not in err
    wait_for(lambda: all(gone(c.pid) for c in children), 10)
    assert list_runs(home / 'outputs').state.tolist() == ['killed']

@pytest.mark.slow
def test_a_kernel_that_dies(home):
    "As the kernel killing it for memory would."
    p = start(home, '--set', 'wait=true')
    pid = home / 'outputs/tiny/.quick.partial/checkpoint/pid'
    wait_for(lambda: pid.exists() and pid.read_text())
    time.sleep(.3)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 137 and 'Out of memory is the usual reason' in err
    assert list_runs(home / 'outputs').state.tolist() == ['killed']


# ---- without starting anything -----------------------------------------------------------------------------

@pytest.mark.parametrize('text, word', [
    ('stepps: 3', "quick.yaml:1: there is no parameter 'stepps'. Did you mean 'steps'?"),
    ('steps: 3\nlr: fast', "quick.yaml:2: lr: 'fast' is not float"),
    ('steps: 3.5', 'steps: 3.5 is not int'),
    ('steps: "3"', "steps: '3' is not int"),
    ('steps: yes', "steps: 'yes' is not int"),
    ('steps: true', 'steps: True is not int'),
    ('blend: salt', "blend: 'salt' is not dict"),
    ('lr:', 'lr: None is not float'),
    ('steps: 1\nsteps: 2', "quick.yaml:2: not readable as YAML: 'steps' stands twice"),
    ('run_dir: /tmp', 'set by the launcher'),
    ('finish: glos', "quick.yaml:1: finish: 'glos' is not one of its values. Did you mean 'gloss'?"),
    ('finish: 3', 'finish: 3 is not one of its values'),
    ('experiment: tinny', "no experiment 'tinny'. Did you mean 'tiny'?"),
    ('name: ../../up', 'it names a folder'),
    ('a: [', 'not readable as YAML'),
    ('just words', 'expected `name: value` lines'),
    ('base: nowhere.yaml', 'there is no file'),
])
def test_a_mistake_in_the_yaml_is_told_before_anything_runs(home, text, word):
    (home / 'params/tiny/quick.yaml').write_text(text)
    with pytest.raises(ParamsError, match=re.escape(word)): load(home / 'params/tiny/quick.yaml')

def test_numbers_as_people_write_them(home):
    for text, value in [('1e-4', 1e-4), ('1', 1.), ('.5', .5), ('1.', 1.), ('1E+2', 100.), ('-3e2', -300.)]:
        (home / 'params/tiny/quick.yaml').write_text(f'lr: {text}')
        lr = load(home / 'params/tiny/quick.yaml').values['lr']
        assert lr == value and isinstance(lr, float)

def test_the_default_of_the_notebook_is_not_changed_by_a_set(home):
    path = home / 'params/tiny/quick.yaml'
    assert load(path, ['blend.salt.grams=5']).values['blend'] == {'salt': {'grams': 5}}
    assert load(path).values['blend'] == {'salt': {'grams': 1.}}

def test_the_order_of_sets_does_not_matter(home):
    path = home / 'params/tiny/quick.yaml'
    sets = ['blend.salt.grams=5', 'blend={salt: {grams: 2}}', 'lr=1']
    assert load(path, sets).values['blend'] == load(path, sets[::-1]).values['blend'] == {'salt': {'grams': 5}}
    with pytest.raises(ParamsError, match='--set lr is given twice'): load(path, ['lr=1', 'steps=2', 'lr=2'])
    with pytest.raises(ParamsError, match='--set run_dir=/tmp: run_dir is set by `adflow run`'):
        load(path, ['run_dir=/tmp'])

QUICKSTART = ROOT / 'params/moleflow/quickstart.yaml'

def test_another_part_drops_the_former_arguments_whatever_the_order():
    for sets in (['subnet.rank=3', 'subnet.name=lora'], ['subnet.name=lora', 'subnet.rank=3']):
        assert load(QUICKSTART, sets).values['subnet'] == {'name': 'lora', 'rank': 3}

@pytest.mark.parametrize('sets, word', [
    (['loss={name: nll}'], 'loss is a mapping of names, such as {nll: {}, tail: {weight: 0.7}}'),
    (['loss={}'], 'loss is a mapping of names'),
    (['loss={nll: null}'], 'nothing is left'),
    (['loss.nll=null'], "takes its weight from 'nll'"),
    (['loss.nll.reduce=sum'], 'use reduce: mean'),
    (['loss.tial=0.5'], "Did you mean 'tail'?"),
    (['loss.tail.wieght=0.5'], "Did you mean 'weight'?"),
    (['loss.tail=strong'], 'or a weight'),
    (['loss={nll: 0}'], 'all weights are zero'),
    (['loss={nll: {name: tail}}'], "loss 'nll' takes no 'name'"),
])
def test_a_loss_that_cannot_be_built_is_refused_before_anything_runs(sets, word):
    with pytest.raises(ParamsError, match=re.escape(word)): load(QUICKSTART, sets)
    with pytest.raises(PartError): build_losses(unchecked(sets))

@pytest.mark.parametrize('sets', [['loss.tail=0.5'], ['loss.tail=false'], ['loss.tail=null', 'loss.nll.reduce=sum'],
                                  ['loss.logdet=true'], ['loss={nll: 2}']])
def test_a_loss_that_can_be_built_is_accepted(sets):
    assert build_losses(load(QUICKSTART, sets).values['loss']).weights

def unchecked(sets):
    values = dict(loss=load(QUICKSTART).values['loss'])
    for text in sets: set_path(values, text)
    return values['loss']

def test_a_table_is_kept_in_a_run_and_made_anew_in_jupyter(tmp_path):
    made = iter(range(9))
    def table(): return pd.DataFrame([dict(x=next(made))])
    kept, lab = Run(tmp_path / 'run'), Run('')
    assert [kept.table('t', table).x[0] for _ in range(3)] == [0, 0, 0]
    assert [Run(tmp_path / 'run').table('t', table).x[0], lab.table('t', table).x[0], lab.table('t', table).x[0]] \
        == [0, 1, 2]

def test_equal_parameters_are_the_same_run_however_they_are_written(home):
    path = home / 'params/tiny/quick.yaml'
    one = load(path).hash
    path.write_text('lr: 0.20\nname: quick\nsteps: 4\nblend: {salt: {grams: 1}}')
    assert load(path).hash == one
    assert load(path, ['steps=5']).hash != one

def test_a_full_disk_leaves_the_former_metrics(tmp_path, monkeypatch):
    run = Run(tmp_path / 'run')
    run.metrics(pd.DataFrame([dict(image_auroc=.5)]))
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device .writing metrics.parquet'):
        run.metrics(pd.DataFrame([dict(image_auroc=.9)]))
    assert pd.read_parquet(run.path / 'metrics.parquet').image_auroc.item() == .5
    assert sorted(p.name for p in run.path.iterdir()) == ['checkpoint', 'figures', 'metrics.parquet']

def test_a_report_without_figures_carries_no_plotly(tmp_path):
    nb = {'cells': [{'cell_type': 'markdown', 'metadata': {}, 'source': 'costs $5 or $6; $$a^2$$', 'id': 'x'}],
          'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    write_file(tmp_path / 'n.ipynb', json.dumps(nb))
    report(tmp_path / 'n.ipynb', tmp_path / 'n.html')
    page = (tmp_path / 'n.html').read_text()
    assert 'plotly' not in page and len(page) < 1_000_000 and '$5 or $6' in page and page.count('<math') == 1

def test_progress_is_told_from_words():
    bar = '\repoch:  10%|#         | 1/10 [00:01<00:09,  1.0it/s, loss=12.3]'
    assert without_progress(bar + bar) == ''
    assert without_progress(bar + '\n') == ''
    assert without_progress(bar + 'Warning: x\n') == 'Warning: x\n'
    assert without_progress('Warning: x\n' + bar) == 'Warning: x\n'
    assert without_progress('\r' + ' ' * 60 + '\r') == ''
