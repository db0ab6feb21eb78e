"""Whatever a launcher would hand to a shell as something else is refused with a sentence, and what it would not is not.

DeepSpeed 0.19.8's own reader of hostfiles and writer of command lines are asked where that is possible.
"""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xlm_ds.launching import Host, check_launch, exported, read_hostfile
from xlm_ds.log import InputError

HOSTILE = {
    "blank": "a b",
    "semicolon": "a;touch x",
    "newline": "a\ntouch x",
    "command": "$(touch x)",
    "backquote": "`touch x`",
    "variable": "$HOME",
    "quote": "it's",
    "double quote": 'a"b',
    "backslash": "a\\b",
    "pipe": "a|b",
    "background": "a&",
    "redirection": "a>b",
    "glob": "a*",
    "braces": "{a,b}",
    "home": "~root",
    "of pdsh": "%h",
    "tab": "a\tb",
    "escape": "a\x1b[2J",
    "not ASCII": "é",
    "right to left": "a\u202eb",
    "full-width": "\uff4eode",
}
WORDS = ["--module", "xlm_ds.train", "--config", "run.toml"]


def hostfile(folder: Path, *lines: str) -> Path:
    path = folder / "hostfile"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return hostfile(tmp_path, "node1 slots=8", "node2 slots=8")


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    lines = [
        "# ours",
        "",
        "  node-1.cluster_a slots=8 ",
        "10.0.0.2\tslots=4  # more",
        "n3 slots=1 max_slots=2",
    ]
    path = hostfile(tmp_path, *lines)
    hosts = read_hostfile(path)
    assert hosts == [Host("node-1.cluster_a", 8), Host("10.0.0.2", 4), Host("n3", 1)]
    assert dict(_parse_hostfile(path.read_text().splitlines())) == dict(hosts)


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=x", "a,b", "node[1-3]", "user@host", "::1", "^file", *HOSTILE.values()]
)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    path = hostfile(tmp_path, "node1 slots=1", f"{name} slots=1")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}, line [23]: ") as caught:
        read_hostfile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["node1"], "line 1: 'node1' is not of the form"),
        (["node1 slots=x"], "not of the form"),
        (["node1 slots=4x"], "not of the form"),
        (["node1 slots=-1"], "not of the form"),
        (["node1 slots=٣"], "not of the form"),
        (["node1 slots=0"], "has slots=0"),
        (["node1 slots=1", "# again", "node1 slots=2"], "line 3: node1 is there twice"),
        (["# nothing", ""], "names no host"),
    ],
)
def test_a_line_that_is_none_is_refused(lines: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_hostfile(hostfile(tmp_path, *lines))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(b"n\xe9 slots=1\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_hostfile(tmp_path / "hostfile")


def test_what_is_plain_passes(two: Path) -> None:
    flags = ["OUT", "--monolingual-langs=ar,de", "--sampling-alpha=0.7@0,0.5@1000", "--lr", "1e-4"]
    environment = {"PYTHONPATH": "/a b/c;d", "UNRELATED": "$(x)", "HOME": "/nowhere"}
    own = ["--hostfile", "my hosts", "--launcher_args=--mca x y", "--launcher_args", "-a -b"]
    check_launch(two, [*own, *WORDS, *flags], environment, Path("/shared/job-1"))


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_what_a_shell_would_read_as_something_else_is_refused(
    hostile: str, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: list[str], folder: str = "/job") -> str:
        with pytest.raises(InputError) as caught:
            check_launch(two, words, {"HOME": "/nowhere"}, Path(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "the current folder" in refused(WORDS, f"/shared/{hostile}")
    assert "run.toml" in refused([*WORDS[:-1], f"{hostile}.toml"])
    assert "TOML" in refused([*WORDS, f"--save-dir={hostile}"])
    monkeypatch.setattr(sys, "executable", f"/opt/{hostile}/bin/python")
    assert "the interpreter" in refused(WORDS)


def test_an_empty_word_would_be_lost(two: Path) -> None:
    with pytest.raises(InputError, match="''"):
        check_launch(two, [*WORDS, "--save-dir", ""], {}, Path("/job"))


def test_what_passes_through_no_shell_is_not_refused(two: Path, tmp_path: Path) -> None:
    words = [*WORDS, "OUT of ñ"]

    def check(path: Path, *options: str) -> None:
        check_launch(path, [*options, *words], {"PYTHONPATH": "$x"}, Path("/my job"))

    check(two, "--no_ssh")
    with pytest.raises(InputError):
        check(two)
    one = hostfile(tmp_path, "localhost slots=2")
    check(one)
    with pytest.raises(InputError):
        check(one, "--force_multi")


BAD_VALUES = ["$(x)", "`x`", 'a"b', "a\\b", "a\nb", "50%h", "a\x07", " a", "a\t"]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("name", ["PYTHONWARNINGS", "NCCL_DEBUG", "UCX_X", "MV2_X", "MLFLOW_X"])
def test_a_value_that_would_change_on_its_way_is_refused(name: str, value: str, two: Path) -> None:
    with pytest.raises(InputError, match=name) as caught:
        check_launch(two, WORDS, {name: value, "HOME": "/nowhere"}, Path("/job"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "impi", "mvapich", "slurm"])
def test_other_launchers_hand_on_deepspeeds_quotes(launcher: str, two: Path) -> None:
    def check(value: str) -> None:
        words = [f"--launcher={launcher.upper()}", *WORDS]
        check_launch(two, words, {"PYTHONX": value, "HOME": "/nowhere"}, Path("/job"))

    check("/a/b:c")
    with pytest.raises(InputError, match=f"quotes.*{launcher}"):
        check("a b")
    if launcher == "slurm":
        with pytest.raises(InputError, match="','"):
            check("a,b")


def test_lines_of_deepspeed_env(two: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PYTHONPATH": "/mine", "NOT_EXPORTED": "x"}
    file = tmp_path / ".deepspeed_env"
    (home / ".deepspeed_env").write_text("PATH=/home/bin\nB=2\n", encoding="utf-8")
    file.write_text("PATH=/a/bin:/bin\n A =b=c \n", encoding="utf-8")
    found = exported(environment, tmp_path)
    assert found == {
        "PYTHONPATH": f"{tmp_path}:/mine",
        "PATH": "/a/bin:/bin",
        "B": "2",
        "A": "b=c",
    }
    check_launch(two, WORDS, environment, tmp_path)
    for line, sentence in (
        ("", "line 2: '' is not of the form"),
        ("# why", "is not of the form KEY=VALUE"),
        ("A B=1", "'A B': DeepSpeed would export it"),
        ("A;x=1", "'A;x'"),
        ("A=$(x)", "A='"),
    ):
        file.write_text(f"C=1\n{line}\n", encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(sentence)):
            check_launch(two, WORDS, environment, tmp_path)
    other = tmp_path / "other"
    other.write_text("D=$x\n", encoding="utf-8")
    with pytest.raises(InputError, match="D="):
        check_launch(two, WORDS, {**environment, "DS_ENV_FILE": "other"}, tmp_path)


def test_what_is_let_through_arrives(two: Path) -> None:
    """By DeepSpeed's own command for pdsh, as a shell on a host reads it (pdsh's %n aside)."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    environment = {"PYTHONPATH": "/a b/it's;c", "PYTHONX": "é*?[!]{}()<>&|#~ x", "HOME": "/nowhere"}
    words = ["xlm_ds.train", "--config", "a_run-2@x+y=1:2,3.toml", "--adam-betas=0.9,0.98"]
    check_launch(two, ["--module", *words], environment, Path("/job"))
    defaults: dict[str, Any] = {
        "launcher_args": "",
        "ssh_port": None,
        "venv_script": None,
        "no_python": False,
    }
    defaults |= {"module": True, "no_local_rank": False, "save_pid": False}
    defaults |= {"enable_each_rank_log": "None", "master_addr": "10.0.0.1", "master_port": 29500}
    args = SimpleNamespace(**defaults, user_script=words[0], user_args=words[1:])
    runner = PDSHRunner(args, "e30=")
    for name, value in exported(environment, Path("/job")).items():
        runner.add_export(name, value)
    command, _, _ = runner.get_cmd({}, {"node1": [0], "node2": [0]})
    exports, _, *rest = command[command.index("node1,node2") + 1 :]
    assert exports.startswith("export ")
    line = f"{exports} env -0; printf '%s\\0' {' '.join(rest)}"
    shell = subprocess.run(["sh", "-c", line], env={}, capture_output=True, check=True, timeout=60)
    read = shell.stdout.decode().split("\0")
    assert f"PYTHONX={environment['PYTHONX']}" in read
    assert f"PYTHONPATH=/job:{environment['PYTHONPATH']}" in read
    assert read[-len(words) - 1 : -1] == words
