"""Draw a finished run: python tools/draw_run.py WORK_DIR

The training curve, and images with predicted and true boxes.
"""

import argparse
import sys
from pathlib import Path

from arguments import Parser, run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('work_dir', help='where tools/train.py wrote')
    parser.add_argument(
        '--results', metavar='FILE.pkl', help='what tools/test.py --out wrote (default: WORK_DIR/results.pkl)'
    )
    parser.add_shared('--num-images', default=12, help='images on the sheet (default: %(default)s)')
    parser.add_shared('--score-thr', default=0.5)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from cbam_mmdet.engine.checkpoint.files import newest_checkpoint
    from cbam_mmdet.engine.run_reader import (
        RESULTS,
        find_config,
        find_tested_config,
        require_results,
        require_work_dir,
        was_made_of,
    )
    from cbam_mmdet.utils.config import load_config

    work_dir = Path(args.work_dir)
    results = args.results or work_dir / RESULTS
    require_work_dir(work_dir)
    config = find_config(work_dir)
    require_results(results)
    newest, _ = newest_checkpoint(str(work_dir))
    if newest and not was_made_of(results, work_dir, newest):
        print(
            f'warning: {results} is not known to hold the detections of the newest checkpoint, {newest}: to write '
            f'them, tools/test.py CONFIG {newest} --work-dir {work_dir} --out {results}',
            file=sys.stderr,
        )
    config = find_tested_config(work_dir, results) or config
    cfg = load_config(str(config))
    from cbam_mmdet.visualization import draw_curve, draw_sheet  # MMDetection takes seconds to import

    curve = draw_curve(work_dir, work_dir / 'curve.png')
    sheet = draw_sheet(cfg, results, work_dir / 'detections.png', args.num_images, args.score_thr)
    print(f'training curve:                {curve}\npredicted and true boxes:      {sheet}')


if __name__ == '__main__':
    run(main, parse_args())
