"""The study of CBAM in a pretrained detector: its arms start from the same weights, and its table compares by seed."""

import json
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")
sys.path.insert(0, str(ROOT / 'benchmarks/accuracy'))

import arms
import pretrained_study as study

from cbam_mmdet.models.gates import find_cbams


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return study.initial_weights('bccd', 0, None, tmp_path_factory.mktemp('start'))


def training(arm, seed, first, last, data='bccd'):
    scores = {'1': dict(mAP=first, mAP_50=0.5), '4': dict(mAP=last, mAP_50=0.9)}
    return dict(data=data, arm=arm, seed=seed, scores=scores, images_per_second=2.0, minutes=1, processor='', device='')


@pytest.mark.parametrize('name', arms.ARMS)
def test_arms_start_from_the_same_weights(name, start):
    cfg = study.config_of('bccd', name, 0, start)
    detector = MODELS.build(cfg.model)
    given = torch.load(start)['state_dict']
    left = detector.load_state_dict(given, strict=False)
    assert not left.unexpected_keys and all('cbam' in key for key in left.missing_keys)
    assert bool(find_cbams(detector)) == ('plain' not in name)
    if 'plain' in name or 'SE' in name or name == 'CBAM, paper':
        return
    image = torch.rand(1, 3, 96, 128)
    plain = MODELS.build(study.config_of('bccd', 'plain', 0, start).model).eval()
    plain.load_state_dict(given)
    with torch.no_grad():  # the unit gate, and the residual one, are the identity at first
        for a, b in zip(detector.eval().extract_feat(image), plain.extract_feat(image), strict=True):
            torch.testing.assert_close(a, b)


def test_the_residual_gate_is_learned():
    module = arms.ResidualCBAM(8, reduction=2)
    x = torch.randn(2, 8, 6, 6)
    module(x).square().sum().backward()
    assert module.a.grad.abs() > 0
    torch.nn.init.ones_(module.a)
    plain = arms.CBAM(8, reduction=2)
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if key != 'a'})
    torch.testing.assert_close(module.eval()(x), plain.eval()(x))


def test_hooks_hold_what_they_say(start):
    detector = MODELS.build(study.config_of('bccd', 'CBAM, unit gate', 0, start).model).train()
    trained = {name for name, parameter in detector.backbone.named_parameters() if parameter.requires_grad}
    runner, hook = SimpleNamespace(model=detector, epoch=0), arms.FreezeBackboneFirst()
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    now = {name for name, parameter in detector.backbone.named_parameters() if parameter.requires_grad}
    assert now == {name for name in trained if '.cbam.' in name} != set()
    assert all(parameter.requires_grad for parameter in detector.neck.parameters())
    runner.epoch = 1
    hook.before_train_epoch(runner)
    assert trained == {name for name, parameter in detector.backbone.named_parameters() if parameter.requires_grad}
    norms = [cbam.spatial.bn for cbam in find_cbams(detector).values()]
    assert not any(norm.training for norm in norms)  # norm_eval
    arms.TrainGateNorms().before_train_iter(runner, batch_idx=0, data_batch=None)  # as MMEngine calls it
    assert all(norm.training for norm in norms)
    assert not detector.backbone.timm_model.blocks[3][0].bn1.training


def test_the_interval_of_three_values_is_their_range():
    """Each of the 27 draws has 3.7 % of the chances, more than the 2.5 % that are cut off at either side."""
    assert study.interval([0.1, -0.2, 0.4]) == pytest.approx((-0.2, 0.4))
    low, high = study.interval([0.0, 0.02, 0.01, 0.03, 0.04])
    assert 0 < low < 0.02 < high < 0.04


def test_the_table_compares_by_seed():
    plain = [training('plain', seed, 0.3, 0.5 + seed / 10) for seed in range(2)]
    ours = [training('CBAM, paper', seed, 0.1, 0.4 + seed / 10) for seed in range(3)]  # seed 2 has no plain
    lost = dict(data='bccd', arm='SE', seed=0, exit_code=1, minutes=1, processor='', device='')
    others = [training('plain', 3, 0.9, 0.9), training('plain', 0, 0.9, 0.9, 'raccoon')]
    table = study.table([*plain, *ours, lost, *others], 'bccd', study.CHOICE)
    rows = {row[0]: row for row in table.rows}
    assert set(rows) == {'plain', 'CBAM, paper'}
    assert rows['plain'][3] == pytest.approx(0.55)
    arm, seeds, _, mean, gain, spread, interval, first, shock, speed = rows['CBAM, paper']
    assert (arm, seeds, speed) == ('CBAM, paper', '0, 1, 2', 2.0)
    assert mean == pytest.approx(statistics.mean([0.4, 0.5, 0.6]))
    assert (gain, spread, first, shock) == pytest.approx((-0.1, 0, 0.1, -0.2))
    assert interval == '-0.100 to -0.100'
    assert 'lost: bccd, SE, seed 0: exit code 1' in study.report([*plain, lost])


@pytest.mark.parametrize(
    ('arm', 'name'),
    [
        ('plain', 'plain'),
        ('CBAM, paper', 'CBAM as in the paper'),
        ('CBAM, unit gate', "CBAM, `gate='unit'`"),
        ('unit gate, its norm trains', 'its norm trains, too'),
    ],
)
def test_the_page_has_the_figures_of_the_record(arm, name):
    trainings = json.loads(study.RECORD.read_text())['trainings']

    def last(data, arm):
        epochs = str(study.DATA[data][1])
        return {
            row['seed']: row['scores'][epochs]['mAP']
            for row in trainings
            if (row['data'], row['arm']) == (data, arm) and row['seed'] in study.CONFIRMATION and 'scores' in row
        }

    page = (ROOT / 'docs/does_cbam_help.md').read_text()
    table = page[page.index('### The confirmation') : page.index('The shock:')]
    (line,) = (line for line in table.splitlines() if line.startswith(f'| {name} |'))
    cells = [cell.strip() for cell in line.split('|')[2:]]
    lower, upper = [], []
    for place, data in ((0, 'bccd'), (2, 'raccoon')):
        ours, plain = last(data, arm), last(data, 'plain')
        assert set(ours) == set(plain) == {3, 4, 5, 6, 7}
        assert cells[place] == f'{statistics.mean(ours.values()):.3f}'
        if arm != 'plain':
            gains = [ours[seed] - plain[seed] for seed in plain]
            gain, low, _, high = cells[place + 1].replace('(', '').replace(')', '').split()
            assert gain == f'{statistics.mean(gains):+.3f}'
            assert min(gains) - 5e-4 <= float(low) <= float(gain) <= float(high) <= max(gains) + 5e-4
            lower.append(float(low))
            upper.append(float(high))
    if arm != 'plain':
        harms, helps = max(upper) < 0, min(lower) > 0
        assert cells[4].strip('*') == ('harms' if harms else 'helps' if helps else 'undecided')
