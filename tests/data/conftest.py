"""Scripts that make golden files write files for tests too."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "golden"))
