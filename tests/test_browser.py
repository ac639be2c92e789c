"""The explorers in a real browser: JupyterLab on a loopback port, headless Chromium, sliders moved, patches clicked.

What the page must say is computed here from the files of the runs, not by the widget. `outputs/screens/<notebook>.png`
shows the page, `<notebook>.json` the milliseconds from an event to the changed text; with ADFLOW_SCREENS=1 the pictures
of the README, `nbs/images/explore_<notebook>.png`, are made anew. A new explorer gets a function like those at the end.
"""
import importlib.util
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import nbformat
import numpy as np
import psutil
import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from scipy.stats import rankdata

from adflow.evaluate.scoring import pixel_maps
from adflow.views.scores import OpenRun, demo_run

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name, there in (("the Python package playwright (pip install -e '.[browser]')",
                                     importlib.util.find_spec('playwright')),
                                    ('Chromium (apt-get install chromium)', CHROMIUM)) if not there]
QUIET = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
needs_browser = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason='not here: ' + ' and '.join(MISSING))]
# anywidget gives a model two seconds to load plotly's 5 MB; a machine that is shared may need more
PATIENCE = 'const timeout = AbortSignal.timeout; AbortSignal.timeout = ms => timeout.call(AbortSignal, 60 * ms)'


# ---- a run to look into, a JupyterLab, a browser

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    paths = dict(flow=demo_run(tmp_path_factory.mktemp('flow')),
                 bank=demo_run(tmp_path_factory.mktemp('bank'), {'name': 'patchcore', 'size': 500}))
    return {name: OpenRun(path, progress=False) for name, path in paths.items()}

class Lab:
    "JupyterLab with one kernel for all notebooks, so that its imports are paid once."
    def __init__(self, home):
        self.root, self.token, self.kernel = home / 'notebooks', secrets.token_hex(24), None
        self.root.mkdir()
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.url = f'http://127.0.0.1:{s.getsockname()[1]}'
        own = {f'JUPYTER_{name}_DIR': str(home / name) for name in ('CONFIG', 'DATA', 'RUNTIME')}
        own |= {f'JUPYTERLAB_{name}_DIR': str(home / name) for name in ('SETTINGS', 'WORKSPACES')}
        (home / 'CONFIG' / 'labconfig').mkdir(parents=True)
        (home / 'CONFIG' / 'labconfig' / 'page_config.json').write_text(json.dumps(
            {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}))
        self.log = home / 'lab.log'
        asked = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={self.url.split(":")[-1]}',
                 '--port-retries=0', f'--ServerApp.root_dir={self.root}', '--LabApp.expose_app_in_browser=True',
                 '--ServerApp.shutdown_no_activity_timeout=600', '--MappingKernelManager.cull_idle_timeout=300']
        env = dict(os.environ, **own, JUPYTER_TOKEN=self.token, IPYTHONDIR=str(home / 'ipython'), PYTHONPATH=str(ROOT))
        with self.log.open('w') as log:
            self.process = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *asked], env=env, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def ask(self, path, data=None):
        request = Request(f'{self.url}/api/{path}', json.dumps(data).encode() if data else None,
                          {'Authorization': f'token {self.token}'})
        return json.load(urlopen(request, timeout=60))

    def wait(self, seconds=120):
        end = time.time() + seconds
        while True:
            try: return self.ask('status')
            except OSError:
                if self.process.poll() is not None or time.time() > end:
                    pytest.fail('JupyterLab did not start:\n' + self.log.read_text()[-3000:])
                time.sleep(.2)

    def put(self, name, parameters):
        "A copy of `nbs/explore/<name>.ipynb` with these parameters and no outputs; its address."
        nb = parameterize_notebook(load_notebook_node(str(ROOT / 'nbs/explore' / f'{name}.ipynb')), parameters,
                                   kernel_name='python3', language='python')
        for cell in nb.cells:
            if cell.cell_type == 'code': cell.update(outputs=[], execution_count=None)
        nbformat.write(nb, self.root / f'{name}.ipynb')
        kernel = {'id': self.kernel} if self.kernel else {'name': 'python3'}
        session = self.ask('sessions', dict(path=f'{name}.ipynb', name=name, type='notebook', kernel=kernel))
        self.kernel = session['kernel']['id']
        return f'{self.url}/doc/tree/{name}.ipynb?token={self.token}'

    def stop(self):
        "The server and whatever it has started, kernels too, which live in sessions of their own."
        try: family = [p := psutil.Process(self.process.pid), *p.children(recursive=True)]
        except psutil.NoSuchProcess: return
        self.process.terminate()
        for p in psutil.wait_procs(family, timeout=10)[1]: p.kill()
        self.process.wait()

