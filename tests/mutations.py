"""Faults, each put into a copy of the tree in place of one of the lines that matter most: do the tests notice?

    python -m tests.mutations                  # each against the quick tests of the files that have to notice it
    python -m tests.mutations --all            # each against the whole quick loop instead: half an hour
    python -m tests.mutations "sign of the centre" ...

Exits 1 if a fault is missed. What the quick loop notices the whole suite does too, for it runs the same tests. A fault of
ranks is tried against tests that start them, which the quick loop does not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fault import Mutation, mutated
from tests.faults_of_metrics import METRICS

ROOT = Path(__file__).parents[1]
COPIED = (
    "csrc",
    "setup.py",
    "vmf_kernels",
    "python",
    "tests",
    "bench",
    "pyproject.toml",
    "README.md",
    "constraints.txt",
)
FAILED = 1  # exit code of pytest where a test fails; another means that none ran, or that pytest broke

ON_TILES = (("tests/backends/test_native_tiles.py",), "compiles")  # tests and their marker
MUTATIONS = (
    Mutation(
        "sign of the centre",
        "vmf_kernels/centering/logit.py",
        "return -center / tau",
        "return center / tau",
        ("tests/centering/test_centers.py",),
    ),
    Mutation(
        "direction of the centre's running mean",
        "vmf_kernels/centering/running_mean.py",
        "return center * self.momentum + batch * (1 - self.momentum)",
        "return batch * self.momentum + center * (1 - self.momentum)",
        ("tests/centering/test_centers.py",),
    ),
    Mutation(
        "rounds of Sinkhorn-Knopp",
        "vmf_kernels/centering/sinkhorn.py",
        "for _ in range(self.iterations - 1):",
        "for _ in range(self.iterations):",
        ("tests/centering/test_sinkhorn.py",),
    ),
    Mutation(
        "temperature of the gradient at the features, equation (4)",
        "vmf_kernels/backends/composed.py",
        "feature_grad = student_keys.scale * (n_S",
        "feature_grad = (n_S",
        ("tests/ops/test_prototype_cross_entropy.py",),
    ),
    Mutation(
        "student's against teacher's mass in the gradient of the normaliser, equation (6)",
        "vmf_kernels/backends/composed.py",
        "return self.mass_2K[0] - self.mass_2K[1]",
        "return self.mass_2K[1] - self.mass_2K[0]",
        ("tests/ops/test_prototype_cross_entropy.py",),
    ),
    Mutation(
        "rescaling of the online softmax",
        "vmf_kernels/backends/streaming.py",
        "self.mass_R = decay * self.mass_R + p_BR.sum(dim=0)",
        "self.mass_R = self.mass_R + p_BR.sum(dim=0)",
        ("tests/backends/test_streaming.py",),
    ),
    Mutation(
        "rescaling of the kernels' online softmax",
        "vmf_kernels/backends/triton/row_kernels.py",
        "mass = decay * mass + tl.sum(b_p, 1)",
        "mass = mass + tl.sum(b_p, 1)",
        ("tests/backends/test_triton.py",),
    ),
    Mutation(
        "projection of the weight norm's pull-back",
        "vmf_kernels/prototypes.py",
        "gradient_KD[rows].addcmul_(weight, (along * inverse_norm)[:, None], value=-1).mul_(gain[:, None])",
        "gradient_KD[rows].mul_(gain[:, None])",
        ("tests/ops/test_prototype_cross_entropy.py",),
    ),
    Mutation(
        "slope of the vMF normaliser",
        "vmf_kernels/bessel.py",
        "return -grad * vmf_mean_resultant_length(kappa, ctx.dim), None",
        "return grad * vmf_mean_resultant_length(kappa, ctx.dim), None",
        ("tests/test_bessel.py",),
    ),
    Mutation(
        "pairs of a view with itself",
        "vmf_kernels/pairing.py",
        "weights.fill_diagonal_(0.0)",
        "weights.fill_diagonal_(1.0)",
        ("tests/losses/test_dino.py",),
    ),
    Mutation(
        "negative and infinite weights",
        "vmf_kernels/pairing.py",
        "if not (least >= 0 and most < math.inf):",
        "if not (least >= 0 or most < math.inf):",
        ("tests/test_pairing.py",),
    ),
    Mutation(
        "weight of a masked patch in its image",
        "vmf_kernels/losses/masked_patches.py",
        "return mask_CN / mask_CN.sum(dim=1, keepdim=True).clamp(min=1.0)",
        "return mask_CN / mask_CN.sum().clamp(min=1.0)",
        ("tests/losses/test_ibot.py",),
    ),
    Mutation(
        "a row as its own neighbour",
        "vmf_kernels/losses/koleo.py",
        "similarity_BN.diagonal(start).fill_(-torch.inf)",
        "similarity_BN.diagonal(start).fill_(1.0)",
        ("tests/losses/test_koleo.py",),
    ),
    Mutation(
        "epoch of the teacher's temperature",
        "vmf_kernels/losses/temperatures.py",
        "else self.values[epoch]",
        "else self.values[max(epoch - 1, 0)]",
        ("tests/losses/test_dino.py",),
    ),
    Mutation(
        "incoming gradient of the loss",
        "vmf_kernels/ops/ready_gradients.py",
        "return [self._scale_in_place(g, scale) for g in gradients]",
        "return list(gradients)",
        ("tests/ops/test_ready_gradients.py",),
    ),
    Mutation(
        "second backward pass of a retained graph",
        "vmf_kernels/ops/ready_gradients.py",
        "        self._gradients = None\n        if scale",
        "        if scale",
        ("tests/ops/test_ready_gradients.py",),
    ),
    Mutation(
        "gradient into the targets",
        "vmf_kernels/ops/target_cross_entropy.py",
        '_flat(targets.detach(), "targets")',
        '_flat(targets, "targets")',
        ("tests/ops/test_target_cross_entropy.py",),
    ),
    Mutation(
        "sum over ranks",
        "vmf_kernels/ranks.py",
        "return _all_reduce(tensor, ReduceOp.SUM, group)",
        "return _all_reduce(tensor, ReduceOp.MAX, group)",
        ("tests/losses/test_koleo_ranks.py",),
        marker="",
    ),
    Mutation(
        "direction of the teacher's running mean",
        "python/vmf_pretrain/methods/dino.py",
        "(1.0 - self.momentum.at(place.step)) * share",
        "self.momentum.at(place.step) * share",
        ("tests/pretrain/engine/test_loop.py",),
    ),
    *METRICS,
    Mutation(
        "random numbers of a step that a resumed run repeats",
        "python/vmf_pretrain/engine/loop.py",
        "torch.manual_seed(stream_seed(self.config.seed, TRAINING_STEP, step))",
        "stream_seed(self.config.seed, TRAINING_STEP, step)",
        ("tests/pretrain/engine/test_loop.py",),
    ),
    Mutation(
        "state of the optimizer that a resumed run goes on with",
        "python/vmf_pretrain/storage/optimizer_state.py",
        'return tensor.to(parameter.device if on_device else "cpu", copy=True)',
        'return (0 * tensor).to(parameter.device if on_device else "cpu", copy=True)',
        ("tests/pretrain/storage/test_checkpoint_optimizer.py",),
    ),
    Mutation(
        "register of a product on the matrix unit",
        "csrc/cpu/tiles.h",
        "_tile_dpbf16ps(3, 5, 7)",
        "_tile_dpbf16ps(3, 5, 6)",
        *ON_TILES,
    ),
    Mutation(
        "a stage of the transposition of G",
        "csrc/cpu/tiles.h",
        "swap_in_all<4>(square), swap_in_all<2>(square)",
        "swap_in_all<2>(square)",
        *ON_TILES,
    ),
    Mutation(
        "zeros beyond the students of a row of G",
        "csrc/cpu/gather.h",
        "std::memset(next + students, 0,",
        "if (false) std::memset(next + students, 0,",
        *ON_TILES,
    ),
    Mutation(
        "zeros beyond the prototypes of a block of G",
        "csrc/cpu/gather.h",
        "std::memset(by_prototype + std::ptrdiff_t(pairs) * students, 0,",
        "if (false) std::memset(by_prototype + std::ptrdiff_t(pairs) * students, 0,",
        *ON_TILES,
    ),
    Mutation(
        "configuration of a thread's tile registers",
        "csrc/cpu/product.h",
        "using Registers = TileRegisters;",
        "using Registers = NoRegisters;",
        *ON_TILES,
    ),
)


def copy_of_the_tree(folder: Path) -> Path:
    """What the tests read, modules that have been built among it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def tests_of(folder: Path, files: tuple[str, ...], marker: str) -> subprocess.CompletedProcess[str]:
    """The tests of some files, or of all, that have a marker, against the tree in a folder; ends with the first failure."""
    command = [sys.executable, "-m", "pytest", "-m", marker, "-x", "-q", "-p", "no:cacheprovider", *files]
    path = os.pathsep.join([str(folder), str(folder / "python"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def noticed(folder: Path, mutation: Mutation, files: tuple[str, ...]) -> str | None:
    """The test that notices a fault in the copy of the tree, which is mended afterwards; None where none does."""
    path = folder / mutation.file
    whole = path.read_text()
    path.write_text(mutated(whole, mutation))
    try:
        done = tests_of(folder, files, mutation.marker)
    finally:
        path.write_text(whole)
    if done.returncode == -signal.SIGABRT:  # the stand-in of a part ends the process where the part would
        return done.stderr.strip().splitlines()[0]
    if done.returncode not in (0, FAILED):
        raise RuntimeError(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    said = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    failures = [line.partition(" - ")[0] for line in said]
    return failures[0] if failures else None


def main(arguments: list[str] | None = None) -> int:
    """Run the script; 1 if a fault was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="of the faults; all by default")
    parser.add_argument("--all", action="store_true", help="against the whole quick loop")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not options.names or mutation.name in options.names]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_the_tree(Path(name))
        for mutation in chosen:
            by = noticed(folder, mutation, () if options.all else mutation.tests)
            missed += by is None
            print(f"{mutation.name}: {'MISSED' if by is None else f'noticed by {by}'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
