"""Write a report of a run, or of several compared: python tools/report.py WORK_DIR [WORK_DIR ...]

One HTML file that opens without a network, and its tables (CSV, Markdown) and figures (PNG, PDF) beside it.
"""

import argparse

from cbam_mmdet.cli import run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help='where tools/train.py wrote; others are compared with the first',
    )
    parser.add_argument('--out-dir', metavar='DIR', help='where to write (default: report/ in the first work dir)')
    parser.add_argument('--data-root', metavar='DIR', help="folder of the data set, in place of the configs'")
    parser.add_argument('--num-images', type=int, default=12, metavar='N', help='pictures of detections (%(default)s)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.5,
        metavar='S',
        help='leave out detections with a lower score there (%(default)s)',
    )
    parser.add_argument(
        '--device', help="for the attention maps: 'cpu', 'cuda:0', ... (default: the GPU if there is one)"
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints that hold more than tensors and plain data: this runs code from the file',
    )
    parser.epilog = 'WORK_DIR/results.pkl, by tools/test.py --out, is taken if it is newer than the newest checkpoint; else that detects now.'
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error('--num-images takes a positive number')
    return args


def main() -> None:
    args = parse_args()
    from cbam_mmdet.visualization.report import write_report  # after the arguments: MMDetection takes seconds to import

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
    run_tool(main)
