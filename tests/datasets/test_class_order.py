"""A checkpoint's labels keep their names, in whatever order the data lists the classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, tiny
from mmdet.registry import DATASETS
from mmengine.config import Config

from cbam_mmdet.datasets.class_order import follow_class_order
from cbam_mmdet.engine.run_reader import read_results
from cbam_mmdet.errors import UserError

ANNOTATIONS = 'annotations/instances_{}2017.json'


def reverse_categories(folder, *splits):
    for split in splits:
        path = folder / ANNOTATIONS.format(split)
        content = json.loads(path.read_text())
        content['categories'].reverse()
        path.write_text(json.dumps(content))


def scores(folder):
    return json.loads(next(folder.glob('*/*.json')).read_text())


@pytest.mark.parametrize('classes', [['--classes', 'auto'], []])
def test_reversed_categories(run_tool, trained, shapes, own_shapes, tmp_path, classes):
    reverse_categories(own_shapes, 'train', 'val')
    plain, reverse = tmp_path / 'plain', tmp_path / 'reverse'
    assert run_tool('test.py', DEMO, trained, '--out', plain / 'a.pkl', *tiny(plain, shapes)).code == 0
    options = ['--out', reverse / 'a.pkl', *classes, *tiny(reverse, own_shapes)]
    result = run_tool('test.py', DEMO, trained, *options)
    if not classes:  # the config numbers them otherwise than the file
        assert result.code == 2 and 'in another order' in result.err
        return
    assert result.code == 0, result.err[-2000:]
    assert 'the test classes are put into the order of' in result.out + result.err
    for a, b in zip(*(read_results(folder / 'a.pkl') for folder in (plain, reverse)), strict=True):
        assert torch.equal(a['pred_instances']['labels'], b['pred_instances']['labels'])
    expected, actual = scores(plain), scores(reverse)
    for key in (key for key in expected if key.startswith('coco/')):
        assert actual[key] == expected[key]


def test_load_from_follows_the_order_too(run_tool, trained, own_shapes, tmp_path):
    reverse_categories(own_shapes, 'train', 'val')
    source = f'load_from={trained}/epoch_1.pth'
    result = run_tool('train.py', DEMO, '--classes', 'auto', *tiny(tmp_path / 'out', own_shapes, source))
    assert result.code == 0, result.err[-2000:]
    for split in ('train', 'val'):
        assert f'the {split} classes are put into the order of' in result.out + result.err
    for split in ('train', 'val'):
        path = own_shapes / ANNOTATIONS.format(split)
        path.write_text(path.read_text().replace('"circle"', '"disc"'))
    result = run_tool('train.py', DEMO, '--classes', 'auto', *tiny(tmp_path / 'others', own_shapes, source))
    assert result.code == 0, result.err[-2000:]
    assert 'was trained on other classes (circle, ' in result.out + result.err


def test_other_names_are_refused(run_tool, trained, own_shapes, tmp_path):
    for split in ('train', 'val'):
        path = own_shapes / ANNOTATIONS.format(split)
        path.write_text(path.read_text().replace('"circle"', '"disc"'))
    result = run_tool('test.py', DEMO, trained, '--classes', 'auto', *tiny(tmp_path / 'out', own_shapes))
    assert result.code == 2 and "detects the classes ['circle'" in result.err and "['disc'" in result.err
    work = shutil.copytree(trained, tmp_path / 'work')
    options = tiny(work, own_shapes, 'train_cfg.max_epochs=2')
    result = run_tool('train.py', DEMO, '--resume', '--classes', 'auto', *options)
    assert result.code == 2 and "detects the classes ['circle'" in result.err


def test_vocs_classes_are_numbered_by_metainfo(tmp_path):
    dataset = dict(type='VOCDataset', metainfo=dict(classes=('b', 'a')))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset), test_evaluator=dict(type='VOCMetric')))
    follow_class_order(cfg, ['test'], ('a', 'b'), 'x.pth', tmp_path)
    assert cfg.test_dataloader.dataset.metainfo.classes == ('a', 'b')
    assert len(cfg.test_dataloader.dataset.metainfo.palette) == 2
    assert not list(tmp_path.iterdir())


def test_cocos_ids_follow_the_order(shapes, tmp_path):
    """The copy holds the same boxes under the same names, and MMDetection numbers them as the checkpoint does."""
    path = shapes / ANNOTATIONS.format('val')
    names = [category['name'] for category in json.loads(path.read_text())['categories']]
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    dataset = dict(type='CocoDataset', data_root=str(shapes), ann_file=ANNOTATIONS.format('val'),
                   data_prefix=dict(img='val2017/'), metainfo=dict(classes=names), test_mode=True)  # fmt: skip
    evaluator = dict(type='CocoMetric', ann_file=str(path))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset), test_evaluator=evaluator))

    def boxes():
        built = DATASETS.build(cfg.test_dataloader.dataset)
        infos = [built.get_data_info(i) for i in range(len(built))]
        return [
            [(i['img_id'], o['bbox'], built.metainfo['classes'][o['bbox_label']]) for o in i['instances']]
            for i in infos
        ]

    expected = boxes()
    follow_class_order(cfg, ['test'], order, 'x.pth', tmp_path)
    assert boxes() == expected
    assert cfg.test_evaluator.ann_file == cfg.test_dataloader.dataset.ann_file != str(path)
    written = json.loads(Path(cfg.test_evaluator.ann_file).read_text())['categories']
    assert [(c['id'], c['name']) for c in written] == list(enumerate(order, 1))


def test_a_malformed_file_is_named(shapes, tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps(dict(images=[], annotations=[{}], categories=[dict(id=1, name='a')])))
    dataset = dict(type='CocoDataset', ann_file=str(tmp_path / 'a.json'), metainfo=dict(classes=('a', 'b')))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    with pytest.raises(UserError, match=r'a\.json: a category or annotation is malformed'):
        follow_class_order(cfg, ['test'], ('b', 'a'), 'x.pth', tmp_path)
