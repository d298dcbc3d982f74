"""Any config trains on any format by two flags, and on what the original holds."""

import copy
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, IN_THIS_PROCESS, ROOT, cfg_options
from mmengine.config import Config
from scipy.optimize import linear_sum_assignment

from cbam_mmdet.datasets.formats.recognize import read_folder
from cbam_mmdet.datasets.formats.write import STYLES, write_data_set
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import config_path, evaluators_of, load_config, set_default_scope, split_datasets

globox = pytest.importorskip('globox', reason="needs pip install '.[dev]'")

VOC = 'faster_rcnn_r18_cbam_voc0712.py'  # its training data are repeated and concatenated


@pytest.fixture(scope='module')
def yolo(shapes, tmp_path_factory):
    """The shapes as a data set of YOLO."""
    out = tmp_path_factory.mktemp('formats') / 'yolo'
    write_data_set(read_folder(shapes), shapes, out, 'yolo')
    return out


def pointed(name, root, folder, **changes):
    cfg = load_config(config_path(name))
    set_default_scope(cfg)
    point_at_data(cfg, str(root), 'auto', folder=str(folder), **changes)
    return cfg


@pytest.mark.parametrize(
    'name', ['faster_rcnn_r50_cbam.py', VOC, 'ssd300_vgg16_cbam_voc0712.py', 'mask_rcnn_r50_cbam.py']
)
def test_data_sets_and_evaluators_read_what_was_written(name, yolo, tmp_path):
    cfg = pointed(name, yolo, tmp_path)
    before = load_config(config_path(name))
    classes = tuple(category['name'] for category in read_folder(yolo).splits['train']['categories'])
    for split in ('train', 'val', 'test'):
        wrapper = before[f'{split}_dataloader'].dataset
        assert cfg[f'{split}_dataloader'].dataset.type == (wrapper.type if 'dataset' in wrapper else 'CocoDataset')
        [dataset] = split_datasets(cfg, split)
        assert dataset.type == 'CocoDataset' and dataset.metainfo.classes == classes
        file = 'train' if split == 'train' else 'val'
        content = json.loads(Path(dataset.ann_file).read_text())
        assert content == read_folder(yolo).splits[file]
        assert all((yolo / image['file_name']).is_file() for image in content['images'])
        assert dataset.pipeline == split_datasets(before, split)[0].pipeline
        for metric in evaluators_of(cfg, split):
            assert metric.get('ann_file', dataset.ann_file) == dataset.ann_file


def test_a_config_of_the_format_reads_the_folder_as_it_is(shapes, tmp_path):
    cfg = pointed('faster_rcnn_r50_cbam.py', shapes, tmp_path)
    assert Path(split_datasets(cfg, 'train')[0].ann_file).name == 'instances_train2017.json'
    assert not (tmp_path / 'data').exists()


def test_train_and_test_by_two_flags(run_tool, yolo, tmp_path):
    """With a config of VOC: what it reports is VOC's mAP."""
    thin = {'model.backbone.backbone.base_channels': 8, 'model.neck.in_channels': [8, 16, 32, 64]}
    options = ['--work-dir', tmp_path / 'run', *cfg_options({**IN_THIS_PROCESS, **thin})]
    result = run_tool('train.py', ROOT / 'configs' / VOC, '--data-root', yolo, '--classes', 'auto', '--smoke', *options)
    assert result.code == 0, result.err[-2000:]
    assert 'recognized as YOLO (data.yaml)' in result.err + result.out
    cfg = Config.fromfile(tmp_path / 'run' / VOC)
    result = run_tool('test.py', tmp_path / 'run' / VOC, tmp_path / 'run')
    assert result.code == 0, result.err[-2000:]
    assert 'pascal_voc/mAP' in result.err + result.out
    assert Path(cfg.test_dataloader.dataset.ann_file).is_file()