@pytest.fixture(scope='module')
def lab(tmp_path_factory, request):
    lab = Lab(tmp_path_factory.mktemp('lab'))
    try:
        request.getfixturevalue('runs')     # made while the server starts
        lab.wait()
        yield lab
    finally: lab.stop()

@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(str(tmp_path_factory.mktemp('profile')), args=QUIET,
            executable_path=CHROMIUM, viewport={'width': 1280, 'height': 1500})
        yield context
        context.close()


# ---- hands and eyes

class Explorer:
    "A notebook that has been run in JupyterLab, and what a visitor does with it."
    def __init__(self, page, address):
        self.page, self.strange, self.milliseconds = page, [], {}
        page.on('pageerror', lambda e: self.strange.append(f'error on the page: {e}'))
        page.on('console', lambda m: m.type == 'error' and self.strange.append(f'console: {m.text}'))
        page.on('request', lambda r: r.url.startswith(('data:', 'blob:', address.split('/doc')[0])) or
                self.strange.append(f'asks elsewhere: {r.url}'))
        page.set_default_timeout(120_000)
        page.add_init_script(PATIENCE)
        page.goto(address)
        idle = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        page.wait_for_function(idle)
        page.evaluate("window.jupyterapp.commands.execute('runmenu:run-all')")
        page.locator('.jp-OutputArea .jupyter-widgets').first.wait_for(timeout=240_000)     # imports come first
        page.wait_for_function(idle)

    def texts(self, css): return self.page.locator(css).all_text_contents()

    def says(self, css, wanted, what):
        "Waits for the texts of a selector: exactly these, or a function of them that is true."
        end = time.time() + 30
        while not (wanted(self.texts(css)) if callable(wanted) else self.texts(css) == wanted):
            assert time.time() < end, f'{what}: the page says {self.texts(css)}, expected {wanted}'
            self.page.wait_for_timeout(20)

    def timed(self, css, act, what):
        "Acts, and measures in the browser from the first event to the changed text."
        self.page.evaluate("""css => {
            const read = () => [...document.querySelectorAll(css)].map(e => e.textContent).join('|');
            const before = read();
            window.began = window.took = null;
            for (const kind of ['keydown', 'change', 'click']) addEventListener(kind, () => {
                window.began ??= performance.now() }, {capture: true});
            new MutationObserver((_, me) => { if (window.began && read() !== before) {
                window.took = performance.now() - window.began; me.disconnect() }
            }).observe(document.body, {subtree: true, childList: true, characterData: true}) }""", css)
        act()
        self.page.wait_for_function('() => window.took !== null', timeout=30_000)
        self.milliseconds[what] = round(self.page.evaluate('window.took'))

    def slider(self, name):
        return self.page.locator('.widget-slider, .widget-hslider').filter(
            has=self.page.locator('.widget-label', has_text=name)).first

    def press(self, name, key):
        "A key on a slider's handle: ArrowLeft, ArrowRight, Home, End."
        self.slider(name).locator('.noUi-handle').press(key)

    def enter(self, name, value):
        "A number typed beside a slider."
        self.slider(name).locator('.widget-readout').fill(str(value))
        self.slider(name).locator('.widget-readout').press('Enter')

    def choose(self, name, **option):
        "An option of a menu, by `label` or `index`."
        self.page.locator('.widget-dropdown').filter(has=self.page.locator('.widget-label', has_text=name)) \
            .locator('select').select_option(**option)

    def click(self, trace, x, y):
        "A click of the mouse on a point, in data units, of the living figure's trace of this name."
        at = self.page.evaluate("""([name, x, y]) => {
            for (const plot of document.querySelectorAll('.jupyter-widgets .js-plotly-plot'))
                for (const t of plot._fullData) if (t.name === name) {
                    const box = plot.getBoundingClientRect(), l = plot._fullLayout;
                    const axis = a => l[a[0] + 'axis' + a.slice(1)];
                    const [ax, ay] = [axis(t.xaxis), axis(t.yaxis)];
                    return [box.x + ax._offset + ax.d2p(x), box.y + ay._offset + ay.d2p(y)] } }""", [trace, x, y])
        assert at, f'no living figure has a trace {trace}'
        self.page.mouse.move(*at)
        self.page.mouse.click(*at)

    def leave(self):
        "Closes its widgets: the next notebook on this kernel would load them all again."
        self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute("
                           "{code: 'import ipywidgets; ipywidgets.Widget.close_all()'}).done.then(() => 1)")
        self.page.close()

    def screenshot(self, name, readme=True):
        screens = ROOT / 'outputs/screens'
        screens.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=screens / f'{name}.png')
        (screens / f'{name}.json').write_text(json.dumps(self.milliseconds))
        if readme and os.environ.get('ADFLOW_SCREENS'):
            cell = self.page.locator('.jp-Cell').filter(has=self.page.locator('.jupyter-widgets')).first
            image = Image.open(io.BytesIO(cell.screenshot())).convert('RGB')
            image.quantize(128).save(ROOT / 'nbs/images' / f'explore_{name}.png', optimize=True)


