"""The rules of the house (CONTRIBUTING.md). Each rule is a function over a tree that yields what breaks it,
and each is shown to fail on a planted violation."""
import ast
import configparser
import json
import re
from pathlib import Path

import pytest

from adflow.workbook.params import ParamsError, load, parameters

ROOT = Path(__file__).resolve().parents[1]
TOP = {'00_registry': 'registry', '005_parts': 'parts', '007_cluster': 'cluster',
       '99_cli': 'cli'}    # notebooks outside a room
LOOSE = {'experiments', 'explore', 'bench'}     # folders whose notebooks export nothing


def notebooks(root):
    return sorted(p for p in (root / 'nbs').rglob('*.ipynb')
                  if not any(x.startswith('.') for x in p.relative_to(root).parts))

def library(root): return [p for p in notebooks(root) if p.parent.name not in LOOSE]

def cells(path, kind='code'):
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]

def directives(source): return [line.lstrip('#| ').split() for line in source.split('\n') if line.startswith('#|')]

def exported(source): return any(d and d[0] in ('export', 'exporti', 'exports') for d in directives(source))

def default_exp(path):
    return [d[1] for c in cells(path) for d in directives(c) if d[:1] == ['default_exp']]

def module_of(path):
    "What the address rule expects: nbs/room/NN_name.ipynb → room.name."
    name = re.sub(r'^\d{2,3}_', '', path.stem)
    return name if path.parent.name == 'nbs' else f'{path.parent.name}.{name}'

def code(source):
    return ast.parse('\n'.join('' if x.lstrip().startswith(('%', '!')) else x for x in source.split('\n')))

def imports(path):
    "(module, names, line) of all adflow imports of a notebook."
    for c in cells(path):
        for node in ast.walk(code(c)):
            if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'adflow':
                yield node.module, [a.name for a in node.names]
            elif isinstance(node, ast.Import):
                yield from ((a.name, []) for a in node.names if a.name.split('.')[0] == 'adflow')


def address(root):
    "nbs/<room>/<NN>_<name>.ipynb ⇄ default_exp room.name ⇄ adflow/<room>/<name>.py"
    for p in library(root):
        if not re.fullmatch(r'\d{2,3}_[a-z][a-z_]*', p.stem): yield f'{p.name}: the name is not NN_name'
        elif p.parent.name == 'nbs' and p.stem not in TOP: yield f'{p.name}: only {", ".join(TOP)} stand outside a room'
        elif default_exp(p) != [module_of(p)]:
            yield f'{p.name}: default_exp is {default_exp(p)}, its address says {module_of(p)}'
        elif not (root / 'adflow' / (module_of(p).replace('.', '/') + '.py')).is_file():
            yield f'{p.name}: {module_of(p)} was not exported'
    for p in notebooks(root):
        if p.parent.name in LOOSE and (default_exp(p) or any(exported(c) for c in cells(p))):
            yield f'{p.name}: exports from {p.parent.name}'

def number_of(path):
    "Its place along the data flow, read as decimals: 95, 951, 952, 96."
    return int(path.stem.split('_')[0].ljust(3, '0')) if path.stem[:2].isdigit() else -1

def numbers(root):
    "Two or three digits, unique over all rooms."
    seen = {}
    for p in library(root):
        n = number_of(p)
        if n in seen: yield f'{p.name} and {seen[n]} have the same number'
        seen[n] = p.name

def direction(root):
    "A notebook imports only from smaller numbers, and never *."
    number = {'adflow.' + m: number_of(p) for p in library(root) for m in default_exp(p)}
    for p in library(root):
        own = number_of(p)
        for module, names in imports(p):
            if '*' in names: yield f'{p.name}: from {module} import *'
            for m in [module] + [f'{module}.{n}' for n in names]:
                if number.get(m, -1) > own or (number.get(m) == own and 'adflow.' + module_of(p) != m):
                    yield f'{p.name} imports {m}'

def orphans(root):
    "Every module comes from a notebook, every notebook's module from one notebook alone."
    made = [m for p in library(root) for m in default_exp(p)]
    for m in sorted(set(made)):
        if made.count(m) > 1: yield f'{m} is exported by {made.count(m)} notebooks'
    for p in sorted((root / 'adflow').rglob('*.py')):
        name = '.'.join(p.relative_to(root / 'adflow').with_suffix('').parts)
        if p.name not in ('__init__.py', '_modidx.py') and name not in made:
            yield f'adflow/{p.relative_to(root / "adflow")} has no notebook'

def size(root):
    "No saved widget state, no notebook over 400 kB, no cell over 70 lines, no module over 400."
    for p in notebooks(root):
        if 'widgets' in json.loads(p.read_text())['metadata']: yield f'{p.name}: saved widget state'
        if p.stat().st_size > 400_000: yield f'{p.name}: {p.stat().st_size // 1000} kB'
        for c in cells(p):
            n = len(c.strip().split('\n'))
            if exported(c) and n > 70: yield f'{p.name}: an exported cell of {n} lines'
    for p in (root / 'adflow').rglob('*.py'):
        n = len(p.read_text().split('\n'))
        if n > 400 and p.name != '_modidx.py': yield f'{p.name}: {n} lines'

