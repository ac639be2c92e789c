"""Vibration → angle → map → diagnosis, against known truth: folding, faults, energy, speed, tacho, bad input."""
import math
from fractions import Fraction

import numpy as np
import pytest

from adflow.data.gearbox import KINDS, faulty_meshes, simulate
from adflow.data.hdmap import (MAP_STATISTICS, Window, fold, hdmap_from_vibration, near_sensor, remove_regular,
                               teeth_in_mesh)
from adflow.data.phase import Planetary, SignalError, phase_from_edges, tacho_edges, tacho_phase, tacholess_phase
from adflow.evaluate.diagnosis import diagnose, tooth_trials
from adflow.parts import PartError

FS, N1, N2 = 20_000., 19, 31
L = N1 * N2

def shaft(start, end, seconds=2., fs=FS):
    "Angle of a shaft whose speed goes from start to end turns per second."
    t = np.arange(round(seconds * fs)) / fs
    return 2 * np.pi * (start * t + (end - start) / (2 * seconds) * t**2)

def vibration(theta, hit, strength=1., noise=.1, seed=0, n1=N1):
    "Noise, a modulated mesh, and a tone burst in every mesh for which `hit(n)`."
    mesh, rng = n1 * theta / 2 / np.pi, np.random.default_rng(seed)
    regular = (1 + .3 * np.cos(theta)) * np.cos(2 * np.pi * mesh) + .4 * np.cos(4 * np.pi * mesh + 1)
    burst = np.sin(2 * np.pi * 8 * mesh) * (mesh % 1 < .5) * hit(np.floor(mesh).astype(int))
    return regular + strength * burst + noise * rng.standard_normal(len(theta))

def built(x, theta, **args): return hdmap_from_vibration(x, FS, **dict(N1=N1, N2=N2, phase=theta) | args)


# ---- folding -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('a, b', [(31, 95), (19, 31), (2, 3)])
def test_coprime_teeth_meet_each_pair_once(a, b):
    values = np.arange(a * b, dtype=float)
    folded, count = fold(values, a, b)
    assert (count == 1).all() and sorted(folded.ravel()) == sorted(values)
    i, j = teeth_in_mesh(values.astype(int), a, b)
    assert (folded[i, j] == values).all()

@pytest.mark.parametrize('a, b, share', [(32, 80, 1 / 16), (36, 100, 1 / 4), (6, 9, 1 / 3)])
def test_a_common_divisor_leaves_cells_that_never_meet(a, b, share):
    cycle = math.lcm(a, b)
    folded, count = fold(np.ones(3 * cycle), a, b)
    assert (count > 0).mean() == pytest.approx(share) and set(np.unique(count)) == {0, 3}
    assert (np.isnan(folded) == (count == 0)).all()
    i, j = np.nonzero(count)
    assert ((i - j) % math.gcd(a, b) == 0).all()

def test_start_moves_the_teeth_and_unknown_meshes_do_not_count():
    values = np.arange(35.)
    assert (fold(values, 5, 7, start=(2, 3))[0] == np.roll(fold(values, 5, 7)[0], (2, 3), (0, 1))).all()
    values[4] = np.nan
    folded, count = fold(values, 5, 7)
    assert count.sum() == 34 and np.isnan(folded[4, 4]) and count[4, 4] == 0


# ---- what a fault looks like -------------------------------------------------------------------------------

def test_a_driving_tooth_is_a_row():
    h = built(vibration(t := shaft(30, 40), lambda n: n % N1 == 7), t)
    profile = h.map.mean(1)
    assert profile.argmax() == 7 and profile[7] > 2.5 * np.delete(profile, 7).max()

def test_a_driven_tooth_is_a_column():
    h = built(vibration(t := shaft(30, 40), lambda n: n % N2 == 22), t)
    profile = h.map.mean(0)
    assert profile.argmax() == 22 and profile[22] > 2.5 * np.delete(profile, 22).max()

def test_a_transient_is_a_diagonal():
    h = built(vibration(t := shaft(30, 40), lambda n: (n >= 300) & (n < 312), 2.), t, cycles=1)
    found = set(zip(*np.nonzero(h.map > .5 * h.map.max())))
    assert found == {(n % N1, n % N2) for n in range(300, 312)}

