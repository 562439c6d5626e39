"""Pretrain and judge from Python: what ``vmf-pretrain fit`` and ``vmf-pretrain eval`` do on the command line.

python examples/pretrain_and_judge.py --data PHOTOS --out runs/example      # any folder of images; sub-folders are classes
python examples/pretrain_and_judge.py --out runs/example                    # scikit-learn's digits, a few minutes on a CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vmf_pretrain import PretrainError, evaluate, pretrain


def main() -> None:
    """Pretrain, evaluate, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the run")
    parser.add_argument("--epochs", type=int, help="(default: those of the recipe)")
    parser.add_argument("--tasks", nargs="+", default=["knn", "linear"], help="evaluations (default: knn linear)")
    asked = parser.parse_args()
    chosen: dict[str, Any] = {"recipe": "digits"} if asked.data is None else {"data": asked.data}
    if asked.epochs is not None:
        chosen["train.epochs"] = asked.epochs
        chosen["optim.warmup_epochs"] = chosen["loss.warmup_teacher_temp_epochs"] = asked.epochs // 8
    try:
        done = pretrain(out=asked.out, method="dino-vmf", **chosen)
        answer = evaluate(asked.out, tasks=asked.tasks, data=asked.data)
    except PretrainError as error:  # one sentence: what was given, and what was expected
        raise SystemExit(str(error)) from None
    print(f"run: {done.folder}; effective rank of the features: {done.summary['rankme']:.1f}")
    for task, result in answer.results.items():
        for figure in result.figures:
            interval = "" if figure.low is None else f" (95 % interval {figure.low:.1f} to {figure.high:.1f})"
            print(f"{task}: {figure.name} {figure.value:.1f} {figure.unit}{interval}")


if __name__ == "__main__":
    main()
