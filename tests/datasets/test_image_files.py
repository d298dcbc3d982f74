"""Images as files: turned by their EXIF data, no files at all, and too large to decode."""

import itertools
import os
import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from PIL import Image

from cbam_mmdet.datasets.transforms import loading
from cbam_mmdet.datasets.transforms.loading import LoadCheckedImage, read_image
from cbam_mmdet.engine.hooks.annotated_frame import AnnotatedFrameHook
from cbam_mmdet.errors import UserError

WHITE = slice(2, 12), slice(30, 50)  # rows and columns of a box in the frame that is stored, 20 x 60


def photo(path, orientation=None):
    image = np.zeros((20, 60, 3), np.uint8)
    image[WHITE] = 255
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(image).save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_boxes_in_the_stored_frame(tmp_path, orientation, logged, monkeypatch):
    """The annotation's width and height say which frame its boxes mean."""
    path = photo(tmp_path / 'a.png', orientation)
    monkeypatch.setattr(loading, '_turns', itertools.count())
    for _ in range(2):
        sample = LoadCheckedImage().transform(dict(img_path=path, height=20, width=60))
    assert sample['img'].shape[:2] == sample['img_shape'] == (20, 60)
    assert sample['img'][WHITE].min() == 255 and sample['img'].sum() == 255 * 3 * 200
    assert sum('is not turned by its EXIF orientation' in message for message in logged.messages) == 1


@pytest.mark.parametrize('frame', ['stored', 'turned'])
def test_detections_are_drawn_in_the_frame_of_the_annotation(tmp_path, frame, monkeypatch):
    """MMDetection's hook for --show-dir reads the image once more, and turns it."""
    path = photo(tmp_path / 'a.png', 6)
    stored = np.asarray(Image.open(path))
    image = stored if frame == 'stored' else np.rot90(stored, -1)
    visualizer = DetLocalVisualizer.get_instance(f'{frame} frame')
    drawn = []
    monkeypatch.setattr(visualizer, 'add_datasample', lambda name, image, sample, **how: drawn.append(image))
    runner = SimpleNamespace(visualizer=visualizer, timestamp='now', work_dir=str(tmp_path), iter=0)
    sample = DetDataSample(metainfo=dict(img_path=str(path), ori_shape=image.shape[:2]))
    ours, theirs = AnnotatedFrameHook(), DetVisualizationHook(draw=True)
    ours.before_run(runner)
    theirs.after_test_iter(runner, 0, {}, [sample])
    ours.after_run(runner)
    assert np.array_equal(drawn[0], image)
    assert 'draw_in_frame' not in visualizer.add_datasample.__qualname__


@pytest.mark.parametrize('orientation', [6, 8])
def test_boxes_in_the_turned_frame(tmp_path, orientation):
    path = photo(tmp_path / 'a.png', orientation)
    sample = LoadCheckedImage().transform(dict(img_path=path, height=60, width=20))
    turned = np.rot90(np.asarray(Image.open(path)), {6: -1, 8: 1}[orientation])
    assert np.array_equal(sample['img'], turned)
    assert np.array_equal(read_image(path), turned), 'nothing is annotated: as it is to be seen'


def test_another_size_is_refused(tmp_path):
    path = photo(tmp_path / 'a.png', 6)
    for size in (dict(height=20, width=61), dict(height=30, width=10)):
        with pytest.raises(UserError, match='its annotation says'):
            LoadCheckedImage().transform(dict(img_path=path, **size))
    with pytest.raises(UserError, match='its annotation says 20x60'):  # on its side, and no EXIF data say so
        LoadCheckedImage().transform(dict(img_path=photo(tmp_path / 'b.png'), height=60, width=20))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    for path in (tmp_path / 'pipe.jpg', tmp_path, '/dev/zero'):
        with pytest.raises(UserError, match='is no file'):
            read_image(str(path))
    with pytest.raises(UserError, match='cannot be read'):
        read_image('a\0b.jpg')


def png(width, height):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(9))) + chunk(b'IEND', b'')


@pytest.mark.parametrize('size', [(40_000, 40_000), (2**31 - 1, 2), (20_000, 20_000)])
def test_a_small_file_of_a_huge_picture(tmp_path, size):
    path = tmp_path / 'a.png'
    path.write_bytes(png(*size))
    with pytest.raises(UserError, match=f'{path} has {size[0]}x{size[1]} pixels by its header.*CBAM_MAX_PIXELS'):
        read_image(str(path))


def test_the_limit_can_be_set(tmp_path, monkeypatch):
    path = photo(tmp_path / 'a.png')
    monkeypatch.setattr(loading, 'MAX_PIXELS', 1199)
    with pytest.raises(UserError, match='The limit is 1199 pixels'):
        read_image(path)
    monkeypatch.setattr(loading, 'MAX_PIXELS', 1200)
    read_image(path)


def test_what_opencv_refuses_is_a_message(tmp_path, monkeypatch):
    path = photo(tmp_path / 'a.png')

    def refuse(*args, **kwargs):
        raise cv2.error('limit')

    monkeypatch.setattr(loading.mmcv, 'imfrombytes', refuse)
    with pytest.raises(UserError, match=r'a\.png cannot be decoded by OpenCV'):
        read_image(path)
