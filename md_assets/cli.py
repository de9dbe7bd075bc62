"""md-assets: what Dagster has no command for.

Here: arguments, exit codes and one-line errors. Not here: the work. Exit codes: 0 done, 1 something failed and it is
named, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from md_assets import __version__
from md_assets.core.errors import MdAssetsError, SettingsError, one_line
from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import Verdict
from md_assets.datasets import all_specs, spec_of

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

    demo = commands.add_parser("demo", help="materialize a miniature JourneyDB from a Hub on this machine")
    demo.add_argument("--folder", type=Path, help="where everything of the demo lies (default: ./demo_data)")
    demo.add_argument("--ui", action="store_true", help="open Dagster's UI on the demo's data instead")
    demo.add_argument("--port", type=int, default=3000, help="of the UI (default: 3000)")
    demo.set_defaults(run=_demo)

    status = commands.add_parser("status", help="what is published, told from the ledgers on disk")
    status.add_argument("datasets", nargs="*", metavar="DATASET", help="default: all that have data")
    status.add_argument("--archives", action="store_true", help="a row for each archive")
    status.set_defaults(run=_status)

    verify = commands.add_parser("verify", help="run all checks on what is published; reads every byte")
    verify.add_argument("datasets", nargs="*", metavar="DATASET", help="default: all that have data")
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="measure something against another way of doing it")
    what = bench.add_subparsers(required=True, metavar="WHAT")
    location = what.add_parser("location", help="load time of the code location, against an empty Dagster project")
    location.add_argument("--pairs", type=int, default=7, help="alternating measurements of each (default: 7)")
    location.set_defaults(run=_bench_location)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from md_assets.demo import walkthrough

    folder = arguments.folder or Path(walkthrough.DEFAULT_FOLDER)
    return walkthrough.run_ui(folder, arguments.port) if arguments.ui else walkthrough.run_demo(folder)


def _bench_location(arguments: argparse.Namespace) -> int:
    from md_assets.bench.location import measure, report

    print(report(measure(arguments.pairs)))
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    from md_assets.stages.status import stage_dirs, totals
    from md_assets.terminal import print_archives, print_totals

    root = DataRoot.from_environment()
    for spec in _chosen(arguments.datasets, root):
        directories = stage_dirs(root, spec.slug)
        if arguments.archives:
            print_archives(spec, directories)
        else:
            print_totals(spec, [totals(spec, directory) for directory in directories])
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from md_assets.terminal import print_verdicts

    root = DataRoot.from_environment()
    failed = print_verdicts(verdict for spec in _chosen(arguments.datasets, root) for verdict in _verdicts(spec, root))
    return FAILED if failed else DONE


def _verdicts(spec: DatasetSpec, root: DataRoot) -> Iterator[tuple[str, str, Verdict]]:
    from md_assets.stages.status import stage_dirs
    from md_assets.stages.verify import verify_archive

    raw, mds, *latents = stage_dirs(root, spec.slug)
    for stage_dir, upstream in ((raw, None), (mds, raw), *((directory, mds) for directory in latents)):
        for archive in spec.archives:
            # By its ledger's file alone: what readers pass over as damaged is just what is to be found.
            if stage_dir.ledger(archive).exists():
                for verdict in verify_archive(stage_dir, upstream, archive):
                    yield f"{spec.slug}/{stage_dir.path.name}", archive, verdict


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
