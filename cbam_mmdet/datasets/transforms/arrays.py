"""The test pipeline for images in memory."""

from __future__ import annotations

from mmcv.transforms import Compose
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import set_default_scope


def array_pipeline(cfg: Config) -> Compose:
    """The test pipeline of a config for images in memory: it takes dict(img=(H, W, 3) BGR, ...).

    Raises:
        UserError: for a config that reads images in grey.
    """
    set_default_scope(cfg)  # a program may have built another model since this one
    pipeline = get_test_pipeline_cfg(cfg.copy())
    color_type = pipeline[0].get('color_type')
    if str(color_type).startswith('grayscale'):
        raise UserError(
            f'the test pipeline reads images as color_type={color_type!r}, which tools/test.py does: the tools for a '
            "user's own images and for export read them in colour (3 channels) only"
        )
    load = dict(type='mmdet.LoadImageFromNDArray', to_float32=pipeline[0].get('to_float32', False))
    return Compose([load, *pipeline[1:]])


def place_of_image(sample: DetDataSample) -> tuple[int, int, int, int]:
    """The (top, left, bottom, right) of an image in a network's input, without what a Pad of the pipeline added.

    `img_shape` is that after the whole pipeline. CenterNet's RandomCenterCropPad adds on all sides, and says where the
    image is. A sample that says neither this nor how it was resized was padded by nothing.
    """
    height, width = sample.img_shape[:2]
    if 'border' in sample.metainfo:
        top, bottom, left, right = (int(side) for side in sample.border)
        return top, left, bottom, right
    if 'scale_factor' not in sample.metainfo:
        return 0, 0, height, width
    x, y = sample.scale_factor[:2]
    resized = round(sample.ori_shape[0] * y), round(sample.ori_shape[1] * x)
    return 0, 0, min(height, resized[0]), min(width, resized[1])
