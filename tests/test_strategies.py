"""Strategies with the real learner: what they change, what they protect, and that a kill changes nothing"""
import functools

import pandas as pd
import pytest
import torch

import adflow.continual.protection  # noqa: F401  registers its strategies
from adflow.continual.learner import Learner, Trainer
from adflow.continual.protection import shared_weights
from adflow.continual.routing import ROUTERS
from adflow.continual.strategies import STRATEGIES
from adflow.continual.tasks import make_tasks
from adflow.features.store import from_arrays
from adflow.flow.moleflow import MoLEFlow
from adflow.parts import PartError, slot_of

D, GRID, EPOCHS = 8, (4, 4), 4
WARM = {'name': 'epoch_cosine', 'warmup': 1}
SPECS = {name: name for name in STRATEGIES} | {
    'ogp gradients': {'name': 'ogp', 'basis': 'gradients', 'n_samples': 4},
    'ogp all': {'name': 'ogp', 'threshold': 1., 'rank': None},
    'slow_fast half': {'name': 'slow_fast', 'share': .5, 'blocks': 1},
    'replay random': {'name': 'feature_replay', 'select': 'random', 'n': 3, 'batch_size': 2},
    'replay kmeans': {'name': 'feature_replay', 'select': 'kmeans', 'n': 3, 'batch_size': 2},
    'distill logprob': {'name': 'distill', 'match': 'logprob'}}
FIXED = ('freeze', 'separate')     # the base does not go on learning, or there is none

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def stream(n=8, classes='abc'):
    x = torch.cat([rand(n, *GRID, 3, seed=i) @ rand(3, D, seed=100 + i) + rand(D, seed=200 + i)
                   + .3 * rand(n, *GRID, D, seed=i) for i in range(len(classes))])
    return from_arrays(x, pd.DataFrame({'class': [c for c in classes for _ in range(n)]}))

FEATURES = stream()

def learner(strategy, folder=None, epochs=EPOCHS, optimizer='adamp', **flow):
    args = dict(couplings=2, dia_blocks=1, subnet={'name': 'scale_context', 'rank': 2, 'kernel': 3}) | flow
    trainer = Trainer(epochs=epochs, batch_size=4, lr=.01, schedule=WARM, strategy=strategy, progress=False,
                      optimizer=optimizer, checkpoint_seconds=-1)
    return Learner(MoLEFlow(dim=D, grid=GRID, **args), ROUTERS.build('mahalanobis'), trainer, FEATURES, folder)

def tensors(detector): return {k: v.detach().clone() for k, v in detector.state_dict().items()}
def scores(detector, cls): return detector.score(FEATURES.where(**{'class': cls}).batch(slice(None)), cls)

@functools.cache
def history(name, scenario='1-1', classes='ab'):
    "Weights and the first class's scores after every task."
    made = learner(SPECS[name])
    return [(tensors(s.detector), scores(s.detector, 'a')) for s in made.stages(make_tasks(classes, scenario))]

def changed(before, after): return {k for k, v in before.items() if not torch.equal(v, after[k])}

# ------------------------------------------------------------------------------------------ what changes, what does not
def test_finetune_moves_every_shared_weight_and_the_old_scores():
    "The sequential baseline that the origin did not have: its base stayed frozen."
    (before, old), (after, new) = history('finetune')
    shared = {k for k in shared_weights(learner('finetune').detector) if k.startswith('flows.')}
    assert shared and shared <= changed(before, after)
    linears = {k for k in shared if k.endswith(('first.weight', 'second.weight'))}
    assert len(linears) == 8                               # 2 couplings × scale and shift × 2 layers
    assert (new - old).abs().mean() > .01 * old.abs().mean()

@pytest.mark.parametrize('name', FIXED)
def test_separation_keeps_old_tasks_to_the_bit(name):
    (before, old), (after, new) = history(name)
    assert torch.equal(old, new) and not changed(before, after)
    assert any(slot_of(k) == 1 for k in after)

