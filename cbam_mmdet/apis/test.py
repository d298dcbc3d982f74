"""Evaluate a detector: what tools/test.py calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

import cbam_mmdet.deploy.onnx_detector  # noqa: F401  (registers OnnxDetector)
from cbam_mmdet.apis.runner import build_runner, check_splits, follow_checkpoint, prepare
from cbam_mmdet.compat.mmengine import local_files_written_by, scores_written_once
from cbam_mmdet.datasets.image_folders import is_classifier
from cbam_mmdet.deploy.onnx_file import facts_of, open_session, require_same_resize
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, is_onnx
from cbam_mmdet.engine.checkpoint.loading import safe_loading
from cbam_mmdet.engine.hooks.annotated_frame import AnnotatedFrameHook
from cbam_mmdet.engine.hooks.check_images import CheckImagesHook
from cbam_mmdet.engine.hooks.checkpoint_fit import CheckpointFitHook
from cbam_mmdet.engine.hooks.dump_detections import DumpDetectionsHook
from cbam_mmdet.engine.record import write_record
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import split_datasets, type_name
from cbam_mmdet.utils.files import AtomicLocalBackend
from cbam_mmdet.utils.logging import is_first_process, log


def test(
    cfg: Config,
    checkpoint: str,
    *,
    data_root: str | None = None,
    classes: str | Sequence[str] | None = None,
    val_ann: str | None = None,
    work_dir: str | None = None,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    tta: bool = False,
    trust_checkpoint: bool = False,
    launcher: str = 'none',
) -> dict[str, float]:
    """Check a config, its data and a checkpoint, then evaluate.

    Args:
        cfg: the config.
        checkpoint: the weights: a file, or a work dir for its newest. Or an ONNX file of tools/export.py, which runs on
            the CPU.
        data_root: re-points every dataloader and evaluator (see datasets.pointing.point_at_data).
        classes: class names, or 'auto' to read them from the training annotations (see datasets.classes.set_classes).
        val_ann: the COCO annotation file to test on, in a data root that holds several.
        work_dir: for the log; by default the config's, else work_dirs/NAME.
        out: a .pkl file for the detections of all images.
        show: show each picture in a window.
        show_dir: a folder, below work_dir, for the pictures.
        wait_time: seconds that a window stays.
        tta: test-time augmentation (horizontal flip where the config has no `tta_pipeline`).
        trust_checkpoint: load it by full unpickling, which runs code from the file (see
            engine.checkpoint.loading.load_checkpoint).
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        The metrics, e.g. {'coco/bbox_mAP': 0.37, ...}.

    Raises:
        UserError: for whatever in config, data or checkpoint would end in a failure later.
    """
    if out and not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out}: the detections are written as a pickle, the name must end with .pkl')
    checkpoint = find_checkpoint(checkpoint, onnx=True)
    onnx = is_onnx(checkpoint)
    if onnx and tta:
        raise UserError('--tta: an ONNX file is one detector as it is; test-time augmentation needs a checkpoint')
    cfg.load_from, cfg.resume = None if onnx else checkpoint, False
    prepare(cfg, data_root, classes, work_dir, launcher, val_ann=val_ann)
    if any(cfg.get(key) is None for key in ('test_dataloader', 'test_cfg', 'test_evaluator')):
        raise UserError('the config has no test split: it needs test_dataloader, test_cfg and test_evaluator')
    if is_classifier(cfg) and (show or show_dir or tta):
        raise UserError('--show, --show-dir and --tta are for detectors; this is the config of a classifier')
    if show or show_dir:
        _draw(cfg, show, show_dir, wait_time)
    if tta:
        _use_tta(cfg)
    follow_checkpoint(cfg, checkpoint, ['test'], trust_checkpoint)
    check_splits(cfg, ['test'])
    if onnx:
        require_same_resize(cfg, facts_of(open_session(checkpoint), checkpoint), checkpoint)
        log(f'{checkpoint} is tested as it was exported: the settings of the model in the config have no effect')
        cfg.model = ConfigDict(type='OnnxDetector', file=checkpoint)
        # EMAHook copies the model, to take its averaged weights: those are in the file.
        cfg.custom_hooks = [it for it in cfg.get('custom_hooks') or () if type_name(it.get('type')) != 'EMAHook']
    # The checkpoint holds every weight: a pretrained backbone would be fetched for nothing.
    model = cfg.model.module if tta else cfg.model
    if model.get('backbone'):
        model.backbone.init_cfg = None
    with safe_loading(trust_checkpoint), scores_written_once(), local_files_written_by(AtomicLocalBackend):
        runner = build_runner(cfg, [CheckpointFitHook(strict=True), CheckImagesHook(), AnnotatedFrameHook()])
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            dump = DumpResults if is_classifier(cfg) else DumpDetResults
            runner.register_hook(DumpDetectionsHook(dump(out_file_path=out)))
        metrics = runner.test()
    if is_first_process():
        write_record(runner.cfg, runner.log_dir, copy_in=runner.log_dir, results=out, checkpoint=checkpoint)
    return metrics


def _draw(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    hook = cfg.setdefault('default_hooks', ConfigDict()).setdefault(
        'visualization', ConfigDict(type='DetVisualizationHook')
    )
    hook.update(draw=True, show=show, wait_time=wait_time, test_out_dir=show_dir)


def _use_tta(cfg: Config) -> None:
    """As MMDetection's tools/test.py: flip horizontally, merge by NMS, unless the config says otherwise.

    The image is flipped as it was loaded. MMDetection's tool flips it at the pipeline's end, where a Pad has added its
    border on one side, and DetTTAModel, which knows no border, would put the boxes elsewhere.

    Raises:
        UserError: for a detector with masks, which MMDetection cannot merge.
    """
    masks = (cfg.model.get('roi_head') or {}).get('mask_head') or cfg.model.get('mask_head')
    if masks and 'tta_model' not in cfg:
        raise UserError("--tta: MMDetection's test-time augmentation merges boxes, and this detector also has masks")
    cfg.setdefault(
        'tta_model', dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    )
    datasets = split_datasets(cfg, 'test')
    given = cfg.get('tta_pipeline')
    if not given:
        pack = dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction'),
        )
        # The merged sample keeps the boxes of the first view as its ground truth: not those of the flipped one.
        flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    for dataset in datasets:
        if given:
            dataset.pipeline = given
            continue
        load, *others = dataset.pipeline[:-1]
        steps = [flips, *([step] for step in others), [pack]]
        dataset.pipeline = [load, dict(type='TestTimeAug', transforms=copy.deepcopy(steps))]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
