"""Where blocks.yaml finds its data: beside itself, from whatever folder the harness is started."""

from pathlib import Path

BLOCKS = str(Path(__file__).with_name("blocks.jsonl"))
