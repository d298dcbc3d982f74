"""The test pipeline for images in memory."""

from __future__ import annotations

from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config


def array_pipeline(cfg: Config) -> Compose:
    """The test pipeline of a config for images in memory: it takes dict(img=(H, W, 3) BGR, ...)."""
    pipeline = get_test_pipeline_cfg(cfg.copy())
    return Compose([dict(type='mmdet.LoadImageFromNDArray'), *pipeline[1:]])
