"""What xlm_ds.costs says of communication, beside what 2 and 3 hosts on this machine take that have slow networks.

    python benchmarks/scale.py [--rounds 3]        # as root; about 7 minutes a round

Each host is a network namespace with one rank, on a bridge, and sends at a rate that tc limits. A run goes through all
networks, one after another, and is read from its metrics.jsonl. What an update takes longer than on the network without
a limit is the communication: ZeRO 3's is not told apart by a run itself. Prints a table and writes results/scale.json.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, ROOT, machine, version_of, versions

from xlm_ds import binarize, plan
from xlm_ds.config import PlanConfig
from xlm_ds.costs import Job, collectives, communicated, seconds
from xlm_ds.deepspeed_config import CONFIG_DIRECTORY
from xlm_ds.devices import this_cpu
from xlm_ds.flags import parse

LANGUAGES = ("ar", "en", "hi")
PORT = 29519
EACH = 4  # updates of a line in metrics.jsonl
LINES = 4  # of a network; the first is left out, as it begins with the network before
MODEL = (
    "--tokens-per-sample=32", "--max-tokens=64", "--encoder-layers=4", "--encoder-embed-dim=256",
    "--encoder-ffn-embed-dim=1024", "--encoder-attention-heads=4",
)  # fmt: skip


class Network(NamedTuple):
    """What tc makes of a host's way out."""

    name: str
    bytes_per_second: float


FREE = Network("no limit", 1e10)
NETWORKS = (FREE, Network("400 Mbit/s", 50e6), Network("100 Mbit/s", 12.5e6))


class Setting(NamedTuple):
    """A JSON of ds_configs, and what is changed in its ZeRO block."""

    name: str
    json: str
    changes: dict[str, float]


SETTINGS = (
    Setting("ZeRO 1", "zero1_bf16", {}),
    Setting("ZeRO 2", "zero2_bf16", {}),
    Setting("ZeRO 2, buckets of 300,000", "zero2_bf16", {"reduce_bucket_size": 300_000}),
    Setting("ZeRO 3", "zero3_bf16", {"stage3_param_persistence_threshold": 0}),
    Setting("ZeRO 3, tensors to 1e5 kept", "zero3_bf16", {"stage3_param_persistence_threshold": 100_000}),
)  # fmt: skip


# ------------------------------------------------------------------------------------------- hosts


