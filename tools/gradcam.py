"""Grad-CAM of a detector: python tools/gradcam.py CONFIG CHECKPOINT IMAGE_OR_FOLDER ... [--compare CONFIG2 CHECKPOINT2]

Where in the image the score of a detection comes from; one detector, or two side by side.
"""

import argparse
import sys
from pathlib import Path

from arguments import USER_ERROR, Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config', 'checkpoint')
    parser.add_argument('inputs', nargs='+', help='image files or folders')
    parser.add_argument(
        '--compare', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='another detector: its maps for the same boxes'
    )
    parser.add_argument('--class', dest='class_name', metavar='NAME', help='explain detections of this class only')
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--top', type=int, default=1, metavar='K', help='the K best detections together; 0 for all (default: 1)'
    )
    which.add_argument(
        '--box', nargs=4, type=float, metavar=('X1', 'Y1', 'X2', 'Y2'), help='this box, in pixels, of one image'
    )
    parser.add_shared('--score-thr', default=0.3)
    parser.add_argument(
        '--layers', nargs='+', metavar='NAME', help='dotted names of modules (default: the last block of each stage)'
    )
    parser.add_argument(
        '--method',
        default='gradcam++',
        help='gradcam, gradcam++, xgradcam, hirescam, layercam, elementwise, eigencam or eigengradcam '
        '(default: %(default)s)',
    )
    parser.add_shared('--out-dir', default='outputs/gradcam')
    parser.add_shared('--device', '--trust-checkpoint', '--any-variant', '--cfg-options')
    args = parser.parse_detector_args()
    if args.top < 0:
        parser.error('--top takes a positive number, or 0 for all')
    return args


def main(args: argparse.Namespace) -> int:
    from cbam_mmdet.datasets.inputs import expand_to_images
    from cbam_mmdet.engine.checkpoint.files import find_checkpoint
    from cbam_mmdet.utils.config import load_config

    pairs = [(args.config, args.checkpoint), *([args.compare] if args.compare else [])]
    checkpoints = [find_checkpoint(checkpoint) for _, checkpoint in pairs]
    files = expand_to_images(args.inputs)
    configs = [load_config(path, args.cfg_options) for path, _ in pairs]
    from cbam_mmdet.apis.infer import load_detector  # MMDetection takes seconds to import
    from cbam_mmdet.visualization.gradcam_sheet import Choice, explain_images

    models = {}
    for cfg, checkpoint, (path, _) in zip(configs, checkpoints, pairs, strict=True):
        name = Path(path).stem if Path(path).stem not in models else f'{Path(path).stem}_2'
        models[name] = load_detector(cfg, checkpoint, args.device, args.trust_checkpoint)
    choice = Choice(args.class_name, args.top or None, tuple(args.box) if args.box else None, args.score_thr)
    sheets = explain_images(
        models,
        files,
        args.out_dir,
        choice,
        layers=args.layers,
        method=args.method,
        warn=lambda message: print(f'warning: {message}', file=sys.stderr),
    )
    print(f'{len(sheets)} sheets: {args.out_dir}; maps as arrays: {args.out_dir}/raw')
    if len(sheets) < len(files):
        print(f'error: {len(files) - len(sheets)} of {len(files)} images could not be explained', file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == '__main__':
    run(main, parse_args())
