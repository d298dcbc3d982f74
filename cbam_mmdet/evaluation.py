"""Metrics for data sets in Pascal VOC's format: VOC's mAP in both modes with every class's AP, and COCO's mAP.

A config that uses them imports this module beside the package (MMDetection's metrics take seconds to import):
`custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np
from mmdet.evaluation import CocoMetric, VOCMetric, eval_map
from mmdet.registry import METRICS
from mmengine.logging import print_log
from terminaltables import AsciiTable

from .errors import UserError, near

MODES = ('11points', 'area')


@METRICS.register_module()
class PascalVOCMetric(VOCMetric):
    """VOC's mean average precision, of the 2007 challenge (11 points) and of the later ones (area), in one evaluation.

    It differs from MMDetection's VOCMetric, whose matching it takes, in this: both modes; each class's AP is among the figures,
    by the names of the data set (VOCMetric prints VOC's 20 names for whatever classes lie in a VOC2007/ folder); nothing is
    rounded; a recall of exactly 3/10 or 7/10 counts at the points 0.3 and 0.7, where sums of 0.1 miss them by a rounding.
    As in the devkit, boxes are of whole pixels (a box of x1 = x2 is one pixel wide), and difficult objects neither count nor harm.
    Classes without an object that counts have no AP and are left out of the mean.

    Args:
        iou_thrs: IoU from which a detection is right; of several, `mAP` is the mean.
        eval_mode: the mode of `mAP`, `AP50` and the classes: '11points' or 'area'.
        kwargs: see VOCMetric.

    Figures: `mAP`, `mAP_11points`, `mAP_area`, `AP50` (for iou_thrs=0.5), and `AP_<class>`.
    """

    def __init__(self, iou_thrs: float | Sequence[float] = 0.5, eval_mode: str = '11points', **kwargs) -> None:
        if eval_mode not in MODES:
            raise UserError(
                f'PascalVOCMetric: eval_mode={eval_mode!r}, expected one of {list(MODES)}{near(eval_mode, MODES)}'
            )
        super().__init__(
            iou_thrs=[iou_thrs] if isinstance(iou_thrs, float) else list(iou_thrs), eval_mode=eval_mode, **kwargs
        )

    def compute_metrics(self, results: list) -> dict[str, float]:
        if self.metric != 'mAP':
            return super().compute_metrics(results)
        truths, detections = zip(*results, strict=True)
        names = self.dataset_meta['classes']
        figures: dict[str, float] = {}
        by_class: dict[str, list[float]] = {}
        means: dict[str, list[float]] = {mode: [] for mode in MODES}
        for threshold in self.iou_thrs:
            _, classes = eval_map(
                detections, truths, iou_thr=threshold, dataset=names, logger='silent', use_legacy_coordinate=True
            )
            aps = {mode: [average_precision(c['recall'], c['precision'], mode) for c in classes] for mode in MODES}
            counted = [i for i, c in enumerate(classes) if c['num_gts']]
            for mode in MODES:
                means[mode].append(float(np.mean([aps[mode][i] for i in counted])) if counted else 0.0)
            for i in counted:
                by_class.setdefault(names[i], []).append(aps[self.eval_mode][i])
            figures[f'AP{round(threshold * 100):02d}'] = means[self.eval_mode][-1]
            self._print(threshold, names, classes, aps, {mode: values[-1] for mode, values in means.items()})
        mean = {mode: float(np.mean(values)) for mode, values in means.items()}
        return {
            'mAP': mean[self.eval_mode],
            **{f'mAP_{mode}': value for mode, value in mean.items()},
            **figures,
            **{f'AP_{name}': float(np.mean(values)) for name, values in by_class.items()},
        }

    def _print(self, threshold: float, names: Sequence[str], classes: list[dict], aps: dict, mean: dict) -> None:
        rows = [['class', 'objects', 'detections', 'recall', 'AP (11 points)', 'AP (area)']]
        for i, (name, c) in enumerate(zip(names, classes, strict=True)):
            recall = c['recall'][-1] if c['recall'].size else 0.0
            figures = [f'{value:.3f}' for value in (recall, *(aps[mode][i] for mode in MODES))]
            rows.append([name, c['num_gts'], c['num_dets'], *(figures if c['num_gts'] else '---')])
        rows.append(['mean', '', '', '', *(f'{mean[mode]:.3f}' for mode in MODES)])
        table = AsciiTable(rows)
        table.inner_footing_row_border = True
        print_log(f'\nPascal VOC, IoU >= {threshold}\n{table.table}', logger='current')
        lacking = [name for name, c in zip(names, classes, strict=True) if not c['num_gts']]
        if lacking:
            message = f'left out of the mean, as they have no object (that is not difficult): {", ".join(lacking)}'
            print_log(message, logger='current', level=logging.WARNING)


def average_precision(recall: np.ndarray, precision: np.ndarray, mode: str) -> float:
    """AP of one class, as the devkit's VOCap.m (area) or VOCevaldet.m of 2007 (11 points) defines it.

    Args:
        recall, precision: shape (num_detections,), after each detection in the order of descending score.
        mode: '11points', the mean over t = 0, 0.1, ..., 1 of the best precision at a recall of at least t; or 'area', the
            area under the precision, made monotonous from the right, over the recall.
    """
    best = np.maximum.accumulate(precision[::-1].astype(np.float64))[::-1]
    if mode == '11points':
        # The recall rises, so the best precision at a recall of at least t stands at the first such place.
        first = np.searchsorted(recall, np.arange(11) / 10)
        return float(np.append(best, 0.0)[first].sum() / 11)
    return float((np.diff(recall, prepend=0.0) * best).sum())


@METRICS.register_module()
class VOCCocoMetric(CocoMetric):
    """COCO's twelve figures on a data set that has no COCO annotation file, such as one in Pascal VOC's format.

    The truth is taken from what the test pipeline loads (after Resize, so that the boxes are those of the original image, as
    all of MMDetection's test pipelines do). Difficult objects are treated as COCO's crowds: ignored.

    Args:
        kwargs: see MMDetection's CocoMetric. Unlike there, `proposal_nums` is COCO's own (1, 10, 100) by default.
    """

    def __init__(self, proposal_nums: Sequence[int] = (1, 10, 100), **kwargs) -> None:
        super().__init__(proposal_nums=proposal_nums, **kwargs)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        super().process(data_batch, [{**copy.copy(sample), 'instances': _instances(sample)} for sample in data_samples])


def _instances(sample: dict) -> list[dict]:
    """The truth of one image, as MMDetection's data sets write it."""
    return [
        dict(bbox=box, bbox_label=label, ignore_flag=flag)
        for flag, key in enumerate(('gt_instances', 'ignored_instances'))
        for box, label in zip(sample[key]['bboxes'].tolist(), sample[key]['labels'].tolist(), strict=True)
    ]
