"""`PYTHONPATH=tests python -m support.eval_data DIR`: the data sets in LLaVA's layout, to try `vtc eval` with."""

import sys
from pathlib import Path

from support.eval_data import write_all

write_all(Path(sys.argv[1]), *sys.argv[2:3])
