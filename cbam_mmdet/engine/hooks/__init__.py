"""Hooks for training and testing.

The tools register them on the Runner and not in the config, so the config in a work dir works without this package's
hooks.
"""

from cbam_mmdet.engine.hooks.annotated_frame import AnnotatedFrameHook
from cbam_mmdet.engine.hooks.check_images import CheckImagesHook
from cbam_mmdet.engine.hooks.checkpoint_fit import CheckpointFitHook
from cbam_mmdet.engine.hooks.finite_loss import FiniteLossHook
from cbam_mmdet.engine.hooks.gate_statistics import GateStatisticsHook
from cbam_mmdet.engine.hooks.one_model import ValidateOneModelHook
from cbam_mmdet.engine.hooks.resume_exactly import ResumeExactlyHook
from cbam_mmdet.engine.hooks.safe_checkpoint import SafeCheckpointHook
from cbam_mmdet.engine.hooks.stop_signal import StopSignalHook
from cbam_mmdet.engine.hooks.validate_resumed import ValidateResumedHook

__all__ = [
    'AnnotatedFrameHook',
    'CheckImagesHook',
    'CheckpointFitHook',
    'FiniteLossHook',
    'GateStatisticsHook',
    'ResumeExactlyHook',
    'SafeCheckpointHook',
    'StopSignalHook',
    'ValidateOneModelHook',
    'ValidateResumedHook',
]
