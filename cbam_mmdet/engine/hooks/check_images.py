"""A hook that lets the pipelines name an image that cannot be read."""

from __future__ import annotations

from mmcv.transforms import LoadImageFromFile
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.datasets.transforms.loading import LoadCheckedImage
from cbam_mmdet.errors import UserError


@HOOKS.register_module()
class CheckImagesHook(Hook):
    """Let every pipeline name an image that it cannot read. MMCV's own loader fails inside OpenCV.

    In validation and test a broken image always raises an error, because leaving it out would change the score.

    Args:
        broken_images: for training images, 'skip' (name the image and take another one) or 'raise'.

    Raises:
        UserError: if broken_images is neither, and during the run for a broken image.
    """

    priority = 'LOW'  # after MMDetection's PipelineSwitchHook

    def __init__(self, broken_images: str = 'skip') -> None:
        if broken_images not in ('skip', 'raise'):
            raise UserError(f"broken_images={broken_images!r} in the config: expected 'skip' or 'raise'")
        self.broken_images = broken_images

    def before_train(self, runner: Runner) -> None:
        _check_images(runner.train_dataloader.dataset, self.broken_images)

    def before_train_epoch(self, runner: Runner) -> None:
        _check_images(runner.train_dataloader.dataset, self.broken_images)

    def before_val(self, runner: Runner) -> None:
        _check_images(runner.val_dataloader.dataset, 'raise')

    def before_test(self, runner: Runner) -> None:
        _check_images(runner.test_dataloader.dataset, 'raise')


def _check_images(dataset: object, on_error: str) -> None:
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            _check_images(inner, on_error)
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    for i, transform in enumerate(transforms):
        if type(transform) is LoadImageFromFile:
            transforms[i] = LoadCheckedImage.like(transform, on_error)
