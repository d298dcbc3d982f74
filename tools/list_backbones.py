"""Print the table of backbones: where CBAM goes in each kind, and the parameters that it adds."""

import argparse

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--only', nargs='+', metavar='NAME', help="rows of the table, e.g. 'ResNet-18'")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.analysis.backbone_table import BACKBONES, as_markdown, measure_all
    from cbam_mmdet.errors import UserError, did_you_mean

    for name in args.only or []:
        if name not in BACKBONES:
            hint = did_you_mean(name, BACKBONES) or '.'
            raise UserError(f'--only {name}: the table has no such row{hint} It has: {", ".join(BACKBONES)}')
    print(as_markdown(measure_all(args.only or BACKBONES)), end='')


if __name__ == '__main__':
    run(main, parse_args())
