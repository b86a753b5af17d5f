"""On a test's PYTHONPATH: whoever starts gateway.py gets support/stub_gateway.py in its place.

So the other scripts run from where they are, and their coverage counts.
"""

import os
import sys
from pathlib import Path

if Path(sys.orig_argv[-1]).name == "gateway.py":
    os.execv(sys.executable, [sys.executable, str(Path(__file__).parent.parent / "stub_gateway.py")])
