"""``python -m vmf_pretrain.evaluation.retrieval.convert gnd_roxford5k.pkl gnd.json``: a published ground truth as JSON."""

import argparse
import sys
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.retrieval.ground_truth import read_ground_truth
from vmf_pretrain.storage.durable import replace_durably


def main(arguments: list[str] | None = None) -> int:
    """Convert one file; 0, or 2 after a sentence on what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("published", type=Path, help="gnd_roxford5k.pkl or gnd_rparis6k.pkl; nothing in it is run")
    parser.add_argument("json", type=Path, help="the file to write")
    chosen = parser.parse_args(arguments)
    try:
        truth = read_ground_truth(chosen.published)
        replace_durably(chosen.json, truth.json().encode())
    except PretrainError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{chosen.json} cannot be written ({error.strerror}).", file=sys.stderr)
        return 2
    print(f"{len(truth.queries)} queries to {len(truth.images)} images in {chosen.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