def test_a_pair_is_a_point():
    h = built(vibration(t := shaft(30, 40), lambda n: (n % N1 == 3) & (n % N2 == 5), 2.), t)
    assert np.unravel_index(h.map.argmax(), h.map.shape) == (3, 5) and (h.map > .5 * h.map.max()).sum() == 1

def test_the_same_tooth_wherever_the_recording_begins():
    t = shaft(30, 40, 3)
    x = vibration(t, lambda n: n % N1 == 7)
    for first in (0, 1234, 9999): assert built(x[first:], t[first:], cycles=1).map.mean(1).argmax() == 7
    assert built(x, t - 2 * np.pi * 5, cycles=1).map.mean(1).argmax() == 7                # whole turns do not matter
    assert built(x, t + 2 * np.pi * 2 / N1, cycles=1).map.mean(1).argmax() == 9           # two teeth do

def test_a_speed_ramp_gives_the_map_of_constant_speed():
    hit = lambda n: n % N1 == 7
    steady, ramp = (built(vibration(t, hit, noise=0), t, samples_per_mesh=64, cycles=1)
                    for t in (shaft(35, 35), shaft(20, 50)))
    assert abs(ramp.map - steady.map).max() < .02 * steady.map.max()
    wrong = built(vibration(shaft(20, 50), hit, noise=0), shaft(35, 35), cycles=1)   # without the ramp's phase
    assert wrong.map.mean(1).argmax() != 7 or wrong.map.mean(1).max() < 1.5 * np.median(wrong.map.mean(1))

def test_averaging_lowers_noise_and_what_happened_once():
    t = shaft(38, 38, 4)
    once = vibration(t, lambda n: (n >= 300) & (n < 312), 2.)
    one, four = built(once, t, cycles=1), built(once, t, cycles=4)
    assert four.count.min() == four.count.max() == 4
    assert np.median(four.map) / np.median(one.map) == pytest.approx(.5, abs=.05)          # 1 / √4
    assert four.map.max() < .35 * one.map.max()
    maps = built(once, t, cycles=4, average='map')
    assert np.median(maps.map) / np.median(one.map) == pytest.approx(1, abs=.1)


# ---- energy and regular components -------------------------------------------------------------------------

def test_parseval():
    t = shaft(30, 40)
    x = vibration(t, lambda n: n % N1 == 7)
    h = built(x, t, statistic='energy', remove='raw', cycles=1)
    assert h.map.sum() == pytest.approx((h.signal**2).sum(), rel=1e-12)
    steady = shaft(35, 35)
    x = vibration(steady, lambda n: n % N1 == 7, noise=0)
    h = built(x, steady, statistic='energy', remove='raw', cycles=1)
    K, in_time = h.signal.shape[1], (x[:round(L / (35 * N1) * FS)]**2).sum()              # and that of the time signal
    assert h.map.sum() * FS / (35 * N1 * K) == pytest.approx(in_time, rel=2e-3)

def test_difference_removes_harmonics_and_sidebands_exactly():
    m = ((np.arange(L * 32) + .5) / 32).reshape(1, L, 32)
    a, b = 2 * np.pi * m / N1, 2 * np.pi * m / N2
    harmonics = np.cos(2 * np.pi * m) + .5 * np.sin(6 * np.pi * m)
    first = (1 + .3 * np.cos(a + 1) + .2 * np.sin(b)) * harmonics + .4 * np.cos(2 * a) + .1
    second = np.cos(2 * a) * harmonics
    rms = lambda x, mode: np.sqrt((remove_regular(x, N1, N2, mode)**2).mean())
    assert rms(harmonics, 'residual') < 1e-12 and rms(first, 'difference') < 1e-12
    assert rms(first, 'residual') == pytest.approx(np.sqrt(1.25 / 2 * (.3**2 + .2**2) / 2), rel=1e-6)  # the sidebands
    assert rms(second, 'difference') == pytest.approx(np.sqrt((second**2).mean()), rel=1e-6)
    assert (remove_regular(first, N1, N2, 'raw') == first).all()

def test_an_eccentric_gear_is_in_residual_and_not_in_difference():
    t = shaft(35, 35)
    x = vibration(t, lambda n: np.zeros(len(n)), noise=0)
    raw, residual, difference = (built(x, t, remove=r).map for r in ('raw', 'residual', 'difference'))
    assert np.ptp(raw.mean(1)) > .3 and residual.mean() > .1 and difference.max() < 5e-3

