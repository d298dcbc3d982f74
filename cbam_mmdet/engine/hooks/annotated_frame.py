"""A hook that draws detections on an image in the frame of its annotation, each into a file of its own."""

from __future__ import annotations

import contextlib
from pathlib import PurePath
from typing import Any

import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from cbam_mmdet.compat.patches import replaced
from cbam_mmdet.datasets.transforms.loading import read_image


class AnnotatedFrameHook(Hook):
    """Give the visualizer an image as the detector saw it.

    MMDetection's DetVisualizationHook reads the image again, and turns it by its EXIF orientation. Where the annotation
    is of the image as it is stored, the boxes would lie beside the objects (see read_image).
    """

    def __init__(self) -> None:
        self.changes = contextlib.ExitStack()
        self.files: dict[str, str] = {}  # of pictures, each with its image

    def before_run(self, runner: Runner) -> None:
        draw = runner.visualizer.add_datasample

        def draw_in_frame(name: str, image: np.ndarray, data_sample: Any = None, *args: Any, **kwargs: Any) -> None:
            size = data_sample.get('ori_shape') if data_sample is not None else None
            if size and tuple(size) == image.shape[1::-1] != image.shape[:2]:
                image = mmcv.bgr2rgb(read_image(data_sample.img_path, size=tuple(size)))
            if kwargs.get('out_file') and data_sample is not None:
                kwargs['out_file'] = self._own_file(kwargs['out_file'], data_sample.img_path)
            draw(name, image, data_sample, *args, **kwargs)

        self.changes.enter_context(replaced(runner.visualizer, add_datasample=draw_in_frame))

    def _own_file(self, file: str, image: str) -> str:
        """The file for the picture of an image, with more of its path in the name where another image has that name."""
        parts = PurePath(image).parts
        names = ['_'.join(parts[-count:]) for count in range(1, len(parts))]
        files = [str(PurePath(file).with_name(name)) for name in names]
        return next((path for path in files if self.files.setdefault(path, image) == image), file)

    def after_run(self, runner: Runner) -> None:
        self.changes.close()