def names(root):
    "No drawers for everything."
    for p in [*notebooks(root), *(root / 'adflow').rglob('*.py')]:
        if re.search(r'(^|_)(utils?|helpers?|misc|common|base\d|v\d)(_|$)', re.sub(r'^\d{2,3}_', '', p.stem)):
            yield f'{p.name} is called like a drawer'

def settings(root):
    "nbdev keeps the tag that papermill needs, and its pins are there."
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(root / 'settings.ini')
    if 'tags' not in ini['DEFAULT'].get('allowed_cell_metadata_keys', '').split():
        yield 'settings.ini: allowed_cell_metadata_keys lacks tags'
    if not {'slow', 'cuda', 'data'} <= set(ini['DEFAULT'].get('tst_flags', '').split()): yield 'settings.ini: tst_flags'
    project = (root / 'pyproject.toml').read_text()
    for pin in ('nbdev==2.4.14', 'execnb<0.2', 'fastcore<2', 'ghapi<2'):
        if f'"{pin}"' not in project: yield f'pyproject.toml lacks the pin {pin}'

def safe(root):
    "Nothing is unpickled."
    for p in [*notebooks(root), *(root / 'adflow').rglob('*.py')]:
        for c in cells(p) if p.suffix == '.ipynb' else [p.read_text()]:
            for node in ast.walk(code(c)):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    for m in [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or '']:
                        if m.split('.')[0] in ('pickle', 'dill', 'cloudpickle', 'joblib'): yield f'{p.name} imports {m}'
                if not isinstance(node, ast.Call): continue
                called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if called in ('torch.load',
                              'torch.hub.load_state_dict_from_url') and given.get('weights_only') != 'True':
                    yield f'{p.name}: {called} without weights_only=True'
                if called == 'np.load' and given.get('allow_pickle') == 'True':
                    yield f'{p.name}: np.load with allow_pickle'

def workbooks(root):
    "One parameters cell; every parameter typed, with a help comment; `run_dir` among them; every YAML fits."
    for p in sorted((root / 'nbs/experiments').glob('*.ipynb')):
        try: found = parameters(p)
        except ParamsError as e: yield str(e); continue
        for x in found:
            if not x.help: yield f'{p.name}: the parameter {x.name} has no help comment'
        if 'run_dir' not in [x.name for x in found]: yield f'{p.name}: no parameter run_dir'
    for y in sorted((root / 'params').glob('*/**/*.yaml')):
        if y.parent.name == 'sweeps': continue
        try: load(y)
        except ParamsError as e: yield str(e)

RULES = [address, numbers, direction, orphans, size, names, settings, safe, workbooks]


@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_the_house(rule):
    broken = list(rule(ROOT))
    assert not broken, '\n'.join(broken)

def test_there_is_a_house(): assert len(library(ROOT)) > 5


# ---- the rules can fail ------------------------------------------------------------------------------------

def plant(root, where, *sources, tags=(), metadata=None):
    "Writes a notebook of code cells."
    path = root / 'nbs' / where
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{'cell_type': 'code', 'source': s, 'metadata': {'tags': list(tags)} if i == 0 and tags else {},
             'outputs': [], 'execution_count': None}
            for i, s in enumerate(sources)]
    path.write_text(json.dumps({'cells': made, 'metadata': metadata or {}, 'nbformat': 4, 'nbformat_minor': 5}))
    return path

def module(root, where, text=''):
    path = root / 'adflow' / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

@pytest.fixture
def house(tmp_path):
    "A small tree that keeps every rule."
    plant(tmp_path, '005_parts.ipynb', '#| default_exp parts')
    plant(tmp_path, 'data/01_readers.ipynb', '#| default_exp data.readers', '#| export\nfrom adflow.parts import x')
    plant(tmp_path, 'flow/40_lora.ipynb', '#| default_exp flow.lora', 'from adflow.data.readers import y')
    plant(tmp_path, 'experiments/study.ipynb', "a: int = 1        # a number\nrun_dir: str = '' # set",
          'from adflow.flow.lora import z', tags=['parameters'])
    for m in ('parts.py', 'data/readers.py', 'flow/lora.py', '__init__.py'): module(tmp_path, m)
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nallowed_cell_metadata_keys = tags\ntst_flags = slow cuda data\n')
    (tmp_path / 'pyproject.toml').write_text('"nbdev==2.4.14" "execnb<0.2" "fastcore<2" "ghapi<2"')
    (tmp_path / 'params/study').mkdir(parents=True)
    (tmp_path / 'params/study/one.yaml').write_text('a: 2')
    return tmp_path

@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_a_good_house(house, rule): assert list(rule(house)) == []

