"""Look at the gates of a detector's CBAMs: python tools/attention_maps.py [IMAGE_OR_FOLDER ...] --config C --checkpoint P"""

import argparse
import sys

from mmengine.config import DictAction

from cbam_mmdet.cli import run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="For every CBAM: the spatial gate over images, the channel gate's distribution, and a table of both"
    )
    parser.add_argument(
        'inputs', nargs='*', help="image files or folders; without any, the images of the config's validation set"
    )
    parser.add_argument(
        '--config', required=True, help="config file, or 'cbam_mmdet::NAME.py' for one that the package ships"
    )
    parser.add_argument('--checkpoint', required=True, help='checkpoint file, or a work dir for its newest')
    parser.add_argument('--data-root', metavar='DIR', help="folder of the data set, in place of the config's")
    parser.add_argument('--num-images', type=int, metavar='N', help='take the first N images only')
    parser.add_argument('--pictures', type=int, default=8, metavar='N', help='draw the first N images (default: 8)')
    parser.add_argument('--out-dir', default='outputs/attention', metavar='DIR', help='where (default: %(default)s)')
    parser.add_argument('--device', help="'cpu', 'cuda:0', ... (default: the GPU if there is one)")
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load a checkpoint that holds more than tensors and plain data: this runs code from the file',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings to override')
    args = parser.parse_args()
    if args.num_images is not None and args.num_images < 1:
        parser.error('--num-images takes a positive number')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.infer import load_detector  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.inputs import image_files  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.pointing import validation_images  # MMDetection takes seconds to import
    from cbam_mmdet.visualization.attention import attend, markdown

    files = image_files(args.inputs) if args.inputs else validation_images(cfg, args.data_root)
    rows = attend(
        load_detector(cfg, args.checkpoint, args.device, args.trust_checkpoint),
        files[: args.num_images],
        args.out_dir,
        pictures=args.pictures,
        warn=lambda message: print(f'warning: {message}', file=sys.stderr),
    )
    print(f'{markdown(rows)}\npictures and tables: {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