def test_every_statistic_sees_a_burst_and_obeys_the_window():
    t = shaft(35, 35)
    x = vibration(t, lambda n: n % N1 == 7, 1.5)
    for name in MAP_STATISTICS:
        h = built(x, t, statistic=name)
        if name != 'kurtosis': assert h.map.mean(1).argmax() == 7, name
        assert np.isfinite(h.map).all()
    assert built(x, t, offset=1.).map.mean(1).argmax() == 6                  # the window looks one mesh ahead
    late = built(x, t, width=.4, offset=.3).map.mean(1)
    assert late[7] < 1.5 * np.median(late)                                   # bursts are in the first half
    for shape in ('rect', 'hann', 'tukey'):
        assert Window(32, shape, 1.5).mean(np.full((1, 9, 32), 3.)) == pytest.approx(np.full((1, 9), 3.))


# ---- tacho, shafts -----------------------------------------------------------------------------------------

def test_tacho_edges_are_finer_than_a_sample():
    r = simulate(0, N1=N1, N2=N2, cycles=2, speed=(20., 30.))
    times = tacho_edges(r.tacho, r.fs)
    truth = np.interp(2 * np.pi * np.arange(len(times)), r.phase, np.arange(len(r.phase)) / r.fs)
    assert len(times) == math.floor(r.phase[-1] / 2 / np.pi) + 1
    assert abs(times - truth).max() < .2 / r.fs

def test_tacho_phase_against_the_truth():
    for per_rev in (1, 8):
        r = simulate(1, N1=N1, N2=N2, cycles=2, speed=(20., 30.), per_rev=per_rev)
        phase = tacho_phase(r.tacho, r.fs, per_rev)
        shift = round(np.nanmedian(r.phase - phase) / (2 * np.pi / per_rev)) * 2 * np.pi / per_rev
        error = np.degrees(phase + shift - r.phase)
        assert np.nanmax(abs(error)) < .15
        inside = np.isfinite(phase)
        assert (np.diff(phase[inside]) > 0).all() and inside.mean() > .9

def test_a_ratio_is_exact():
    times = np.arange(0, 2.0001, .05)
    a = phase_from_edges(times, 40_000, FS, ratio=Fraction(126, 31))
    b = phase_from_edges(times, 40_000, FS)
    assert np.nanmax(abs(a * 31 - b * 126)) < 1e-9

def test_a_lost_or_invented_edge_is_refused():
    times = np.cumsum(np.linspace(.05, .03, 60))
    phase_from_edges(times - times[0], 40_000, FS)
    for broken, said in ((np.delete(times, 20), 'about 1 missing'), (np.delete(times, [20, 21]), 'about 2 missing'),
                         (np.sort(np.r_[times, times[20:22].mean()]), 'one too many'), (times[:2], '3 or more')):
        with pytest.raises(SignalError, match=said): phase_from_edges(broken - broken[0], 40_000, FS)

def test_tacholess_finds_the_shaft():
    t = shaft(20, 26)
    found = tacholess_phase(vibration(t, lambda n: np.zeros(len(n)), noise=1., n1=12), FS, 220, 330, harmonic=12)
    error = np.degrees(found - t)
    assert np.std(error) < 1.5                                               # a tooth of 12 is 30°

def test_a_planet_in_its_ring():
    stage = Planetary(sun=31, planet=31, ring=95)
    carrier = shaft(8, 8, 4.2)
    theta = stage.planet_phase(carrier)
    x = vibration(theta, lambda n: n % 31 == 11, n1=31)
    h = hdmap_from_vibration(x, FS, N1=31, N2=95, phase=theta)
    assert h.map.mean(1).argmax() == 11 and h.mesh_frequency == pytest.approx(8 * 95, rel=1e-3)
    seen = near_sensor(h, 40, 9)
    assert (seen.count.any(0).nonzero()[0] == np.arange(36, 45)).all() and np.nanmean(seen.map, 1).argmax() == 11
    other = stage.planet_phase(carrier, which=1)
    assert (other - theta)[0] * 31 / 2 / np.pi == pytest.approx(95 / 3)


