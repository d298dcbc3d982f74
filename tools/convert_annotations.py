"""Convert annotations: a whole data set of any known format into another one's layout,

python tools/convert_annotations.py FOLDER NEW_FOLDER --to coco

or one file between Pascal VOC and COCO, where the suffixes .txt and .json say the direction:

python tools/convert_annotations.py DIR/ImageSets/Main/trainval.txt FILE.json
"""

import argparse
import os

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(
        __doc__,
        epilog='COCO, Pascal VOC, YOLO, CVAT and LabelMe are read. Difficult objects become crowds, and back.',
    )
    parser.add_argument('source', help='folder of a data set; or an image set of VOC, or a .json of COCO')
    parser.add_argument('target', help='new folder; or the other of the two files, to be written')
    parser.add_argument('--to', choices=['coco', 'voc', 'yolo'], help='the format of the new folder')
    parser.add_shared('--train-ann', '--val-ann')
    parser.add_argument('--copy', action='store_true', help='copy the images into the new folder, in place of links')
    args = parser.parse_args()
    if os.path.isdir(args.source) != bool(args.to):
        parser.error('--to FORMAT goes with the folder of a data set, and is needed there')
    if (args.train_ann or args.val_ann) and not args.to:
        parser.error('--train-ann and --val-ann go with the folder of a data set')
    return args


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.errors import UserError

    if not os.path.exists(args.source):
        raise UserError(f'{args.source} does not exist')
    if args.to:
        return convert_folder(args)
    if not os.path.isfile(args.source):
        raise UserError(f'{args.source} is not a file')
    from cbam_mmdet.datasets.convert import convert  # MMDetection takes seconds to import

    print(f'{convert(args.source, args.target)} images: {args.target}')


def convert_folder(args: argparse.Namespace) -> None:
    from cbam_mmdet.datasets.formats.recognize import read_folder  # MMDetection takes seconds to import
    from cbam_mmdet.datasets.formats.write import write_data_set

    found = read_folder(args.source, args.train_ann, args.val_ann)
    notes = write_data_set(found, args.source, args.target, args.to, args.copy)
    for note in (f'{args.source} is in the format of {found.style}', *found.notes, *notes):
        print(note)
    counts = ', '.join(f'{len(content["images"])} ({split})' for split, content in found.distinct().items())
    print(f'images: {counts}: {args.target}')


if __name__ == '__main__':
    run(main, parse_args())
