"""What the pages name, made up: data sets in each layout, weights, pictures, work dirs. All tiny."""

import json
import shutil
import sys

import cv2
import torch
from conftest import ROOT
from mmdet.datasets import CocoDataset, VOCDataset
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from cbam_mmdet.datasets import CLASSES, ensure_shapes
from cbam_mmdet.engine.checkpoint.keys import to_official


def write_all(root, shapes, trained):
    """Fill a folder; returns it.

    Args:
        root: an empty folder.
        shapes: the tiny data set in COCO's layout.
        trained: a work dir of the demo's detector, trained for one epoch.
    """
    for name in ('configs', 'tools', 'benchmarks', 'docs', 'tests', 'pyproject.toml'):
        (root / name).symlink_to(ROOT / name)
    (root / '.venv').symlink_to(sys.prefix)
    write_pictures(root, shapes)

    (root / 'data').mkdir()
    shutil.copytree(shapes, root / 'data/shapes')
    rename_coco(shutil.copytree(shapes, root / 'coco'), CocoDataset.METAINFO['classes'])
    rename_coco(shutil.copytree(shapes, root / 'coco-style'), ['cat', 'dog', 'cow', 'hen', 'pig', 'ass'])

    voc = ensure_shapes(root / 'VOCdevkit', 4, 2, image_size=64, style='voc', progress=False)
    shutil.copytree(rename_voc(voc / 'VOC2007', VOCDataset.METAINFO['classes']), voc / 'VOC2012')
    shutil.copytree(voc / 'VOC2007', root / 'VOC2007')
    flat = shutil.copytree(voc / 'VOC2007', root / 'my_data')
    for old, new in (('trainval', 'train'), ('test', 'val')):
        (flat / f'ImageSets/Main/{old}.txt').rename(flat / f'ImageSets/Main/{new}.txt')
    cells = ensure_shapes(root / 'bccd', 4, 2, image_size=64, style='voc', progress=False)
    rename_voc(cells / 'VOC2007', ['RBC', 'WBC', 'Platelets'])
    (root / 'images_and_annotations').mkdir()
    shutil.copytree(voc / 'VOC2007/JPEGImages', root / 'images_and_annotations/images')
    shutil.copytree(voc / 'VOC2007/Annotations', root / 'images_and_annotations/annotations')
    write_image_folders(root / 'imagenet', root / 'photo.jpg')

    for name in ('demo', 'plain', 'cbam'):
        copy = shutil.copytree(trained, root / 'work_dirs' / name)
        config = copy / 'faster_rcnn_cbam.py'
        config.write_text(config.read_text().replace(str(shapes), 'data/shapes'))
    write_weights(root)
    return root


def write_pictures(root, shapes):
    pictures = sorted((shapes / 'val2017').iterdir())
    shutil.copy(pictures[0], root / 'photo.jpg')
    (root / 'folder').mkdir()
    shutil.copy(pictures[1], root / 'folder')
    film = cv2.VideoWriter(str(root / 'film.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 5, (64, 64))
    for picture in pictures[:2]:
        film.write(cv2.imread(str(picture)))
    film.release()


def rename_coco(folder, names):
    """Give the six shapes the first names, and list the others as well."""
    for path in (folder / 'annotations').iterdir():
        content = json.loads(path.read_text())
        order = {category['name']: category['id'] for category in content['categories']}
        new_id = {order[shape]: i for i, shape in enumerate(CLASSES, 1)}
        for annotation in content['annotations']:
            annotation['category_id'] = new_id[annotation['category_id']]
        content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
        path.write_text(json.dumps(content))


def rename_voc(folder, names):
    """Give the six shapes the first names; returns the folder."""
    for path in (folder / 'Annotations').iterdir():
        text = path.read_text()
        for i, shape in enumerate(CLASSES):
            text = text.replace(f'<name>{shape}</name>', f'<name>{names[i % len(names)]}</name>')
        path.write_text(text)
    return folder


def write_image_folders(root, picture, classes=1000):
    for split in ('train', 'val'):
        for i in range(classes):
            (root / split / f'n{i:04d}').mkdir(parents=True)
            (root / split / f'n{i:04d}/0.jpg').symlink_to(picture)


def write_weights(root):
    """The demo's plain detector, and a ResNet-50 with CBAM under the authors' keys."""
    init_default_scope('mmdet')
    plain = Config.fromfile(ROOT / 'configs/demo/faster_rcnn.py')
    torch.save(dict(state_dict=MODELS.build(plain.model).state_dict()), root / 'plain.pth')
    backbone = dict(type='ResNet', depth=50, plugins=[dict(cfg=dict(type='CBAM'), position='after_conv3')])
    theirs = to_official(MODELS.build(backbone).state_dict()).state_dict
    torch.save(dict(state_dict=theirs), root / 'RESNET50_IMAGENET_CBAM.pth')
