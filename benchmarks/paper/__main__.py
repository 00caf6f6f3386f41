"""All benchmarks after the papers' tables, in a budget of time, and the table of `benchmarks/README.md`.

Run as `python -m benchmarks.paper [NAME ...] [--budget-minutes M]` from the repository's root. What is done is kept in `runs/`,
and the next run goes on from there.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.paper import table

NAMES = [
    "energies",
    "vflow_toy",
    "lcma_splits",
    "lcma_families",
    "subspaces",
    "codes",
    "flow_vae",
    "vae_flow",
    "vflow_images",
    "pnf",
]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description="Benchmarks after the papers' tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES, help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="time for all of them together; 0: only the table")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(NAMES)):
        parser.error(f"unknown benchmarks {unknown}, choose from {NAMES}")
    end = time.monotonic() + 60.0 * arguments.budget_minutes
    for name in arguments.names:
        left = end - time.monotonic()
        if left <= 0.0:
            print(f"{name}: no time left")
            continue
        try:
            subprocess.run([sys.executable, "-m", f"benchmarks.paper.{name}"], check=True, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{name}: out of time; run again to go on")
    table.write()


if __name__ == "__main__":
    main()
