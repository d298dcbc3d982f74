"""A missing folder or file, whatever way the config names the type of its data set."""

import pytest
from mmdet.datasets import CocoDataset, VOCDataset
from mmengine.config import ConfigDict

from cbam_mmdet.datasets.checks import require_annotation_file
from cbam_mmdet.datasets.layouts import require_data_root
from cbam_mmdet.errors import UserError


@pytest.mark.parametrize('kind', ['CocoDataset', 'mmdet.CocoDataset', CocoDataset])
def test_cocos_layout_is_shown(kind, tmp_path):
    dataset = ConfigDict(type=kind, data_root=f'{tmp_path}/nowhere/', ann_file='a.json')
    with pytest.raises(UserError, match=r'no folder .*nowhere/(.|\n)*instances_train2017.json'):
        require_data_root(dataset, 'train')
    dataset.data_root = str(tmp_path)
    with pytest.raises(UserError, match=r'no annotation file .*a.json(.|\n)*instances_train2017.json'):
        require_annotation_file(dataset, 'train')


@pytest.mark.parametrize('kind', ['VOCDataset', 'mmdet.VOCDataset', VOCDataset])
def test_vocs_layout_is_shown(kind, tmp_path):
    with pytest.raises(UserError, match=r'no folder .*nowhere/(.|\n)*JPEGImages'):
        require_data_root(ConfigDict(type=kind, data_root=f'{tmp_path}/nowhere/'), 'train')
