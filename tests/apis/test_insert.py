"""CBAM inserted into a detector that is there already."""

import json
import pickle

import pytest
import torch
from conftest import DEMO, ROOT, SMALL, cfg_options, tiny
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import checkpoint as checkpoint_module

from cbam_mmdet import CBAM
from cbam_mmdet.engine.checkpoint.missing_cbam import summarize_missing_cbam

PLAIN = str(ROOT / 'configs/demo/faster_rcnn.py')


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """The weights of a plain detector, random ones."""
    cfg = Config.fromfile(PLAIN)
    cfg.merge_from_dict(SMALL)
    torch.manual_seed(1)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, value in model.named_parameters():
        if '.bn' in name and name.endswith('weight'):
            # A fresh block's last norm is 0, and whatever follows it would not be seen.
            torch.nn.init.uniform_(value, 0.5, 1.5)
    path = tmp_path_factory.mktemp('plain') / 'plain.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(CLASSES=cfg.classes))), path)
    return path


@pytest.fixture
def insert(run_tool, plain, tmp_path):
    def run(*args, config=PLAIN, checkpoint=plain, options=()):
        chosen = ['--out-dir', tmp_path / 'inserted', *args, *cfg_options(SMALL, *options)]
        return run_tool('insert_cbam.py', config, checkpoint, *chosen)

    return run


def test_another_config_of_that_name_is_kept(insert, tmp_path):
    (tmp_path / 'inserted').mkdir()
    mine = tmp_path / 'inserted/faster_rcnn_cbam.py'
    mine.write_text('# by hand\n')
    result = insert()
    assert result.code == 2 and 'exists already, and is not what would be written now' in result.err
    assert mine.read_text() == '# by hand\n'
    mine.unlink()
    assert [insert().code, insert().code] == [0, 0]  # its own it may write again
    mine.write_text(mine.read_text() + '# a note\n')
    assert insert().code == 2 and mine.read_text().endswith('# a note\n')


def test_the_new_config_is_of_the_kind_of_the_plain_one(insert, tmp_path):
    yaml = tmp_path / 'plain.yaml'
    yaml.write_text(json.dumps(Config.fromfile(PLAIN).to_dict()))
    assert insert(config=yaml).code == 0
    found = Config.fromfile(tmp_path / 'inserted/plain_cbam.yaml')
    assert found.load_from == str(tmp_path / 'inserted/plain_cbam.pth')
    assert found.model.backbone.type == 'PluginBackbone'


def test_the_new_config_works_from_any_folder(insert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert insert('--out-dir', 'here').code == 0
    assert Config.fromfile('here/faster_rcnn_cbam.py').load_from == str(tmp_path / 'here/faster_rcnn_cbam.pth')


def detections(run_tool, config, checkpoint, shapes, folder, model):
    """Of every image, whatever their score."""
    options = tiny(folder, shapes, 'model.test_cfg.rcnn.score_thr=0.0', model=model)
    result = run_tool('test.py', config, checkpoint, '--out', folder / 'out.pkl', *options)
    assert result.code == 0, result.err[-2000:]
    return [sample['pred_instances'] for sample in pickle.loads((folder / 'out.pkl').read_bytes())]


def test_before_any_training_the_detections_are_the_plain_ones(insert, run_tool, plain, shapes, tmp_path):
    result = insert()
    assert result.code == 0, result.err
    assert result.out.startswith('16 CBAM modules, ')
    config, checkpoint = tmp_path / 'inserted/faster_rcnn_cbam.py', tmp_path / 'inserted/faster_rcnn_cbam.pth'
    before = detections(run_tool, PLAIN, plain, shapes, tmp_path / 'a', SMALL)
    after = detections(run_tool, config, checkpoint, shapes, tmp_path / 'b', {})
    assert len(before) == len(after) == 4
    for a, b in zip(before, after, strict=True):
        assert len(a['scores']) > 0
        assert all(torch.equal(a[key], b[key]) for key in ('bboxes', 'scores', 'labels')), 'bit for bit'

    result = run_tool('train.py', config, *tiny(tmp_path / 'work', shapes, model={}))
    assert result.code == 0, result.err[-2000:]
    new, old = (torch.load(p, weights_only=False)['state_dict'] for p in (tmp_path / 'work/epoch_1.pth', checkpoint))
    moved = [key for key in old if 'cbam' in key and not torch.equal(new[key], old[key])]
    assert any('channel.fc2' in key for key in moved) and any('spatial.bn' in key for key in moved)


def test_the_papers_gate_changes_the_detections(insert, run_tool, plain, shapes, tmp_path):
    """That the test above can fail."""
    assert insert('--cbam', 'gate=sigmoid', 'reduction=4').code == 0
    before = detections(run_tool, PLAIN, plain, shapes, tmp_path / 'a', SMALL)
    config, checkpoint = tmp_path / 'inserted/faster_rcnn_cbam.py', tmp_path / 'inserted/faster_rcnn_cbam.pth'
    after = detections(run_tool, config, checkpoint, shapes, tmp_path / 'b', {})
    assert not all(torch.equal(a['scores'], b['scores']) for a, b in zip(before, after, strict=True))


def test_frozen_stages_get_none(insert, tmp_path):
    result = insert(options=['model.backbone.frozen_stages=1'])
    assert result.code == 0, result.err
    assert result.out.startswith('13 CBAM modules') and 'backbone.layer1' not in result.out
    cfg = Config.fromfile(tmp_path / 'inserted/faster_rcnn_cbam.py')
    assert cfg.model.backbone.plugins[0].after == ['layer[2-4].*.bn3']
    backbone = MODELS.build(cfg.model).backbone
    backbone.train()  # freezes
    assert all(p.requires_grad for m in backbone.modules() if isinstance(m, CBAM) for p in m.parameters())


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(config=DEMO), 'has CBAM in its model already'),
        (dict(options=['model.roi_head.bbox_head.num_classes=3']), 'is of another architecture than the config'),
        (dict(options=['model.backbone.frozen_stages=4']), 'every stage is frozen'),
        (dict(checkpoint='no.pth'), 'checkpoint no.pth does not exist'),
    ],
)
def test_refused(insert, tmp_path, given, message):
    result = insert(**given)
    assert result.code == 2 and message in result.err and 'Traceback' not in result.err, result.err
    assert not (tmp_path / 'inserted').exists()


def test_missing_cbams_are_said_in_one_line(plain, logged):
    cfg = Config.fromfile(DEMO)
    cfg.merge_from_dict(SMALL)
    cfg.model.backbone.plugins[0].cfg.gate = 'unit'
    model = MODELS.build(cfg.model)
    weights = torch.load(plain, weights_only=False)['state_dict']
    with summarize_missing_cbam():
        checkpoint_module.load_state_dict(model, weights, logger='current')
        assert '16 CBAM modules of 16' in logged.text and '16 of them are the exact identity' in logged.text
        assert 'missing keys' not in logged.text
        logged.clear()
        del weights['backbone.conv1.weight']
        checkpoint_module.load_state_dict(model, weights, logger='current')
        assert 'backbone.conv1.weight' in logged.text and 'cbam.channel' not in logged.text
        with pytest.raises(RuntimeError, match=r'cbam\.channel'):
            checkpoint_module.load_state_dict(model, weights, strict=True)
