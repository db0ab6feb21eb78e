"""The house: which room may import which (docs/design.md, Floors), and what may not be imported at all."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xlm_ds

PACKAGE = Path(xlm_ds.__file__).parent

FLOORS = [
    {"_core", "log", "keeper"},
    {"flags", "files", "ranks", "steps", "devices", "lifeline", "launching"},
    {"config", "dictionary", "peer_flags"},
    {
        *("tokenisation", "wiki_dump", "merges", "texts", "alignment"),
        *("pair_record", "prepare_record"),
        *("architectures", "geometry", "deepspeed_config", "torch_file"),
    },
    {
        "prepare",
        "binarize",
        "text_ids",
        "labelled",
        "pairs",
        "xlm_pth",
        "torch_model",
        "shards",
        "costs",
    },
    {"dataset", "streams"},
    {"order", "host_facts", "run_folder"},
    {"batches"},
    {"corpus", "digests", "xlm_masks"},
    {"cross_entropy_kernel", "linear_cross_entropy"},
    {"model", "schedule", "metrics"},
    {"classification"},
    {"engine"},
    {"checkpoint"},
    {"evaluate"},
    {"pretrained"},
    {"fill", "retrieve", "task"},
    {"exchange"},
    {"hugging_face"},
    {"peers"},
    {"init_from"},
    {"run", "process"},
    {"train", "finetune", "convert", "report", "plan", "prove", "preflight", "supervise"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = [room for level in FLOORS[:7] for room in level]
ROOMS = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def imports_of(room: str) -> set[str]:
    """Every module name imported anywhere in the room, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} imports relatively"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_imported(room: str) -> set[str]:
    parts = (name.split(".") for name in imports_of(room))
    return {p[1] for p in parts if p[0] == "xlm_ds" and len(p) > 1 and p[1] in FLOOR}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room: str) -> None:
    assert room in FLOOR, f"{room} has no floor; give it one here and in docs/design.md"
    for other in rooms_imported(room):
        assert FLOOR[other] <= FLOOR[room], f"{room} imports {other}, which is above it"


def test_floors_see_real_imports() -> None:
    """Guards the test above against passing because it found nothing."""
    assert "log" in rooms_imported("cli")
    assert "config" in ROOMS


@pytest.mark.parametrize("room", [r for r in ROOMS if r in WITHOUT_TORCH])
def test_data_rooms_need_neither_torch_nor_deepspeed(room: str) -> None:
    code = (
        f"import sys, xlm_ds.{room}; "
        "assert not {'torch', 'deepspeed'} & set(sys.modules), 'torch or deepspeed imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_engine_imports_deepspeed() -> None:
    users = {r for r in ROOMS if any(n.split(".")[0] == "deepspeed" for n in imports_of(r))}
    assert users <= {"engine"}


def test_no_room_has_a_standard_library_name() -> None:
    """`deepspeed xlm_ds/train.py` puts xlm_ds/ on sys.path, where it would shadow the standard module."""
    assert not set(ROOMS) & sys.stdlib_module_names - {"__main__"}


def test_only_the_border_includes_pybind11() -> None:
    sources = (PACKAGE.parent / "csrc").rglob("*.[ch]pp")
    users = {p.name for p in sources if "pybind11" in p.read_text(encoding="utf-8")}
    assert users == {"module.cpp"}


def test_sources_without_the_core_say_so(tmp_path: Path) -> None:
    """As in a clone of which `pip install .` has installed a copy: Python finds the clone's folder first. (-S: not what
    this environment has installed.)"""
    shutil.copytree(
        PACKAGE, tmp_path / "xlm_ds", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import xlm_ds"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert f"{tmp_path / 'xlm_ds'} has the sources of xlm_ds without its C++ core" in result.stderr
    assert "_core'" not in result.stderr
