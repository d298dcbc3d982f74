"""The test pipeline for images in memory."""

from __future__ import annotations

from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config

from cbam_mmdet.utils.config import set_default_scope


def array_pipeline(cfg: Config) -> Compose:
    """The test pipeline of a config for images in memory: it takes dict(img=(H, W, 3) BGR, ...)."""
    set_default_scope(cfg)  # a program may have built another model since this one
    pipeline = get_test_pipeline_cfg(cfg.copy())
    return Compose([dict(type='mmdet.LoadImageFromNDArray'), *pipeline[1:]])
