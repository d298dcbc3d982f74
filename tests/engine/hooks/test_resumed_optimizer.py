"""A resumed training says which settings of the optimizer have no effect, and refuses another optimizer."""

import shutil

import pytest
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
