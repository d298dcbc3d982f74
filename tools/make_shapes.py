"""Draw the demo data set: coloured shapes over clutter, in COCO's or Pascal VOC's layout.

    python tools/make_shapes.py data/shapes --num-train 320 --num-val 100

A complete set of the same settings is left as it is.
"""

import argparse
from pathlib import Path

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, allow_abbrev=False)
    parser.add_argument('out', metavar='OUT', type=Path, help='folder of the data set')
    parser.add_argument(
        '--style', choices=('coco', 'voc', 'both'), default='coco', help='layout (default: %(default)s)'
    )
    parser.add_argument('--num-train', type=int, default=320, metavar='N', help='training pictures (%(default)s)')
    parser.add_argument('--num-val', type=int, default=100, metavar='N', help='validation pictures (%(default)s)')
    parser.add_argument('--image-size', type=int, default=128, metavar='S', help='side in pixels (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, metavar='K', help='same seed, same pictures (%(default)s)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.datasets.shapes import CLASSES, STYLES, count_objects, ensure_shapes
    from cbam_mmdet.errors import UserError

    for style in STYLES if args.style == 'both' else [args.style]:
        try:
            ensure_shapes(args.out, args.num_train, args.num_val, args.image_size, args.seed, style)
            objects = count_objects(args.out, style)
        except (ValueError, OSError) as error:
            # Our own errors are whole sentences; the system's have a reason and a file apart.
            reason = getattr(error, 'strerror', None)
            message = f"cannot write '{error.filename}': {reason}" if reason else error
            raise UserError(str(message)) from error
        print(f'{style} style in {args.out.resolve()}')
        print(f'{"":7}{"images":>9}' + ''.join(f'{name:>10}' for name in CLASSES))
        for split, num_images in dict(train=args.num_train, val=args.num_val).items():
            print(f'{split:7}{num_images:9}' + ''.join(f'{objects[split][name]:10}' for name in CLASSES))


if __name__ == '__main__':
    run(main, parse_args())
