"""COCO's evaluation of detections in memory, by hotcoco where it is installed and by pycocotools otherwise.

hotcoco (https://github.com/derekallman/hotcoco) is pycocotools written anew in Rust. It gives the same precision and
recall to the last bit. What it would treat differently goes to pycocotools, and the log says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmengine.logging import print_log
from pycocotools.cocoeval import Params

from cbam_mmdet.errors import UserError

GET_HOTCOCO = "it is not installed. `pip install 'hotcoco>=1.3'` gives the same figures many times as fast"


@dataclass
class Detections:
    """The detections of a test set, image by image.

    Args:
        images: the images' ids.
        counts: the number of detections of each image. All together are n.
        categories: (n,), COCO's category ids.
        boxes: (n, 4), x, y, width, height in float64.
        scores: (n,), float64.
        masks: for 'segm' an RLE mask of each detection.
    """

    images: list
    counts: list[int]
    categories: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: list[dict] | None = None

    @classmethod
    def of(cls, results: Sequence[dict], cat_ids: Sequence[int], iou_type: str) -> Detections:
        """The detections of the results that MMDetection's CocoMetric collects, a dict for each image."""
        masks, scores = None, 'scores'
        if iou_type == 'segm':
            if 'masks' not in results[0]:
                raise KeyError('segm is not in results')  # as MMDetection's CocoMetric
            masks = [mask for result in results for mask in result['masks']]
            scores = 'mask_scores' if 'mask_scores' in results[0] else scores
        corners = np.concatenate([result['bboxes'] for result in results]).reshape(-1, 4).astype(np.float64)
        labels = np.concatenate([result['labels'] for result in results]).astype(np.int64)
        return cls(
            images=[result['img_id'] for result in results],
            counts=[len(result['labels']) for result in results],
            categories=np.asarray(cat_ids)[labels],
            boxes=np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]),
            scores=np.concatenate([result[scores] for result in results]).astype(np.float64),
            masks=masks,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def records(self) -> list[dict]:
        """COCO's records. Those of masks have no box, so that the size of an object is the area of its mask."""
        images = [image for image, count in zip(self.images, self.counts, strict=True) for _ in range(count)]
        if self.masks is None:
            shapes = [dict(bbox=box) for box in self.boxes.tolist()]
        else:
            shapes = [dict(segmentation=_as_text(mask)) for mask in self.masks]
        rows = zip(images, self.categories.tolist(), self.scores.tolist(), shapes, strict=True)
        return [dict(image_id=image, category_id=label, score=score, **shape) for image, label, score, shape in rows]


def coco_evaluation(
    truth: COCO, detections: Detections, iou_type: str, evaluator: type[COCOeval] = COCOeval, **params: Any
) -> COCOeval:
    """Evaluate and accumulate. The caller may then summarize.

    Args:
        truth: the ground truth.
        detections: there may be none. Precision and recall are then 0 where there are objects.
        iou_type: 'bbox' or 'segm'.
        evaluator: what evaluates where hotcoco cannot: pycocotools' class, or one derived from it.
        params: attributes of pycocotools' parameters, such as maxDets.

    Raises:
        UserError: if the ground truth lacks an image of the detections.
    """
    _check_images(truth, detections)
    hotcoco = _hotcoco()
    reason = _why_not_hotcoco(truth, detections) if hotcoco else GET_HOTCOCO
    if reason:
        print_log(f'COCO evaluation by pycocotools, without hotcoco: {reason}', logger='current')
        evaluation = evaluator(truth, _loaded(truth, detections), iou_type)
    else:
        print_log(f'COCO evaluation by hotcoco {hotcoco.__version__}', logger='current')
        evaluation = HotCocoEval(hotcoco, truth, detections, iou_type)
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


