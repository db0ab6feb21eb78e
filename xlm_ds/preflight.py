"""Looks at all hosts of a run before it is started: what would make it fail, or go wrong, later.

    python -m xlm_ds.preflight --hostfile H                           # hosts, versions, clocks, port, network
    python -m xlm_ds.preflight --hostfile H OUT --config run.toml     # also data, the run's folder, room for the model

Takes the flags and files of train. Goes to every host by ssh, as `deepspeed --hostfile H` will, with the environment
that DeepSpeed will give the ranks. A line for each host; everything that is wrong at once, and exit code 2.
`check_hosts` compares the same from within a run, whatever has started it.
"""

import dataclasses
import json
import math
import os
import queue
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xlm_ds.architectures import parameter_count, shape_from_config
from xlm_ds.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PreflightConfig,
    TrainConfig,
)
from xlm_ds.files import file_sha256
from xlm_ds.flags import config_file, parse, to_dict
from xlm_ds.host_facts import (
    Facts,
    Request,
    checkpoint_bytes,
    described,
    from_json,
    probe,
    problems,
    token_path,
)
from xlm_ds.launching import Host, check_launch, exported, read_hostfile
from xlm_ds.log import EXIT_OK, InputError, logger, run_stage, sentence_of
from xlm_ds.peer_flags import TRAIN_FLAGS

if TYPE_CHECKING:
    import torch

    from xlm_ds.engine import Ranks

Result = TypeVar("Result")

CONNECT_SECONDS = 10
CLOCK_ROUNDS = 3
LOOK_SECONDS = 2.0  # a file made on another host is seen at once on NFS, unless its absence was
RING_SECONDS = 0.3  # of the all-reduce that is timed
RING_BYTES = (1 << 20, 1 << 26)


# ------------------------------------------------------------------------------------------ stage


def main(argv: Sequence[str]) -> int:
    if list(argv) == [SERVE]:
        return serve()
    config = parse(PreflightConfig, argv, peers=TRAIN_FLAGS, description=__doc__)
    hosts = read_hostfile(config.hostfile)
    toml = config_file(argv)
    words = [] if toml is None else ["--config", str(toml)]
    check_launch(config.hostfile, ["--force_multi", *words], os.environ, Path.cwd())
    request = Request(
        data=None if config.data.data is None else str(config.data.data),
        languages=config.data.monolingual_langs,
        mlm_steps=config.data.mlm_steps,
        save_dir=str(config.run.save_dir),
        token=secrets.token_hex(8),
        settings={},
    )
    # Remotes end before the threads that wait for them are waited for.
    with ThreadPoolExecutor(len(hosts)) as threads, connected(hosts, config) as remotes:
        found = Examination(remotes, config, threads)
        found.look(request, None if toml is None else str(toml))
    slots = {host.name: host.slots for host in hosts}
    for name, facts in found.facts.items():
        sys.stdout.write(f"{name}: {described(facts, slots[name])}\n")
    if found.bandwidth:
        sys.stdout.write(f"all-reduce: {found.bandwidth}\n")
    sys.stdout.flush()
    need = needed_bytes(config.data, config.model, found.facts.values())
    if wrong := found.problems + problems(found.facts, slots=slots, need_bytes=need):
        raise InputError(as_one(wrong))
    return EXIT_OK


def as_one(sentences: Sequence[str]) -> str:
    if len(sentences) == 1:
        return sentences[0]
    return "\n  ".join([f"{len(sentences)} things are wrong:", *sentences])


def needed_bytes(data: DataConfig, model: ModelConfig, facts: Iterable[Facts]) -> int | None:
    """What the run's folder needs, if a host has the dictionary; else None. Raises InputError as train would."""
    for found in facts:
        if found.symbols is not None:
            shape = shape_from_config(
                model,
                vocab_size=found.symbols,
                languages=found.languages,
                tokens_per_sample=data.tokens_per_sample,
            )
            return checkpoint_bytes(parameter_count(shape))
    return None


