"""Write a report of a run, or of several compared: python tools/report.py WORK_DIR [WORK_DIR ...]

One HTML file that opens without a network, and its tables (CSV, Markdown) and figures (PNG, PDF) beside it.
"""

import argparse

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(
        __doc__,
        epilog='WORK_DIR/results.pkl, by tools/test.py --out, is taken if it is newer than the newest checkpoint; else '
        'that detects now.',
    )
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help='where tools/train.py wrote; others are compared with the first',
    )
    parser.add_shared('--out-dir', help='where to write (default: report/ in the first work dir)')
    parser.add_shared('--data-root')
    parser.add_shared('--num-images', default=12, help='pictures of detections (default: %(default)s)')
    parser.add_shared('--score-thr', default=0.5)
    parser.add_shared('--device', '--trust-checkpoint', '--any-variant')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.engine.run_reader import require_work_dir

    for folder in args.work_dirs:
        require_work_dir(folder)
    from cbam_mmdet.visualization.report import write_report  # MMDetection takes seconds to import

    path = write_report(
        args.work_dirs,
        args.out_dir,
        data_root=args.data_root,
        num_images=args.num_images,
        score_thr=args.score_thr,
        device=args.device,
        trust_checkpoint=args.trust_checkpoint,
    )
    print(f'report: {path}')


if __name__ == '__main__':
    run(main, parse_args())