class HotCocoEval(COCOeval):
    """pycocotools' COCOeval with hotcoco's matching. Parameters, arrays, statistics and summary are pycocotools'."""

    def __init__(self, hotcoco: ModuleType, truth: COCO, detections: Detections, iou_type: str) -> None:
        # Not pycocotools' constructor: it would set evalImgs, which are made here when they are asked for.
        self.hotcoco = hotcoco
        self.cocoGt = truth
        self.detections = detections
        self.params = Params(iouType=iou_type)
        self.params.imgIds, self.params.catIds = truth.getImgIds(), truth.getCatIds()
        self.eval: dict[str, Any] = {}
        self.stats: Sequence[float] = []

    def evaluate(self) -> None:
        p = self.params
        # Among equal scores the order decides, so it is pycocotools'.
        p.imgIds, p.catIds, p.maxDets = list(np.unique(p.imgIds)), list(np.unique(p.catIds)), sorted(p.maxDets)
        # hotcoco's ids are whole numbers. Those of VOC's images are words.
        images = {image: i for i, image in enumerate(p.imgIds, start=1)}
        categories = {category: i for i, category in enumerate(p.catIds, start=1)}
        truth = self._truth(images, categories)
        self.cocoDt = self._found(truth, images, categories)
        self.hot = self.hotcoco.COCOeval(truth, self.cocoDt, p.iouType)
        for name in ('iouThrs', 'recThrs', 'maxDets', 'areaRng', 'areaRngLbl'):
            setattr(self.hot.params, name, list(getattr(p, name)))
        self.hot.params.useCats = bool(p.useCats)
        self.hot.evaluate()

    def accumulate(self, p: Any = None) -> None:
        self.hot.accumulate()
        self.eval = {'params': self.params, **{name: self.hot.eval[name] for name in ('precision', 'recall', 'scores')}}

    @property
    def evalImgs(self) -> list[dict | None]:
        """The matches in each image and category, as pycocotools has them. Not all parts without any are listed."""
        parts = self.hot.eval_imgs
        for part in filter(None, parts):
            part['image_id'] = self.params.imgIds[part['image_id'] - 1]
            part['category_id'] = self.params.catIds[part['category_id'] - 1] if self.params.useCats else -1
        return parts

    def errors(self) -> dict[str, Any]:
        """The kinds of errors at an IoU of 0.5: see scores.Scores.errors."""
        return self.hot.tide_errors()

    def _truth(self, images: dict, categories: dict) -> Any:
        kept = [
            {**it, 'image_id': images[it['image_id']], 'category_id': categories[it['category_id']]}
            for it in self.cocoGt.dataset.get('annotations', [])
            if it['image_id'] in images and it['category_id'] in categories
        ]
        sizes = [{**self.cocoGt.imgs[image], 'id': i} for image, i in images.items()]
        names = [dict(id=i, name=str(category)) for category, i in categories.items()]
        if self.params.iouType == 'segm':
            return self.hotcoco.COCO(dict(images=sizes, annotations=kept, categories=names))

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([it[name] for it in kept], dtype)

        return self.hotcoco.COCO.from_arrays(
            sizes,
            names,
            column('image_id', np.int64),
            column('category_id', np.int64),
            column('bbox', np.float64).reshape(-1, 4),
            ids=column('id', np.int64),
            area=column('area', np.float64),
            iscrowd=column('iscrowd', np.int64),
        )

    def _found(self, truth: Any, images: dict, categories: dict) -> Any:
        found = self.detections
        if found.masks is not None:
            return truth.load_res(
                [
                    {**it, 'image_id': images[it['image_id']], 'category_id': categories[it['category_id']]}
                    for it in found.records()
                ]
            )
        # An image without detections need not be in the ground truth.
        numbers = np.repeat([images.get(image, 0) for image in found.images], found.counts)
        labels = np.searchsorted(self.params.catIds, found.categories) + 1
        return truth.load_res(np.column_stack([numbers, found.boxes, found.scores, labels]))


def _hotcoco() -> ModuleType | None:
    try:
        import hotcoco
    except ImportError:
        return None
    return hotcoco if hasattr(hotcoco.COCO, 'from_arrays') else None  # since 1.3


def _why_not_hotcoco(truth: COCO, detections: Detections) -> str:
    """The reason why hotcoco's figures might not be pycocotools', or ''."""
    annotations = truth.dataset.get('annotations', [])
    ids = [annotation['id'] for annotation in annotations]
    if len(set(ids)) < len(ids) or not all(isinstance(it, int) and it > 0 for it in ids):
        # pycocotools counts an object of id 0 as missed when it is found, and confuses objects that share an id.
        return 'the ids of the annotations are not distinct whole numbers from 1 on'
    if not (np.isfinite(detections.boxes).all() and np.isfinite(detections.scores).all()):
        return 'a box or a score is not finite'
    if not np.isfinite([size for it in annotations for size in (*it.get('bbox', ()), it.get('area', 0))]).all():
        return 'a box or an area in the annotations is not finite'
    return ''


def _check_images(truth: COCO, detections: Detections) -> None:
    found = zip(detections.images, detections.counts, strict=True)
    foreign = [image for image, count in found if count and image not in truth.imgs]
    if foreign:
        raise UserError(
            f'{len(foreign)} images with detections are not in the annotations, such as {foreign[0]!r}: '
            "the evaluator's ann_file is not that of the data set"
        )


def _loaded(truth: COCO, detections: Detections) -> COCO:
    if len(detections):
        return truth.loadRes(detections.records())
    empty = COCO()  # loadRes does not support an empty list
    empty.dataset = {**truth.dataset, 'annotations': []}
    empty.createIndex()
    return empty


def _as_text(mask: dict) -> dict:
    counts = mask['counts']
    return {**mask, 'counts': counts.decode()} if isinstance(counts, bytes) else mask