class Examination:
    """What was found on the hosts that answered, and what is wrong beside what that says."""

    def __init__(
        self, remotes: "Mapping[str, Remote]", config: PreflightConfig, threads: ThreadPoolExecutor
    ) -> None:
        self._remotes = remotes
        self._config = config
        self._threads = threads
        self._answering = list(remotes)
        self.facts: dict[str, Facts] = {}
        self.problems: list[str] = []
        self.bandwidth = ""

    def look(self, request: Request, toml: str | None) -> None:
        """All steps, each on all hosts that have answered those before, at the same time."""
        question = {"do": "facts", "request": dataclasses.asdict(request), "toml": toml}
        answers = self._on_each(lambda remote: remote.ask(question))
        self.facts = {name: from_json(answer["facts"]) for name, answer in answers.items()}
        for name, (ahead, error) in self._on_each(_clock).items():
            self._add(name, clock_seconds=ahead, clock_error_seconds=error)
        if written := next((facts.written for facts in self.facts.values()), ""):
            looking = {"do": "look", "path": written}
            for name, answer in self._on_each(lambda remote: remote.ask(looking)).items():
                self._add(name, shares_folder=answer["seen"])
        port = self._usable_port()
        if len(self._answering) > 1:
            self._measure_ring(port)

    def _add(self, name: str, **facts: Any) -> None:
        self.facts[name] = dataclasses.replace(self.facts[name], **facts)

    def _on_each(self, step: "Callable[[Remote], Result]") -> dict[str, Result]:
        """A host that does not answer is a problem, and is not asked again."""
        futures = {
            name: self._threads.submit(step, self._remotes[name]) for name in self._answering
        }
        results = {}
        for name, future in futures.items():
            try:
                results[name] = future.result()
            except InputError as error:
                self.problems.append(f"{name}: {error}")
        self._answering = list(results)
        return results

    def _usable_port(self) -> int:
        """The run's, if it can be had; the ring then shows that it can be reached, too."""
        port = self._config.master_port
        answers = self._on_each(lambda remote: remote.ask({"do": "port", "port": port}))
        for name in list(answers)[:1]:
            if error := answers[name]["error"]:
                self.problems.append(f"{name}: {error}")
                port = answers[name]["free"]
        return port

    def _measure_ring(self, port: int) -> None:
        names = self._answering
        backend = "nccl" if all(self.facts[name].gpus for name in names) else "gloo"
        question = {
            "do": "ring",
            "backend": backend,
            "address": self._config.master_addr or self.facts[names[0]].address,
            "port": port,
            "world": len(names),
            "seconds": self._config.timeout,
        }
        answers = self._on_each(lambda r: r.ask({**question, "rank": names.index(r.host.name)}))
        failed = {name: answer["error"] for name, answer in answers.items() if answer["error"]}
        for name, error in failed.items():
            self.problems.append(f"{name}: all-reduce over all hosts: {error}")
        if not failed and len(answers) == len(names):
            speed = min(answer["bytes_a_second"] for answer in answers.values())
            self.bandwidth = f"{speed / 1e9:.2f} GB/s in a ring of {len(names)} hosts ({backend})"


def _clock(remote: "Remote") -> tuple[float, float]:
    """How far the host's clock is ahead of this one's, and the most that may be wrong: half the quickest answer."""
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        before = time.time()
        there = float(remote.ask({"do": "clock"})["time"])
        after = time.time()
        rounds.append(((after - before) / 2, there - (before + after) / 2))
    error, ahead = min(rounds)
    return ahead, error


# --------------------------------------------------------------------------------- the other hosts

SERVE = "--probe"
# Run on a host instead of the stage itself, so that the environment does not pass through its shell either.
BOOTSTRAP = (
    "import json, os, sys; os.environ.update(json.loads(open(0, 'rb', 0, closefd=False).readline())); "
    f"os.execv(sys.executable, [sys.executable, '-m', 'xlm_ds.preflight', '{SERVE}'])"
)


