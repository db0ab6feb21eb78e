"""The core's own C++ test program and its fuzz targets, built and run; `make asan` does it under sanitizers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of core_tests and fuzz_*."""
    cmake = shutil.which("cmake")
    assert cmake is not None, "cmake is a build requirement"
    folder = tmp_path_factory.mktemp("core")
    configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"]
    options = [
        "-DXLM_DS_EXTENSION=OFF",
        "-DXLM_DS_TESTS=ON",
        "-DXLM_DS_FUZZ=ON",
        "-DXLM_DS_WERROR=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",  # -g would take a fifth of the time to build
    ]
    subprocess.run([*configure, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(folder)], check=True, capture_output=True)
    return folder


def test_core_program_passes(programs: Path) -> None:
    result = subprocess.run([programs / "core_tests"], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ", 0 failed" in result.stdout


@pytest.mark.parametrize("target", ["bpe", "codes", "dataset", "dictionary", "index", "pair", "words"])
def test_fuzz_targets_find_nothing(programs: Path, target: str) -> None:
    """A bounded part of `make fuzz`; both what is accepted and what is refused must be among the inputs."""
    command = [str(programs / f"fuzz_{target}"), "--runs", "3000"]
    result = subprocess.run(command, cwd=programs, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = re.search(r": (\d+) accepted, (\d+) rejected", result.stdout)
    assert counts is not None, result.stdout
    assert min(int(count) for count in counts.groups()) > 30
