"""Train a detector: python tools/train.py CONFIG [--data-root DIR]"""

import argparse
import os

from mmengine.config import DictAction

from cbam_mmdet.cli import run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector')
    parser.add_argument('config', help="config file, or 'cbam_mmdet::NAME.py' for one that the package ships")
    parser.add_argument('--work-dir', metavar='DIR', help='folder for logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument('--data-root', metavar='DIR', help="folder of the data set, in place of the config's")
    parser.add_argument(
        '--classes',
        metavar='A,B,C',
        help="the data set's own classes; 'auto' reads them from the training annotations",
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='fp16',
        default=False,
        choices=['fp16', 'bf16'],
        help='mixed precision: fp16 (the default; needs a GPU) or bf16',
    )
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='FILE',
        help="go on from this checkpoint; without FILE, from the newest in the work dir that is whole; 'auto': from that if there is one",
    )
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
        help='settings of the config to override, e.g. train_cfg.max_epochs=3 or "a.b=[1,2]"',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    from cbam_mmdet.apis.train import train  # after the arguments: MMDetection takes seconds to import

    train(
        cfg,
        data_root=args.data_root,
        classes=args.classes,
        work_dir=args.work_dir,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        resume=args.resume,
        trust_checkpoint=args.trust_checkpoint,
        launcher=args.launcher,
    )


if __name__ == '__main__':
    run_tool(main)
