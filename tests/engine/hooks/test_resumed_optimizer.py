"""A resumed training says which settings of the optimizer have no effect, and refuses another optimizer."""

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
    ],
)
def test_what_has_no_effect_is_said(run_tool, trained, shapes, tmp_path, option, code, words):
    work = shutil.copytree(trained, tmp_path / 'work')
    result = run_tool('train.py', DEMO, '--resume', *tiny(work, shapes, 'train_cfg.max_epochs=2', option))
    assert result.code == code, result.err[-2000:]
    assert words in result.out + result.err


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
