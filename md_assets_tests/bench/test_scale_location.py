"""The code location of the scale benchmark, in a process of its own, as a code server loads it."""

import os
import subprocess
import sys

from md_assets.bench.no_op_stages import ARCHIVES_VARIABLE, PER_RUN_VARIABLE

CODE = """
import md_assets.bench.scale_location as location
from md_assets.stages import raw, mds
from md_assets.orchestration import latents_launch
graph = location.defs.resolve_asset_graph()
for stage in ("raw", "mds", "latents"):
    (node,) = [node for node in graph.asset_nodes if node.key.path == ["diffdb", stage]]
    print(stage, len(node.partitions_def.get_partition_keys()), node.backfill_policy.max_partitions_per_run)
print(raw.once.__name__, mds.once.__name__, latents_launch.encode.__name__)
"""


def test_it_has_as_many_archives_as_asked_for_and_no_work() -> None:
    environment = {**os.environ, ARCHIVES_VARIABLE: "20", PER_RUN_VARIABLE: "5"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stages, replaced = done.stdout.splitlines()[:3], done.stdout.splitlines()[3]
    assert stages == ["raw 20 5", "mds 20 6", "latents 20 7"]
    assert replaced == "once_from_template once_from_template encode_from_template"
