"""`python -m quernstone.bench.gpu [--record]`: measures, prints, and keeps what was measured."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console

from quernstone.bench import machine, record, targets
from quernstone.bench.console import line
from quernstone.bench.gpu import attention, moe
from quernstone.bench.run import Results

TARGETS = Path(__file__).with_name("targets.toml")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quernstone.bench.gpu", description=__doc__)
    parser.add_argument("--record", action="store_true", help="append the rows to bench/results/")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of results.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: torch sees none, so nothing was measured", file=sys.stderr)
        return 2
    device, console = torch.device("cuda"), Console(file=sys.stdout)
    contract = targets.load(TARGETS)
    results = Results([], machine.describe() | _facts(device))
    rows = itertools.chain(
        attention.measure(attention.cases(), device),
        moe.measure(moe.cases(), moe.cuda_machine(device)),
    )
    for row in rows:
        targets.judge(row, contract)
        results.rows.append(row)
        console.print(line(row), soft_wrap=True)
    results.save(options.out / "results.json")
    if options.record:
        try:
            record.append(results, record.checkout())
        except record.NotACheckout as error:
            print(f"not recorded, see {options.out}: {error}", file=sys.stderr)
    wrong = [row.id for row in results.rows if row.ours is None and not moe.left_out(row)]
    missed = [row.id for row in results.missed if row.ours is not None]
    print(f"{len(results.rows)} rows; targets missed: {len(missed)}; wrong results: {len(wrong)}")
    for row_id in (*missed, *wrong):
        print(f"  {row_id}")
    return 1 if wrong else 0


def _facts(device: torch.device) -> dict[str, object]:
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "device_memory_gb": round(found.total_memory / 1e9, 1),
        "cuda": str(torch.version.cuda),
    }


if __name__ == "__main__":
    sys.exit(main())
