"""Serve mmcv's operators in every program of this environment: python tools/serve_mmcv_ops.py [--off]"""

import argparse

from cbam_mmdet.cli import run_tool
from cbam_mmdet.compat.startup import disable, enable


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Let programs that do not import cbam_mmdet, such as MMDetection's tools/test.py, run without a compiled mmcv"
    )
    parser.add_argument('--off', action='store_true', help='take it back')
    args = parser.parse_args()
    folder = disable() if args.off else enable()
    print(f"mmcv's operators are {'no longer ' if args.off else ''}served in every program of {folder}")


if __name__ == '__main__':
    run_tool(main)