def test_annotations_without_area_and_iscrowd_are_trained_on(run_tool, shapes, tmp_path):
    for split in ('train2017', 'val2017'):
        (tmp_path / 'data/annotations').mkdir(parents=True, exist_ok=True)
        os.symlink(shapes / split, tmp_path / 'data' / split)
        content = json.loads((shapes / f'annotations/instances_{split}.json').read_text())
        for annotation in content['annotations']:
            del annotation['iscrowd'], annotation['area']
        (tmp_path / f'data/annotations/instances_{split}.json').write_text(json.dumps(content))
    options = ['--work-dir', tmp_path / 'run', '--smoke', *cfg_options(IN_THIS_PROCESS)]
    config = ROOT / 'configs/demo/faster_rcnn_cbam.py'
    result = run_tool('train.py', config, '--data-root', tmp_path / 'data', *options)
    assert result.code == 0, result.err[-2000:]
    assert 'annotations lack area or iscrowd' in result.err + result.out
    assert '[1]' in result.err + result.out and 'coco/bbox_mAP' in result.err + result.out


def test_a_config_of_another_folder_is_pointed_at_this_one(yolo, shapes, tmp_path):
    """The config in a work dir names files that were written for the folder that it was trained on."""
    trained = pointed('faster_rcnn_r50_cbam.py', yolo, tmp_path / 'first')
    other = tmp_path / 'other'
    write_data_set(read_folder(shapes), shapes, other, 'voc')
    for root in (other, shapes):
        cfg = Config(copy.deepcopy(trained.to_dict()))
        point_at_data(cfg, str(root), None, folder=str(tmp_path / 'second'))
        for split in ('train', 'val', 'test'):
            [dataset] = split_datasets(cfg, split)
            assert dataset.data_root == f'{root}/' and str(tmp_path / 'second') in dataset.ann_file
            for metric in evaluators_of(cfg, split):
                assert metric.ann_file == dataset.ann_file


def test_files_are_chosen_in_a_folder_of_a_config(shapes, tmp_path):
    cfg = pointed('faster_rcnn_r50_cbam.py', shapes, tmp_path, val_ann='annotations/instances_train2017.json')
    content = json.loads(Path(split_datasets(cfg, 'test')[0].ann_file).read_text())
    truth = json.loads((shapes / 'annotations/instances_train2017.json').read_text())
    assert len(content['images']) == len(truth['images'])
    assert evaluators_of(cfg, 'test')[0].ann_file == split_datasets(cfg, 'test')[0].ann_file
    with pytest.raises(UserError, match='--data-root'):
        pointed('faster_rcnn_r50_cbam.py', '', tmp_path, train_ann='a.json')


def corners(found):
    """The boxes x1, y1, x2, y2 by their image's name and class."""
    boxes = defaultdict(list)
    splits = {id(content): content for content in found.splits.values()}
    for content in splits.values():
        names = {category['id']: category['name'] for category in content['categories']}
        images = {image['id']: Path(image['file_name']).stem for image in content['images']}
        for a in content['annotations']:
            x, y, width, height = a['bbox']
            boxes[images[a['image_id']], names[a['category_id']]].append((x, y, x + width, y + height))
    return boxes


def largest_difference(boxes, others):
    """In pixels, between the boxes of each image and class, paired so that the sum of the differences is least."""
    assert {key: len(b) for key, b in boxes.items()} == {key: len(b) for key, b in others.items()}
    largest = 0
    for key in boxes:
        apart = np.abs(np.array(boxes[key])[:, None] - np.array(others[key])[None]).max(-1)
        largest = max(largest, apart[linear_sum_assignment(apart)].max())
    return largest


def pictures(source, target):
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in ('.jpg', '.png'):
            os.symlink(path, target / path.name)


