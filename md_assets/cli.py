"""md-assets: what Dagster has no command for.

Here: arguments, exit codes and one-line errors. Not here: the work. Exit codes: 0 done, 1 something failed and it is
named, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from md_assets import __version__
from md_assets.core.errors import MdAssetsError, SettingsError, one_line
from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot
from md_assets.core.spec import DatasetSpec
from md_assets.datasets import all_specs, spec_of

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph

    from md_assets.orchestration.backfills import BackfillPlan
    from md_assets.orchestration.failures import FailedArchive

DONE, FAILED, WRONG_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except SettingsError as error:
        print(f"md-assets: {error}", file=sys.stderr)
        return WRONG_USAGE
    except MdAssetsError as error:
        print(f"md-assets: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"md-assets: {one_line(str(error))}. Check space and permissions of the data root", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="md-assets",
        description="Image-text datasets for diffusion training, as Dagster assets. Everything else runs through "
        "`dagster`; this adds what it has no command for.",
    )
    parser.add_argument("--version", action="version", version=f"md_assets {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="materialize miniatures of all datasets from servers on this machine")
    demo.add_argument("--folder", type=Path, help="where everything of the demo lies (default: ./demo_data)")
    demo.add_argument("--ui", action="store_true", help="open Dagster's UI on the demo's data instead")
    demo.add_argument("--port", type=int, default=3000, help="of the UI (default: 3000)")
    demo.set_defaults(run=_demo)

    status = commands.add_parser("status", help="what is published, told from the ledgers on disk, and what failed")
    status.add_argument("datasets", nargs="*", metavar="DATASET", help="default: all that have data")
    status.add_argument("--archives", action="store_true", help="a row for each archive")
    status.add_argument(
        "--explain",
        action="store_true",
        help="in what stale archives differ; compares the revisions of the models too, for which it may ask the Hub",
    )
    status.add_argument(
        "--config", type=Path, metavar="FILE", help="run config in YAML whose resources are wanted (default: defaults)"
    )
    status.add_argument("--json", action="store_true", help="for scripts: the fields of stages.status.StageTotals")
    status.set_defaults(run=_status)

    prune = commands.add_parser("prune", help="remove raw and mds of archives whose latents are verified")
    prune.add_argument("datasets", nargs="*", metavar="DATASET", help="default: all that have data")
    prune.add_argument("--dry-run", action="store_true", help="tell what would be removed, and change nothing")
    prune.add_argument(
        "--encoders", metavar="TAG", help="whose latents, as in mds_latents_TAG (default: those of the settings)"
    )
    prune.set_defaults(run=_prune)

    verify = commands.add_parser("verify", help="run all checks on what is published; reads every byte")
    verify.add_argument("datasets", nargs="*", metavar="DATASET", help="default: all that have data")
    verify.set_defaults(run=_verify)

    backfill = commands.add_parser("backfill", help="have Dagster's daemon take archives through their stages")
    backfill.add_argument("dataset", metavar="DATASET")
    which = backfill.add_mutually_exclusive_group(required=True)
    which.add_argument("--small", action="store_true", help="the ~1 %% subset for trying things out")
    which.add_argument("--archives", metavar="IDS", help="IDs and ranges FIRST...LAST, with commas between them")
    which.add_argument("--failed", action="store_true", help="what failed last, each archive from there on")
    which.add_argument("--all", action="store_true", help="every archive")
    backfill.add_argument("--stages", default="raw,mds,latents", help="with commas between them (default: all three)")
    then = backfill.add_mutually_exclusive_group()
    then.add_argument("--wait", action="store_true", help="follow it to its end; exit code 1 if something failed")
    then.add_argument("--dry-run", action="store_true", help="only say what it would be about")
    backfill.set_defaults(run=_backfill)

    bench = commands.add_parser("bench", help="measure something against another way of doing it")
    what = bench.add_subparsers(required=True, metavar="WHAT")
    location = what.add_parser("location", help="load time of the code location, against an empty Dagster project")
    location.add_argument("--pairs", type=int, default=7, help="alternating measurements of each (default: 7)")
    location.set_defaults(run=_bench_location)
    latents = what.add_parser("latents", help="images/s of encoding, against the models alone and the reference's loop")
    latents.add_argument("--models", help="default, mid or tiny (default: default on a GPU, mid on a CPU)")
    latents.add_argument("--archives", type=int, default=2, help="how many (default: 2)")
    latents.add_argument("--images", type=int, default=64, help="of each archive (default: 64)")
    latents.add_argument(
        "--resolutions", dest="resolutions_px", type=int, nargs="+", default=[256, 512], help="px (default: 256 512)"
    )
    latents.add_argument("--batch-size", type=int, default=32, help="images at once (default: 32)")
    latents.add_argument("--num-workers", type=int, help="processes that prepare batches (default: one for each core)")
    latents.add_argument("--model-dtype", help="bfloat16 or float32 (default: bfloat16 on a GPU, float32 on a CPU)")
    latents.add_argument("--rounds", type=int, default=3, help="how often each way is measured (default: 3)")
    latents.add_argument(
        "--price-per-hour", type=float, help="of the device, in any currency: also says what a million images cost"
    )
    latents.set_defaults(run=_bench_latents)
    images = what.add_parser("images", help="images/s from archives to MDS shards, against the reference's way")
    images.add_argument("--dataset", default="all", help="jdb, sa1b, diffdb or cc12m (default: all of them)")
    images.add_argument("--images", type=int, default=0, help="of each archive (default: some seconds' worth)")
    images.add_argument("--workers", type=int, default=1, help="processes and cores (default: 1)")
    images.add_argument("--rounds", type=int, default=5, help="how often each way is measured (default: 5)")
    images.add_argument("--memory", action="store_true", help="also the pool's memory over 10,000 small images")
    images.add_argument("--json", action="store_true", help="every figure, for scripts")
    images.set_defaults(run=_bench_images)
    captions = what.add_parser("captions", help="time and memory of indexing captions, time of reading an archive's")
    captions.add_argument(
        "--rows", type=int, nargs="*", default=[1_000_000, 14_000_000], help="of tables like DiffusionDB's"
    )
    captions.add_argument("--texts", type=int, nargs="*", default=[100_000, 1_000_000], help="of tars like SA-1B's")
    captions.add_argument("--folder", type=Path, help="for up to 700 bytes a row (default: the system's temporary one)")
    captions.set_defaults(run=_bench_captions)
    scale = what.add_parser("scale", help="what orchestration costs: backfills of archives that take no work")
    scale.add_argument(
        "--archives", type=int, nargs="+", default=[1_000, 4_000, 14_000], help="how many, each by itself"
    )
    scale.add_argument("--storage", nargs="+", default=["sqlite", "postgres"], help="of Dagster's records")
    scale.add_argument("--per-run", type=int, default=64, help="archives of a run; 0: as committed (default: 64)")
    scale.add_argument("--folder", type=Path, help="for 0.5 MB an archive (default: the system's temporary one)")
    scale.set_defaults(run=_bench_scale)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from md_assets.demo import walkthrough

    folder = arguments.folder or Path(walkthrough.DEFAULT_FOLDER)
    return walkthrough.run_ui(folder, arguments.port) if arguments.ui else walkthrough.run_demo(folder)


def _backfill(arguments: argparse.Namespace) -> int:
    from md_assets.orchestration import backfills

    spec, stages = spec_of(arguments.dataset), backfills.choose_stages(arguments.stages)
    if arguments.archives is not None:
        archives, what = backfills.choose_archives(spec, arguments.archives), ""
    else:
        archives, what = (spec.small, backfills.SMALL) if arguments.small else (spec.archives, backfills.WHOLE)
    with backfills.persistent_instance() as instance:
        from md_assets.definitions import defs
        from md_assets.orchestration.failures import all_failed

        asset_graph = defs.resolve_asset_graph()
        if arguments.failed:
            plan = backfills.plan_failed(instance, asset_graph, spec, all_failed(instance, spec), stages)
        else:
            plan = backfills.plan_backfill(instance, asset_graph, spec, archives, stages, what)
        if plan is None:
            print(f"no archive of {spec.slug} failed last in {', '.join(stages)}")
            return DONE
        print(*plan.lines(), sep="\n", flush=True)
        if arguments.dry_run:
            return DONE
        return _launch(instance, asset_graph, spec, plan, wait=arguments.wait)


def _launch(
    instance: DagsterInstance, asset_graph: BaseAssetGraph, spec: DatasetSpec, plan: BackfillPlan, *, wait: bool
) -> int:
    """Launch a backfill and, if asked, follow it; indexes that it could not merge, as archives failed, are then."""
    from md_assets.orchestration.backfill_progress import follow
    from md_assets.orchestration.backfills import a_daemon_runs, plan_merge, ui_path

    backfill_id = plan.launch(instance, asset_graph)
    print(f"backfill {backfill_id} launched; Dagster's UI shows it at {ui_path(backfill_id)}", flush=True)
    if not a_daemon_runs(instance):
        print("no daemon seems to run: start `dagster dev` with this DAGSTER_HOME, it will take it up", flush=True)
    if not wait:
        return DONE
    result = follow(instance, asset_graph, spec, backfill_id, lambda line: print(f"  {line}", flush=True))
    for failed in result.failed:
        print(f"FAILED {failed.asset.to_user_string()}: {failed.why}")
    if result.error:
        print(f"FAILED backfill {backfill_id}: {one_line(result.error)}")
    print(f"backfill {backfill_id}: {result.status}", flush=True)
    merge = plan_merge(instance, asset_graph, spec, result.unmade)
    if merge is not None:
        _launch(instance, asset_graph, spec, merge, wait=True)
    return DONE if result.success else FAILED


def _bench_location(arguments: argparse.Namespace) -> int:
    from md_assets.bench.location import measure, report

    print(report(measure(arguments.pairs)))
    return DONE


def _bench_latents(arguments: argparse.Namespace) -> int:
    from md_assets.bench.latents import conditions_here, measure, report

    conditions = conditions_here(**{name: value for name, value in vars(arguments).items() if name != "run"})
    print(report(conditions, measure(conditions, lambda line: print(line, flush=True))))
    return DONE


def _bench_images(arguments: argparse.Namespace) -> int:
    from md_assets.bench.images import run

    for lines in run(**{name: value for name, value in vars(arguments).items() if name != "run"}):
        print(lines, flush=True)
    return DONE


def _bench_captions(arguments: argparse.Namespace) -> int:
    from md_assets.bench.captions import measure_all, report

    for figures in measure_all(arguments.rows, arguments.texts, arguments.folder):
        print(report(figures), flush=True)
    return DONE


def _bench_scale(arguments: argparse.Namespace) -> int:
    from md_assets.bench.scale import measure_all
    from md_assets.bench.scale_report import report, report_growth

    figures = []
    for one in measure_all(arguments.archives, arguments.storage, arguments.per_run, arguments.folder):
        print(report(one), flush=True)
        figures.append(one)
    print(report_growth(figures))
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    from md_assets.stages.stale import WantedSettings
    from md_assets.stages.status import dataset_totals, stage_dirs
    from md_assets.terminal import print_archives, print_failed, print_stale, print_totals

    root = DataRoot.from_environment()
    chosen = _chosen(arguments.datasets, root)
    if arguments.archives:
        for spec in chosen:
            print_archives(spec, stage_dirs(root, spec))
        return DONE
    wanted, problem = WantedSettings(), "told by --explain only"
    if arguments.explain or arguments.config:
        from md_assets.orchestration.run_config import wanted_settings  # imports dagster

        wanted, problem = wanted_settings(arguments.config)
    failed, observed, unknown = _records(chosen)
    totals = [
        (spec, dataset_totals(spec, root, wanted, _by_directory(failed, spec, root), observed.get(spec.slug)))
        for spec in chosen
    ]
    if arguments.json:
        datasets = [
            {
                "dataset": spec.slug,
                "archives": len(spec.archives),
                "stages": [stage.as_json() for stage in stages],
                "failed_archives": None if failed is None else [one.as_json() for one in failed[spec.slug]],
            }
            for spec, stages in totals
        ]
        said = {"data_root": str(root.path), "revisions_unknown": problem or None, "failures_unknown": unknown or None}
        print(json.dumps({**said, "datasets": datasets}, indent=1))
        return DONE
    for spec, stages in totals:
        print_totals(spec, stages)
        if failed is not None:
            print_failed(failed[spec.slug])
        if arguments.explain:
            print_stale(spec, stages)
    if arguments.explain and problem:
        print(f"Revisions of the models are not compared: {problem}")
    if failed is None:
        print(f"Which archives failed is not told: {unknown}")
    return DONE


def _records(
    chosen: Sequence[DatasetSpec],
) -> tuple[dict[str, list[FailedArchive]] | None, dict[str, dict[str, str]], str]:
    """What Dagster's records say of each dataset, by slug: what failed last, and the contents that were observed at the
    source. None and nothing, and why, where there are none."""
    if not os.environ.get("DAGSTER_HOME"):
        return None, {}, "DAGSTER_HOME is not set"
    from md_assets.orchestration.backfills import persistent_instance  # imports dagster
    from md_assets.orchestration.failures import all_failed
    from md_assets.orchestration.refresh import known_contents

    try:
        with persistent_instance() as instance:
            failed = {spec.slug: all_failed(instance, spec) for spec in chosen}
            return failed, {spec.slug: known_contents(instance, spec) for spec in chosen}, ""
    except SettingsError as error:
        return None, {}, error.what


def _by_directory(
    failed: dict[str, list[FailedArchive]] | None, spec: DatasetSpec, root: DataRoot
) -> dict[str, set[str]] | None:
    """Directory of a stage -> archives that failed there."""
    if failed is None:
        return None
    from md_assets.orchestration.failures import by_directory
    from md_assets.orchestration.resources import EncodersResource

    return by_directory(failed[spec.slug], root, EncodersResource().tag())


def _prune(arguments: argparse.Namespace) -> int:
    from md_assets.core.progress import ProgressLines
    from md_assets.stages.prune import prune_dataset
    from md_assets.terminal import print_pruned

    root = DataRoot.from_environment()
    tag = arguments.encoders
    if tag is None:
        from md_assets.orchestration.resources import EncodersResource  # imports dagster

        tag = EncodersResource().tag()
    failed = False
    for spec in _chosen(arguments.datasets, root):
        progress = ProgressLines(spec.slug, lambda line: print(line, file=sys.stderr))
        report = prune_dataset(spec, root, tag, dry_run=arguments.dry_run, report=progress)
        print_pruned(report)
        failed |= report.failed
    return FAILED if failed else DONE


def _verify(arguments: argparse.Namespace) -> int:
    from md_assets.stages.verify import verify_dataset
    from md_assets.terminal import print_verdicts

    root = DataRoot.from_environment()
    verdicts = (verdict for spec in _chosen(arguments.datasets, root) for verdict in verify_dataset(spec, root))
    return FAILED if print_verdicts(verdicts) else DONE


def _chosen(slugs: Sequence[str], root: DataRoot) -> list[DatasetSpec]:
    """The datasets that were named, or all that have data.

    Raises:
        SettingsError: there is none of that name, or it has no data.
    """
    named = [spec_of(slug) for slug in dict.fromkeys(slugs)]
    chosen = [spec for spec in named or all_specs() if (root.path / spec.slug).is_dir()]
    absent = ", ".join(spec.slug for spec in named if spec not in chosen)
    if absent or not chosen:
        raise SettingsError(
            f"{root.path} holds no {absent or 'dataset'}", f"Set {DATA_ROOT_VARIABLE} or materialize some of it"
        )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
