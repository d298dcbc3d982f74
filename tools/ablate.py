"""Compare configs: python tools/ablate.py configs/ablation/*.py [--work-dir DIR] [--data-root DIR]

Trains one after another and writes a table of accuracy, parameters, FLOPs and speed. It can be killed at any moment:
started again with the same arguments, it resumes where it stopped.
"""

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from arguments import Parser, count, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files, e.g. those of configs/ablation/')
    parser.add_shared('--work-dir', default='work_dirs/ablation', help='default: %(default)s')
    parser.add_argument(
        '--base',
        metavar='CONFIG',
        help='the detector with CBAM that configs/ablation/ varies (default: configs/demo/faster_rcnn_cbam.py)',
    )
    parser.add_shared('--data-root', '--classes', '--train-ann', '--val-ann')
    parser.add_shared('--cfg-options', help='settings to override in every config, e.g. train_cfg.max_epochs=3')
    parser.add_argument('--rounds', type=count, default=20, metavar='N', help='measurements of speed (%(default)s)')
    parser.add_argument(
        '--print-commands',
        action='store_true',
        help='print the training commands that are left, for a cluster; later, the same without it makes the table',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    from cbam_mmdet.utils.config import find_config_file

    for path in [*args.configs, *([args.base] if args.base else [])]:
        find_config_file(path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training is stopped too
    with contextlib.redirect_stdout(sys.stderr):  # MMDetection prints when imported; stdout may be a list of commands
        from cbam_mmdet.apis.ablate import ablate

    return ablate(
        args.configs,
        args.work_dir,
        Path(__file__).resolve().parent,
        base=args.base,
        data_root=args.data_root,
        classes=args.classes,
        train_ann=args.train_ann,
        val_ann=args.val_ann,
        cfg_options=args.cfg_options,
        rounds=args.rounds,
        print_commands=args.print_commands,
    )


if __name__ == '__main__':
    run(main, parse_args())
