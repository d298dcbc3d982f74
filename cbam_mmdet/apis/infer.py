"""Detection on a user's own images, folders and videos: pictures, and one JSON file in COCO's result format."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import nn
from tqdm import tqdm

import cbam_mmdet.compat.ssd_head  # noqa: F401  (SSD is mended)
from cbam_mmdet.datasets.checks import dataset_classes
from cbam_mmdet.datasets.image_folders import is_classifier
from cbam_mmdet.datasets.inputs import VIDEOS, expand_inputs, keep_inputs, unique_names
from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.content import classes_of, meta_of, weights_of
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, is_onnx
from cbam_mmdet.engine.checkpoint.loading import safe_loading
from cbam_mmdet.engine.checkpoint.settings import warn_of_other_settings
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import split_datasets
from cbam_mmdet.utils.devices import choose_device
from cbam_mmdet.utils.files import AtomicLocalBackend, write_text
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.text import abridge, brief

WHOLE = 0.95  # of a video's frames: what containers say of their number is not exact


@dataclass
class Summary:
    """What :func:`infer` did: how many pictures, how many detections, where, and which inputs could not be read."""

    images: int
    detections: int
    out_dir: Path
    broken: list[str]


def load_detector(cfg: Config, checkpoint: str, device: str | None = None, trust_checkpoint: bool = False) -> nn.Module:
    """A detector ready for `mmdet.apis.inference_detector`.

    Args:
        cfg: the config.
        checkpoint: the weights, a file or a work dir; every key must fit. Or an ONNX file of tools/export.py,
            which runs on the CPU.
        device: 'cpu', 'cuda:0', ...; by default the GPU if there is one.
        trust_checkpoint: load it by full unpickling, which runs code from the file (see
            engine.checkpoint.loading.load_checkpoint).

    Raises:
        UserError: if the checkpoint is missing, cut off, or of another architecture, or if the config is a
            classifier's or has no test pipeline.
    """
    _require_test_pipeline(cfg)
    checkpoint = find_checkpoint(checkpoint, onnx=True)
    if is_onnx(checkpoint):
        return _load_onnx(cfg, checkpoint)
    check_plugins(cfg)
    device = choose_device(device)
    if cfg.get('data_preprocessor'):  # as MMEngine's Runner does, and MMDetection's init_detector does not
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    given = copy.deepcopy(cfg)  # DETR and its kin write into what they are built of
    with safe_loading(trust_checkpoint):
        weights = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        with warnings.catch_warnings(record=True):  # "checkpoint is None", by a filter of its own: it follows
            model = init_detector(cfg, checkpoint=None, device=device)
    compare_state_dicts(weights, model, strict=True, name=checkpoint)
    warn_of_other_settings(weights, given, strict=True, name=checkpoint)
    model.load_state_dict(weights_of(weights))
    model.dataset_meta.update(classes=_config_classes(cfg) or model.dataset_meta['classes'])
    model.dataset_meta.update(_described(weights, checkpoint))
    _require_a_name_each(model, checkpoint)
    return model


def _require_test_pipeline(cfg: Config) -> None:
    """Refuse a config that does not say how an image becomes the detector's input."""
    name = cfg.filename or 'the config'
    if is_classifier(cfg):
        raise UserError(
            f'{name} is the config of a classifier (default_scope mmpretrain), expected that of a detector: '
            'tools/test.py evaluates a classifier'
        )
    try:
        get_test_pipeline_cfg(cfg)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        loader = brief(repr(cfg.get('test_dataloader')))
        raise UserError(
            f'{name} has no test pipeline, which makes the input of an image (test_dataloader is {loader}): give it a '
            'test_dataloader, as test_dataloader = val_dataloader'
        ) from error


def _described(checkpoint: dict, name: str) -> dict:
    """What a checkpoint says of its data set: the classes, and their colours if there are enough."""
    described = meta_of(checkpoint).get('dataset_meta') or {}
    if described and classes_of(checkpoint) is None:
        raise UserError(f'checkpoint {name} does not say its classes as a list of names (meta.dataset_meta.classes)')
    meta = {key.lower(): value for key, value in described.items()}
    palette = meta.get('palette')
    if palette is not None and not (isinstance(palette, (list, tuple)) and len(palette) >= len(meta['classes'])):
        del meta['palette']
    return meta


