"""The command line: exit codes, friendly errors, JSON for tools, and what `adflow test` counts."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adflow import cli
from adflow.workbook import params as params_module

ROOT = Path(__file__).resolve().parents[1]


def said(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err

def test_parts_as_json_and_as_text(capsys):
    code, out, _ = said(capsys, 'parts', '--json')
    rows = json.loads(out)
    assert code == 0 and {'align', 'subnet', 'router', 'aggregate', 'loss', 'dataset'} <= {r['kind'] for r in rows}
    bare = [f"{r['kind']} {r['name']}" for r in rows if not r['claim']]
    # an optimizer's arguments are those of torch or timm
    bare += [f"{r['kind']} {r['name']}: {k}" for r in rows for k, a in r['arguments'].items() if not a['help']
             and r['kind'] != 'optimizer']
    assert not bare, 'without a claim or help: ' + ', '.join(bare)
    code, out, _ = said(capsys, 'parts', 'align')
    assert code == 0 and 'whitening' in out and 'gamma_range' in out and 'sincos' not in out

def test_errors_are_one_line_with_the_nearest_name(capsys):
    code, _, err = said(capsys, 'parts', 'alighn')
    assert code == 2 and err.startswith('adflow: ') and "Did you mean 'align'?" in err and 'Traceback' not in err
    code, _, err = said(capsys, 'run', 'nowhere.yaml')
    assert code == 2 and "There is no parameter file 'nowhere.yaml'" in err

@pytest.mark.parametrize('argv, sets', [
    ('--set lr=1 x.yaml', ['lr=1']), ('--set lr=1 seed=2 x.yaml --force', ['lr=1', 'seed=2']),
    ('x.yaml --set lr=1 seed=2', ['lr=1', 'seed=2']), ('--set lr=1 --name a --set seed=2 x.yaml', ['lr=1', 'seed=2']),
    ('--set=lr=1 x.yaml --set seed=2', ['lr=1', 'seed=2']), ('x.yaml --set lr', ['lr']), ('x.yaml', []),
])
def test_set_does_not_eat_the_file(argv, sets, monkeypatch):
    called = []
    monkeypatch.setattr('adflow.workbook.launch.run', lambda *a: called.append(a) or 0)
    assert cli.main(['run', *argv.split()]) == 0
    assert called == [('x.yaml', sets, 'outputs', '--force' in argv, 'a' if '--name' in argv else None)]

def test_set_without_a_file_says_so(capsys):
    with pytest.raises(SystemExit) as e: cli.main(['run', '--set', 'lr=1'])
    assert e.value.code == 2 and 'required: params' in capsys.readouterr().err

def test_every_package_that_is_imported_is_declared():
    text = (ROOT / 'pyproject.toml').read_text()
    declared = {re.match(r'[A-Za-z0-9_.-]+', d)[0].lower().replace('_', '-')
                for part in re.findall(r'^(?:dependencies|dev|anomalib|figures|onnx|ray|track|umap) = \[(.*?)\]$', text,
                                       re.S | re.M)
                for d in re.findall(r'"([^"]+)"', part)}
    other = {'sklearn': 'scikit-learn', 'skimage': 'scikit-image', 'PIL': 'pillow', 'yaml': 'pyyaml',
             'umap': 'umap-learn', 'mlflow': 'mlflow-skinny'}
    found = set()
    for file in (ROOT / 'adflow').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import): found |= {a.name.split('.')[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.split('.')[0])
    found = {other.get(m, m).lower().replace('_', '-') for m in found - set(sys.stdlib_module_names) - {'adflow'}}
    assert {'filelock', 'nbformat', 'torch'} <= found and not found - declared, sorted(found - declared)

def test_traceback_on_demand():
    for argv in (['--traceback', 'run', 'nowhere.yaml'], ['run', '--traceback', 'nowhere.yaml']):
        with pytest.raises(params_module.ParamsError): cli.main(argv)

def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, 'doctor', lambda: int('a bug'))
    with pytest.raises(ValueError): cli.main(['doctor'])

def test_an_unknown_command_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as e: cli.main(['rnu'])
    assert e.value.code == 2 and 'run' in capsys.readouterr().err

@pytest.mark.parametrize('word', ['sweep', 'report', 'data'])
def test_no_stubs(word, capsys):
    with pytest.raises(SystemExit): cli.main([word])

def test_runs(capsys, tmp_path):
    code, out, _ = said(capsys, 'runs', '--outputs', tmp_path)
    assert code == 0 and 'No runs' in out
    folder = tmp_path / 'tiny/one'
    folder.mkdir(parents=True)
    (folder / 'manifest.json').write_text(json.dumps(dict(state='done', started='2026-01-01T00:00:00Z', minutes=1.5,
                                                          seed=3)))
    code, out, _ = said(capsys, 'runs', '--outputs', tmp_path)
    assert code == 0 and 'one' in out and 'done' in out
    rows = json.loads(said(capsys, 'runs', '--outputs', tmp_path, '--json')[1])
    assert rows[0]['name'] == 'one' and rows[0]['seed'] == 3 and rows[0]['path'] == str(folder)

def test_doctor_fails_when_the_cache_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('ADFLOW_CACHE', str(tmp_path / 'cache'))
    lines = {x[1]: x for x in cli.doctor()}
    assert lines['cache'][0] == 'ok' and lines['python'][0] == 'ok' and lines['weights'][0] == 'ok'
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('ADFLOW_CACHE', str(tmp_path / 'file/cache'))
    code, out, _ = said(capsys, 'doctor')
    assert code == 1 and re.search(r'^fail +cache', out, re.M) and 'ADFLOW_CACHE' in out

def test_doctor_knows_the_versions_that_break(monkeypatch):
    monkeypatch.setattr(cli, '_version', lambda name: {'execnb': (0, 3), 'torch': (2, 1)}.get(name, (99,)))
    found = {x[1]: x for x in cli._check_packages()}
    assert found['execnb'][0] == 'fail' and 'execnb>=0.1,<0.2' in found['execnb'][3]
    assert found['torch'][0] == 'fail' and 'torch>=2.8' in found['torch'][3] and found['plotly'][0] == 'ok'

@pytest.fixture
def checkout(tmp_path):
    "A checkout of three notebooks and four tests, with failures in both."
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text())
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'tests/test_x.py').write_text(
        'import os, pytest\ndef test_a(): assert "IN_TEST" not in os.environ\n'
        'def test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n'
        '@pytest.fixture\ndef f(): 1/0\ndef test_d(f): pass\n')
    (tmp_path / 'tests/test_good.py').write_text('def test_a(): pass\n')
    for name, source in [('good', '1'), ('bad', 'assert 1 == 2'), ('slow', '#| slow\nassert 0')]:
        cell = {'cell_type': 'code', 'source': source, 'metadata': {}, 'outputs': [], 'execution_count': None,
                'id': 'a'}
        (tmp_path / 'nbs').mkdir(exist_ok=True)
        (tmp_path / f'nbs/{name}.ipynb').write_text(json.dumps({'cells': [cell], 'metadata': {}, 'nbformat': 4,
                                                                'nbformat_minor': 5}))
    return tmp_path

def adflow_test(root, *args):
    pytest.importorskip('nbdev')
    call = ('import sys; from pathlib import Path; from adflow import cli; from adflow.workbook import params; '
            'params.checkout = lambda: Path(sys.argv[1]); sys.exit(cli.main(["test", *sys.argv[2:]]))')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'ADFLOW_SLOW': ''}
    p = subprocess.run([sys.executable, '-c', call, str(root), *args], capture_output=True, text=True, cwd=root,
                       env=env)
    return p.returncode, p.stdout + p.stderr, p.stdout.rstrip().split('\n')[-1]

def test_adflow_test_counts_notebooks_and_tests_together(checkout):
    code, out, last = adflow_test(checkout)
    # good.ipynb, slow.ipynb, two tests; bad.ipynb, test_b, the fixture of test_d; test_c
    assert last == '4 passed, 3 failed, 1 skipped', out
    assert code == 1
    assert 'FAILED nbs/bad.ipynb' in out and 'assert 1 == 2' in out and 'passed nbs/good.ipynb' in out

def test_adflow_test_slow_runs_flagged_cells_and_paths_choose(checkout):
    code, out, last = adflow_test(checkout, '--slow', 'nbs/slow.ipynb')
    assert (code, last) == (1, '0 passed, 1 failed, 0 skipped'), out
    code, out, last = adflow_test(checkout, 'nbs/slow.ipynb', 'nbs/good.ipynb', 'tests/test_good.py')
    assert (code, last) == (0, '3 passed, 0 failed, 0 skipped'), out

def test_adflow_test_without_a_checkout(capsys, monkeypatch):
    monkeypatch.setattr(params_module, 'checkout', lambda: None)
    code, _, err = said(capsys, 'test')
    assert code == 2 and 'needs a checkout' in err
