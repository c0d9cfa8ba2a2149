"""Runs scripts, each in a fresh process, without paying for its imports each time.

The process is forked from a server that has imported torch, transformers and hf_paged, and has run nothing else::

    server (imports, 5 s, once) ──fork──▶ script 1
                                └─fork──▶ script 2
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

SECONDS = 250  # less than a test may take
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "transformers", "transformers.pipelines", "hf_paged"])


def run_script(script: Path, *arguments: str, out: Path) -> str:
    """What a script has printed, standard error included; fails unless it ends well. ``out`` is a file to print to."""
    process = _server.Process(target=_run, args=(str(script), arguments, str(out)), daemon=True)
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
    said = out.read_text() if out.exists() else ""
    assert process.exitcode == 0, f"{script.name} ended with {process.exitcode}\n{said}"
    return said


def _run(script: str, arguments: tuple[str, ...], out: str) -> None:
    import torch

    torch.set_num_threads(1)  # other tests run beside it
    sys.argv = [script, *arguments]
    with open(out, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        runpy.run_path(script, run_name="__main__")
