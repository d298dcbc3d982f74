"""A hook that lets several processes validate one model."""

from __future__ import annotations

from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner


class ValidateOneModelHook(Hook):
    """Give every process the buffers of the first one before a validation.

    In training each process has statistics of BatchNorm of its own: MMEngine's DistributedDataParallel broadcasts no
    buffers. The checkpoint holds those of the first process. So a validation would score another model than the
    checkpoint, and the part of a process would change with a resumption.
    """

    priority = 'LOWEST'  # when an EMAHook has put the averaged weights into the model

    def before_val_epoch(self, runner: Runner) -> None:
        if get_world_size() > 1:
            for buffer in runner.model.buffers():
                broadcast(buffer)
