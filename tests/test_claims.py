"The claims of the checkout: what they point to is there, and a machine without runs prints no number."
import re
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adflow.analysis.claims import (HOLDS, NONE, NOT, Claim, Evidence, claims_markdown, judge, read_claims,
                                    verdict_table, weigh)
from adflow.workbook.params import load

ROOT = Path(__file__).parents[1]
CLAIMS = read_claims(ROOT / 'params/claims.yaml')

def test_studies_and_commands_exist():
    for c in CLAIMS:
        assert not c.study or (ROOT / 'nbs' / c.study).is_file(), f'{c.id}: no notebook {c.study}'
        for e in c.evidence.values():
            command = e.command or f'adflow run params/{e.run}.yaml'
            of = load(ROOT / re.match(r'adflow run (\S+)', command)[1])
            assert of.experiment == e.run.split('/')[0], f'{c.id}: {command} makes a run of {of.experiment}'

def test_every_claim_says_who_and_where_the_facts_stand():
    for c in CLAIMS: assert re.search(r'seeds? 00|facts-', c.said), c.id
    assert len(CLAIMS) >= 40 and sum(bool(c.disputed) for c in CLAIMS) >= 25

def test_without_runs_nothing_is_measured(tmp_path):
    verdicts = weigh(CLAIMS, tmp_path)
    assert {r['verdict'] for r in verdicts.rows.values()} == {NONE}
    for row in claims_markdown(verdicts).split('\n')[2:]:
        measured = row.split(' | ')[2]
        assert measured.startswith('cannot be measured here') or 'not measured here; `adflow run' in measured
        assert '**' not in row.split(' | ')[3]

def rule_of(e): return dict(above=e.above, below=e.below, within=e.within)

UNIT = dict.fromkeys(['pixel_ap', 'image_auroc', 'ks', 'outer_ring', 'routing', 'energy95 / full'], (0, 1))
SPAN = dict.fromkeys(['difference', '`64` - `4`', '`64` - `16`'], (-1, 1))      # differences of AUROC and of AP

def possible(check):
    "The least and the largest number that a check can give, where its metric has such."
    name, value = check['name'], (UNIT | SPAN).get(check.get('value'))
    if name == 'contrast' and value:
        n, m = len(check['plus']), len(check.get('minus', ()))
        return n * value[0] - m * value[1], n * value[1] - m * value[0]
    if name in ('separates', 'alarms', 'order') or (name == 'ranking' and not check.get('minus')): return 0, 1
    if name == 'forgetting': return (0, 1) if check.get('of') == 'routing' else (-1, 1)
    if name in ('thresholds', 'correlation', 'ranking') or (name == 'largest' and value in UNIT.values()): return -1, 1
    return -1e9, 1e9

def can_fail(e):
    "Whether possible numbers hold, and others do not."
    low, high = possible(e.check)
    edges = [v for v in (e.above, e.below, *(e.within or ())) if v is not None and low <= v <= high]
    seen = {judge(v, v, **rule_of(e)) for v in [*np.linspace(low, high, 101), *edges]}
    return {HOLDS, NOT} <= seen

@pytest.mark.parametrize('c', CLAIMS, ids=lambda c: c.id)
def test_a_claim_can_fail(c):
    "Its rule leaves room for numbers that hold and numbers that do not, among those that its metric can have."
    for k, e in c.evidence.items(): assert can_fail(e), f'{k}: {e.rule}, of {possible(e.check)}'

AUROC = {'name': 'ranking', 'plus': {'detector': 'x'}}
GAIN = {'name': 'contrast', 'value': 'pixel_ap', 'plus': [{'model': 'a'}], 'minus': [{'model': 'b'}]}

@pytest.mark.parametrize('check, rule, sound', [
    (AUROC, {'above': 5}, False), (AUROC, {'above': .9}, True), (AUROC, {'below': -.1}, False),
    (AUROC, {'above': -.1}, False), (AUROC, {'within': (1.2, 2)}, False), (AUROC, {'within': (0, 1)}, False),
    (AUROC | {'minus': {'detector': 'y'}}, {'above': -.1}, True), (GAIN, {'above': 1.5}, False),
    (GAIN, {'above': -.5}, True), (GAIN | {'minus': []}, {'above': -.5}, False),
    (GAIN, {'within': (-1e-9, 1e-9)}, True),
    (GAIN | {k: GAIN[k] * 2 for k in ('plus', 'minus')}, {'above': 1.5}, True),
    ({'name': 'separates', 'score': 'x', 'label': 'y'}, {'above': 50}, False),
    ({'name': 'contrast', 'value': 'amplification_feature', 'plus': [{}]}, {'within': (35, 52.3)}, True)])
def test_an_absurd_bound_is_caught(check, rule, sound):
    assert can_fail(Evidence(run='a/b', check=check, **rule)) == sound

@pytest.mark.parametrize('when, agree', [(['A'], True), (['B'], False), (['A', 'B'], False), (['A', 'gone'], True)])
def test_only_when_a_is_not_only_when_b(tmp_path, when, agree):
    "Planted runs: it holds under A, not under B, and was not measured under a third condition."
    for name, gain in (('A', .05), ('B', 0.)):
        folder = tmp_path / 'toy' / name
        folder.mkdir(parents=True)
        (folder / 'params.yaml').write_text('experiment: toy')
        (folder / 'manifest.json').write_text('{"state": "done"}')
        pd.DataFrame([{'model': m, 'seed': s, 'pixel_ap': .3 + .02 * s + (gain + .0001 * s) * (m == 'a')}
                      for m in 'ab' for s in range(4)]).to_parquet(folder / 'metrics.parquet')
    claim = Claim(id='x', line='l', claim='c', said='s', study='y', recorded={
        'date': date.today(), 'verdict': 'only when so', 'words': 'w', 'when': when}, evidence={
        k: {'run': f'toy/{k}', 'check': GAIN, 'above': .01} for k in ('A', 'B', 'gone')})
    row = verdict_table(weigh([claim], tmp_path)).loc['x']
    assert row['here'] == 'only when A (not measured: gone)' and row['agree'] == str(agree)
