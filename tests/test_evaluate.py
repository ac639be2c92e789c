"""Exact metrics against independent references, on random inputs full of ties; scoring and forgetting at the edges."""
import math, tracemalloc, warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch.nn import functional as F

from adflow.evaluate.forgetting import DEFINITIONS, forgetting_table, r_matrix
from adflow.evaluate.metrics import (METRICS, PIXEL_METRICS, evaluate_class, image_metrics, pixel_metrics,
                                     threshold_from_normals)
from adflow.evaluate.scoring import AGGREGATES, image_scores, pixel_maps

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA'))]


def reference(labels, scores):
    "AUROC, AP, F1max of scikit-learn."
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return [roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()]


def flood(mask):
    "The 8-connected regions of one mask as lists of pixels, by a flood fill in plain Python."
    left, regions = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        regions.append(region)
    return regions


def brute_aupro(maps, masks, limit):
    "A threshold at every distinct score, regions by flood fill, trapezoids in plain Python."
    regions = [[maps[i][p] for p in r] for i, m in enumerate(masks) for r in flood(m)]
    normal = maps[~masks]
    points = [(0., 0.)]
    for t in np.unique(maps)[::-1]:
        points.append((np.mean(normal >= t), np.mean([np.mean(np.array(r) >= t) for r in regions])))
    area = 0.
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= limit: break
        if x1 > limit: y1, x1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0), limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_maps(rng, n=None, size=None, levels=None):
    "Maps with a few levels (ties) or none (continuous) and masks of random blobs; some images normal."
    n, (h, w) = n or rng.integers(2, 6), size or rng.integers(4, 13, 2)
    masks = np.zeros((n, h, w), bool)
    for i in rng.permutation(n)[:max(1, n // 2)]:
        for _ in range(rng.integers(1, 5)):
            y, x = rng.integers(0, h), rng.integers(0, w)
            masks[i, y:y + rng.integers(1, 4), x:x + rng.integers(1, 4)] = True
    maps = rng.standard_normal((n, h, w)) + masks * rng.uniform(0, 2)
    maps = np.round(maps * levels) if levels else maps
    return maps.astype(np.float32), masks


# ---------------------------------------------------------------- images
@pytest.mark.parametrize('seed', range(5))
def test_image_metrics_equal_sklearn(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        n = rng.integers(2, 200)
        labels = rng.permutation(np.arange(n) < rng.integers(1, n))
        scores = rng.standard_normal(n) + labels * rng.uniform(-1, 3)
        scores = np.round(scores * rng.choice([.5, 2, 10])) if rng.random() < .7 else scores
        scores = scores.astype(rng.choice([np.float32, np.float64]))
        ours = image_metrics(scores, labels)
        np.testing.assert_allclose(list(ours.values()), reference(labels, scores), atol=1e-12)


def test_image_metrics_by_hand():
    def of(*args): return list(image_metrics(*args).values())
    assert of([3, 1, 2, 2], [1, 0, 0, 1]) == pytest.approx([.875, 5 / 6, .8])
    assert of([1., 1, 1, 1], [0, 1, 0, 0]) == pytest.approx([.5, .25, .4])
    assert of([30, 40, 50, 60], [0, 0, 1, 1]) == [1., 1., 1.]      # torchmetrics' AUROC calls this 0.5
    assert of([60, 50, 40, 30], [0, 0, 1, 1])[0] == 0.


@pytest.mark.parametrize('dtype, scale', [(torch.float16, 1), (torch.bfloat16, 1e6), (torch.float32, 1e9),
                                          (torch.float64, 1e50), (torch.int16, 1), (torch.uint8, 1)])
def test_every_dtype_keeps_order_and_ties(dtype, scale):
    scores = ((torch.randn(300, generator=torch.Generator().manual_seed(0)).double() * 40 + 100) * scale).to(dtype)
    labels = torch.arange(300) % 3 == 0
    expected = reference(labels.numpy(), scores.double().numpy())
    np.testing.assert_allclose(list(image_metrics(scores, labels).values()), expected, atol=1e-12)


def test_infinite_scores_are_ordered():
    scores, labels = [-np.inf, -np.inf, 0, 1, np.inf, np.inf], [0, 1, 0, 1, 1, 0]
    expected = reference(labels, [-9, -9, 0, 1, 9, 9])
    np.testing.assert_allclose(list(image_metrics(scores, labels).values()), expected, atol=1e-12)


@pytest.mark.parametrize('dtype', [bool, np.uint8, np.int8, np.uint16, np.int64, list])
def test_kinds_of_labels(dtype):
    labels = [True, False, True, False] if dtype is list else np.array([1, 0, 1, 0], dtype)
    assert image_metrics([2., 1, 2, 0], labels)['image_auroc'] == 1.


@pytest.mark.parametrize('labels, word', [([0, 2, 1, 0], 'labels > 0'), ([0, -1, 1, 0], 'labels > 0'),
                                          ([0., 1, 1, 0], 'float64'), ([0, 1, 1], 'shape'),
                                          (['n', 'd', 'd', 'n'], 'expected numbers')])
def test_wrong_labels(labels, word):
    with pytest.raises((ValueError, TypeError), match=word): image_metrics([1., 2, 3, 4], labels)


@pytest.mark.parametrize('labels, missing', [([0, 0], 'anomalous'), ([1, 1], 'normal')])
def test_one_class_is_nan_and_named(labels, missing):
    with pytest.warns(UserWarning, match=f'no {missing} one among 2 images: image_auroc, image_ap, image_f1max'):
        assert all(math.isnan(v) for v in image_metrics([1., 2], labels).values())


def test_no_images_at_all():
    with pytest.warns(UserWarning): assert all(math.isnan(v) for v in image_metrics([], np.zeros(0, bool)).values())


# ---------------------------------------------------------------- pixels
@pytest.mark.parametrize('seed', range(6))
def test_pixel_metrics_equal_the_references(seed):
    rng = np.random.default_rng(seed)
    for levels in (None, 1, 3):
        maps, masks = random_maps(rng, levels=levels)
        for limit in (.02, .3, 1.):
            ours = pixel_metrics(maps, masks, limit)
            expected = reference(masks.ravel(), maps.ravel())
            np.testing.assert_allclose([ours[k] for k in PIXEL_METRICS[:3]], expected, atol=1e-12)
            assert ours['pixel_aupro'] == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-12)


def test_diagonal_pixels_are_one_region():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 3] = True       # a pair that touches at a corner, and a single pixel
    masks[1, 0, 0] = True                                          # same place in the next image: another region
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, 0, 0] = 1                                              # half of the pair is found, before any false alarm
    # curve: PRO 1/6 at FPR 0, then one straight line to 1 at FPR 1, since all else is tied
    limit = .3
    assert pixel_metrics(maps, masks, limit)['pixel_aupro'] == pytest.approx(1 / 6 + (1 - 1 / 6) * limit / 2, abs=1e-12)
    maps[0, 1, 1] = 1
    assert pixel_metrics(maps, masks, limit)['pixel_aupro'] == pytest.approx(1 / 3 + (1 - 1 / 3) * limit / 2, abs=1e-12)


