"""Each thing that can be wrong with hosts is found and said with the host's name, alone and with all others at once.

What needs several hosts is marked faults: those are namespaces with sshd and pdsh (hosts.py).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hosts import ROOT, Hosts
from xlm_ds import host_facts, preflight
from xlm_ds.config import PreflightConfig, TrainConfig
from xlm_ds.flags import parse
from xlm_ds.host_facts import (
    LEAST_FREE_BYTES,
    PAGE_BYTES,
    PAGES,
    READ_WHOLE_BYTES,
    Facts,
    Request,
    from_json,
    probe,
    problems,
    token_path,
)
from xlm_ds.launching import Host
from xlm_ds.log import InputError

# --------------------------------------------------------------------------------------- comparing

GOOD = Facts(
    versions={"Python": "3.11.7", "torch": "2.13.0", "xlm_ds's code": "ab"},
    settings={"--lr": "0.1"},
    files={"dict.txt": "9 bytes, aa", "train.en.bin": "4 bytes, bb", "train.en.idx": "4 bytes, cc"},
    data_bytes=17,
    symbols=9,
    languages=1,
    written="/run/.preflight-x",
    free_bytes=LEAST_FREE_BYTES,
    errors=(),
)


def said(*hosts: Facts, slots: int = 1, need_bytes: int | None = None) -> list[str]:
    named = {f"node{number}": facts for number, facts in enumerate(hosts, start=1)}
    return problems(named, slots=dict.fromkeys(named, slots), need_bytes=need_bytes)


def test_nothing_is_wrong_with_hosts_that_are_the_same() -> None:
    assert said() == said(GOOD) == said(GOOD, GOOD, GOOD) == []


def test_the_odd_host_is_named_not_those_that_agree() -> None:
    odd = dataclasses.replace(GOOD, versions={**GOOD.versions, "torch": "2.12.0"})
    sentence = "torch is 2.12.0, and 2.13.0 on node{}; install the same on every host"
    assert said(odd, GOOD, GOOD) == ["node1: " + sentence.format(2)]
    assert said(GOOD, GOOD, odd) == ["node3: " + sentence.format(1)]
    assert said(GOOD, odd) == ["node2: " + sentence.format(1)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"versions": {"Python": "3.11.7", "torch": "2.13.0"}}, "xlm_ds's code is None, and ab on"),
        ({"settings": {"--lr": "0.2"}}, "--lr is 0.2, and 0.1 on node1; give every host the same"),
        ({"settings": {}}, "--lr is None, and 0.1 on node1"),
        (
            {"files": {**GOOD.files, "train.en.bin": "4 bytes, xx"}},
            "train.en.bin; copy them from node1",
        ),
        (
            {"files": {**GOOD.files, "train.de.bin": "1 bytes, xx"}},
            "than node1: train.de.bin; copy",
        ),
        (
            {"files": {"dict.txt": "9 bytes, aa"}},
            "train.en.bin (missing), train.en.idx (missing); copy",
        ),
        ({"errors": ("OUT: there is no such folder",)}, "OUT: there is no such folder"),
        (
            {"shares_folder": False},
            "does not see in /run what node1 has written there; give a --save",
        ),
        (
            {"free_bytes": LEAST_FREE_BYTES - 1},
            "10.0 GB are free in /run, and at least 10.0 GB are asked",
        ),
        ({"clock_seconds": 2.5}, "its clock is 2.5 s ahead of that of node1; set it (NTP)"),
        ({"clock_seconds": -1.1}, "its clock is"),
    ],
)
def test_each_problem_is_a_sentence(change: dict[str, Any], sentence: str) -> None:
    (found,) = said(GOOD, dataclasses.replace(GOOD, **change))
    assert sentence in found
    assert found.startswith(("node1: ", "node2: ") if "clock" in sentence else "node2: ")
    assert "\n" not in found


def test_many_files_are_one_sentence() -> None:
    many = {f"train.{i}.bin": "x" for i in range(20)}
    (sentence,) = said(
        dataclasses.replace(GOOD, files=many),
        dataclasses.replace(GOOD, files=dict.fromkeys(many, "y")),
    )
    assert "train.0.bin, train.1.bin, train.2.bin and 17 more; copy them" in sentence


def test_a_host_that_cannot_read_the_data_does_not_lack_each_file_too() -> None:
    blind = dataclasses.replace(GOOD, files={}, errors=("OUT: permission denied",))
    assert said(GOOD, blind) == ["node2: OUT: permission denied"]


def test_room_is_that_of_three_checkpoints_where_the_model_is_known() -> None:
    need = host_facts.checkpoint_bytes(1000)
    assert need == 3 * 12 * 1000
    assert said(dataclasses.replace(GOOD, free_bytes=need), need_bytes=need) == []
    (sentence,) = said(dataclasses.replace(GOOD, free_bytes=need - 1), need_bytes=need)
    assert (
        "36.0 kB are free in /run, and 3 checkpoints of this model take 36.0 kB; make room"
        in sentence
    )


def test_a_folder_that_cannot_be_written_is_said_once() -> None:
    refused = dataclasses.replace(
        GOOD, written="", free_bytes=0, errors=("run: cannot be written",)
    )
    assert said(GOOD, refused) == ["node2: run: cannot be written"]


def test_clocks_are_compared_with_their_errors() -> None:
    """A slow answer is no wrong clock; most clocks are taken to be right."""

    def clock(ahead: float, error: float = 0.0) -> Facts:
        return dataclasses.replace(GOOD, clock_seconds=ahead, clock_error_seconds=error)

    assert said(clock(0), clock(1.0)) == []
    assert said(clock(0), clock(3.0, 2.1)) == []
    assert said(clock(0, 1.5), clock(3.0, 0.6)) == []
    assert said(clock(0), clock(3.0, 1.9)) != []
    (sentence,) = said(clock(9), clock(0), clock(0.2))
    assert sentence.startswith("node1: its clock is 8.8 s ahead of that of node3")
    (sentence,) = said(clock(100), clock(100.1), clock(40))  # all others than this machine's
    assert sentence.startswith("node3: its clock is 60.0 s behind that of node1")


def test_gpus_are_counted_where_there_are_any() -> None:
    eight = dataclasses.replace(GOOD, gpus=("H100",) * 8)
    four = dataclasses.replace(GOOD, gpus=("H100",) * 4)
    assert said(GOOD, GOOD, slots=64) == []  # ranks on CPUs
    assert said(eight, eight, slots=8) == said(eight, four, slots=4) == []
    (sentence,) = said(eight, four, slots=8)
    assert sentence.startswith("node2: has 4 GPUs that torch can use, and is given 8 slots")
    (sentence,) = said(eight, GOOD)
    assert sentence.startswith("node2: has 0 GPUs")


def test_all_problems_at_once() -> None:
    bad = dataclasses.replace(
        GOOD,
        versions={**GOOD.versions, "torch": "1"},
        settings={"--lr": "1"},
        files={},
        errors=("OUT: permission denied",),
        shares_folder=False,
        free_bytes=0,
        clock_seconds=-9.0,
    )
    found = said(GOOD, GOOD, bad)
    assert len(found) == 6
    assert all(sentence.startswith("node3: ") for sentence in found)


def test_facts_travel_as_json() -> None:
    facts = dataclasses.replace(GOOD, gpus=("H100", "H100"), errors=("é\n",))
    assert from_json(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts


# ----------------------------------------------------------------------------------------- probing


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Callable[..., Facts]]:
    requests: list[Request] = []

    def call(
        folder: Path | None,
        *languages: str,
        save_dir: Path = tmp_path,
        token: str = "t",
        steps: tuple[str, ...] = (),
    ) -> Facts:
        named = None if folder is None else str(folder)
        request = Request(
            data=named,
            languages=languages,
            mlm_steps=steps,
            save_dir=str(save_dir),
            token=token,
            settings={"a": "b"},
        )
        requests.append(request)
        return probe(request)

    yield call
    for request in requests:
        with contextlib.suppress(OSError):
            token_path(request).unlink(missing_ok=True)
    assert not list(tmp_path.glob(".*"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_host_is_like_itself(data: Path, look: Callable[..., Facts]) -> None:
    facts = look(data)
    assert said(facts, look(data), need_bytes=0) == []
    assert facts.errors == ()
    assert facts.symbols == 600
    assert facts.languages == 3
    assert facts.data_bytes == sum(
        p.stat().st_size for p in data.iterdir() if p.name in facts.files
    )
    assert len(facts.files) == 1 + 3 * 3 * 4  # a dictionary; languages, splits, files of a pair
    assert facts.settings == {"a": "b"}
    assert set(facts.versions) >= {"Python", "torch", "deepspeed", "xlm_ds", "xlm_ds's extension"}
    assert Path(facts.written).read_text(encoding="ascii") == "t"


@pytest.mark.parametrize("name", ["dict.txt", "train.en.bin", "valid.hi.idx", "test.ar.counts.npy"])
def test_one_bit_of_data_is_another_fact(name: str, data: Path, look: Callable[..., Facts]) -> None:
    good = look(data)
    flip(data / name, (data / name).stat().st_size // 2 if name != "dict.txt" else -2)
    (sentence,) = said(good, look(data), need_bytes=0)
    assert f"node2: has other data than node1: {name}; copy" in sentence


def test_records_are_compared_by_what_they_say_of_the_pair(
    data: Path, look: Callable[..., Facts]
) -> None:
    """Not by where it was made from: hosts that binarized for themselves may have had the text elsewhere."""
    good = look(data)
    path = data / "train.en.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "made_from": "elsewhere"}), encoding="utf-8")
    assert said(good, look(data), need_bytes=0) == []
    path.write_text(json.dumps({**record, "unknown": record["unknown"] + 1}), encoding="utf-8")
    (sentence,) = said(good, look(data), need_bytes=0)
    assert "train.en.json" in sentence


def test_fairseqs_names_and_chosen_languages(data: Path, look: Callable[..., Facts]) -> None:
    for path in list(data.glob("*.en.*")):
        split, _, kind = path.name.split(".", 2)
        path.rename(data / f"{split}.en-None.en.{kind}")
    assert "train.en-None.en.bin" in look(data).files
    assert {name.split(".")[1] for name in look(data, "hi").files} == {"txt", "hi"}


def test_pairs_that_a_run_reads_are_compared(
    parallel_data: Path, tmp_path: Path, look: Callable[..., Facts]
) -> None:
    data = Path(shutil.copytree(parallel_data, tmp_path / "data"))
    steps = ("ar", "en-hi")  # stored as hi-en
    before = look(data, steps=steps)
    assert before.errors == ()
    assert before.languages == 3
    assert len(before.files) == 1 + 2 * 4 * (1 + 2)  # a dictionary; splits, files, ar and two sides
    flip(data / "train.hi-en.hi.bin", 40)
    assert "train.hi-en.hi.bin" in said(before, look(data, steps=steps), need_bytes=0)[0]
    assert look(data).files == look(parallel_data).files


def test_of_large_files_pages_are_read(
    data: Path, look: Callable[..., Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last always, others by the check's token, so that each start looks at others."""
    monkeypatch.setattr(host_facts, "READ_WHOLE_BYTES", 0)
    monkeypatch.setattr(host_facts, "PAGE_BYTES", 64)
    path = data / "train.en.bin"
    assert path.stat().st_size > 64 * PAGES * 2
    before = {token: look(data, token=token).files for token in map(str, range(40))}
    assert len({files["train.en.bin"] for files in before.values()}) == 40
    assert before["0"] == look(data, token="0").files
    flip(path, path.stat().st_size // 2)
    changed = [t for t, files in before.items() if look(data, token=t).files != files]
    assert 0 < len(changed) < 40
    for offset in (0, -1):
        good = look(data).files
        flip(path, offset)
        assert look(data).files != good
    assert READ_WHOLE_BYTES > PAGES * PAGE_BYTES


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: shutil.rmtree(d), "there is no such folder"),
        (lambda d: (d / "dict.txt").unlink(), "there is no dict.txt"),
        (lambda d: (d / "dict.txt").write_text("a\n"), "dict.txt"),
        (lambda d: (d / "train.en.json").write_text("{"), "not the record of a binarized file"),
    ],
)
def test_data_that_cannot_be_read_are_a_sentence(
    spoil: Callable[[Path], object], sentence: str, data: Path, look: Callable[..., Facts]
) -> None:
    spoil(data)
    facts = look(data)
    assert sentence in facts.errors[0]
    assert len(facts.errors) == 1
    assert facts.written, "one error hides the others"


