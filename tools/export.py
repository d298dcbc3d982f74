"""Write a detector as an ONNX file: python tools/export.py CONFIG CHECKPOINT --out FILE.onnx

It also compares what onnxruntime detects with what PyTorch does, on images. A FILE.pt2 holds backbone and neck only, as
a program of torch.export, and is compared in the same way.
"""

import argparse
import sys

from arguments import Parser, count, run

# The tolerances: boxes in pixels, scores, masks, and the share of detections that only one of both has.
SINGLE = 0.1, 1e-4, 0.02, 0.01
HALF = 4.0, 0.05, 0.2, 0.05
FEATURES = 1e-5  # of a map's largest value
FAILED = 1


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config', 'checkpoint')
    parser.add_argument('--out', required=True, metavar='FILE.onnx', help='the file to write, .onnx or .pt2')
    parser.add_argument(
        '--images',
        nargs='+',
        default=[],
        metavar='IMAGE',
        help="images or folders to compare on; by default the first of the config's validation set",
    )
    parser.add_shared('--num-images', default=8, help='compare on the first N images (default: %(default)s)')
    parser.add_shared('--data-root')
    parser.add_argument(
        '--fixed-size',
        nargs=2,
        type=count,
        metavar=('H', 'W'),
        help='images of one size only, for runtimes that need it',
    )
    parser.add_argument('--fixed-batch', type=count, metavar='N', help='batches of one size only')
    parser.add_argument('--float-input', action='store_true', help='images as float32, not as uint8')
    parser.add_argument('--fp16', action='store_true', help='weights and most of the computation in float16')
    parser.add_shared('--trust-checkpoint', '--any-variant', '--cfg-options')
    args = parser.parse_args()
    if not args.out.endswith(('.onnx', '.pt2')):
        parser.error(f'--out {args.out}: the name must end with .onnx or .pt2')
    if args.out.endswith('.pt2'):
        if not args.fixed_size:
            parser.error(f'--out {args.out} takes images of one size: give --fixed-size H W')
        if args.float_input or args.fp16:
            parser.error(f'--out {args.out} does not go with --float-input and --fp16')
    return args


def main(args: argparse.Namespace) -> int:
    from cbam_mmdet.datasets.inputs import expand_to_images
    from cbam_mmdet.datasets.layouts import require_data_roots
    from cbam_mmdet.deploy.packages import require_packages
    from cbam_mmdet.engine.checkpoint.files import find_checkpoint
    from cbam_mmdet.utils.config import load_config

    if args.out.endswith('.onnx'):
        require_packages('onnx', 'onnxruntime')
    checkpoint = find_checkpoint(args.checkpoint)
    files = expand_to_images(args.images) if args.images else None
    cfg = load_config(args.config, args.cfg_options, None if files or args.data_root else require_data_roots('val'))
    from cbam_mmdet.apis.infer import advice_on_scores, load_detector  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.pointing import validation_images
    from cbam_mmdet.deploy.export import export_detector
    from cbam_mmdet.deploy.features import export_features

    model = load_detector(cfg, checkpoint, 'cpu', args.trust_checkpoint)
    files = (files or [*validation_images(cfg, args.data_root)])[: args.num_images]
    if args.out.endswith('.pt2'):
        gap = export_features(model, args.out, tuple(args.fixed_size), files, args.fixed_batch)
        print(args.out)
        print(f"features of {len(files)} images differ from the checkpoint's by at most {gap:.2g} of the largest one")
        return 0 if gap <= FEATURES else _failed()
    seen = export_detector(
        model,
        args.out,
        files,
        fixed_size=args.fixed_size and tuple(args.fixed_size),
        fixed_batch=args.fixed_batch,
        float_input=args.float_input,
        half=args.fp16,
    )
    print(args.out)
    print(
        f'onnxruntime against PyTorch, {seen.detections} detections in {seen.images} images: boxes differ by at most '
        f'{seen.boxes:.2g} pixels, scores by {seen.scores:.2g}, {seen.unmatched} detections have no counterpart'
    )
    if not seen.detections:
        print(
            'warning: PyTorch detects nothing in these images, so nothing was compared: give --images with objects; '
            f'{advice_on_scores(model, 0)}',
            file=sys.stderr,
        )
    if not seen.within(*(HALF if args.fp16 else SINGLE)):
        return _failed()
    return 0


def _failed() -> int:
    print('error: the file does not compute what the checkpoint does; it was written all the same', file=sys.stderr)
    return FAILED


if __name__ == '__main__':
    run(main, parse_args())
