"""--smoke: any shipped detector's config becomes small, and a training of it reaches figures."""

import json
import re
from pathlib import Path

import pytest
from conftest import DEMO, IN_THIS_PROCESS, cfg_options

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


def test_it_runs(run_tool, shapes, tmp_path):
    options = ['--work-dir', tmp_path, '--data-root', shapes, *cfg_options(IN_THIS_PROCESS)]
    result = run_tool('train.py', DEMO, '--smoke', *options)
    assert result.code == 0, result.err[-2000:]
    rows = [json.loads(line) for line in next(Path(tmp_path).glob('*/vis_data/scalars.json')).open()]
    assert any('loss' in row for row in rows) or (tmp_path / 'epoch_1.pth').is_file()
    assert any('coco/bbox_mAP' in row for row in rows)