class Remote:
    """`serve` on a host, over ssh: questions and answers are lines of JSON."""

    def __init__(self, host: Host, config: PreflightConfig, environment: Mapping[str, str]) -> None:
        self.host = host
        self._seconds = config.timeout
        port = [] if config.ssh_port is None else ["-p", str(config.ssh_port)]
        options = ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *port]
        remote = ["cd", str(Path.cwd()), "&&", "exec", sys.executable, "-c", BOOTSTRAP]
        line = " ".join(word if word == "&&" else shlex.quote(word) for word in remote)
        self._said = tempfile.TemporaryFile(  # noqa: SIM115 - closed by close()
            mode="w+", encoding="utf-8", errors="surrogateescape"
        )
        self._ssh = subprocess.Popen(
            ["ssh", *options, host.name, line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,  # a pipe that is read at the end only would be full before (NCCL_DEBUG=INFO)
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            start_new_session=True,  # Ctrl-C is for this process, which ends them
        )
        self._send({**environment, LIMIT: str(LIMIT_STEPS * config.timeout)})

    def _send(self, values: Mapping[str, Any]) -> None:
        assert self._ssh.stdin is not None
        with suppress(BrokenPipeError):  # what it has died of is said when its answer is read
            self._ssh.stdin.write(json.dumps(values) + "\n")
            self._ssh.stdin.flush()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Raises InputError with what has become of the host instead of an answer."""
        assert self._ssh.stdout is not None
        too_late = threading.Event()

        def give_up() -> None:
            too_late.set()
            self._ssh.kill()

        timer = threading.Timer(self._seconds, give_up)
        timer.start()
        try:
            self._send(question)
            line = self._ssh.stdout.readline()
            while line and not line.startswith("{"):  # a login that greets
                line = self._ssh.stdout.readline()
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if too_late.is_set():
            raise InputError(f"did not answer in {self._seconds} s ({question['do']})")
        raise InputError(self._why_it_ended())

    def _why_it_ended(self) -> str:
        code = self._ssh.wait()
        self._said.seek(0)
        last = "no message"
        for line in self._said:
            last = line.strip() or last
        if code == 255:  # ssh's own
            return f"cannot be reached by ssh: {last}"
        return f"cannot run {sys.executable} in {Path.cwd()}, or it failed there (exit code {code}): {last}"

    def end_input(self) -> None:
        """What runs on the host ends by it."""
        assert self._ssh.stdin is not None
        with suppress(BrokenPipeError):
            self._ssh.stdin.close()

    def close(self, give_up: float) -> None:
        """Waits for ssh to end, and no longer than until then."""
        try:
            self._ssh.wait(timeout=max(0.0, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        assert self._ssh.stdout is not None
        self._ssh.stdout.close()
        self._said.close()


@contextmanager
def connected(hosts: Sequence[Host], config: PreflightConfig) -> Iterator[dict[str, Remote]]:
    environment = exported(os.environ, Path.cwd())
    remotes: dict[str, Remote] = {}
    try:
        for host in hosts:
            remotes[host.name] = Remote(host, config, environment)
        yield remotes
    finally:
        for remote in remotes.values():
            remote.end_input()
        give_up = time.monotonic() + CONNECT_SECONDS
        for remote in remotes.values():
            remote.close(give_up)


# ------------------------------------------------------------------------------------- on the host

LIMIT = "XLM_DS_PREFLIGHT_SECONDS"
LIMIT_STEPS = 6  # times the limit of one step: after it the process on the host ends itself


def serve() -> int:
    """Answers questions until its input ends, as it does when who asks is gone; then ends at once, whatever it does."""
    seconds = int(os.environ.pop(LIMIT, "600"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    state = Serving()

    def end() -> None:
        state.clean()
        os._exit(EXIT_OK)

    def read() -> None:
        for line in sys.stdin:
            questions.put(line)
        end()

    timer = threading.Timer(seconds, end)  # where the network fails, no input ends
    timer.daemon = True
    timer.start()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds + 5)  # nor a thread in a library that keeps Python from running
    threading.Thread(target=read, daemon=True).start()
    while True:
        answers.write(json.dumps(state.answer(json.loads(questions.get()))) + "\n")
        answers.flush()


class Serving:
    """A conversation's answers."""

    def __init__(self) -> None:
        self._request: Request | None = None

    def clean(self) -> None:
        """Also what an answer that is under way has written."""
        if self._request is not None:
            with suppress(OSError):
                token_path(self._request).unlink(missing_ok=True)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        match question["do"]:
            case "clock":
                return {"time": time.time()}
            case "facts":
                return {"facts": dataclasses.asdict(self._look_around(question))}
            case "look":
                return {"seen": sees(Path(question["path"]))}
            case "port":
                return try_port(question["port"])
            case "ring":
                return ring_answer(question)
        raise AssertionError(question)

    def _look_around(self, question: Mapping[str, Any]) -> Facts:
        values = question["request"]
        self._request = Request(
            **{**values, **{k: tuple(values[k]) for k in ("languages", "mlm_steps")}}
        )
        return dataclasses.replace(
            probe(self._request),
            settings=_toml_hash(question["toml"]),
            address=_first_address(),
            gpus=gpu_names(),
        )


def _toml_hash(toml: str | None) -> dict[str, str]:
    if toml is None:
        return {}
    try:
        return {toml: f"SHA-256 {file_sha256(Path(toml))[:16]}…"}
    except OSError as error:
        return {toml: sentence_of(error)}


def _first_address() -> str:
    """As DeepSpeed asks for it."""
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    return next(iter(said.split()), socket.gethostname())


def gpu_names() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ()
    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_properties(i).name for i in range(count))


