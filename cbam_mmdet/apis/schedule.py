"""Does the schedule of the learning rate end where the training ends?"""

from __future__ import annotations

import logging

from mmengine.config import Config

from cbam_mmdet.utils.logging import log

ANNEALING = ('CosineAnnealing', 'Poly')  # they have a length of their own, and reach their lowest value at its end


def warn_of_another_length(cfg: Config) -> None:
    """Log a warning if the last scheduler anneals to an end that is not the training's, as after `max_epochs=N` alone.

    Steps and warm-ups may end before the training does.
    """
    by_epoch = bool(cfg.train_cfg.get('max_epochs'))
    length = cfg.train_cfg.get('max_epochs' if by_epoch else 'max_iters')
    given = cfg.get('param_scheduler')
    schedulers = given if isinstance(given, (list, tuple)) else [given]
    counted = [
        (f'param_scheduler.{number}' if schedulers is given else 'param_scheduler', scheduler)
        for number, scheduler in enumerate(schedulers)
        if isinstance(scheduler, dict) and 'type' in scheduler and scheduler.get('by_epoch', True) == by_epoch
    ]
    if not counted or not length:
        return
    place, last = counted[-1]
    kind = last['type'] if isinstance(last['type'], str) else last['type'].__name__
    if not kind.rpartition('.')[2].startswith(ANNEALING):
        return
    begin = last.get('begin', 0)
    wanted = {'end': length, 'T_max': length - begin}
    other = [key for key in wanted if last.get(key) not in (None, wanted[key])]
    if other:
        says = ', '.join(f'{key}={last[key]}' for key in other)
        options = ' '.join(f'{place}.{key}={wanted[key]}' for key in other)
        log(
            f'the training has {length} {"epochs" if by_epoch else "iterations"}, and its schedule {kind} another '
            f'length ({says}): to give it that of the training: --cfg-options {options}',
            logging.WARNING,
        )
