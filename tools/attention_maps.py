"""Look at the gates of a detector's CBAMs:

python tools/attention_maps.py CONFIG CHECKPOINT [IMAGE_OR_FOLDER ...]

For every CBAM: the spatial gate over images, the channel gate's distribution, and a table of both.
"""

import argparse
import sys

from arguments import Parser, count, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config', 'checkpoint')
    parser.add_argument(
        'inputs', nargs='*', help="image files or folders; without any, the images of the config's validation set"
    )
    parser.add_shared('--data-root')
    parser.add_shared('--num-images', help='take the first N images only')
    parser.add_argument('--pictures', type=count, default=8, metavar='N', help='draw the first N images (default: 8)')
    parser.add_shared('--out-dir', default='outputs/attention')
    parser.add_shared('--device', '--trust-checkpoint', '--any-variant', '--cfg-options')
    return parser.parse_detector_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.datasets.inputs import expand_to_images
    from cbam_mmdet.datasets.layouts import require_data_roots
    from cbam_mmdet.engine.checkpoint.files import find_checkpoint
    from cbam_mmdet.utils.config import load_config

    checkpoint = find_checkpoint(args.checkpoint)
    files = expand_to_images(args.inputs) if args.inputs else None
    cfg = load_config(args.config, args.cfg_options, None if files or args.data_root else require_data_roots('val'))
    from cbam_mmdet.apis.infer import load_detector  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.pointing import validation_images
    from cbam_mmdet.visualization.attention import attend, markdown

    model = load_detector(cfg, checkpoint, args.device, args.trust_checkpoint)
    sizes = {} if files else validation_images(cfg, args.data_root)
    rows = attend(
        model,
        (files or [*sizes])[: args.num_images],
        args.out_dir,
        sizes=sizes,
        pictures=args.pictures,
        warn=lambda message: print(f'warning: {message}', file=sys.stderr),
    )
    print(f'{markdown(rows)}\npictures and tables: {args.out_dir}')


if __name__ == '__main__':
    run(main, parse_args())
