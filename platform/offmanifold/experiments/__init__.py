"""Experiments: one file answers one question of the papers."""

import os
import tempfile

# before any module of this package is imported: matplotlib would keep its fonts' cache in the user's home
os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), f"offmanifold-matplotlib-{os.getuid()}"))
