"""Convert annotations between Pascal VOC and COCO; the suffixes .txt and .json say the direction:

python tools/convert_annotations.py DIR/ImageSets/Main/trainval.txt FILE.json
"""

import argparse
from pathlib import Path

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, epilog='Images are not copied. Difficult objects become crowds (iscrowd=1), and back.')
    parser.add_argument('source', help="VOC's image set DIR/ImageSets/Main/NAME.txt, or a .json of COCO")
    parser.add_argument('target', help="the other of the two, to be written; VOC's XML files go to DIR/Annotations")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.errors import UserError

    if not Path(args.source).is_file():
        raise UserError(f'{args.source} does not exist')
    from cbam_mmdet.datasets.convert import convert  # MMDetection takes seconds to import

    print(f'{convert(args.source, args.target)} images: {args.target}')


if __name__ == '__main__':
    run(main, parse_args())
