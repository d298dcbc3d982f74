"""Evaluate a detector: python tools/test.py CONFIG CHECKPOINT [--data-root DIR]"""

import argparse
import os

from mmengine.config import DictAction

from cbam_mmdet.cli import run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Evaluate a detector')
    parser.add_argument('config', help="config file, or 'cbam_mmdet::NAME.py' for one that the package ships")
    parser.add_argument('checkpoint', help='checkpoint file, or a work dir for its newest')
    parser.add_argument('--work-dir', metavar='DIR', help='folder for the log (default: work_dirs/CONFIG)')
    parser.add_argument('--data-root', metavar='DIR', help="folder of the data set, in place of the config's")
    parser.add_argument(
        '--classes',
        metavar='A,B,C',
        help="the data set's own classes; 'auto' reads them from the training annotations",
    )
    parser.add_argument('--out', metavar='FILE.pkl', help='write the detections of all images')
    parser.add_argument('--show', action='store_true', help='show the detections in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures with the detections below the work dir')
    parser.add_argument('--wait-time', type=float, default=2, metavar='S', help='seconds that a window stays')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load a checkpoint that holds more than tensors and plain data: this runs code from the file',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings of the config to override, e.g. test_dataloader.batch_size=4',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.test import test  # after the arguments: MMDetection takes seconds to import

    test(
        cfg,
        args.checkpoint,
        data_root=args.data_root,
        classes=args.classes,
        work_dir=args.work_dir,
        out=args.out,
        show=args.show,
        show_dir=args.show_dir,
        wait_time=args.wait_time,
        tta=args.tta,
        trust_checkpoint=args.trust_checkpoint,
        launcher=args.launcher,
    )


if __name__ == '__main__':
    run_tool(main)
