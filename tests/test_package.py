"""What importing costs, which names are public, and which way imports point."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import whimbrel

ROOT = Path(__file__).resolve().parents[1]
# Public names by module. A name is added here on purpose, and taken away only with a line in CHANGELOG.md.
PUBLIC = {
    "whimbrel": ["Config", "ConfigError", "WhimbrelError", "load_config", "load_model", "train"],
    "whimbrel.mixers": ["GDN", "RDN", "RLA", "SGLA", "SoftmaxAttention"],
    "whimbrel.mixers.rdn": ["rdn", "rdn_step"],
    "whimbrel.mixers.rla": ["rla", "rla_step"],
    "whimbrel.optim": [
        "AdamW",
        "Apollo",
        "Fira",
        "GaLore",
        "load_foreign",
        "memory_report",
        "param_groups",
        "read_foreign",
    ],
    "whimbrel.merge": [
        "OnlineAverage",
        "SpikeDetector",
        "load_average",
        "merge_checkpoints",
        "merge_weights",
        "select_window",
    ],
    "whimbrel.sparse.flex_prefill": ["flex_prefill"],
    "whimbrel.sparse.row_local": ["row_local"],
    "whimbrel.attend": ["Plan", "attend", "attend_packed"],
    "whimbrel.integrations.hf": [
        "AveragingCallback",
        "OptimizerFactory",
        "WhimbrelCache",
        "WhimbrelConfig",
        "WhimbrelForCausalLM",
        "WhimbrelModel",
        "convert_checkpoint",
        "prefill_report",
    ],
    "whimbrel.evals": ["DENSE", "Method", "evaluate_bpb", "evaluate_grid", "make_task", "run_evals"],
    "whimbrel.integrations.lm_eval": ["documents", "evaluate_folder"],
    "whimbrel.integrations.titan": ["TitanTrainer", "WhimbrelOptimizers", "trainer_config"],
}
EXTRAS = {
    "whimbrel.integrations.hf": "transformers",
    "whimbrel.integrations.lm_eval": "lm_eval",
    "whimbrel.integrations.titan": "torchtitan",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    if module in EXTRAS:
        pytest.importorskip(EXTRAS[module])
    loaded = importlib.import_module(module)
    missing = [name for name in PUBLIC[module] if name not in loaded.__all__]
    assert not missing, f"{module}: {missing} are promised but not exported"
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
        full = f"{module}.{name}"
        submodules = {info.name for info in pkgutil.iter_modules(loaded.__path__)}
        assert name not in submodules, f"{full} would be hidden by the submodule of that name"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_and_help_do_not_load_torch() -> None:
    code = (
        "import sys, whimbrel, whimbrel.config, whimbrel.recipes, whimbrel.bench\n"
        "from whimbrel import cli\n"
        "whimbrel.load_config('demo')\n"
        "assert cli.main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    assert "usage: whimbrel" in _python(code).stdout


def test_help_answers_in_half_a_second() -> None:
    best = float("inf")
    for _ in range(5):  # The best of five: a busy machine must not decide.
        start = time.perf_counter()
        _python("import sys; from whimbrel import cli; sys.exit(cli.main(['--help']))")
        best = min(best, time.perf_counter() - start)
    assert best < 0.5


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert whimbrel.__version__ == version("whimbrel")


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    """What a user installs: commands run from it alone, data files are in it, and no tests."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert not [name for name in names if "/test_" in name or "/fixtures/" in name]
    package = ROOT / "src" / "whimbrel"
    data = [path for path in package.rglob("*") if path.suffix in (".yaml", ".css", ".js", ".typed")]
    assert len(data) > 5
    assert {str(path.relative_to(package.parent)) for path in data} <= names
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import whimbrel; from whimbrel import cli; from whimbrel.mixers import RDN; from whimbrel.report import page\n"
        "from whimbrel.testing import mixers, optim, recurrence, selectors, merge\n"
        "assert cli.main(['show', 'tiny-rdn']) == cli.main(['show', 'kinds']) == 0\n"
        "print(whimbrel.__file__)"
    )
    assert _python(code).stdout.splitlines()[-1] == str(tmp_path / "site" / "whimbrel" / "__init__.py")
    # What pip, pipx and uvx make a command of.
    command = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv = ['whimbrel', 'show', 'kinds']\n"
        "from importlib.metadata import distribution\n"
        "(script,) = distribution('whimbrel').entry_points.select(group='console_scripts')\n"
        "print(script.name, script.load()())"
    )
    assert _python(command).stdout.splitlines()[-1] == "whimbrel 0"
