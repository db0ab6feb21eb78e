"""Small data and one process group for all tests of the training rooms."""

import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from hosts import Hosts

# Programs that tests start ignore what they inherit as ignored (nohup, a shell's &); a handler they do not inherit.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

settings.register_profile("untimed", deadline=None)  # other programs share the machine
settings.load_profile("untimed")

# Tests compare with figures of a CPU, also on a machine that has a GPU; those marked gpu set it aside.
os.environ["DS_ACCELERATOR"] = "cpu"
if not Path("/dev/nvidiactl").exists():  # torch is not imported for this
    os.environ["TRITON_INTERPRET"] = "1"

DATA = Path(__file__).parent / "data"
LANGUAGES = ("ar", "en", "hi")


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fairseq wrote (tests/data/golden/README.md), unpacked."""
    folder = tmp_path_factory.mktemp("golden")
    # Not extractall: 3.11.2 does not know its filter, and 3.12 warns where there is none.
    with tarfile.open(DATA / "golden" / "fairseq.tar.xz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with {train,valid,test}.{ar,en,hi}: a few hundred lines of the demo corpus, as they are."""
    folder = tmp_path_factory.mktemp("tiny") / "text"
    folder.mkdir()
    for split, lines in (("train", 300), ("valid", 40), ("test", 40)):
        for language in LANGUAGES:
            text = (DATA / "demo" / f"{split}.{language}").read_text(encoding="utf-8")
            kept = text.split("\n")[:lines]
            (folder / f"{split}.{language}").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_corpus: Path) -> Path:
    """The same, binarized with one dictionary of 600 symbols."""
    from xlm_ds import binarize

    destination = tiny_corpus.parent / "bin"
    prefs = [f"--{split}pref={tiny_corpus / split}" for split in ("train", "valid", "test")]
    arguments = [*prefs, f"--langs={','.join(LANGUAGES)}", f"--destdir={destination}"]
    assert binarize.main([*arguments, "--nwordssrc=600", "--workers=1"]) == 0
    return destination


@pytest.fixture(scope="session")
def parallel_data(tiny_corpus: Path, tiny_data: Path) -> Path:
    """ar and en of the same, and the demo corpus's pairs ar-en and hi-en, without a test split; hi only in a pair."""
    from xlm_ds import binarize

    destination = tiny_corpus.parent / "parallel"
    common = [
        f"--srcdict={tiny_data / 'dict.txt'}",
        f"--destdir={destination}",
        "--workers=1",
    ]
    prefs = [f"--{split}pref={tiny_corpus / split}" for split in ("train", "valid")]
    assert binarize.main([*common, *prefs, "--langs=ar,en"]) == 0
    for source in ("ar", "hi"):
        text = DATA / "demo" / "para"
        prefs = [f"--{split}pref={text / split}.{source}-en" for split in ("train", "valid")]
        assert binarize.main([*common, *prefs, f"-s={source}", "--target-lang=en"]) == 0
    return destination


@pytest.fixture(scope="session")
def ranks() -> Iterator["object"]:
    """This test process as the only rank of a run."""
    import torch

    from xlm_ds.engine import start_ranks, stop_ranks

    torch.set_num_threads(1)
    started = start_ranks()
    del os.environ["RANK"]  # by which processes that tests start would know the group, and join it
    yield started
    stop_ranks()


@pytest.fixture
def start_hosts(tmp_path: Path) -> "Iterator[Callable[[int], Hosts]]":
    """Hosts with a folder `job` to start from, which has a hostfile and .deepspeed_env."""
    from hosts import Hosts, require_hosts

    require_hosts()
    started: list[Hosts] = []

    def call(count: int) -> Hosts:
        hosts = Hosts(tmp_path, count)
        started.append(hosts)
        job = tmp_path / "job"
        job.mkdir()
        (job / "hostfile").write_text(hosts.hostfile(), encoding="utf-8")
        (job / ".deepspeed_env").write_text(hosts.deepspeed_env, encoding="utf-8")
        return hosts

    yield call
    for hosts in started:
        hosts.close()
