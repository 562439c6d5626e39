"""The packages that a run needs, and their versions."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping

from vmf_pretrain.doctor.finding import Finding, fine, note, problem

OURS = "vmf_kernels"
# module, package, what is missing without it
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "numpy": "numpy",
    "PIL": "Pillow",
    "yaml": "PyYAML",
    "rich": "rich",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
}
OPTIONAL = {
    "tensorboard": ("tensorboard", "runs write no TensorBoard events; metrics.jsonl has the same numbers"),
    "av": ("av", "videos cannot be read"),
}


def read_versions() -> dict[str, str | None]:
    """Versions by package; None where it is not installed. Imports none of them."""
    packages = {**NEEDED, **{module: package for module, (package, _) in OPTIONAL.items()}}
    return {package: _version(module, package) for module, package in packages.items()}


def judge_versions(versions: Mapping[str, str | None]) -> list[Finding]:
    """What is there, what a run cannot do without, and what it goes without."""
    there = ", ".join(f"{package} {version}" for package, version in versions.items() if version is not None)
    own = _version(OURS, OURS) or "not installed"
    found = [fine("packages", f"vmf_kernels {own}, Python {platform.python_version()}, {there}")]
    missing = [package for package in NEEDED.values() if versions.get(package) is None]
    if missing:
        advice = 'pip install "vmf_kernels[train]"'
        found.append(problem("packages", f"{', '.join(missing)} cannot be found, and every run needs it", advice))
    for package, without in OPTIONAL.values():
        if versions.get(package) is None:
            found.append(note(package, f"not installed: {without}", f"pip install {package}"))
    return found


def _version(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # seen on the path, but not installed
        return "from its source"