def test_aupro_weighs_regions_not_pixels():
    masks = np.zeros((1, 10, 20), bool)
    masks[0, :9, :9] = masks[0, 0, 15] = True
    maps = np.random.default_rng(0).random((1, 10, 20)).astype(np.float32)
    big, small = maps.copy(), maps.copy()
    big[0, :9, :9] += 9
    small[0, 0, 15] += 9
    assert pixel_metrics(big, masks)['pixel_auroc'] > .98 > .6 > pixel_metrics(small, masks)['pixel_auroc']
    assert min(pixel_metrics(m, masks, .05)['pixel_aupro'] for m in (big, small)) > .5 - 1e-12


TRANSFORMS = {'exp': lambda x: np.exp(2 * x), 'cube': lambda x: x ** 3, 'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
              'exp of square': lambda x: np.exp(np.sign(x) * x ** 2), 'shift': lambda x: x - 1e3,
              'tiny': lambda x: x * 1e-30}


@pytest.mark.parametrize('name', TRANSFORMS)
def test_monotone_transforms_change_nothing(name):
    maps, masks = random_maps(np.random.default_rng(7), 6, (40, 40))
    maps = maps.astype(np.float64)
    before, after = pixel_metrics(maps, masks), pixel_metrics(TRANSFORMS[name](maps), masks)
    assert before == after                                    # float64 keeps all values apart: equal to the last bit
    rounded = TRANSFORMS[name](maps).astype(np.float32)       # float32 may round neighbours together: no more than that
    assert pixel_metrics(rounded, masks) == pytest.approx(before, abs=2e-3 if name == 'shift' else 1e-5)