# ---- the explorers: what is done with each, and what the page must then say

EXPLORERS = {}

def explorer(name, **parameters):
    "Registers how `nbs/explore/<name>.ipynb` is driven; a parameter names a run."
    return lambda drive: EXPLORERS.setdefault(name, (drive, parameters))

def scores_of(run, cls, k):
    return np.sort(run.maps(cls).reshape(len(run.maps(cls)), -1), 1)[:, -k:].astype(np.float64).mean(1)

def confusion(scores, bad, limit):
    alarm = scores > limit
    return [f'found {(alarm & bad).sum()}, missed {(~alarm & bad).sum()}, false alarms {(alarm & ~bad).sum()}, '
            f'passed {(~alarm & ~bad).sum()}']

def between(scores, bad, unlike):
    "A threshold in the widest gap between two scores where the confusion matrix is another one."
    s = np.sort(scores)
    gaps = [(b - a, (a + b) / 2) for a, b in zip(s, s[1:]) if confusion(scores, bad, (a + b) / 2) != unlike]
    return float(f'{max(gaps)[1]:.5g}')

@explorer('score_maps', run_dir='flow')
def score_maps(page, runs):
    run, cls = runs['flow'], 'film'
    scores, bad, maps = scores_of(run, cls, 3), run.labels(cls) == 1, run.maps(cls)
    shown = int(np.argmax(np.where(bad, scores, -np.inf)))
    page.says('.adflow-verdict', [f'score {scores[shown]:.4g} → ALARM'], 'the worst defect')
    first = page.texts('.adflow-confusion')
    limit = between(scores, bad, first)
    page.timed('.adflow-confusion', lambda: page.enter('threshold', limit), 'threshold typed')
    page.says('.adflow-confusion', confusion(scores, bad, limit), f'threshold {limit}')
    page.timed('.adflow-confusion', lambda: page.press('threshold', 'Home'), 'threshold to its least')
    page.says('.adflow-confusion', confusion(scores, bad, scores.min()), 'least threshold')
    page.timed('.adflow-verdict', lambda: page.press('threshold', 'End'), 'threshold to its most')
    page.says('.adflow-verdict', [f'score {scores[shown]:.4g} → passes'], 'highest threshold')
    page.enter('top k', 20)
    mean = f'score {scores_of(run, cls, 20)[shown]:.4g} '
    page.says('.adflow-verdict', lambda t: t[0].startswith(mean), f'mean of 20 patches, {mean}')
    page.enter('top k', 3)
    page.enter('threshold', limit)
    page.says('.adflow-confusion', confusion(scores, bad, limit), 'back again')

    features, (h, w) = run.of(cls), maps.shape[1:]
    train = run.features.where(split='train', label=0, **{'class': cls})
    bank = train.batch(np.arange(len(train))).flatten(0, 2)
    patches = features.batch(np.array([shown])).flatten(0, 2)
    far = torch.cdist(*((x - bank.mean(0)) / bank.std(0).clamp_min(1e-6) for x in (patches, bank))).sort(1).values
    height, width = features.preprocess.size
    worst = divmod(int(maps[shown].argmax()), w)
    for i, (row, col) in enumerate([worst, (1, w - 3)]):    # not on the diagonal: rows are no columns
        page.timed('.adflow-near', lambda: page.click('map', (col + .5) * width / w, (row + .5) * height / h),
                   f'patch clicked, {i + 1}')
        near = [f'here: {maps[shown, row, col]:.4g}', *(f'{d:.2f}' for d in far[row * w + col, :4])]
        page.says('.adflow-near', near, f'patch {row}, {col}')
    page.screenshot('score_maps')

    other = int(np.argmin(scores))
    page.timed('.adflow-verdict', lambda: page.choose('image', index=other), 'image chosen')
    page.says('.adflow-verdict', [f'score {scores[other]:.4g} → passes'], 'another image')
    page.says('.adflow-near', [], 'the patches of the former image are gone')
    page.choose('class', label='retina')
    page.press('threshold', 'End')
    scores, bad = scores_of(run, 'retina', 3), run.labels('retina') == 1
    page.says('.adflow-confusion', confusion(scores, bad, scores.max()), 'another class')