@pytest.mark.parametrize('style', ['yolo', 'darknet', 'cvat', 'labelme', 'coco', 'voc', 'roboflow'])
@pytest.mark.parametrize('name', ['raccoon', 'bccd', 'coco'])
def test_real_data_in_each_format_by_globox(name, style, tmp_path):
    """The boxes of each format are the original's."""
    root = DATA / name
    if not root.is_dir():
        pytest.skip(f'{root} is not there')
    if name == 'coco':
        annotations = globox.AnnotationSet.from_coco(root / 'annotations/instances_train2017.json')
        images = root / 'train2017'
    else:
        annotations = globox.AnnotationSet.from_pascal_voc(
            root / {'raccoon': 'annotations', 'bccd': 'VOC2007/Annotations'}[name]
        )
        images = root / {'raccoon': 'images', 'bccd': 'VOC2007/JPEGImages'}[name]
        files = {path.stem: path.name for path in images.iterdir()}  # some of the .xml name another suffix
        annotations = globox.AnnotationSet(
            globox.Annotation(files[Path(a.image_id).stem], a.image_size, a.boxes) for a in annotations
        )
    classes = sorted({box.label for a in annotations for box in a.boxes})
    numbers = {label: i for i, label in enumerate(classes)}
    if style == 'yolo':
        pictures(images, tmp_path / 'images/train')
        (tmp_path / 'labels').mkdir()
        annotations.save_yolo_darknet(tmp_path / 'labels/train', label_to_id=numbers)
        (tmp_path / 'data.yaml').write_text(f'train: images/train\nnames: {json.dumps(classes)}\n')
    elif style == 'darknet':
        pictures(images, tmp_path / 'obj')
        annotations.save_yolo_darknet(tmp_path / 'obj', label_to_id=numbers)
        (tmp_path / 'obj.names').write_text('\n'.join(classes))
    elif style == 'roboflow':
        parts = {'train': [], 'valid': [], 'test': []}
        for i, annotation in enumerate(annotations):
            parts[('train', 'train', 'valid', 'test')[i % 4]].append(annotation)
        for split, part in parts.items():
            (tmp_path / split).mkdir()
            for annotation in part:
                os.symlink(images / annotation.image_id, tmp_path / split / annotation.image_id)
            ids = {label: i + 1 for label, i in numbers.items()}
            part = globox.AnnotationSet(part)
            content = part.to_coco(label_to_id=ids, imageid_to_id={a.image_id: i for i, a in enumerate(part)})
            content['categories'] = [
                dict(id=0, name='things', supercategory='none'),
                *(dict(id=i, name=label, supercategory='things') for label, i in ids.items()),
            ]
            (tmp_path / split / '_annotations.coco.json').write_text(json.dumps(content))
    else:
        pictures(images, tmp_path / 'images')
        {
            'cvat': lambda: annotations.save_cvat(tmp_path / 'annotations.xml'),
            'labelme': lambda: annotations.save_labelme(tmp_path / 'labels'),
            'coco': lambda: annotations.save_coco(tmp_path / 'my labels.json', auto_ids=True),
            'voc': lambda: annotations.save_pascal_voc(tmp_path / 'annots'),
        }[style]()
    found = read_folder(tmp_path)
    shift = 1 if style == 'voc' else 0  # its pixels count from 1, and globox keeps the numbers
    truth = defaultdict(list)
    for annotation in annotations:
        for box in annotation.boxes:
            corner = (box.xmin - shift, box.ymin - shift, box.xmax, box.ymax)
            truth[Path(annotation.image_id).stem, box.label].append(corner)
    assert largest_difference(corners(found), truth) < 0.01
    assert sum(len(c['images']) for c in {id(c): c for c in found.splits.values()}.values()) == len(annotations)
    assert {c['name'] for c in found.splits['train']['categories']} >= set(classes)


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name', ['raccoon', 'bccd', 'coco'])
def test_a_written_data_set_is_what_was_read(name, style, tmp_path):
    """VOC rounds to whole pixels; YOLO has no crowds."""
    if not (DATA / name).is_dir():
        pytest.skip(f'{DATA / name} is not there')
    found = read_folder(DATA / name)
    out = tmp_path / 'out'
    notes = write_data_set(found, DATA / name, out, style)
    crowds = sum(a['iscrowd'] for content in found.distinct().values() for a in content['annotations'])
    for content in found.splits.values():
        if style == 'yolo':
            content['annotations'] = [a for a in content['annotations'] if not a['iscrowd']]
    again = read_folder(out)
    classes = [[c['name'] for c in f.splits['train']['categories']] for f in (again, found)]
    if style == 'voc':  # it has no list of classes: those that occur, sorted
        assert classes[0] == sorted({label for _, label in corners(found)})
    else:
        assert classes[0] == classes[1]
    assert len(again.splits['train']['images']) == len(found.splits['train']['images'])
    # Both corners are rounded in VOC's format, and a box keeps a pixel at least.
    assert largest_difference(corners(again), corners(found)) <= (1 if style == 'voc' else 0.01)
    assert bool(notes) == (style == 'voc' or (style == 'yolo' and crowds > 0))
    with pytest.raises(UserError, match='not an empty folder'):
        write_data_set(found, DATA / name, out, style)
