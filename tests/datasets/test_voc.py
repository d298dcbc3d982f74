"""Pascal VOC's layout as users have it: one year, flat, other splits, other image suffixes."""

import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.classes import set_classes
from cbam_mmdet.datasets.voc import fit_image_suffix, fit_layout
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import set_data_root, split_datasets


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """VOC2007 with 8 trainval and 4 test images."""
    root = tmp_path_factory.mktemp('voc')
    return ensure_shapes(root, num_train=8, num_val=4, image_size=64, style='voc', progress=False)


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data'


def config(root, tmp_path):
    init_default_scope('mmdet')
    (tmp_path / 'base.py').write_text("_base_ = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'\n")
    cfg = Config.fromfile(tmp_path / 'base.py')
    set_data_root(cfg, str(root))
    fit_layout(cfg)
    return cfg


def files(cfg, split):
    return [(d.ann_file, d.data_prefix.sub_data_root) for d in split_datasets(cfg, split)]


def load(cfg, split):
    set_classes(cfg, 'auto')
    check_data(cfg, [split])
    (dataset,) = split_datasets(cfg, split)
    return DATASETS.build({**dataset, 'pipeline': []})


def test_both_years_stay(made, root, tmp_path, logged):
    for year in ('VOC2007', 'VOC2012'):
        os.symlink(made / 'VOC2007', root / year)
    cfg = config(root, tmp_path)
    assert files(cfg, 'train') == [(f'{y}/ImageSets/Main/trainval.txt', f'{y}/') for y in ('VOC2007', 'VOC2012')]
    assert not logged.records


def test_one_year_alone(made, tmp_path, logged):
    cfg = config(made, tmp_path)
    assert logged.messages == [f'--data-root: no {made}/VOC2012/: trained without it']
    assert files(cfg, 'train') == [('VOC2007/ImageSets/Main/trainval.txt', 'VOC2007/')]
    assert files(cfg, 'test') == [('VOC2007/ImageSets/Main/test.txt', 'VOC2007/')]
    assert len(load(cfg, 'train')) == 8
    assert len(load(cfg, 'test')) == 4


def test_the_other_year_alone_has_no_test_txt(made, root, tmp_path, logged):
    """As the public VOC2012: no image that is tested on is trained on."""
    shutil.copytree(made / 'VOC2007', root / 'VOC2012')
    sets = root / 'VOC2012/ImageSets/Main'
    names = (sets / 'trainval.txt').read_text().split()
    (sets / 'test.txt').unlink()
    (sets / 'train.txt').write_text('\n'.join(names[:5]))
    (sets / 'val.txt').write_text('\n'.join(names[5:]))
    cfg = config(root, tmp_path)
    assert logged.messages == [
        f'--data-root: no {root}/VOC2007/: trained without it',
        f'--data-root: no {root}/VOC2007/: validation and test use VOC2012/',
        f'--data-root: {root}/VOC2012/ has no test.txt: val.txt in place of test.txt',
        '--data-root: val.txt is tested on: train.txt in place of trainval.txt',
    ]
    assert files(cfg, 'train') == [('VOC2012/ImageSets/Main/train.txt', 'VOC2012/')]
    assert files(cfg, 'val') == files(cfg, 'test') == [('VOC2012/ImageSets/Main/val.txt', 'VOC2012/')]
    loaded = [{item['img_id'] for item in load(cfg, split)} for split in ('train', 'val')]
    assert loaded == [set(names[:5]), set(names[5:])]


def test_train_txt_in_place_of_trainval_txt(made, root, tmp_path):
    shutil.copytree(made / 'VOC2007', root / 'VOC2007')
    sets = root / 'VOC2007/ImageSets/Main'
    (sets / 'trainval.txt').rename(sets / 'train.txt')
    cfg = config(root, tmp_path)
    assert files(cfg, 'train') == [('VOC2007/ImageSets/Main/train.txt', 'VOC2007/')]
    assert files(cfg, 'test') == [('VOC2007/ImageSets/Main/test.txt', 'VOC2007/')]


def test_flat_folder(made, tmp_path, logged):
    cfg = config(made / 'VOC2007', tmp_path)
    assert logged.messages == [f'--data-root: {made}/VOC2007/ holds Annotations/ itself: read as one VOC data set']
    assert files(cfg, 'train') == [('ImageSets/Main/trainval.txt', '')]
    assert files(cfg, 'val') == files(cfg, 'test') == [('ImageSets/Main/test.txt', '')]
    dataset = load(cfg, 'train')
    assert len(dataset) == 8
    assert all(os.path.isfile(item['img_path']) for item in dataset)


