"""Compare configs: python tools/ablate.py configs/ablation/*.py [--work-dir DIR] [--data-root DIR]

Trains one after another and writes a table of accuracy, parameters, FLOPs and speed. Kill it whenever you like: started
again with the same arguments, it goes on where it stopped.
"""

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from mmengine.config import DictAction

from cbam_mmdet.cli import run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files, e.g. those of configs/ablation/')
    parser.add_argument('--work-dir', default='work_dirs/ablation', metavar='DIR', help='default: %(default)s')
    parser.add_argument(
        '--base',
        metavar='CONFIG',
        help='the detector with CBAM that configs/ablation/ varies (default: configs/demo/faster_rcnn_cbam.py)',
    )
    parser.add_argument('--data-root', metavar='DIR', help="folder of the data set, in place of the configs'")
    parser.add_argument(
        '--classes',
        metavar='A,B,C',
        help="the data set's own classes; 'auto' reads them from the training annotations",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings to override in every config, e.g. train_cfg.max_epochs=3',
    )
    parser.add_argument('--rounds', type=int, default=20, metavar='N', help='measurements of speed (%(default)s)')
    parser.add_argument(
        '--print-commands',
        action='store_true',
        help='print the training commands that are left, for a cluster; later, the same without it makes the table',
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error('--rounds must be at least 1')
    return args


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training is stopped too
    with contextlib.redirect_stdout(sys.stderr):  # MMDetection prints when imported; stdout may be a list of commands
        from cbam_mmdet.apis.ablate import ablate  # after the arguments: this takes seconds

    return ablate(
        args.configs,
        args.work_dir,
        Path(__file__).resolve().parent,
        base=args.base,
        data_root=args.data_root,
        classes=args.classes,
        cfg_options=args.cfg_options,
        rounds=args.rounds,
        print_commands=args.print_commands,
    )


if __name__ == '__main__':
    run_tool(main)
