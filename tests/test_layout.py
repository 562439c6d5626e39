"""How the library is laid out: who may import whom, how long a file may be, what is public, and what importing does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmf_kernels

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
MOST_LINES = 400

README = ROOT / "vmf_kernels" / "README.md"
ROW = re.compile(r"^\| `([\w./]+\.py)` \|")
FOLDER = re.compile(r"^### (?:`([\w/]+)/`)?")


def order_of(page: str) -> list[str]:
    """Modules in the order of the tables of files, a folder's own name before its files where no row names ``__init__.py``."""
    section = page.partition("\n## The files\n")[2].partition("\n## ")[0]
    folder, paths = "", list[str]()
    for line in section.splitlines():
        heading, row = FOLDER.match(line), ROW.match(line)
        if heading:
            folder = f"{heading[1]}/" if heading[1] else ""
        elif row:
            paths.append(folder + row[1])
    modules = [path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".") for path in paths]
    order: list[str] = []
    for module in modules:
        parents = [module.rsplit(".", depth)[0] for depth in range(module.count("."), 0, -1)]
        order += [parent for parent in parents if parent not in [*order, *modules]] + [module]
    return order


# Each module imports only from modules above it.
ORDER = order_of(README.read_text())

# Every public name. It grows only in the commit that explains why.
PUBLIC = [
    "AssignmentStatistics",
    "CenteringRule",
    "CrossEntropy",
    "DINOHead",
    "DINOLoss",
    "DINOvMFHead",
    "DINOvMFLoss",
    "DistributedKoLeoLoss",
    "IBOTLoss",
    "IBOTPatchLoss",
    "IBOTvMFLoss",
    "IBOTvMFPatchLoss",
    "KoLeoLoss",
    "LogitCenter",
    "ProbabilityCenter",
    "PrototypeKoLeoLoss",
    "PrototypeLayer",
    "PrototypeLogits",
    "Prototypes",
    "SinkhornKnopp",
    "TeacherTargets",
    "UniquePrototypes",
    "fuse_head",
    "linear_prototypes",
    "log_vmf_constant",
    "logit_cross_entropy",
    "matched_prototype_cross_entropy",
    "multi_crop_weights",
    "normalized_prototypes",
    "prototype_cross_entropy",
    "prototype_usage",
    "target_cross_entropy",
    "unique_prototypes",
    "vmf_mean_resultant_length",
    "vmf_prototypes",
    "weight_norm_prototypes",
    "weight_norm_vmf_prototypes",
]


def module_name(path: Path, package: Path) -> str:
    """Dotted name below the package; "" for the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_the_library(source: str) -> Iterator[tuple[str, str | None]]:
    """Every import of vmf_kernels: the dotted name below it, and the name taken from there if any; relative ones whole."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} has a relative import; write vmf_kernels out"
            if node.module is not None and node.module.split(".")[0] == "vmf_kernels":
                yield from ((node.module.partition(".")[2], alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from ((n.partition(".")[2], None) for n in names if n.split(".")[0] == "vmf_kernels")


def layering_faults(sources: dict[str, str]) -> list[str]:
    """What breaks the order, by module name and source; a sentence each."""
    faults = [f"{name} is not in the tables of vmf_kernels/README.md: add it" for name in sources if name not in ORDER]
    for name in sources.keys() & set(ORDER):
        for module, taken in imports_of_the_library(sources[name]):
            target = f"{module}.{taken}".lstrip(".") if f"{module}.{taken}".lstrip(".") in ORDER else module
            if target not in ORDER:
                faults.append(f"{name} imports {target}, which is not in the tables of vmf_kernels/README.md: add it")
            elif ORDER.index(target) >= ORDER.index(name):
                faults.append(f"{name or 'vmf_kernels'} imports {target or 'vmf_kernels'}, which is not above it")
    return faults


def private_faults(source: str) -> list[str]:
    """Imports of anything but public names; a sentence each."""
    return [
        f"imports {taken or 'all'} from vmf_kernels.{module}; expected `from vmf_kernels import` of a public name"
        for module, taken in imports_of_the_library(source)
        if module.split(".")[0] != "compat" and (module or taken not in [*PUBLIC, "compat", "__version__"])
    ]


def test_every_module_imports_only_from_those_above_it() -> None:
    package = ROOT / "vmf_kernels"
    faults = layering_faults({module_name(p, package): p.read_text() for p in package.rglob("*.py")})
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("bessel", "from vmf_kernels.prototypes import Keys", "bessel imports prototypes, which is not above it"),
        ("ops.assignments", "def f():\n    from vmf_kernels.backends import streaming, triton", None),
        (
            "backends.contract",
            "from vmf_kernels.backends import reference",
            "contract imports backends.reference, which",
        ),
        ("ops.assignments", "import vmf_kernels.losses", "ops.assignments imports losses, which is not above it"),
        ("heads.dino", "from vmf_kernels import DINOLoss", "heads.dino imports vmf_kernels, which is not above it"),
        (
            "losses.dino",
            "from vmf_kernels.newcomer import thing",
            "losses.dino imports newcomer, which is not in the tables",
        ),
        ("newcomer", "", "newcomer is not in the tables of vmf_kernels/README.md: add it"),
    ],
)
def test_an_import_against_the_order_is_found(name: str, source: str, said: str | None) -> None:
    """Negative control."""
    faults = layering_faults({name: source})
    assert (said is None and not faults) or (said is not None and said in faults[0]), f"found {faults}"


