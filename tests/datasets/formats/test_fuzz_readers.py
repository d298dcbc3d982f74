"""Damaged data sets of every format, at random: each is read, or refused by a UserError, and the folder stays as it is.

Hypothesis draws the damages, the same ones each time. By default it tries a hundred of each format, with CBAM_FUZZ=2000
so many.
"""

import datetime
import json
import os
import re

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import randoms

from cbam_mmdet.datasets.formats.as_coco import duplicates, write_coco_files
from cbam_mmdet.datasets.formats.recognize import read_folder
from cbam_mmdet.errors import UserError

globox = pytest.importorskip('globox', reason="needs pip install '.[dev]'")

COUNT = int(os.environ.get('CBAM_FUZZ', 100))
ODD = (
    'null', 'true', '-1', '0', '1e400', '-1e400', 'NaN', 'Infinity', '1' * 5000, '""', '" "', '"\\u0000"', '"../../x"',
    '"/"', '"a' + 'b' * 300 + '"', '"\\ud800"', '[]', '[[]]', '{}', '[1, 2]', '1.5', '"cat"',
)  # fmt: skip
WORDS = (
    '', ' ', '0', '-1', 'nan', 'inf', '1e999', '9' * 400, '\0', '..', '/', '../..', 'a' * 300, 'é', '\ud800', '<',
    '&x;', '[', '{', '!!python/name:os.system', '*a', '&a [*a]', 'train', 'val', '0.5',
)  # fmt: skip


def make(folder, style):
    """A small data set of a format, which is read without complaint."""
    images = folder / 'images' if style in ('cvat', 'voc', 'coco') else folder
    if style == 'yolo':
        images = folder / 'images/train'
    images.mkdir(parents=True, exist_ok=True)
    annotations = []
    for i in range(3):
        cv2.imwrite(str(images / f'{i}.jpg'), np.zeros((30, 40, 3), np.uint8))
        box = globox.BoundingBox(label='cat', xmin=2, ymin=3, xmax=20 + i, ymax=25)
        annotations.append(globox.Annotation(f'{i}.jpg', (40, 30), [box]))
    annotations = globox.AnnotationSet(annotations)
    if style == 'yolo':
        (folder / 'labels').mkdir()
        annotations.save_yolo_darknet(folder / 'labels/train', label_to_id={'cat': 0})
        (folder / 'data.yaml').write_text('path: .\ntrain: images/train\nnc: 1\nnames:\n  0: cat\n')
    elif style == 'darknet':
        annotations.save_yolo_darknet(folder, label_to_id={'cat': 0})
        (folder / 'obj.names').write_text('cat\n')
    elif style == 'cvat':
        annotations.save_cvat(folder / 'annotations.xml')
    elif style == 'labelme':
        annotations.save_labelme(folder)
    elif style == 'voc':
        annotations.save_pascal_voc(folder / 'annotations')
        (folder / 'ImageSets/Main').mkdir(parents=True)
        (folder / 'ImageSets/Main/train.txt').write_text('0\n1\n')
        (folder / 'ImageSets/Main/val.txt').write_text('2\n')
    else:
        annotations.save_coco(folder / 'labels.json', auto_ids=True)
    read_folder(folder)


def damage(data, suffix, random):
    """The bytes of a file with one to three damages."""
    for _ in range(random.randint(1, 3)):
        kind = random.choice(('cut', 'byte', 'value', 'value', 'value', 'line', 'nest'))
        if kind == 'cut':
            data = data[: random.randrange(len(data) + 1)]
        elif kind == 'byte' and data:
            i = random.randrange(len(data))
            data = data[:i] + bytes([random.randrange(256)]) + data[i + 1 :]
        elif kind == 'line':
            lines = data.splitlines(keepends=True)
            if lines:
                i = random.randrange(len(lines))
                lines[i : i + 1] = random.choice(([], [lines[i]] * 2))
            data = b''.join(lines)
        elif kind == 'nest':
            data = (b'[' if suffix == '.json' else b'<a>') * 3000 + data
        else:
            pattern = rb'-?\d+\.?\d*|"[^"]*"|null' if suffix == '.json' else rb'[\w.-]+'
            found = [*re.finditer(pattern, data)]
            if found:
                match = random.choice(found)
                new = random.choice(ODD if suffix == '.json' else WORDS).encode('utf-8', 'surrogatepass')
                data = data[: match.start()] + new + data[match.end() :]
    return data


@pytest.mark.parametrize('style', ['coco', 'voc', 'yolo', 'darknet', 'cvat', 'labelme'])
def test_a_damaged_data_set_is_read_or_refused(style, tmp_path):
    root = tmp_path / 'data'
    make(root, style)
    files = sorted(path for path in root.rglob('*') if path.is_file() and path.suffix != '.jpg')
    whole = {path: path.read_bytes() for path in files}
    outcomes = {'read': 0, 'refused': 0}

    @settings(
        max_examples=COUNT,
        deadline=datetime.timedelta(seconds=60),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(randoms(use_true_random=False))
    def check(random):
        path = random.choice(files)
        damaged = damage(whole[path], path.suffix, random)
        path.write_bytes(damaged)
        try:
            found = read_folder(str(root))
            duplicates(found, root)
            for written in write_coco_files(found, tmp_path / 'run').values():
                with open(written, encoding='utf-8') as file:
                    json.load(file)
            outcomes['read'] += 1
        except UserError as error:
            assert len(str(error)) < 3000
            outcomes['refused'] += 1
        finally:
            left = {p: p.read_bytes() for p in root.rglob('*') if p.is_file() and p.suffix != '.jpg'}
            assert left == {**whole, path: damaged}
            path.write_bytes(whole[path])

    check()
    assert min(outcomes.values()) > 0, outcomes  # else nothing was damaged, or everything
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'run']