def test_the_invariance_test_can_fail():
    maps, masks = random_maps(np.random.default_rng(7), 6, (40, 40))
    assert abs(pixel_metrics(np.round(maps), masks)['pixel_ap'] - pixel_metrics(maps, masks)['pixel_ap']) > 1e-3


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('levels', [None, 2])
def test_torch_equals_numpy(device, levels):
    maps, masks = random_maps(np.random.default_rng(3), 8, (32, 24), levels)
    expected, there, labels = pixel_metrics(maps, masks), torch.from_numpy(maps).to(device), masks.any((1, 2))
    assert pixel_metrics(there, torch.from_numpy(masks).to(device)) == pytest.approx(expected, abs=1e-12)
    assert pixel_metrics(there.clone().requires_grad_(), masks) == pytest.approx(expected, abs=1e-12)
    assert pixel_metrics(maps, torch.from_numpy(masks)) == expected
    assert image_metrics(there[:, 0, 0], labels) == pytest.approx(image_metrics(maps[:, 0, 0], labels), abs=1e-12)


def test_inputs_are_left_alone(tmp_path):
    maps, masks = random_maps(np.random.default_rng(4), 5, (16, 16))
    np.save(tmp_path / 'maps.npy', maps)
    memmap = np.load(tmp_path / 'maps.npy', mmap_mode='r')        # read-only, as the store gives them
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert pixel_metrics(memmap, masks) == pixel_metrics(maps.copy(), masks)
        assert pixel_metrics(maps[:, ::-1, ::-1], masks[:, ::-1, ::-1]) == pixel_metrics(maps, masks)
    assert np.array_equal(maps, np.load(tmp_path / 'maps.npy'))


@pytest.mark.parametrize('value, missing', [(False, 'anomalous'), (True, 'normal')])
def test_masks_of_one_kind(value, missing):
    with pytest.warns(UserWarning, match=f'no {missing}.*pixel_aupro'):
        assert all(math.isnan(v) for v in pixel_metrics(np.zeros((2, 3, 3)), np.full((2, 3, 3), value)).values())


def test_wrong_maps():
    maps, masks = random_maps(np.random.default_rng(5), 4, (8, 8))
    with pytest.raises(ValueError, match=r'\(4, 8, 7\).*\(4, 8, 8\)'): pixel_metrics(maps, masks[:, :, :7])
    with pytest.raises(ValueError, match=r'3 axes.*\(8, 8\)'): pixel_metrics(maps[0], masks[0])
    for dtype in (np.uint8, np.uint16, np.int32):
        with pytest.raises(ValueError, match='values 0 to 255. Use `masks > 0`'):
            pixel_metrics(maps, masks.astype(dtype) * 255)
    with pytest.raises(ValueError, match='masks > 0.5'): pixel_metrics(maps, masks.astype(np.float32))
    with pytest.raises(ValueError, match='fpr_limit'): pixel_metrics(maps, masks, 1.1)
    maps[2, 5, 5] = np.nan
    with pytest.raises(ValueError, match=r'maps: NaN in 1 of 4 images.*\[2\]'): pixel_metrics(maps, masks)


