"""Score the detections of a test set by COCO's and Pascal VOC's evaluators, and list the outcome for each image."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from mmdet.datasets.api_wrappers import COCOeval
from mmdet.registry import DATASETS
from mmengine.config import Config

from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.coco_eval import HotCocoEval
from cbam_mmdet.evaluation.metrics import MODES, HotCocoMetric, SampleCocoMetric, VOCDetectionMetric
from cbam_mmdet.utils.config import evaluators_of, set_default_scope

# The names of COCOeval's figures, in the order of its `stats`.
COCO_FIGURES = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AR@1', 'AR@10', 'AR@100', 'AR_s', 'AR_m', 'AR_l')
AREAS = ('all', 'small', 'medium', 'large')
# The kinds of errors of TIDE, with hotcoco's names of them.
ERRORS = {
    'classification': 'Cls',
    'localization': 'Loc',
    'both': 'Both',
    'duplicate': 'Dupe',
    'background': 'Bkg',
    'missed': 'Miss',
}


@dataclass
class Box:
    """An object or a detection. Its box is x, y, width, height in pixels. The score of an object is None."""

    xywh: tuple[float, float, float, float]
    label: str
    score: float | None = None


@dataclass
class Outcome:
    """The result of a detector for one image at an IoU of 0.5, with the detections that reach the score threshold.

    The image's size is (height, width) as its annotation says.

    Objects that COCO ignores (crowds, difficult ones) and their detections are in none of the lists.
    """

    path: str
    size: tuple[int, int] | None = None
    missed: list[Box] = field(default_factory=list)
    found: list[Box] = field(default_factory=list)
    false: list[Box] = field(default_factory=list)
    objects: list[Box] = field(default_factory=list)


@dataclass
class ErrorKind:
    """One kind of errors of a run, at an IoU of 0.5.

    Args:
        count: how many detections, or objects for 'missed', are errors of this kind.
        delta_ap: how much greater the AP at an IoU of 0.5 would be without them.
    """

    count: int
    delta_ap: float


@dataclass
class Scores:
    """The scores of a run's detections.

    Args:
        coco: COCO's evaluation, accumulated and summarized.
        voc: the figures of VOCDetectionMetric.
        voc_mode: the mode of its AP of each class, '11points' or 'area'.
        classes: the class names, in the order of the evaluation.
        paths: the image file of each image id.
        sizes: its (height, width), as the annotation says.
    """

    coco: COCOeval
    voc: dict[str, float]
    voc_mode: str
    classes: tuple[str, ...]
    paths: dict[object, str]
    sizes: dict[object, tuple[int, int]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float | None]:
        """COCO's twelve figures. A figure is None if there is no object for it."""
        return {name: _known(value) for name, value in zip(COCO_FIGURES, self.coco.stats, strict=True)}

    @property
    def num_objects(self) -> dict[str, int]:
        """The number of objects of each class in the images that were scored, without those that COCO ignores."""
        counts = dict.fromkeys(self.classes, 0)
        names = dict(zip(self.coco.params.catIds, self.classes, strict=True))
        scored = set(self.coco.params.imgIds)
        for annotation in self.coco.cocoGt.anns.values():
            if (
                annotation['image_id'] in scored
                and annotation['category_id'] in names
                and not annotation.get('iscrowd')
            ):
                counts[names[annotation['category_id']]] += 1
        return counts

    @property
    def errors(self) -> dict[str, ErrorKind] | None:
        """The kinds of errors as TIDE defines them (Bolya et al., ECCV 2020). It is None without hotcoco.

        A detection that finds no object is an error of

        - 'localization', if it overlaps an object of its class with an IoU of 0.1 to 0.5,
        - 'classification', if it overlaps an object of another class with an IoU of at least 0.5,
        - 'duplicate', if it overlaps an object of its class that another detection has found,
        - 'background', if it overlaps no object with an IoU of at least 0.1,
        - 'both', if it overlaps an object of another class with an IoU of 0.1 to 0.5.

        The first of these that fits counts. An object is 'missed' if no detection finds it, and none would find it
        with its class or its box corrected.
        """
        if not isinstance(self.coco, HotCocoEval):
            return None
        found = self.coco.errors()
        return {kind: ErrorKind(found['counts'][key], found['delta_ap'][key]) for kind, key in ERRORS.items()}

    def class_ap(self, name: str, iou: float | None = None, area: str = 'all') -> float | None:
        """The AP of one class: the mean of COCOeval's precision over recall, at one IoU or over all IoUs.

        It is None if the class has no object.
        """
        values = self._precision(iou, area)[:, :, self.classes.index(name)]
        return float(values[values > -1].mean()) if (values > -1).any() else None

    def precision_recall(self, iou: float, name: str | None = None) -> tuple[np.ndarray, np.ndarray] | None:
        """COCOeval's precision at each of its recalls, of one class or as the mean over classes.

        Returns:
            Recall and precision, each of shape (101,), or None if there is no object.
        """
        values = self._precision(iou, 'all')[0]
        values = values if name is None else values[:, [self.classes.index(name)]]
        there = values[:, (values > -1).all(0)]
        return (np.asarray(self.coco.params.recThrs), there.mean(1)) if there.size else None

    def outcomes(self, score_thr: float) -> dict[str, Outcome]:
        """For each image file its objects, found and missed, and false detections, as COCOeval matches at IoU 0.5."""
        params, names = self.coco.params, dict(zip(self.coco.params.catIds, self.classes, strict=True))
        outcomes = {image: Outcome(path, self.sizes.get(image)) for image, path in self.paths.items()}
        at = int(np.argmin(np.abs(params.iouThrs - 0.5)))
        detections, objects = self.coco.cocoDt.anns, self.coco.cocoGt.anns
        for part in self.coco.evalImgs:
            if part is None or part['aRng'] != params.areaRng[AREAS.index('all')]:
                continue
            outcome, label = outcomes[_plain(part['image_id'])], names[part['category_id']]
            scores = dict(zip(part['dtIds'], part['dtScores'], strict=True))
            for found, match, ignored in zip(part['dtIds'], part['dtMatches'][at], part['dtIgnore'][at], strict=True):
                if scores[found] >= score_thr and not ignored:
                    box = Box(tuple(detections[found]['bbox']), label, scores[found])
                    (outcome.found if match else outcome.false).append(box)
            for wanted, match, ignored in zip(part['gtIds'], part['gtMatches'][at], part['gtIgnore'], strict=True):
                if not ignored:
                    box = Box(tuple(objects[wanted]['bbox']), label)
                    outcome.objects.append(box)
                    if not match or scores[int(match)] < score_thr:
                        outcome.missed.append(box)
        return {outcome.path: outcome for outcome in outcomes.values()}

    def _precision(self, iou: float | None, area: str) -> np.ndarray:
        """An array of shape (IoUs, recalls, classes)."""
        precision = self.coco.eval['precision'][:, :, :, AREAS.index(area), -1]
        return precision if iou is None else precision[np.isclose(self.coco.params.iouThrs, iou)]


