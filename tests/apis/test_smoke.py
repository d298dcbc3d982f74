"""--smoke: any shipped detector's config becomes small, and a training of it reaches figures."""

import json
import re
from pathlib import Path

import pytest
from conftest import DEMO, IN_THIS_PROCESS, cfg_options, tiny
from mmengine.model import PretrainedInit

from cbam_mmdet.apis.smoke import SIDE, make_small
from cbam_mmdet.utils.config import config_path, load_config, shipped_configs, split_datasets

CONFIGS = [name for name in shipped_configs() if not name.startswith(('imagenet/', 'ablation/'))]


@pytest.mark.parametrize('name', CONFIGS)
def test_a_shipped_config_is_small(name):
    cfg = load_config(config_path(name))
    make_small(cfg)
    assert 'Pretrained' not in str(cfg.model)
    assert cfg.train_cfg.get('max_epochs', 1) == 1 and cfg.train_cfg.get('max_iters', 2) == 2
    for split in ('train', 'val', 'test'):
        for dataset in split_datasets(cfg, split):
            assert dataset.indices <= 10
            scales = re.findall(r'\((\d+), (\d+)\)', str(dataset.pipeline))
            assert scales and all(int(side) <= SIDE for scale in scales for side in scale)


@pytest.mark.parametrize(
    'init', [dict(type=PretrainedInit, checkpoint='a.pth'), [dict(type='Pretrained', checkpoint='a')]]
)
def test_no_weights_are_fetched(init):
    cfg = load_config(DEMO)
    cfg.model.backbone.init_cfg = init
    cfg.model.neck.pretrained = True
    make_small(cfg)
    assert cfg.model.backbone.init_cfg is None and cfg.model.neck.pretrained is False


def test_it_runs(run_tool, shapes, tmp_path):
    options = ['--work-dir', tmp_path, '--data-root', shapes, *cfg_options(IN_THIS_PROCESS)]
    result = run_tool('train.py', DEMO, '--smoke', *options)
    assert result.code == 0, result.err[-2000:]
    rows = [json.loads(line) for line in next(Path(tmp_path).glob('*/vis_data/scalars.json')).open()]
    assert any('loss' in row for row in rows) or (tmp_path / 'epoch_1.pth').is_file()
    assert any('coco/bbox_mAP' in row for row in rows)
    result = run_tool('train.py', DEMO, '--resume', 'auto', *options)
    assert result.code == 2 and 'epoch_1.pth was written by a --smoke run' in result.err


def test_it_keeps_out_of_the_work_dir_of_a_training(run_tool, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ['--data-root', shapes, *cfg_options(IN_THIS_PROCESS, 'work_dir=mine/')]
    result = run_tool('train.py', DEMO, '--smoke', *options)
    assert result.code == 0, result.err[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ['mine_smoke']


def test_it_does_not_go_on_from_a_training(run_tool, trained, shapes, tmp_path):
    result = run_tool('train.py', DEMO, '--smoke', '--resume', trained / 'epoch_1.pth', *tiny(tmp_path, shapes))
    assert result.code == 2 and 'epoch_1.pth was written by a whole training' in result.err
