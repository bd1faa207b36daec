"""The child process that compiles kernels: `python -m lynx_trt.plugins.aot_worker`, started by `aot.py` only.

A process of its own because the compiler is single-threaded, because the Triton language decides on import whether it
interprets, and because what it prints is not for a user. Requests and answers are lines of JSON on standard input and
output:

    {"kernel": {...}, "sm": 90, "image": PATH, "images": "cubin" or "ptx"}
    {"entry": str, "threads": int, "shared": bytes, "scratch": bytes, "registers": int, "spills": bytes}    or
    {"error": str}

The image is written to PATH. The worker ends with its standard input.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from lynx_trt.plugins.plan import MODULES, SINGLE_VALUES, Kernel


def main() -> None:
    """Answer requests until there are no more."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed
    for line in sys.stdin:
        request = json.loads(line)
        try:
            kernel, image = kernel_from_json(request["kernel"]), Path(request["image"])
            answer = compile_kernel(kernel, request["sm"], image, request["images"])
        except Exception as error:  # any defect of a kernel or of the compiler: the parent says which kernel it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def kernel_from_json(values: dict[str, Any]) -> Kernel:
    """The Kernel that `dataclasses.asdict` took apart."""
    parameters = tuple((name, kind) for name, kind in values["parameters"])
    constants = tuple((name, value) for name, value in values["constants"])
    return Kernel(values["function"], parameters, constants, values["warps"], values["stages"])


def compile_kernel(kernel: Kernel, sm: int, image: Path, images: str = "cubin") -> dict[str, Any]:
    """Compile one kernel for one SM and write the image, a cubin or PTX; what a launcher has to know of it."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"lynx_trt.plugins.{MODULES[kernel.function]}"), kernel.function)
    source = ASTSource(function, *_signature(kernel, function.arg_names))
    knobs.compilation.always_compile = True  # what is cached has no log of the assembler
    knobs.nvidia.dump_ptxas_log = True

    def compiled_with(most_registers: int | None) -> tuple[Any, int, int]:
        log = io.StringIO()
        options: dict[str, Any] = {"num_warps": kernel.warps, "num_stages": kernel.stages}
        options |= {"enable_fp_fusion": kernel.fuses, "maxnreg": most_registers}
        with contextlib.redirect_stdout(log):
            result = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        text = log.getvalue()
        return result, _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes spill stores", text)

    compiled, registers, spills = compiled_with(kernel.most_registers)
    if spills > 0 and kernel.most_registers is None:
        # To have room for more programs, the assembler may spill a few bytes far below the number that there are.
        compiled, registers, spills = compiled_with(kernel.all_registers)
    if compiled.metadata.profile_scratch_size:
        raise RuntimeError("it wants profile scratch memory, which launchers don't provide")
    made = compiled.asm[images]
    image.write_bytes(made if isinstance(made, bytes) else made.encode())
    return {
        "entry": compiled.metadata.name,
        "threads": 32 * compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "scratch": compiled.metadata.global_scratch_size,
        "registers": registers,
        "spills": spills,
    }


def _signature(kernel: Kernel, names: list[str]) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """(types, constants, attributes) as the compiler takes them; pointers are multiples as plan.py says."""
    constants, types = dict(kernel.constants), dict(kernel.parameters)
    if [name for name in names if name not in constants] != list(types) or len(names) != len(constants) + len(types):
        raise RuntimeError(f"the plan's parameters {list(types)} and constants {sorted(constants)} are not {names}")
    signature = {name: types.get(name, "constexpr") for name in names}
    places = {name: number for number, name in enumerate(names)}
    attributes: dict[tuple[int], Any] = {
        (places[name],): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") and name not in SINGLE_VALUES
    }
    return signature, {(places[name],): value for name, value in constants.items()}, attributes


def _number(pattern: str, text: str) -> int:
    """The number in the assembler's log, -1 if it says none."""
    found = re.search(pattern, text)
    return int(found[1]) if found else -1


if __name__ == "__main__":
    main()