@pytest.mark.parametrize('name', sorted(set(SPECS) - {*FIXED, 'ogp all'}))
def test_the_base_goes_on_learning(name):
    (before, old), (after, new) = history(name)
    assert any(slot_of(k) is None for k in changed(before, after)) and not torch.equal(old, new)

@pytest.mark.parametrize('name', sorted(SPECS))
def test_old_groups_own_weights_are_frozen(name):
    (before, _), (after, _) = history(name)
    moved = {slot_of(k) for k in changed(before, after)}
    assert (0 in moved) == (name == 'joint')

def test_separate_shares_nothing():
    made = learner('separate')
    stages = list(made.stages(make_tasks('ab', '1-1')))
    assert not [k for k in shared_weights(stages[-1].detector) if k.startswith('flows.')]
    with pytest.raises(PartError, match='before the first task'): made.trainer.strategy.prepare(stages[-1].detector)

def test_joint_trains_all_classes_so_far():
    seen = []
    class Watched(STRATEGIES['joint']):
        def penalty(self, detector, x, group, generator, **state): seen.append(group); return 0.
    per_task = []
    for _ in learner(Watched(), epochs=1).stages(make_tasks('abc', '1-1')):
        per_task.append(set(seen))
        seen.clear()
    assert per_task == [{'a'}, {'a', 'b'}, {'a', 'b', 'c'}]

def test_slow_fast_opens_only_the_last_blocks_and_only_at_the_end():
    states = []
    class Watched(STRATEGIES['slow_fast']):
        def trainable(self, detector, *args):
            states.append(tensors(detector))
            return super().trainable(detector, *args)
    *_, last = learner(Watched(share=.5, blocks=1)).stages(make_tasks('ab', '1-1'))
    states = [*states[EPOCHS:], tensors(last.detector)]            # of the second task
    fast, slow = [[changed(*states[i:i + 2]) for i in epochs] for epochs in ((0, 1), (2, 3))]
    for moved in fast: assert {slot_of(k) for k in moved} == {1}
    for moved in slow: assert moved and all(k.startswith('flows.0.blocks.1.') and slot_of(k) is None for k in moved)

# ---------------------------------------------------------------------------------------------------------- protection
@pytest.mark.parametrize('optimizer', ['adamp', {'name': 'adamp', 'weight_decay': .5}, {'name': 'sgd', 'momentum': .9}],
                         ids=str)
def test_ogp_updates_are_orthogonal_whatever_the_optimizer_does(optimizer):
    made = learner({'name': 'ogp', 'threshold': .9}, optimizer=optimizer)
    stages = made.stages(make_tasks('abc', '1-1'))
    next(stages)
    for _ in range(2):
        before, kept = tensors(made.detector), {k: v.clone() for k, v in made.trainer.strategy.of('basis').items()}
        next(stages)
        after, moved = tensors(made.detector), 0
        for k, u in kept.items():
            d = after[k] - before[k]
            assert torch.allclose(u.T @ u, torch.eye(u.shape[1]), atol=1e-5)
            assert (d @ u).abs().max() < 1e-5, k
            moved += int(d.abs().max() > 1e-4)
        assert moved > len(kept) / 2
        assert {k for k in changed(before, after) if slot_of(k) is None} <= kept.keys()

def test_ogp_with_all_directions_leaves_old_scores_alone():
    "The base learns where the old task has nothing, in layers that it does not fill, and the old scores stay."
    (before, old), (after, new) = history('ogp all')
    assert any(slot_of(k) is None for k in changed(before, after))
    assert (new - old).abs().max() < 1e-4 * old.abs().mean()