@explorer('compare', first='flow', second='bank')
def compare(page, runs):
    def ranks(run):
        maps = pixel_maps(np.array(run.maps('film')), [s // 4 for s in run.of('film').preprocess.size], 1.)
        return rankdata(maps, method='ordinal').reshape(np.shape(maps)) / np.size(maps)
    change = np.abs(ranks(runs['flow']) - ranks(runs['bank'])).mean((1, 2))
    names = ['/'.join(Path(p).parts[-3:]) for p in runs['flow'].of('film').index['image']]
    titles = [f'film, {names[i]}: disagreement {change[i]:.2f}' for i in np.argsort(-change)]
    title = '.jupyter-widgets .gtitle'
    page.says(title, titles[:1], 'the most disputed image')
    for at in (1, 2):
        page.timed(title, lambda: page.press('disputed', 'ArrowRight'), f'disputed, {at}')
        page.says(title, [titles[at]], f'disputed image {at}')
    page.screenshot('compare')
    page.enter('disputed', len(titles) - 1)
    page.says(title, titles[-1:], 'the least disputed image')


# ---- the tests

def test_every_explorer_has_its_drive():
    there = {p.stem for p in (ROOT / 'nbs/explore').glob('*.ipynb')}
    assert there == set(EXPLORERS), 'write a function with @explorer for a new notebook in nbs/explore'

@pytest.mark.parametrize('name', [pytest.param(name, marks=needs_browser) for name in EXPLORERS])
def test_explorer(name, lab, runs, chromium):
    drive, parameters = EXPLORERS[name]
    page = Explorer(chromium.new_page(), lab.put(name, {k: str(runs[run].path) for k, run in parameters.items()}))
    try:
        drive(page, runs)
        assert not page.texts('.jp-OutputArea [data-mime-type*=stderr], .jp-OutputArea [data-mime-type*=error]')
        assert not page.strange, page.strange
    except BaseException:
        page.screenshot(f'{name}_failed', readme=False)
        raise
    finally: page.leave()