def sees(path: Path) -> bool:
    give_up = time.monotonic() + LOOK_SECONDS
    while not path.exists():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True


def try_port(port: int) -> dict[str, Any]:
    """Whether a run can meet at the port; if not, one that the ring can be tried with."""
    try:
        with socket.create_server(("", port)):
            return {"error": ""}
    except OSError as error:
        with socket.create_server(("", 0)) as other:
            return {
                "error": f"port {port} cannot be used: {os.strerror(error.errno or 0).lower()}; end what has it, or "
                "give another --master_port",
                "free": other.getsockname()[1],
            }


def ring_answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the hosts' processes and measures; any failure is the answer, as the others have it too."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if question["backend"] == "nccl" else torch.device("cpu")
    try:
        dist.init_process_group(
            question["backend"],
            init_method=f"tcp://{question['address']}:{question['port']}",
            rank=question["rank"],
            world_size=question["world"],
            timeout=timedelta(seconds=question["seconds"] / 2),
        )
        speed = ring_bandwidth(device)
    except (RuntimeError, ValueError) as error:  # torch's errors of networks are among these
        return {"error": _first_line(error)}
    dist.destroy_process_group()
    return {"error": "", "bytes_a_second": speed}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def ring_bandwidth(device: "torch.device") -> float:
    """Bytes a second that each rank of the default group sends, and receives, in an all-reduce (2 (n - 1) / n of its
    bytes). Raises RuntimeError if a sum is wrong. All ranks must call it.
    """
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()

    def seconds(count: int) -> float:
        """The slowest rank's."""
        values = torch.ones(count // 4, device=device)
        taken = torch.zeros((), dtype=torch.float64, device=device)
        dist.all_reduce(taken)
        taken.item()  # all are here
        started = time.monotonic()
        dist.all_reduce(values)
        damaged = bool((values != world).any())  # waits for the device
        taken.fill_(math.inf if damaged else time.monotonic() - started)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        if math.isinf(taken.item()):
            raise RuntimeError("a sum over all ranks is wrong; memory or network damage data")
        return float(taken)

    least, most = RING_BYTES
    seconds(least)  # connects
    count = min(most, max(least, int(least * RING_SECONDS / seconds(least))))
    count -= count % 4
    return 2 * (world - 1) / world * count / seconds(count)


# --------------------------------------------------------------------------------------- in a run


def check_hosts(config: TrainConfig, ranks: "Ranks") -> None:
    """compare_hosts of a training's: its data too."""
    compare_hosts(
        request_of(
            config, str(config.data.data), config.data.monolingual_langs, config.data.mlm_steps
        ),
        lambda facts: needed_bytes(config.data, config.model, facts),
        ranks,
    )


def compare_hosts(
    request: Request, need_bytes: Callable[[Iterable[Facts]], int | None], ranks: "Ranks"
) -> None:
    """Compares the hosts of a run that has more than one; all ranks must call it, when the run's folder is there.

    Raises: InputError with all that is wrong on rank 0; the others exit with its code, without a word.
    """
    if ranks.world_size == 1:
        return
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    mine = (socket.gethostname(), secrets.token_hex(8)) if is_first else None
    firsts = {rank: value for rank, value in enumerate(ranks.gathered(mine)) if value is not None}
    if len(firsts) < 2:
        return
    started = time.monotonic()
    names = _names({rank: host for rank, (host, _) in firsts.items()})
    request = dataclasses.replace(request, token=firsts[0][1])
    try:
        facts = dataclasses.replace(probe(request), gpus=gpu_names()) if is_first else None
        of_first = ranks.gathered(facts)[0]
        ahead, error = _clock_beside_rank_0(ranks)
        if facts is not None:
            facts = dataclasses.replace(
                facts,
                shares_folder=not of_first.written or sees(Path(of_first.written)),
                clock_seconds=ahead,
                clock_error_seconds=error,
            )
        found = ranks.gathered(facts)
    finally:
        with suppress(OSError):
            token_path(request).unlink(missing_ok=True)
    hosts = {names[rank]: found[rank] for rank in firsts}

    def compare() -> None:
        need = need_bytes(hosts.values())
        if wrong := problems(hosts, slots=dict.fromkeys(hosts, 1), need_bytes=need):
            raise InputError(as_one(wrong))

    ranks.on_first(compare)
    speed = ring_bandwidth(ranks.device) / 1e9
    logger.info(
        f"{len(hosts)} hosts agree ({', '.join(hosts)}): versions, flags, data, folder and clocks; all-reduce over "
        f"{ranks.world_size} ranks {speed:.2f} GB/s; looked at in {time.monotonic() - started:.1f} s"
    )


def request_of(
    config: TrainConfig | FinetuneConfig,
    data: str | None = None,
    languages: tuple[str, ...] = (),
    mlm_steps: tuple[str, ...] = (),
) -> Request:
    """For compare_hosts, which gives it its token."""
    return Request(
        data=data,
        languages=languages,
        mlm_steps=mlm_steps,
        save_dir=str(config.run.save_dir),
        token="",
        settings=_settings(config),
    )


def _settings(config: TrainConfig | FinetuneConfig) -> dict[str, str]:
    """Every flag but the one that differs between ranks."""
    sections: Iterable[Mapping[str, Any]] = to_dict(config).values()
    flags = {"--" + k.replace("_", "-"): str(v) for values in sections for k, v in values.items()}
    del flags["--local-rank"]
    return flags


def _names(hosts: Mapping[int, str]) -> dict[int, str]:
    """By rank; hosts that call themselves the same (clones, or one machine that plays several) are told by rank."""
    once = Counter(hosts.values())
    return {r: host if once[host] == 1 else f"{host} (rank {r})" for r, host in hosts.items()}


def _clock_beside_rank_0(ranks: "Ranks") -> tuple[float, float]:
    """How far this rank's clock is ahead of rank 0's, and the most that may be wrong.

    No rank leaves a collective before the last has entered: at that moment every clock was between the two times that
    its rank has read before and after.
    """
    best = (math.inf, 0.0, 0.0)
    for _ in range(CLOCK_ROUNDS):
        ranks.any(False)  # so that all enter the next at once
        before = time.time()
        ranks.any(False)
        after = time.time()
        times = ranks.gathered(((after - before) / 2, (before + after) / 2))
        error, middle = times[ranks.rank]
        error_0, middle_0 = times[0]
        best = min(best, (max(error for error, _ in times), middle - middle_0, error + error_0))
    return best[1:]


if __name__ == "__main__":
    sys.exit(run_stage("preflight", main))
