"""A schedule that anneals to another end than the training's is named."""

import pytest
from conftest import DEMO

from cbam_mmdet.apis.schedule import warn_of_another_length
from cbam_mmdet.utils.config import config_path, load_config, shipped_configs


@pytest.mark.parametrize('epochs', [12, 48])
def test_the_options_that_mend_it_are_named(logged, epochs):
    options = {'train_cfg.max_epochs': epochs}
    warn_of_another_length(load_config(DEMO, options))
    mended = f'param_scheduler.1.end={epochs} param_scheduler.1.T_max={epochs}'
    assert f'--cfg-options {mended}' in logged.text
    logged.clear()
    cfg = load_config(DEMO, {**options, **{key: int(value) for key, value in (o.split('=') for o in mended.split())}})
    warn_of_another_length(cfg)
    assert not logged.text


def test_steps_a_warm_up_and_a_second_phase_may_end_elsewhere(logged):
    cfg = load_config(DEMO, {'train_cfg.max_epochs': 48})
    for scheduler in (
        dict(type='MultiStepLR', milestones=[16, 22], end=24),
        dict(type='LinearLR', start_factor=0.1, end=3),
        dict(type='CosineAnnealingLR', begin=24, end=48, T_max=24),
        dict(type='CosineAnnealingLR', T_max=48),
    ):
        cfg.param_scheduler = scheduler
        warn_of_another_length(cfg)
    assert not logged.text


@pytest.mark.parametrize('name', [name for name in shipped_configs() if not name.startswith('imagenet/')])
def test_shipped_configs_have_one_length(logged, name):
    warn_of_another_length(load_config(config_path(name)))
    assert not logged.text
