"""The core's own C++ test program and its fuzz targets, built with sanitizers where the compiler has them, and run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZERS = "address,undefined"
pytestmark = [
    pytest.mark.slow,  # a minute's build on two free cores, and CI runs it
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What to build with; empty where the compiler came without its sanitizers' libraries."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    compiler = os.environ.get("CXX", "c++")  # as CMake finds it
    command = f"{compiler} -fsanitize={SANITIZERS} empty.cpp -o empty && ./empty"
    result = subprocess.run(command, shell=True, cwd=folder, check=False, capture_output=True)
    return SANITIZERS if result.returncode == 0 else ""


@pytest.fixture(scope="module")
def programs(sanitizers: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        f"-DXLM_DS_SANITIZE={sanitizers}",
    ]
    subprocess.run([*configure, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(folder)], check=True, capture_output=True)
    return folder


def test_the_core_is_sanitized(sanitizers: str, programs: Path) -> None:
    """CMake only warns of a -D that it does not know."""
    if not sanitizers:
        pytest.skip(f"the compiler has no -fsanitize={SANITIZERS}: the core's tests run without")
    program = (programs / "core_tests").read_bytes()
    assert b"__asan_init" in program
    assert b"__ubsan_handle" in program


def test_core_program_passes(programs: Path) -> None:
    result = subprocess.run([programs / "core_tests"], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ", 0 failed" in result.stdout


@pytest.mark.parametrize(
    "target", ["bpe", "codes", "dataset", "dictionary", "index", "pair", "words"]
)
def test_fuzz_targets_find_nothing(programs: Path, target: str) -> None:
    """A bounded part of `make fuzz`; both what is accepted and what is refused must be among the inputs."""
    command = [str(programs / f"fuzz_{target}"), "--runs", "20000"]
    result = subprocess.run(command, cwd=programs, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = re.search(r": (\d+) accepted, (\d+) rejected", result.stdout)
    assert counts is not None, result.stdout
    assert min(int(count) for count in counts.groups()) > 30
