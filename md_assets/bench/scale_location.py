"""The code location of the scale benchmark, told how large it is by its environment.

Here: what a code server and its runs load; importing it replaces the stages' work in this process. Not here: the assets
without work (`bench.no_op_stages`).
"""

import os

from md_assets.bench.no_op_stages import ARCHIVES_VARIABLE, PER_RUN_VARIABLE, definitions, replace_work, spec_of_scale

replace_work(int(os.environ[PER_RUN_VARIABLE]))
defs = definitions(spec_of_scale(int(os.environ[ARCHIVES_VARIABLE])))