long_cell = '#| export\n' + '\n'.join(f'x{i} = {i}' for i in range(70))
PLANTED = [
    (address, lambda h: plant(h, 'flow/41_x.ipynb', '#| default_exp flow.y'), 'its address says flow.x'),
    (address, lambda h: plant(h, 'flow/41_x.ipynb', 'pass'), 'default_exp is []'),
    (address, lambda h: plant(h, 'flow/x.ipynb', '#| default_exp flow.x'), 'not NN_name'),
    (address, lambda h: plant(h, '02_x.ipynb', '#| default_exp x'), 'outside a room'),
    (address, lambda h: plant(h, 'flow/41_x.ipynb', '#| default_exp flow.x'), 'was not exported'),
    (address, lambda h: plant(h, 'experiments/x.ipynb', '#| export\nx = 1'), 'exports from experiments'),
    (numbers, lambda h: plant(h, 'data/40_x.ipynb', '#| default_exp data.x'), 'same number'),
    (direction, lambda h: plant(h, 'data/02_x.ipynb', 'from adflow.flow.lora import z'),
     '02_x.ipynb imports adflow.flow.lora'),
    (direction, lambda h: plant(h, 'data/02_x.ipynb', 'import adflow.flow.lora'), 'imports adflow.flow.lora'),
    (direction, lambda h: plant(h, 'data/02_x.ipynb', 'from adflow.flow import lora'), 'imports adflow.flow.lora'),
    (direction, lambda h: plant(h, 'flow/41_x.ipynb', 'from adflow.flow.lora import *'), 'import *'),
    (numbers, lambda h: plant(h, 'data/400_x.ipynb', '#| default_exp data.x'), 'same number'),
    (direction, lambda h: plant(h, 'data/399_x.ipynb', 'from adflow.flow.lora import z'), 'imports adflow.flow.lora'),
    (orphans, lambda h: module(h, 'flow/gone.py'), 'flow/gone.py has no notebook'),
    (orphans, lambda h: plant(h, 'flow/41_x.ipynb', '#| default_exp flow.lora'), 'by 2 notebooks'),
    (size, lambda h: plant(h, 'explore/x.ipynb', 'x', metadata={'widgets': {}}), 'widget state'),
    (size, lambda h: plant(h, 'explore/x.ipynb', 'x = "' + 'y' * 400_000 + '"'), '400 kB'),
    (size, lambda h: plant(h, 'flow/41_x.ipynb', long_cell), 'cell of 71 lines'),
    (size, lambda h: module(h, 'flow/lora.py', '\n' * 400), '401 lines'),
    (names, lambda h: module(h, 'flow/utils.py'), 'drawer'),
    (names, lambda h: plant(h, 'flow/41_flow_helpers.ipynb', 'x'), 'drawer'),
    (settings, lambda h: (h / 'settings.ini').write_text('[DEFAULT]\ntst_flags = slow cuda data'), 'lacks tags'),
    (settings, lambda h: (h / 'settings.ini').write_text('[DEFAULT]\nallowed_cell_metadata_keys = tags'), 'tst_flags'),
    (settings, lambda h: (h / 'pyproject.toml').write_text('"nbdev==2.4.14" "fastcore<2" "ghapi<2"'), 'execnb<0.2'),
    (safe, lambda h: module(h, 'flow/lora.py', 'import pickle'), 'imports pickle'),
    (safe, lambda h: module(h, 'flow/lora.py', 'import torch\ntorch.load("x")'), 'without weights_only=True'),
    (safe, lambda h: plant(h, 'explore/x.ipynb', '%matplotlib inline\ntorch.load("x", weights_only=False)'),
     'without weights_only=True'),
    (workbooks, lambda h: plant(h, 'experiments/x.ipynb', 'a: int = 1 # x'), '0 cells are tagged'),
    (workbooks, lambda h: plant(h, 'experiments/x.ipynb', "a: int = 1\nrun_dir: str = '' # x", tags=['parameters']),
     'no help comment'),
    (workbooks, lambda h: plant(h, 'experiments/x.ipynb', 'a: int = 1 # x', tags=['parameters']),
     'no parameter run_dir'),
    (workbooks, lambda h: plant(h, 'experiments/x.ipynb', 'a = 1 # x', tags=['parameters']), '`name: type = literal'),
    (workbooks, lambda h: (h / 'params/study/two.yaml').write_text('b: 2'), "no parameter 'b'"),
]

@pytest.mark.parametrize('rule, damage, word', PLANTED, ids=[f'{r.__name__}-{w}' for r, _, w in PLANTED])
def test_a_planted_violation(house, rule, damage, word):
    if rule is workbooks:  # the toy experiment imports what does not exist
        plant(house, 'experiments/study.ipynb', "a: int = 1        # a number\nrun_dir: str = '' # set",
              tags=['parameters'])
    damage(house)
    broken = list(rule(house))
    assert len(broken) >= 1 and word in '\n'.join(broken), broken
