"""On a test's PYTHONPATH: whoever starts gateway.py gets support/stub_gateway.py in its place.

So the other scripts run from where they are, and their coverage counts.
"""

import os
import sys
from pathlib import Path

if "gateway.py" in [Path(word).name for word in sys.orig_argv]:
    os.execv(sys.executable, [sys.executable, str(Path(__file__).parent.parent / "stub_gateway.py"), *sys.argv[1:]])