def test_a_run_folder_that_is_not_there_is_judged_by_the_one_above(
    tmp_path: Path, look: Callable[..., Facts]
) -> None:
    facts = look(None, save_dir=tmp_path / "runs" / "one")
    assert Path(facts.written).parent == tmp_path
    assert facts.free_bytes > 0
    assert not (tmp_path / "runs").exists()
    assert look(None, save_dir=Path("/proc")).errors[0].startswith("/proc: cannot be written: ")


def test_needed_room_is_that_of_the_model(data: Path, look: Callable[..., Facts]) -> None:
    config = parse(TrainConfig, [str(data), "--encoder-embed-dim=8", "--encoder-layers=1"])
    facts = look(data)
    need = preflight.needed_bytes(config.data, config.model, [facts])
    larger = parse(TrainConfig, [str(data), "--encoder-embed-dim=16", "--encoder-layers=1"])
    assert need is not None
    assert need > 36 * 600 * 8
    assert (preflight.needed_bytes(config.data, larger.model, [facts]) or 0) > 1.9 * need
    assert preflight.needed_bytes(config.data, config.model, [look(None)]) is None


# --------------------------------------------------------------------------------- asking one host


def test_a_port_in_use_is_said() -> None:
    with socket.create_server(("", 0)) as taken:
        answer = preflight.try_port(taken.getsockname()[1])
        assert "cannot be used: address already in use" in answer["error"]
        assert answer["free"] != taken.getsockname()[1]
    assert preflight.try_port(answer["free"]) == {"error": ""}


