"""The explorers in a real browser: JupyterLab on a loopback port, headless Chromium, sliders moved, patches clicked.

What the page must say is computed here from the files of the runs, not by the widget. `outputs/screens/<notebook>.png`
shows the page, `<notebook>.json` the milliseconds from an event to the changed text, to the end of the drawing, and of
an empty echo. The text of every interaction must have changed within 200 ms, or as many times more as the echo before
takes longer than on two idle cores; where something else held one up, the notebook is driven again, twice at most.
With ADFLOW_SCREENS=1 the pictures of the README, `nbs/images/explore_<notebook>.png`, are made anew. A new explorer
gets a function like those at the end. Without Chromium or playwright these tests skip; with ADFLOW_REQUIRE_BROWSER=1,
as in CI, they fail. ADFLOW_BROWSER_IMAGES=1000 drives them on runs of so many images.
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
import pandas as pd
import psutil
import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from scipy.stats import rankdata

from adflow.evaluate.scoring import image_scores, pixel_maps
from adflow.features.augment import draw
from adflow.parts import use_task
from adflow.views.latent import sample_patches
from adflow.views.scores import OpenRun, demo_run

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name, there in (("the Python package playwright (pip install -e '.[browser]')",
                                     importlib.util.find_spec('playwright')),
                                    ('Chromium (apt-get install chromium)', CHROMIUM)) if not there]
QUIET = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
MANY = int(os.environ.get('ADFLOW_BROWSER_IMAGES', 0))   # so many test images, about; 0: the demonstration's few
BOUND, IDLE_ECHO = 200, 60      # ms: of an interaction, and of an echo on two cores with nothing else to do
ABSENT, REQUIRED = 'not here: ' + ' and '.join(MISSING), os.environ.get('ADFLOW_REQUIRE_BROWSER') == '1'
needs_browser = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=ABSENT)]
# anywidget gives a model two seconds to load plotly's 5 MB; a machine that is shared may need more
PATIENCE = 'const timeout = AbortSignal.timeout; AbortSignal.timeout = ms => timeout.call(AbortSignal, 60 * ms)'


# ---- a run to look into, a JupyterLab, a browser

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    home, small = tmp_path_factory.mktemp('outputs'), {}
    if MANY: small = {'dataset': {'name': 'embedded', 'good': MANY // 4, 'defects': MANY // 24}}
    dinomaly = {'name': 'dinomaly', 'depth': 3, 'heads': 2, 'models': 'class'}
    paths = dict(flow=demo_run(home, name='flow', **small),
                 bank=demo_run(home, {'name': 'patchcore', 'size': 500}, 'bank', **small),
                 decoder=demo_run(home, dinomaly, 'decoder', epochs=1, **small))
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
def browser():
    if MISSING: pytest.fail(f'ADFLOW_REQUIRE_BROWSER is set, and {ABSENT}')

@pytest.fixture(scope='module')
def lab(tmp_path_factory, request, browser):
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
        page.evaluate("""() => { window.complaints = [];     // a widget's callback that fails says so only here
            window.jupyterapp.shell.currentWidget.sessionContext.iopubMessage.connect((_, {header, content}) => {
                if (header.msg_type === 'error') complaints.push(content.traceback.join('\\n'));
                if (content.name === 'stderr' && !content.text.startsWith('No such comm'))
                    complaints.push(content.text) }) }""")
        page.evaluate("window.jupyterapp.commands.execute('runmenu:run-all')")
        page.locator('.jp-OutputArea .jupyter-widgets').first.wait_for(timeout=240_000)     # imports come first
        page.wait_for_function(idle)
        page.wait_for_timeout(3000)      # JupyterLab still loads pieces of its own, which would be timed

    def complaints(self):
        "What went wrong on the page or in the kernel."
        return self.strange + self.page.evaluate('window.complaints')

    def texts(self, css): return self.page.locator(css).all_text_contents()

    def says(self, css, wanted, what):
        "Waits for the texts of a selector: exactly these, or a function of them that is true."
        end = time.time() + 30
        while not (wanted(self.texts(css)) if callable(wanted) else self.texts(css) == wanted):
            assert time.time() < end, f'{what}: the page says {self.texts(css)}, expected {wanted}; {self.complaints()}'
            self.page.wait_for_timeout(20)

    def echo(self):
        "Milliseconds to the kernel and back with nothing to do: how busy page, server and machine are."
        return self.page.evaluate("""async () => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel, took = [];
            for (let i = 0; i < 3; i++) {
                const began = performance.now();
                await kernel.requestExecute({code: '', silent: true, store_history: false}).done;
                took.push(performance.now() - began) }
            return took.sort((a, b) => a - b)[1] }""")

    def timed(self, css, act, what):
        """Acts, and measures in the browser from the first event to the changed text, and to the end of the drawing, as
        far as plotly tells; None where nothing is drawn."""
        self.page.wait_for_timeout(500)          # a page that has settled
        echo = self.echo()
        self.page.evaluate("""css => {
            const read = () => [...document.querySelectorAll(css)].map(e => e.textContent).join('|');
            const before = read();
            window.began = window.took = window.drawn = null;
            for (const plot of document.querySelectorAll('.jupyter-widgets .js-plotly-plot'))
                for (const kind of ['afterplot', 'relayout', 'restyle', 'update']) plot.on('plotly_' + kind, () => {
                    if (window.began) window.drawn = performance.now() - window.began });
            for (const kind of ['keydown', 'change', 'mouseup']) addEventListener(kind, () => {
                window.began ??= performance.now() }, {capture: true});
            new MutationObserver((_, me) => { if (window.began && read() !== before) {
                window.took = performance.now() - window.began; me.disconnect() }
            }).observe(document.body, {subtree: true, childList: true, characterData: true}) }""", css)
        act()
        self.says(css, lambda _: self.page.evaluate('window.took !== null'), what)
        drawn = -1
        while drawn != (drawn := self.page.evaluate('window.drawn')): self.page.wait_for_timeout(400)
        self.milliseconds[what] = {'took': round(self.page.evaluate('window.took')), 'echo': round(echo),
                                   'drawn': drawn and round(drawn)}

    def widget(self, kind, name):
        return self.page.locator(kind).filter(has=self.page.locator('.widget-label', has_text=name)).first
    def slider(self, name): return self.widget('.widget-slider', name)

    def press(self, name, key):
        "A key on a slider's handle: ArrowLeft, ArrowRight, Home, End."
        self.slider(name).locator('.noUi-handle').press(key)

    def enter(self, name, value):
        "A number typed beside a slider."
        self.slider(name).locator('.widget-readout').fill(str(value))
        self.slider(name).locator('.widget-readout').press('Enter')

    def type(self, name, text):
        self.widget('.widget-text', name).locator('input').fill(text)
        self.widget('.widget-text', name).locator('input').press('Enter')

    def choose(self, name, **option):
        "An option of a menu, by `label` or `index`."
        self.widget('.widget-dropdown', name).locator('select').select_option(**option)

    def at(self, trace, x, y):
        "Where on the page a point is, in data units of the living figure's trace of this name."
        at = self.page.evaluate("""([name, x, y]) => {
            for (const plot of document.querySelectorAll('.jupyter-widgets .js-plotly-plot'))
                for (const t of plot._fullData) if (t.name === name) {
                    const box = plot.getBoundingClientRect(), l = plot._fullLayout;
                    const axis = a => l[a[0] + 'axis' + a.slice(1)];
                    const [ax, ay] = [axis(t.xaxis), axis(t.yaxis)];
                    return [box.x + ax._offset + ax.d2p(x), box.y + ay._offset + ay.d2p(y)] } }""", [trace, x, y])
        assert at, f'no living figure has a trace {trace}'
        return at

    def dots(self, trace):
        "The points of a trace: (n, 2), in data units."
        return np.array(self.page.evaluate("""name => {
            for (const plot of document.querySelectorAll('.jupyter-widgets .js-plotly-plot'))
                for (const t of plot._fullData) if (t.name === name) return [Array.from(t.x), Array.from(t.y)]
        }""", trace)).T

    def click(self, *point):
        at = self.at(*point)
        self.page.mouse.move(*at)
        self.page.mouse.click(*at)

    def zoom(self, trace, x, y, side=20):
        "Drags a box around a point with the mouse; the ranges of all panels of the first row: (x, y) of each."
        a, b = self.at(trace, x, y)
        self.page.mouse.move(a - side, b - side)
        self.page.mouse.down()
        self.page.mouse.move(a + side, b + side, steps=6)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)
        return np.array(self.page.evaluate("""name => {
            for (const plot of document.querySelectorAll('.jupyter-widgets .js-plotly-plot')) {
                const l = plot._fullLayout, axis = a => l[a[0] + 'axis' + a.slice(1)].range;
                if (plot._fullData.some(t => t.name === name))
                    return ['', '2', '3', '4'].map(i => [axis('x' + i), axis('y' + i)]) } }""", trace), float)

    def lasso(self, *point, side=8):
        "A square drawn with the mouse around a point, `side` pixels to each side."
        x, y = self.at(*point)
        self.page.mouse.move(x - side, y - side)
        self.page.mouse.down()
        for dx, dy in ((1, -1), (1, 1), (-1, 1), (-1, -1)):
            self.page.mouse.move(x + dx * side, y + dy * side, steps=4)
        self.page.mouse.up()

    def events(self):
        "What plotly tells its widget, figure by figure."
        return self.page.evaluate("""[...document.querySelectorAll('.jupyter-widgets .js-plotly-plot')].map(
            plot => Object.keys(plot._ev._events))""")

    def leave(self):
        "Closes its widgets: the next notebook on this kernel would load them all again."
        try: self.page.evaluate("""Promise.race([new Promise(done => setTimeout(done, 20000)),
            window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute(
                {code: 'import ipywidgets; ipywidgets.Widget.close_all()'}).done.then(() => 1)])""")
        finally: self.page.close()

    @staticmethod
    def record(name, milliseconds):
        "The milliseconds of all that was timed."
        (ROOT / f'outputs/screens/{name}.json').write_text(json.dumps(milliseconds))

    def screenshot(self, name):
        screens = ROOT / 'outputs/screens'
        screens.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=screens / f'{name}.png')
        picture = ROOT / 'nbs/images' / f'explore_{name}.png'
        if os.environ.get('ADFLOW_SCREENS') and picture.exists():
            cell = self.page.locator('.jp-Cell').filter(has=self.page.locator('.jupyter-widgets')).first
            image = Image.open(io.BytesIO(cell.screenshot())).convert('RGB')
            image.quantize(128).save(picture, optimize=True)


# ---- the explorers: what is done with each, and what the page must then say

EXPLORERS = {}

def explorer(name, **parameters):
    "Registers how `nbs/explore/<name>.ipynb` is driven; a parameter may name a run, whose folder it gets."
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

def linked(page, trace, height, width):
    "A box drawn in one panel is what all four show."
    seen = page.zoom(trace, width / 2, height / 2)
    assert (seen == seen[0]).all() and 0 < np.ptp(seen[0, 0]) < width / 2, f'zoomed into {seen.tolist()}'

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
    page.says('.adflow-verdict', [f'score {scores[shown]:.4g} → ALARM'], 'the threshold was cut to what 20 reach')
    page.enter('threshold', limit)
    page.says('.adflow-confusion', confusion(scores, bad, limit), 'back again')

    features, (h, w) = run.of(cls), maps.shape[1:]
    train = run.features.where(split='train', label=0, **{'class': cls})
    bank = train.batch(np.arange(len(train))).flatten(0, 2)
    patches = features.batch(np.array([shown])).flatten(0, 2)
    far = torch.cdist(*((x - bank.mean(0)) / bank.std(0).clamp_min(1e-6) for x in (patches, bank))).sort(1).values
    height, width = features.preprocess.size
    worst, detector = divmod(int(maps[shown].argmax()), w), run.stage.detector
    use_task(detector, detector.groups[run.sent.query('`class` == @cls')['routed_group'].iloc[shown]])
    with torch.no_grad(): z, log_det = (v[0].double() for v in detector(features.batch(np.array([shown]))))
    nll = -torch.distributions.Normal(0, 1).log_prob(z).sum(-1) - log_det
    for i, (row, col) in enumerate([worst, (1, w - 3)]):    # not on the diagonal: rows are no columns
        page.timed('.adflow-near', lambda: page.click('map', (col + .5) * width / w, (row + .5) * height / h),
                   f'patch clicked, {i + 1}')
        near = [f'here: {maps[shown, row, col]:.4g}', *(f'{d:.2f}' for d in far[row * w + col, :4])]
        page.says('.adflow-near', near, f'patch {row}, {col}')
        terms = zip(('‖z‖²', 'log-det', 'NLL'), (z.square().sum(-1), log_det, nll))
        page.says('.adflow-latent', [', '.join(f'{k} {v[row, col]:.4g}' for k, v in terms)], f'latent {row}, {col}')
    page.screenshot('score_maps')
    linked(page, 'map', height, width)

    other = int(np.argmin(scores))
    page.timed('.adflow-verdict', lambda: page.choose('image', index=other), 'image chosen')
    page.says('.adflow-verdict', [f'score {scores[other]:.4g} → passes'], 'another image')
    page.says('.adflow-near', [], 'the patches of the former image are gone')
    page.says('.adflow-latent', [], 'and its latent')
    page.timed('.adflow-confusion', lambda: page.choose('class', label='retina'), 'class chosen')
    scores, bad = scores_of(run, 'retina', 3), run.labels('retina') == 1
    start = run.threshold('retina', lambda maps: image_scores(maps, {'name': 'top_k', 'k': 3}))
    page.page.wait_for_timeout(1000)     # the page must not send its own idea of the threshold back
    page.says('.adflow-confusion', confusion(scores, bad, start), 'another class begins at its own threshold')
    limit = between(scores, bad, confusion(scores, bad, start))      # not End: noUiSlider keeps its first range there
    page.enter('threshold', limit)
    page.says('.adflow-confusion', confusion(scores, bad, limit), 'a threshold of another class')

@explorer('compare', first='flow', second='bank')
def compare(page, runs):
    def ranks(run):
        maps = pixel_maps(np.array(run.maps('film')), [s // 4 for s in run.of('film').preprocess.size], 1.)
        return (rankdata(maps).reshape(np.shape(maps)) - 1) / (np.size(maps) - 1)
    change = np.abs(ranks(runs['flow']) - ranks(runs['bank'])).mean((1, 2))
    names = ['/'.join(Path(p).parts[-3:]) for p in runs['flow'].of('film').index['image']]
    titles = [f'film, {names[i]}: disagreement {change[i]:.2f}' for i in np.argsort(-change)]
    title = '.adflow-disputed'
    page.says(title, titles[:1], 'the most disputed image')
    for at in (1, 2):
        page.timed(title, lambda: page.press('disputed', 'ArrowRight'), f'disputed, {at}')
        page.says(title, [titles[at]], f'disputed image {at}')
    i, (height, width) = np.argsort(-change)[2], runs['flow'].of('film').preprocess.size
    row, col = height // 4 - 3, 5                                   # of the grid of ranks, four pixels each
    said = []
    for name, run in (('first', runs['flow']), ('second', runs['bank'])):
        heat = run.maps('film')[i]
        own = heat[row * 4 * heat.shape[0] // height, col * 4 * heat.shape[1] // width]
        said.append(f'{name}: rank {ranks(run)[i, row, col]:.3f}, its patch {own:.4g}')
    page.timed('.adflow-place', lambda: page.click('second', 4 * col + 1.5, 4 * row + 1.5), 'place clicked')
    page.says('.adflow-place', [' · '.join(said)], 'what both make of it')
    page.screenshot('compare')
    linked(page, 'first', height, width)
    page.enter('disputed', len(titles) - 1)
    page.says(title, titles[-1:], 'the least disputed image')
    page.timed(title, lambda: page.choose('class', label='retina'), 'class chosen')
    page.says(title, lambda t: t[0].startswith('retina, '), 'another class')

@explorer('latent', run_dir='flow')
def latent(page, runs):
    table = sample_patches(runs['flow'], 2000, seed=0)
    scores = np.sort(table['score'].to_numpy())
    page.says('.adflow-selection', lambda t: t[0].startswith(f'{round(len(table) / 50)} patches'), 'the highest 2 %')
    page.timed('.adflow-selection', lambda: page.enter('highest %', 10), 'highest 10 %')
    n = round(len(table) / 10)
    page.says('.adflow-selection', lambda t: t[0].startswith(f'{n} patches') and
              f'score {scores[-n]:.4g} … {scores[-1]:.4g}' in t[0], f'the {n} highest of {len(table)}')
    dots = page.dots('patches')
    assert len(dots) == len(table)
    gap = np.sort(np.linalg.norm((dots[:, None] - dots) / np.ptp(dots, 0), axis=-1), 1)[:, 1]
    for i, act in zip(np.argsort(-gap)[:2], (page.click, page.lasso)):      # dots that stand alone
        one, what = table.iloc[i], f'{act.__name__} on a patch'
        page.timed('.adflow-selection', lambda: act('patches', *dots[i]), what)
        page.says('.adflow-patch', [f"{one['score']:.4g} · {one['class']} · {one['kind']}"], what)
    page.screenshot('latent')
    page.timed('.adflow-plane', lambda: page.choose('space', label='latents'), 'space chosen')
    page.says('.adflow-plane', lambda t: 'of latents' in t[0], 'another space')

@explorer('attention', run_dir='decoder')
def attention(page, runs):
    run, cls = runs['decoder'], 'film'
    detector, features, image = run.stage.detector, run.of(cls), int(np.argmax(run.labels(cls)))
    group = run.sent['routed_group'][run.sent['class'] == cls].tolist()[image]
    errors = detector.group_maps(draw(features, [image], detector), group)[:, 0]
    (h, w), (height, width) = detector.grid, features.preprocess.size
    for trace, row, col in (('tokens', 2, w - 3), ('attention', h - 2, 1)):
        page.timed('.adflow-token', lambda: page.click(trace, (col + .5) * width / w, (row + .5) * height / h),
                   f'{trace} clicked')
        page.says('.adflow-token', [f'token ({row}, {col})'], f'a click on {trace}')
        page.says('.adflow-error', ['error here: ' + ', '.join(
            f'group {g + 1} {e[row, col]:.3f}' for g, e in enumerate(errors.cpu().numpy()))], 'the errors there')
    heard = page.texts('.adflow-heard')
    page.timed('.adflow-layer', lambda: page.press('layer', 'ArrowRight'), 'next layer')
    page.says('.adflow-layer', lambda t: t[0].startswith('layer 2 of 3'), 'the next layer')
    page.says('.adflow-heard', lambda t: t != heard, 'another layer hears other tokens')
    page.screenshot('attention')
    for name, option in (('image', {'index': 0}), ('class', {'label': 'retina'})):
        page.timed('.adflow-error', lambda: page.choose(name, **option), f'{name} chosen')

@explorer('hdmap', fault='tooth', gear='driving', severity=1., N1=19, N2=31)
def hdmap(page, runs):
    page.says('.adflow-planted', ['driving gear, tooth 5, severity 1.00'], 'as the parameters say')
    page.timed('.adflow-planted', lambda: page.press('severity', 'Home'), 'no fault')
    page.says('.adflow-planted', ['nothing'], 'no fault')
    page.enter('tooth', 8)               # and at once another slider: none of the two may be lost
    page.timed('.adflow-planted', lambda: page.enter('severity', 1.5), 'severity 1.5')
    page.says('.adflow-planted', ['driving gear, tooth 8, severity 1.50'], 'another fault')
    page.says('.adflow-diagnosis', lambda t: 'driving' in t[0] and '8' in t[0], 'and it is found')
    for row, col in ((7, 20), (16, 3)):
        page.timed('.adflow-cell', lambda: page.click('map', col, row), f'cell {row}, {col}')
        def met(t):                  # the mesh is one in which these two teeth meet
            n = int(t[0].split('mesh ')[1].split(',')[0])
            return t[0].startswith(f'row {row}, column {col}: ') and (n % 19, n % 31) == (row, col)
        page.says('.adflow-cell', met, f'cell {row}, {col}')
    page.screenshot('hdmap')

@explorer('runs', outputs='outputs')
def runs_table(page, runs):
    tables = [pd.read_parquet(run.path / 'metrics.parquet') for run in runs.values()]
    auroc = np.sort([t.query('routed and stage == stage.max()')['image_auroc'].mean() for t in tables])
    page.says('.adflow-count', ['3 of 3 runs'], 'all runs')
    limit = round(float(auroc[:2].mean()), 4)
    page.timed('.adflow-count', lambda: page.enter('image_auroc', limit), 'filter by the slider')
    page.says('.adflow-count', [f'{(auroc >= limit).sum()} of 3 runs'], f'image_auroc >= {limit}')
    page.press('image_auroc', 'End')
    page.says('.adflow-count', [f'{(auroc == auroc[-1]).sum()} of 3 runs'], 'the slider at its end: the best')
    page.type('filter', "name == 'bank'")
    page.says('.adflow-count', ['1 of 3 runs'], 'filter by name')
    page.type('filter', 'nmae == 1')
    page.says('.adflow-filter-message', lambda t: t and 'nmae' in t[0], 'what cannot be read')
    page.timed('.adflow-count', lambda: page.type('filter', ''), 'no filter')
    page.says('.adflow-count', ['3 of 3 runs'], 'no filter')
    page.choose('from', label='moleflow/flow')
    page.choose('to', label='moleflow/bank')
    page.says('.adflow-difference', lambda t: "detector.name: (absent) → 'patchcore'" in t, 'what differs')
    page.screenshot('runs')


# ---- the tests

def test_every_explorer_has_its_drive():
    there = {p.stem for p in (ROOT / 'nbs/explore').glob('*.ipynb')}
    assert there == set(EXPLORERS), 'write a function with @explorer for a new notebook in nbs/explore'

@pytest.mark.slow
@pytest.mark.parametrize('required, said', [('', '1 skipped'), ('1', '1 error')])
def test_a_missing_browser_skips_or_fails(tmp_path, required, said):
    "In a process of its own, where nothing is on the path."
    env = os.environ | {'PATH': str(tmp_path), 'ADFLOW_REQUIRE_BROWSER': required, 'ADFLOW_SLOW': '1'}
    asked = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'{__file__}::test_explorer[runs]']
    done = subprocess.run(asked, env=env, cwd=ROOT, capture_output=True, text=True)
    assert said in done.stdout.split('\n')[-2] and bool(done.returncode) == bool(required), done.stdout[-2000:]
    assert not required or 'ADFLOW_REQUIRE_BROWSER is set, and not here: Chromium' in done.stdout

@pytest.mark.parametrize('name', [pytest.param(name, marks=needs_browser) for name in EXPLORERS])
def test_explorer(name, lab, runs, chromium):
    drive, parameters = EXPLORERS[name]
    known = {'outputs': runs['flow'].path.parents[1], **{k: r.path for k, r in runs.items()}}
    best, bound = {}, lambda v: BOUND * max(1, v['echo'] / IDLE_ECHO)
    for _ in range(3):
        page = Explorer(chromium.new_page(), lab.put(name, {k: str(known.get(v, v)) if isinstance(v, str) else v
                                                            for k, v in parameters.items()}))
        try:
            drive(page, runs)
            for k, v in page.milliseconds.items(): best[k] = min(best.get(k, v), v, key=lambda v: v['took'] / bound(v))
            page.record(name, best)
            for told in page.events():           # a click and nothing that nobody asked for
                assert 'plotly_click' in told and not {'plotly_hover', 'plotly_selected'} & {*told}, told
            assert not page.complaints(), page.complaints()
        except BaseException:
            page.screenshot(f'{name}_failed')
            raise
        finally: page.leave()
        if not (slow := {k: v for k, v in best.items() if v['took'] >= bound(v)}): break
    assert not slow, slow
