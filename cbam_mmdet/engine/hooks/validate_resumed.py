"""A hook that makes up for a validation in which a training was stopped or killed."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MessageHub, print_log
from mmengine.runner import EpochBasedTrainLoop, Runner

from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.engine.distributed import in_first_process
from cbam_mmdet.engine.hooks.resume_exactly import EPOCH_PROGRESS
from cbam_mmdet.engine.scalars import is_validation, metrics_of, training_logs


class ValidateResumedHook(Hook):
    """Validate a resumed training at once where the validation of its checkpoint is missing in the work dir.

    A checkpoint is written before the validation of its epoch. MMEngine goes on with the next epoch from it. The scores
    of the epoch would be missing, and with `save_best` the best weights could be lost to a worse checkpoint. Where the
    logs do not tell whether it was done, it is done again: `save_best='auto'`, and a loop of iterations whose
    LoggerHook counts validations by epochs.
    """

    priority = 'LOWEST'  # when all other hooks are ready for a validation

    def __init__(self) -> None:
        self.done: int | None = None  # the finished batches of the checkpoint's epoch, None if it does not say

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.done = (meta_of(checkpoint).get(EPOCH_PROGRESS) or {}).get('done')

    def before_train(self, runner: Runner) -> None:
        unit = 'epoch' if isinstance(runner.train_loop, EpochBasedTrainLoop) else 'iteration'
        step = self._validated_step(runner)
        if step and in_first_process(lambda: lacks_validation(runner, step)):
            print_log(
                f'no scores of {unit} {step}, from which this training goes on, are in the logs: it is validated first',
                logger='current',
            )
            runner.val_loop.run()

    def _validated_step(self, runner: Runner) -> int:
        """The epoch, or the iteration, after which the resumed training validates, or 0 if it does not."""
        loop = runner.train_loop
        if runner.val_loop is None:
            return 0
        if isinstance(loop, EpochBasedTrainLoop):
            step, last = loop.epoch, loop.max_epochs
            done = loop.iter - step * len(loop.dataloader) if self.done is None else self.done
            if done:
                return 0
        else:
            step, last = loop.iter, loop.max_iters
        loop._decide_current_val_interval()
        due = step >= loop.val_begin and (step % loop.val_interval == 0 or step == last)
        return step if due else 0


def lacks_validation(runner: Runner, step: int) -> bool:
    """Whether the run's logs lack the scores of a step, or these are better than the best that the checkpoint knows."""
    rows = [row for _, rows in training_logs(runner.work_dir) for row in rows if is_validation(row)]
    scores: list[dict[str, Any]] = [metrics_of(row) for row in rows if row.get('step') == step]
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best]
    return not scores or any(_missed(hook, scores[-1], runner.message_hub) for hook in hooks)


def _missed(hook: CheckpointHook, scores: dict[str, float], hub: MessageHub) -> bool:
    for key in hook.key_indicators:
        if key not in scores:  # also for 'auto', which a validation replaces by the first score
            return True
        name = 'best_score' if len(hook.key_indicators) == 1 else f'best_score_{key}'
        best = hub.runtime_info.get(name)
        if best is None or hook.is_better_than[key](scores[key], best):
            return True
    return False