def test_what_another_host_has_not_written_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "LOOK_SECONDS", 0.2)
    assert not preflight.sees(tmp_path / "not there")
    assert preflight.sees(tmp_path)


SSH = """#!/bin/sh
# Plays ssh to this machine; node2 cannot be reached, node3 has no such folder, node4 hangs, node5 greets, node6 logs.
while [ "${1#-}" != "$1" ]; do case $1 in -o) shift 2;; *) shift;; esac; done
host=$1; shift
case $host in
  node2) echo "ssh: connect to host node2 port 22: No route to host" >&2; exit 255;;
  node3) cd /nowhere || exit 2;;
  node4) exec sleep 60;;
  node5) echo welcome;;
  node6) head -c 200000 /dev/zero | tr '\\0' x >&2;;
esac
exec sh -c "$*"
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A question to a host that an ssh of ours plays."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "ssh").write_text(SSH, encoding="utf-8")
    (bin_folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nA='$(b) ;\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(Path(preflight.__file__).parent.parent))
    monkeypatch.setattr(preflight, "CONNECT_SECONDS", 1)

    def call(name: str, question: dict[str, Any], timeout: int = 60) -> Any:
        config = parse(PreflightConfig, ["--hostfile=h", f"--timeout={timeout}"])
        with preflight.connected([Host(name, 1)], config) as remotes:
            return remotes[name].ask(question)

    return call


@pytest.mark.parametrize("name", ["node1", "node5", "node6"])
def test_a_host_answers_over_ssh(name: str, ask: Callable[..., Any]) -> None:
    before = time.time()
    assert before <= ask(name, {"do": "clock"})["time"] <= time.time()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("node2", "cannot be reached by ssh: ssh: connect to host node2 port 22: No route"),
        ("node3", r"or it failed there \(exit code 2\): .*nowhere"),
        ("node4", r"did not answer in 1 s \(clock\)"),
    ],
)
def test_a_host_that_does_not_answer_is_a_sentence(
    name: str, sentence: str, ask: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=sentence):
        ask(name, {"do": "clock"}, timeout=1 if name == "node4" else 60)


def test_what_was_written_on_a_host_goes_when_who_asks_is_gone(
    ask: Callable[..., Any], tmp_path: Path
) -> None:
    request = Request(
        data=None, languages=(), mlm_steps=(), save_dir=str(tmp_path), token="t", settings={}
    )
    question = {"do": "facts", "request": dataclasses.asdict(request), "toml": "no such.toml"}
    facts = from_json(ask("node1", question)["facts"])
    assert facts.written.startswith(str(tmp_path))
    assert not Path(facts.written).exists()
    assert facts.settings == {"no such.toml": "no such.toml: no such file or directory"}
    assert facts.address


@pytest.mark.usefixtures("ask")
def test_what_a_launcher_would_mangle_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "h").write_text("-oProxyCommand=touch$IFS/tmp/x slots=1\n", encoding="utf-8")
    with pytest.raises(InputError, match="is no name of a host"):
        preflight.main([f"--hostfile={tmp_path / 'h'}"])
    (tmp_path / "h").write_text("node1 slots=1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"A=\"'\$\(b\) ;\""):  # of .deepspeed_env
        preflight.main([f"--hostfile={tmp_path / 'h'}"])


# ----------------------------------------------------------------------------------- several hosts

TRAINING = """
[data]
data = "{data}"
tokens_per_sample = 32