# ---- bad input ---------------------------------------------------------------------------------------------

t2 = shaft(30, 40)
x2 = vibration(t2, lambda n: n % N1 == 7)
def at(a, k, v): return np.where(np.arange(len(a)) == k, v, a)
BAD = [(dict(x=at(x2, 123, np.nan)), 'sample 123'), (dict(x=x2[:9000], phase=t2[:9000]), 'hunting cycle'),
       (dict(phase=at(t2, 500, 0.)), 'not increasing at sample 499'), (dict(phase=-t2), 'negate'),
       (dict(phase=at(t2, 500, np.nan)), 'not finite at sample 500'), (dict(phase=t2[:-1]), 'one per sample'),
       (dict(phase=None), 'either phase or tacho'), (dict(samples_per_mesh=4096), 'samples per mesh'),
       (dict(N1=400), '4 or more'), (dict(N1=1), '2 teeth'), (dict(x=np.stack([x2, x2])), 'one channel'),
       (dict(band=(5000., 99_000.)), 'must lie within'), (dict(cycles=9), 'hunting cycle'),
       (dict(phase=None, tacho=np.zeros(len(x2))), 'no edge'), (dict(width=99.), 'give')]

@pytest.mark.parametrize('args, said', BAD, ids=[w for _, w in BAD])
def test_bad_input_says_what_and_where(args, said):
    with pytest.raises((SignalError, PartError), match=said):
        hdmap_from_vibration(**dict(x=x2, fs=FS, N1=N1, N2=N2, phase=t2) | args)

def test_the_good_input_of_these_is_good(): assert built(x2, t2).map.mean(1).argmax() == 7

@pytest.mark.parametrize('args', [dict(remove='diff'), dict(statistic='rsm'), dict(window='hamm'), dict(average='x')])
def test_unknown_names_are_refused_with_the_known(args):
    with pytest.raises(PartError, match='Known'): built(x2, t2, **args)


# ---- the simulator and the whole line ----------------------------------------------------------------------

def test_the_simulator_is_deterministic():
    for kind in KINDS:
        a, b, c = simulate(3, kind), simulate(3, kind), simulate(4, kind)
        assert (a.x == b.x).all() and (a.tacho == b.tacho).all() and a.truth == b.truth
        assert len(a.x) != len(c.x) or (a.x != c.x).any()

def test_the_simulators_faults_are_where_it_says():
    n = np.arange(L)
    for kind, meshes in (('none', 0), ('driving', N2), ('driven', N1), ('pair', 1), ('transient', 12)):
        assert faulty_meshes(simulate(5, kind).truth, n, N1, N2).sum() == meshes

def test_diagnosis_of_nothing_is_nothing():
    rng = np.random.default_rng(0)
    found = [diagnose(np.exp(.3 * rng.standard_normal((N1, N2))), shuffles=499, seed=k).kind
             for k in range(60)]
    assert sum(k != 'none' for k in found) <= 3                              # at alpha = .01

def test_diagnosis_names_the_gear_and_the_tooth_with_holes_and_signs():
    rng = np.random.default_rng(1)
    m = .3 * rng.standard_normal((N1, N2))
    m[5] += .5
    for shown in (np.exp(m), m, np.exp(m) * 1e-6, np.where(rng.random(m.shape) < .3, np.nan, m)):
        d = diagnose(shown)
        assert (d.kind, d.tooth) == ('driving', 5) and d.p <= .01 and 'driving gear, tooth 5 of 19' in str(d)
    assert diagnose(np.exp(m)).contrast == pytest.approx(np.exp(.5) - 1, abs=.15)
    assert (diagnose(m.T).kind, diagnose(m.T).tooth) == ('driven', 5)

def test_a_few_trials():
    d = tooth_trials(8, (1.4,), seed=7)
    assert d.right.sum() >= 7, d.said.tolist()

@pytest.mark.slow
def test_a_hundred_trials():
    "Simulated recording → tacho → angle → map → words, no hand-set index: severity 1, one hunting cycle of 19 × 31."
    d = tooth_trials(100, (0., 1.), seed=11)
    faulty = d[d.severity > 0]
    assert faulty.right.mean() >= .95, faulty[~faulty.right].said.tolist()
    assert d[d.severity == 0].found.mean() <= .05
