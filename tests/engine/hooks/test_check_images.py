"""Images are checked by whatever pipeline a training takes."""

from types import SimpleNamespace

from mmdet.engine.hooks import PipelineSwitchHook
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner

from cbam_mmdet.datasets.transforms.loading import LoadCheckedImage
from cbam_mmdet.engine.hooks.check_images import CheckImagesHook
from cbam_mmdet.utils.config import set_default_scope


def test_the_pipeline_that_another_hook_switches_to():
    """RTMDet's and YOLOX's configs do so for the last epochs."""
    set_default_scope(ConfigDict(default_scope='mmdet'))
    load = dict(type='LoadImageFromFile')
    loader = SimpleNamespace(dataset=SimpleNamespace(pipeline=SimpleNamespace(transforms=[])))
    runner = SimpleNamespace(_hooks=[], epoch=0, train_dataloader=loader, logger=SimpleNamespace(info=print))
    for hook in (CheckImagesHook(), PipelineSwitchHook(switch_epoch=0, switch_pipeline=[load])):
        Runner.register_hook(runner, hook)
    for hook in runner._hooks:
        assert isinstance(hook, Hook)
        hook.before_train_epoch(runner)
    [transform] = loader.dataset.pipeline.transforms
    assert type(transform) is LoadCheckedImage and transform.on_error == 'skip'
