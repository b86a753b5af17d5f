"""Where things are in the checkout."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"
