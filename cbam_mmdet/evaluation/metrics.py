"""Metrics: COCO's, with and without an annotation file, and Pascal VOC's in both of its modes.

`import cbam_mmdet` does not import MMDetection's metrics, which takes seconds. So a config names them by the package,
as in `type='cbam_mmdet.HotCocoMetric'`: MMEngine then imports them when it builds them. Without the package's name they
need `custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])`, as in
configs/faster_rcnn_r50_voc0712.py.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mmdet.datasets.api_wrappers import COCO, COCOeval, COCOevalMP
from mmdet.evaluation import CocoMetric, VOCMetric
from mmdet.evaluation.functional.mean_ap import tpfp_default
from mmdet.registry import METRICS
from mmengine.logging import print_log
from terminaltables import AsciiTable

from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.coco_eval import Detections, coco_evaluation
from cbam_mmdet.utils.text import abridge

MODES = ('11points', 'area')


@METRICS.register_module()
class VOCDetectionMetric(VOCMetric):
    """Pascal VOC's average precision as its development kit defines it, in both modes, for each class and the mean.

    Detections are sorted by descending score. Each is matched with the object of its class that it overlaps most (by
    IoU, with a width of 1 for a pixel). It is true if this IoU reaches the threshold and no earlier detection has found
    the object, and false otherwise. If the object is marked difficult, it is neither. '11points' (VOC2007) is the mean
    of the best precision at a recall of at least 0, 0.1, ..., 1. 'area' (since 2010) is the area under the monotonic
    precision.

    It differs from its base class, MMDetection's VOCMetric, in these points:

    - It returns both modes and each class's AP, not rounded to three digits.
    - The table names the data set's own classes, also if its folder is called VOC2007.
    - A recall of exactly 0.3, 0.6 or 0.7 reaches that threshold. The values in `np.arange(0, 1.1, 0.1)` are slightly
      greater (the first one also in the kit's `0:0.1:1`). With few objects this changes an AP by up to 1/11 for each
      threshold.
    - Equal scores keep their order, as in the kit. NumPy's default sort may swap them.
    - It starts no processes.

    As in VOCMetric, IoUs are float32. One that differs from the threshold by less than 1e-7 may be above or below it.

    Args:
        eval_mode: the mode of 'mAP' and 'AP_CLASS': '11points' or 'area'.
        iou_thr: the lowest IoU of a true detection.
        collect_device: 'cpu' or 'gpu', as for BaseMetric.
        prefix: the prefix of the metrics' names, by default 'pascal_voc'.
    """

    def __init__(
        self,
        eval_mode: str = '11points',
        iou_thr: float = 0.5,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        if eval_mode not in MODES:
            raise UserError(f'VOCDetectionMetric: eval_mode={eval_mode!r}: expected one of {MODES}')
        super().__init__(iou_thrs=float(iou_thr), eval_mode=eval_mode, collect_device=collect_device, prefix=prefix)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """As VOCMetric. Raises a UserError for detections that are not numbers."""
        require_numbers(data_samples)
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics from the results that `process` collected.

        Args:
            results: for each image its annotations (dict of bboxes (n, 4), labels (n,), bboxes_ignore, labels_ignore)
                and its detections, an array (m, 5) of x1, y1, x2, y2, score for each class.

        Returns:
            mAP (in the main mode), mAP_11points and mAP_area over the classes with an object that is not difficult (NaN
            if no class has one), and AP_CLASS for each of these classes, in the main mode.
        """
        classes = self.dataset_meta['classes']
        curves = {name: _curve(results, label, self.iou_thrs[0]) for label, name in enumerate(classes)}
        scored = {name: curve for name, curve in curves.items() if curve.num_objects}
        means = {mode: float(np.mean([c.ap(mode) for c in scored.values()])) if scored else np.nan for mode in MODES}
        print_log(_table(curves, means), logger='current')
        left_out = [name for name in classes if name not in scored]
        if left_out:
            print_log(
                f'no object to find, hence not part of the mAP: {", ".join(left_out)}',
                logger='current',
                level=logging.WARNING,
            )
        return {
            'mAP': means[self.eval_mode],
            **{f'mAP_{mode}': means[mode] for mode in MODES},
            **{f'AP_{name}': curve.ap(self.eval_mode) for name, curve in scored.items()},
        }


def require_numbers(data_samples: Sequence[dict]) -> None:
    """Refuse detections with a box or a score that is not finite.

    An IoU that is not a number counts as a match, in pycocotools and in others: such a detector would seem perfect.

    Raises:
        UserError: which names the image.
    """
    for sample in data_samples:
        found = sample['pred_instances']
        for key in ('bboxes', 'scores'):
            values = getattr(found.get(key), 'tensor', found.get(key))  # boxes may be a box type of MMDetection's
            if values is not None and not torch.isfinite(torch.as_tensor(values)).all():
                image = sample.get('img_path', sample['img_id'])
                raise UserError(
                    f'the detector gives {key} that are not numbers, in image {image}: '
                    'its training has diverged. Take an earlier checkpoint, or a lower learning rate'
                )


@dataclass
class _Curve:
    """The cumulative counts of true and false detections of one class, arrays of shape (m,).

    Detections of difficult objects are in neither count.
    """

    num_objects: int
    num_difficult: int
    true: np.ndarray
    false: np.ndarray

    @property
    def recall(self) -> float:
        return self.true[-1] / self.num_objects if self.num_objects and len(self.true) else 0.0

    def ap(self, mode: str) -> float:
        precision = self.true / np.maximum(self.true + self.false, 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a greater one
        if mode == 'area':
            return float(np.sum(np.diff(self.true, prepend=0) * best) / self.num_objects)
        # recall >= t / 10 in integers, to avoid the rounding error of 3 * 0.1.
        reached = [best[self.true * 10 >= t * self.num_objects] for t in range(11)]
        return sum(float(b[0]) for b in reached if len(b)) / 11


def _curve(results: list, label: int, iou_thr: float) -> _Curve:
    detections = [found[label] for _, found in results]
    objects = [truth['bboxes'][truth['labels'] == label] for truth, _ in results]
    difficult = [truth['bboxes_ignore'][truth['labels_ignore'] == label] for truth, _ in results]
    order = np.argsort(-np.concatenate([d[:, 4] for d in detections]), kind='stable')
    # The rank takes the place of the score. No two ranks are equal, so MMDetection's unstable sort cannot swap them.
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    true, false, start = np.zeros(len(order), int), np.zeros(len(order), int), 0
    for found, wanted, ignored in zip(detections, objects, difficult, strict=True):
        if len(found):
            part = slice(start, start := start + len(found))
            ranked = np.column_stack([found[:, :4], -place[part]])
            hit, miss = tpfp_default(ranked, wanted, ignored, iou_thr, use_legacy_coordinate=True)
            true[part], false[part] = hit[0], miss[0]
    return _Curve(
        num_objects=sum(map(len, objects)),
        num_difficult=sum(map(len, difficult)),
        true=true[order].cumsum(),
        false=false[order].cumsum(),
    )


def _table(curves: dict[str, _Curve], means: dict[str, float]) -> str:
    rows = [['class', 'objects', 'difficult', 'detections', 'recall', *(f'AP {mode}' for mode in MODES)]]
    for name, curve in curves.items():
        figures = [f'{v:.3f}' for v in (curve.recall, *map(curve.ap, MODES))] if curve.num_objects else ['-'] * 3
        rows.append([name, curve.num_objects, curve.num_difficult, len(curve.true), *figures])
    rows.append(['mAP', '', '', '', '', *(f'{means[mode]:.3f}' for mode in MODES)])
    table = AsciiTable(rows)
    table.inner_footing_row_border = True
    return f'\n{table.table}'


# The places of pycocotools' twelve figures under MMDetection's names, which are those of its own proposal_nums.
COCO_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
RECALL_ITEMS = ('AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000')


@METRICS.register_module()
class HotCocoMetric(CocoMetric):
    """MMDetection's CocoMetric, evaluated by hotcoco where it is installed: the same figures in a fraction of the time.

    It takes the same arguments and returns the same figures under the same names. It differs in these points:

    - The evaluation is hotcoco's. Without hotcoco, and in the rare cases in which its figures might differ, it is
      pycocotools'. The log says which, and why.
    - Detections go to the evaluation without a file. Only `outfile_prefix` and `format_only` write files.
    - A data set with `indices` is scored by the images in it. MMDetection counts the objects of all others as missed.
    - If nothing at all is detected, the table is printed and the figures are returned all the same: 0 where there are
      objects, -1 where there are none. MMDetection returns no figures then, so that `save_best` finds none.

    In a config it is `type='cbam_mmdet.HotCocoMetric'`.
    """

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """As CocoMetric. Raises a UserError for detections that are not numbers."""
        require_numbers(data_samples)
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the figures from the results that `process` collected.

        Args:
            results: for each image its size and annotations, and its detections.

        Returns:
            MMDetection's names and figures, rounded to three digits.
        """
        _require_distinct_images(results)
        if self.format_only:
            return super().compute_metrics(results)
        found = [detections for _, detections in results]
        figures: dict[str, float] = {}
        for metric in self.metrics:
            print_log(f'Evaluating {metric}...', logger='current')
            if metric == 'proposal_fast':
                self.load_truth(results)
                recalls = self.fast_eval_recall(found, self.proposal_nums, self.iou_thrs, logger='current')
                new = {f'AR@{limit}': recall for limit, recall in zip(self.proposal_nums, recalls, strict=True)}
                print_log(''.join(f'\n{name}\t{recall:.4f}' for name, recall in new.items()), logger='current')
            else:
                new = self._figures(metric, self.evaluation(results, metric))
            figures |= new
        if self.outfile_prefix is not None:
            self.results2json(found, self.outfile_prefix)
        return figures

    def load_truth(self, results: list) -> None:
        """Take the ground truth from the results if there is no annotation file."""
        if self._coco_api is None:
            print_log('Converting ground truth to coco format...', logger='current')
            with TemporaryDirectory() as folder:
                prefix = self.outfile_prefix or f'{folder}/truth'
                self._coco_api = COCO(self.gt_to_coco_json([truth for truth, _ in results], prefix))
        if self.cat_ids is None:
            self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta['classes'])
        if self.img_ids is None:
            self.img_ids = self._coco_api.get_img_ids()

    def evaluation(self, results: list, metric: str = 'bbox') -> COCOeval:
        """COCO's evaluation of the results that `process` collected, summarized: its table is printed.

        Args:
            results: those of `process`.
            metric: 'bbox', 'segm', or 'proposal', which does not look at the classes.
        """
        self.load_truth(results)
        iou_type = 'bbox' if metric == 'proposal' else metric
        detections = Detections.of([found for _, found in results], self.cat_ids, iou_type)
        if not len(detections):
            print_log(f'nothing was detected in {len(results)} images', logger='current', level=logging.WARNING)
        evaluation = coco_evaluation(
            self._coco_api,
            detections,
            iou_type,
            COCOevalMP if self.use_mp_eval else COCOeval,
            catIds=self.cat_ids,
            imgIds=self._tested(results),
            maxDets=list(self.proposal_nums),
            iouThrs=self.iou_thrs,
            useCats=int(metric != 'proposal'),
        )
        evaluation.summarize()
        return evaluation

    def _tested(self, results: list) -> list:
        """The images to score: those that were tested, which are not all if the data set has `indices`."""
        tested = {found['img_id'] for _, found in results}
        ids = [image for image in self.img_ids if image in tested]
        if len(ids) < len(self.img_ids):
            print_log(f'scored: the {len(ids)} images that were tested, of {len(self.img_ids)}', logger='current')
        return ids

    def _figures(self, metric: str, evaluation: COCOeval) -> dict[str, float]:
        places = {item: place for place, item in enumerate((*COCO_ITEMS, *RECALL_ITEMS))}
        unknown = [item for item in self.metric_items or () if item not in places]
        if unknown:
            raise KeyError(f'metric item "{unknown[0]}" is not supported')
        # The two ways of MMDetection: of 0.6125 they make 0.613 and 0.612.
        if metric == 'proposal':
            return {item: float(f'{evaluation.stats[places[item]]:.3f}') for item in self.metric_items or RECALL_ITEMS}
        stats = {item: float(round(evaluation.stats[place], 3)) for item, place in places.items()}
        figures = self._class_figures(evaluation) if self.classwise else {}
        copypaste = ' '.join(f'{value:.3f}' for value in evaluation.stats[:6])
        print_log(f'{metric}_mAP_copypaste: {copypaste}', logger='current')
        return figures | {f'{metric}_{item}': stats[item] for item in self.metric_items or COCO_ITEMS}

    def _class_figures(self, evaluation: COCOeval) -> dict[str, float]:
        """The AP of each class, over all IoUs, at two, and by the size of the objects, in a table."""
        precision = evaluation.eval['precision'][..., -1]  # (IoUs, recalls, classes, areas)
        # COCOeval sorts the categories by their ids, which need not be the order of the classes.
        names = [category['name'] for category in self._coco_api.load_cats(list(evaluation.params.catIds))]
        rows = []
        for i in range(len(names)):
            parts = [precision[:, :, i, 0], precision[0:1, :, i, 0], precision[5:6, :, i, 0]]  # IoUs 0.5 and 0.75
            parts += [precision[:, :, i, area] for area in (1, 2, 3)]
            known = [part[part > -1] for part in parts]
            rows.append([float(round(part.mean(), 3)) if part.size else math.nan for part in known])
        table = [['category', *COCO_ITEMS], *([name, *map(str, row)] for name, row in zip(names, rows, strict=True))]
        print_log(f'\n{AsciiTable(table).table}', logger='current')
        return {f'{name}_precision': row[0] for name, row in zip(names, rows, strict=True)}


def _require_distinct_images(results: list) -> None:
    """Refuse two images of one id, whose objects and detections COCO's evaluation would mix.

    Raises:
        UserError: which names some of the ids.
    """
    counts = Counter(found['img_id'] for _, found in results)
    twice = [str(image) for image, count in counts.items() if count > 1]
    if twice:
        raise UserError(
            f'{len(twice)} image ids occur several times among the {len(results)} images that were tested '
            f'({abridge(twice)}): a data set is repeated, or several are joined that number their images alike. COCO '
            'needs one annotation file with ids of their own'
        )


@METRICS.register_module()
class SampleCocoMetric(HotCocoMetric):
    """COCO's metric for data sets without a COCO annotation file. It takes the ground truth from each sample.

    MMDetection's CocoMetric needs the file unless the test pipeline packs 'instances'. This metric uses the boxes of
    `LoadAnnotations`, so it supports every pipeline that VOCMetric supports. Difficult objects become COCO's crowds
    (`iscrowd`), whose detections are ignored. The area of a box is width times height.

    Args:
        **kwargs: those of CocoMetric, except ann_file.
    """

    truth_in_samples = True  # no transform may change the boxes, see datasets.checks

    def __init__(self, **kwargs) -> None:
        if kwargs.get('ann_file'):
            raise UserError('SampleCocoMetric takes no ann_file; with one, use HotCocoMetric')
        super().__init__(**kwargs)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Collect the detections and the ground truth of a batch.

        Args:
            data_batch: not used.
            data_samples: each with `pred_instances`, `gt_instances` and `ignored_instances`.
        """
        super().process(data_batch, [{**sample, 'instances': _instances(sample)} for sample in data_samples])


def _instances(sample: dict) -> list[dict]:
    return [
        dict(bbox=box, bbox_label=label, ignore_flag=flag)
        for flag, key in enumerate(('gt_instances', 'ignored_instances'))
        for box, label in zip(sample[key]['bboxes'].tolist(), sample[key]['labels'].tolist(), strict=True)
    ]