class Hosts:
    """Network namespaces with one interface each, on a bridge that has one of its own."""

    def __init__(self, count: int) -> None:
        self.names = [f"xlm{os.getpid()}-{i}" for i in range(1, count + 1)]
        self._switch = f"xlm{os.getpid()}-0"

    def __enter__(self) -> "Hosts":
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names, start=1):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            pair = ("type", "veth", "peer", "name", f"v{i}", "netns", self._switch)
            _ip("-n", name, "link", "add", "eth0", *pair)
            _ip("-n", self._switch, "link", "set", f"v{i}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.78.0.{i}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def connect(self, network: Network) -> None:
        for name in self.names:
            at = ["tc", "-n", name, "qdisc"]
            subprocess.run([*at, "del", "dev", "eth0", "root"], check=False, capture_output=True)
            if network is FREE:
                continue
            rate = f"{network.bytes_per_second * 8:.0f}bit"
            limit = ["root", "tbf", "rate", rate, "burst", "128kb", "limit", "8mb"]
            subprocess.run([*at, "add", "dev", "eth0", *limit], check=True)

    def sent_bytes(self) -> float:
        """Of the first host since it is there."""
        shown = _ip("-n", self.names[0], "-s", "-j", "link", "show", "eth0")
        return float(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


# -------------------------------------------------------------------------------------------- runs


def run(hosts: Hosts, data: Path, config: Path, folder: Path) -> dict[str, dict[str, float]]:
    """For each network, of an update: seconds, those that the run calls communication, and bytes a rank sends."""
    updates = EACH * LINES * len(NETWORKS)
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="eth0", LOCAL_RANK="0",
        WORLD_SIZE=str(len(hosts.names)), MASTER_ADDR="10.78.0.1", MASTER_PORT=str(PORT), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    command = [
        sys.executable, "-m", "xlm_ds.train", str(data), *MODEL, f"--deepspeed-config={config}", f"--save-dir={folder}",
        f"--max-update={updates}", f"--log-interval={EACH}", "--no-epoch-checkpoints",
    ]  # fmt: skip
    hosts.connect(FREE)
    ranks = []
    for rank, name in enumerate(hosts.names):
        output = (folder.parent / f"{folder.name}.{rank}.log").open("w")
        ranks.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=environment | {"RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        found = {}
        for number, network in enumerate(NETWORKS):
            hosts.connect(network)
            first = number * LINES + 1
            wait_for_lines(folder, first, ranks)
            before = hosts.sent_bytes()
            lines = wait_for_lines(folder, first + LINES - 1, ranks)[first:]
            sent = (hosts.sent_bytes() - before) / (EACH * len(lines))
            found[network.name] = {**_of_an_update(lines), "sent_bytes": sent}
        hosts.connect(FREE)  # the checkpoint at the end is not looked at
        for rank in ranks:
            rank.wait(timeout=300)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return found


def wait_for_lines(
    folder: Path, count: int, ranks: list[subprocess.Popen[bytes]]
) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl, as soon as there are so many."""
    path = folder / "metrics.jsonl"
    for _ in range(60_000):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        lines = [line for line in lines if line["kind"] == "train"]
        if len(lines) >= count:
            return lines[:count]
        if any(rank.poll() for rank in ranks):
            break
        time.sleep(0.01)
    logs = [p.read_text(encoding="utf-8") for p in folder.parent.glob(f"{folder.name}.*.log")]
    sys.exit("a rank has failed or is too slow\n" + "\n".join(log[-3000:] for log in logs))


def _of_an_update(lines: list[dict[str, Any]]) -> dict[str, float]:
    outside = ("validation", "checkpoint")
    totals = [
        sum(s for part, s in line["seconds"].items() if part not in outside) for line in lines
    ]
    own = [line["seconds"]["communication"] for line in lines]
    return {
        "seconds": statistics.median(totals) / EACH,
        "communication": statistics.median(own) / EACH,
    }


# -------------------------------------------------------------------------------------- prediction


def job_of(config: Path, data: Path, hosts: int, network: Network) -> Job:
    config_ = parse(PlanConfig, [str(data), *MODEL, "--gpu=cpu", f"--deepspeed-config={config}"])
    ground = plan.Ground(this_cpu(), hosts, 1, network.bytes_per_second)
    facts = plan.read_facts(config_)
    return plan.build_job(
        config_.data, config_.model, config_.optimization, config_.run, facts, ground
    )


# ----------------------------------------------------------------------------------------- the table


def rows_of(
    setting: Setting, config: Path, data: Path, hosts: int, rounds: list[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Of the rounds the quickest counts, for each network: others on the machine make an update longer only."""
    free = seconds(job_of(config, data, hosts, FREE))["communication"]
    without = min(r[FREE.name]["seconds"] for r in rounds)
    for network in NETWORKS[1:]:
        job = job_of(config, data, hosts, network)
        predicted = seconds(job)["communication"] - free
        measured = min(r[network.name]["seconds"] for r in rounds) - without
        in_rounds = [
            predicted / (r[network.name]["seconds"] - r[FREE.name]["seconds"]) for r in rounds
        ]
        sent = statistics.median(r[network.name]["sent_bytes"] for r in rounds)
        yield {
            "setting": setting.name,
            "hosts": hosts,
            "network": network.name,
            "messages": round(sum(s.number for s in collectives(job))),
            "predicted_seconds": predicted,
            "measured_seconds": measured,
            "ratio": predicted / measured,
            "ratio_in_rounds": sorted(in_rounds),
            "seconds_without_limit": without,
            "communication_of_the_run": min(r[network.name]["communication"] for r in rounds),
            "predicted_bytes": sum(communicated(job)),
            "sent_bytes": sent,
            "bytes_ratio": sum(communicated(job)) / sent,
        }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'':30} {'network':18} predicted  measured  ratio  of the run  bytes")
    for row in rows:
        print(
            f"{row['setting']:27} x{row['hosts']} {row['network']:18} {row['predicted_seconds']:9.3f} "
            f"{row['measured_seconds']:9.3f} {row['ratio']:6.2f} {row['communication_of_the_run']:11.3f} "
            f"{row['bytes_ratio']:6.2f}"
        )
    print(
        "\npredicted, measured: seconds an update takes longer than without a limit; of the run: what metrics.jsonl "
        "calls communication; bytes: predicted ÷ sent by a rank, headers with it"
    )


# --------------------------------------------------------------------------------- gradients in bf16


def sum_errors() -> list[dict[str, float]]:
    """How far a sum of gradients in bf16, rounded at every rank as a ring does, is from their sum: norms' ratio.

    A rank's gradient is noise, of norm 1, and a part that all ranks have, of norm `common`.
    """
    torch.manual_seed(0)
    found = []
    for common in (0.0, 0.3, 1.0, 3.0):
        for ranks in (8, 64, 256, 1024):
            shared = common * torch.randn(50_000)
            exact = torch.zeros(50_000, dtype=torch.float64)
            rounded = torch.zeros(50_000, dtype=torch.bfloat16)
            for _ in range(ranks):
                gradient = (shared + torch.randn(50_000)).bfloat16()
                exact += gradient
                rounded += gradient
            error = float((rounded - exact).norm() / exact.norm())
            found.append({"common": common, "ranks": ranks, "error": error})
    return found


def binarized(folder: Path) -> Path:
    text = ROOT / "tests" / "data" / "demo"
    out = folder / "data"
    prefs = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    binarize.main(
        [*prefs, f"--langs={','.join(LANGUAGES)}", f"--destdir={out}", "--nwordssrc=600", "--workers=1"]
    )  # fmt: skip
    return out


def written(setting: Setting, folder: Path) -> Path:
    content = json.loads((CONFIG_DIRECTORY / f"{setting.json}.json").read_text(encoding="utf-8"))
    content["zero_optimization"] |= setting.changes
    path = folder / f"{setting.name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    arguments = parser.parse_args()
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
        sys.exit("scale.py needs root, ip and tc (Debian: iproute2), for network namespaces")
    about = machine()
    torch.set_num_threads(1)
    sums = sum_errors()
    figures: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = binarized(folder)
        configs = {setting.name: written(setting, folder) for setting in SETTINGS}
        for number in range(arguments.rounds):
            for hosts in (2, 3):
                for setting, config in zip(SETTINGS, configs.values(), strict=True):
                    case = f"{setting.name}, {hosts} hosts"
                    print(f"round {number + 1}: {case}", file=sys.stderr)
                    with Hosts(hosts) as up:
                        save = folder / f"{case}, {number}"
                        figures.setdefault(case, []).append(run(up, data, config, save))
                    shutil.rmtree(save)
            rows = [
                row
                for hosts in (2, 3)
                for setting in SETTINGS
                for row in rows_of(
                    setting, configs[setting.name], data, hosts, figures[f"{setting.name}, {hosts} hosts"]
                )
            ]  # fmt: skip
            content = {
                "benchmark": "scale",
                "command": f"python benchmarks/scale.py --rounds {arguments.rounds}",
                "machine": about,
                "versions": {**versions([]), "deepspeed": version_of("deepspeed")},
                "rounds_done": number + 1,
                "model": list(MODEL),
                "rows": rows,
                "sums_in_bf16": sums,
                "rounds": figures,
            }
            arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(rows)
    for row in sums:
        print(
            f"sum in bf16 of {row['ranks']:4} ranks, {row['common']:3} in common: {row['error']:.1%} off"
        )


if __name__ == "__main__":
    main()