def test_memory_is_one_copy_of_the_negatives():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((40, 128, 128), dtype=np.float32), np.zeros((40, 128, 128), bool)
    masks[:5, :20, :20] = True
    pixel_metrics(maps, masks)
    tracemalloc.start()
    pixel_metrics(maps, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.4 * maps.nbytes                               # the copy, and its boolean selection (a quarter)


# ---------------------------------------------------------------- thresholds
def test_conformal_coverage():
    rng = np.random.default_rng(1)
    for n, fpr in ((19, .05), (50, .1), (100, .07), (30, .4)):
        draws = rng.exponential(size=(4000, n + 1)) ** 3
        rate = np.mean([d[-1] > threshold_from_normals(d[:-1], fpr) for d in draws])
        exact = math.floor((n + 1) * fpr + 1e-9) / (n + 1)        # what the theory gives for continuous scores
        assert exact <= fpr + 1e-12 and abs(rate - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)
    ties = rng.integers(0, 3, (4000, 41)).astype(float)           # with ties only fewer false alarms are possible
    assert np.mean([d[-1] > threshold_from_normals(d[:-1], .1) for d in ties]) <= .1


def test_too_few_normals():
    with pytest.warns(UserWarning, match='It takes 99'): assert threshold_from_normals(np.arange(98.), .01) == math.inf
    with pytest.warns(UserWarning): assert threshold_from_normals([], .5) == math.inf
    with pytest.raises(ValueError, match='fpr'): threshold_from_normals([1.], 0)
    assert threshold_from_normals(np.arange(99.), .29) == 70.      # though 100 * 0.29 is 28.999999999999996


# ---------------------------------------------------------------- scoring
def test_plain_aggregates_are_between_mean_and_max():
    maps = torch.randn(9, 7, 11, generator=torch.Generator().manual_seed(0))
    for name in ('max', 'mean', 'percentile', 'top_k', 'top_k_percent'):           # the others are no means of patches
        scores = image_scores(maps, name)
        assert scores.shape == (9,) and (scores <= maps.amax((1, 2)) + 1e-6).all()
        assert (scores >= maps.mean((1, 2)) - 1e-6).all()
        assert torch.allclose(image_scores(maps.flip(1, 2), name), scores, atol=1e-6)      # wherever a patch stands
        np.testing.assert_allclose(image_scores(maps.double().numpy(), name), scores.numpy(), atol=1e-5)


def test_infinite_patches_in_image_scores():
    maps = torch.zeros(2, 4, 4)
    maps[1, 0, :2] = math.inf
    for name in AGGREGATES:
        if not getattr(AGGREGATES[name], 'fits', False): assert not image_scores(maps, name).isnan().any()
    assert image_scores(maps, 'max').tolist() == [0., math.inf]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('grid, size, sigma', [((28, 28), (224, 224), 4), ((14, 14), (256, 256), 4),
                                               ((5, 9), (37, 20), 2.5), ((3, 3), (6, 6), 4),
                                               ((1, 1), (8, 8), 4), ((16, 16), (16, 16), 0), ((20, 20), (7, 30), 1)])
@pytest.mark.parametrize('corners', [False, True])
def test_pixel_maps_equal_torch_then_scipy(device, grid, size, sigma, corners):
    maps = torch.randn(3, *grid, generator=torch.Generator().manual_seed(0)) * 10
    big = F.interpolate(maps[:, None].double(), size, mode='bilinear', align_corners=corners)[:, 0].numpy()
    expected = np.stack([gaussian_filter(m, sigma, mode='reflect', truncate=4.) if sigma else m for m in big])
    for like, tolerance in ((maps, 3e-6), (maps.double(), 1e-12)):                         # scores reach about 40
        ours = pixel_maps(like.to(device), size, sigma, corners)
        assert ours.dtype == like.dtype and ours.device.type == device
        np.testing.assert_allclose(ours.cpu().numpy(), expected, atol=tolerance)


def test_pixel_maps_do_not_depend_on_the_batch():
    maps = torch.randn(130, 14, 14, generator=torch.Generator().manual_seed(0)) * 30 - 500
    assert torch.equal(pixel_maps(maps, 56), torch.cat([pixel_maps(m[None], 56) for m in maps]))


def test_evaluate_class():
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 64, 64), bool)
    masks[:6, 16:32, 24:40] = True
    grids = rng.standard_normal((12, 8, 8)).astype(np.float32)
    grids[:6, 2:4, 3:5] += 8                                       # just the patches below the defect
    result = evaluate_class(grids, masks, np.arange(12) < 6)
    assert tuple(result) == METRICS and result['image_auroc'] == 1. and result['pixel_auroc'] > .97
    swapped = evaluate_class(grids.transpose(0, 2, 1).copy(), masks, np.arange(12) < 6)    # a transposed grid shows
    assert swapped['image_auroc'] == 1. and swapped['pixel_aupro'] < result['pixel_aupro'] - .1
    cut = masks.copy()
    cut[0] = False                                                 # a crop took this defect away
    assert evaluate_class(grids, cut, np.arange(12) < 6)['image_auroc'] == 1.
    with pytest.raises(ValueError, match=r'labelled normal.*\[5\]'): evaluate_class(grids, masks, np.arange(12) < 5)
    with pytest.raises(ValueError, match='masks have shape .11, 64, 64., score maps .12, 8, 8.'):
        evaluate_class(grids, masks[:11], np.arange(12) < 6)


# ---------------------------------------------------------------- forgetting
def long(R, metric='image_auroc', tasks=None):
    return pd.DataFrame([{'stage': i, 'task': tasks[j] if tasks else j, 'class': f'c{j}', 'routed': True, metric: v}
                         for i, row in enumerate(R) for j, v in enumerate(row) if not math.isnan(v)])


