"""Train a detector: python tools/train.py CONFIG [--data-root DIR]"""

import argparse

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_shared('config')
    parser.add_shared(
        '--work-dir',
        help='folder for logs and checkpoints (default: work_dirs/CONFIG, with --smoke work_dirs/CONFIG_smoke)',
    )
    parser.add_shared('--data-root', '--classes', '--train-ann', '--val-ann')
    parser.add_argument(
        '--amp',
        nargs='?',
        const='fp16',
        default=False,
        choices=['fp16', 'bf16'],
        help='mixed precision: fp16 (the default; needs a GPU) or bf16',
    )
    parser.add_argument(
        '--smoke',
        action='store_true',
        help='a first look: one epoch on a few small images, no pretrained backbone',
    )
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='FILE',
        help="resume from this checkpoint; without FILE, from the newest intact one in the work dir; 'auto': from that "
        'if there is one',
    )
    parser.add_shared('--trust-checkpoint', '--any-variant')
    parser.add_shared('--cfg-options', help='settings to override, e.g. train_cfg.max_epochs=3 or "a.b=[1,2]"')
    parser.add_launcher()
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.datasets.layouts import require_data_roots
    from cbam_mmdet.utils.config import load_config

    check = None if args.data_root else require_data_roots('train', 'val')
    cfg = load_config(args.config, args.cfg_options, check)
    from cbam_mmdet.apis.train import train  # MMDetection takes seconds to import

    train(
        cfg,
        data_root=args.data_root,
        classes=args.classes,
        train_ann=args.train_ann,
        val_ann=args.val_ann,
        work_dir=args.work_dir,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        smoke=args.smoke,
        resume=args.resume,
        trust_checkpoint=args.trust_checkpoint,
        launcher=args.launcher,
    )


if __name__ == '__main__':
    run(main, parse_args())
