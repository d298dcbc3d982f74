"""What is recorded of the gates is what multiplies the feature map, and the figures are those of the formulas."""

import json

import numpy as np
import pytest
import torch
from conftest import DEMO, tiny
from mmengine.hooks import LoggerHook
from mmengine.logging import MMLogger
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbam_mmdet import CBAM, record_gates
from cbam_mmdet.engine.hooks.gate_statistics import GateStatisticsHook
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import FIGURES, gate_figures

VARIANTS = [
    dict(),
    dict(gate='unit'),
    dict(order='spatial-channel'),
    dict(order='parallel', pools=('avg', 'lse')),
    dict(spatial=None),
    dict(spatial='conv', gate='unit'),
]


def trained_cbam(**arguments):
    """A CBAM whose gates differ from each other, also with the unit gate."""
    torch.manual_seed(0)
    module = CBAM(8, reduction=2, **arguments)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize('arguments', VARIANTS, ids=str)
@pytest.mark.parametrize('grad', [True, False])
def test_recorded_gates_are_what_the_output_was_multiplied_by(arguments, grad):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), trained_cbam(**arguments))
    model[1].eval()
    seen = {}
    model[1].register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    with torch.set_grad_enabled(grad), record_gates(model) as gates:
        model(torch.randn(2, 3, 5, 6))
    found = gates['1']
    product = torch.stack(found.channel)[..., None, None]
    if found.spatial:
        product = product * torch.stack(found.spatial)[:, None]
    torch.testing.assert_close(seen['y'] / seen['x'], product.expand_as(seen['y']), rtol=1e-4, atol=1e-5)
    assert bool(found.spatial) == (arguments.get('spatial', 'pool') is not None)
    assert found.upper == (2 if arguments.get('gate') == 'unit' else 1)


def test_recording_ends_with_the_context_and_goes_on_over_several_passes():
    model = trained_cbam()
    with record_gates(model) as gates:
        model(torch.randn(2, 8, 4, 4))
        model(torch.randn(3, 8, 6, 4))
    model(torch.randn(1, 8, 4, 4))
    assert len(gates[''].channel) == len(gates[''].spatial) == 5
    assert gates[''].spatial[4].shape == (6, 4)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match='Conv2d holds no CBAM'), record_gates(nn.Conv2d(1, 1, 1)):
        pass


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_checkpoint_computes_twice_and_counts_once(reentrant):
    model = trained_cbam()
    with record_gates(model) as gates:
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert len(gates[''].channel) == len(gates[''].spatial) == 2


def test_figures_by_hand():
    values = torch.tensor([0.01, 0.04, 0.5, 0.6, 0.99])
    found = dict(zip(FIGURES, gate_figures(values, 1.0).tolist(), strict=True))
    array = values.double().numpy()
    expected = dict(mean=array.mean(), spread=array.std(), closed=2 / 5, open=1 / 5, distance=(1 - array).mean())
    assert found == pytest.approx(expected, rel=1e-6)
    unit = dict(zip(FIGURES, gate_figures(2 * values, 2.0).tolist(), strict=True))
    assert unit['closed'] == pytest.approx(2 / 5) and unit['open'] == pytest.approx(1 / 5)
    assert unit['distance'] == pytest.approx(np.abs(2 * array - 1).mean())


class Visualizer:
    def __init__(self):
        self.rows = []

    def add_scalars(self, scalars, step):
        self.rows.append((step, scalars))


class Runner:
    """As much of a Runner as the hook looks at."""

    def __init__(self, model, interval=3, length=8, **logger):
        self.model, self.iter = model, 0
        self.hooks = [LoggerHook(interval=interval, **logger)]
        self.visualizer, self.logger = Visualizer(), MMLogger.get_current_instance()
        self.train_dataloader = range(length)

    def train(self, hook, batches):
        hook.before_train(self)
        for i, batch in enumerate(batches):
            hook.before_train_iter(self, i)
            self.model(batch).sum().backward()
            hook.after_train_iter(self, i)
            self.iter += 1
        hook.after_train(self)
        return self.visualizer.rows


def test_hook_logs_what_the_branches_give_by_hand():
    module = trained_cbam(gate='unit')
    module.eval()
    batches = torch.randn(8, 2, 8, 4, 5)
    rows = Runner(Wrapped(module)).train(GateStatisticsHook(), batches)
    assert [step for step, _ in rows] == [3, 6], 'every third iteration, as the losses; the rest of the epoch not'
    with torch.no_grad():
        c = module.channel(batches[2])
        s = module.spatial(batches[2] * c)
    expected = {}
    for branch, gate in (('channel', c), ('spatial', s)):
        gate = gate.double().numpy()
        expected[f'gates/stage/{branch}_mean'] = gate.mean()
        expected[f'gates/stage/{branch}_spread'] = gate.std()
        expected[f'gates/stage/{branch}_saturated'] = ((gate < 0.1) | (gate > 1.9)).mean()
        expected[f'gates/stage/{branch}_distance'] = np.abs(gate - 1).mean()
    assert rows[0][1] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected['gates/stage/channel_saturated'] < 1


class Wrapped(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return self.stage(x)


def test_hook_touches_only_the_logged_iterations_and_models_with_cbam():
    module = trained_cbam()
    hooked = []
    module.register_forward_pre_hook(lambda m, _: hooked.append(bool(m.channel.activation._forward_hooks)))
    Runner(module).train(GateStatisticsHook(), torch.randn(4, 2, 8, 4, 5))
    assert hooked == [False, False, True, False]
    short = Runner(module, interval=10, length=4).train(GateStatisticsHook(), torch.randn(4, 2, 8, 4, 5))
    assert [step for step, _ in short] == [4], 'an epoch shorter than the interval is logged at its end'
    assert Runner(nn.Conv2d(8, 8, 1)).train(GateStatisticsHook(), torch.randn(4, 2, 8, 4, 5)) == []


def test_a_training_logs_the_gates_beside_its_losses(trained, run_tool, shapes, tmp_path):
    rows = [json.loads(line) for line in next(trained.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    losses = [row['step'] for row in rows if 'loss' in row]
    gates = [row for row in rows if 'gates/backbone.layer1.0.cbam/channel_mean' in row]
    assert losses and [row['step'] for row in gates] == losses
    assert sum(key.endswith('spatial_saturated') for key in gates[0]) == 16, 'a ResNet-50 has 16 blocks'
    assert all(0 < row['gates/backbone.layer4.2.cbam/spatial_mean'] < 1 for row in gates)
    assert run_tool('train.py', DEMO, *tiny(tmp_path, shapes, 'gate_statistics=False')).code == 0
    assert 'gates/' not in next(tmp_path.glob('*/vis_data/scalars.json')).read_text()
