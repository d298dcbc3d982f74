"""Serve mmcv's operators in every program of this environment: python tools/serve_mmcv_ops.py [--off]

So programs that do not import cbam_mmdet, such as MMDetection's tools/test.py, run without a compiled mmcv.
"""

import argparse

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--off', action='store_true', help='take it back')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.compat.startup import disable, enable

    folder = disable() if args.off else enable()
    print(f"mmcv's operators are {'no longer ' if args.off else ''}served in every program of {folder}")


if __name__ == '__main__':
    run(main, parse_args())