def test_ogp_keeps_at_most_rank_directions_per_task():
    for rank in (2, 3):
        made, sizes = learner({'name': 'ogp', 'rank': rank}), []
        for _ in made.stages(make_tasks('ab', '1-1')):
            sizes.append({k: u.shape for k, u in made.trainer.strategy.of('basis').items()})
        for k, (n, k2) in sizes[1].items(): assert sizes[0][k][1] <= min(n, rank) and k2 <= min(n, 2 * rank)

def forgetting(spec, epochs=12):
    old, new = [scores(s.detector, 'a').mean().item()
                for s in learner(spec, epochs=epochs).stages(make_tasks('ab', '1-1'))]
    return abs(new - old)

def test_protection_protects():
    "Old scores move less than half as far as without protection; the numbers are in 64_protection."
    free = forgetting('finetune')
    for spec in ('ogp', {'name': 'ewc', 'weight': 1e4}, {'name': 'distill', 'weight': 100.}):
        assert forgetting(spec) < .5 * free, spec

def test_replayed_losses_reach_the_shared_weights_alone():
    made = learner('feature_replay')
    stages = made.stages(make_tasks('ab', '1-1'))
    next(stages)
    strategy, detector = made.trainer.strategy, made.detector
    bank = strategy.of('bank')['a']
    rows = FEATURES.where(**{'class': 'a'}).batch(slice(None)).half()
    assert bank.dtype == torch.float16 and all((rows == x).flatten(1).all(1).any() for x in bank)
    next(stages)
    task = make_tasks('abc', '1-1')[2]
    strategy.trainable(detector, task, [1], 0, 1)
    detector.zero_grad()
    strategy.penalty(detector, FEATURES.batch(range(2)), 'b', torch.Generator().manual_seed(0), progress=0.).backward()
    got = {slot_of(k) for k, p in detector.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert None in got and 0 not in got

def test_a_teacher_stays_what_it_was():
    made = learner('distill')
    stages = made.stages(make_tasks('ab', '1-1'))
    next(stages)
    strategy, detector, b = made.trainer.strategy, made.detector, make_tasks('ab', '1-1')[1]
    strategy.start(detector, b, None)
    x = FEATURES.batch(range(4))
    def gap(): return strategy.penalty(detector, x, 'a', torch.Generator().manual_seed(0)).item()
    assert gap() == 0
    with torch.no_grad():
        for p in detector.parameters(): p.add_(.05)
    assert gap() > .01
    strategy.finish(detector, b, None, None)
    assert not strategy.state_dict()

def test_only_later_tasks_pay():
    for name in ('ewc', 'ogp', 'feature_replay', 'distill'):
        (first, _), _ = history(name)
        (plain, _), _ = history('finetune')
        assert not changed(first, plain), name             # the first task is the same for all, to the bit

# ------------------------------------------------------------------------------------------------------ kill and resume
class Killed(Exception): pass

def run(name, folder, kill=None):
    made = learner(SPECS[name], folder, epochs=2)
    write, count = made.checkpoint.write, [0]
    def counting(*args):
        write(*args)
        count[0] += 1
        if count[0] == kill: raise Killed
    made.checkpoint.write = counting
    try: stages = list(made.stages(make_tasks('abc', '2-1')))
    except Killed: return None
    return stages[-1], made.trainer.strategy.state_dict(), count[0]

@pytest.mark.parametrize('name', sorted(set(SPECS) - {'ogp all', 'replay random', 'distill logprob', 'slow_fast'}))
def test_a_killed_run_ends_with_the_same_bits(name, tmp_path):
    whole, state, n = run(name, tmp_path / 'whole')        # n: checkpoints, one a step and one a task
    first = 2 * 2 * 2 + 1                                  # epochs × classes × batches of a class
    for kill in (first - 3, first, first + 3):             # inside task 0, between the tasks, inside task 1
        assert kill < n - 1
        folder = tmp_path / str(kill)
        assert run(name, folder, kill) is None
        again, restored, _ = run(name, folder)
        assert again.digests == whole.digests and again.history == whole.history, kill
        assert restored.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in restored.items()), kill
