"""Evaluate a detector: python tools/test.py CONFIG CHECKPOINT [--data-root DIR]"""

import argparse

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config')
    parser.add_shared('checkpoint', help='checkpoint file, work dir for its newest, or ONNX file of tools/export.py')
    parser.add_shared('--work-dir', help='folder for the log (default: work_dirs/CONFIG)')
    parser.add_shared('--data-root', '--classes', '--val-ann')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the detections of all images')
    parser.add_argument('--show', action='store_true', help='show the detections in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures with the detections below the work dir')
    parser.add_argument('--wait-time', type=float, default=2, metavar='S', help='seconds that a window stays')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_shared('--trust-checkpoint', '--any-variant')
    parser.add_shared('--cfg-options', help='settings to override, e.g. test_dataloader.batch_size=4')
    parser.add_launcher()
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.datasets.layouts import require_data_roots
    from cbam_mmdet.engine.checkpoint.files import find_checkpoint
    from cbam_mmdet.utils.config import load_config

    checkpoint = find_checkpoint(args.checkpoint, onnx=True)
    cfg = load_config(args.config, args.cfg_options, None if args.data_root else require_data_roots('test'))
    from cbam_mmdet.apis.test import test  # MMDetection takes seconds to import

    test(
        cfg,
        checkpoint,
        data_root=args.data_root,
        classes=args.classes,
        val_ann=args.val_ann,
        work_dir=args.work_dir,
        out=args.out,
        show=args.show,
        show_dir=args.show_dir,
        wait_time=args.wait_time,
        tta=args.tta,
        trust_checkpoint=args.trust_checkpoint,
        launcher=args.launcher,
    )


if __name__ == '__main__':
    run(main, parse_args())
