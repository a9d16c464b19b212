"""``python -m selbp`` is the ``selbp`` command, which the package ``selbp_study`` has.

Python starts anew for it: what the command settles for its process must be settled before torch is imported, and the
library has imported torch by now.
"""

import importlib.util
import os
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("selbp_study") is None:
        sys.exit("selbp: the command is in the package selbp_study, which is not installed here")
    os.execv(sys.executable, [sys.executable, "-m", "selbp_study", *sys.argv[1:]])
