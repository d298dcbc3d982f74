"""Examine this environment: python tools/doctor.py [--measure] [--json FILE]

One page of what is installed and what serves what, then self-tests of mmcv's operators and of every way to compute
CBAM, on each device present, against float64. It takes about 20 seconds. --measure adds the benchmarks: about a minute
on a CPU, some minutes on a GPU.

The exit code is 1 if anything is wrong; the last lines then say what to do. The page names no folder and no
environment variable of yours: put it on an issue, and the JSON, too.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
import types
from pathlib import Path

from arguments import USER_ERROR, Parser


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--measure', action='store_true', help='run the benchmarks, too')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything as JSON, too')
    args = parser.parse_args()
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f'--json {args.json}: there is no folder {args.json.parent}')
    return args


def import_package() -> Exception | None:
    """Import cbam_mmdet. If that fails, put an empty package in its place, by which its modules can be imported."""
    try:
        import cbam_mmdet  # noqa: F401
    except Exception as error:  # whatever a broken environment raises
        package = types.ModuleType('cbam_mmdet')
        package.__path__ = list(importlib.util.find_spec('cbam_mmdet').submodule_search_locations)
        sys.modules['cbam_mmdet'] = package
        return error
    return None


def main(args: argparse.Namespace) -> int:
    if importlib.util.find_spec('cbam_mmdet') is None:
        print('WRONG: cbam_mmdet is not installed in this environment: pip install .')
        return 1
    with contextlib.redirect_stdout(sys.stderr):  # other packages print when imported; stdout is for the page
        broken = import_package()
        from cbam_mmdet.apis import doctor

        benchmarks = Path(__file__).resolve().parents[1] / 'benchmarks' if args.measure else None
        report = doctor.examine(broken, benchmarks)
    print(doctor.as_text(report))
    if args.json:
        try:
            args.json.write_text(json.dumps(report.as_dict(), indent=1) + '\n', encoding='utf-8')
        except OSError as error:
            print(f'\nerror: --json {args.json} cannot be written: {error.strerror}', file=sys.stderr)
            return USER_ERROR
    return 1 if report.wrong else 0


if __name__ == '__main__':
    try:
        code = main(parse_args())
    except KeyboardInterrupt:
        code = 130  # what a shell reports for Ctrl-C
    sys.exit(code)
