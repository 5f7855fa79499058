"""`python -m tests.support.eval_data DIR`: the data sets in LLaVA's layout, to try `vtc eval` with the bundled model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.eval_data import write_all

write_all(Path(sys.argv[1]), *sys.argv[2:3])
