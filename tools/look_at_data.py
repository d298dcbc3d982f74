"""Look at a data set before training on it: python tools/look_at_data.py FOLDER

Recognizes its format, prints what it holds, and writes one HTML page of pictures with their boxes.
"""

import argparse
from pathlib import Path

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('data_root', metavar='FOLDER', help='in the format of COCO, Pascal VOC, YOLO, CVAT or LabelMe')
    parser.add_shared('--train-ann', '--val-ann')
    parser.add_argument(
        '--out', metavar='FILE.html', help='default: work_dirs/data_NAME.html, NAME being that of FOLDER'
    )
    parser.add_shared('--num-images', default=24, help='pictures on the page (default: %(default)s)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.datasets.formats.as_coco import duplicates  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.formats.recognize import read_folder
    from cbam_mmdet.visualization.data_page import write_data_page

    found = read_folder(args.data_root, args.train_ann, args.val_ann)
    found.notes += duplicates(found, Path(args.data_root))
    out = args.out or f'work_dirs/data_{Path(args.data_root).resolve().name}.html'  # one page for each data set
    tables = write_data_page(found, args.data_root, out, args.num_images)
    print(f'{args.data_root} is in the format of {found.style}')
    for note in found.notes:
        print(note)
    for table in tables:
        print(f'\n{table.markdown()}')
    print(f'\npictures with their boxes: {out}')


if __name__ == '__main__':
    run(main, parse_args())