def test_definitions_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(30):
        T = int(rng.integers(2, 8))
        r = rng.random((T, T))
        R = r_matrix(long(r).sample(frac=1, random_state=0), 'image_auroc')
        np.testing.assert_array_equal(R.to_numpy(), r)
        loops = {'backward_transfer': [r[T - 1, j] - r[j, j] for j in range(T - 1)],
                 'forgetting_initial': [r[j, j] - r[T - 1, j] for j in range(T - 1)],
                 'forgetting_max': [max(r[i, j] for i in range(j, T - 1)) - r[T - 1, j] for j in range(T - 1)],
                 'forgetting_best': [max(r[i, j] for i in range(j, T)) - r[T - 1, j] for j in range(T - 1)],
                 'forgetting_pyclad': [max(r[i, j] for i in range(T - 1)) - r[T - 1, j] for j in range(T)]}
        assert set(loops) == set(DEFINITIONS)
        for name, values in loops.items(): assert DEFINITIONS[name](R) == pytest.approx(np.mean(values), abs=1e-12)


def test_tasks_keep_their_order_of_arrival(tmp_path):
    nan = math.nan
    results = long([[.9, nan, nan], [.8, .7, nan], [.6, .7, .5]], tasks=['zipper', 'bottle', 'nut'])
    results.to_parquet(tmp_path / 'metrics.parquet')
    R = r_matrix(pd.read_parquet(tmp_path / 'metrics.parquet'), 'image_auroc')
    assert list(R.columns) == ['zipper', 'bottle', 'nut'] and R.loc[2, 'zipper'] == .6
    assert forgetting_table(results).loc['image_auroc', 'forgetting_initial'] == pytest.approx(.15)


def test_an_undefined_metric_leaves_its_class_out_and_a_missing_one_does_not():
    nan = math.nan
    results = long([[.9, nan, nan], [.8, .7, nan], [.6, .7, .5]])
    results['pixel_ap'] = results.image_auroc
    results.loc[results['class'] == 'c1', 'pixel_ap'] = nan        # no defect in its masks: NaN at every stage
    table = forgetting_table(results)
    assert table['forgetting_initial'].to_dict() == pytest.approx({'image_auroc': .15, 'pixel_ap': .3})
    results.loc[(results['class'] == 'c0') & (results.stage == 1), 'pixel_ap'] = nan
    table = forgetting_table(results)
    assert math.isnan(table.loc['pixel_ap', 'forgetting_max'])
    assert table.loc['pixel_ap', 'forgetting_initial'] == pytest.approx(.3)


def test_a_task_without_one_of_its_classes_is_no_average():
    results = long([[.9, math.nan], [.8, .7]])
    other = results[results.task == 0].assign(**{'class': 'other', 'image_auroc': [.5, .5]})
    both = pd.concat([results, other])
    assert r_matrix(both, 'image_auroc').iloc[:, 0].tolist() == pytest.approx([.7, .65])
    late = r_matrix(pd.concat([results, other[other.stage == 1]]), 'image_auroc')
    assert math.isnan(late.iloc[0, 0]) and late.iloc[1, 0] == pytest.approx(.65)      # not .9, as if it had dropped


def test_a_metric_that_is_nowhere_defined():
    results = long(np.full((3, 3), .5)).assign(pixel_ap=math.nan)
    assert r_matrix(results, 'pixel_ap').shape == (3, 3)
    assert forgetting_table(results).loc['pixel_ap'].isna().all()


def test_stages_may_count_from_one():
    results = long([[.9, math.nan], [.8, .7]])
    pd.testing.assert_frame_equal(forgetting_table(results), forgetting_table(results.assign(stage=results.stage + 1)))


def test_one_task_is_nan_with_a_reason():
    with pytest.warns(UserWarning, match='at least two stages'): table = forgetting_table(long([[.9]]))
    assert table.loc['image_auroc', 'final'] == .9 and table.drop(columns='final').isna().all().all()


@pytest.mark.parametrize('spoil, word', [(lambda r: r.drop(columns='task'), "no column 'task'"),
                                         (lambda r: pd.concat([r, r]), 'select one run'),
                                         (lambda r: r[r.stage == 2], 'stages'),
                                         (lambda r: r.assign(task=0), 'only 1 tasks')])
def test_results_that_are_no_stream(spoil, word):
    results = long(np.full((3, 3), .5))
    with pytest.raises(ValueError, match=word): forgetting_table(spoil(results))
