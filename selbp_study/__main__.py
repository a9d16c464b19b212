"""``python -m selbp_study`` is the ``selbp`` command, for launchers that start a module, such as torchrun."""

import sys

from selbp_study.launch import main

sys.exit(main())
