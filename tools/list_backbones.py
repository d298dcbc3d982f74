"""Print README's table: where CBAM goes in each kind of backbone, and the parameters it adds."""

import argparse

from cbam_mmdet.cli import run_tool
from cbam_mmdet.errors import UserError, did_you_mean


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='List the backbones that CBAM was tried in, with place and parameters added'
    )
    parser.add_argument('--only', nargs='+', metavar='NAME', help="rows of the table, e.g. 'ResNet-18'")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from cbam_mmdet.analysis.backbone_table import (  # after the arguments: imports take seconds
        BACKBONES,
        as_markdown,
        measure_all,
    )

    for name in args.only or []:
        if name not in BACKBONES:
            raise UserError(
                f'--only {name}: the table has no such row{did_you_mean(name, BACKBONES) or "."} It has: {", ".join(BACKBONES)}'
            )
    print(as_markdown(measure_all(args.only or BACKBONES)), end='')


if __name__ == '__main__':
    run_tool(main)
