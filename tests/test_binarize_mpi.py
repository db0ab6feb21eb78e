"""Under mpirun the files are those of one process for any number of ranks; what goes wrong is one sentence and no pair.

Two hosts are two network namespaces with ssh between them (hosts.py).
"""

import importlib.util
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts import Hosts
from xlm_ds import binarize
from xlm_ds.ranks import LAUNCHERS

ROOT = Path(__file__).parent.parent
BESIDE_PYTHON = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
MPIEXEC = BESIDE_PYTHON or shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpiexec or no mpi4py; pip install 'xlm_ds[mpi]'",
)


def mpirun(ranks: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python ARGUMENTS` on so many ranks."""
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


STAGE = ("-m", "xlm_ds.binarize")


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "preprocess.log"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is hard to divide: a huge line, an empty file, lines without a line feed, texts of a line or two."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(4)
    words = ["a", "bb", "é", "한국", "🙂", "<unk>", "x y", "\t"]

    def some_lines(count: int, end: str) -> str:
        return "".join(" ".join(generator.choices(words, k=12)) + end for _ in range(count))

    contents = {
        "one.en": some_lines(3000, "\n") + "a bb",
        "two.en": some_lines(300, "\r\n") + "a\r",
        "one.fr": some_lines(2000, " "),
        "two.fr": some_lines(10, "\n"),
        "one.de": "",
        "two.de": some_lines(100, "\r"),
        "valid.en": "a\n\nbb",
        "valid.fr": "\n",
        "valid.de": "",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="")
    return folder


def flags(corpus: Path) -> list[str]:
    prefs = [f"--trainpref={corpus}/one,{corpus}/two", f"--validpref={corpus}/valid,{corpus}/two"]
    return ["--langs=en,fr,de", *prefs, "--padding-factor=4"]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected")
    command = [sys.executable, *STAGE, *flags(corpus), f"--destdir={out}", "--workers=1"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_write_what_one_process_writes(
    ranks: int, corpus: Path, expected: Path, tmp_path: Path
) -> None:
    """Also the dictionary, which they count together."""
    result = mpirun(ranks, *STAGE, *flags(corpus), f"--destdir={tmp_path}")
    assert (result.returncode, result.stderr) == (0, "")
    assert files_in(tmp_path) == files_in(expected)
    assert said(tmp_path) == [line.replace(str(expected), str(tmp_path)) for line in said(expected)]
    if ranks == 3:
        again = mpirun(ranks, *STAGE, *flags(corpus), f"--destdir={tmp_path}")
        assert again.stdout.count("not redone") == 9


def said(folder: Path) -> list[str]:
    log = (folder / "preprocess.log").read_text(encoding="utf-8")
    return [line.split(" | ", 3)[3] for line in log.splitlines()]


@needs_mpi
def test_more_ranks_than_lines(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_text("a b\nb", encoding="utf-8")
    (tmp_path / "train.fr").write_text("", encoding="utf-8")
    arguments = [f"--trainpref={tmp_path / 'train'}", "--langs=en,fr"]
    assert binarize.main([*arguments, f"--destdir={tmp_path / 'one'}"]) == 0
    result = mpirun(5, *STAGE, *arguments, f"--destdir={tmp_path / 'many'}")
    assert result.returncode == 0, result.stderr
    assert files_in(tmp_path / "many") == files_in(tmp_path / "one")


@needs_mpi
def test_ranks_leave_out_the_lines_that_one_process_leaves_out(
    expected: Path, tmp_path: Path
) -> None:
    """A side's lines are in the parts of several ranks, and its other side's in those of others."""
    generator = random.Random(1)
    for language, lines in (("en", 3000), ("fr", 2990)):
        text = (" ".join(["a"] * generator.choice([0, 1, 9, 30])) for _ in range(lines))
        (tmp_path / f"train.{language}").write_text("\n".join(text) + "\n", encoding="utf-8")
    (tmp_path / "bad.en").write_text("a\n" * 99, encoding="utf-8")
    (tmp_path / "bad.fr").write_text("a\n" * 50 + "\n" + "a\n" * 48, encoding="utf-8")
    common = [*STAGE, "-s=en", "-t=fr", f"--srcdict={expected / 'dict.txt'}"]
    skip = [f"--trainpref={tmp_path / 'train'}", "--unaligned=skip"]
    for ranks in (1, 3):
        result = mpirun(ranks, *common, *skip, f"--destdir={tmp_path / str(ranks)}")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("left out") == 1
    assert files_in(tmp_path / "1") == files_in(tmp_path / "3")
    refused = [f"--trainpref={tmp_path / 'bad'}", f"--destdir={tmp_path / 'bad'}"]
    result = mpirun(3, *common, *refused)
    assert result.returncode == 2
    assert result.stderr.count("bad.fr, line 51: is empty") == result.stderr.count("\n") == 1
    assert {path.name for path in (tmp_path / "bad").iterdir()} == {"dict.txt", "preprocess.log"}


@needs_mpi
def test_a_bad_byte_in_a_later_share_ends_all_with_one_sentence(
    corpus: Path, expected: Path, tmp_path: Path
) -> None:
    """Line and byte are those of the file, although another rank reads its beginning."""
    good = (corpus / "one.en").read_bytes()
    (tmp_path / "train.en").write_bytes(good + b"\na \xe9t\n")
    (tmp_path / "train.fr").write_bytes(b"a\n" * 100)
    out = tmp_path / "out"
    inputs = [f"--trainpref={tmp_path / 'train'}", f"--srcdict={expected / 'dict.txt'}"]
    result = mpirun(3, *STAGE, "--langs=fr,en", *inputs, f"--destdir={out}")
    where = f"train.en, line 3002, byte {len(good) + 3}: 0xe9 is not UTF-8"
    assert result.returncode == 2
    assert where in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {"dict.txt", "preprocess.log"}


@needs_mpi
def test_what_all_ranks_see_is_said_once(corpus: Path, tmp_path: Path) -> None:
    result = mpirun(3, *STAGE, *flags(corpus), "--lungs=en", f"--destdir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr == "binarize: error: unknown flag --lungs; did you mean --langs?\n"
    result = mpirun(
        2, *STAGE, "--langs=en", "--trainpref=-", f"--srcdict={corpus}/x", f"--destdir={tmp_path}"
    )
    assert result.returncode == 2
    assert result.stderr.endswith("standard input, which 2 ranks cannot share; give a file\n")
    assert result.stderr.count("\n") == 1
    assert mpirun(3, *STAGE, "--help").stdout.count("usage:") == 1


DYING = """
import os, signal, sys
from xlm_ds import binarize
from xlm_ds.log import run_stage
rank, step = sys.argv.pop(1), sys.argv.pop(1)
if os.environ["PMI_RANK"] == rank:
    setattr(binarize, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(run_stage("binarize", binarize.main))
"""


@needs_mpi
@pytest.mark.parametrize(("rank", "step"), [("0", "encode_share"), ("2", "finish_pair")])
def test_a_rank_that_dies_ends_the_run(
    rank: str, step: str, corpus: Path, expected: Path, tmp_path: Path
) -> None:
    """What is left of it does not matter to the next run."""
    arguments = [*flags(corpus), f"--destdir={tmp_path}"]
    result = mpirun(3, "-c", DYING, rank, step, *arguments)
    assert result.returncode != 0
    assert result.stderr.startswith("binarize: error: a rank has died")
    assert result.stderr.count("\n") == 1
    final = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert final == {"dict.txt", "preprocess.log"}
    assert binarize.main(arguments) == 0
    assert not list(tmp_path.glob(".*"))
    assert files_in(tmp_path) == files_in(expected)


CODES_OF_ITS_OWN = """
import os, sys
from xlm_ds import binarize
from xlm_ds.log import run_stage
sys.argv[-1] += os.environ["PMI_RANK"]
sys.exit(run_stage("binarize", binarize.main))
"""


@needs_mpi
def test_ranks_with_other_codes_are_refused(corpus: Path, tmp_path: Path) -> None:
    """The same path on two hosts need not be the same file; of each pair a part would have other pieces."""
    (tmp_path / "codes0").write_text("a b 1\n", encoding="utf-8")
    (tmp_path / "codes1").write_text("b b 1\n", encoding="utf-8")
    arguments = [*flags(corpus), f"--destdir={tmp_path / 'out'}", f"--bpe-codes={tmp_path}/codes"]
    result = mpirun(2, "-c", CODES_OF_ITS_OWN, *arguments)
    assert result.returncode == 2
    assert "is another file than on the first rank" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "codes1").write_text("a b 1\n", encoding="utf-8")
    result = mpirun(2, "-c", CODES_OF_ITS_OWN, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    arguments[-1] += "0"
    assert binarize.main([*arguments, f"--destdir={tmp_path / 'one'}"]) == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "one")


FAULT = """
import sys
from xlm_ds import binarize
from xlm_ds.log import run_stage
from xlm_ds.ranks import Ranks
def check_shared(folder, ranks):
    if ranks.rank == 1:
        raise RuntimeError("a fault of ours")
binarize.check_shared = check_shared
sys.exit(run_stage("binarize", binarize.main))
"""


@needs_mpi
def test_a_fault_outside_of_what_ranks_do_together_does_not_hang(
    corpus: Path, tmp_path: Path
) -> None:
    result = mpirun(2, "-c", FAULT, *flags(corpus), f"--destdir={tmp_path}")
    assert result.returncode != 0
    assert "RuntimeError: a fault of ours" in result.stderr


RANKS = """
from collections import Counter
from xlm_ds.ranks import started_ranks
with started_ranks("test") as ranks:
    merged = ranks.merged(Counter({ranks.rank: 1, "all": 1}), lambda one, other: one + other)
    threads = ranks.gathered(ranks.threads())
    first = ranks.on_first(lambda: ranks.rank + 10)
    if ranks.rank == 0:
        assert merged == {0: 1, 1: 1, 2: 1, "all": 3}, merged
        print(first, *threads)
    elif first != 10:
        raise AssertionError(first)
"""


@needs_mpi
def test_ranks_of_one_host_share_its_processors() -> None:
    result = mpirun(3, "-c", RANKS)
    assert result.returncode == 0, result.stderr
    first, *threads = (int(number) for number in result.stdout.split())
    assert first == 10
    assert all(count >= 1 for count in threads)
    assert sum(threads) <= max(3, len(os.sched_getaffinity(0)))


WITHOUT_MPI4PY = """
import sys
sys.modules["mpi4py"] = None
from xlm_ds import binarize
from xlm_ds.log import run_stage
sys.exit(run_stage("binarize", binarize.main))
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_mpi4py_rank_0_says_what_to_install(rank: int, launcher: tuple[str, str]) -> None:
    environment = dict(zip(launcher, (str(rank), "2"), strict=True))
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MPI4PY, "--langs=en"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert ("pip install 'xlm_ds[mpi]'" in result.stderr) == (rank == 0)
    assert result.stderr.count("\n") == (1 if rank == 0 else 0)


@needs_mpi
def test_another_mpis_launcher_is_named() -> None:
    environment = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    result = subprocess.run(
        [sys.executable, *STAGE, "--langs=en"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "the launcher started 2 ranks, but mpi4py's library" in result.stderr
    assert result.stderr.count("\n") == 1


# --------------------------------------------------------------------------------- two hosts


@pytest.fixture
def hosts(start_hosts: Callable[[int], Hosts]) -> Hosts:
    return start_hosts(2)


def on_two_hosts(hosts: Hosts, ranks: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    launcher = [str(MPIEXEC), "-launcher", "ssh", "-hosts", ",".join(hosts.names)]
    command = [*launcher, "-n", str(ranks), sys.executable, *arguments]
    return hosts.run(hosts.names[0], *command, cwd=ROOT)


@needs_mpi
@pytest.mark.slow
def test_two_hosts_write_what_one_process_writes(
    hosts: Hosts, corpus: Path, expected: Path, tmp_path: Path
) -> None:
    where = on_two_hosts(hosts, 3, "-c", "import socket; print(socket.gethostname())")
    assert hosts.names[1] in where.stdout.split()
    for ranks in (2, 3, 5):
        out = tmp_path / str(ranks)
        result = on_two_hosts(hosts, ranks, *STAGE, *flags(corpus), f"--destdir={out}")
        assert result.returncode == 0, result.stderr
        assert files_in(out) == files_in(expected)


@needs_mpi
@pytest.mark.slow
def test_a_rank_that_dies_on_the_second_host_ends_the_run(
    hosts: Hosts, corpus: Path, tmp_path: Path
) -> None:
    arguments = [*flags(corpus), f"--destdir={tmp_path / 'out'}"]
    result = on_two_hosts(hosts, 2, "-c", DYING, "1", "finish_pair", *arguments)
    assert result.returncode != 0
    assert result.stderr.count("binarize: error: a rank has died") == 1
    final = {p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")}
    assert final == {"dict.txt", "preprocess.log"}


@needs_mpi
@pytest.mark.slow
def test_a_folder_that_hosts_do_not_share_is_refused(
    hosts: Hosts, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert hosts.run(hosts.names[1], "mount", "-t", "tmpfs", "none", str(out)).returncode == 0
    result = on_two_hosts(
        hosts,
        2,
        *STAGE,
        *flags(corpus),
        f"--destdir={out}",
    )
    assert result.returncode == 2
    assert (
        f"{out}: on {hosts.names[1]} it is not the folder that the first rank writes to"
        in result.stderr
    )
    assert result.stderr.count("\n") == 1
