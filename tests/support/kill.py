"""Kill an evaluation again and again, resume it each time, and compare its answers: `python -m tests.support.kill`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.support.attempts import Case, campaign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare inputs")
    parser.add_argument("--processes", type=int, default=1, help="ranks, started by torchrun's launcher; one is killed")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: kill an actor, or the driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="the latest moment of a kill; by default the time of a run")
    args = parser.parse_args()
    address = None
    if args.engine == "ray":
        import ray

        address = ray.init(num_cpus=4, include_dashboard=False).address_info["address"]
    actors = 2 if args.engine == "ray" else 0
    case = Case(args.questions, args.batch_size, args.workers, args.processes, actors, address)
    folder = Path(tempfile.mkdtemp(prefix="vtc-kill-"))
    begun = time.perf_counter()
    try:
        tally = campaign(case, args.kills, folder, args.seed, args.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{case}\n{tally}\n{time.perf_counter() - begun:.0f} s")
    print(
        f"{tally.kills} kills in {tally.runs} runs of {case.questions} questions: {tally.lost} lost, "
        f"{tally.doubled} doubled, {tally.changed} changed, {tally.missing} missing, {tally.failed} failed attempts"
    )
    return 0 if tally.clean else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
