"""A resumed training says which settings of optimizer and schedule have no effect, and refuses other kinds."""

import shutil

import pytest
import torch
from conftest import DEMO, tiny


@pytest.mark.parametrize(
    ('option', 'code', 'words'),
    [
        ('optim_wrapper.optimizer.lr=0.5', 0, 'lr=0.5 (it is '),
        ('optim_wrapper.optimizer.weight_decay=0.3', 0, 'weight_decay=0.3 (it is '),
        ('optim_wrapper.optimizer.type=RMSprop', 2, 'state of another optimizer'),
        ('param_scheduler.1.T_max=48', 0, 'param_scheduler.1.T_max=96 (it is 48)'),  # in iterations
        ('param_scheduler.0.start_factor=0.5', 0, 'param_scheduler.0.start_factor=0.5 (it is 0.01)'),
    ],
)
def test_what_has_no_effect_is_said(run_tool, trained, shapes, tmp_path, option, code, words):
    work = shutil.copytree(trained, tmp_path / 'work')
    result = run_tool('train.py', DEMO, '--resume', *tiny(work, shapes, 'train_cfg.max_epochs=2', option))
    assert result.code == code, result.err[-2000:]
    assert words in result.out + result.err


def test_the_state_of_other_schedulers_is_refused(run_tool, trained, shapes, tmp_path):
    work, config = shutil.copytree(trained, tmp_path / 'work'), tmp_path / 'stepped.py'
    config.write_text(f"_base_ = '{DEMO}'\nparam_scheduler = [dict(type='MultiStepLR', milestones=[1])]\n")
    result = run_tool('train.py', config, '--resume', *tiny(work, shapes, 'train_cfg.max_epochs=2'))
    assert result.code == 2 and 'the state of 2 schedulers, and not of those in the config (MultiStepLR)' in result.err


def test_the_same_settings_are_not_spoken_of(run_tool, trained, shapes, tmp_path):
    work = shutil.copytree(trained, tmp_path / 'work')
    result = run_tool('train.py', DEMO, '--resume', *tiny(work, shapes, 'train_cfg.max_epochs=2'))
    assert result.code == 0 and 'has no effect' not in result.out + result.err


@pytest.mark.parametrize('step', [False, True])
def test_a_state_of_other_parameters_is_refused(run_tool, trained, shapes, tmp_path, step):
    work = shutil.copytree(trained, tmp_path / 'work')
    checkpoint = torch.load(work / 'epoch_1.pth', weights_only=False)
    states = checkpoint['optimizer']['state'].values()
    values, key = next(
        (values, key)
        for values in states
        for key, value in values.items()
        if torch.is_tensor(value) and (key == 'step') == step
    )
    values[key] = torch.zeros(3, 5, 7)
    torch.save(checkpoint, work / 'epoch_1.pth')
    result = run_tool('train.py', DEMO, '--resume', *tiny(work, shapes, 'train_cfg.max_epochs=2'))
    assert result.code == 2 and 'state for other parameters' in result.err and 'Traceback' not in result.err


@pytest.mark.parametrize(('key', 'value'), [('message_hub', 5), ('param_schedulers', [5])])
def test_a_state_that_cannot_be_taken_up_is_one_message(run_tool, trained, shapes, tmp_path, key, value):
    work = shutil.copytree(trained, tmp_path / 'work')
    checkpoint = torch.load(work / 'epoch_1.pth', weights_only=False)
    torch.save({**checkpoint, key: value}, work / 'epoch_1.pth')
    result = run_tool('train.py', DEMO, '--resume', *tiny(work, shapes, 'train_cfg.max_epochs=2'))
    assert result.code == 2, result.err[-2000:]
    assert 'the run cannot be resumed from' in result.err and 'Traceback' not in result.err
