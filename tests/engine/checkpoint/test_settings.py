"""A checkpoint that fits, but was trained with other settings of the model, is spoken of."""

import math

import pytest
from conftest import DEMO, cfg_options, tiny

from cbam_mmdet.engine.checkpoint.settings import warn_of_other_settings
from cbam_mmdet.utils.config import config_path, load_config, shipped_configs

SAID = 'was trained with other settings of the model'
ANCHORS = 'model.rpn_head.anchor_generator.scales'
OTHER = {
    ANCHORS: [8],
    'model.rpn_head.bbox_coder.target_stds': [0.5, 0.5, 0.5, 0.5],
    'model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio': 2,
    'model.data_preprocessor.bgr_to_rgb': False,
}


@pytest.fixture
def loaded(logged):
    """What is said of a checkpoint with the text of one config, where another one is used."""

    def load(trained, used, strict=True):
        logged.clear()
        warn_of_other_settings(dict(meta=dict(cfg=trained.pretty_text)), used, strict, 'a.pth')
        return ''.join(record.message for record in logged.records if record.levelname == 'WARNING')

    return load


@pytest.mark.parametrize('key', OTHER)
def test_each_is_named_with_both_values(loaded, key):
    assert f'{key}: ' in loaded(load_config(DEMO), load_config(DEMO, {key: OTHER[key]}))
    assert f'now {OTHER[key]}' in loaded(load_config(DEMO), load_config(DEMO, {key: OTHER[key]}))


def test_one_that_is_left_to_its_default(loaded):
    used = load_config(DEMO)
    del used.model.data_preprocessor['bgr_to_rgb']
    assert 'model.data_preprocessor.bgr_to_rgb: True, now False' in loaded(load_config(DEMO), used)
    used.model.backbone.strides = (1, 2, 2, 2)  # its default, written out
    used.model.data_preprocessor.bgr_to_rgb = True
    assert not loaded(load_config(DEMO), used)


def test_what_may_be_changed_is_not_spoken_of(loaded):
    free = {
        'model.test_cfg.rcnn.score_thr': 0.5, 'model.train_cfg.rpn.sampler.num': 7, 'model.backbone.frozen_stages': 2,
        'model.backbone.norm_cfg.type': 'SyncBN', 'model.backbone.norm_cfg.requires_grad': False,
        'model.rpn_head.loss_bbox.loss_weight': 2.0, 'model.roi_head.bbox_head.num_classes': 3,
        'model.backbone.plugins.0.cfg.gate': 'unit',
    }  # fmt: skip
    assert not loaded(load_config(DEMO), load_config(DEMO, free))


def test_weights_to_fine_tune_from(loaded):
    """The images' normalization counts, for the same backbone only."""
    trained = load_config(DEMO)
    assert 'bgr_to_rgb' in loaded(trained, load_config(DEMO, OTHER), strict=False)
    assert ANCHORS not in loaded(trained, load_config(DEMO, OTHER), strict=False)
    assert not loaded(trained, load_config(config_path('faster_rcnn_effnet_lite0.py')), strict=False)


def test_a_range_without_an_end(loaded):
    """As FCOS has it, written `inf` in the text of its config."""
    ranges = [[-1, 64], [64, math.inf]]
    trained = load_config(DEMO, {'model.rpn_head.regress_ranges': ranges})
    assert not loaded(trained, trained)
    assert 'regress_ranges' in loaded(
        trained, load_config(DEMO, {'model.rpn_head.regress_ranges': [[-1, 32], [32, math.inf]]})
    )


@pytest.mark.parametrize('name', [name for name in shipped_configs() if not name.startswith('ablation/')])
def test_a_config_is_equal_to_its_own_text(loaded, name):
    assert not loaded(load_config(config_path(name)), load_config(config_path(name)))


@pytest.mark.parametrize('tool', ['test.py', 'test.py --tta', 'infer.py', 'train.py --resume'])
def test_every_way_of_loading(run_tool, trained, shapes, tmp_path, tool):
    (name, *flags), checkpoint = tool.split(), trained / 'epoch_1.pth'
    options = tiny(tmp_path / 'work', shapes, 'train_cfg.max_epochs=1', f'{ANCHORS}=[8]')
    if name == 'infer.py':
        saved = next(trained.glob('*.py'))
        image = next((shapes / 'val2017').iterdir())
        result = run_tool(name, saved, checkpoint, image, '--out-dir', tmp_path, *cfg_options({ANCHORS: [8]}))
    else:
        arguments = [*flags, checkpoint] if name == 'train.py' else [checkpoint, *flags]
        result = run_tool(name, DEMO, *arguments, *options)
    assert result.code == 0, result.err[-2000:]
    assert (result.out + result.err).count(SAID) == 1
    assert f'{ANCHORS}: [4], now [8]' in result.out + result.err
