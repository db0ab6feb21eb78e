"""The core's own C++ test program, built and run."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_core_program_passes(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    assert cmake is not None, "cmake is a build requirement"
    configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-G", "Ninja"]
    options = [
        "-DXLM_DS_EXTENSION=OFF",
        "-DXLM_DS_TESTS=ON",
        "-DXLM_DS_WERROR=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
    ]
    subprocess.run([*configure, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(tmp_path)], check=True, capture_output=True)
    result = subprocess.run([tmp_path / "core_tests"], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ", 0 failed" in result.stdout