def _require_a_name_each(model: nn.Module, checkpoint: str) -> None:
    """Refuse a detector whose head has more classes than there are names for them."""
    head = getattr(model, 'bbox_head', None) or getattr(getattr(model, 'roi_head', None), 'bbox_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    count, names = getattr(head, 'num_classes', None), model.dataset_meta['classes']
    if isinstance(count, int) and count != len(names):
        raise UserError(
            f'{checkpoint}: the detector has {count} classes, and the checkpoint names {len(names)}: '
            f'[{abridge(names, 8, quoted=True)}]'
        )


def _load_onnx(cfg: Config, file: str) -> nn.Module:
    from cbam_mmdet.deploy.onnx_detector import OnnxDetector
    from cbam_mmdet.deploy.onnx_file import require_same_resize

    model = OnnxDetector(file)
    require_same_resize(cfg, model.facts, file)
    log(f'{file} detects as it was exported: the settings of the model in the config have no effect')
    model.cfg = cfg
    return model


def infer(
    model: nn.Module,
    inputs: Iterable[str],
    out_dir: str | Path,
    *,
    score_thr: float = 0.3,
    draw: bool = True,
    warn: Callable[[str], None] = print,
) -> Summary:
    """Detect in images, in folders of images and in videos.

    Writes `out_dir/vis/NAME.jpg` for each image, `out_dir/vis/NAME.mp4` for each video, and
    `out_dir/predictions.json`: for each detection above the threshold {'image_id', 'file_name', 'category_id',
    'category', 'bbox': [x, y, width, height] in pixels, 'score'}, and 'frame' (from 0) in a video. Images and
    categories are numbered from 1, in the order of the inputs and of the model's classes.

    Args:
        model: from :func:`load_detector`.
        inputs: image files, folders, video files. What lies below out_dir, in a folder around it, is left out: the
            pictures of an earlier run.
        out_dir: where to write.
        score_thr: leave out detections with a lower score.
        draw: write pictures too.
        warn: is called with a message for each image that cannot be read; the others continue.

    Returns:
        What was done.

    Raises:
        UserError: if an input does not exist, or holds no image, or if a picture would replace an input.
    """
    out_dir = Path(out_dir)
    files = _without_own_pictures(inputs, out_dir)
    targets = [out_dir / 'vis' / name for name in unique_names(files)]
    if draw:
        suffixes = ['.mp4' if file.suffix.lower() in VIDEOS else '.jpg' for file in files]
        keep_inputs(files, [Path(f'{target}{suffix}') for target, suffix in zip(targets, suffixes, strict=True)])
    if (out_dir / 'predictions.json').exists():
        log(
            f'the results of an earlier run in {out_dir} are replaced: predictions.json, and pictures of the same names'
        )
    (out_dir / 'vis').mkdir(parents=True, exist_ok=True)
    painter = _Painter(model, score_thr) if draw else None
    pipeline = array_pipeline(model.cfg)
    records: list[dict] = []
    broken: list[str] = []
    images = 0
    for file, target in zip(tqdm(files, desc='detecting', unit='file', disable=len(files) < 2), targets, strict=True):
        try:
            if file.suffix.lower() in VIDEOS:
                images += _infer_video(
                    model,
                    pipeline,
                    file,
                    target.with_name(f'{target.name}.mp4'),
                    painter,
                    records,
                    images,
                    score_thr,
                    warn,
                )
            else:
                image = read_image(str(file))
                images += 1
                sample = inference_detector(model, image, pipeline)
                records += _records(model, sample, score_thr, image_id=images, file_name=str(file))
                if painter:
                    write_picture(painter(image, sample), f'{target}.jpg')
        except (UserError, cv2.error) as error:
            # OpenCV cannot make a picture narrower than a pixel, which one of 5000 x 1 pixels would become.
            warn(str(error) if isinstance(error, UserError) else f'{file} cannot be resized: {brief(error)}')
            broken.append(str(file))
    write_text(out_dir / 'predictions.json', json.dumps(records))
    return Summary(images, len(records), out_dir, broken)


def _without_own_pictures(inputs: Iterable[str], out_dir: Path) -> list[Path]:
    """The files of the inputs, but for what a folder holds in its folder `out_dir`. One line says their number."""
    files: list[Path] = []
    left_out: list[Path] = []
    for source in inputs:
        given, own = Path(source).resolve(), out_dir.resolve()
        own = own / 'vis' if given == own else own
        for file in expand_inputs(source):
            inside = file.parent.resolve().is_relative_to(own) and not given.is_relative_to(own)
            (left_out if inside else files).append(file)
    if left_out:
        log(
            f'{len(left_out)} images and videos below {out_dir} are left out: they are taken for pictures of an '
            f'earlier run ({abridge([str(file) for file in left_out], 1)})'
        )
    if not files:
        raise UserError(f'there is no image and no video but those below --out-dir {out_dir}: give another --out-dir')
    return files


def write_picture(image: np.ndarray, path: str) -> None:
    """Write an image, (H, W, 3) BGR, completely or not at all, in the format that the path's suffix names."""
    AtomicLocalBackend().put(cv2.imencode(os.path.splitext(path)[1], image)[1].tobytes(), path)


def advice_on_scores(model: nn.Module, score_thr: float) -> str:
    """How to see weaker detections: by a lower --score-thr, unless the detector itself leaves them out."""
    test_cfg = model.cfg.model.get('test_cfg') or {}
    where = 'model.test_cfg.rcnn' if 'rcnn' in test_cfg else 'model.test_cfg'
    own = (test_cfg.get('rcnn') or test_cfg).get('score_thr') or 0
    if own < score_thr:
        return 'a lower --score-thr shows weaker ones'
    return f'the detector itself leaves out scores below {own:g} (--cfg-options {where}.score_thr=0 shows them)'


LEGIBLE = 400  # pixels of the longer side of an image from which MMDetection's labels can be read


class _Painter:
    """MMDetection's own visualizer, on arrays. A small image is drawn larger, by a whole factor."""

    def __init__(self, model: nn.Module, score_thr: float) -> None:
        self.visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name='infer'))
        self.visualizer.dataset_meta = model.dataset_meta
        self.score_thr = score_thr

    def __call__(self, image: np.ndarray, sample: DetDataSample) -> np.ndarray:
        """(H, W, 3) BGR in, (factor * H, factor * W, 3) BGR out."""
        rgb = mmcv.bgr2rgb(image)
        factor = -(-LEGIBLE // max(rgb.shape[:2]))
        if factor > 1:
            rgb = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
            sample = _enlarged(sample, factor)
        self.visualizer.add_datasample('infer', rgb, sample, draw_gt=False, pred_score_thr=self.score_thr)
        return mmcv.rgb2bgr(self.visualizer.get_image())


def _enlarged(sample: DetDataSample, factor: int) -> DetDataSample:
    found = sample.pred_instances.clone()
    found.bboxes = found.bboxes * factor
    if 'masks' in found:
        found.masks = found.masks.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return DetDataSample(pred_instances=found)


def _infer_video(model, pipeline, file, target, painter, records, before, score_thr, warn) -> int:
    try:
        video = mmcv.VideoReader(str(file)) if file.is_file() else None  # a pipe or a device has no end
        length = len(video) if video is not None and video.opened else 0
    except (FileNotFoundError, ValueError):  # the number of frames may be none
        length = 0
    if length < 1:
        raise UserError(f'video {file} is not one that OpenCV can read.')
    writer, count = None, 0
    for frame in tqdm(video, total=length, desc=file.name, unit='frame'):
        if frame is None:
            break
        count += 1
        sample = inference_detector(model, frame, pipeline)
        records += _records(model, sample, score_thr, image_id=before + count, file_name=str(file), frame=count - 1)
        if painter:
            picture = painter(frame, sample)
            if writer is None:
                height, width = picture.shape[:2]
                target.unlink(missing_ok=True)  # one of an earlier run
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*'mp4v'), video.fps or 25, (width, height))
                if not writer.isOpened():
                    raise UserError(f'{target} cannot be written: OpenCV takes no {video.fps:g} frames a second there')
            writer.write(picture)
    if writer is not None:
        writer.release()
        _require_frames(target, count)
    if not count:
        raise UserError(f'video {file} is not one that OpenCV can read: it holds no frame.')
    if count < WHOLE * length:
        warn(f'video {file} says that it has {length} frames, and {count} could be read: it may be cut off')
    return count


def _require_frames(video: Path, count: int) -> None:
    """OpenCV says nothing of frames that it could not write."""
    capture = cv2.VideoCapture(str(video))
    written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if written < count:
        raise UserError(
            f'video {video} could not be written whole ({written} of {count} frames can be read): is the disk full? '
            'It is not complete; --no-draw writes the detections alone'
        )


def _records(model: nn.Module, sample: DetDataSample, score_thr: float, **where) -> list[dict]:
    found = sample.pred_instances.cpu()
    found = found[found.scores >= score_thr]
    classes = model.dataset_meta['classes']
    return [
        dict(
            **where,
            category_id=label + 1,
            category=classes[label],
            bbox=[round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            score=round(score, 5),
        )
        for (x1, y1, x2, y2), label, score in zip(
            found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        )
    ]


def _config_classes(cfg: Config) -> tuple[str, ...]:
    datasets = split_datasets(cfg, 'test')
    return dataset_classes(datasets[0]) if datasets else ()
