"""What is this machine, and what can it do at most? Name, SM, driver, versions, a large copy, a large matmul.

python benchmarks/gpu_machine.py --output FILE.json [--dry-run]
"""

from __future__ import annotations

import torch
from gpu_common import benchmark
from gpu_timing import ceilings


def main() -> None:
    """One row."""
    with benchmark(__doc__, "machine", 60) as (chosen, report, _):
        limits = ceilings(chosen.device)
        row = {"copy_tb_per_second": limits.bandwidth / 1e12, "matmul_tflops": limits.matmul / 1e12}
        row |= {f"copy_tb_per_second, {name}": copied / 1e12 for name, copied in limits.copies.items()}
        if chosen.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            row |= {"memory_free_gb": free / 1e9, "memory_gb": total / 1e9}
        report.add(row)
        for name, value in row.items():
            print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
