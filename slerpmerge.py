#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "rich>=13.7",
#   "questionary>=2.0.1",
#   "prompt_toolkit>=3.0.36",
#   "colorama>=0.4.6",
#   "torch>=2.4",
#   "transformers>=4.45",
#   "tokenizers>=0.20",
#   "huggingface-hub>=0.23.2",
#   "filelock>=3.29.7",
#   "safetensors>=0.4.5",
#   "numpy>=1.24",
#   "pyyaml>=6.0",
#   "pytest>=8.0",
# ]
# ///
"""The wizard's story."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence

from slerpkit.merge.save_directory import STOP_SIGNALS
from slerpkit.messages import SlerpMergeError
from slerpkit.screen.flags import build_parser
from slerpkit.screen.session import EXIT_INTERRUPTED, EXIT_REFUSED, NOTHING_WRITTEN, CommandLine, show_fault
from slerpkit.screen.terminal import Terminated, prepare_terminal, signals_end_it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status. Every fault of the world ends here, in one message."""
    command_line: CommandLine | None = None
    try:
        prepare_terminal()
        with signals_end_it():
            command_line = CommandLine(build_parser().parse_args(argv))
            return command_line.run()
    except SlerpMergeError as error:
        fault = error
    except (KeyboardInterrupt, EOFError) as error:
        by = f" by {signal.Signals(error.number).name}" if isinstance(error, Terminated) else ""
        with contextlib.suppress(OSError):  # the terminal may be what was lost
            print(f"\nStopped{by}. {command_line.wrote if command_line else NOTHING_WRITTEN}", file=sys.stderr)
        return 128 + error.number if isinstance(error, Terminated) else EXIT_INTERRUPTED
    except ImportError as error:
        fault = SlerpMergeError(f"A package cannot be loaded: {error}.", "pip install -r requirements.txt")
    except (OSError, MemoryError) as error:
        cause = str(error) or "out of memory"
        fault = SlerpMergeError(f"The system refused: {cause}.", "Put that right and try again.")
    show_fault(fault, command_line.wrote if command_line else NOTHING_WRITTEN)
    return EXIT_REFUSED


if __name__ == "__main__":
    gc.disable()  # loading makes a million objects that stay; to look for garbage among them took 0.5 s
    status = main()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not spoil the leaving
    if threading.active_count() > 1:  # libraries still load in the background; nobody waits for them
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