def test_a_relative_import_is_refused() -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="line 1 has a relative import"):
        layering_faults({"bessel": "from ._debye import TABLE"})


def test_the_tables_list_no_module_that_is_gone() -> None:
    package = ROOT / "vmf_kernels"
    gone = set(ORDER) - {module_name(p, package) for p in package.rglob("*.py")}
    assert not gone, f"vmf_kernels/README.md lists {sorted(gone)}, which do not exist"


def named_places(page: str) -> list[tuple[str, str | None]]:
    """(path, symbol) of every ``path.py`` or ``path.py::symbol`` between backticks; "<" marks a name to fill in."""
    found = re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|h|json|md|sh|cu))(?:::(\w+))?`", page)
    return [(path, symbol or None) for path, symbol in found]


def misnamed(page: str, roots: list[Path]) -> list[str]:
    """Places that a page names and that do not exist below any of the folders; a sentence each."""
    faults = []
    for path, symbol in named_places(page):
        files = [root / path for root in roots if (root / path).is_file()]
        if not files:
            faults.append(f"{path} does not exist")
        elif symbol is not None and not re.search(rf"^(class |def )?{symbol}\b", files[0].read_text(), re.MULTILINE):
            faults.append(f"{path} has no {symbol}")
    return faults


@pytest.mark.parametrize("page", ["vmf_kernels/ONE_CALL.md", "CONTRIBUTING.md"])
def test_pages_name_places_that_exist(page: str) -> None:
    text, package = (ROOT / page).read_text(), ROOT / "vmf_kernels"
    assert len(named_places(text)) > 20, f"{page} names few places: is the pattern still right?"
    roots = [ROOT, package, *(package / folder for folder in ("centering", "losses", "backends/triton"))]
    faults = misnamed(text, roots)
    assert not faults, f"{page}: " + "\n".join(faults)


def test_a_place_that_does_not_exist_is_found() -> None:
    """Negative control."""
    page = "See `ops/operators.py::operator`, `ops/operators.py::operators` and `ops/gone.py`."
    found = misnamed(page, [ROOT / "vmf_kernels"])
    assert found == ["ops/operators.py has no operators", "ops/gone.py does not exist"], found


@pytest.mark.parametrize("folder", ["vmf_kernels", "python"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    long = {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines, split by noun: {long}"


def test_the_public_names_are_the_frozen_list() -> None:
    assert vmf_kernels.__all__ == PUBLIC
    missing = [name for name in PUBLIC if not hasattr(vmf_kernels, name)]
    assert not missing, f"public but absent: {missing}"


@pytest.mark.parametrize("package", ["vmf_pretrain", "vmf_bench"])
def test_packages_beside_the_library_use_public_names_only(package: str) -> None:
    files = list((ROOT / "python" / package).rglob("*.py"))
    faults = [f"{p.name} {fault}" for p in files for fault in private_faults(p.read_text())]
    assert files, f"no file of {package} was found"
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("from vmf_kernels import DINOLoss", False),
        ("from vmf_kernels.compat.dino import DINOLoss", False),
        ("from vmf_kernels import compat", False),
        ("from vmf_kernels import bessel", True),
        ("from vmf_kernels.losses.dino import DINOLoss", True),
        ("import vmf_kernels.losses", True),
        ("import vmf_kernels", True),
    ],
)
def test_a_private_import_is_found(source: str, faulty: bool) -> None:
    """Negative control."""
    assert bool(private_faults(source)) == faulty


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TRITON = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.thorough
def test_the_library_works_where_triton_is_absent() -> None:
    printed = run_python(
        WITHOUT_TRITON
        + """
import torch
import vmf_kernels as v

x, w = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
p = v.vmf_prototypes(w)
loss = v.prototype_cross_entropy(x, p, x.detach()[:4], p, torch.ones(2, 3)).loss
loss.backward()
print(bool(x.grad.isfinite().all() and w.grad.isfinite().all()), "triton" in sys.modules)
"""
    )
    assert printed.split() == ["True", "False"]


@pytest.mark.thorough
def test_triton_is_absent_there() -> None:
    """Negative control of the one above: the same process cannot import it."""
    with pytest.raises(AssertionError, match="No module named 'triton'"):
        run_python(WITHOUT_TRITON + "import triton")


@pytest.mark.thorough
def test_importing_changes_no_state_of_the_process() -> None:
    run_python(
        """
import os, warnings
import torch

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "benchmark": torch.backends.cudnn.benchmark,
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "cuda": torch.cuda.is_initialized(),
    }

torch.manual_seed(3)
before = state()
import vmf_kernels
import vmf_kernels.compat.dino, vmf_kernels.compat.dinov2, vmf_kernels.compat.dinov3, vmf_kernels.compat.ibot
import vmf_kernels.compat.lightly, vmf_kernels.compat.solo
import vmf_kernels.testing
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"importing changes {changed}"
"""
    )
