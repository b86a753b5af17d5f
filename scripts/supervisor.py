"""The boot and its end: starts health server and gateway, finds the model, runs llama-server, watches them, drains.

It is PID 1 of the container: start.sh execs it. Exit status: 0 stopped on request, 2 wrong settings, 3 no model,
4 llama-server failed too often, 5 a service cannot start, 6 the model cannot be fetched now. It relays no requests.

    python3 supervisor.py                      serve
    python3 supervisor.py --check-config       print the settings, and all for which a start would end
    python3 supervisor.py --debug-shell        exit with status 0 if DEBUG_SHELL is on
    python3 supervisor.py --find-model RESULT  find or download the model, in a process of its own: volumes may hang
    python3 supervisor.py --report-gpu         log one line about the GPUs, in a process of its own: tools may hang
    python3 supervisor.py --check-vram BYTES   warn if the GPUs are smaller than the model, likewise
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

from core import signals

if __name__ == "__main__":
    signals.ignore(*signals.STRAY)

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from boot.shutdown import exit_on_stop_signals
from core.installation import add_version, shown


def _parser() -> argparse.ArgumentParser:
    description = "Start, watch and stop everything. Settings are environment variables (docs/CONFIGURATION.md)."
    parser = argparse.ArgumentParser(prog=shown("supervisor"), description=description, allow_abbrev=False)
    add_version(parser)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check-config", action="store_true", help="only check the settings, and what a start needs")
    modes.add_argument("--debug-shell", action="store_true", help="only exit, with status 0 if DEBUG_SHELL is on")
    modes.add_argument("--find-model", type=Path, metavar="RESULT", help="only find or fetch the model (internal)")
    modes.add_argument("--report-gpu", action="store_true", help="only log one line about the GPUs")
    modes.add_argument("--check-vram", type=int, metavar="BYTES", help="only compare a model with the GPUs (internal)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say. Each import is slow, so none is made for another mode: some run at each start."""
    exit_on_stop_signals()
    arguments = _parser().parse_args(argv)
    if arguments.debug_shell:
        return 0 if _debug_shell_enabled(os.environ) else 1
    if arguments.check_config:
        from boot.start_check import check_start

        return check_start(os.environ, sys.stdout)
    if arguments.find_model:
        from boot import model_files

        return model_files.main(arguments.find_model)
    if arguments.report_gpu or arguments.check_vram is not None:
        from boot import gpu

        return gpu.main(arguments.check_vram)
    from boot import supervision

    return supervision.main()


def _debug_shell_enabled(environ: Mapping[str, str]) -> bool:
    """Read DEBUG_SHELL alone: the shell must be available when other settings are wrong."""
    from config.loader import load_config
    from config.settings import ConfigError

    try:
        return load_config({"DEBUG_SHELL": environ.get("DEBUG_SHELL", "")}).supervision.debug_shell
    except ConfigError:
        return False


if __name__ == "__main__":
    sys.exit(main())
