"""Peak memory of one real optimizer step of a config on CPU ranks, beside its dense twin's.

    python benchmarks/one_step.py [--config configs/deit_base_s70.yaml] [--ranks 2] [--batch-size 4]

Runs ``launch/train.py`` as it is, on shards made of scikit-learn's photographs, for one step. The peak is the largest resident
set of a rank, as the kernel reports it when the rank ends. The same command with a model of almost no size shows the memory of
imports and data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.machine import describe_machine
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
ENGINES = {"ZeRO-3": ["parallel.backend=deepspeed", "parallel.zero_stage=3"], "FSDP2": ["parallel.backend=fsdp2"]}
MODELS = {
    "packed": [],
    "dense": ["sparsity.density=1.0"],
    "nothing": ["sparsity.density=1.0", "model.embed_dim=12", "model.depth=1", "model.num_heads=1"],
}


def run(arguments: argparse.Namespace, overrides: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """Trains one step; returns the largest peak of a rank in MiB, and the step's metrics."""
    shards = folder / "shards"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", arguments.config]
    command += [f"data.train={shards}/train-*.tar", f"data.val={shards}/val-*.tar", "data.workers=0", "tracking.mlflow=false"]
    command += [f"train.global_batch_size={arguments.batch_size}", "train.eval_batch_size=1", "train.max_steps=1"]
    run_dir = tempfile.mkdtemp(dir=folder)
    rendezvous = {"WORLD_SIZE": arguments.ranks, "LOCAL_WORLD_SIZE": arguments.ranks, "MASTER_PORT": free_port()}
    environment = {**os.environ, **{name: str(value) for name, value in rendezvous.items()}, "MASTER_ADDR": "127.0.0.1"}
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    for rank in range(arguments.ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (Path(run_dir) / f"rank-{rank}.log").open("w") as log:
            process = subprocess.Popen([*command, f"run_dir={run_dir}/run", *overrides], env=own, stdout=log, stderr=log)
        ranks[process.pid] = process
    peaks = []
    for _ in range(arguments.ranks):
        pid, status, usage = os.wait4(-1, 0)
        peaks.append(usage.ru_maxrss / 1024)
        if status:
            failed = ranks.pop(pid)
            for process in ranks.values():
                process.kill()
            logs = "".join(log.read_text() for log in Path(run_dir).glob("*.log"))
            raise SystemExit(f"{' '.join(map(str, failed.args))} failed:\n{logs}")
    line = (Path(run_dir) / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return max(peaks), json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "deit_base_s70.yaml"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="global; even on each rank, for mixup")
    arguments = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [
            sys.executable,
            str(ROOT / "launch" / "make_shards.py"),
            "--source",
            "photographs",
            "--out",
            str(folder / "shards"),
        ]
        for split, count in (("train", 16), ("val", 2)):
            subprocess.run([*make, "--prefix", split, "--count", str(count)], check=True, capture_output=True)
        print(
            f"{Path(arguments.config).name}, {arguments.ranks} ranks, global batch {arguments.batch_size}: peak MiB of a rank"
        )
        for engine, choice in ENGINES.items():
            measured = {model: run(arguments, choice + overrides, folder) for model, overrides in MODELS.items()}
            base = measured["nothing"][0]
            packed, dense = (measured[model][0] - base for model in ("packed", "dense"))
            losses = ", ".join(f"{model} {measured[model][1]['loss']:.4f}" for model in ("packed", "dense"))
            print(
                f"{engine:7} packed {packed + base:7.0f}, dense {dense + base:7.0f}; above the {base:.0f} of imports and data: "
                f"{packed:7.0f} and {dense:7.0f}, ratio {packed / dense:.3f}; loss {losses}",
                flush=True,
            )


if __name__ == "__main__":
    main()
