"""The demo data set: its drawing against OpenCV's geometry, its files against pycocotools and MMDetection's readers."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from cbam_mmdet.datasets import shapes
from cbam_mmdet.datasets.shapes import CLASSES, count_objects, draw_image, draw_scene, ensure_shapes

SETTINGS = dict(num_train=40, num_val=20, image_size=96, seed=5)
SMALL = dict(num_train=4, num_val=2, image_size=32)
REPOSITORY = Path(__file__).parents[2]
# The module by itself, without the package around it and the mmdet that the package imports.
LOAD_ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location('shapes', {str(shapes.__file__)!r})
shapes = sys.modules['shapes'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shapes)
"""


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """One folder with the same set in both styles."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    assert ensure_shapes(root, **SETTINGS) == ensure_shapes(root, **SETTINGS, style='voc') == root
    return root


@pytest.fixture(scope='module')
def drawn():
    """The same pictures and shapes without files: {split: [(image, objects), ...]}."""
    seed, size = SETTINGS['seed'], SETTINGS['image_size']
    return {
        split: [draw_image(seed, split, index, size) for index in range(SETTINGS[f'num_{split}'])]
        for split in ('train', 'val')
    }


def all_objects(drawn):
    return [(image, objects) for split in drawn.values() for image, objects in split]


def content(root, pattern):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.glob(pattern))}


def state(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob('*')}


def load_coco(root, split):
    return COCO(root / f'annotations/instances_{split}2017.json')


# The drawing


def test_polygon_distance_agrees_with_opencv():
    # Scaled up, because OpenCV wants 32-bit vertices; concave, with a horizontal and a vertical edge.
    vertices = [(-80, -60), (70, -60), (70, 20), (10, -5), (40, 80), (-30, 30)]
    v, u = np.mgrid[-110:110:7, -110:110:7] + 0.25
    contour = np.array(vertices, np.float32)
    expected = [-cv2.pointPolygonTest(contour, (a, b), True) for a, b in zip(u.ravel(), v.ravel(), strict=True)]
    rounding = 0.06
    np.testing.assert_allclose(shapes.polygon(*vertices)(u, v).ravel(), np.array(expected) - rounding, atol=1e-4)


@pytest.mark.parametrize(
    ('category', 'area'),
    [
        ('circle', math.pi * 0.92**2),
        ('ring', math.pi * (0.98**2 - 0.46**2)),
        # Polygon, plus a strip of width 0.06 along its edges, plus the round corners (less than 1 percent off).
        ('square', 1.44**2 + 4 * 1.44 * 0.06),
        ('triangle', 0.94**2 * 3**0.5 * (0.75 + 3 / 0.94 * 0.06)),
    ],
)
def test_shapes_have_the_area_of_their_formula(category, area):
    v, u = (np.mgrid[:500, :500] + 0.5) / 200 - 1.25
    assert (shapes._DISTANCES[category](u, v) < 0).mean() * 2.5**2 == pytest.approx(area, rel=0.015)


def test_picture_and_objects_are_as_documented(drawn):
    size = SETTINGS['image_size']
    for image, objects in all_objects(drawn):
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert 1 <= len(objects) <= shapes.MAX_OBJECTS
        assert (sum(shape.mask.astype(int) for shape in objects) <= 1).all()
        for shape in objects:
            x, y, width, height = cv2.boundingRect(shape.mask.astype(np.uint8))
            assert shape.bbox == (x, y, x + width, y + height)
            assert shape.area == cv2.countNonZero(shape.mask.astype(np.uint8))
            assert shape.category in CLASSES
    sides = [max(o.bbox[2] - o.bbox[0], o.bbox[3] - o.bbox[1]) for _, objects in all_objects(drawn) for o in objects]
    assert min(sides) >= 0.05 * size and 0.45 * size <= max(sides) <= 0.61 * size


def test_occlusion_is_bounded_and_plausible(drawn):
    occluded = []
    for _, objects in all_objects(drawn):
        for position, shape in enumerate(objects):
            in_front = objects[position + 1 :]
            whole = shape.area / (1 - shape.occluded)
            assert whole == pytest.approx(round(whole))
            assert 0 <= shape.occluded <= shapes.MAX_OCCLUDED
            assert shape.difficult == (shape.occluded > shapes.DIFFICULT_OCCLUDED)
            if shape.truncated:
                assert min(shape.bbox[:2]) == 0 or max(shape.bbox[2:]) == SETTINGS['image_size'] or in_front
            else:
                assert round(whole) - shape.area <= sum(other.area for other in in_front)
            occluded.append(shape.occluded)
    assert any(share > shapes.DIFFICULT_OCCLUDED for share in occluded) and occluded.count(0) > len(occluded) / 2


def test_every_shape_stands_out_at_its_outline(drawn):
    """Pixels just within a shape differ clearly from those just outside: nothing is annotated that cannot be seen."""
    kernel = np.ones((3, 3), np.uint8)
    contrasts = []
    for image, objects in all_objects(drawn):
        grey = image.mean(axis=2)
        for shape in objects:
            mask = shape.mask.astype(np.uint8)
            inner = (mask & ~cv2.erode(mask, kernel, borderValue=1)).astype(bool)
            further = cv2.dilate(mask, kernel, iterations=3)
            outer = (further & ~cv2.dilate(mask, kernel, iterations=1)).astype(bool)
            contrasts.append(abs(grey[inner].mean() - grey[outer].mean()))
    assert np.percentile(contrasts, 5) > 15 and np.median(contrasts) > 40


def test_same_seed_same_picture_and_other_seed_other_picture():
    def draw(seed):
        return draw_scene(np.random.default_rng(seed), 64)

    (first, objects), (second, same_objects), (other, _) = draw(1), draw(1), draw(2)
    assert (first == second).all() and objects == same_objects
    assert all((a.mask == b.mask).all() for a, b in zip(objects, same_objects, strict=True))
    assert (first != other).mean() > 0.5
    different = [draw_image(0, 'train', 0, 64), draw_image(1, 'train', 0, 64), draw_image(0, 'val', 0, 64)]
    assert len({image.tobytes() for image, _ in different}) == 3


def test_pictures_do_not_depend_on_the_processor():
    """NumPy without AVX and its like stands for another machine."""
    features = np.show_config(mode='dicts').get('SIMD Extensions', {}).get('found')
    if not features:
        pytest.skip('NumPy has no processor-dependent code here')
    code = f"""{LOAD_ALONE}
