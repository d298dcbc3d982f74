"""Detect in images, folders and videos, draw pictures and write COCO's result format:

python tools/infer.py CONFIG CHECKPOINT IMAGE_OR_FOLDER_OR_VIDEO ...
"""

import argparse
import sys

from arguments import USER_ERROR, Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config')
    parser.add_shared('checkpoint', help='checkpoint file, work dir for its newest, or ONNX file of tools/export.py')
    parser.add_argument('inputs', nargs='+', help='image files, folders or videos')
    parser.add_shared('--out-dir', default='outputs')
    parser.add_shared('--score-thr', default=0.3)
    parser.add_argument('--no-draw', action='store_true', help='write the JSON only')
    parser.add_shared('--device', '--trust-checkpoint', '--any-variant', '--cfg-options')
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    from cbam_mmdet.datasets.inputs import expand_inputs
    from cbam_mmdet.engine.checkpoint.files import find_checkpoint
    from cbam_mmdet.utils.config import load_config

    checkpoint = find_checkpoint(args.checkpoint, onnx=True)
    for source in args.inputs:
        expand_inputs(source)
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.infer import advice_on_scores, infer, load_detector  # MMDetection takes seconds to import

    model = load_detector(cfg, checkpoint, args.device, args.trust_checkpoint)
    done = infer(
        model,
        args.inputs,
        args.out_dir,
        score_thr=args.score_thr,
        draw=not args.no_draw,
        warn=lambda message: print(f'warning: {message}', file=sys.stderr),
    )
    print(f'{done.detections} detections in {done.images} images: {done.out_dir}/predictions.json')
    if not done.detections:
        print(f'no score reaches {args.score_thr:g}: {advice_on_scores(model, args.score_thr)}')
    if not args.no_draw:
        print(f'pictures: {done.out_dir}/vis')
    if done.broken:
        print(f'error: {len(done.broken)} inputs could not be read: {", ".join(done.broken)}', file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == '__main__':
    run(main, parse_args())
