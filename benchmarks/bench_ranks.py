"""What does a save of many ranks cost beside the bytes: messages, the vote, memory? Up to 4 ranks; 1,024 simulated.

Measured: FSDP2 over gloo on this machine, model and AdamW of some 60 MB for each rank; per save what every rank sends
and receives, the time from the last byte written to the publish (votes, fsyncs, manifest, rename), and the memory of a
rank above its state; DCP's `dcp.save` of the same state beside it, whose files are fsynced and whose directory is not.

Simulated: 1,024 votes through a real TCPStore on one machine, counted, merged to one manifest and answered. No files:
on a cluster each rank writes its own.

    python benchmarks/bench_ranks.py [ranks to simulate]
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_memory import forget_peak, memory_nbytes
from environment import publish

from llmtailor.manifest import (
    FileRecord,
    GroupRecord,
    LayerRecord,
    Manifest,
    OptimizerRecord,
    PartRecord,
    TensorRecord,
    World,
    Writer,
    digest_of,
    encode_manifest,
)
from llmtailor.ranks import Ranks
from llmtailor.votes import Vote, digest_schema, encode_message
from llmtailor.writer import Ballot

SAVES = 6
NUM_LAYERS = 32
DIGEST = "xxh3_128:" + "0123456789abcdef" * 2


# ---- Measured ----


def measure(num_ranks: int, num_layers: int) -> dict[str, Any]:
    """One row, of a launch of this file on so many ranks."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, __file__, "--rank", directory, str(num_layers)]
        processes = [
            subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(num_ranks)
        ]
        assert [process.wait(600) for process in processes] == [0] * num_ranks
        rows = [json.loads((Path(directory) / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    others = rows[1:]
    return {
        "ranks": num_ranks,
        "layers": num_layers + 3,
        "state_bytes_per_rank": rows[0]["state_bytes"],
        "sent_bytes_per_save_per_rank": round(statistics.mean(row["sent"] for row in others)),
        "received_bytes_per_save_per_rank": round(statistics.mean(row["received"] for row in others)),
        "coordinator_sent_bytes_per_save": rows[0]["sent"],
        "coordinator_received_bytes_per_save": rows[0]["received"],
        "vote_and_publish_secs": rows[0]["commit_secs"],
        "stall_secs": max(row["stall_secs"] for row in rows),
        "save_secs": max(row["save_secs"] for row in rows),
        "dcp_save_secs": max(row["dcp_secs"] for row in rows),
        "save_by_dcp": round(max(row["save_secs"] for row in rows) / max(row["dcp_secs"] for row in rows), 3),
        "peak_bytes_above_state_per_rank": max(row["peak"] for row in rows),
        "dcp_peak_bytes_above_state_per_rank": max(row["dcp_peak"] for row in rows),
    }


class Stack(torch.nn.Module):
    """Blocks of two square matrices, between an embedding and a head; never run."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        linear = torch.nn.Linear
        blocks = (torch.nn.Sequential(linear(width, width), linear(width, width)) for _ in range(num_layers))
        self.embed_tokens = torch.nn.Embedding(97, width)
        self.layers = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.LayerNorm(width)
        self.lm_head = linear(width, 97)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def run_rank(directory: Path, num_layers: int) -> None:
    """One rank of a measurement."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    from llmtailor import Run

    torch.manual_seed(0)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    width = int((size * 60e6 / 12 / num_layers / 2) ** 0.5) // 8 * 8
    model = Stack(num_layers, width)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state_nbytes = sum(p.to_local().nbytes * 3 for p in model.parameters())

    def measure_dcp(path: Path) -> float:
        dist.barrier()
        began = time.perf_counter()
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=path)
        return time.perf_counter() - began

    measure_dcp(directory / "dcp-warm")  # imports, first allocations
    before = memory_nbytes("VmRSS")
    run = Run(directory / "run", model, optimizer, keep=1)
    ranks = run._checkpointer.meeting.ranks
    assert ranks is not None
    run.save(0).result()
    rows: list[dict[str, float]] = []
    for number in range(1, SAVES + 1):
        dcp_seconds = measure_dcp(directory / f"dcp-{number}")
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory / f"dcp-{number}")
        forget_peak()
        sent, received = ranks.sent_nbytes, ranks.received_nbytes
        optimizer.step()  # nothing has a gradient; it only stands for the step
        dist.barrier()
        began = time.perf_counter()
        handle = run.save(number)
        handle.result()
        assert handle.stats is not None
        rows.append(
            {
                "save_secs": time.perf_counter() - began,
                "commit_secs": handle.stats.commit_secs,
                "stall_secs": handle.stats.stall_secs,
                "sent": ranks.sent_nbytes - sent,
                "received": ranks.received_nbytes - received,
                "peak": memory_nbytes("VmHWM") - before,
                "dcp_secs": dcp_seconds,
            }
        )
        dist.barrier()
    run.close()
    before = memory_nbytes("VmRSS")
    forget_peak()
    measure_dcp(directory / "dcp-last")
    told: dict[str, Any] = {
        name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0] if name != "peak"
    }
    told |= {name: int(told[name]) for name in ("sent", "received")}
    told |= {"peak": int(max(row["peak"] for row in rows)), "state_bytes": state_nbytes}
    told["dcp_peak"] = memory_nbytes("VmHWM") - before
    (directory / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


# ---- Simulated ----


def simulate(num_ranks: int) -> dict[str, Any]:
    """The vote of so many ranks on a save of ``NUM_LAYERS`` blocks and three other layers, all sharded."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    own = describe_save(0, num_ranks)
    votes = [encode_message(vote_of(rank, num_ranks)) for rank in range(num_ranks)]
    key, workers = "save/1-0", 4

    def vote(ranks: range) -> None:
        connection = server.clone()
        for rank in ranks:
            Ranks(rank, num_ranks, lambda: connection).post(f"{key}/vote/{rank}", votes[rank], counter=f"{key}/voted")

    def learn(ranks: range, results: list[int]) -> None:
        connection = server.clone()
        for rank in ranks:
            results.append(len(Ranks(rank, num_ranks, lambda: connection).take(f"{key}/verdict", timeout_secs=60)))

    coordinator = Ranks(0, num_ranks, server.clone)
    ballot = Ballot(
        coordinator, key, step=1, directory=Path("/runs/a"), choice=DIGEST, timeout_secs=60, newest=lambda: None
    )
    ballot._own = vote_of(0, num_ranks)
    began = time.perf_counter()
    threads = [threading.Thread(target=vote, args=(range(n, num_ranks, workers),)) for n in range(workers)]
    for thread in threads:
        thread.start()
    manifest = ballot.count(AllVotesAreThere(), own)  # type: ignore[arg-type]
    encoded, digest = encode_manifest(manifest)
    ballot.announce(manifest, digest)
    published = time.perf_counter()
    received: list[int] = []
    threads += [threading.Thread(target=learn, args=(range(n, num_ranks, workers), received)) for n in range(workers)]
    for thread in threads[workers:]:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "ranks": num_ranks,
        "layers": len(manifest.layers),
        "vote_bytes": max(map(len, votes)),
        "verdict_bytes": max(received),
        "votes_bytes_at_coordinator": sum(map(len, votes)),
        "manifest_bytes": len(encoded),
        "votes_to_verdict_secs": round(published - began, 3),
        "until_all_know_secs": round(time.perf_counter() - began, 3),
    }


class AllVotesAreThere:
    """Stands for the attempt's directory, which the simulation has not."""

    def find_missing_votes(self, ranks: Any) -> list[int]:
        return []


def layers_of(rank: int) -> tuple[LayerRecord, ...]:
    names = ["embed_tokens", *(f"layers.{n}" for n in range(NUM_LAYERS)), "norm", "lm_head"]
    return tuple(
        LayerRecord(
            name=name,
            kind="block" if "." in name else "other",
            stack="layers" if "." in name else None,
            index=int(name.partition(".")[2]) if "." in name else None,
            step=1,
            save_index=0,
            update_count=1,
            reason="first save",
            drift=None,
            weights=None,
            optimizer=None,
            parts=(
                PartRecord(
                    rank=rank,
                    weights=file_of(f"model-{name}.rank-{rank:05d}.safetensors", rank),
                    optimizer=file_of(f"optimizer/{name}.rank-{rank:05d}.safetensors", rank),
                ),
            ),
        )
        for name in names
    )


def file_of(name: str, rank: int) -> FileRecord:
    # A digest of its own for each: equal ones would pack too well.
    return FileRecord(path=name, bytes=10**7 + rank, digest=digest_of(f"{name}{rank}".encode()))


def describe_save(rank: int, num_ranks: int) -> Manifest:
    layers = layers_of(rank)
    tensors = tuple(
        TensorRecord(
            fqn=f"{layer.name}.weight",
            kind="parameter",
            layer=layer.name,
            dtype="F32",
            shape=(4096, 4096),
            trainable=True,
            tied_to=None,
        )
        for layer in layers
    )
    group = GroupRecord(parameters=tuple(tensor.fqn for tensor in tensors), options={"lr": 1e-3})
    return Manifest.model_construct(
        run_id="0" * 32,
        step=1,
        save_index=0,
        created="2026-01-01T00:00:00Z",
        parent=None,
        contents="full",
        strategy="full()",
        world=World(size=num_ranks, sharding="sharded", layout=DIGEST),
        writer=Writer(llmtailor="0", torch="0", python="0", host="a", pid=1),
        tensors=tensors,
        optimizers=(OptimizerRecord.model_validate({"class": "torch.optim.adamw.AdamW", "groups": (group,)}),),
        layers=layers,
        files=(file_of(f"rng_state_{rank}.pth", rank),),
        save=None,
    )


def vote_of(rank: int, num_ranks: int) -> Vote:
    own = describe_save(rank, num_ranks)
    return Vote(
        rank=rank,
        step=1,
        host=f"node-{rank // 8:03d}",
        pid=1000 + rank,
        store="/runs/a",
        choice=DIGEST,
        schema_digest=digest_schema(own),
        parent=None,
        layers=own.layers,
        files=own.files,
    )


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        run_rank(Path(sys.argv[2]), int(sys.argv[3]))
        return
    simulated = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    rows = [measure(num_ranks, num_layers) for num_ranks, num_layers in ((2, 8), (2, 32), (3, 32), (4, 8), (4, 32))]
    publish("ranks", {"measured": rows, "simulated": [simulate(number) for number in (4, 64, simulated)]})


if __name__ == "__main__":
    main()