[model]
encoder_layers = 1
encoder_embed_dim = 32
encoder_ffn_embed_dim = 64
encoder_attention_heads = 4

[optimization]
max_tokens = 128
max_update = 3

[run]
save_dir = "{run}"
log_interval = 1
"""


def preflight_on(hosts: Hosts, folder: Path, *flags: str) -> tuple[int, list[str], list[str]]:
    """Exit code, lines and problems. Nothing may be left on any host, nor in the folder."""
    before = set(folder.rglob("*"))
    arguments = ["-m", "xlm_ds.preflight", "--hostfile=hostfile", "--timeout=20", *flags]
    result = hosts.run(hosts.names[0], sys.executable, *arguments, cwd=folder)
    for name in hosts.names:
        assert gone(hosts, name), hosts.processes(name)
    assert set(folder.rglob("*")) == before
    assert "Traceback" not in result.stderr
    errors = result.stderr.removeprefix("preflight: error: ").splitlines()
    wrong = [line.strip() for line in errors if "things are wrong" not in line]
    return result.returncode, result.stdout.splitlines(), wrong


def gone(hosts: Hosts, name: str, seconds: float = 5) -> bool:
    """Whether nothing runs there any more, or soon does not: sshd ends after its client."""
    give_up = time.monotonic() + seconds
    while hosts.processes(name):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.faults
@pytest.mark.parametrize("count", [2, 3])
def test_hosts_that_are_well(
    count: int, start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path
) -> None:
    hosts = start_hosts(count)
    toml = TRAINING.format(data=tiny_data, run="run")
    (tmp_path / "job" / "run.toml").write_text(toml, encoding="utf-8")
    code, lines, wrong = preflight_on(hosts, tmp_path / "job", "--config", "run.toml")
    assert (code, wrong) == (0, [])
    assert [line.split(":")[0] for line in lines] == [*hosts.names, "all-reduce"]
    assert all(f"data {lines[0].split('data ')[1][:16]} (" in line for line in lines[:count])
    assert f"GB/s in a ring of {count} hosts (gloo)" in lines[-1]


@pytest.mark.faults
def test_all_that_is_wrong_with_three_hosts_is_said_at_once(
    start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path
) -> None:
    """One cannot be reached; another has other data, another TOML and another folder for the run; a port is taken."""
    hosts = start_hosts(3)
    first, second, third = hosts.names
    job = tmp_path / "job"
    data, run, other = job / "my data ñ", job / "run", tmp_path / "other"
    run.mkdir()
    shutil.copytree(tiny_data, data)
    shutil.copytree(tiny_data, other)
    flip(other / "train.en.bin", 100)
    (job / "run.toml").write_text(TRAINING.format(data=data, run=run), encoding="utf-8")
    (tmp_path / "other.toml").write_text("", encoding="utf-8")
    for source, target in ((other, data), (tmp_path / "other.toml", job / "run.toml")):
        assert hosts.run(second, "mount", "--bind", str(source), str(target)).returncode == 0
    assert hosts.run(second, "mount", "-t", "tmpfs", "none", str(run)).returncode == 0
    hosts.link(third, up=False)
    listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(100)"
    server = hosts.popen(first, sys.executable, "-c", listen)
    while not any("29500" in p.command and p.pid != server.pid for p in hosts.processes(first)):
        time.sleep(0.05)
    before = set(job.rglob("*"))
    arguments = ["-m", "xlm_ds.preflight", "--hostfile=hostfile", "--config=run.toml"]
    result = hosts.run(first, sys.executable, *arguments, cwd=job)
    assert result.returncode == 2
    assert set(job.rglob("*")) == before
    heading, *wrong = [line.strip() for line in result.stderr.splitlines()]
    assert heading == "preflight: error: 5 things are wrong:"
    assert wrong[0].startswith(f"{third}: cannot be reached by ssh: ")
    assert wrong[1].startswith(f"{first}: port 29500 cannot be used: address already in use")
    assert wrong[2].startswith(f"{second}: run.toml is SHA-256 ")
    assert wrong[3].startswith(f"{second}: has other data than {first}: train.en.bin; ")
    assert wrong[4].startswith(f"{second}: does not see in {run} what {first} has written")
    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert names == [first, second, "all-reduce"]
    os.killpg(server.pid, signal.SIGKILL)
    assert gone(hosts, first)
    assert gone(hosts, second)


def launch(hosts: Hosts, job: Path) -> "tuple[int, str]":
    """`deepspeed` with pdsh in `job`, on all hosts; exit code and all that was said."""
    command = ["deepspeed", "--hostfile=hostfile", "--module", "xlm_ds.train", "--config=run.toml"]
    result = hosts.run(hosts.names[0], *command, cwd=job)
    for name in hosts.names:
        assert gone(hosts, name, 20), hosts.processes(name)
    return result.returncode, result.stdout + result.stderr


def test_ranks_with_other_flags_are_refused_without_a_word_from_the_others(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Of a launcher that says of two ranks on one machine that each is the first of its host. Needs no root."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    toml = TRAINING.format(data=tiny_data, run=tmp_path / "run")
    (tmp_path / "run.toml").write_text(toml, encoding="utf-8")
    told = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "xlm_ds.train", "--config=run.toml", f"--lr=0.{rank + 1}"],
            cwd=tmp_path,
            env={**os.environ, **told, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said_by = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    name = socket.gethostname()
    sentence = f"{name} (rank 1): --lr is 0.2, and 0.1 on {name} (rank 0); give every host the same"
    assert f"train: error: {sentence}" in said_by[0]
    assert "error" not in said_by[1]


@pytest.mark.faults
def test_a_run_over_hosts_compares_them_at_its_start(
    start_hosts: Callable[[int], Hosts], tiny_data: Path, tmp_path: Path
) -> None:
    """From start to end through DeepSpeed's launcher and pdsh, of data whose path no shell would leave as it is; then
    with one token that differs on the second host.
    """
    hosts = start_hosts(2)
    job = tmp_path / "job"
    data, other = job / "my $data; \"ñ'", tmp_path / "other"
    shutil.copytree(tiny_data, data)
    shutil.copytree(tiny_data, other)
    escaped = json.dumps(str(data), ensure_ascii=False)[1:-1]
    toml = TRAINING.format(data=escaped, run=job / "the run")
    (job / "run.toml").write_text(toml, encoding="utf-8")
    code, output = launch(hosts, job)
    assert code == 0, output
    assert "2 hosts agree (node1, node2): " in output
    (line,) = (line for line in output.splitlines() if "hosts agree" in line)
    assert float(line.split("looked at in ")[1].split(" s")[0]) < 2
    assert "done: 3 updates" in output
    assert not list((job / "the run").glob(".preflight*"))

    flip(other / "train.en.bin", 100)
    assert hosts.run("node2", "mount", "--bind", str(other), str(data)).returncode == 0
    (job / "run.toml").write_text(toml.replace("the run", "run 2"), encoding="utf-8")
    code, output = launch(hosts, job)
    assert code == 2
    assert output.count("node2: has other data than node1: train.en.bin; ") == 1
    assert "Traceback" not in output
    assert not list((job / "run 2").glob("checkpoint*"))
    assert not list((job / "run 2").glob(".preflight*"))


@pytest.mark.faults
def test_ctrl_c_leaves_nothing_on_any_host(
    start_hosts: Callable[[int], Hosts], tmp_path: Path
) -> None:
    """At whatever moment from the first ssh on: while it connects, while hosts look around, or in their all-reduce."""
    hosts = start_hosts(2)
    job = tmp_path / "job"
    before = set(job.iterdir())
    command = [sys.executable, "-m", "xlm_ds.preflight", "--hostfile=hostfile", "--save-dir=run"]
    met = False
    for seconds in (0.0, 0.3, 0.5, 0.8, 2.0):
        process = hosts.popen(hosts.names[0], *command, cwd=job)
        give_up = time.monotonic() + 30
        while not any(p.name() == "ssh" for p in psutil.Process(process.pid).children(True)):
            assert time.monotonic() < give_up
            time.sleep(0.02)
        time.sleep(seconds)
        met = met or bool(hosts.processes(hosts.names[1]))
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert "Traceback" not in stderr
        assert all(gone(hosts, name) for name in hosts.names)
        assert set(job.iterdir()) == before
    assert met, "no ssh had come to the second host"