import hashlib
digest = hashlib.sha256()
for index in range(20):
    image, objects = shapes.draw_image(0, 'train', index, 64)
    digest.update(image.tobytes() + repr(objects).encode())
assert not {{'torch', 'mmdet', 'mmcv', 'mmengine'}} & set(sys.modules), 'slow imports'
print(digest.hexdigest())
"""
    digests = [
        subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
        for env in (os.environ, {**os.environ, 'NPY_DISABLE_CPU_FEATURES': ','.join(features)})
    ]
    assert digests[0] == digests[1] != ''


# The files


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_annotations_agree_with_pycocotools(root, drawn, split):
    coco = load_coco(root, split)
    size = SETTINGS['image_size']
    assert len(coco.imgs) == SETTINGS[f'num_{split}']
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for (_, objects), image in zip(drawn[split], coco.loadImgs(sorted(coco.imgs)), strict=True):
        pixels = cv2.imread(str(root / f'{split}2017' / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (size, size, 3)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        for shape, annotation in zip(objects, annotations, strict=True):
            rle = coco.annToRLE(annotation)
            assert (mask_api.decode(rle).astype(bool) == shape.mask).all()
            assert annotation['area'] == mask_api.area(rle) > 0
            x, y, width, height = annotation['bbox']
            assert [x, y, width, height] == mask_api.toBbox(rle).tolist()
            assert 0 <= x < x + width <= size and 0 <= y < y + height <= size
            assert annotation['iscrowd'] == 0 and CLASSES[annotation['category_id'] - 1] == shape.category


def test_files_hold_the_drawn_pictures(root, drawn):
    for split, name in (('train', 'shapes_train_000007'), ('val', 'shapes_val_000011')):
        pixels = cv2.imread(str(root / f'{split}2017/{name}.jpg'))[..., ::-1].astype(float)
        difference = np.abs(pixels - drawn[split][int(name[-6:])][0])
        assert difference.mean() < 3, 'JPEG of this quality changes a channel by one or two on average'


def test_every_class_occurs_in_train_and_val(root):
    for split in ('train', 'val'):
        coco = load_coco(root, split)
        names = Counter(CLASSES[annotation['category_id'] - 1] for annotation in coco.anns.values())
        assert set(names) == set(CLASSES)
        assert count_objects(root, 'coco')[split] == count_objects(root, 'voc')[split] == names


def test_voc_agrees_with_coco(root, drawn):
    voc = root / 'VOC2007'
    for split, voc_split in (('train', 'trainval'), ('val', 'test')):
        coco = load_coco(root, split)
        names = (voc / f'ImageSets/Main/{voc_split}.txt').read_text().split()
        for (_, objects), name, image in zip(drawn[split], names, coco.loadImgs(sorted(coco.imgs)), strict=True):
            assert image['file_name'] == f'{name}.jpg'
            jpegs = root / f'{split}2017/{name}.jpg', voc / f'JPEGImages/{name}.jpg'
            assert jpegs[0].read_bytes() == jpegs[1].read_bytes()
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
            elements = ET.parse(voc / f'Annotations/{name}.xml').findall('object')
            for shape, annotation, element in zip(objects, annotations, elements, strict=True):
                x, y, width, height = annotation['bbox']
                corners = [int(element.find('bndbox').find(tag).text) for tag in ('xmin', 'ymin', 'xmax', 'ymax')]
                assert corners == [x + 1, y + 1, x + width, y + height]
                assert element.find('name').text == CLASSES[annotation['category_id'] - 1]
                assert element.find('difficult').text == str(int(shape.difficult))
                assert element.find('truncated').text == str(int(shape.truncated))


def test_picture_k_is_independent_of_the_number_of_pictures(tmp_path):
    few = ensure_shapes(tmp_path / 'few', **SMALL)
    many = ensure_shapes(tmp_path / 'many', **{**SMALL, 'num_train': 7, 'num_val': 5})
    for split in ('train', 'val'):
        less, more = content(few, f'{split}2017/*'), content(many, f'{split}2017/*')
        assert less.items() < more.items()


def test_mmdet_reads_both_styles(root, drawn):
    from mmdet.datasets import CocoDataset, VOCDataset

    coco = CocoDataset(
        data_root=str(root),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        metainfo=shapes.METAINFO,
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[],
    )
    voc = VOCDataset(
        data_root=str(root),
        ann_file='VOC2007/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        metainfo=shapes.METAINFO,
        filter_cfg=dict(filter_empty_gt=True, min_size=32, bbox_min_size=1),
        pipeline=[],
    )
    assert len(coco) == len(voc) == SETTINGS['num_train']
    for index, (_, objects) in enumerate(drawn['train']):
        in_coco, in_voc = coco.get_data_info(index), voc.get_data_info(index)
        assert Path(in_coco['img_path']).is_file() and Path(in_voc['img_path']).is_file()
        for shape, a, b in zip(objects, in_coco['instances'], in_voc['instances'], strict=True):
            assert tuple(a['bbox']) == shape.bbox
            # MMDetection takes one from all four numbers of VOC, so x2 and y2 are the last pixels there.
            assert tuple(b['bbox']) == (*shape.bbox[:2], shape.bbox[2] - 1, shape.bbox[3] - 1)
            assert a['bbox_label'] == b['bbox_label'] == CLASSES.index(shape.category)
            assert (a['ignore_flag'], b['ignore_flag']) == (0, int(shape.difficult))


# Making sure that it is there


@pytest.mark.parametrize('style', ['coco', 'voc'])
def test_complete_set_is_left_alone(tmp_path, style):
    ensure_shapes(tmp_path, **SMALL, style=style)
    before = state(tmp_path)
    ensure_shapes(tmp_path, **SMALL, style=style)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ('style', 'victim'),
    [
        ('coco', 'train2017/shapes_train_000002.jpg'),
        ('coco', 'annotations/instances_val2017.json'),
        ('coco', 'shapes.json'),
        ('voc', 'VOC2007/Annotations/shapes_val_000001.xml'),
        ('voc', 'VOC2007/ImageSets/Main/test.txt'),
    ],
)
@pytest.mark.parametrize('damage', ['removed', 'emptied'])
def test_damaged_set_is_made_anew(tmp_path, style, victim, damage):
    ensure_shapes(tmp_path, **SMALL, style=style)
    whole = content(tmp_path, '**/*.*')
    if damage == 'removed':
        (tmp_path / victim).unlink()
    else:
        (tmp_path / victim).write_bytes(b'')
    if victim == 'shapes.json':
        # Nothing tells any more that the files are ours, so they are not touched.
        with pytest.raises(FileExistsError, match='choose another folder'):
            ensure_shapes(tmp_path, **SMALL, style=style)
    else:
        ensure_shapes(tmp_path, **SMALL, style=style)
        assert content(tmp_path, '**/*.*') == whole


@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
def test_killed_run_is_repaired(tmp_path):
    settings = {**SMALL, 'num_train': 100_000}
    run = subprocess.Popen(
        [sys.executable, '-c', f'{LOAD_ALONE}\nshapes.ensure_shapes({str(tmp_path)!r}, **{settings})']
    )
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / 'train2017/shapes_train_000005.jpg').exists():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    with pytest.raises(FileNotFoundError, match='no complete shapes'):
        count_objects(tmp_path)
    ensure_shapes(tmp_path, **SMALL)
    assert len(list(tmp_path.glob('train2017/*.jpg'))) == len(load_coco(tmp_path, 'train').imgs) == SMALL['num_train']
    assert sum(count_objects(tmp_path)['train'].values()) > 0


def test_other_settings_replace_the_set(tmp_path):
    ensure_shapes(tmp_path, **SMALL)
    ensure_shapes(tmp_path, **SMALL, style='voc')
    before, voc_before = content(tmp_path, 'val2017/*'), state(tmp_path / 'VOC2007')
    (tmp_path / 'train2017/mine.txt').write_text('a file of the user')
    ensure_shapes(tmp_path, num_train=3, num_val=2, image_size=32, seed=1)
    assert len(list(tmp_path.glob('train2017/*.jpg'))) == 3
    assert content(tmp_path, 'val2017/*').keys() == before.keys() and content(tmp_path, 'val2017/*') != before
    assert (tmp_path / 'train2017/mine.txt').exists()
    assert state(tmp_path / 'VOC2007') == voc_before
    assert json.loads((tmp_path / 'shapes.json').read_text())['voc']['complete']


@pytest.mark.parametrize(
    ('style', 'file'),
    [('coco', 'annotations/instances_train2017.json'), ('voc', 'VOC2007/JPEGImages/000005.jpg')],
)
def test_data_of_others_is_not_touched(tmp_path, style, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text('precious')
    before = state(tmp_path)
    with pytest.raises(FileExistsError, match='was not made here'):
        ensure_shapes(tmp_path, **SMALL, style=style)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(num_train=0), 'num_train is 0; expected 1 to'),
        (dict(num_val=-3), 'num_val is -3'),
        (dict(image_size=31), 'image_size is 31; expected 32 to 2048'),
        (dict(image_size=64.5), 'image_size is 64.5; expected an integer'),
        (dict(seed=-1), 'seed is -1'),
        (dict(style='yolo'), "style is 'yolo'; expected one of coco, voc"),
    ],
)
def test_wrong_settings_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        ensure_shapes(tmp_path / 'new', **{**SMALL, **wrong})
    assert not (tmp_path / 'new').exists()


# The command


def run_tool(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['make_shapes.py', *map(str, args)])
    monkeypatch.syspath_prepend(REPOSITORY / 'tools')  # as Python does for a script
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(REPOSITORY / 'tools/make_shapes.py'), run_name='__main__')
    return exit_info.value.code


def test_command_writes_both_styles_and_reports(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    assert run_tool(monkeypatch, out, '--style', 'both', '--num-train', 3, '--num-val', 2, '--image-size', 32) == 0
    report = capsys.readouterr().out
    assert f'coco style in {out}' in report and f'voc style in {out}' in report
    counts = count_objects(out)['train']
    assert ['train', '3', *(str(counts[name]) for name in CLASSES)] in [line.split() for line in report.splitlines()]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['out', '--num-train', 0], 'num_train is 0'),
        (['out', '--image-size', 1], 'image_size is 1'),
        (['file'], "file' is a file; expected a folder"),
        (['file/below'], 'cannot write .*Not a directory'),
    ],
)
def test_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / 'file').write_text('')
    code = run_tool(monkeypatch, tmp_path / args[0], *args[1:])
    error = capsys.readouterr().err
    assert code == 2 and len(error.strip().splitlines()) == 1
    assert re.search(message, error)
