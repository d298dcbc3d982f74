"""Draw a finished run: python tools/draw_run.py WORK_DIR"""

import argparse
from pathlib import Path

from cbam_mmdet.cli import run_tool
from cbam_mmdet.utils.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Draw the training curve of a run, and images with predicted and true boxes'
    )
    parser.add_argument('work_dir', help='where tools/train.py wrote')
    parser.add_argument(
        '--results', metavar='FILE.pkl', help='what tools/test.py --out wrote (default: WORK_DIR/results.pkl)'
    )
    parser.add_argument('--num-images', type=int, default=12, help='images on the sheet')
    parser.add_argument('--score-thr', type=float, default=0.5, help='leave out predictions with a lower score')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    work_dir = Path(args.work_dir)
    from cbam_mmdet.engine.run_reader import find_config  # after the arguments: torch takes seconds to import

    cfg = load_config(str(find_config(work_dir)))
    from cbam_mmdet.visualization import draw_curve, draw_sheet  # MMDetection takes seconds to import

    curve = draw_curve(work_dir, work_dir / 'curve.png')
    results = args.results or work_dir / 'results.pkl'
    sheet = draw_sheet(cfg, results, work_dir / 'detections.png', args.num_images, args.score_thr)
    print(f'training curve:                {curve}\npredicted and true boxes:      {sheet}')


if __name__ == '__main__':
    run_tool(main)
