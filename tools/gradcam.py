"""Grad-CAM of a detector: python tools/gradcam.py IMAGE_OR_FOLDER ... --config C --checkpoint P [--compare C2 P2]"""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from cbam_mmdet.cli.tool import USER_ERROR, run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Where in the image the score of a detection comes from; one detector, or two side by side'
    )
    parser.add_argument('inputs', nargs='+', help='image files or folders')
    parser.add_argument(
        '--config', required=True, help="config file, or 'cbam_mmdet::NAME.py' for one that the package ships"
    )
    parser.add_argument('--checkpoint', required=True, help='checkpoint file, or a work dir for its newest')
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
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='leave out detections with a lower score (default: 0.3)'
    )
    parser.add_argument(
        '--layers', nargs='+', metavar='NAME', help='dotted names of modules (default: the last block of each stage)'
    )
    parser.add_argument(
        '--method',
        default='gradcam++',
        help='gradcam, gradcam++, xgradcam, hirescam, layercam, elementwise, eigencam or eigengradcam (default: gradcam++)',
    )
    parser.add_argument('--out-dir', default='outputs/gradcam', metavar='DIR', help='where (default: %(default)s)')
    parser.add_argument('--device', help="'cpu', 'cuda:0', ... (default: the GPU if there is one)")
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load a checkpoint that holds more than tensors and plain data: this runs code from the file',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings to override')
    args = parser.parse_args()
    if args.top < 0:
        parser.error('--top takes a positive number, or 0 for all')
    return args


def main() -> int:
    args = parse_args()
    pairs = [(args.config, args.checkpoint), *([args.compare] if args.compare else [])]
    configs = [load_config(path, args.cfg_options) for path, _ in pairs]
    from cbam_mmdet.apis.infer import load_detector  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.inputs import image_files  # MMDetection takes seconds to import
    from cbam_mmdet.visualization.gradcam_sheet import Choice, explain_images

    files = image_files(args.inputs)
    models = {}
    for cfg, (path, checkpoint) in zip(configs, pairs, strict=True):
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
    run_tool(main)
