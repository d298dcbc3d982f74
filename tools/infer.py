"""Detect in your own images: python tools/infer.py CONFIG CHECKPOINT IMAGE_OR_FOLDER_OR_VIDEO ..."""

import argparse
import sys

from mmengine.config import DictAction

from cbam_mmdet.cli.tool import USER_ERROR, run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Detect in images, folders and videos: pictures and COCO-style JSON')
    parser.add_argument('config', help="config file, or 'cbam_mmdet::NAME.py' for one that the package ships")
    parser.add_argument('checkpoint', help='checkpoint file, or a work dir for its newest')
    parser.add_argument('inputs', nargs='+', help='image files, folders or videos')
    parser.add_argument('--out-dir', default='outputs', metavar='DIR', help='where to write (default: outputs)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='leave out detections with a lower score (default: 0.3)'
    )
    parser.add_argument('--device', help="'cpu', 'cuda:0', ... (default: the GPU if there is one)")
    parser.add_argument('--no-draw', action='store_true', help='write the JSON only')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load a checkpoint that holds more than tensors and plain data: this runs code from the file',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings to override')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.infer import infer, load_detector  # after the arguments: MMDetection takes seconds to import

    model = load_detector(cfg, args.checkpoint, args.device, args.trust_checkpoint)
    done = infer(
        model,
        args.inputs,
        args.out_dir,
        score_thr=args.score_thr,
        draw=not args.no_draw,
        warn=lambda message: print(f'warning: {message}', file=sys.stderr),
    )
    print(f'{done.detections} detections in {done.images} images: {done.out_dir}/predictions.json')
    if not args.no_draw:
        print(f'pictures: {done.out_dir}/vis')
    if done.broken:
        print(f'error: {len(done.broken)} inputs could not be read: {", ".join(done.broken)}', file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == '__main__':
    run_tool(main)
