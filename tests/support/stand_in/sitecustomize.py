"""On a test's PYTHONPATH: a process that starts gateway.py runs support/stub_gateway.py instead.

So the other scripts need not be copied, and their coverage counts.
"""

import os
import sys

if "gateway.py" in map(os.path.basename, sys.orig_argv):
    stub = os.path.join(os.path.dirname(os.path.dirname(__file__)), "stub_gateway.py")
    os.execv(sys.executable, [sys.executable, stub, *sys.argv[1:]])
