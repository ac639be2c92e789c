"The claims of the checkout: what they point to is there, and a machine without runs prints no number."
import re
from pathlib import Path

import pytest

from adflow.analysis.claims import NONE, claims_markdown, read_claims, weigh
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

@pytest.mark.parametrize('c', CLAIMS, ids=lambda c: c.id)
def test_a_claim_can_fail(c):
    "Its rule leaves room for numbers that hold and numbers that do not."
    from adflow.analysis.claims import HOLDS, NOT, judge
    for e in c.evidence.values():
        rule = dict(above=e.above, below=e.below, within=e.within)
        seen = {judge(v, v, **rule) for v in (-1e9, e.above, e.below, *(e.within or ()), 1e9) if v is not None}
        assert {HOLDS, NOT} <= seen