def score(cfg: Config, results: list[dict], name: str) -> Scores:
    """Score detections.

    Args:
        cfg: the config that names the test data.
        results: a dict for each image, as DumpDetResults writes them.
        name: the name of the results in an error message.

    Raises:
        UserError: if the images of the results are not those of the test data.
    """
    set_default_scope(cfg)
    with _quiet():
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        infos = {info['img_id']: info for info in map(dataset.get_data_info, range(len(dataset)))}
        ids = {sample['img_id'] for sample in results}
        if ids != infos.keys():
            foreign, lacking = len(ids - infos.keys()), len(infos.keys() - ids)
            raise UserError(
                f"{name} is not of this config's test set ({foreign} of its {len(ids)} images are not in it, "
                f'{lacking} of {len(infos)} are lacking): write it anew with tools/test.py, or give its data set with '
                '--data-root DIR'
            )
        samples = [_with_truth(sample, infos[sample['img_id']]) for sample in results]
        metrics = evaluators_of(cfg, 'test')
        ann_file = next((metric.ann_file for metric in metrics if metric.get('ann_file')), None)
        coco = _coco(samples, dataset.metainfo, ann_file)
        modes = [metric.eval_mode for metric in metrics if metric.get('eval_mode') in MODES]
        voc = VOCDetectionMetric(eval_mode=modes[0] if modes else 'area')
        voc.dataset_meta = dataset.metainfo
        voc.process({}, samples)
        figures = voc.compute_metrics(voc.results)
    paths = {image: info['img_path'] for image, info in infos.items()}
    sizes = {image: (info['height'], info['width']) for image, info in infos.items()}
    # COCOeval sorts the categories by their ids, which need not be the order of the classes.
    classes = tuple(category['name'] for category in coco.cocoGt.loadCats(list(coco.params.catIds)))
    return Scores(coco, figures, voc.eval_mode, classes, paths, sizes)


def _coco(samples: list[dict], meta: dict, ann_file: str | None) -> COCOeval:
    limits = dict(proposal_nums=(1, 10, 100))  # COCO's own
    metric = HotCocoMetric(ann_file=ann_file, **limits) if ann_file else SampleCocoMetric(**limits)
    metric.dataset_meta = meta
    metric.process({}, samples)
    return metric.evaluation(metric.results)


def _with_truth(sample: dict, info: dict) -> dict:
    """Add the ground truth to a sample, which DumpDetResults leaves out."""
    parts = defaultdict(list)
    for instance in info['instances']:
        parts['ignored_instances' if instance['ignore_flag'] else 'gt_instances'].append(instance)
    truth = {
        key: dict(
            bboxes=torch.tensor([i['bbox'] for i in parts[key]], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([i['bbox_label'] for i in parts[key]], dtype=torch.long),
        )
        for key in ('gt_instances', 'ignored_instances')
    }
    return {**sample, **truth}


def _known(value: float) -> float | None:
    return float(value) if value > -1 and not np.isnan(value) else None


def _plain(image_id: object) -> object:
    """An image id as a Python type. COCOeval sorts the ids with NumPy and keeps its types."""
    return image_id.item() if isinstance(image_id, np.generic) else image_id


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the evaluators inside this context: the report has their output in its tables."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