def test_flat_folder_without_lists(made, tmp_path):
    """What it lacks is missed where it is, not below a year that nobody has."""
    folder = shutil.copytree(made / 'VOC2007', tmp_path / 'mine')
    shutil.rmtree(folder / 'ImageSets')
    with pytest.raises(UserError, match=rf'no annotation file {folder}/ImageSets/Main/trainval.txt'):
        check_data(config(folder, tmp_path), ['train'])


def test_without_data_root_every_year_is_needed(made, tmp_path, run_tool, monkeypatch):
    (tmp_path / 'data').mkdir()
    os.symlink(made, tmp_path / 'data/VOCdevkit')
    monkeypatch.chdir(tmp_path)
    result = run_tool('train.py', ROOT / 'configs/faster_rcnn_r50_cbam_voc0712.py', '--classes', 'auto')
    assert result.code == 2
    assert 'no annotation file data/VOCdevkit/VOC2012/ImageSets/Main/trainval.txt. Expected:' in result.err


def test_neither_year_is_left_to_the_check(root, tmp_path):
    cfg = config(root, tmp_path)
    assert len(files(cfg, 'train')) == 2
    with pytest.raises(
        UserError, match=r'no annotation file .*VOC2007/ImageSets/Main/trainval.txt(.|\n)*JPEGImages/\*.jpg'
    ):
        check_data(cfg, ['train'])


@pytest.mark.parametrize('suffixes', [['.png'], ['.jpg', '.png'], ['.JPG', '.bmp', '.jpeg']])
def test_images_of_any_suffix(made, root, tmp_path, suffixes):
    shutil.copytree(made / 'VOC2007', root / 'VOC2007')
    originals = {}
    for i, path in enumerate(sorted((root / 'VOC2007/JPEGImages').iterdir())):
        image = cv2.imread(str(path))
        path.unlink()
        target = path.with_suffix(suffixes[i % len(suffixes)])
        target.write_bytes(cv2.imencode(target.suffix.lower(), image)[1].tobytes())
        originals[path.stem] = cv2.imread(str(target))
    cfg = config(root, tmp_path)
    fit_image_suffix(cfg)
    dataset = load(cfg, 'train')
    assert len(dataset) == 8
    for item in dataset:
        assert np.array_equal(cv2.imread(item['img_path']), originals[item['img_id']])


def test_other_programs_read_the_work_dirs_copy(made, root, tmp_path):
    """They import what it names, and nothing else of ours."""
    shutil.copytree(made / 'VOC2007', root / 'VOC2007')
    for path in (root / 'VOC2007/JPEGImages').iterdir():
        path.rename(path.with_suffix('.png'))
    cfg = config(root, tmp_path)
    fit_image_suffix(cfg)
    set_classes(cfg, 'auto')
    cfg.dump(tmp_path / 'kept.py')
    code = (
        'from mmengine.config import Config; from mmengine.registry import DATASETS, init_default_scope; '
        f'cfg = Config.fromfile({str(tmp_path / "kept.py")!r}); init_default_scope("mmdet"); '
        'print(len(DATASETS.build(cfg.train_dataloader.dataset)))'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ['24'], result.stderr  # 8 images, repeated 3 times


def test_jpg_stays_with_mmdetections_own_data_set(made, tmp_path):
    cfg = config(made, tmp_path)
    fit_image_suffix(cfg)
    assert [d.type for d in split_datasets(cfg, 'train')] == ['VOCDataset']


def test_xml_dataset_says_that_it_reads_jpg_only(made, root, tmp_path):
    shutil.copytree(made / 'VOC2007', root / 'VOC2007')
    for path in (root / 'VOC2007/JPEGImages').iterdir():
        path.rename(path.with_suffix('.png'))
    cfg = config(root, tmp_path)
    split_datasets(cfg, 'train')[0].type = 'XMLDataset'
    set_classes(cfg, 'auto')
    fit_image_suffix(cfg)
    with pytest.raises(UserError, match=r"8 images .* are not .jpg \(the first: .*png\).*type='VOCDataset'"):
        check_data(cfg, ['train'])


def test_a_year_that_the_config_does_not_read_is_named(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('cbam_mmdet.datasets.voc.log', lines.append)
    for year in ('VOC2007', 'VOC2012'):
        (tmp_path / year / 'Annotations').mkdir(parents=True)
    dataset = dict(
        type='VOCDataset',
        data_root=f'{tmp_path}/',
        ann_file='VOC2007/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
    )
    fit_layout(Config(dict(train_dataloader=dict(dataset=dataset))))
    assert lines == [f'--data-root: {tmp_path}/VOC2012 is there, and the config does not read it']
